"""Lag chart: what `osmf bench lag` saw, as one SVG that stands by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from osmf.charts import Line, Point, time_chart
from osmf.figures import Figures
from osmf.report_model import Moment

_WIDTH: Final = 640
_HEIGHT: Final = 220

# The report's colours, which are in its page; here the picture has no page.
_STYLE: Final = """
svg{--c0:#0067a8;--c1:#b8480a;--ink:#1c1f24;--muted:#5a6472;--rule:#d8dce2;font-family:system-ui,sans-serif}
@media(prefers-color-scheme:dark){svg{--c0:#62b6f0;--c1:#f2a15c;--ink:#e8eaee;--muted:#aab4c2;--rule:#3a4048}}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.tick{fill:var(--muted);font-size:11px}.end{text-anchor:end}
.middle{text-anchor:middle}.label{fill:var(--c);font-weight:600;font-size:11.5px}.title{fill:var(--ink);font-size:13px}
.grid{stroke:var(--rule);fill:none}.moment{stroke:var(--muted);stroke-dasharray:2 3}.dot{fill:var(--c)}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.touch{fill:transparent}
"""


def lag_chart(figures: Figures) -> str:
    """Return lag and memory over the time of a run of `osmf bench lag`, one above the other."""
    samples: Sequence[Mapping[str, float]] = figures.detail["samples"]
    began_s = float(figures.metrics["overload_from_s"])
    moments = [
        Moment(seconds=began_s, label="three times too much"),
        Moment(seconds=began_s + float(figures.metrics["overload_s"]), label="no more is sent"),
    ]

    def line(name: str, values: Sequence[float], colour: int) -> Line:
        points = [Point(sample["seconds"], value) for sample, value in zip(samples, values, strict=True)]
        return Line(name, points, colour)

    lag = line("", [(sample["n_sent"] - sample["n_consumed"]) / 1_000 for sample in samples], 1)
    memory = line("", [sample["private_mib"] for sample in samples], 0)
    charts = [("Thousands of events behind the log", lag), ("Private memory of `osmf online`, MiB", memory)]
    parts = []
    for number, (title, drawn) in enumerate(charts):
        chart = time_chart(
            title, [drawn], y_format=lambda value: f"{value:,.0f}", moments=moments, width=_WIDTH, height=_HEIGHT
        )
        top = number * (_HEIGHT + 30)
        parts.append(f'<text class="title" x="6" y="{top + 16}">{title}</text>')
        # A picture in a picture takes its place and size from attributes; what the page would set is left out.
        parts.append(f'<g transform="translate(0 {top + 24})">{chart}</g>'.replace("<svg ", _SIZED, 1))
    height = len(charts) * (_HEIGHT + 30)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">'
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )


_SIZED: Final = f'<svg width="{_WIDTH}" height="{_HEIGHT}" '
