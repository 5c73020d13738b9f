"""Consumer: micro-batches from Kafka in an order that a restart repeats.

The offsets to start from come from the state, not from the broker. Offsets are reported to the
broker after each commit, for lag tools only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from streams.errors import NotCopartitionedError, TopicsMissingError
from streams.lag import LagWatch
from streams.merge import Message, PartitionMerge
from streams.settings import StreamSettings
from streams.topic_reader import TopicReader

log = logging.getLogger(__name__)

READ_AHEAD_BATCHES = 2
"""A topic is read on until this many batches of it are buffered, or one of its partitions has run dry."""


POLL_MS = 10
"""How long one fetch waits for the network when a partition has nothing buffered, milliseconds."""


SILENT_S = 10.0
"""How long nothing may come before the broker is asked whether it is there, and a batch is left unfinished, seconds."""


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class BatchConsumer:
    """Reads every partition of some topics, or one of each, and yields micro-batches in merged order.

    Each topic has a consumer of its own, so that a topic that is far ahead can be left alone while
    another is read. Of a topic, too, only the partitions are read on that have little buffered: what is read ahead
    is bounded however far the log is ahead.

    Parameters
    ----------
    settings
        The broker, the size of a batch, and how much is read ahead.
    topics
        The topics, in order of precedence at equal timestamps.
    offsets
        Where each (topic, partition) continues; the beginning for those that are not named.
    clock_s
        A monotonic clock, seconds.
    partition
        The one partition of every topic that is read; None: all of them, also those that a topic gains.
    now_ms
        The time now, milliseconds since the Unix epoch: what times of messages may not be far ahead of.
    """

    def __init__(
        self,
        settings: StreamSettings,
        topics: list[str],
        offsets: Mapping[tuple[str, int], int],
        clock_s: Callable[[], float],
        *,
        partition: int | None = None,
        now_ms: Callable[[], int] = _wall_ms,
    ) -> None:
        self._settings = settings
        self._clock_s = clock_s
        self._grows = partition is None
        self._readers: dict[str, TopicReader] = {}
        try:
            for topic in topics:
                self._readers[topic] = TopicReader(settings, topic, now_ms)
            if missing := [topic for topic, reader in self._readers.items() if not reader.partitions]:
                raise TopicsMissingError(missing, settings.bootstrap_servers)
            if partition is not None:
                self._keep_only(partition)
            for reader in self._readers.values():
                reader.seek(offsets)
        except BaseException:
            self.close()
            raise
        self._partitions = self._all_partitions()
        self._merge = PartitionMerge(self._partitions)
        self._silent_s = dict.fromkeys(self._partitions, 0.0)
        self._batch: list[Message] = []
        self._batch_bytes = 0
        self._lag = LagWatch(settings.lag_warning_events)
        self._looked_s = self._heard_s = self._asked_s = clock_s()
        self._is_away = False

    def _all_partitions(self) -> list[tuple[str, int]]:
        return [partition for reader in self._readers.values() for partition in reader.partitions]

    def _keep_only(self, partition: int) -> None:
        n_partitions = {topic: len(reader.partitions) for topic, reader in self._readers.items()}
        if len(set(n_partitions.values())) > 1:
            raise NotCopartitionedError(n_partitions)
        for reader in self._readers.values():
            reader.keep_only(partition)

    def poll(self, timeout_s: float) -> list[Message]:
        """Return the next batch: a full one, or what there is once every partition has run dry.

        Returns an empty list when nothing could be taken within ``timeout_s`` seconds, or when a batch that was begun
        cannot be ended because nothing more comes (the broker is away): it is the beginning of the next. How long a
        partition has been silent is added up over the calls, so that short ones come to an end too.

        Raises
        ------
        ConsumerError
            The log cannot be read on; see `TopicReader.poll`.
        """
        moved_s = self._clock_s()
        deadline_s = moved_s + timeout_s
        self._look()
        most_events, most_bytes = self._settings.batch_events, self._settings.batch_mib << 20
        while len(self._batch) < most_events and self._batch_bytes < most_bytes:
            self._fetch()
            empty = self._merge.empty()
            ended = [partition for partition in empty if self._has_ended(partition)]
            more = self._merge.take(
                most_events - len(self._batch), n_most_bytes=most_bytes - self._batch_bytes, ended=ended
            )
            self._batch += more
            self._batch_bytes += sum(message.n_bytes for message in more)
            for partition in set(self._merge.empty()) - set(empty):
                # It was not read on while its buffer was full: what it lacks is counted from now.
                self._silent_s[partition] = 0.0
            now_s = self._clock_s()
            if more:
                moved_s = now_s
                continue
            if self._batch and len(ended) == len(self._partitions):
                break
            if now_s >= deadline_s and (not self._batch or now_s - moved_s >= SILENT_S):
                return []
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        return batch

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
        started_s = self._clock_s()
        has_come = False
        for reader in self._readers.values():
            if not (wanted := self._wanted(reader)):
                continue
            # Never without waiting: a poll of 0 ms can return before kafka-python has asked the broker for anything.
            for partition, messages in reader.poll(POLL_MS, wanted).items():
                self._merge.add(partition, messages)
                has_come = True
        now_s = self._clock_s()
        # Only while it is asked for more does silence say something about the log.
        still_empty = set(self._merge.empty())
        for partition in empty:
            silent_s = self._silent_s[partition] + now_s - started_s
            self._silent_s[partition] = silent_s if partition in still_empty else 0.0
        self._listen(has_come, now_s)

    def _wanted(self, reader: TopicReader) -> list[tuple[str, int]]:
        """Return the partitions of a topic that are read on; none where enough of the topic is buffered.

        A partition that is full is left alone until half of it has been taken, for to take it up again costs a fetch.
        """
        partitions = reader.partitions
        most_events = READ_AHEAD_BATCHES * self._settings.batch_events
        most_bytes = (self._settings.read_ahead_mib << 20) / len(self._readers)
        n_events = [self._merge.n_buffered_of(partition) for partition in partitions]
        n_bytes = [self._merge.n_bytes_of(partition) for partition in partitions]
        if all(n_events) and (sum(n_events) >= most_events or sum(n_bytes) >= most_bytes):
            return []
        wanted = []
        for partition, events, size in zip(partitions, n_events, n_bytes, strict=True):
            share = (1.0 if partition in reader.reading else 0.5) / len(partitions)
            if not events or (events < share * most_events and size < share * most_bytes):
                wanted.append(partition)
        return wanted

    def _listen(self, has_come: bool, now_s: float) -> None:
        """Say when the broker does not answer, and when it does again."""
        if not has_come and (now_s - self._heard_s < SILENT_S or now_s - self._asked_s < SILENT_S):
            return
        if has_come or next(iter(self._readers.values())).answers():
            if self._is_away:
                self._is_away = False
                log.warning(
                    "the broker at %s answers again, after %.0f s",
                    self._settings.bootstrap_servers,
                    self._clock_s() - self._heard_s,
                )
            self._heard_s = self._clock_s()
        elif not self._is_away:
            self._is_away = True
            log.warning(
                "the broker at %s has not answered for %.0f s: nothing is lost, the state is as of the last commit, "
                "and reading goes on by itself when the broker is back",
                self._settings.bootstrap_servers,
                self._clock_s() - self._heard_s,
            )
        self._asked_s = self._clock_s()

    def _look(self) -> None:
        """Look after the lag, and from time to time after new partitions."""
        now_s = self._clock_s()
        if words := self._lag.observe(self.lag(), now_s):
            log.warning(words)
        if not self._grows or now_s - self._looked_s < self._settings.partition_check_s:
            return
        self._looked_s = now_s
        for reader in self._readers.values():
            for topic, number in (gained := reader.gained()):
                log.warning("%s has gained partition %d: it is read from its beginning", topic, number)
            if gained:
                self._partitions = self._all_partitions()
                self._merge.set_partitions(self._partitions)
                self._silent_s = {each: self._silent_s.get(each, 0.0) for each in self._partitions}

    def lag(self) -> dict[tuple[str, int], int]:
        """Return how many messages of each partition have not been handed out yet, as of the broker's last answer.

        Partitions of which nothing is known yet are left out.
        """
        lag = {}
        for reader in self._readers.values():
            for partition in reader.partitions:
                if (end := reader.last_known_end(partition)) is not None:
                    first = self._merge.first_offset_of(partition)
                    lag[partition] = max(end - (reader.position(partition) if first is None else first), 0)
        return lag

    @property
    def n_buffered(self) -> int:
        """How many messages have been read ahead."""
        return self._merge.n_buffered + len(self._batch)

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
