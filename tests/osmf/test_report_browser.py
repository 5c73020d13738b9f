from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from osmf.report import write_report
from tests.osmf.browser import find_chromium, open_in_browser
from tests.osmf.sample_report import make_replay_report, make_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(make_report(n_products=24, n_creatives=4, n_made=1, picture_px=96), path)
    return path


@pytest.mark.parametrize(("width_px", "dark"), [(1280, False), (390, True)])
def test_pictures_and_charts_are_there_and_the_console_is_silent(sample: Path, width_px: int, dark: bool) -> None:
    findings = open_in_browser(sample, width_px=width_px, dark=dark)
    assert findings.problems() == []
    assert findings.title == "Demo run"
    assert findings.n_pictures > 24 * 5
    assert findings.n_charts > 24 * 4


def test_a_report_without_truth_arms_or_pictures_opens(tmp_path: Path) -> None:
    path = tmp_path / "replay.html"
    write_report(make_replay_report(), path)
    findings = open_in_browser(path)
    assert findings.problems() == []
    assert findings.n_pictures == 0
    assert findings.n_charts > 5


def test_the_filters_hide_what_does_not_match(sample: Path) -> None:
    ask = """(() => {
      const shown = () => Array.from(document.querySelectorAll("details.item")).filter((d) => !d.hidden).length;
      const set = (id, key, value) => {
        const control = document.getElementById(id);
        control[key] = value;
        control.dispatchEvent(new Event("input"));
        return shown();
      };
      return [shown(), set("find", "value", "LAMP brass"), set("find", "value", ""),
        set("category", "value", "office"), set("shifted", "checked", true),
        document.getElementById("found").textContent];
    })()"""
    assert open_in_browser(sample, ask=ask).answer == [24, 1, 24, 4, 3, "3 of 24 products"]


def test_printing_unfolds_every_product(sample: Path) -> None:
    ask = """(() => {
      const open = () => document.querySelectorAll("details[open]").length;
      const before = open();
      dispatchEvent(new Event("beforeprint"));
      const printed = open();
      dispatchEvent(new Event("afterprint"));
      return [before, printed, open()];
    })()"""
    assert open_in_browser(sample, ask=ask).answer == [1, 24, 1]


def test_light_and_dark_are_different_themes(sample: Path, tmp_path: Path) -> None:
    backgrounds: list[int] = []
    for dark in (False, True):
        shot = tmp_path / f"{dark}.png"
        open_in_browser(sample, dark=dark, screenshot=shot, full_page=False)
        with Image.open(io.BytesIO(shot.read_bytes())) as image:
            assert image.size == (1280, 900)
            backgrounds.append(image.convert("L").tobytes()[0])
    assert backgrounds[0] > 230
    assert backgrounds[1] < 40


def test_the_browser_sees_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><title>bad</title><img alt=torn src='data:image/png;base64,AAAA'>"
        "<img alt=away src='http://127.0.0.1:9/x.png'>"
        "<svg class=chart aria-label=flat viewBox='0 0 9 9' style='height:0'><path d='M0 0H9'/></svg>"
        "<svg class=chart aria-label=blank width=9 height=9></svg>"
        "<div style='width:3000px'>wide</div><script>console.error('spoken'); throw new Error('thrown')</script>"
    )
    problems = "\n".join(open_in_browser(page).problems())
    for expected in (
        "broken picture: torn",
        "broken picture: away",
        "empty chart: flat",
        "empty chart: blank",
        "spoken",
        "thrown",
        "the page fetched http://127.0.0.1:9/x.png",
        "px wide in a window of 1280 px",
    ):
        assert expected in problems


def test_a_missing_page_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ERR_FILE_NOT_FOUND"):
        open_in_browser(tmp_path / "none.html")


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_chromium_the_test_fails_in_ci_and_is_skipped_elsewhere(
    ci: str, outcome: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="apt-get install chromium"):
        find_chromium()
