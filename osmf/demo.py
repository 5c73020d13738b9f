"""The demo: the whole loop on one machine, in separate processes as in production.

It starts a broker, the online, serving, generator and offline processes and the simulator, watches
them on one screen, waits until everything that was produced has been consumed, and writes the
report from what the state then holds.
"""

from __future__ import annotations

import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from offline.chain import read_runs
from offline.runs import RunRecord
from online.metrics import MetricPoint, read_metrics
from osmf.figures import figures_table, write_figures
from osmf.findings import ArmCounts, arm_ratio
from osmf.processes import ChildFailedError, Children
from osmf.report import write_report
from osmf.run_records import RunRecords, StreamSample
from osmf.run_report import build_report
from osmf.run_summary import summary_figures
from osmf.screen import LiveArm, LiveFigures, LiveScreen, LiveShift
from osmf.settings import Settings, settings_variables
from simulator.session import Progress
from simulator.truth import read_truth
from state.errors import StateMissingError
from state.reading import StateReader, StateView, open_view
from state.store import Store
from streams.broker import BrokerMissingError, BrokerNotStartedError, LocalBroker
from streams.events import DeadLetter
from streams.settings import StreamSettings
from streams.tail import Tail

DEMO_IMPRESSIONS = 800_000
DEMO_IMPRESSIONS_PER_HOUR = 57_000.0
DEMO_MIN_HOURS = 3.0
"""Event time of the run. A second of it is then some minutes of event time: short enough that what one topic is read
behind another stays inside the join's windows, long enough that labels close all the time."""

POLL_S = 0.5
DRAIN_TIMEOUT_S = 180.0
DEMO_CLICK_WAIT_S = 7_200


class DemoError(RuntimeError):
    """The demo could not be run to its end."""


@dataclass
class _Watched:
    """What has been seen of the run so far."""

    started_s: float
    started_at_ms: int
    samples: list[StreamSample] = field(default_factory=list)
    arms_at_shift: ArmCounts | None = None
    shifted_seconds: float | None = None
    shift_seconds: dict[str, float] = field(default_factory=dict)
    creative_seconds: dict[str, float] = field(default_factory=dict)


def run_demo(
    settings: Settings, out: Path, *, n_impressions: int | None, seed: int | None, json_target: str | None
) -> None:
    """Run the demo and write ``report.html`` and ``summary.json`` to ``out``.

    Raises
    ------
    DemoError
        A process failed, or the stream was not worked off in time.
    """
    started_s, started_at_ms = time.monotonic(), time.time_ns() // 1_000_000
    settings = _demo_settings(settings, out, n_impressions, seed)
    _clear(out)
    topics = dict.fromkeys(settings.streams.topics.model_dump().values(), settings.streams.n_partitions)
    watched = _Watched(started_s, started_at_ms)
    try:
        with LocalBroker(topics=topics, log_path=out / "logs" / "broker.log") as broker:
            settings = _with(settings, "streams", bootstrap_servers=broker.bootstrap_servers)
            with (
                Children(out / "logs", _environment(settings)) as children,
                LiveScreen() as screen,
            ):
                for name in ("online", "serve", "generator"):
                    children.start(name)
                children.start("offline", ["schedule"])
                children.start("simulate")
                _watch(settings, children, screen, watched)
                # The last snapshot of the run is taken when all is counted, so that it holds the whole run.
                children.stop("offline")
                children.start("offline", ["run"])
                while children.is_running("offline"):
                    time.sleep(POLL_S)
                for name in ("generator", "online"):
                    children.stop(name)
                dead_letters = _dead_letters(settings.streams)
    except (ChildFailedError, BrokerMissingError, BrokerNotStartedError) as error:
        raise DemoError(str(error)) from error
    _report(settings, out, watched, dead_letters, json_target)


def _demo_settings(settings: Settings, out: Path, n_impressions: int | None, seed: int | None) -> Settings:
    port = _free_port()
    settings = _with(settings, "state", path=out / "state", sync=False)
    settings = _with(settings, "serving", port=port)
    # A second of the run is minutes of event time: a topic that is read a moment later is late by as much.
    join = settings.streams.join.model_copy(update={"click_wait_s": DEMO_CLICK_WAIT_S})
    settings = _with(settings, "streams", join=join)
    # Rows and pairs alone: training would take the cores from the stream that is shown.
    chain = settings.offline.chain.model_copy(update={"enabled": False})
    settings = _with(
        settings, "offline", dataset_dir=out / "offline", interval_s=20.0, min_new_impressions=1, chain=chain
    )
    settings = _with(
        settings,
        "generator",
        state_path=out / "generator-state",
        models_dir=out / "offline",
        storage_url=str((out / "creatives").resolve()),
        review_url=str((out / "review").resolve()),
    )
    n_impressions = n_impressions or DEMO_IMPRESSIONS
    hours = max(n_impressions / DEMO_IMPRESSIONS_PER_HOUR, DEMO_MIN_HOURS)
    traffic = {"n_impressions": n_impressions, "impressions_per_hour": n_impressions / hours}
    simulator: dict[str, object] = {} if seed is None else {"seed": seed}
    simulator |= {"out_dir": out / "simulate", "decision_url": f"http://127.0.0.1:{port}"}
    simulator |= {"cache_dir": settings.simulator.cache_dir.expanduser()}
    simulator |= {"traffic": settings.simulator.traffic.model_copy(update=traffic)}
    return _with(settings, "simulator", **simulator)


def _with(settings: Settings, section: str, **values: object) -> Settings:
    changed = getattr(settings, section).model_copy(update=values)
    return settings.model_copy(update={section: changed})


def _environment(settings: Settings) -> dict[str, str]:
    return {
        **settings_variables(settings),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _clear(out: Path) -> None:
    for name in ("state", "offline", "generator-state", "creatives", "review", "simulate", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("report.html", "summary.json"):
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def _watch(settings: Settings, children: Children, screen: LiveScreen, watched: _Watched) -> None:
    """Show the run until everything that was produced has been consumed."""
    simulated_s: float | None = None
    while True:
        time.sleep(POLL_S)
        children.check()
        progress = _progress(settings.simulator.out_dir / "progress.json")
        runs = read_runs(settings.offline)
        drained = False
        try:
            with StateReader(settings.state.path) as state, state.view() as view:
                figures = _look(settings, watched, view, progress, runs)
                if simulated_s is not None:
                    drained = _drained(settings, view)
        except StateMissingError:
            seconds = time.monotonic() - watched.started_s
            figures = LiveFigures(stage="starting the processes", seconds=seconds)
        screen.update(figures)
        if simulated_s is None and not children.is_running("simulate"):
            simulated_s = time.monotonic()
        if drained:
            return
        if simulated_s is not None and time.monotonic() - simulated_s > DRAIN_TIMEOUT_S:
            raise DemoError(
                f"{DRAIN_TIMEOUT_S:.0f} s after the simulator's end the stream is not worked off: {figures.n_consumed} "
                f"of {figures.n_produced} events are. Look at {settings.simulator.out_dir.parent / 'logs'}."
            )


def _progress(path: Path) -> Progress | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Progress)
    except FileNotFoundError:
        return None


def _look(
    settings: Settings, watched: _Watched, view: StateView, progress: Progress | None, runs: list[RunRecord]
) -> LiveFigures:
    seconds = time.monotonic() - watched.started_s
    topics = settings.streams.topics
    offsets = view.offsets()
    n_consumed = sum(
        offset.n_consumed for (topic, _), offset in offsets.items() if topic in _counted(topics.model_dump())
    )
    n_produced = 0 if progress is None else sum(progress.produced.values())
    points = read_metrics(view)
    products = view.products()
    titles = {product.product_id: product.title for product in products}
    groups = [view.groups(product.product_id) for product in products]
    grouped = [found for found in groups if found is not None and len(found.groups) > 1]
    arms = view.arms()
    shifts = view.shifts()
    for shift in shifts:
        watched.shift_seconds.setdefault(shift.event_id, seconds)
    generated = [creative for creative in view.creatives() if creative.origin == "generated"]
    for creative in generated:
        watched.creative_seconds.setdefault(creative.creative_id, seconds)
    if progress is not None and progress.shifted_at_ms is not None and watched.arms_at_shift is None:
        watched.arms_at_shift, watched.shifted_seconds = arms, seconds
    rate = _rate(watched, seconds, n_consumed)
    watched.samples.append(
        StreamSample(
            seconds=seconds,
            rate_events_s=rate,
            lag=max(n_produced - n_consumed, 0),
            metrics=points[-1] if points else None,
            n_groups=sum(len(found.groups) for found in grouped),
            n_consumed=n_consumed,
            arms={
                arm: (
                    sum(r.n_impressions for key, r in arms.items() if key[1] == arm),
                    sum(r.n_clicks for key, r in arms.items() if key[1] == arm),
                )
                for arm in ("group", "all")
            },
        )
    )
    return _live(
        settings, watched, progress, runs, view, points[-1] if points else None, titles, len(grouped), n_consumed
    )


def _rate(watched: _Watched, seconds: float, n_consumed: int) -> float:
    recent = [sample for sample in watched.samples if seconds - sample.seconds <= 5.0]
    if not recent:
        return 0.0
    first = recent[0]
    return max(0.0, (n_consumed - first.n_consumed) / max(seconds - first.seconds, 1e-9))


def _counted(topics: dict[str, str]) -> set[str]:
    return {topics["impressions"], topics["clicks"]}


def _live(
    settings: Settings,
    watched: _Watched,
    progress: Progress | None,
    runs: list[RunRecord],
    view: StateView,
    point: MetricPoint | None,
    titles: dict[str, str],
    n_grouped: int,
    n_consumed: int,
) -> LiveFigures:
    sample = watched.samples[-1]
    arms = view.arms()
    ratio = arm_ratio(arms, settings.serving.experiment, settings.online.counts.user_buckets)
    planned = 1 if progress is None else max(progress.n_impressions_planned, 1)
    return LiveFigures(
        stage="rendering the catalogue" if progress is None else progress.phase,
        seconds=sample.seconds,
        progress=0.0 if progress is None else min(progress.n_impressions / planned, 1.0),
        n_produced=0 if progress is None else sum(progress.produced.values()),
        n_consumed=n_consumed,
        n_dead_letters=sum(offset.n_dead_letters for offset in view.offsets().values()),
        rate_events_s=sample.rate_events_s,
        lag=sample.lag,
        auroc=None if point is None else point.recent_auroc,
        log_loss=None if point is None else point.log_loss,
        n_products=len(titles),
        n_products_with_groups=n_grouped,
        n_groups=sample.n_groups,
        shifts=tuple(
            LiveShift(
                seconds=watched.shift_seconds[shift.event_id],
                product_title=titles.get(shift.product_id, shift.product_id),
                category=shift.category,
            )
            for shift in view.shifts()
        ),
        n_creatives_emitted=len(watched.creative_seconds),
        arms=tuple(
            LiveArm(title=title, n_impressions=n, n_clicks=x, ctr=x / n if n else None)
            for title, (n, x) in zip(("best for the group", "best for all"), sample.arms.values(), strict=True)
        ),
        ratio=None if ratio is None else ratio.ratio,
        ratio_low=None if ratio is None else ratio.low,
        ratio_high=None if ratio is None else ratio.high,
        n_snapshots=sum(run.outcome == "built" for run in runs),
    )


def _drained(settings: Settings, view: StateView) -> bool:
    """Whether all that the simulator and the generator have produced is in the state."""
    truth = read_truth(settings.simulator.out_dir / "truth.json")
    topics = settings.streams.topics
    consumed = {"impressions": 0, "clicks": 0}
    for (topic, _), offset in view.offsets().items():
        for name in consumed:
            if topic == getattr(topics, name):
                consumed[name] += offset.n_consumed
    if any(consumed[name] < truth.produced[name] for name in consumed) or view.n_outbox() or view.n_waiting_clicks():
        return False
    return _generator_is_done(settings, view)


def _generator_is_done(settings: Settings, view: StateView) -> bool:
    n_shifts = len(view.shifts())
    if not n_shifts:
        return True
    try:
        with Store(settings.generator.state_path, readonly=True) as store, open_view(store) as own:
            n_handled = sum(
                offset.n_used - offset.n_duplicates
                for (topic, _), offset in own.offsets().items()
                if topic == settings.streams.topics.groups_shifted
            )
            emitted = {creative.creative_id for creative in own.creatives()}
    except StateMissingError:
        return False
    return n_handled >= n_shifts and emitted <= {creative.creative_id for creative in view.creatives()}


def _dead_letters(streams: StreamSettings) -> dict[str, int]:
    """Return the dead letters on their topic by reason, each id once."""
    reasons: dict[str, str] = {}
    with Tail(streams, streams.topics.dead_letters, DeadLetter) as tail:
        while letters := tail.poll(1_000):
            reasons.update({letter.event_id: letter.reason for letter in letters})
    counts: dict[str, int] = {}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))


def _report(
    settings: Settings, out: Path, watched: _Watched, dead_letters: dict[str, int], json_target: str | None
) -> None:
    from rich.console import Console

    records = RunRecords(
        command="demo",
        started_at_ms=watched.started_at_ms,
        seconds=time.monotonic() - watched.started_s,
        samples=watched.samples,
        arms_at_shift=watched.arms_at_shift,
        shifted_seconds=watched.shifted_seconds,
        shift_seconds=watched.shift_seconds,
        creative_seconds=watched.creative_seconds,
        dead_letters=dead_letters,
        runs=[run for run in read_runs(settings.offline) if run.outcome == "built"],
    )
    truth = read_truth(settings.simulator.out_dir / "truth.json")
    with StateReader(settings.state.path) as state, state.view() as view:
        report, findings = build_report(settings, view, truth, records)
    figures = summary_figures(settings, truth, records, report, findings)
    write_report(report, out / "report.html")
    write_figures(figures, out / "summary.json")
    if json_target is not None:
        write_figures(figures, json_target)
    if json_target != "-":
        console = Console()
        console.print(figures_table(figures))
        console.print(f"report: {out / 'report.html'}")
