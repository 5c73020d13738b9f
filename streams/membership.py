"""Membership: which partitions this process is given, among those that share a consumer group.

The broker's group only says who works on what. It fences nobody: a process that was frozen learns late that its
partitions are another's by now, which is why a shard's state carries an epoch of its own (`state.store.Store`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from streams.settings import StreamSettings

_POLL_MS = 10
_HEARTBEATS_PER_SESSION = 5


class Membership:
    """Membership of this process in the consumer group.

    The group shares out the partitions of one topic; who is given a partition works on the partitions of the same
    number of all topics. Nothing is consumed here. While the group shares out anew, `partitions` stays as it was: a
    process goes on with its shards until it is told that they are another's, so that those which stay never stop.
    `round` counts how often the group has shared out.

    Parameters
    ----------
    settings
        The broker, the group and its session timeout.
    topic
        The topic whose partitions are shared out.
    """

    def __init__(self, settings: StreamSettings, topic: str) -> None:
        from kafka import KafkaConsumer
        from kafka.consumer.subscription_state import ConsumerRebalanceListener
        from kafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

        self.partitions: frozenset[int] = frozenset()
        self.round = 0
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
        membership = self

        class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
            def on_partitions_revoked(self, revoked: object) -> None:
                """Do nothing: what is taken away is known once it is shared out anew."""

            def on_partitions_assigned(self, assigned: set[Any]) -> None:
                membership._take(assigned)

            def on_partitions_lost(self, lost: object) -> None:
                membership._take(set())

        self._consumer.subscribe([topic], listener=Listener())

    def _take(self, assigned: set[Any]) -> None:
        self.partitions = frozenset(partition.partition for partition in assigned)
        self.round += 1
        if assigned:
            self._consumer.pause(*assigned)

    def poll(self) -> frozenset[int]:
        """Take part in the group; return the partitions that this process is given now."""
        self._consumer.poll(timeout_ms=_POLL_MS)
        return self.partitions

    def report(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Tell the broker how far the state has come; advisory, so a refusal changes nothing."""
        from kafka import OffsetAndMetadata, TopicPartition

        self._consumer.commit_async(
            {TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}
        )

    def close(self) -> None:
        """Leave the group: the others get the partitions at once."""
        self._consumer.close(autocommit=False)

    def __enter__(self) -> Membership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
