"""Commands that run a process: the whole demo, or one of its parts."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osmf.commands.common import Json, command_settings, fail, until_signal

if TYPE_CHECKING:
    from state.reading import StateReader

UntilIdle = Annotated[float | None, typer.Option(min=0, help="End when nothing has come for this long, seconds.")]


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
        run_demo(command_settings(), out, n_impressions=impressions, seed=seed, json_target=json)
    except DemoError as error:
        raise fail(error) from error


def broker(
    topics_only: Annotated[
        bool, typer.Option("--topics-only", help="Create the topics on a running broker, and end.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port on loopback; 0 takes a free one.")] = 9092,
    log: Annotated[Path, typer.Option(help="Log of the broker.")] = Path("out/broker.log"),
) -> None:
    """Run a local Kafka-protocol broker in memory, with our topics."""
    from streams.broker import BrokerMissingError, BrokerNotStartedError, LocalBroker, TopicMismatchError, create_topics

    settings = command_settings().streams
    wanted = dict.fromkeys(settings.topics.model_dump().values(), settings.n_partitions)
    try:
        if topics_only:
            made = create_topics(settings.bootstrap_servers, wanted, client_options=settings.client_options)
            typer.echo(f"created {', '.join(made)}" if made else "all topics are there already")
            return
        stop = until_signal()
        with LocalBroker(topics=wanted, log_path=log, port=port) as local:
            typer.echo(f"listening on {local.bootstrap_servers}; Ctrl-C ends it and drops what it holds")
            stop.wait()
    except (BrokerMissingError, BrokerNotStartedError, TopicMismatchError) as error:
        raise fail(error) from error


def online(
    until_idle_s: UntilIdle = None,
) -> None:
    """Consume, learn, group and count: the online process."""
    from online.mismatch import StateMismatchError
    from online.worker import run_online
    from state.errors import StateError
    from streams.errors import ConsumerError

    settings = command_settings()
    stop = until_signal()
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
        raise fail(error) from error


def generator(
    until_idle_s: UntilIdle = None,
) -> None:
    """Make new creatives for groups that have shifted: the generator process."""
    import torch

    from generator.certificate import CertificateRefused
    from generator.manifest import ManifestRefused
    from generator.process import run_generator
    from generator.renderer import RendererUnavailable
    from generator.weights import WeightsMissing
    from online.encoders import EncoderMissingError, likeness_encoder
    from state.errors import StateError
    from streams.errors import ConsumerError

    settings = command_settings()
    torch.set_num_threads(1)
    stop = until_signal()
    try:
        run_generator(
            settings.streams,
            settings.generator,
            settings.state,
            likeness_encoder(settings.online),
            now_ms=time.time_ns() // 1_000_000,
            clock_s=time.monotonic,
            stop=stop.is_set,
            until_idle_s=until_idle_s,
        )
    except (
        StateError,
        ConsumerError,
        EncoderMissingError,
        WeightsMissing,
        CertificateRefused,
        ManifestRefused,
        RendererUnavailable,
    ) as error:
        raise fail(error) from error


def serve(
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port; default: serving.port.")] = None,
) -> None:
    """Answer which creative to show, over HTTP: the serving process."""
    import torch

    from online.mismatch import StateMismatchError
    from serving.app import run_api
    from serving.decisions import DecisionService
    from state.errors import StateError

    settings = command_settings()
    torch.set_num_threads(settings.online.torch_threads)
    serving = settings.serving if port is None else settings.serving.model_copy(update={"port": port})
    try:
        state = _wait_for_state(settings.state.path)
    except StateError as error:
        raise fail(error) from error
    with state:
        service = DecisionService(
            state, settings.online, serving, impressions_topic=settings.streams.topics.impressions
        )
        try:
            service.refresh()
        except StateMismatchError as error:
            raise fail(error) from error
        run_api(service, serving, lambda address: typer.echo(f"serving on {address}"))


def _wait_for_state(path: Path) -> StateReader:
    from state.errors import StateMissingError
    from state.reading import StateReader

    told = False
    while True:
        try:
            return StateReader(path)
        except StateMissingError as error:
            if not told:
                typer.echo(f"waiting: {error}")
                told = True
            time.sleep(0.2)


def simulate() -> None:
    """Simulate users of a world with known preferences, against the broker and the decision service."""
    from simulator.session import simulate as run

    settings = command_settings()
    stop = until_signal()
    try:
        truth = run(settings.simulator, settings.streams, stop=stop)
    except RuntimeError as error:
        raise fail(error) from error
    typer.echo(
        f"{truth.n_impressions} impressions and {truth.n_clicks} clicks; {settings.simulator.out_dir}/truth.json"
    )
