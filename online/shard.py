"""Shard: a state, and the partitions that it is continued from.

The order is what makes a kill harmless. 1. A batch is polled from the offsets of the last commit.
2. The pipeline works it off in memory. 3. One LMDB transaction takes everything, offsets and
outbound messages included. 4. Outbound messages are sent, with ids that a repetition repeats.
5. Those that the broker has acknowledged leave the outbox with the next commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from online.pipeline import BatchSummary, Pipeline
from state.store import Store
from streams.consumer import BatchConsumer
from streams.outbox import Outbox
from streams.producer import EventProducer
from streams.settings import StreamSettings

POLL_S = 0.5
"""How long a lone shard waits for messages before it looks whether it is to end, seconds."""


class Step(StrEnum):
    """A point that a shard passes, named so that a test can end the process there."""

    OPENED = "opened"
    POLLED = "polled"
    WORKED = "worked"
    COMMITTED = "committed"
    SENT = "sent"


class Shard:
    """A state that is continued from its partitions, one micro-batch at a time.

    Parameters
    ----------
    store
        The state, open for writing; closed with the shard.
    pipeline
        A new pipeline; it continues from the state.
    streams
        The settings.
    producer
        Gives what sends; asked once the state has proved to be usable. Shards may share it.
    clock_s
        A monotonic clock, seconds.
    partition
        The one partition of every topic that is read; None: all of them.
    on_step
        Told of every point that is passed.
    """

    def __init__(
        self,
        store: Store,
        pipeline: Pipeline,
        streams: StreamSettings,
        producer: Callable[[], EventProducer],
        clock_s: Callable[[], float],
        *,
        partition: int | None = None,
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._pipeline = pipeline
        self._on_step = on_step
        self._consumer: BatchConsumer | None = None
        try:
            pipeline.restore(store)
            self._outbox = Outbox(store, producer(), streams.outbox_events)
            inputs, offsets = streams.topics.inputs, pipeline.next_offsets()
            self._consumer = BatchConsumer(streams, inputs, offsets, clock_s, partition=partition)
            self._outbox.send()
        except BaseException:
            self.close()
            raise
        on_step(Step.OPENED)

    def step(self, poll_s: float) -> BatchSummary | None:
        """Work off one micro-batch; None when there was none within ``poll_s`` seconds.

        Raises
        ------
        state.errors.StateFencedError
            Another process has taken the state over; the batch is that one's.
        """
        assert self._consumer is not None
        if self._outbox.is_full:
            self._outbox.send()
            if self._outbox.is_full:
                time.sleep(poll_s)
                return None
        messages = self._consumer.poll(poll_s)
        if not messages:
            self._outbox.send()
            return None
        self._on_step(Step.POLLED)
        with self._store.read() as txn:
            changes, summary = self._pipeline.run(messages, txn)
        self._outbox.clear(changes)
        self._on_step(Step.WORKED)
        self._store.commit(changes)
        self._on_step(Step.COMMITTED)
        self._outbox.send()
        self._on_step(Step.SENT)
        return summary

    def next_offsets(self) -> dict[tuple[str, int], int]:
        """Return where each partition continues."""
        return self._pipeline.next_offsets()

    def report(self) -> None:
        """Tell the broker how far the state has come; for a shard that no consumer group shares out."""
        assert self._consumer is not None
        self._consumer.report(self.next_offsets())

    def finish(self) -> None:
        """Remove from the state what the broker has acknowledged, so that it is not sent again.

        Raises
        ------
        state.errors.StateFencedError
            Another process has taken the state over, and sends it once more.
        """
        self._outbox.settle()

    def close(self) -> None:
        """Close the connections and the state."""
        if self._consumer is not None:
            self._consumer.close()
        self._store.close()


class LoneShard:
    """The one shard of a process that shares its work with no other.

    Parameters
    ----------
    shard
        The shard, closed with this.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def step(self) -> list[BatchSummary]:
        """Work off one micro-batch; nothing when none has come for a while."""
        summary = self._shard.step(POLL_S)
        if summary is None:
            return []
        self._shard.report()
        return [summary]

    def finish(self) -> None:
        """See `Shard.finish`."""
        self._shard.finish()

    def close(self) -> None:
        """See `Shard.close`."""
        self._shard.close()
