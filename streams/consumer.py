"""Consumer: micro-batches from Kafka in an order that a restart repeats.

The offsets to start from come from the state, not from the broker. Offsets are reported to the
broker after each commit, for lag tools only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from streams.merge import Message, PartitionMerge
from streams.settings import StreamSettings

FETCH_TARGET_BATCHES = 4
"""A partition with this many batches in its buffer is paused until it has been worked off."""


POLL_MS = 10
"""How long one fetch waits for the network when a partition has nothing buffered, milliseconds."""

FIRST_FETCH_WAIT_S = 2.0
"""How long a batch waits for the first answer about a partition, seconds."""


class ConsumerError(RuntimeError):
    """The log cannot be consumed from where the state stands."""


class StateAheadOfBrokerError(ConsumerError):
    """The state has consumed more of a partition than the broker holds: it is another log."""

    def __init__(self, topic: str, partition: int, wanted: int, end: int) -> None:
        super().__init__(
            f"{topic}[{partition}] ends at offset {end} on the broker, the state continues at {wanted}: this is not "
            "the log that the state was built from. Nothing was consumed. Point streams.bootstrap_servers to the "
            "right broker, or start with a new state.path."
        )


class OffsetsExpiredError(ConsumerError):
    """The broker no longer has messages that have not been consumed."""

    def __init__(self, topic: str, partition: int, wanted: int, first: int) -> None:
        super().__init__(
            f"{topic}[{partition}] starts at offset {first} on the broker, the state continues at {wanted}: "
            f"{first - wanted} events ({wanted} to {first - 1}) have expired and were never counted. Nothing was "
            "consumed. Restore those events, raise the topic's retention, or start with a new state.path."
        )


class TopicsMissingError(ConsumerError):
    """A topic that is to be read is not on the broker."""

    def __init__(self, missing: list[str], bootstrap_servers: str) -> None:
        super().__init__(
            f"no topic {', '.join(missing)} on {bootstrap_servers}: nothing can be consumed. Create them "
            "(`osmf broker --topics-only` does on a running broker), or set streams.topics to the names in use."
        )


class BatchConsumer:
    """Reads every partition of some topics and yields micro-batches in merged order.

    Parameters
    ----------
    settings
        The broker, and the size of a batch.
    topics
        The topics, in order of precedence at equal timestamps.
    offsets
        Where each (topic, partition) continues; 0 for those that are not named.
    clock_s
        A monotonic clock, seconds.
    """

    def __init__(
        self,
        settings: StreamSettings,
        topics: list[str],
        offsets: Mapping[tuple[str, int], int],
        clock_s: Callable[[], float],
    ) -> None:
        from kafka import KafkaConsumer, TopicPartition

        self._settings = settings
        self._clock_s = clock_s
        self._consumer: Any = KafkaConsumer(
            bootstrap_servers=settings.bootstrap_servers.split(","),
            group_id=settings.consumer_group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_poll_records=settings.batch_events,
            fetch_max_wait_ms=20,
            **settings.client_options,
        )
        missing = [topic for topic in topics if not self._consumer.partitions_for_topic(topic)]
        if missing:
            self._consumer.close()
            raise TopicsMissingError(missing, settings.bootstrap_servers)
        self._partitions = [
            (topic, partition) for topic in topics for partition in sorted(self._consumer.partitions_for_topic(topic))
        ]
        self._assigned = {partition: TopicPartition(*partition) for partition in self._partitions}
        self._consumer.assign(list(self._assigned.values()))
        self._started_at: dict[tuple[str, int], int] = {}
        firsts = self._consumer.beginning_offsets(list(self._assigned.values()))
        for partition, assigned in self._assigned.items():
            wanted = offsets.get(partition, 0)
            first = firsts[assigned]
            if partition in offsets and first > wanted:
                self._consumer.close()
                raise OffsetsExpiredError(*partition, wanted, first)
            self._consumer.seek(assigned, max(wanted, first))
            self._started_at[partition] = max(wanted, first)
        self._merge = PartitionMerge(self._partitions)
        self._paused: set[tuple[str, int]] = set()
        self._last_fetch_s = dict.fromkeys(self._partitions, clock_s())

    def poll(self, timeout_s: float) -> list[Message]:
        """Return the next batch: a full one, or what there is once every partition has run dry.

        Returns an empty list when nothing came within ``timeout_s`` seconds.
        """
        deadline_s = self._clock_s() + timeout_s
        taken: list[Message] = []
        while len(taken) < self._settings.batch_events:
            self._fetch()
            ended = [partition for partition in self._merge.empty() if self._has_ended(partition)]
            more = self._merge.take(self._settings.batch_events - len(taken), ended=ended)
            taken += more
            if more or self._merge.n_buffered:
                continue
            if len(ended) == len(self._partitions) and (taken or self._clock_s() >= deadline_s):
                break
        return taken

    def _has_ended(self, partition: tuple[str, int]) -> bool:
        """Whether all of a partition's log has been taken and nothing has come for the linger time."""
        idle_s = self._clock_s() - self._last_fetch_s[partition]
        if idle_s < self._settings.linger_ms / 1000:
            return False
        end = self._consumer.highwater(self._assigned[partition])
        if end is None:
            # No answer yet for this partition: give the broker longer before the batch goes on without it.
            return idle_s >= FIRST_FETCH_WAIT_S
        position: int = self._consumer.position(self._assigned[partition])
        if end < self._started_at[partition]:
            raise StateAheadOfBrokerError(*partition, self._started_at[partition], end)
        return bool(position >= end)

    def _fetch(self) -> None:
        limit = self._settings.batch_events * FETCH_TARGET_BATCHES
        full = {p for p in self._partitions if self._merge.n_buffered_of(p) >= limit}
        for partition in full - self._paused:
            self._consumer.pause(self._assigned[partition])
        for partition in self._paused - full:
            self._consumer.resume(self._assigned[partition])
            self._last_fetch_s[partition] = self._clock_s()
        self._paused = full
        for assigned, records in self._consumer.poll(timeout_ms=POLL_MS if self._merge.empty() else 0).items():
            partition = (assigned.topic, assigned.partition)
            self._merge.add(
                partition,
                [Message(partition[0], partition[1], r.offset, max(r.timestamp, 0), r.value) for r in records],
            )
            self._last_fetch_s[partition] = self._clock_s()

    def report(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Tell the broker how far the state has come; advisory, so a refusal changes nothing."""
        from kafka import OffsetAndMetadata

        self._consumer.commit_async(
            {
                self._assigned[p]: OffsetAndMetadata(offset, "", -1)
                for p, offset in offsets.items()
                if p in self._assigned
            }
        )

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close(autocommit=False)

    def __enter__(self) -> BatchConsumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
