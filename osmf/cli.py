"""The command line: ``osmf COMMAND``. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osmf import __version__
from osmf.settings import CONFIG_VARIABLE, Settings, SettingsRefusedError, describe_settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import RenderableType

    from benchmarks.measured import Measured
    from osmf.figures import Figures
    from osmf.log_entry import LogEntry
    from state.store import Store

app = typer.Typer(
    name="osmf",
    help="One Size, Many Fits: group-wise creative optimisation, streaming and online.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON to FILE, or to - (stdout).")
]
StatePath = Annotated[Path | None, typer.Option("--state", help="Folder of the state; default: state.path.")]


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
    for chatty in ("kafka", "apscheduler", "httpx", "transformers"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)


def _fail(message: object) -> typer.Exit:
    typer.secho(f"osmf: {message}", fg=typer.colors.RED, err=True)
    return typer.Exit(1)


def _settings() -> Settings:
    try:
        return load_settings()
    except SettingsRefusedError as error:
        raise _fail(error) from error


def _until_signal() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set: loops then end after the work in hand."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder that the run writes; what a former run left there goes.")] = Path(
        "out/demo"
    ),
    impressions: Annotated[int | None, typer.Option(min=1_000, help="Impressions of the run.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the simulated world.")] = None,
    json: Json = None,
) -> None:
    """Run the whole loop on this machine and leave a report."""
    from osmf.demo import DemoError, run_demo

    # SIGTERM ends it as Ctrl-C does, and Ctrl-C also where a shell in the background has it ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        run_demo(_settings(), out, n_impressions=impressions, seed=seed, json_target=json)
    except DemoError as error:
        raise _fail(error) from error


@app.command()
def broker(
    topics_only: Annotated[
        bool, typer.Option("--topics-only", help="Create the topics on a running broker, and end.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port on loopback; 0 takes a free one.")] = 9092,
    log: Annotated[Path, typer.Option(help="Log of the broker.")] = Path("out/broker.log"),
) -> None:
    """Run a local Kafka-protocol broker in memory, with our topics."""
    from streams.broker import BrokerMissingError, BrokerNotStartedError, LocalBroker, TopicMismatchError, create_topics

    settings = _settings().streams
    wanted = dict.fromkeys(settings.topics.model_dump().values(), settings.n_partitions)
    try:
        if topics_only:
            made = create_topics(settings.bootstrap_servers, wanted, client_options=settings.client_options)
            typer.echo(f"created {', '.join(made)}" if made else "all topics are there already")
            return
        stop = _until_signal()
        with LocalBroker(topics=wanted, log_path=log, port=port) as local:
            typer.echo(f"listening on {local.bootstrap_servers}; Ctrl-C ends it and drops what it holds")
            stop.wait()
    except (BrokerMissingError, BrokerNotStartedError, TopicMismatchError) as error:
        raise _fail(error) from error


@app.command()
def online(
    until_idle_s: Annotated[
        float | None, typer.Option(min=0, help="End when nothing has come for this long, seconds.")
    ] = None,
) -> None:
    """Consume, learn, group and count: the online process."""
    from online.mismatch import StateMismatchError
    from online.worker import run_online
    from state.errors import StateError
    from streams.consumer import ConsumerError

    settings = _settings()
    stop = _until_signal()
    try:
        run_online(
            settings.streams,
            settings.online,
            settings.state,
            clock_s=time.monotonic,
            stop=stop.is_set,
            until_idle_s=until_idle_s,
        )
    except (StateError, StateMismatchError, ConsumerError) as error:
        raise _fail(error) from error


@app.command()
def generator(
    until_idle_s: Annotated[
        float | None, typer.Option(min=0, help="End when nothing has come for this long, seconds.")
    ] = None,
) -> None:
    """Make new creatives for groups that have shifted: the generator process."""
    from generator.worker import run_generator
    from state.errors import StateError
    from streams.consumer import ConsumerError

    settings = _settings()
    stop = _until_signal()
    try:
        run_generator(
            settings.streams,
            settings.generator,
            settings.state,
            clock_s=time.monotonic,
            stop=stop.is_set,
            until_idle_s=until_idle_s,
        )
    except (StateError, ConsumerError) as error:
        raise _fail(error) from error


@app.command()
def offline(
    once: Annotated[bool, typer.Option("--once", help="Run the job now, once, and end.")] = False,
) -> None:
    """Rebuild GAIP rows and pairs from snapshots, on a schedule: the offline process."""
    from offline.jobs import run_once, run_schedule

    settings = _settings()
    if once:
        record = run_once(settings.offline, settings.state.path)
        typer.echo(
            f"{record.outcome}: {record.artifact or record.reason} ({record.n_rows} rows, {record.n_pairs} pairs)"
        )
        raise typer.Exit(1 if record.outcome == "failed" else 0)
    run_schedule(settings.offline, settings.state.path)


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port; default: serving.port.")] = None,
) -> None:
    """Answer which creative to show, over HTTP: the serving process."""
    import torch

    from online.mismatch import StateMismatchError
    from serving.app import run_api
    from serving.decisions import DecisionService

    settings = _settings()
    torch.set_num_threads(settings.online.torch_threads)
    serving = settings.serving if port is None else settings.serving.model_copy(update={"port": port})
    store = _wait_for_state(settings.state.path)
    with store:
        service = DecisionService(
            store, settings.online, serving, impressions_topic=settings.streams.topics.impressions
        )
        try:
            service.refresh()
        except StateMismatchError as error:
            raise _fail(error) from error
        run_api(service, serving, lambda address: typer.echo(f"serving on {address}"))


def _wait_for_state(path: Path) -> Store:
    from state.errors import StateMissingError
    from state.store import Store

    told = False
    while True:
        try:
            return Store(path, readonly=True)
        except StateMissingError as error:
            if not told:
                typer.echo(f"waiting: {error}")
                told = True
            time.sleep(0.2)


@app.command()
def simulate() -> None:
    """Simulate users of a world with known preferences, against the broker and the decision service."""
    from simulator.session import simulate as run

    settings = _settings()
    stop = _until_signal()
    try:
        truth = run(settings.simulator, settings.streams, stop=stop)
    except RuntimeError as error:
        raise _fail(error) from error
    typer.echo(
        f"{truth.n_impressions} impressions and {truth.n_clicks} clicks; {settings.simulator.out_dir}/truth.json"
    )


BootstrapServers = Annotated[
    str | None,
    typer.Option("--bootstrap-servers", help="A running broker; default: one of its own, for the time of the replay."),
]


def _show(figures: Figures, json: str | None, shown: Sequence[RenderableType] | None = None) -> None:
    """Write figures where they were asked for, and print ``shown``; by default their table."""
    from rich.console import Console

    from osmf.figures import figures_table, write_figures

    if json is not None:
        write_figures(figures, json)
    if json != "-":
        for each in [figures_table(figures)] if shown is None else shown:
            Console().print(each)


@app.command()
def replay(
    dataset: Annotated[
        str | None, typer.Argument(help="`obd`: the Open Bandit Dataset. Leave it out to name your own files.")
    ] = None,
    impressions: Annotated[Path | None, typer.Option(help="Impressions, Parquet or JSON lines.")] = None,
    clicks: Annotated[Path | None, typer.Option(help="Clicks, Parquet or JSON lines.")] = None,
    products: Annotated[Path | None, typer.Option(help="Products, Parquet or JSON lines.")] = None,
    creatives: Annotated[Path | None, typer.Option(help="Creatives; default: those of the impressions.")] = None,
    users: Annotated[Path | None, typer.Option(help="Users with their attributes, joined by user_id.")] = None,
    bootstrap_servers: BootstrapServers = None,
    json: Json = None,
) -> None:
    """Play a click log through the broker and the online process."""
    from osmf.event_files import EventFiles
    from osmf.event_rows import EventFileError
    from osmf.replay import replay_files, replay_open_bandit

    settings = _settings()
    streams, own_broker = settings.streams, bootstrap_servers is None
    if bootstrap_servers is not None:
        streams = streams.model_copy(update={"bootstrap_servers": bootstrap_servers})
    try:
        if dataset == "obd":
            figures = replay_open_bandit(streams, settings.online, settings.state, own_broker=own_broker)
        elif dataset is not None:
            raise _fail(
                f"there is no data set {dataset!r}: allowed is `obd`, or none with --impressions and the others"
            )
        elif impressions is None or clicks is None or products is None:
            raise _fail("name --impressions, --clicks and --products (and --users), or the data set `obd`")
        else:
            files = EventFiles(impressions, clicks, products, creatives, users)
            figures = replay_files(files, streams, settings.online, settings.state, own_broker=own_broker)
    except (EventFileError, RuntimeError) as error:
        raise _fail(error) from error
    _show(figures, json)


@app.command()
def inspect(
    product: Annotated[str | None, typer.Option(help="Show one product whole.")] = None,
    state: StatePath = None,
    json: Json = None,
) -> None:
    """Show what the state holds: counts and CTRs of every creative in every group, and who is in the groups."""
    from osmf.inspect import ProductMissingError, run_inspect
    from state.errors import StateError

    try:
        figures, tables = run_inspect(state or _settings().state.path, product_id=product)
    except (StateError, ProductMissingError) as error:
        raise _fail(error) from error
    _show(figures, json, tables)


@app.command()
def verify(
    dataset: Annotated[str | None, typer.Argument(help="`obd`: recount the Open Bandit Dataset.")] = None,
    impressions: Annotated[Path | None, typer.Option(help="Impressions to recount.")] = None,
    clicks: Annotated[Path | None, typer.Option(help="Clicks to recount.")] = None,
    products: Annotated[Path | None, typer.Option(help="Products.")] = None,
    creatives: Annotated[Path | None, typer.Option(help="Creatives.")] = None,
    users: Annotated[Path | None, typer.Option(help="Users.")] = None,
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

    settings = _settings()
    entries: Callable[[], Iterable[LogEntry]] | None = None
    try:
        if dataset == "obd":
            obd = open_bandit_files()
            entries = lambda: open_bandit_entries(obd)  # noqa: E731
        elif impressions is not None and clicks is not None and products is not None:
            files = EventFiles(impressions, clicks, products, creatives, users)
            entries = lambda: files.entries(settings.streams.fields)  # noqa: E731
        figures, shown, code = run_verify(
            state or settings.state.path, settings.streams, entries=entries, from_topics=from_topics
        )
    except (StateError, EventFileError, RuntimeError) as error:
        raise _fail(error) from error
    _show(figures, json, shown)
    raise typer.Exit(code)


class Bench(StrEnum):
    """What can be benchmarked."""

    STREAM = "stream"
    LEARN = "learn"
    GROUP = "group"
    SHIFT = "shift"
    VALUE = "value"
    DELAY = "delay"
    RENDER = "render"


@app.command()
def bench(
    what: Annotated[
        Bench,
        typer.Argument(
            help="stream: events/s; learn: AUROC in one pass; group: true groups; shift: changed tastes; "
            "value: what groups are worth; delay: late clicks; render: ms."
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute on two cores.")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="World to run; may be given several times.")] = None,
    json: Json = None,
) -> None:
    """Measure speed and quality on this machine."""
    from benchmarks.delay import bench_delay
    from benchmarks.groups import bench_group
    from benchmarks.learn import bench_learn
    from benchmarks.render import bench_render
    from benchmarks.shift import bench_shift
    from benchmarks.stream import bench_stream
    from benchmarks.value import bench_value

    started_s = time.monotonic()
    match what:
        case Bench.STREAM:
            measured = bench_stream(quick=quick, seeds=seed)
        case Bench.LEARN:
            measured = bench_learn(quick=quick, seeds=seed)
        case Bench.GROUP:
            measured = bench_group(quick=quick, seeds=seed)
        case Bench.SHIFT:
            measured = bench_shift(quick=quick, seeds=seed)
        case Bench.VALUE:
            measured = bench_value(quick=quick, seeds=seed)
        case Bench.DELAY:
            measured = bench_delay(quick=quick, seeds=seed)
        case Bench.RENDER:
            measured = bench_render(quick=quick)
    _show(_figures(f"bench {what.value}", measured, started_s), json)


class Evaluation(StrEnum):
    """What can be evaluated."""

    GROUPS = "groups"


@app.command("eval")
def evaluate(
    what: Annotated[Evaluation, typer.Argument(help="groups: how much they differ, and agree with batch and truth.")],
    truth: Annotated[Path | None, typer.Option(help="truth.json of the simulation that made the state.")] = None,
    state: StatePath = None,
    quick: Annotated[bool, typer.Option("--quick", help="On a smaller sample of users.")] = False,
    json: Json = None,
) -> None:
    """Evaluate what a state has learnt."""
    from benchmarks.evaluate import evaluate_groups
    from online.mismatch import StateMismatchError
    from state.errors import StateError

    settings, started_s = _settings(), time.monotonic()
    try:
        measured = evaluate_groups(state or settings.state.path, truth, settings.online, quick=quick)
    except (StateError, StateMismatchError) as error:
        raise _fail(error) from error
    _show(_figures(f"eval {what.value}", measured, started_s), json)


def _figures(command: str, measured: Measured, started_s: float) -> Figures:
    from osmf.figures import Figures, commit, device

    return Figures(
        command=command,
        commit=commit(),
        seeds=measured.seeds,
        device=device(),
        seconds=time.monotonic() - started_s,
        metrics=measured.metrics,
        detail=measured.detail,
    )


@app.command()
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


@app.command("settings")
def show_settings() -> None:
    """List every setting with its default and what it means."""
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "default", "meaning", show_lines=False)
    for key, default, description in describe_settings():
        table.add_row(key, default, description)
    Console().print(table)
