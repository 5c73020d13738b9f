"""Commands about recorded events: play them, recount them, and the form that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osmf.commands.common import Json, StatePath, command_settings, fail, show

if TYPE_CHECKING:
    from osmf.log_entry import LogEntry

BootstrapServers = Annotated[
    str | None,
    typer.Option("--bootstrap-servers", help="A running broker; default: one of its own, for the time of the replay."),
]


def replay(
    dataset: Annotated[
        str | None, typer.Argument(help="`obd`: the Open Bandit Dataset. Leave it out to name your own files.")
    ] = None,
    impressions: Annotated[Path | None, typer.Option(help="Impressions, Parquet or JSON lines.")] = None,
    clicks: Annotated[Path | None, typer.Option(help="Clicks, Parquet or JSON lines.")] = None,
    products: Annotated[Path | None, typer.Option(help="Products, Parquet or JSON lines.")] = None,
    creatives: Annotated[Path | None, typer.Option(help="Creatives; default: those of the impressions.")] = None,
    users: Annotated[Path | None, typer.Option(help="Users with their attributes, joined by user_id.")] = None,
    corrections: Annotated[Path | None, typer.Option(help="Retracted clicks and forgotten users.")] = None,
    bootstrap_servers: BootstrapServers = None,
    json: Json = None,
) -> None:
    """Play a click log through the broker and the online process."""
    from osmf.event_files import EventFiles
    from osmf.event_rows import EventFileError
    from osmf.replay import replay_files, replay_open_bandit

    settings = command_settings()
    streams, own_broker = settings.streams, bootstrap_servers is None
    if bootstrap_servers is not None:
        streams = streams.model_copy(update={"bootstrap_servers": bootstrap_servers})
    try:
        if dataset == "obd":
            figures = replay_open_bandit(streams, settings.online, settings.state, own_broker=own_broker)
        elif dataset is not None:
            raise fail(f"there is no data set {dataset!r}: allowed is `obd`, or none with --impressions and the others")
        elif impressions is None or clicks is None or products is None:
            raise fail("name --impressions, --clicks and --products (and --users), or the data set `obd`")
        else:
            files = EventFiles(impressions, clicks, products, creatives, users, corrections)
            figures = replay_files(files, streams, settings.online, settings.state, own_broker=own_broker)
    except (EventFileError, RuntimeError) as error:
        raise fail(error) from error
    show(figures, json)


def forget(
    user_id: Annotated[str, typer.Argument(metavar="USER_ID", help="The user, as impressions name them.")],
    bootstrap_servers: Annotated[
        str | None, typer.Option("--bootstrap-servers", help="The broker; default: streams.bootstrap_servers.")
    ] = None,
) -> None:
    """Ask the online process to forget a user; every partition of the corrections gets the event."""
    import time

    import msgspec

    from streams.events import UserForgotten
    from streams.producer import EventProducer, SendError

    streams = command_settings().streams
    if bootstrap_servers is not None:
        streams = streams.model_copy(update={"bootstrap_servers": bootstrap_servers})
    try:
        raw = {"type": "UserForgotten", "user_id": user_id, "forgotten_at_ms": time.time_ns() // 1_000_000}
        event = msgspec.convert(raw, UserForgotten)
        with EventProducer(streams, client_id="osmf-forget") as producer:
            producer.send(event)
            producer.flush()
    except (msgspec.ValidationError, SendError) as error:
        raise fail(error) from error
    typer.echo(
        f"sent to {streams.topics.corrections}: what was added for {user_id!r} is taken back once it is consumed"
    )


def verify(
    dataset: Annotated[str | None, typer.Argument(help="`obd`: recount the Open Bandit Dataset.")] = None,
    impressions: Annotated[Path | None, typer.Option(help="Impressions to recount.")] = None,
    clicks: Annotated[Path | None, typer.Option(help="Clicks to recount.")] = None,
    products: Annotated[Path | None, typer.Option(help="Products.")] = None,
    creatives: Annotated[Path | None, typer.Option(help="Creatives.")] = None,
    users: Annotated[Path | None, typer.Option(help="Users.")] = None,
    corrections: Annotated[Path | None, typer.Option(help="Retracted clicks and forgotten users.")] = None,
    from_topics: Annotated[bool, typer.Option("--from-topics", help="Recount from the broker's topics.")] = False,
    state: StatePath = None,
    json: Json = None,
) -> None:
    """Recount from files or topics and compare with the state; exit 1 when anything differs."""
    from osmf.event_files import EventFiles
    from osmf.event_rows import EventFileError
    from osmf.replay_obd import open_bandit_entries, open_bandit_files
    from osmf.verify import run_verify
    from state.errors import StateError

    settings = command_settings()
    entries: Callable[[], Iterable[LogEntry]] | None = None
    try:
        if dataset == "obd":
            obd = open_bandit_files()
            entries = lambda: open_bandit_entries(obd)  # noqa: E731
        elif impressions is not None and clicks is not None and products is not None:
            files = EventFiles(impressions, clicks, products, creatives, users, corrections)
            entries = lambda: files.entries(settings.streams.fields)  # noqa: E731
        figures, shown, code = run_verify(
            state or settings.state.path, settings.streams, entries=entries, from_topics=from_topics
        )
    except (StateError, EventFileError, RuntimeError) as error:
        raise fail(error) from error
    show(figures, json, shown)
    raise typer.Exit(code)


def schemas(
    out: Annotated[Path, typer.Option(help="Folder that the files are written to.")] = Path("docs/schemas"),
) -> None:
    """Write the JSON Schema of every event."""
    import msgspec

    from streams.codec import json_schemas

    out.mkdir(parents=True, exist_ok=True)
    for name, schema in json_schemas().items():
        (out / name).write_bytes(msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n")
    typer.echo(f"wrote {len(json_schemas())} schemas to {out}")
