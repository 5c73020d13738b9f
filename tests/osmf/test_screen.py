from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from osmf.screen import History, LiveArm, LiveFigures, LiveScreen, LiveShift, layout, plain_line, sparkline

EARLY = LiveFigures(stage="starting the broker", seconds=1.2)
LATE = LiveFigures(
    stage="tastes have changed",
    seconds=203.9,
    progress=0.72,
    n_produced=125_035,
    n_consumed=124_321,
    n_dead_letters=151,
    rate_events_s=563.9,
    lag=714,
    auroc=0.7153,
    log_loss=0.14821,
    n_products=24,
    n_products_with_groups=22,
    n_groups=61,
    shifts=(
        LiveShift(
            seconds=131, product_title="Arc floor lamp with a very long name that does not fit", category="lighting"
        ),
        LiveShift(seconds=140, product_title="Mesh office chair"),
    ),
    n_creatives_emitted=16,
    arms=(
        LiveArm(title="best for all", n_impressions=60_000, n_clicks=2_309, ctr=0.0384),
        LiveArm(title="best for the group", n_impressions=60_000, n_clicks=2_575, ctr=0.0429),
        LiveArm(title="uniform", n_impressions=0, n_clicks=0),
    ),
    ratio=1.118,
    ratio_low=1.057,
    ratio_high=1.182,
    n_snapshots=2,
    log_lines=tuple(f"line {k}" for k in range(9)),
)


def drawn(figures: LiveFigures, width: int, history: History | None = None) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(layout(figures, history or History(), width))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140])
def test_every_figure_is_on_the_screen_and_no_line_is_too_long(width: int) -> None:
    text = drawn(LATE, width)
    expected = [
        "tastes have changed", "72%", "3:23", "124,321 of 125,035", "564/s", "714", "0.715", "0.1482", "151",
        "22 of 24", "61", "16", "2:11", "Arc floor lamp", "2:20", "Mesh office chair", "3.84%", "4.29%",
        "2,575 of 60,000", "1.118 (1.057 to 1.182)", "line 8",
    ]  # fmt: skip
    assert [figure for figure in expected if figure not in text] == []
    assert "line 2" not in text
    assert max(cell_len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize("width", [80, 140])
def test_what_is_not_known_yet_is_a_dash(width: int) -> None:
    text = drawn(EARLY, width)
    assert "AUROC so far" in text
    assert "–" in text
    assert "too early to tell" in text
    assert "nan" not in text.lower()
    assert "None" not in text


def test_a_wide_screen_sets_the_boxes_side_by_side() -> None:
    assert len(drawn(LATE, 140).splitlines()) < len(drawn(LATE, 80).splitlines())
    assert len(drawn(LATE, 80).splitlines()) < 24
    assert any("stream" in line and "groups" in line and "arms" in line for line in drawn(LATE, 140).splitlines())


def test_markup_in_titles_and_stages_is_text() -> None:
    figures = replace(
        LATE,
        stage="[bold]stage",
        shifts=(LiveShift(seconds=1, product_title="[red]lamp"),),
        arms=(LiveArm(title="[all]", n_impressions=1, n_clicks=0, ctr=0.0),),
        log_lines=("[x",),
    )
    text = drawn(figures, 140)
    assert "[bold]stage" in text
    assert "[red]lamp" in text
    assert "[x" in text
    assert "[all]" in text


def test_the_plain_line_says_it_all_in_one_line() -> None:
    line = plain_line(LATE)
    assert "\n" not in line
    assert line.startswith(
        "3:23   72%  tastes have changed | 124,321 of 125,035 events | 564/s | lag 714 | AUROC 0.715"
    )
    assert line.endswith("ratio 1.118 (1.057 to 1.182) | dead letters 151 | snapshots 2")
    assert "uniform" not in line
    assert "AUROC" not in plain_line(EARLY)


def test_outside_a_terminal_a_line_comes_every_five_seconds_and_at_a_new_stage() -> None:
    now_s = 0.0
    out = io.StringIO()
    with LiveScreen(Console(file=out, width=40), clock=lambda: now_s) as screen:
        for tenth in range(121):
            now_s = tenth / 10
            stage = "streaming" if now_s < 7 else "[finishing]"
            screen.update(LiveFigures(stage=stage, seconds=now_s, n_consumed=tenth))
    lines = out.getvalue().splitlines()
    assert [line.split("|")[0].split()[0] for line in lines] == ["0:00", "0:05", "0:07", "0:12"]
    assert "[finishing]" in lines[-1]
    assert "\x1b" not in out.getvalue()


def test_the_last_figures_are_written_at_the_end() -> None:
    out = io.StringIO()
    with LiveScreen(Console(file=out, width=40), clock=lambda: 0.0) as screen:
        screen.update(EARLY)
        screen.update(replace(EARLY, n_consumed=77))
    assert len(out.getvalue().splitlines()) == 2
    assert "77 of 0 events" in out.getvalue().splitlines()[-1]


def test_in_a_terminal_the_layout_is_live_and_stays_at_the_end() -> None:
    out = io.StringIO()
    console = Console(file=out, width=140, force_terminal=True, color_system=None)
    with LiveScreen(console) as screen:
        screen.update(EARLY)
        screen.update(LATE)
    assert "124,321 of 125,035" in out.getvalue()
    assert "\x1b[?25h" in out.getvalue()  # The cursor is back.


def test_the_screen_ends_cleanly_when_the_run_fails() -> None:
    out = io.StringIO()

    def run() -> None:
        with LiveScreen(Console(file=out, width=140, force_terminal=True, color_system=None)) as screen:
            screen.update(LATE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert "\x1b[?25h" in out.getvalue()


@pytest.mark.parametrize(
    ("values", "n", "curve"),
    [([], 5, ""), ([0, 0], 5, "▁▁"), ([0, 4, 8], 5, "▁▅█"), ([8, 0, 4, 8], 3, "▁▅█"), ([-1, 1], 4, "▁█")],
)
def test_sparklines(values: list[float], n: int, curve: str) -> None:
    assert sparkline(values, n) == curve
