"""What a run of the offline chain came to, as figures and for people to read."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.table import Table

from offline.chain import ChainRooms
from offline.runs import RunRecord
from osmf.figures import Figures, commit, device, format_number

_SHOWN = 6
"""Figures of a step that its line shows."""


def chain_figures(rooms: ChainRooms, records: Sequence[RunRecord], started_s: float) -> Figures:
    """Return the figures of a run: each step's, under its name."""
    metrics = {
        f"{record.step.replace('-', '_')}_{name}": value for record in records for name, value in record.figures.items()
    }
    return Figures(
        command="offline run",
        commit=commit(),
        seeds={"chain": rooms.offline.chain.seed},
        device=device(),
        seconds=time.monotonic() - started_s,
        metrics=metrics,
        detail={
            "run_id": records[-1].run_id,
            "outcome": records[-1].outcome,
            "reason": records[-1].reason,
            "steps": [
                {
                    "step": record.step,
                    "outcome": record.outcome,
                    "artifact": record.artifact,
                    "reason": record.reason,
                    "seconds": (record.finished_at_ms - record.started_at_ms) / 1000,
                }
                for record in records
            ],
        },
    )


def records_table(records: Sequence[RunRecord], *, title: str | None = None) -> Table:
    """Return records as a table: step, outcome, what was built or why not, seconds and figures."""
    table = Table(title=title or f"run {records[-1].run_id}", title_justify="left", header_style="dim")
    table.add_column("step", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("figures", overflow="fold", style="dim")
    for record in records:
        figures = [f"{name} {format_number(value)}" for name, value in record.figures.items()][:_SHOWN]
        table.add_row(
            record.step,
            record.outcome,
            "\n".join(said for said in (record.artifact, record.reason) if said),
            f"{(record.finished_at_ms - record.started_at_ms) / 1000:,.1f}",
            ", ".join(figures),
        )
    return table
