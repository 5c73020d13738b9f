"""Topic reader: the partitions of one topic, each from an offset of the state's on, read as far as is wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from streams.errors import BrokerAwayError, OffsetsExpiredError, StateAheadOfBrokerError, TopicReadError
from streams.merge import Message
from streams.settings import StreamSettings

log = logging.getLogger(__name__)

Partition = tuple[str, int]

_FETCH_WAIT_MS = 20
_PROBE_MS = 2_000


class TopicReader:
    """All partitions of one topic, from given offsets on.

    Parameters
    ----------
    settings
        The broker, and what is done with messages that are gone or stamped far ahead.
    topic
        The topic.
    now_ms
        The time now, milliseconds since the Unix epoch: what times of messages may not be far ahead of.

    Raises
    ------
    BrokerAwayError
        No broker answers.
    """

    def __init__(self, settings: StreamSettings, topic: str, now_ms: Callable[[], int]) -> None:
        from kafka import KafkaConsumer

        self._settings = settings
        self._topic = topic
        self._now_ms = now_ms
        with self._answered():
            self._consumer: Any = KafkaConsumer(
                bootstrap_servers=settings.bootstrap_servers.split(","),
                group_id=settings.consumer_group,
                enable_auto_commit=False,
                auto_offset_reset="none",
                max_poll_records=settings.batch_events,
                fetch_max_wait_ms=_FETCH_WAIT_MS,
                fetch_max_bytes=settings.read_ahead_mib << 20,
                metadata_max_age_ms=int(settings.partition_check_s * 1000),
                bootstrap_timeout_ms=int(settings.broker_timeout_s * 1000),
                **settings.client_options,
            )
            self._partitions = self._known()
        self._reading: set[Partition] = set()
        self._started_at: dict[Partition, int] = {}
        self._positions: dict[Partition, int] = {}
        self._ends: dict[Partition, int | None] = {}
        self._n_expired: dict[Partition, int] = {}
        self._last_ms: dict[Partition, int] = {}

    def _known(self) -> list[Partition]:
        return [(self._topic, number) for number in sorted(self._consumer.partitions_for_topic(self._topic) or ())]

    @property
    def partitions(self) -> list[Partition]:
        """The partitions that are read, (topic, partition)."""
        return list(self._partitions)

    def keep_only(self, partition: int) -> None:
        """Read no other partition than this one."""
        self._partitions = [each for each in self._partitions if each[1] == partition]

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        """Continue at the offsets; at the beginning of partitions that are not named.

        Raises
        ------
        OffsetsExpiredError
            Messages from an offset on are gone, and the settings do not say to go on without them.
        """
        self._start(self._partitions, offsets)

    def gained(self) -> list[Partition]:
        """Return the partitions that the topic has got since; they are read from their beginning from now on."""
        from kafka.errors import KafkaError

        try:
            new = [partition for partition in self._known() if partition not in self._started_at]
            if new:
                self._start(new, {})
                self._partitions = sorted(self._partitions + new)
        except (KafkaError, BrokerAwayError) as error:
            log.warning("%s: it could not be seen whether it has gained partitions: %s", self._topic, error)
            return []
        return new

    def _start(self, partitions: Iterable[Partition], offsets: Mapping[Partition, int]) -> None:
        firsts = self._firsts(partitions)
        for partition, first in firsts.items():
            wanted = offsets.get(partition, first)
            if first > wanted:
                self._expire(partition, wanted, first)
            self._positions[partition] = self._started_at[partition] = max(wanted, first)
            self._ends[partition] = None
        self._read_only({*self._reading, *firsts})

    def _firsts(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        with self._answered():
            found: Mapping[Any, int] = self._consumer.beginning_offsets([_kafka(each) for each in partitions])
        return {(each.topic, each.partition): first for each, first in found.items()}

    def _expire(self, partition: Partition, wanted: int, first: int) -> None:
        """Go on without messages that are gone, where that is what was asked for."""
        error = OffsetsExpiredError(*partition, wanted, first)
        if self._settings.expired_offsets == "stop":
            raise error
        log.warning(
            "%s[%d]: %d events (%d to %d) have expired and are skipped, as streams.expired_offsets says; the state "
            "counts them as expired",
            *partition,
            first - wanted,
            wanted,
            first - 1,
        )
        self._n_expired[partition] = self._n_expired.get(partition, 0) + first - wanted

    @property
    def reading(self) -> Collection[Partition]:
        """The partitions that the last poll asked for."""
        return self._reading

    def _read_only(self, partitions: Collection[Partition]) -> None:
        """Ask for these partitions from now on, each from where it stands.

        ``pause`` and ``resume`` would do, but kafka-python 3.0.12 can leave the records of a resumed partition parked
        for ever.
        """
        if self._reading == set(partitions):
            return
        for partition in self._reading.difference(partitions):
            self._positions[partition], self._ends[partition] = self.position(partition), self.end(partition)
        added = set(partitions).difference(self._reading)
        self._consumer.assign([_kafka(each) for each in sorted(partitions)])
        for partition in added:
            self._consumer.seek(_kafka(partition), self._positions[partition])
        self._reading = set(partitions)

    def poll(self, timeout_ms: int, partitions: Collection[Partition]) -> dict[Partition, list[Message]]:
        """Return the messages of some partitions that have come, by partition.

        Raises
        ------
        OffsetsExpiredError
            Messages have expired before they were read, and the settings do not say to go on without them.
        StateAheadOfBrokerError
            The broker's log ends before what has been read of it.
        TopicReadError
            The broker refuses.
        """
        from kafka.errors import KafkaError, OffsetOutOfRangeError

        self._read_only(partitions)
        try:
            found = self._consumer.poll(timeout_ms=timeout_ms)
        except OffsetOutOfRangeError as error:
            self._find_again([(each.topic, each.partition) for each in error.args[0]])
            return {}
        except KafkaError as error:
            raise TopicReadError(self._topic, error) from error
        latest_ms = self._now_ms() + self._settings.max_ahead_s * 1000
        return {
            (each.topic, each.partition): self._messages((each.topic, each.partition), records, latest_ms)
            for each, records in found.items()
        }

    def _find_again(self, lost: Iterable[Partition]) -> None:
        """Find out why a partition has not got what comes next, and go on with what it has."""
        for partition, first in self._firsts(lost).items():
            position = self.position(partition)
            if position > first:
                with self._answered():
                    end: int = self._consumer.end_offsets([_kafka(partition)])[_kafka(partition)]
                raise StateAheadOfBrokerError(*partition, position, end)
            self._expire(partition, position, first)
            self._consumer.seek(_kafka(partition), first)

    def _messages(self, partition: Partition, records: list[Any], latest_ms: int) -> list[Message]:
        messages = [Message(*partition, record.offset, max(record.timestamp, 0), record.value) for record in records]
        if any(message.timestamp_ms > latest_ms for message in messages):
            messages = self._in_line(partition, messages, latest_ms)
        self._last_ms[partition] = messages[-1].timestamp_ms
        if n_expired := self._n_expired.pop(partition, 0):
            messages[0] = msgspec.structs.replace(messages[0], n_expired_before=n_expired)
        return messages

    def _in_line(self, partition: Partition, messages: list[Message], latest_ms: int) -> list[Message]:
        """Give messages from the future the time of the one before them, or the partition would wait until then."""
        last_ms = self._last_ms.get(partition, self._now_ms())
        in_line = []
        for message in messages:
            if message.timestamp_ms > latest_ms:
                log.warning(
                    "%s[%d], offset %d, is stamped %.0f s ahead of the clock: it is read as if it came with the one "
                    "before it (streams.max_ahead_s = %d)",
                    *partition,
                    message.offset,
                    (message.timestamp_ms - self._now_ms()) / 1000,
                    self._settings.max_ahead_s,
                )
                message = msgspec.structs.replace(message, timestamp_ms=last_ms)
            last_ms = message.timestamp_ms
            in_line.append(message)
        return in_line

    def end(self, partition: Partition) -> int | None:
        """Return the offset after a partition's last message, as of the last answer; None before the first."""
        end = self._ends[partition]
        if partition in self._reading:
            end = self._consumer.highwater(_kafka(partition))
        if end is not None and end < self._started_at[partition]:
            raise StateAheadOfBrokerError(*partition, self._started_at[partition], end)
        return end

    def last_known_end(self, partition: Partition) -> int | None:
        """Return what `end` returned last, when there was an answer; of a partition that is taken up again, too."""
        end = self.end(partition)
        if end is not None:
            self._ends[partition] = end
        return self._ends[partition]

    def position(self, partition: Partition) -> int:
        """Return the offset of the message that comes next."""
        if partition not in self._reading:
            return self._positions[partition]
        position: int = self._consumer.position(_kafka(partition))
        return position

    def answers(self) -> bool:
        """Ask the broker for something small; return whether it answers within two seconds."""
        from kafka.errors import KafkaError

        try:
            self._consumer.beginning_offsets([_kafka(self._partitions[0])], timeout_ms=_PROBE_MS)
        except KafkaError:
            return False
        return True

    def report(self, offsets: Mapping[Partition, int]) -> None:
        """Tell the broker how far the state has come; advisory, so a refusal changes nothing."""
        from kafka import OffsetAndMetadata

        self._consumer.commit_async(
            {
                _kafka(partition): OffsetAndMetadata(offsets[partition], "", -1)
                for partition in self._partitions
                if partition in offsets
            }
        )

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close(autocommit=False)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Turn a broker that does not answer into `BrokerAwayError`."""
        from kafka.errors import KafkaError

        try:
            yield
        except KafkaError as error:
            raise BrokerAwayError(self._settings.bootstrap_servers, error) from error


def _kafka(partition: Partition) -> Any:
    from kafka import TopicPartition

    return TopicPartition(*partition)
