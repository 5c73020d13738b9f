from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osmf.charts import (
    Bar,
    Line,
    Mark,
    Point,
    Row,
    bar_chart,
    dot_plot,
    interval_bar,
    nice_ticks,
    share_bar,
    thinned,
    time_chart,
    time_ticks,
)
from osmf.report_model import Estimate, Moment
from osmf.report_words import percent

values = st.floats(-1e9, 1e9)


def numbers(chart: str) -> list[float]:
    """Return the coordinates of a chart."""
    ET.fromstring(chart)
    found = re.findall(r'(?:\bd|x|y|cx|cy|width|height|viewBox)="([^"]+)"', chart)
    return [float(n) for text in found for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?|nan|inf", text)]


def test_ticks_are_round_and_within() -> None:
    assert nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(0.021, 0.047, 4) == [0.025, 0.03, 0.035, 0.04, 0.045]
    assert nice_ticks(3, 3, 4) == [3]
    assert time_ticks(0, 240, 5) == [0, 60, 120, 180, 240]
    assert time_ticks(1, 9, 5) == [2, 4, 6, 8]
    assert len(time_ticks(0, 40 * 86400, 5)) <= 6


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 9))
def test_ticks_never_leave_their_range_and_are_few(low: float, span: float, n: int) -> None:
    high = low + span
    ticks = nice_ticks(low, high, n)
    assert len(ticks) <= 2 * n + 2
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert ticks == sorted(ticks)


@given(st.lists(values, min_size=1, max_size=900))
def test_thinning_keeps_ends_and_extremes(ys: list[float]) -> None:
    points = [Point(float(k), y) for k, y in enumerate(ys)]
    kept = thinned(points, 60)
    assert len(kept) <= 62
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (min(p.y for p in kept), max(p.y for p in kept)) == (min(ys), max(ys))
    assert [p.x for p in kept] == sorted(p.x for p in kept)


@given(st.lists(values, max_size=30), st.booleans())
def test_a_time_chart_is_finite_and_inside_for_any_values(ys: list[float], from_zero: bool) -> None:
    points = [Point(float(k), y, y - 1, y + 1) for k, y in enumerate(ys)]
    chart = time_chart("t", [Line("a", points)], y_format=lambda y: f"{y:.2g}", from_zero=from_zero)
    found = numbers(chart)
    assert all(math.isfinite(n) and -20 <= n <= 460 for n in found)


@given(st.lists(st.tuples(values, st.floats(0, 1e6)), min_size=1, max_size=12))
def test_a_dot_plot_is_finite_and_inside_for_any_values(marks: list[tuple[float, float]]) -> None:
    rows = [Row(f"row {k}", [Mark(v, v - half, v + half)]) for k, (v, half) in enumerate(marks)]
    found = numbers(dot_plot("t", rows, x_format=lambda x: f"{x:.2g}", reference=1.0, reference_label="one"))
    assert all(math.isfinite(n) and -20 <= n <= 460 for n in found)


def test_a_time_chart_writes_names_at_the_ends_without_touching() -> None:
    lines = [Line(f"arm {k}", [Point(0, 0.5), Point(60, 0.5 + 0.001 * k)], k) for k in range(4)]
    chart = time_chart("CTR", lines, y_format=percent, moments=[Moment(seconds=30, label="change")])
    labels = [e for e in ET.fromstring(chart).iter("text") if (e.get("class") or "").startswith("label")]
    ys = sorted(float(label.get("y") or "nan") for label in labels)
    assert labels[0].text == "arm 0 50.0%"
    assert all(b - a >= 13.9 for a, b in itertools.pairwise(ys))
    assert "change" in chart
    assert "arm 3: from 50.0% to 50.3%" in chart


def test_a_moment_outside_the_run_is_not_drawn() -> None:
    line = Line("", [Point(0, 1), Point(10, 2)])
    assert "moment" not in time_chart("t", [line], y_format=percent, moments=[Moment(seconds=99, label="x")])


@pytest.mark.parametrize(
    "chart",
    [
        time_chart("t", [], y_format=percent),
        time_chart("t", [Line("a", [])], y_format=percent),
        dot_plot("t", [], x_format=percent),
        bar_chart("t", []),
    ],
)
def test_no_data_is_said(chart: str) -> None:
    assert "nothing to show" in chart
    assert all(math.isfinite(n) for n in numbers(chart))


def test_bars_are_as_long_as_their_values() -> None:
    chart = bar_chart("t", [Bar("a", 40, "40"), Bar("b", 10, "10"), Bar("c", 0, "0")])
    widths = [float(bar.get("width") or "nan") for bar in ET.fromstring(chart).iter("rect")]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    assert widths[2] == 0


def test_an_interval_bar_puts_values_on_the_shared_scale() -> None:
    estimates = [("before", Estimate(0.02, 0.01, 0.03)), ("after", Estimate(0.04, 0.03, 0.2))]
    chart = interval_bar(estimates, scale=0.08, reference=0.04, colour=7)
    dots = list(ET.fromstring(chart).iter("circle"))
    assert [float(dot.get("cx") or "nan") for dot in dots] == [31.0, 60.0]
    assert [dot.get("class") for dot in dots] == ["dot c1 hollow", "dot c1"]
    assert max(numbers(chart)) <= 120
    assert "before: 2.00% (1.00–3.00%); after: 4.00% (3.00–20.0%); product&#39;s mean 4.00%" in chart


def test_shares_are_named_where_there_is_room() -> None:
    chart = share_bar("t", [("women", 3.0), ("anybody", 1.0), ("x", 0.02)])
    texts = [text.text for text in ET.fromstring(chart).iter("text")]
    assert texts == ["women 75%", "25%"]
    assert "x: 0%" in chart


def test_labels_are_escaped() -> None:
    chart = bar_chart("<t>", [Bar("<a> & b", 1, "<1>")])
    assert "<a>" not in chart
    assert ET.fromstring(chart).findtext("title") == "<t>"
