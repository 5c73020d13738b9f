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

READ_AHEAD_BATCHES = 2
"""A topic is read on until this many batches of it are buffered, or one of its partitions has run dry."""


POLL_MS = 10
"""How long one fetch waits for the network when a partition has nothing buffered, milliseconds."""


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


class NotCopartitionedError(ConsumerError):
    """Topics that are to be read partition by partition do not have as many of them."""

    def __init__(self, n_partitions: Mapping[str, int]) -> None:
        counts = ", ".join(f"{topic} has {n}" for topic, n in n_partitions.items())
        super().__init__(
            f"the topics differ in their partitions ({counts}): with streams.shared each partition is a shard of its "
            "own, and a product's events must have the same partition in every topic. Nothing was consumed. Give all "
            "of these topics the same number of partitions and key them by product, or set streams.shared to false."
        )


class BatchConsumer:
    """Reads every partition of some topics, or one of each, and yields micro-batches in merged order.

    Each topic has a consumer of its own, so that a topic that is far ahead can be left alone while
    another is read. (One consumer with ``pause`` and ``resume`` would do, but kafka-python 3.0.12 can
    leave the records of a resumed partition parked for ever.)

    Parameters
    ----------
    settings
        The broker, and the size of a batch.
    topics
        The topics, in order of precedence at equal timestamps.
    offsets
        Where each (topic, partition) continues; the beginning for those that are not named.
    clock_s
        A monotonic clock, seconds.
    partition
        The one partition of every topic that is read; None: all of them.
    """

    def __init__(
        self,
        settings: StreamSettings,
        topics: list[str],
        offsets: Mapping[tuple[str, int], int],
        clock_s: Callable[[], float],
        *,
        partition: int | None = None,
    ) -> None:
        self._settings = settings
        self._clock_s = clock_s
        self._readers: dict[str, _TopicReader] = {}
        try:
            for topic in topics:
                self._readers[topic] = _TopicReader(settings, topic)
            if missing := [topic for topic, reader in self._readers.items() if not reader.partitions]:
                raise TopicsMissingError(missing, settings.bootstrap_servers)
            if partition is not None:
                self._keep_only(partition)
            for reader in self._readers.values():
                reader.seek(offsets)
        except BaseException:
            self.close()
            raise
        self._partitions = [partition for reader in self._readers.values() for partition in reader.partitions]
        self._merge = PartitionMerge(self._partitions)
        self._silent_s = dict.fromkeys(self._partitions, 0.0)

    def _keep_only(self, partition: int) -> None:
        n_partitions = {topic: len(reader.partitions) for topic, reader in self._readers.items()}
        if len(set(n_partitions.values())) > 1:
            raise NotCopartitionedError(n_partitions)
        for reader in self._readers.values():
            reader.keep_only(partition)

    def poll(self, timeout_s: float) -> list[Message]:
        """Return the next batch: a full one, or what there is once every partition has run dry.

        Returns an empty list when nothing could be taken within ``timeout_s`` seconds. How long a partition has been
        silent is added up over the calls, so that short ones come to an end too.
        """
        deadline_s = self._clock_s() + timeout_s
        taken: list[Message] = []
        while len(taken) < self._settings.batch_events:
            self._fetch()
            empty = self._merge.empty()
            ended = [partition for partition in empty if self._has_ended(partition)]
            more = self._merge.take(self._settings.batch_events - len(taken), ended=ended)
            taken += more
            for partition in set(self._merge.empty()) - set(empty):
                # It was not read on while its buffer was full: what it lacks is counted from now.
                self._silent_s[partition] = 0.0
            if more:
                continue
            all_ended = len(ended) == len(self._partitions)
            if (taken and all_ended) or (not taken and self._clock_s() >= deadline_s):
                break
        return taken

    def _has_ended(self, partition: tuple[str, int]) -> bool:
        """Whether all of a partition's log has been taken and nothing has come for the linger time."""
        if self._silent_s[partition] < self._settings.linger_ms / 1000:
            return False
        reader = self._readers[partition[0]]
        end = reader.end(partition)
        # Without an answer nothing is known of the partition: its messages may come first, however slow the broker is.
        return end is not None and reader.position(partition) >= end

    def _fetch(self) -> None:
        empty = self._merge.empty()
        wanting = [
            reader
            for reader in self._readers.values()
            if any(partition in empty for partition in reader.partitions)
            or sum(self._merge.n_buffered_of(partition) for partition in reader.partitions)
            < READ_AHEAD_BATCHES * self._settings.batch_events
        ]
        started_s = self._clock_s()
        # Never without waiting: a poll of 0 ms can return before kafka-python has asked the broker for anything.
        for reader in wanting:
            self._read(reader, POLL_MS)
        # Only while it is asked for more does silence say something about the log.
        waited_s = self._clock_s() - started_s
        still_empty = set(self._merge.empty())
        for partition in empty:
            self._silent_s[partition] = self._silent_s[partition] + waited_s if partition in still_empty else 0.0

    def _read(self, reader: _TopicReader, timeout_ms: int) -> None:
        for partition, messages in reader.poll(timeout_ms).items():
            self._merge.add(partition, messages)

    def report(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Tell the broker how far the state has come; advisory, so a refusal changes nothing."""
        for reader in self._readers.values():
            reader.report(offsets)

    def close(self) -> None:
        """Close the connections."""
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> BatchConsumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _TopicReader:
    """All partitions of one topic, from given offsets on."""

    def __init__(self, settings: StreamSettings, topic: str) -> None:
        from kafka import KafkaConsumer, TopicPartition

        self._consumer: Any = KafkaConsumer(
            bootstrap_servers=settings.bootstrap_servers.split(","),
            group_id=settings.consumer_group,
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_poll_records=settings.batch_events,
            fetch_max_wait_ms=20,
            **settings.client_options,
        )
        self._assigned: dict[tuple[str, int], Any] = {
            (topic, partition): TopicPartition(topic, partition)
            for partition in sorted(self._consumer.partitions_for_topic(topic) or ())
        }
        self._started_at: dict[tuple[str, int], int] = {}

    @property
    def partitions(self) -> list[tuple[str, int]]:
        """The partitions that are read, (topic, partition)."""
        return list(self._assigned)

    def keep_only(self, partition: int) -> None:
        """Read no other partition than this one."""
        self._assigned = {key: assigned for key, assigned in self._assigned.items() if key[1] == partition}

    def seek(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Continue at the offsets; at the beginning of partitions that are not named."""
        self._consumer.assign(list(self._assigned.values()))
        firsts = self._consumer.beginning_offsets(list(self._assigned.values()))
        for partition, assigned in self._assigned.items():
            first: int = firsts[assigned]
            wanted = offsets.get(partition, first)
            if first > wanted:
                raise OffsetsExpiredError(*partition, wanted, first)
            self._consumer.seek(assigned, wanted)
            self._started_at[partition] = wanted

    def poll(self, timeout_ms: int) -> dict[tuple[str, int], list[Message]]:
        """Return the messages that have come, by partition."""
        return {
            (assigned.topic, assigned.partition): [
                Message(assigned.topic, assigned.partition, record.offset, max(record.timestamp, 0), record.value)
                for record in records
            ]
            for assigned, records in self._consumer.poll(timeout_ms=timeout_ms).items()
        }

    def end(self, partition: tuple[str, int]) -> int | None:
        """Return the offset after a partition's last message, as of the last answer; None before the first."""
        end: int | None = self._consumer.highwater(self._assigned[partition])
        if end is not None and end < self._started_at[partition]:
            raise StateAheadOfBrokerError(*partition, self._started_at[partition], end)
        return end

    def position(self, partition: tuple[str, int]) -> int:
        """Return the offset of the message that comes next."""
        position: int = self._consumer.position(self._assigned[partition])
        return position

    def report(self, offsets: Mapping[tuple[str, int], int]) -> None:
        from kafka import OffsetAndMetadata

        self._consumer.commit_async(
            {
                assigned: OffsetAndMetadata(offsets[partition], "", -1)
                for partition, assigned in self._assigned.items()
                if partition in offsets
            }
        )

    def close(self) -> None:
        self._consumer.close(autocommit=False)
