from __future__ import annotations

import base64
import io
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from osmf.report import ReportTooLargeError, render_report, write_report
from osmf.report_model import (
    Cell,
    Counts,
    Creative,
    Estimate,
    Group,
    Picture,
    Product,
    Report,
    ReportFigureError,
    Trait,
)
from osmf.report_view import choose_showcase, headline, heat, product_view
from osmf.report_words import (
    change,
    clock,
    compact,
    duration,
    group_letter,
    group_words,
    interval,
    percent,
    trait_words,
)
from osmf.thumbnails import thumbnail
from tests.osmf.sample_report import make_replay_report, make_report


@pytest.fixture(scope="module")
def sample() -> Report:
    return make_report(n_products=12, n_creatives=4, n_made=2, picture_px=64)


@pytest.fixture(scope="module")
def page(sample: Report) -> str:
    return render_report(sample)


def png(size: tuple[int, int], mode: str = "RGB", colour: object = (200, 20, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")  # type: ignore[arg-type]
    return buffer.getvalue()


def test_the_page_names_no_other_address(page: str) -> None:
    assert re.findall(r"""(?:src|href)=["'](?!data:image/jpeg;base64,|#)""", page) == []
    assert "http:" not in page.replace("http://www.w3.org", "")
    assert "https:" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_every_chart_is_well_formed_and_named(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(charts) > 50
    for chart in charts:
        root = ET.fromstring(chart)
        assert root.findtext("title")
        assert not re.search(r"\b(nan|inf|None)\b", chart)


def test_the_same_model_gives_the_same_bytes(sample: Report, page: str) -> None:
    assert render_report(sample) == page


def test_every_figure_of_the_model_is_on_the_page(sample: Report, page: str) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("&nbsp;", " ")
    for product in sample.products:
        assert product.title in page
        for creative in product.creatives:
            assert creative.creative_id in page
        for cell in product.cells:
            for counts in (cell.before, cell.after) if cell.after else (cell.all,):
                if counts is not None and counts.ctr is not None:
                    assert f"{percent(counts.ctr.value)} {interval(counts.ctr)}" in text
    for snapshot in sample.snapshots:
        assert snapshot.path in page
    for shift in sample.shifts:
        assert clock(shift.detected_s) in page
    assert "The ratio&#39;s interval is a bootstrap over users." in page
    assert "not JSON" in page


def test_titles_and_prompts_cannot_inject_markup(sample: Report) -> None:
    evil = "</title></svg><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    product = sample.products[0]
    creatives = tuple(replace(c, prompt=evil, picture=None) for c in product.creatives)
    bad = replace(product, title=evil, category=evil, creatives=creatives)
    page = render_report(replace(sample, products=(bad,), header=replace(sample.header, title=evil)))
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    for chart in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(chart)


def test_a_file_is_written_whole_within_its_limit(sample: Report, tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    n_bytes = write_report(sample, path)
    assert path.stat().st_size == n_bytes < 8_000_000
    smaller = write_report(sample, path, max_bytes=n_bytes - 1)
    assert smaller < n_bytes
    with pytest.raises(ReportTooLargeError, match=r"allowed: 1,000\. Nothing is written\. Give it fewer products"):
        write_report(sample, path, max_bytes=1000)
    assert path.stat().st_size == smaller
    assert os.listdir(path.parent) == ["report.html"]


def test_what_a_replay_does_not_have_is_left_out() -> None:
    page = render_report(make_replay_report())
    for absent in ('id="arms"', 'id="shifts"', 'id="truth"', 'id="made"', "NMI", "AUROC", "<img", "None", "nan"):
        assert absent not in page
    assert "2 of the run's 80 products are shown" in page
    assert "No group yet" in page


def test_an_empty_run_has_a_page() -> None:
    report = replace(make_replay_report(), products=())
    header = replace(report.header, n_impressions=0, n_clicks=0, n_consumed=0, n_products=0)
    assert "0%" in render_report(replace(report, header=header))


@pytest.mark.parametrize(
    ("ratio", "value", "tone", "words"),
    [
        (Estimate(1.18, 1.11, 1.25), "+18%", "good", "more clicks"),
        (Estimate(1.05, 0.97, 1.13), "+5%", "plain", "no clear difference"),
        (Estimate(0.9, 0.85, 0.96), "−10%", "bad", "fewer clicks"),
    ],
)
def test_the_headline_says_what_the_interval_allows(
    sample: Report, ratio: Estimate, value: str, tone: str, words: str
) -> None:
    assert sample.experiment is not None
    first = headline(replace(sample, experiment=replace(sample.experiment, ratio=ratio)))[0]
    assert (first.value, first.tone) == (value, tone)
    assert words in first.caption


def test_the_headline_counts_true_shifts_false_alarms_and_missed_categories(sample: Report) -> None:
    assert sample.truth is not None
    false = replace(sample.shifts[0], category="kitchen", is_true=False)
    truth = replace(sample.truth, changed_categories=("lighting", "bedroom"))
    shifts = headline(replace(sample, shifts=(*sample.shifts, false), truth=truth))[1]
    assert shifts.value == str(len(sample.shifts))
    assert shifts.caption.endswith("found, 1 false alarm")
    assert shifts.detail == "1 of 2 changed categories (lighting, bedroom)"
    assert shifts.tone == "bad"


def test_showcase_products_are_the_telling_ones_of_different_categories(sample: Report) -> None:
    chosen = [next(p for p in sample.products if p.product_id == name) for name in choose_showcase(sample)]
    assert len({product.category for product in chosen}) == 3
    assert chosen[0].product_id in {shift.product_id for shift in sample.shifts}
    assert choose_showcase(replace(sample, showcase=("P002", "gone"))) == ("P002",)


def product_of(cells: tuple[Cell, ...]) -> Product:
    return Product(
        product_id="p",
        title="Lamp",
        groups=(Group(group_id=8, share=0.7), Group(group_id=5, share=0.3)),
        creatives=(
            Creative(creative_id="a"),
            Creative(creative_id="b"),
            Creative(creative_id="n", origin="generated", group_id=5, created_s=3.0),
            Creative(creative_id="o", origin="generated", group_id=99, created_s=4.0),
        ),
        cells=cells,
    )


def counts(n: int, clicks: int) -> Counts:
    return Counts(n, clicks, Estimate(clicks / n, max(clicks / n - 0.01, 0), clicks / n + 0.01))


def test_the_best_of_a_group_is_ranked_in_each_phase_by_its_own_cells() -> None:
    view = product_view(
        product_of(
            (
                Cell(group_id=8, creative_id="a", all=counts(200, 12), before=counts(100, 9), after=counts(100, 3)),
                Cell(group_id=8, creative_id="b", all=counts(200, 12), before=counts(100, 3), after=counts(100, 9)),
                Cell(group_id=5, creative_id="a", all=counts(100, 2), before=counts(100, 2)),
                Cell(group_id=5, creative_id="n", all=counts(50, 5), after=counts(50, 5)),
            )
        )
    )
    assert [
        (group.letter, [(best.title, [r.creative.creative_id for r in best.creatives]) for best in group.best])
        for group in view.groups
    ] == [
        ("A", [("Before the shift", ["a", "b"]), ("After the shift", ["b", "a"])]),
        ("B", [("Before the shift", ["a"]), ("After the shift", ["n"])]),
    ]
    assert [(row.creative.creative_id, row.made_for) for row in view.rows] == [
        ("a", ""),
        ("b", ""),
        ("n", "B"),
        ("o", "an earlier group"),
    ]
    assert [[cell is not None and cell.leads for cell in row.cells] for row in view.rows] == [
        [False, False],
        [True, False],
        [False, True],
        [False, False],
    ]
    assert [len(items) for items in view.made] == [0, 1]
    assert [creative.creative_id for creative in view.made_for_earlier] == ["o"]
    assert (view.n_impressions, view.mean_ctr) == (550, percent(31 / 550))


@pytest.mark.parametrize(
    ("ctr", "expected"),
    [
        (Estimate(0.05, 0.02, 0.09), 0),
        (Estimate(0.034, 0.031, 0.04), 1),
        (Estimate(0.05, 0.04, 0.06), 2),
        (Estimate(0.07, 0.06, 0.08), 3),
        (Estimate(0.026, 0.02, 0.029), -1),
        (Estimate(0.02, 0.01, 0.029), -2),
        (Estimate(0.01, 0.0, 0.02), -3),
        (None, 0),
    ],
)
def test_a_cell_has_a_colour_only_where_its_interval_leaves_the_mean(ctr: Estimate | None, expected: int) -> None:
    assert heat(ctr, 0.03) == expected


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Estimate(float("nan"), 0, 1),
        lambda: Estimate(0.5, 0.6, 0.7),
        lambda: Estimate(0.5, 0.1, float("inf")),
        lambda: Counts(3, 4, None),
        lambda: Counts(3, -1, None),
    ],
)
def test_impossible_figures_are_refused(bad: object) -> None:
    assert callable(bad)
    with pytest.raises(ReportFigureError, match="The report is not written"):
        bad()


def trait(attribute: str, value: str, share: float, lift: float) -> Trait:
    return Trait(attribute=attribute, value=value, share=share, lift=lift)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (
            [
                trait("age", "25-34", 0.4, 1.8),
                trait("resident_city_level", "tier_1", 0.4, 1.5),
                trait("gender", "female", 0.9, 2.1),
                trait("age", "35-44", 0.2, 1.2),
                trait("os_plant", "ios", 0.5, 1.01),
            ],
            "mostly women (2.1×), age 25–34 (1.8×), city tier 1 (1.5×)",
        ),
        ([trait("is_vip", "1", 0.4, 2.0)], "more often VIP members (2.0×)"),
        ([trait("gender", "male", 0.5, 1.0)], "close to the product's average user"),
        ([], "close to the product's average user"),
    ],
)
def test_a_group_in_plain_words(profile: list[Trait], words: str) -> None:
    assert str(group_words(profile)) == words


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("gender", "F", "women"),
        ("has_car", "True", "car owners"),
        ("resident_city_level", "3", "city tier 3"),
        ("resident_city_level", "tier_3", "city tier 3"),
        ("profession", "office_worker", "office worker"),
        ("user_feature_0", "81ce123c", "user feature 0 81ce123c"),
    ],
)
def test_a_trait_in_plain_words(attribute: str, value: str, words: str) -> None:
    assert trait_words(attribute, value) == words


def test_numbers_in_words() -> None:
    assert [percent(x) for x in (0, 0.123, 0.0321, 0.00047)] == ["0%", "12.3%", "3.21%", "0.047%"]
    assert [change(x) for x in (1.18, 0.9, 1.001)] == ["+18%", "−10%", "±0%"]
    assert [compact(x) for x in (0, 12, 563.9, 999_700, 3_210_000)] == ["0", "12", "564", "1M", "3.21M"]
    assert [duration(x) for x in (8.42, 200, 7500, 100_000)] == ["8.4 s", "3 min 20 s", "2 h 05 min", "1 d 3 h"]
    assert [clock(x) for x in (0, 65.9, 3725)] == ["0:00", "1:05", "1:02:05"]
    assert [group_letter(k) for k in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_thumbnails_are_small_jpegs_and_cut_outs_get_a_backdrop(tmp_path: Path) -> None:
    wide = decoded(thumbnail(Picture(data=png((600, 300))), 256))
    assert (wide.format, wide.size) == ("JPEG", (256, 128))
    assert decoded(thumbnail(Picture(data=png((20, 10))), 256)).size == (20, 10)
    clear = decoded(thumbnail(Picture(data=png((40, 40), "RGBA", (0, 0, 0, 0))), 256))
    pixel = clear.getpixel((20, 20))
    assert isinstance(pixel, tuple)
    assert min(pixel) > 235
    path = tmp_path / "a picture.png"
    path.write_bytes(png((30, 30)))
    for uri in (str(path), path.as_uri()):
        assert decoded(thumbnail(Picture(uri=uri), 256)).size == (30, 30)


@pytest.mark.parametrize(
    "picture",
    [
        None,
        Picture(),
        Picture(data=b""),
        Picture(data=b"not a picture"),
        Picture(data=png((64, 64))[:60]),
        Picture(uri="/no/such/file.png"),
        Picture(uri="https://example.org/x.png"),
        Picture(uri="file://elsewhere/x.png"),
        Picture(uri=__file__),
    ],
)
def test_a_picture_that_cannot_be_had_is_none(picture: Picture | None) -> None:
    assert thumbnail(picture, 128) is None
