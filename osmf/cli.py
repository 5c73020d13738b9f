"""The command line: ``osmf COMMAND``. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from osmf import __version__
from osmf.commands import creatives, logs, measuring, offline, processes, states, training
from osmf.settings import CONFIG_VARIABLE, describe_settings

app = typer.Typer(
    name="osmf",
    help="One Size, Many Fits: group-wise creative optimisation, streaming and online.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings file; default: osmf.toml in this folder, if there.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Set up what all commands share."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("apscheduler", "httpx", "transformers"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # While a broker is away its client logs errors every second; that it is away, and what follows, is said by us.
    logging.getLogger("kafka").setLevel(logging.ERROR if verbose else logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)


for command in (
    processes.demo,
    processes.broker,
    processes.online,
    processes.generator,
    processes.serve,
    processes.simulate,
    logs.replay,
    states.inspect,
    logs.forget,
    logs.verify,
    states.backup,
    states.restore,
):
    app.command()(command)
offline.offline.command()(training.train)
offline.offline.command(hidden=True)(training.train_process)
app.add_typer(offline.offline)
app.add_typer(states.state)
app.add_typer(creatives.creative)
app.command()(measuring.bench)
app.command("eval")(measuring.evaluate)
app.command()(logs.schemas)


@app.command("settings")
def show_settings() -> None:
    """List every setting with its default and what it means."""
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "default", "meaning", show_lines=False)
    for key, default, description in describe_settings():
        table.add_row(key, default, description)
    Console().print(table)
