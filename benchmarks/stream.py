"""How many events the online process works off in a second, without a broker, and where the time goes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.log import SimulatedLog, is_registration, simulate_log, simulator_settings, work_off
from benchmarks.measured import Measured, over_runs, seeds_of
from online.grouping import Grouping
from online.learner import PreferenceLearner
from online.settings import OnlineSettings
from online.worker import build_pipeline
from simulator.settings import SimulatorSettings
from state.store import Store
from streams.codec import EventDecoder, encode
from streams.events import Impression
from streams.join import Join
from streams.settings import StreamSettings

N_IMPRESSIONS: Final = 200_000
N_QUICK_IMPRESSIONS: Final = 60_000
N_DECODED: Final = 4_096
"""Impressions that the two forms of messages are decoded from, in each round."""

N_DECODE_ROUNDS: Final = 7
ARROW_BATCH_ROWS: Final = 512

_PARTS: Final[tuple[tuple[str, type, str], ...]] = (
    ("decode", EventDecoder, "decode"),
    ("join", Join, "run"),
    ("group", Grouping, "observe_many"),
    ("group", Grouping, "refresh"),
    ("learn", PreferenceLearner, "predict_with_preference"),
    ("learn", PreferenceLearner, "search"),
    ("learn", PreferenceLearner, "learn_many"),
    ("commit", Store, "commit"),
)
"""What is timed: the part's name, and the method whose calls make it up. No part calls another."""


def bench_stream(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    simulator: SimulatorSettings | None = None,
    online: OnlineSettings | None = None,
    sync: bool = True,
) -> Measured:
    """Work off a simulated log from bytes to commit, in one process and without a broker.

    Metrics: ``events_s`` of impressions and clicks, products and creatives (whose encoding is paid once) left out;
    microseconds for each event of the parts ``decode_us``, ``join_us``, ``group_us`` (embedding users and regrouping),
    ``learn_us`` (predicting and learning), ``commit_us``, and ``other_us`` for all that is in none of them;
    ``register_s`` of the products and creatives. ``decode_json_us`` and ``decode_arrow_us`` decode the same
    impressions as JSON objects and as Arrow IPC batches of 512, by turns; ``arrow_speedup`` is their ratio.

    Parameters
    ----------
    quick
        A shorter log of a smaller world, and one seed unless others are named.
    seeds
        Seeds of the worlds; default: the reporting seeds.
    simulator, online
        Other logs and models; ``simulator.seed`` is replaced by each of the seeds.
    sync
        Whether a commit waits for the disk.
    """
    online = OnlineSettings() if online is None else online
    if simulator is None:
        simulator = simulator_settings(N_QUICK_IMPRESSIONS if quick else N_IMPRESSIONS, quick=quick)
    streams = StreamSettings()

    def measure(world: SimulatorSettings, seed: int) -> dict[str, float]:
        log = simulate_log(world.model_copy(update={"seed": seed}), streams)
        with tempfile.TemporaryDirectory(prefix="osmf-bench-") as folder, Store(Path(folder), sync=sync) as store:
            return {**_stream(log, streams, online, store), **_decode(log, streams)}

    return over_runs({"": simulator}, seeds_of(seeds, quick=quick), measure)


def _stream(log: SimulatedLog, streams: StreamSettings, online: OnlineSettings, store: Store) -> dict[str, float]:
    import torch

    torch.set_num_threads(online.torch_threads)
    pipeline = build_pipeline(streams, online)
    started_s = time.perf_counter()
    work_off(pipeline, [m for m in log.messages if is_registration(m, streams)], streams, store)
    register_s = time.perf_counter() - started_s
    events = [m for m in log.messages if not is_registration(m, streams)]
    with timed_parts() as spent_s:
        started_s = time.perf_counter()
        n_batches = work_off(pipeline, events, streams, store)
        seconds = time.perf_counter() - started_s
    parts = {f"{part}_us": 1e6 * spent_s[part] / len(events) for part, _, _ in _PARTS}
    parts["other_us"] = 1e6 * (seconds - sum(spent_s.values())) / len(events)
    return {
        "events_s": len(events) / seconds,
        **parts,
        "register_s": register_s,
        "events": len(events),
        "micro_batches": n_batches,
    }


@contextmanager
def timed_parts() -> Iterator[Counter[str]]:
    """Time the parts of the pipeline inside the ``with`` block; the counter holds seconds by part."""
    spent_s: Counter[str] = Counter()
    with ExitStack() as restore:
        for part, owner, name in _PARTS:
            original = getattr(owner, name)
            setattr(owner, name, _timed(original, part, spent_s))
            restore.callback(setattr, owner, name, original)
        yield spent_s


def _timed(method: Callable[..., Any], part: str, spent_s: Counter[str]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent_s[part] += time.perf_counter() - started_s  # type: ignore[assignment]

    return timed


def _decode(log: SimulatedLog, streams: StreamSettings) -> dict[str, float]:
    """Decode the same impressions as JSON and as Arrow, by turns; return the medians of the rounds."""
    decoder = EventDecoder(Impression)
    impressions: list[Impression] = []
    for message in log.messages:
        if message.topic == streams.topics.impressions:
            impressions += [event for event in decoder.decode(message.value) if isinstance(event, Impression)]
        if len(impressions) >= N_DECODED:
            break
    forms = {
        "json": [encode(impression) for impression in impressions],
        "arrow": [
            arrow_batch(impressions[start : start + ARROW_BATCH_ROWS])
            for start in range(0, len(impressions), ARROW_BATCH_ROWS)
        ],
    }
    rounds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(N_DECODE_ROUNDS):
        for form, payloads in forms.items():
            started_s = time.perf_counter()
            n_events = sum(len(decoder.decode(payload)) for payload in payloads)
            rounds[form].append(1e6 * (time.perf_counter() - started_s) / n_events)
    json_us, arrow_us = statistics.median(rounds["json"]), statistics.median(rounds["arrow"])
    return {"decode_json_us": json_us, "decode_arrow_us": arrow_us, "arrow_speedup": json_us / arrow_us}


def arrow_batch(impressions: Sequence[Impression]) -> bytes:
    """Return impressions as one Arrow IPC stream, the form of messages for volume."""
    import pyarrow as pa

    table = pa.Table.from_pylist([msgspec.to_builtins(impression) for impression in impressions])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    payload: bytes = sink.getvalue().to_pybytes()
    return payload
