"""What a run of the offline chain came to, as figures and for people to read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

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
from state.artifact import ArtifactStore

if TYPE_CHECKING:
    from osmf.chain_comparison import ChainArtifacts, ChainComparison

_SHOWN = 6
"""Figures of a step that its line shows."""


def made_by(settings: OfflineSettings, run_id: str) -> ChainArtifacts | None:
    """Return what a run has made, by the run log; None where it did not come to an aligned G-MLLM."""
    from osmf.chain_comparison import ChainArtifacts

    store = ArtifactStore(settings.dataset_dir)
    steps = {record.step: record.artifact for record in read_runs(settings) if record.run_id == run_id}
    found = [
        None if (name := steps.get(step)) is None else store.named(name)
        for step in ("rebuild", "pretrain", "grm", "tuples", "group-dpo")
    ]
    whole = [artifact for artifact in found if artifact is not None]
    return ChainArtifacts(*whole) if len(whole) == len(found) else None


def chain_figures(
    rooms: ChainRooms, records: Sequence[RunRecord], started_s: float, comparison: ChainComparison | None = None
) -> Figures:
    """Return the figures of a run: each step's under its name, and those of the comparison."""
    metrics = {
        f"{record.step.replace('-', '_')}_{name}": value for record in records for name, value in record.figures.items()
    }
    return Figures(
        command="offline run",
        commit=commit(),
        seeds={"chain": rooms.offline.chain.seed},
        device=device(),
        seconds=time.monotonic() - started_s,
        metrics=metrics | ({} if comparison is None else comparison.figures),
        detail={
            "groups": [] if comparison is None else [asdict(group) for group in comparison.groups],
            "held_out_by": rooms.offline.held_out_by,
            "no_truth": None if comparison is None else comparison.no_truth,
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


def comparison_tables(comparison: ChainComparison) -> list[RenderableType]:
    """Return what a run's models are worth beside others, for people."""
    figures = comparison.figures

    def interval(name: str, form: str) -> str:
        return f"{figures[f'{name}_low']:{form}} to {figures[f'{name}_high']:{form}}"

    held_out = "products not learnt from" if comparison.held_out_by == "product" else "new creatives of known products"
    accuracies = Table(title=f"winners named of held-out pairs: {held_out}", title_justify="left", header_style="dim")
    for column in ("scorer", "accuracy", "95% interval"):
        accuracies.add_column(column)
    for name in [name.removesuffix("_accuracy_low") for name in figures if name.endswith("_accuracy_low")]:
        accuracies.add_row(name, f"{figures[f'{name}_accuracy']:.1%}", interval(f"{name}_accuracy", ".1%"))
    aligned = Table(title="alignment, on held-out tuples", title_justify="left", header_style="dim")
    for column in ("method", "preference accuracy", "margin"):
        aligned.add_column(column)
    for name in ("group_dpo", "no_group_dpo"):
        if f"{name}_accuracy" in figures:
            aligned.add_row(name, f"{figures[f'{name}_accuracy']:.1%}", f"{figures[f'{name}_margin']:.3f}")
    shown: list[RenderableType] = [accuracies, aligned]
    if comparison.no_truth is not None:
        return [*shown, comparison.no_truth]
    clicked = Table(title="simulated CTR of creatives written for each group", title_justify="left", header_style="dim")
    for column in ("product", "group", "pre-trained", "Group-DPO", "no-group DPO"):
        clicked.add_column(column)
    for group in comparison.groups:
        ctrs = (f"{ctr:.2%}" for ctr in (group.before, group.after, group.no_group))
        clicked.add_row(group.title, str(group.group_id), *ctrs)
    clicked.add_section()
    clicked.add_row("all", "", *(f"{figures[f'ctr_{name}']:.2%}" for name in ("before", "after", "no_group")))
    said = {
        "ctr_uplift": "Group-DPO over the pre-trained G-MLLM",
        "ctr_uplift_no_group": "no-group DPO over the pre-trained G-MLLM",
        "ctr_gain_over_no_group": "Group-DPO over no-group DPO",
    }
    lines = [f"{what}: {figures[name]:+.1%} ({interval(name, '+.1%')})" for name, what in said.items()]
    return [*shown, clicked, "\n".join(lines)]


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
