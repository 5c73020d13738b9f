"""Membership: which partitions this process is given, among those that share a consumer group.

The broker's group only says who works on what. It fences nobody: a process that was frozen learns late that its
partitions are another's by now, which is why a shard's state carries an epoch of its own (`state.store.Store`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from streams.settings import StreamSettings

_POLL_MS = 100
_HEARTBEATS_PER_SESSION = 10
_MOST_SILENCE_S = 300.0
"""A process that has not asked for its partitions for so long does nothing any more, and leaves the group."""


class Membership:
    """Membership of this process in the consumer group.

    The group shares out the partitions of one topic; who is given a partition works on the partitions of the same
    number of all topics. Nothing is consumed here. While the group shares out anew, what is given stays as it was: a
    process goes on with its shards until it is told that they are another's, so that those which stay never stop.

    A thread takes part in the group. kafka-python comes through a rebalance only while it is polled without a break,
    which the loop that works off the shards could not do.

    Parameters
    ----------
    settings
        The broker, the group and its session timeout.
    topic
        The topic whose partitions are shared out.
    clock_s
        A monotonic clock, seconds.
    """

    def __init__(self, settings: StreamSettings, topic: str, clock_s: Callable[[], float]) -> None:
        from kafka import KafkaConsumer
        from kafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

        self._clock_s = clock_s
        self._given: tuple[int, frozenset[int]] = (0, frozenset())
        self._reported: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        self._asked_s = clock_s()
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        session_ms = int(settings.session_timeout_s * 1000)
        self._consumer: Any = KafkaConsumer(
            bootstrap_servers=settings.bootstrap_servers.split(","),
            group_id=settings.consumer_group,
            enable_auto_commit=False,
            auto_offset_reset="latest",
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=session_ms // _HEARTBEATS_PER_SESSION,
            partition_assignment_strategy=(StickyPartitionAssignor,),
            **settings.client_options,
        )
        self._consumer.subscribe([topic], listener=_listener(self._take))
        self._thread = threading.Thread(target=self._take_part, name="osmf-membership", daemon=True)
        self._thread.start()

    def _take(self, assigned: set[Any]) -> None:
        self._given = (self._given[0] + 1, frozenset(partition.partition for partition in assigned))
        if assigned:
            self._consumer.pause(*assigned)

    def _take_part(self) -> None:
        try:
            while not self._ended.is_set():
                if self._clock_s() - self._asked_s > _MOST_SILENCE_S:
                    self._ended.wait(_POLL_MS / 1000)
                    continue
                self._consumer.poll(timeout_ms=_POLL_MS)
                self._commit()
        except BaseException as error:
            self._failure = error

    def _commit(self) -> None:
        from kafka import OffsetAndMetadata, TopicPartition

        with self._lock:
            offsets, self._reported = self._reported, {}
        if offsets:
            self._consumer.commit_async(
                {TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}
            )

    def poll(self) -> tuple[int, frozenset[int]]:
        """Return how often the group has shared out, and the partitions that this process is given since.

        Raises
        ------
        kafka.errors.KafkaError
            This process cannot take part in the group.
        """
        self._asked_s = self._clock_s()
        if self._failure is not None:
            raise self._failure
        return self._given

    def report(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Tell the broker how far the state has come; advisory, so a refusal changes nothing."""
        with self._lock:
            self._reported.update(offsets)

    def close(self) -> None:
        """Leave the group: the others get the partitions at once."""
        self._ended.set()
        self._thread.join()
        self._consumer.close(autocommit=False)

    def __enter__(self) -> Membership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listener(take: Callable[[set[Any]], None]) -> Any:
    from kafka.consumer.subscription_state import ConsumerRebalanceListener

    class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
        def on_partitions_revoked(self, revoked: object) -> None:
            """Do nothing: what is taken away is known once it is shared out anew."""

        def on_partitions_assigned(self, assigned: set[Any]) -> None:
            take(assigned)

        def on_partitions_lost(self, lost: object) -> None:
            take(set())

    return Listener()
