"""Screen: what a running demo shows, live in a terminal or as plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 5.0
"""How often a plain line is written where there is no terminal."""

REFRESH_PER_S = 4
N_HISTORY = 60
N_LOG_LINES = 5
N_SHIFTS = 4
_SPARKS = "▁▂▃▄▅▆▇█"
_WIDE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveShift:
    """A detected shift: the product's title, its category, and the run's second."""

    seconds: float
    product_title: str
    category: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveArm:
    """An arm so far; ``ctr`` is None before its first impression."""

    title: str
    n_impressions: int
    n_clicks: int
    ctr: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFigures:
    """A running demo at one moment; None is what is not known yet.

    ``progress`` is the share of the run that is done (0 to 1), ``ratio`` the group arm's CTR over the
    one-for-all arm's with ``ratio_low`` to ``ratio_high`` as its 95% interval; ``lag`` is in events.
    """

    stage: str
    seconds: float
    progress: float = 0.0
    n_produced: int = 0
    n_consumed: int = 0
    n_dead_letters: int = 0
    rate_events_s: float = 0.0
    lag: int = 0
    auroc: float | None = None
    log_loss: float | None = None
    n_products: int = 0
    n_products_with_groups: int = 0
    n_groups: int = 0
    shifts: tuple[LiveShift, ...] = ()
    n_creatives_emitted: int = 0
    arms: tuple[LiveArm, ...] = ()
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    n_snapshots: int = 0
    log_lines: tuple[str, ...] = ()


@dataclass(slots=True)
class History:
    """The last rates and lags, for the small curves."""

    rates: deque[float] = field(default_factory=lambda: deque(maxlen=N_HISTORY))
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=N_HISTORY))

    def add(self, figures: LiveFigures) -> None:
        """Append the figures' rate and lag."""
        self.rates.append(figures.rate_events_s)
        self.lags.append(float(figures.lag))


class LiveScreen:
    """The screen of a run: a context manager that is given figures as they come.

    In a terminal it redraws one layout in place. Elsewhere (a pipe, CI) it writes a plain line at
    most every 5 s, and at every change of stage. ``clock`` gives monotonic seconds.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = Console() if console is None else console
        self._clock = clock
        self._history = History()
        self._live: Live | None = None
        self._figures: LiveFigures | None = None
        self._line_at_s: float | None = None
        self._line_stage = ""
        self._drawn: LiveFigures | None = None

    def __enter__(self) -> LiveScreen:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=REFRESH_PER_S, get_renderable=self._render)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._figures is not None and self._drawn is not self._figures:
            self._write_line(self._figures)

    def update(self, figures: LiveFigures) -> None:
        """Show the figures."""
        self._figures = figures
        self._history.add(figures)
        if self._live is not None:
            return
        now_s = self._clock()
        is_due = self._line_at_s is None or now_s - self._line_at_s >= LINE_EVERY_S
        if is_due or figures.stage != self._line_stage:
            self._line_at_s, self._line_stage = now_s, figures.stage
            self._write_line(figures)

    def _write_line(self, figures: LiveFigures) -> None:
        self._drawn = figures
        self.console.print(plain_line(figures), markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        if self._figures is None:
            return Text("starting …", style="dim")
        return layout(self._figures, self._history, self.console.width)


def plain_line(figures: LiveFigures) -> str:
    """Return the figures as one line of text, without colours."""
    parts = [
        f"{_clock(figures.seconds)}  {figures.progress:4.0%}  {figures.stage}",
        f"{figures.n_consumed:,} of {figures.n_produced:,} events",
        f"{figures.rate_events_s:,.0f}/s",
        f"lag {figures.lag:,}",
    ]
    if figures.auroc is not None:
        parts.append(f"AUROC {figures.auroc:.3f}")
    parts.append(f"groups {figures.n_groups} in {figures.n_products_with_groups}/{figures.n_products} products")
    parts.append(f"shifts {len(figures.shifts)}")
    parts.append(f"new creatives {figures.n_creatives_emitted}")
    parts += [f"{arm.title} {arm.ctr:.2%}" for arm in figures.arms if arm.ctr is not None]
    if figures.ratio is not None:
        parts.append(f"ratio {_ratio(figures)}")
    if figures.n_dead_letters:
        parts.append(f"dead letters {figures.n_dead_letters:,}")
    parts.append(f"snapshots {figures.n_snapshots}")
    return " | ".join(parts)


def layout(figures: LiveFigures, history: History, width: int) -> RenderableType:
    """Return the whole screen for a terminal of a width: side by side where there is room."""
    is_wide = width >= _WIDE
    boxes = [_box("stream", _stream(figures, history)), _box("groups", _groups(figures))]
    arms = _box("arms", _arms(figures, in_one_line=not is_wide))
    parts: list[RenderableType] = [_heading(figures)]
    if is_wide:
        parts.append(_side_by_side([*boxes, arms]))
    else:
        parts += [_side_by_side(boxes), arms]
    if figures.log_lines:
        parts.append(_log(figures.log_lines))
    return Group(*parts)


def sparkline(values: Sequence[float], n_characters: int) -> str:
    """Return the last values as a curve of block characters, from zero to their highest."""
    shown = list(values)[-n_characters:]
    top = max(shown, default=0.0)
    if top <= 0:
        return _SPARKS[0] * len(shown)
    return "".join(_SPARKS[min(int(max(value, 0.0) / top * len(_SPARKS)), len(_SPARKS) - 1)] for value in shown)


def _heading(figures: LiveFigures) -> RenderableType:
    done = min(max(figures.progress, 0.0), 1.0)
    line = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    line.add_row(
        Text.assemble(("OSMF ", "bold cyan"), (figures.stage, "bold")),
        ProgressBar(total=1.0, completed=done, complete_style="cyan", finished_style="green"),
        Text(f"{done:.0%}  {_clock(figures.seconds)}", style="bold"),
    )
    return line


def _side_by_side(boxes: Sequence[RenderableType]) -> Table:
    row = Table.grid(expand=True, padding=(0, 1, 0, 0), pad_edge=False)
    for _ in boxes:
        row.add_column(ratio=1)
    row.add_row(*boxes)
    return row


def _box(title: str, content: RenderableType) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim", padding=(0, 1))


def _facts() -> Table:
    table = Table.grid(expand=True, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, justify="right", no_wrap=True)
    return table


def _stream(figures: LiveFigures, history: History) -> Table:
    table = _facts()
    table.add_row("consumed", f"{figures.n_consumed:,} of {figures.n_produced:,}")
    table.add_row("rate", _curve(sparkline(history.rates, 12), f"{figures.rate_events_s:,.0f}/s", "cyan"))
    table.add_row("lag", _curve(sparkline(history.lags, 12), f"{figures.lag:,}", "magenta"))
    table.add_row("AUROC so far", "–" if figures.auroc is None else f"{figures.auroc:.3f}")
    table.add_row("log-loss so far", "–" if figures.log_loss is None else f"{figures.log_loss:.4f}")
    table.add_row("dead letters", f"{figures.n_dead_letters:,}")
    return table


def _curve(curve: str, value: str, style: str) -> Text:
    return Text.assemble((curve, style), f" {value:>9}")


def _groups(figures: LiveFigures) -> RenderableType:
    table = _facts()
    table.add_row("products with groups", f"{figures.n_products_with_groups} of {figures.n_products}")
    table.add_row("groups", f"{figures.n_groups:,}")
    table.add_row("new creatives", f"{figures.n_creatives_emitted:,}")
    table.add_row("snapshots", f"{figures.n_snapshots:,}")
    table.add_row("shifts", Text(str(len(figures.shifts)), style="bold yellow" if figures.shifts else ""))
    lines: list[RenderableType] = [table]
    for shift in figures.shifts[-N_SHIFTS:]:
        where = shift.product_title + (f" ({shift.category})" if shift.category else "")
        line = Text.assemble((f"{_clock(shift.seconds):>5}  ", "yellow"), where)
        line.no_wrap, line.overflow = True, "ellipsis"
        lines.append(line)
    return Group(*lines)


def _arms(figures: LiveFigures, *, in_one_line: bool) -> Table:
    table = _facts()
    best = max((arm.ctr for arm in figures.arms if arm.ctr is not None), default=0.0)
    for arm in figures.arms:
        name = Text(arm.title)
        if arm.ctr is None:
            table.add_row(name, "–")
            continue
        bar = "█" * round(10 * arm.ctr / best) if best > 0 else ""
        ctr = Text.assemble((bar, "cyan"), f" {arm.ctr:>6.2%}")
        counts = Text(f"{arm.n_clicks:,} of {arm.n_impressions:,}", style="dim")
        if in_one_line:
            table.add_row(name, Text.assemble(counts, "  ", ctr))
        else:
            table.add_row(name, ctr)
            table.add_row("", counts)
    if figures.ratio is None:
        table.add_row("ratio", Text("too early to tell", style="dim"))
    else:
        table.add_row("ratio", Text(_ratio(figures), style=_ratio_style(figures)))
    return table


def _ratio(figures: LiveFigures) -> str:
    ratio = f"{figures.ratio:.3f}"
    if figures.ratio_low is None or figures.ratio_high is None:
        return ratio
    return f"{ratio} ({figures.ratio_low:.3f} to {figures.ratio_high:.3f})"


def _ratio_style(figures: LiveFigures) -> str:
    if figures.ratio_low is not None and figures.ratio_low > 1:
        return "bold green"
    if figures.ratio_high is not None and figures.ratio_high < 1:
        return "bold red"
    return "bold"


def _log(lines: Sequence[str]) -> RenderableType:
    return Group(*(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines[-N_LOG_LINES:]))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:d}:{rest:02d}"
