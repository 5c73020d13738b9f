"""What a run of the offline chain came to, as figures and for people to read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from rich.console import RenderableType
from rich.table import Table

from generator.champion import ChampionPointer
from offline.chain import ChainRooms, read_runs
from offline.chain_state import ChainState
from offline.runs import RunRecord
from offline.schedule import next_start
from offline.settings import OfflineSettings
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


def status_figures(settings: OfflineSettings) -> Figures:
    """Return where the chain is, as figures."""
    champions = ChampionPointer(settings.dataset_dir).champions()
    state, runs, due = ChainState.read(settings.dataset_dir), read_runs(settings), next_start(settings)
    metrics: dict[str, float | int] = {"n_champions": len(champions), "n_records": len(runs)}
    if champions:
        metrics |= {"grm_accuracy": champions[-1].grm_accuracy, "n_grm_pairs": champions[-1].n_grm_pairs}
    return Figures(
        command="offline status",
        commit=commit(),
        seeds={},
        device=device(),
        seconds=0.0,
        metrics=metrics,
        detail={
            "champions": [msgspec.to_builtins(champion) for champion in champions],
            "unfinished": msgspec.to_builtins(state.unfinished),
            "trained": msgspec.to_builtins(state.trained),
            "last_run": [msgspec.to_builtins(record) for record in _last_run(runs)],
            "next_start": None if due is None else due.isoformat(timespec="seconds"),
        },
    )


def status_tables(settings: OfflineSettings) -> list[RenderableType]:
    """Return where the chain is, for people."""
    champions = Table(title="champions, the last one in use", title_justify="left", header_style="dim")
    for column in ("promoted", "G-MLLM", "GRM", "why"):
        champions.add_column(column, overflow="fold")
    for champion in ChampionPointer(settings.dataset_dir).champions():
        promoted = datetime.fromtimestamp(champion.promoted_at_ms / 1000, UTC)
        champions.add_row(f"{promoted:%Y-%m-%d %H:%M} UTC", champion.mllm, champion.grm, champion.reason)
    shown: list[RenderableType] = [champions]
    if last := _last_run(read_runs(settings)):
        shown.append(records_table(last, title=f"last run, {last[-1].run_id}"))
    unfinished, due = ChainState.read(settings.dataset_dir).unfinished, next_start(settings)
    if unfinished is not None:
        shown.append(f"{unfinished.run_id} is unfinished: under way, or gone on with by the next run")
    if due is not None:
        shown.append(f"the schedule's next run is due at {due:%Y-%m-%d %H:%M:%S} UTC")
    return shown


def _last_run(runs: Sequence[RunRecord]) -> list[RunRecord]:
    return [record for record in runs if record.run_id == runs[-1].run_id]
