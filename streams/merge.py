"""Merge: many partitions into one order that depends on the logs alone.

Messages are taken by (timestamp, topic, partition, offset). As long as every partition is either
buffered or known to be at its end, the order, and with it the content of every micro-batch of a
fixed size, is the same in every run, whatever was fetched when. That is what lets a killed process
repeat its work exactly (Kafka Streams chooses its next record in the same way).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True):
    """One message of a partition, as bytes.

    ``n_expired_before`` messages between it and the one read before it had expired on the broker.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    value: bytes | None
    n_expired_before: int = 0

    @property
    def n_bytes(self) -> int:
        """Size of its value, bytes."""
        return len(self.value or b"")


class PartitionMerge:
    """Buffers messages by partition and takes them out in the merged order.

    Parameters
    ----------
    partitions
        Every (topic, partition) that is read, in order of precedence at equal timestamps.
    """

    def __init__(self, partitions: Iterable[tuple[str, int]]) -> None:
        self._rank: dict[tuple[str, int], int] = {}
        self._buffers: dict[tuple[str, int], deque[Message]] = {}
        self._n_bytes: dict[tuple[str, int], int] = {}
        self.n_buffered = 0
        self.set_partitions(partitions)

    def set_partitions(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Read further partitions from now on; ``partitions`` are all, those so far among them."""
        self._rank = {partition: rank for rank, partition in enumerate(partitions)}
        self._buffers = {partition: self._buffers.get(partition, deque()) for partition in self._rank}
        self._n_bytes = {partition: self._n_bytes.get(partition, 0) for partition in self._rank}

    def add(self, partition: tuple[str, int], messages: Iterable[Message]) -> None:
        """Append messages of one partition, in offset order."""
        buffer = self._buffers[partition]
        before = len(buffer)
        for message in messages:
            buffer.append(message)
            self._n_bytes[partition] += message.n_bytes
        self.n_buffered += len(buffer) - before

    def empty(self) -> list[tuple[str, int]]:
        """Return the partitions of which nothing is buffered."""
        return [partition for partition, buffer in self._buffers.items() if not buffer]

    def n_buffered_of(self, partition: tuple[str, int]) -> int:
        """Return how many messages of one partition are buffered."""
        return len(self._buffers[partition])

    def n_bytes_of(self, partition: tuple[str, int]) -> int:
        """Return how many bytes the buffered messages of one partition have."""
        return self._n_bytes[partition]

    def first_offset_of(self, partition: tuple[str, int]) -> int | None:
        """Return the offset of a partition's first buffered message; None where nothing is buffered."""
        buffer = self._buffers[partition]
        return buffer[0].offset if buffer else None

    def take(
        self, n_most: int, *, n_most_bytes: float = math.inf, ended: Iterable[tuple[str, int]] = ()
    ) -> list[Message]:
        """Take up to ``n_most`` messages in the merged order, and no more after they have ``n_most_bytes``.

        It stops where a partition runs dry that is not in ``ended``: its next message might come first.
        """
        may_be_empty = set(ended)
        if any(partition not in may_be_empty for partition in self.empty()):
            return []
        heads = [
            (buffer[0].timestamp_ms, self._rank[partition], partition)
            for partition, buffer in self._buffers.items()
            if buffer
        ]
        heapq.heapify(heads)
        taken: list[Message] = []
        n_bytes = 0
        while heads and len(taken) < n_most and n_bytes < n_most_bytes:
            _, rank, partition = heads[0]
            buffer = self._buffers[partition]
            message = buffer.popleft()
            taken.append(message)
            n_bytes += message.n_bytes
            self._n_bytes[partition] -= message.n_bytes
            if buffer:
                heapq.heapreplace(heads, (buffer[0].timestamp_ms, rank, partition))
            else:
                heapq.heappop(heads)
                if partition not in may_be_empty:
                    break
        self.n_buffered -= len(taken)
        return taken
