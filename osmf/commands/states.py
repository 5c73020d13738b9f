"""Commands about a state: look into it, back it up, restore it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from osmf.commands.common import Json, StatePath, command_settings, fail, show

state = typer.Typer(name="state", help="The files of a state.", no_args_is_help=True)


def inspect(
    product: Annotated[str | None, typer.Option(help="Show one product whole.")] = None,
    lag: Annotated[bool, typer.Option("--lag", help="Ask the broker how many events the log is ahead.")] = False,
    state: StatePath = None,
    json: Json = None,
) -> None:
    """Show what the state holds: counts and CTRs of every creative in every group, and who is in the groups."""
    from osmf.inspect import run_inspect
    from osmf.inspection import ProductMissingError
    from state.errors import StateError
    from streams.errors import BrokerAwayError

    settings = command_settings()
    try:
        figures, tables = run_inspect(
            state or settings.state.path, product_id=product, lag_of=settings.streams if lag else None
        )
    except (StateError, ProductMissingError, BrokerAwayError) as error:
        raise fail(error) from error
    show(figures, json, tables)


@state.command()
def info(state: StatePath = None, json: Json = None) -> None:
    """Show a state's layout version, its size, how far it has consumed, and its tables."""
    from osmf.state_info import run_state_info
    from state.errors import StateError

    try:
        figures, tables = run_state_info(state or command_settings().state.path)
    except StateError as error:
        raise fail(error) from error
    show(figures, json, tables)


@state.command()
def migrate(state: StatePath = None) -> None:
    """Bring a state of an older layout to this program's, in place, with all of its processes stopped."""
    from state.errors import StateError
    from state.migration import migrate_state
    from state.store import LAYOUT_VERSION

    path = state or command_settings().state.path
    try:
        found = migrate_state(path)
    except StateError as error:
        raise fail(error) from error
    old = sorted({version for version in found.values() if version != LAYOUT_VERSION})
    if old:
        typer.echo(f"{path}: layout {', '.join(map(str, old))} is {LAYOUT_VERSION} now")
    else:
        typer.echo(f"{path}: has layout {LAYOUT_VERSION} already")


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the backup; missing or empty.")],
    state: StatePath = None,
    json: Json = None,
) -> None:
    """Copy the last commit of the state into a folder, while `osmf online` goes on."""
    from osmf.backup import run_backup
    from state.errors import StateError

    try:
        figures, shown = run_backup(state or command_settings().state.path, folder, now_ms=time.time_ns() // 1_000_000)
    except StateError as error:
        raise fail(error) from error
    show(figures, json, shown)


def restore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the backup.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace the state that is there; it is kept in a folder inside.")
    ] = False,
    state: StatePath = None,
    json: Json = None,
) -> None:
    """Put a backup in the state's place; `osmf online` then continues from the backup's offsets."""
    from osmf.backup import run_restore
    from state.errors import StateError

    path = state or command_settings().state.path
    try:
        figures, shown = run_restore(folder, path, now_ms=time.time_ns() // 1_000_000, force=force)
    except StateError as error:
        raise fail(error) from error
    show(figures, json, shown)
