"""Simulated logs in memory: a run of the simulator as messages for the pipeline, without a broker."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from online.pipeline import Pipeline
from simulator.decider import UniformDecider
from simulator.session import Session
from simulator.settings import CatalogueSettings, SimulatorSettings, TrafficSettings
from simulator.stage import set_stage
from simulator.truth import Truth
from state.store import Store
from streams.codec import encode, event_time_ms, event_topics
from streams.events import Event
from streams.merge import Message, PartitionMerge
from streams.settings import StreamSettings

QUICK_PRODUCTS = 12
"""Products of a quick run's world."""


def simulator_settings(n_impressions: int, *, quick: bool) -> SimulatorSettings:
    """Return the world that benchmarks run in: tastes do not change, and a quick run has half of the products."""
    settings = SimulatorSettings(decider="uniform", traffic=TrafficSettings(n_impressions=n_impressions))
    catalogue = CatalogueSettings(n_products=QUICK_PRODUCTS) if quick else settings.catalogue
    return settings.model_copy(
        update={"catalogue": catalogue, "shift": settings.shift.model_copy(update={"n_categories": 0})}
    )


@dataclass(frozen=True)
class SimulatedLog:
    """A run of the simulator: its messages in the order of sending, and the truth about them."""

    messages: list[Message]
    truth: Truth


class MessageSink:
    """Keeps what is sent as the messages that a broker with one partition a topic would hand out."""

    def __init__(self, streams: StreamSettings) -> None:
        self.messages: list[Message] = []
        self._topics = event_topics(streams.topics)
        self._next_offsets: dict[str, int] = {}

    def send(self, event: Event) -> None:
        """Keep an event."""
        self._keep(self._topics[type(event)], encode(event), event_time_ms(event))

    def send_bytes(self, topic: str, key: str, payload: bytes) -> None:
        """Keep bytes as they are."""
        last_ms = self.messages[-1].timestamp_ms if self.messages else 0
        self._keep(topic, payload, last_ms)

    def flush(self) -> None:
        """Do nothing: everything is kept at once."""

    def _keep(self, topic: str, payload: bytes, timestamp_ms: int) -> None:
        offset = self._next_offsets.get(topic, 0)
        self._next_offsets[topic] = offset + 1
        self.messages.append(Message(topic, 0, offset, timestamp_ms, payload))


def simulate_log(settings: SimulatorSettings, streams: StreamSettings) -> SimulatedLog:
    """Run the simulator with every creative shown by chance, and keep what it sends."""
    from generator.procedural import ProceduralRenderer

    # The pictures are drawn the first time, and then found in the simulator's cache.
    settings = settings.model_copy(update={"cache_dir": settings.cache_dir.expanduser()})
    stage = set_stage(settings, ProceduralRenderer())
    ids = {
        product.product_id: [creative.creative_id for creative in creatives]
        for product, creatives in zip(stage.products, stage.creatives, strict=True)
    }
    sink = MessageSink(streams)
    decider = UniformDecider(ids, np.random.default_rng([settings.seed, 4]))
    with tempfile.TemporaryDirectory(prefix="osmf-bench-") as folder:
        truth = Session(
            settings.model_copy(update={"out_dir": Path(folder)}), streams.topics, stage, sink, decider
        ).run()
    return SimulatedLog(sink.messages, truth)


def is_registration(message: Message, streams: StreamSettings) -> bool:
    """Tell whether a message announces a product or a creative."""
    return message.topic in (streams.topics.products, streams.topics.creatives)


def micro_batches(messages: Sequence[Message], streams: StreamSettings) -> Iterator[list[Message]]:
    """Yield messages in the micro-batches in which the online process takes them."""
    partitions = [(topic, 0) for topic in streams.topics.inputs]
    merge = PartitionMerge(partitions)
    for message in messages:
        merge.add((message.topic, message.partition), [message])
    while batch := merge.take(streams.batch_events, ended=partitions):
        yield batch


def work_off(pipeline: Pipeline, messages: Sequence[Message], streams: StreamSettings, store: Store) -> int:
    """Run messages through a pipeline and commit every micro-batch; return how many there were."""
    n_batches = 0
    for batch in micro_batches(messages, streams):
        with store.read() as txn:
            changes, _ = pipeline.run(batch, txn)
        store.commit(changes)
        n_batches += 1
    return n_batches
