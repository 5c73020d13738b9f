"""Commands that measure: speed and quality on this machine, and what a state has learnt."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osmf.commands.common import Json, StatePath, command_settings, fail, show

if TYPE_CHECKING:
    from benchmarks.measured import Measured
    from osmf.figures import Figures
    from streams.settings import StreamSettings


class Bench(StrEnum):
    """What can be benchmarked."""

    STREAM = "stream"
    LEARN = "learn"
    GROUP = "group"
    SHIFT = "shift"
    VALUE = "value"
    DELAY = "delay"
    LAG = "lag"
    RENDER = "render"
    ALIGNMENT = "alignment"
    OFFLINE = "offline"


def bench(
    what: Annotated[
        Bench,
        typer.Argument(
            help="stream: events/s; learn: AUROC in one pass; group: true groups; shift: changed tastes; "
            "value: what groups are worth; delay: late clicks; lag: three times too much; render: ms; "
            "alignment: share of the GPU's peak; offline: reward models, and what aligned prompts are clicked."
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="For less time: a minute or a few on two cores.")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="World to run; may be given several times.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="lag: how long too much is sent.")] = None,
    chart: Annotated[Path | None, typer.Option(help="lag: draw lag and memory into this file, as SVG.")] = None,
    json: Json = None,
) -> None:
    """Measure speed and quality on this machine."""
    from benchmarks.delay import bench_delay
    from benchmarks.gpu_alignment import bench_alignment
    from benchmarks.groups import bench_group
    from benchmarks.lag import MINUTES, QUICK_MINUTES, bench_lag
    from benchmarks.learn import bench_learn
    from benchmarks.offline import bench_offline
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
        case Bench.LAG:
            minutes = minutes or (QUICK_MINUTES if quick else MINUTES)
            measured = bench_lag(minutes=minutes, seeds=seed, check=_contradictions)
        case Bench.RENDER:
            measured = bench_render(quick=quick)
        case Bench.ALIGNMENT:
            measured = bench_alignment(quick=quick)
        case Bench.OFFLINE:
            measured = bench_offline(quick=quick, seeds=seed)
    figures = _figures(f"bench {what.value}", measured, started_s)
    if what is Bench.LAG and chart is not None:
        from osmf.lag_chart import lag_chart

        chart.write_text(lag_chart(figures))
    show(figures, json)


def _contradictions(state: Path, streams: StreamSettings) -> int:
    """Recount the topics against a state; return how much is wrong."""
    from osmf.verify import verify_state

    found = verify_state(state, streams, from_topics=True)
    return len(found.broken) + len(found.differences)


class Evaluation(StrEnum):
    """What can be evaluated."""

    GROUPS = "groups"


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

    settings, started_s = command_settings(), time.monotonic()
    try:
        measured = evaluate_groups(state or settings.state.path, truth, settings.online, quick=quick)
    except (StateError, StateMismatchError) as error:
        raise fail(error) from error
    show(_figures(f"eval {what.value}", measured, started_s), json)


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
