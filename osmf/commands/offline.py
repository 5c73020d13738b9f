"""Commands about the offline chain: run it, once or on its schedule, look at it, and take a promotion back."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from osmf.commands.common import Json, command_settings, fail, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from offline.chain import ChainRooms
    from offline.settings import OfflineSettings
    from offline.watcher import Watcher
    from osmf.settings import Settings

offline = typer.Typer(
    name="offline", help="From snapshots to datasets, reward models and aligned G-MLLMs.", no_args_is_help=True
)

REFUSED = 3
"""Exit status of a run whose models the gate has refused."""


class Preset(StrEnum):
    """What the G-MLLM is made of."""

    TINY = "tiny"
    SMOL = "smol"
    LLAVA = "llava"


@offline.command()
def run(
    all_steps: Annotated[
        bool, typer.Option("--all", help="Take every step even when too little is new, and compare with baselines.")
    ] = False,
    preset: Annotated[Preset | None, typer.Option(help="The G-MLLM; default: generator.mllm.preset.")] = None,
    json: Json = None,
) -> None:
    """Run the chain now, or go on with a killed run; ends with 0: promoted or skipped, 1: failed, 3: refused."""
    import time

    from offline.chain import run_chain, wall_clock_ms
    from offline.chain_state import ChainStateUnreadable
    from offline.run_lock import RunUnderWay
    from offline.runs import CorruptRunLogError
    from osmf.chain_report import chain_figures, comparison_tables, made_by, records_table
    from osmf.chain_screen import ChainScreen

    started_s = time.monotonic()
    settings = command_settings()
    rooms = _rooms(settings, preset)
    try:
        with ChainScreen() as screen:
            records = run_chain(rooms, all_steps=all_steps, watcher=_watchers(screen, rooms.offline))
    except (RunUnderWay, ChainStateUnreadable, CorruptRunLogError) as error:
        raise fail(error) from error
    shown: list[RenderableType] = [records_table(records)]
    comparison = None
    if all_steps and (made := made_by(rooms.offline, records[-1].run_id)) is not None:
        from osmf.chain_comparison import compare

        typer.echo("comparing with other reward models and with no-group DPO", err=True)
        comparison = compare(rooms, settings.simulator, made, wall_clock_ms)
        shown += comparison_tables(comparison)
    show(chain_figures(rooms, records, started_s, comparison), json, shown)
    raise typer.Exit({"failed": 1, "refused": REFUSED}.get(records[-1].outcome, 0))


@offline.command()
def status(json: Json = None) -> None:
    """Show which models are in use, what the last run came to, and when the next one is due."""
    from generator.champion import ChampionUnreadable
    from offline.chain_state import ChainStateUnreadable
    from offline.runs import CorruptRunLogError
    from osmf.chain_report import status_figures, status_tables

    settings = command_settings().offline
    try:
        figures = status_figures(settings)
        tables = status_tables(settings)
    except (ChampionUnreadable, ChainStateUnreadable, CorruptRunLogError) as error:
        raise fail(error) from error
    show(figures, json, tables)


@offline.command()
def rollback() -> None:
    """Use the champion before again; the models of the present one stay on disk."""
    from generator.champion import ChampionUnreadable, NoFormerChampion
    from offline.chain import roll_back

    try:
        record = roll_back(command_settings().offline)
    except (ChampionUnreadable, NoFormerChampion) as error:
        raise fail(error) from error
    typer.echo(record.reason)


@offline.command()
def schedule() -> None:
    """Run the chain every `offline.interval_s`: the offline process."""
    from offline.chain import record_skipped, wall_clock_ms
    from offline.schedule import run_schedule

    settings = command_settings()
    run_schedule(
        settings.offline,
        scheduled_run,
        on_overrun=lambda reason: record_skipped(settings.offline, reason, wall_clock_ms()),
    )


def scheduled_run() -> None:
    """Run the chain once with the settings as they are now: what the schedule names."""
    from offline.chain import run_or_skip
    from offline.watcher import LogWatcher
    from osmf.settings import load_settings

    rooms = _rooms(load_settings(), None)
    run_or_skip(rooms, watcher=_watchers(LogWatcher(), rooms.offline))


def _watchers(watcher: Watcher, settings: OfflineSettings) -> Watcher:
    from offline.tracking import MlflowWatcher
    from offline.watcher import Watchers

    return Watchers([watcher, MlflowWatcher(settings)]) if settings.tracking.enabled else watcher


def _rooms(settings: Settings, preset: Preset | None) -> ChainRooms:
    from offline.chain import ChainRooms

    settings = with_preset(settings, preset)
    return ChainRooms(settings.state.path, settings.online, settings.generator, settings.offline)


def with_preset(settings: Settings, preset: Preset | None) -> Settings:
    """Return settings with another preset of the G-MLLM, if one is named."""
    if preset is None:
        return settings
    mllm = settings.generator.mllm.model_copy(update={"preset": preset.value})
    return settings.model_copy(update={"generator": settings.generator.model_copy(update={"mllm": mllm})})
