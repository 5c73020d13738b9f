"""Verify: a state's counts against a plain recount of the events, and against themselves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from osmf.figures import Figures, commit, device
from osmf.log_entry import LogEntry
from osmf.recount import Counts, recount_entries, recount_topics
from state.reading import StateReader, StateView
from state.records import OffsetRecord, WaitingClickRecord
from streams.settings import StreamSettings

MOST_DIFFERENCES: Final = 20
"""Differences that are named; all are counted."""


class Difference(NamedTuple):
    """A creative whose counts in the state are not those of the events."""

    product_id: str
    creative_id: str
    state: Counts
    events: Counts


@dataclass(frozen=True)
class Verification:
    """What a verification found; ``n_compared`` is None when there were no events to compare with.

    ``missing`` names events that were never counted because the broker had dropped them: what is there is in order.
    """

    path: Path
    totals: Counts
    n_cells: int
    n_compared: int | None = None
    differences: list[Difference] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return not self.differences and not self.broken

    @property
    def exit_code(self) -> int:
        """0 when everything agrees, otherwise 1."""
        return 0 if self.ok else 1


def verify_state(
    path: Path,
    streams: StreamSettings,
    *,
    entries: Callable[[], Iterable[LogEntry]] | None = None,
    from_topics: bool = False,
) -> Verification:
    """Check a state.

    Parameters
    ----------
    path
        The state's folder.
    streams
        The settings that the online process ran with.
    entries
        Gives the log from files; None: there are none.
    from_topics
        Whether to recount the topics of the broker in ``streams``, where ``entries`` is None.
    """
    with StateReader(path) as state, state.view() as view:
        waiting = view.waiting_clicks()
        counted = _counted(view)
        totals = Counts(sum(c.n_impressions for c in counted.values()), sum(c.n_clicks for c in counted.values()))
        broken, missing = broken_invariants(view, waiting, streams), expired_events(view)
        n_cells = len(view.cells())
        if entries is not None:
            events = recount_entries(entries, streams)
        elif from_topics:
            events = recount_topics(view, waiting, streams)
        else:
            return Verification(path, totals, n_cells, broken=broken, missing=missing)
    nothing = Counts(0, 0)
    names = sorted(counted.keys() | events.keys())
    differences = [
        Difference(*name, counted.get(name, nothing), events.get(name, nothing))
        for name in names
        if counted.get(name, nothing) != events.get(name, nothing)
    ]
    return Verification(path, totals, n_cells, len(names), differences, broken, missing)


def _counted(view: StateView) -> dict[tuple[str, str], Counts]:
    """Return the state's counts by (product, creative), over all groups."""
    found: dict[tuple[str, str], Counts] = {}
    for cell in view.cells():
        name = (cell.product_id, cell.creative_id)
        before = found.get(name, Counts(0, 0))
        found[name] = Counts(before.n_impressions + cell.n_impressions, before.n_clicks + cell.n_clicks)
    return found


def broken_invariants(view: StateView, waiting: Iterable[WaitingClickRecord], streams: StreamSettings) -> list[str]:
    """Return what in a state contradicts itself, in words; empty when nothing does.

    - A cell has no more clicks than impressions, and belongs to a registered creative; so with arms.
    - Of each partition, consumed = used + dead-lettered + waiting.
    - The cells' impressions and clicks are the events that were used, less the duplicates and what was taken back.
    """
    broken: list[str] = []
    cells, offsets = view.cells(), view.offsets()
    known = {(creative.product_id, creative.creative_id) for creative in view.creatives()}
    for cell in cells:
        name = f"cell (product {cell.product_id!r}, group {cell.group_id}, creative {cell.creative_id!r})"
        if cell.n_clicks > cell.n_impressions:
            broken.append(f"{name} has {cell.n_clicks:,} clicks of {cell.n_impressions:,} impressions")
        if (cell.product_id, cell.creative_id) not in known:
            broken.append(f"{name} is of a creative that is not registered")
    for (experiment, arm, bucket), record in view.arms().items():
        if record.n_clicks > record.n_impressions:
            broken.append(
                f"arm {arm!r} of {experiment!r}, bucket {bucket}, has {record.n_clicks:,} clicks "
                f"of {record.n_impressions:,} impressions"
            )
    n_waiting_of = Counter((click.topic, click.partition) for click in waiting)
    for partition, offset in offsets.items():
        n_waiting = n_waiting_of[partition]
        if offset.n_consumed != offset.n_used + offset.n_dead_letters + n_waiting:
            broken.append(
                f"{partition[0]}[{partition[1]}] has consumed {offset.n_consumed:,} events, but used "
                f"{offset.n_used:,} + dead-lettered {offset.n_dead_letters:,} + waiting {n_waiting:,}"
            )
    ledger = view.ledger()
    counted = (
        (
            "impressions",
            streams.topics.impressions,
            sum(cell.n_impressions for cell in cells),
            ledger.n_impressions_taken_back,
        ),
        (
            "clicks",
            streams.topics.clicks,
            sum(cell.n_clicks for cell in cells),
            ledger.n_clicks_retracted + ledger.n_clicks_taken_back,
        ),
    )
    for what, topic, n_counted, n_taken_back in counted:
        n_used = _used_once(offsets, topic)
        if n_counted != n_used - n_taken_back:
            broken.append(
                f"the cells hold {n_counted:,} {what}; {n_used:,} of {topic} were used that are no duplicates, and "
                f"{n_taken_back:,} taken back"
            )
    return broken


def expired_events(view: StateView) -> list[str]:
    """Return of which partitions events expired before they were counted, in words; empty when of none."""
    return [
        f"{topic}[{partition}]: {offset.n_expired:,} events had expired on the broker and were never counted"
        for (topic, partition), offset in view.offsets().items()
        if offset.n_expired
    ]


def _used_once(offsets: dict[tuple[str, int], OffsetRecord], topic: str) -> int:
    return sum(offset.n_used - offset.n_duplicates for (name, _), offset in offsets.items() if name == topic)


def verification_figures(found: Verification, *, seconds: float) -> Figures:
    """Return a verification as figures; ``detail`` names the first differences."""
    metrics: dict[str, float | int] = {
        "impressions": found.totals.n_impressions,
        "clicks": found.totals.n_clicks,
        "cells": found.n_cells,
        "broken_invariants": len(found.broken),
        "partitions_with_expired_events": len(found.missing),
    }
    if found.n_compared is not None:
        metrics |= {"creatives_compared": found.n_compared, "differences": len(found.differences)}
    return Figures(
        command="verify",
        commit=commit(),
        seeds={},
        device=device(),
        seconds=seconds,
        metrics=metrics,
        detail={
            "state": str(found.path),
            "broken_invariants": found.broken[:MOST_DIFFERENCES],
            "expired": found.missing,
            "differences": [
                {
                    "product_id": difference.product_id,
                    "creative_id": difference.creative_id,
                    "state": difference.state._asdict(),
                    "events": difference.events._asdict(),
                }
                for difference in found.differences[:MOST_DIFFERENCES]
            ],
        },
    )


def verification_tables(found: Verification) -> list[RenderableType]:
    """Return the verdict in words, and the first contradictions and differences as a table."""
    compared = (
        "There were no events to compare with."
        if found.n_compared is None
        else f"{len(found.differences):,} of {found.n_compared:,} creatives differ from a recount of the events."
    )
    words = Text.assemble(
        (f"{found.path}: {'in order' if found.ok else 'NOT in order'}. ", "bold green" if found.ok else "bold red"),
        f"{found.totals.n_impressions:,} impressions and {found.totals.n_clicks:,} clicks in {found.n_cells:,} cells; ",
        f"{len(found.broken):,} contradictions. {compared}",
        *(f"\n{sentence} (streams.expired_offsets)" for sentence in found.missing),
    )
    if found.ok:
        return [words]
    table = Table(title="clicks/impressions", title_justify="left", header_style="dim")
    for column in ("what", "state", "events"):
        table.add_column(column, overflow="fold")
    for sentence in found.broken[:MOST_DIFFERENCES]:
        table.add_row(sentence, "", "")
    for difference in found.differences[:MOST_DIFFERENCES]:
        table.add_row(
            f"{difference.product_id} / {difference.creative_id}",
            f"{difference.state.n_clicks:,}/{difference.state.n_impressions:,}",
            f"{difference.events.n_clicks:,}/{difference.events.n_impressions:,}",
        )
    return [words, table]


def run_verify(
    path: Path,
    streams: StreamSettings,
    *,
    entries: Callable[[], Iterable[LogEntry]] | None = None,
    from_topics: bool = False,
) -> tuple[Figures, list[RenderableType], int]:
    """Check a state (see `verify_state`); return its figures, what to show and the exit code."""
    started_s = time.monotonic()
    found = verify_state(path, streams, entries=entries, from_topics=from_topics)
    return (
        verification_figures(found, seconds=time.monotonic() - started_s),
        verification_tables(found),
        found.exit_code,
    )
