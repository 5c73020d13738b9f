"""Tail: one topic from its beginning, without a consumer group; for tools and followers."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from streams.codec import EventDecoder, Undecodable
from streams.events import Event
from streams.settings import StreamSettings

E = TypeVar("E", bound=Event)


class Tail(Generic[E]):
    """Reads a topic from its beginning and goes on with what is appended.

    Messages that are no event of ``event_type`` are passed over: a tail observes, it does not account.
    """

    def __init__(self, settings: StreamSettings, topic: str, event_type: type[E]) -> None:
        from kafka import KafkaConsumer, TopicPartition

        self._decoder = EventDecoder(cast(type[Event], event_type))
        self._consumer: Any = KafkaConsumer(
            bootstrap_servers=settings.bootstrap_servers.split(","),
            group_id=None,
            enable_auto_commit=False,
            fetch_max_wait_ms=50,
            **settings.client_options,
        )
        partitions = sorted(self._consumer.partitions_for_topic(topic) or {0})
        assigned = [TopicPartition(topic, partition) for partition in partitions]
        self._consumer.assign(assigned)
        self._consumer.seek_to_beginning(*assigned)

    def poll(self, timeout_ms: int) -> list[E]:
        """Return the events that came, after at most ``timeout_ms`` milliseconds."""
        found: list[Any] = []
        for messages in self._consumer.poll(timeout_ms=timeout_ms).values():
            for message in messages:
                found += [event for event in self._decoder.decode(message.value) if not isinstance(event, Undecodable)]
        return found

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()

    def __enter__(self) -> Tail[E]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
