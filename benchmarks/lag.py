"""How the online process bears a stream that is three times what it can work off: its memory, its lag, and the end."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import psutil

from benchmarks.log import simulate_log, simulator_settings
from benchmarks.measured import Measured
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings
from state.errors import StateMissingError
from state.files import DATA_FILE
from state.reading import open_view
from state.store import Store
from streams.bound import bound_to_this_process
from streams.broker import LocalBroker
from streams.codec import topic_decoders
from streams.events import Click, Creative, Event, Impression, Product
from streams.producer import EventProducer
from streams.settings import StreamSettings

OVERLOAD: Final = 3.2
"""Events that are sent for each that has been worked off: over three, for more are by the time they are sent."""

MINUTES: Final = 2.5
QUICK_MINUTES: Final = 0.5
N_IMPRESSIONS: Final = 20_000
"""Impressions of the simulated log that is sent over and over, under new ids."""

HOUR_MS: Final = 3_600_000
"""Event time of the overload, whatever it takes."""

WARM_UP: Final = 0.75
WARM_UP_MS: Final = 2 * HOUR_MS
"""Before it, as much as is worked off is sent for this share of its time, dated over two hours: windows close, and what
is learnt has grown to its size when the overload begins."""

AHEAD_EVENTS: Final = 20_000
"""Events that are sent before the first has been worked off."""

LAG_WARNING_EVENTS: Final = 30_000
SAMPLE_S: Final = 0.5
SENT_AT_ONCE: Final = 500
LESS_PRIORITY: Final = 5
MOST_LINES: Final = 100
MOST_SAMPLES: Final = 300
_STALLED_S: Final = 120.0


class Sample(NamedTuple):
    """What was seen at one moment, seconds after the start.

    ``private_mib`` is the memory that is the process's own; ``mapped_mib`` are pages of files, mostly of the state,
    that the system keeps at hand as long as it has room.
    """

    seconds: float
    n_sent: int
    n_consumed: int
    private_mib: float
    mapped_mib: float

    @property
    def lag(self) -> int:
        """Events that have been sent and not been worked off."""
        return self.n_sent - self.n_consumed


@dataclass
class _Sent:
    """What has been sent, and what was seen meanwhile."""

    n_events: int = 0
    n_impressions: int = 0
    n_clicks: int = 0
    n_warm_up: int = 0
    samples: list[Sample] = field(default_factory=list)

    def send(self, producer: EventProducer, template: tuple[Impression | Click, str], at_ms: int) -> None:
        event, impression_id = template
        self.n_events += 1
        if isinstance(event, Impression):
            self.n_impressions += 1
            producer.send(msgspec.structs.replace(event, impression_id=impression_id, shown_at_ms=at_ms))
        else:
            self.n_clicks += 1
            producer.send(msgspec.structs.replace(event, impression_id=impression_id, clicked_at_ms=at_ms))


def bench_lag(
    *,
    minutes: float,
    seeds: Sequence[int] | None = None,
    check: Callable[[Path, StreamSettings], int] = lambda *_: 0,
    simulator: SimulatorSettings | None = None,
    online: OnlineSettings | None = None,
) -> Measured:
    """Send three times what the online process works off, for some minutes, and watch it until it has caught up.

    Broker, producer and the process share this machine. What is sent follows what has been worked off, so that the
    overload is threefold whatever the machine; its events are dated over one hour, so that windows close meanwhile. All
    share one core, of which the process gets what the others leave, or the overload would be what they manage to send.

    Metrics: ``sent``, ``sent_s`` and ``worked_s`` events per second during the overload, and ``overload``, how many
    were sent for each that was worked off; ``most_lag`` and ``catch_up_s``; private memory when the overload began, at
    most, and at the end, and by how many MiB a million events worked off it grew since (least squares); ``lost``
    events; ``contradictions`` that ``check`` found; ``lag_warnings`` that the process wrote.

    Parameters
    ----------
    minutes
        How long the overload lasts.
    seeds
        The world's seed, the first of them; 11 by default.
    check
        Recounts the state when all is done, given the broker's settings; returns what is wrong.
    simulator, online
        Another world, and settings of the process; encoders that need no pictures by default.
    """
    seed = seeds[0] if seeds else 11
    simulator = simulator or simulator_settings(N_IMPRESSIONS, quick=True)
    online = online or OnlineSettings.model_validate({"encoders": {"text": "hashed", "image": "hashed"}})
    with one_core(), tempfile.TemporaryDirectory(prefix="osmf-bench-") as folder:
        topics = dict.fromkeys(StreamSettings().topics.model_dump().values(), 1)
        with LocalBroker(topics, log_path=Path(folder) / "broker.log") as broker:
            streams = StreamSettings(bootstrap_servers=broker.bootstrap_servers, lag_warning_events=LAG_WARNING_EVENTS)
            state, said = Path(folder) / "state", Path(folder) / "online.log"
            registrations, templates = _templates(simulator.model_copy(update={"seed": seed}), streams)
            with EventProducer(streams, client_id="osmf-bench") as producer:
                for event in registrations:
                    producer.send(event)
                    producer.flush()
                process = _start(streams, online, state, said)
                try:
                    _await_start(process, state, len(registrations), said)
                    sent = _send_all(process, state, producer, templates, len(registrations), minutes * 60)
                    _catch_up(process, state, sent, said)
                finally:
                    process.terminate()
                    process.wait(60)
            wrong = check(state, streams)
        return _measured(sent, state, said.read_text(), minutes, wrong, seed)


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and what it starts meanwhile, on one core, where the system can."""
    if sys.platform != "linux":
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _templates(simulator: SimulatorSettings, streams: StreamSettings) -> tuple[list[Event], list[Impression | Click]]:
    """Return what registers a world, and its impressions and their clicks, each once and in the log's order."""
    decoders = topic_decoders(streams.topics, streams.fields)
    registrations: list[Event] = []
    events: list[Impression | Click] = []
    known: set[tuple[str, str]] = set()
    shown: set[str] = set()
    clicked: set[str] = set()
    for message in simulate_log(simulator, streams).messages:
        for event in decoders[message.topic].decode(message.value):
            if isinstance(event, Product):
                registrations.append(event)
            elif isinstance(event, Creative):
                # Without its picture, which is not the matter here.
                registrations.append(msgspec.structs.replace(event, image_uri=None, image_sha256=None))
                known.add((event.product_id, event.creative_id))
            elif isinstance(event, Impression):
                if (event.product_id, event.creative_id) in known and event.impression_id not in shown:
                    shown.add(event.impression_id)
                    events.append(event)
            elif isinstance(event, Click) and event.impression_id in shown and event.impression_id not in clicked:
                clicked.add(event.impression_id)
                events.append(event)
    return registrations, events


def _start(streams: StreamSettings, online: OnlineSettings, state: Path, said: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OSMF_")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "OSMF_STREAMS": streams.model_dump_json(),
        "OSMF_ONLINE": online.model_dump_json(),
        "OSMF_STATE__PATH": str(state),
    }
    with said.open("wb") as log:
        process = subprocess.Popen(
            bound_to_this_process([sys.executable, "-m", "osmf", "online"]),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    psutil.Process(process.pid).nice(min(psutil.Process().nice() + LESS_PRIORITY, 19))
    return process


def _await_start(process: subprocess.Popen[bytes], state: Path, n_registrations: int, said: Path) -> None:
    """Wait until the world is registered: the process has loaded what it needs."""
    deadline_s = time.monotonic() + _STALLED_S
    while _n_consumed(state) < n_registrations:
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"the online process does not start:\n{said.read_text()}")
        time.sleep(SAMPLE_S)


def _n_consumed(state: Path) -> int:
    try:
        with Store(state, readonly=True) as store, open_view(store) as view:
            return sum(offset.n_consumed for offset in view.offsets().values())
    except StateMissingError:
        return 0


def _look(process: subprocess.Popen[bytes], state: Path, seconds: float, n_sent: int) -> Sample:
    memory = psutil.Process(process.pid).memory_info()
    return Sample(
        seconds,
        n_sent,
        _n_consumed(state),
        (memory.rss - memory.shared) / 2**20,
        memory.shared / 2**20,
    )


def _send_all(
    process: subprocess.Popen[bytes],
    state: Path,
    producer: EventProducer,
    templates: Sequence[Impression | Click],
    n_registrations: int,
    overload_s: float,
) -> _Sent:
    """Send as much as is worked off for a while, and then `OVERLOAD` times as much."""
    sent = _Sent(n_events=n_registrations)
    warm_up_s = WARM_UP * overload_s
    # So that the last event is not dated ahead of the clock, however the hours are stretched or squeezed.
    first_ms = time.time_ns() // 1_000_000 - WARM_UP_MS - 2 * HOUR_MS
    events = _repeated(templates)
    started_s, looked_s, target = time.monotonic(), -math.inf, 0
    while (spent_s := time.monotonic() - started_s) < warm_up_s + overload_s:
        if spent_s - looked_s >= SAMPLE_S:
            looked_s = spent_s
            sent.samples.append(sample := _look(process, state, spent_s, sent.n_events))
            if spent_s < warm_up_s:
                sent.n_warm_up = sample.n_consumed
            more = sent.n_warm_up + OVERLOAD * (sample.n_consumed - sent.n_warm_up)
            target = n_registrations + AHEAD_EVENTS + int(more)
        if sent.n_events >= target:
            time.sleep(SAMPLE_S / 10)
            continue
        for _ in range(min(SENT_AT_ONCE, target - sent.n_events)):
            now_s = time.monotonic() - started_s
            warm, over = min(now_s / warm_up_s, 1.0), max(now_s - warm_up_s, 0.0) / overload_s
            sent.send(producer, next(events), first_ms + int(warm * WARM_UP_MS + over * HOUR_MS))
    producer.flush()
    return sent


def _repeated(templates: Sequence[Impression | Click]) -> Iterator[tuple[Impression | Click, str]]:
    """Yield the events over and over, with an id of its own each time."""
    for number in count():
        for event in templates:
            yield event, f"{number}-{event.impression_id}"


def _catch_up(process: subprocess.Popen[bytes], state: Path, sent: _Sent, said: Path) -> None:
    """Watch until everything has been worked off."""
    started_s = time.monotonic() - sent.samples[-1].seconds
    n_last, moved_s = -1, time.monotonic()
    while True:
        sample = _look(process, state, time.monotonic() - started_s, sent.n_events)
        sent.samples.append(sample)
        if sample.lag <= 0:
            return
        if sample.n_consumed != n_last:
            n_last, moved_s = sample.n_consumed, time.monotonic()
        if process.poll() is not None or time.monotonic() - moved_s > _STALLED_S:
            raise RuntimeError(f"the online process does not go on, {sample.lag:,} events behind:\n{said.read_text()}")
        time.sleep(SAMPLE_S)


def _thinned(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return some of the samples at equal distances, and the last."""
    step = max(1, len(samples) // MOST_SAMPLES)
    return [*samples[:-1:step], samples[-1]]


def _measured(sent: _Sent, state: Path, said: str, minutes: float, n_wrong: int, seed: int) -> Measured:
    with Store(state, readonly=True) as store, open_view(store) as view:
        cells = view.cells()
        n_dead = sum(offset.n_dead_letters for offset in view.offsets().values())
    n_impressions = sum(cell.n_impressions for cell in cells)
    n_clicks = sum(cell.n_clicks for cell in cells)
    began_s = WARM_UP * minutes * 60
    since = [sample for sample in sent.samples if sample.seconds >= began_s]
    overload = [sample for sample in since if sample.seconds < began_s + minutes * 60]
    seconds = overload[-1].seconds - overload[0].seconds
    worked = overload[-1].n_consumed - overload[0].n_consumed
    grown = np.polyfit([each.n_consumed / 1e6 for each in since], [each.private_mib for each in since], 1)[0]
    return Measured(
        {
            "sent": sent.n_events,
            "sent_s": (overload[-1].n_sent - overload[0].n_sent) / seconds,
            "worked_s": worked / seconds,
            "overload": (overload[-1].n_sent - overload[0].n_sent) / max(worked, 1),
            "overload_from_s": overload[0].seconds,
            "overload_s": seconds,
            "most_lag": max(sample.lag for sample in sent.samples),
            "catch_up_s": sent.samples[-1].seconds - overload[-1].seconds,
            "private_mib_start": overload[0].private_mib,
            "private_mib_most": max(sample.private_mib for sample in sent.samples),
            "private_mib_end": sent.samples[-1].private_mib,
            "private_mib_per_million": float(grown),
            "mapped_mib_end": sent.samples[-1].mapped_mib,
            "state_mib": (state / DATA_FILE).stat().st_size / 2**20,
            "lost": sent.n_impressions - n_impressions + sent.n_clicks - n_clicks,
            "dead_letters": n_dead,
            "contradictions": n_wrong,
            "lag_warnings": said.count(" events behind the log: "),
            "caught_up_said": said.count("caught up: "),
        },
        {"world_0": seed},
        {"samples": [sample._asdict() for sample in _thinned(sent.samples)], "said": said.splitlines()[:MOST_LINES]},
    )
