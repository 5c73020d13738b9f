"""Charts: inline SVG drawn on the server, in the colours of the page that holds them.

Every chart has a title and a description for those who cannot see it, labels at the data instead of
legends, and tooltips through ``<title>``. Colours are classes (``c0`` to ``c5``, told apart with
colour-blind eyes), so that the page's light and dark themes apply. Sizes are in CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from osmf.report_model import Estimate, Moment
from osmf.report_words import clock, interval, percent

N_COLOURS = 6
MAX_POINTS = 240
_CHAR_PX = 6.4
_BOLD_PX = 7.4
"""The width of a character, generous: the reader's font is not known here."""

_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 604800)

Format = Callable[[float], str]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a line; ``low`` and ``high`` bound its band where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A line with its name, written at its end, and its colour (0 to 5)."""

    name: str
    points: Sequence[Point]
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot with its interval where there is one; hollow for what is only compared with."""

    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0
    hollow: bool = False
    tooltip: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a dot plot."""

    label: str
    marks: Sequence[Mark]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar with its label and what is written at its end."""

    label: str
    value: float
    text: str


def nice_ticks(low: float, high: float, n: int) -> list[float]:
    """Return about n round values (1, 2 or 5 times a power of ten apart) within low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / max(n, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw * 0.75), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(low: float, high: float, n: int) -> list[float]:
    """Return about n moments on whole seconds, minutes or hours within low to high."""
    span = high - low
    step = next((s for s in _TIME_STEPS_S if span / s <= n), _TIME_STEPS_S[-1] * math.ceil(span / 6e5))
    return [float(k * step) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def thinned(points: Sequence[Point], n_max: int = MAX_POINTS) -> list[Point]:
    """Return at most n_max + 2 points: of each stretch the lowest and the highest, and both ends.

    Peaks stay; a mean would flatten them.
    """
    if len(points) <= n_max:
        return list(points)
    n_stretches = n_max // 2
    kept = {0, len(points) - 1}
    for k in range(n_stretches):
        stretch = range(k * len(points) // n_stretches, (k + 1) * len(points) // n_stretches)
        kept.add(min(stretch, key=lambda i: points[i].y))
        kept.add(max(stretch, key=lambda i: points[i].y))
    return [points[i] for i in sorted(kept)]


def time_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_format: Format,
    tick_format: Format | None = None,
    moments: Sequence[Moment] = (),
    from_zero: bool = True,
    y_range: tuple[float, float] | None = None,
    width: int = 420,
    height: int = 190,
) -> Markup:
    """Return lines over the run's time, with their bands, direct labels and marked moments.

    ``y_range`` cuts off the axis, where early intervals would squeeze the rest. Without any point the
    chart says that there is nothing to show.
    """
    lines = [Line(line.name, thinned(line.points), line.colour) for line in lines if line.points]
    if not lines:
        return _nothing(title, width, height)
    points = [point for line in lines for point in line.points]
    ends = [_end_label(line, y_format) for line in lines]
    left, top, bottom = 46.0, 24.0 if moments else 12.0, 24.0
    right = 12.0 + _BOLD_PX * max(len(end) for end in ends)
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    x_high = x_high if x_high > x_low else x_low + 1
    bounds = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y_low = min(0.0, *bounds) if from_zero else min(bounds)
    y_top = max(bounds)
    if y_range is not None:
        y_low, y_top = max(y_low, y_range[0]), min(y_top, y_range[1])
    if y_top - y_low <= 1e-12 * max(1.0, abs(y_top)):
        y_low, y_top = y_low - (0 if from_zero else 0.5 * abs(y_low) or 0.5), y_top + (0.5 * abs(y_top) or 0.5)
    y_top += 0.06 * (y_top - y_low)
    tick_format = y_format if tick_format is None else tick_format

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (min(max(y, y_low), y_top) - y_low) / (y_top - y_low) * (height - top - bottom)

    body: list[str] = []
    for tick in nice_ticks(y_low, y_top, 4):
        body.append(f'<path class="grid" d="M{left:.0f} {py(tick):.1f}H{width - right:.1f}"/>')
        body.append(_text(left - 6, py(tick) + 4, tick_format(tick), "tick end"))
    for tick in time_ticks(x_low, x_high, 5):
        body.append(_text(px(tick), height - 7, clock(tick), "tick middle"))
    for moment in moments:
        if x_low <= moment.seconds <= x_high:
            x = px(moment.seconds)
            anchor = "end" if x > width * 0.62 else "start"
            body.append(f'<path class="moment" d="M{x:.1f} {top - 8:.0f}V{height - bottom:.0f}"/>')
            body.append(_text(x + (-4 if anchor == "end" else 4), top - 8, moment.label, f"tick {anchor}"))
    for line in lines:
        body.extend(_line(line, px, py, y_format))
    label_ys = _spread([py(line.points[-1].y) + 4 for line in lines], 14, top + 8, height - bottom)
    for line, end, y in zip(lines, ends, label_ys, strict=True):
        body.append(_text(px(line.points[-1].x) + 7, y, end, f"label c{line.colour % N_COLOURS}"))
    description = "; ".join(
        f"{line.name or title}: from {y_format(line.points[0].y)} to {y_format(line.points[-1].y)}" for line in lines
    )
    return _svg(title, f"Over {clock(x_high - x_low)} of the run. {description}.", width, height, body)


def dot_plot(
    title: str,
    rows: Sequence[Row],
    *,
    x_format: Format,
    reference: float | None = None,
    reference_label: str = "",
    x_low: float | None = None,
    x_high: float | None = None,
    width: int = 420,
    label_px: int = 150,
) -> Markup:
    """Return rows of dots with their intervals, the reference as a line; values may be left of zero."""
    rows = [row for row in rows if row.marks]
    if not rows:
        return _nothing(title, width, 80)
    values = [v for row in rows for m in row.marks for v in (m.value, m.low, m.high) if v is not None]
    values += [reference] if reference is not None else []
    low = min(values) if x_low is None else x_low
    high = max(values) if x_high is None else x_high
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    low, high = low - (margin if x_low is None else 0), high + (margin if x_high is None else 0)
    right = 18.0 + _BOLD_PX * max(len(mark.label) for row in rows for mark in row.marks)
    row_px, top, bottom = 28.0 if len(rows) <= 10 else 20.0, 20.0 if reference_label else 8.0, 24.0
    height = top + row_px * len(rows) + bottom

    def px(x: float) -> float:
        return label_px + (min(max(x, low), high) - low) / (high - low) * (width - label_px - right)

    body: list[str] = []
    for tick in nice_ticks(low, high, 4):
        body.append(f'<path class="grid" d="M{px(tick):.1f} {top:.0f}V{height - bottom:.1f}"/>')
        body.append(_text(px(tick), height - 7, x_format(tick), "tick middle"))
    if reference is not None:
        body.append(f'<path class="reference" d="M{px(reference):.1f} {top - 4:.0f}V{height - bottom:.1f}"/>')
        anchor = "middle" if px(reference) > label_px + 40 else "start"
        body.append(_text(px(reference), top - 7, reference_label, f"tick {anchor}"))
    for k, row in enumerate(rows):
        y = top + row_px * (k + 0.5)
        body.append(_text(label_px - 10, y + 4, _short(row.label, int((label_px - 14) / _CHAR_PX)), "row end"))
        for mark in row.marks:
            body.append(_dot(mark, px, y, x_format, row.label))
        labelled = [mark for mark in row.marks if mark.label]
        for mark in labelled:
            body.append(_text(width - right + 10, y + 4, mark.label, f"label c{mark.colour % N_COLOURS}"))
    description = "; ".join(
        f"{row.label}: {', '.join(_mark_words(mark, x_format) for mark in row.marks)}" for row in rows
    )
    return _svg(title, description + ".", width, round(height), body)


def bar_chart(title: str, bars: Sequence[Bar], *, width: int = 420, label_px: int = 170) -> Markup:
    """Return horizontal bars from zero."""
    if not bars:
        return _nothing(title, width, 80)
    row_px = 26
    height = row_px * len(bars) + 4
    longest = max(bar.value for bar in bars) or 1.0
    right = 12 + _BOLD_PX * max(len(bar.text) for bar in bars)
    body: list[str] = []
    for k, bar in enumerate(bars):
        y = 2 + row_px * k
        length = max(1.5, bar.value / longest * (width - label_px - right)) if bar.value > 0 else 0
        body.append(_text(label_px - 10, y + 17, _short(bar.label, int((label_px - 14) / _CHAR_PX)), "row end"))
        body.append(
            f'<rect class="bar c0" x="{label_px}" y="{y + 4}" width="{length:.1f}" height="{row_px - 8}" rx="2">'
            f"{_tip(f'{bar.label}: {bar.text}')}</rect>"
        )
        body.append(_text(label_px + length + 6, y + 17, bar.text, "row"))
    return _svg(title, "; ".join(f"{bar.label}: {bar.text}" for bar in bars) + ".", width, height, body)


def interval_bar(
    estimates: Sequence[tuple[str, Estimate]], *, scale: float, reference: float | None, colour: int = 0
) -> Markup:
    """Return a small bar with the CTR's interval, one line for each named estimate; the last one is solid.

    ``scale`` is the CTR at the right end, the same for all bars that are to be compared, and
    ``reference`` a tick, for example the product's mean.
    """
    width, row_px = 120.0, 9.0
    height = row_px * len(estimates) + 3

    def px(x: float) -> float:
        return min(x / scale, 1.0) * (width - 4) + 2 if scale > 0 else 2.0

    body = [f'<path class="axis" d="M2 {height - 1:.0f}H{width - 2:.0f}"/>']
    if reference is not None:
        body.append(f'<path class="reference" d="M{px(reference):.1f} 0V{height:.0f}"/>')
    for k, (_, estimate) in enumerate(estimates):
        style = f"c{colour % N_COLOURS}{' hollow' if k < len(estimates) - 1 else ''}"
        y = row_px * (k + 0.5) + 0.5
        body.append(
            f'<path class="whisker {style}" d="M{px(estimate.low):.1f} {y}H{px(estimate.high):.1f}"/>'
            f'<circle class="dot {style}" cx="{px(estimate.value):.1f}" cy="{y}" r="3.2"/>'
        )
    words = "; ".join(f"{name + ': ' if name else ''}{percent(e.value)} ({interval(e)})" for name, e in estimates)
    mean = "" if reference is None else f"; product's mean {percent(reference)}"
    return Markup(
        f'<svg class="chart mini" viewBox="0 0 {width:.0f} {height:.0f}" role="img">{_tip("CTR " + words + mean)}'
        + "".join(body)
        + "</svg>"
    )


def share_bar(title: str, parts: Sequence[tuple[str, float]]) -> Markup:
    """Return one bar cut into shares; a part says its name and percentage as far as they fit."""
    width, height = 240.0, 20.0
    total = sum(share for _, share in parts) or 1.0
    body: list[str] = []
    x = 0.0
    for k, (name, share) in enumerate(parts):
        part_px = share / total * width
        body.append(
            f'<rect class="part part{min(k, 4)}" x="{x:.1f}" y="0" width="{max(part_px - 1, 0.5):.1f}" '
            f'height="{height:.0f}" rx="2">{_tip(f"{name}: {share / total:.0%}")}</rect>'
        )
        percentage = f"{share / total:.0%}"
        fitting = (text for text in (f"{name} {percentage}", percentage) if 12 + _CHAR_PX * len(text) <= part_px)
        body.append(_text(x + 6, 14, next(fitting, ""), f"parttext part{min(k, 4)}"))
        x += part_px
    words = ", ".join(f"{name} {share / total:.0%}" for name, share in parts)
    return _svg(title, words + ".", round(width), round(height), body, "share")


def _line(line: Line, px: Scale, py: Scale, y_format: Format) -> list[str]:
    colour = f"c{line.colour % N_COLOURS}"
    parts: list[str] = []
    band = [(p.x, p.low, p.high) for p in line.points if p.low is not None and p.high is not None]
    if len(band) > 1:
        upper = "L".join(f"{px(x):.1f} {py(high):.1f}" for x, _, high in band)
        lower = "L".join(f"{px(x):.1f} {py(low):.1f}" for x, low, _ in reversed(band))
        parts.append(f'<path class="band {colour}" d="M{upper}L{lower}Z"/>')
    path = "L".join(f"{px(p.x):.1f} {py(p.y):.1f}" for p in line.points)
    parts.append(f'<path class="line {colour}" d="M{path}"/>')
    last = line.points[-1]
    parts.append(f'<circle class="dot {colour}" cx="{px(last.x):.1f}" cy="{py(last.y):.1f}" r="3"/>')
    every = max(1, len(line.points) // 40)
    for point in line.points[::every]:
        words = f"{line.name + ', ' if line.name else ''}{clock(point.x)}: {y_format(point.y)}"
        if point.low is not None and point.high is not None:
            words += f" ({y_format(point.low)} to {y_format(point.high)})"
        parts.append(
            f'<circle class="touch" cx="{px(point.x):.1f}" cy="{py(point.y):.1f}" r="7">{_tip(words)}</circle>'
        )
    return parts


def _dot(mark: Mark, px: Scale, y: float, x_format: Format, label: str) -> str:
    style = f"c{mark.colour % N_COLOURS}{' hollow' if mark.hollow else ''}"
    parts = []
    if mark.low is not None and mark.high is not None:
        parts.append(f'<path class="whisker {style}" d="M{px(mark.low):.1f} {y:.1f}H{px(mark.high):.1f}"/>')
    parts.append(f'<circle class="dot {style}" cx="{px(mark.value):.1f}" cy="{y:.1f}" r="4.5"/>')
    return f"<g>{_tip(f'{label}: {_mark_words(mark, x_format)}')}{''.join(parts)}</g>"


def _mark_words(mark: Mark, x_format: Format) -> str:
    words = f"{mark.tooltip} {x_format(mark.value)}".strip()
    if mark.low is not None and mark.high is not None:
        words += f" ({x_format(mark.low)} to {x_format(mark.high)})"
    return words


def _end_label(line: Line, y_format: Format) -> str:
    value = y_format(line.points[-1].y)
    return f"{line.name} {value}".strip()


def _spread(ys: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return the heights of labels, moved apart to at least the gap and kept within low to high."""
    order = sorted(range(len(ys)), key=lambda i: ys[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(ys[i], low, placed[-1] + gap if placed else low))
    overflow = placed[-1] - high if placed else 0.0
    if overflow > 0:
        placed[-1] -= overflow
        for k in range(len(placed) - 2, -1, -1):
            placed[k] = min(placed[k], placed[k + 1] - gap)
    result = [0.0] * len(ys)
    for y, i in zip(placed, order, strict=True):
        result[i] = y
    return result


def _svg(title: str, description: str, width: int, height: int, body: Sequence[str], kind: str = "") -> Markup:
    return Markup(
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" style="max-width:{width * 1.3:.0f}px" '
        f'aria-label="{escape(title)}">{_tip(title)}<desc>{escape(description)}</desc>{"".join(body)}</svg>'
    )


def _nothing(title: str, width: int, height: int) -> Markup:
    return _svg(
        title, "Nothing to show.", width, height, [_text(width / 2, height / 2, "nothing to show", "tick middle")]
    )


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>' if text else ""


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _short(text: str, n_characters: int) -> str:
    return text if len(text) <= n_characters else text[: max(n_characters - 1, 1)].rstrip() + "…"
