"""How the online process bears a stream that is three times what it can work off: its memory, its lag, and the end."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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

OVERLOAD: Final = 3.0
"""Events that are sent for each that has been worked off."""

MINUTES: Final = 3.0
QUICK_MINUTES: Final = 0.5
N_IMPRESSIONS: Final = 20_000
"""Impressions of the simulated log that is sent over and over, under new ids."""

HOUR_MS: Final = 3_600_000
"""Event time of the overload, whatever it takes."""

AHEAD_EVENTS: Final = 20_000
"""Events that are sent before the first has been worked off."""

LAG_WARNING_EVENTS: Final = 30_000
SAMPLE_S: Final = 0.5
SETTLED_S: Final = 20.0
"""When the process has loaded what it needs, seconds after it began to work."""

SENT_AT_ONCE: Final = 500
MOST_LINES: Final = 100
_STALLED_S: Final = 120.0


class Sample(NamedTuple):
    """What was seen at one moment, seconds after the first event was worked off.

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
    samples: list[Sample] = field(default_factory=list)

    def send(self, producer: EventProducer, event: Event) -> None:
        producer.send(event)
        self.n_events += 1
        self.n_impressions += isinstance(event, Impression)
        self.n_clicks += isinstance(event, Click)


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
    overload is threefold whatever the machine; its events are dated over one hour, so that windows close meanwhile.

    Metrics: ``sent``, ``sent_s`` and ``worked_s`` events per second during the overload; ``most_lag`` and
    ``catch_up_s``; private memory when the process had settled, at most, and at the end, and by how many MiB a million
    events worked off it grew (least squares over the second half); ``lost`` events; ``contradictions`` that ``check``
    found; ``lag_warnings`` that the process wrote.

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
    with tempfile.TemporaryDirectory(prefix="osmf-bench-") as folder:
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
                    sent = _overload(process, state, producer, templates, len(registrations), minutes * 60)
                    _catch_up(process, state, sent, said)
                finally:
                    process.terminate()
                    process.wait(60)
            wrong = check(state, streams)
        return _measured(sent, state, said.read_text(), minutes, wrong, seed)


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
        return subprocess.Popen(
            bound_to_this_process([sys.executable, "-m", "osmf", "online"]),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _n_consumed(state: Path) -> int:
    try:
        with Store(state, readonly=True) as store, open_view(store) as view:
            return sum(offset.n_consumed for offset in view.offsets().values())
    except StateMissingError:
        return 0


def _look(process: subprocess.Popen[bytes], state: Path, started_s: float, n_sent: int) -> Sample:
    memory = psutil.Process(process.pid).memory_info()
    return Sample(
        time.monotonic() - started_s,
        n_sent,
        _n_consumed(state),
        (memory.rss - memory.shared) / 2**20,
        memory.shared / 2**20,
    )


def _overload(
    process: subprocess.Popen[bytes],
    state: Path,
    producer: EventProducer,
    templates: Sequence[Impression | Click],
    n_registrations: int,
    seconds: float,
) -> _Sent:
    """Send `OVERLOAD` events for each that has been worked off, for so long."""
    sent = _Sent(n_events=n_registrations)
    # Dated so that the last is not ahead of the clock, however the hour is stretched or squeezed.
    first_ms = time.time_ns() // 1_000_000 - 2 * HOUR_MS
    events = _repeated(templates)
    started_s, looked_s, target = time.monotonic(), 0.0, n_registrations + AHEAD_EVENTS
    while (spent_s := time.monotonic() - started_s) < seconds:
        if spent_s - looked_s >= SAMPLE_S or not sent.samples:
            looked_s = spent_s
            sent.samples.append(_look(process, state, started_s, sent.n_events))
            target = n_registrations + AHEAD_EVENTS + int(OVERLOAD * sent.samples[-1].n_consumed)
        if sent.n_events >= target:
            time.sleep(SAMPLE_S / 10)
            continue
        for _ in range(min(SENT_AT_ONCE, target - sent.n_events)):
            at_ms = first_ms + int((time.monotonic() - started_s) / seconds * HOUR_MS)
            sent.send(producer, _dated(next(events), at_ms))
    producer.flush()
    return sent


def _repeated(templates: Sequence[Impression | Click]) -> Iterator[Impression | Click]:
    """Yield the events over and over, under ids of their own each time."""
    for number in count():
        for event in templates:
            yield msgspec.structs.replace(event, impression_id=f"{number}-{event.impression_id}")


def _dated(event: Impression | Click, at_ms: int) -> Impression | Click:
    if isinstance(event, Impression):
        return msgspec.structs.replace(event, shown_at_ms=at_ms)
    return msgspec.structs.replace(event, clicked_at_ms=at_ms)


def _catch_up(process: subprocess.Popen[bytes], state: Path, sent: _Sent, said: Path) -> None:
    """Watch until everything has been worked off."""
    started_s = time.monotonic() - sent.samples[-1].seconds
    n_last, moved_s = -1, time.monotonic()
    while True:
        sample = _look(process, state, started_s, sent.n_events)
        sent.samples.append(sample)
        if sample.lag <= 0:
            return
        if sample.n_consumed != n_last:
            n_last, moved_s = sample.n_consumed, time.monotonic()
        if process.poll() is not None or time.monotonic() - moved_s > _STALLED_S:
            raise RuntimeError(f"the online process does not go on, {sample.lag:,} events behind:\n{said.read_text()}")
        time.sleep(SAMPLE_S)


def _measured(sent: _Sent, state: Path, said: str, minutes: float, n_wrong: int, seed: int) -> Measured:
    with Store(state, readonly=True) as store, open_view(store) as view:
        cells = view.cells()
        n_dead = sum(offset.n_dead_letters for offset in view.offsets().values())
    n_impressions = sum(cell.n_impressions for cell in cells)
    n_clicks = sum(cell.n_clicks for cell in cells)
    seconds = minutes * 60
    overload = [sample for sample in sent.samples if sample.seconds < seconds]
    settled = [sample for sample in overload if sample.seconds >= min(SETTLED_S, seconds / 2)]
    rate = settled[-1].seconds - settled[0].seconds
    late = sent.samples[len(sent.samples) // 2 :]
    grown = np.polyfit([s.n_consumed / 1e6 for s in late], [s.private_mib for s in late], 1)[0]
    return Measured(
        {
            "sent": sent.n_events,
            "sent_s": (settled[-1].n_sent - settled[0].n_sent) / rate,
            "worked_s": (settled[-1].n_consumed - settled[0].n_consumed) / rate,
            "overload_s": overload[-1].seconds,
            "most_lag": max(sample.lag for sample in sent.samples),
            "catch_up_s": sent.samples[-1].seconds - overload[-1].seconds,
            "private_mib_settled": settled[0].private_mib,
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
        {"samples": [sample._asdict() for sample in sent.samples], "said": said.splitlines()[:MOST_LINES]},
    )
