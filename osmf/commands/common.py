"""What commands share: options, settings, ends and figures."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osmf.settings import Settings, SettingsRefusedError, load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from osmf.figures import Figures

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON to FILE, or to - (stdout).")
]
StatePath = Annotated[Path | None, typer.Option("--state", help="Folder of the state; default: state.path.")]


def fail(message: object) -> typer.Exit:
    """Say on standard error why a command ends; raise what it returns."""
    typer.secho(f"osmf: {message}", fg=typer.colors.RED, err=True)
    return typer.Exit(1)


def command_settings() -> Settings:
    """Load the settings, or end with what is wrong with them."""
    try:
        return load_settings()
    except SettingsRefusedError as error:
        raise fail(error) from error


def until_signal() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set: loops then end after the work in hand."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def show(figures: Figures, json: str | None, shown: Sequence[RenderableType] | None = None) -> None:
    """Write figures where they were asked for, and print ``shown``; by default their table."""
    from rich.console import Console

    from osmf.figures import figures_table, write_figures

    if json is not None:
        write_figures(figures, json)
    if json != "-":
        for each in [figures_table(figures)] if shown is None else shown:
            Console().print(each)
