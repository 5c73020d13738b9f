"""Merge: many partitions into one order that depends on the logs alone.

Messages are taken by (timestamp, topic, partition, offset). As long as every partition is either
buffered or known to be at its end, the order, and with it the content of every micro-batch of a
fixed size, is the same in every run, whatever was fetched when. That is what lets a killed process
repeat its work exactly (Kafka Streams chooses its next record in the same way).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True):
    """One message of a partition, as bytes."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    value: bytes | None


class PartitionMerge:
    """Buffers messages by partition and takes them out in the merged order.

    Parameters
    ----------
    partitions
        Every (topic, partition) that is read, in order of precedence at equal timestamps.
    """

    def __init__(self, partitions: Iterable[tuple[str, int]]) -> None:
        self._rank = {partition: rank for rank, partition in enumerate(partitions)}
        self._buffers: dict[tuple[str, int], deque[Message]] = {partition: deque() for partition in self._rank}
        self.n_buffered = 0

    def add(self, partition: tuple[str, int], messages: Iterable[Message]) -> None:
        """Append messages of one partition, in offset order."""
        buffer = self._buffers[partition]
        before = len(buffer)
        buffer.extend(messages)
        self.n_buffered += len(buffer) - before

    def empty(self) -> list[tuple[str, int]]:
        """Return the partitions of which nothing is buffered."""
        return [partition for partition, buffer in self._buffers.items() if not buffer]

    def n_buffered_of(self, partition: tuple[str, int]) -> int:
        """Return how many messages of one partition are buffered."""
        return len(self._buffers[partition])

    def take(self, n_most: int, *, ended: Iterable[tuple[str, int]] = ()) -> list[Message]:
        """Take up to ``n_most`` messages in the merged order.

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
        while heads and len(taken) < n_most:
            _, rank, partition = heads[0]
            buffer = self._buffers[partition]
            taken.append(buffer.popleft())
            if buffer:
                heapq.heapreplace(heads, (buffer[0].timestamp_ms, rank, partition))
            else:
                heapq.heappop(heads)
                if partition not in may_be_empty:
                    break
        self.n_buffered -= len(taken)
        return taken
