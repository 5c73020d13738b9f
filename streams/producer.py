"""Producer: events out to Kafka, acknowledged before they count as sent."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from streams.codec import encode, event_key, event_time_ms, event_topics
from streams.errors import BrokerAwayError
from streams.events import Event, UserForgotten
from streams.settings import StreamSettings

_LINGER_MS = 20


class SendError(RuntimeError):
    """The broker did not take an event."""

    def __init__(self, topic: str, cause: BaseException) -> None:
        super().__init__(
            f"the broker did not take an event for {topic!r} ({type(cause).__name__}: {cause}): it was not sent. "
            "Check streams.bootstrap_servers and the broker's log; the event is kept and sent again at the next start."
        )


class EventProducer:
    """Sends events to the topic of their type, keyed by product, stamped with their event time.

    A forgotten user concerns every product, so that one copy goes to every partition.
    ``send`` returns before the broker has answered; ``flush`` waits for every answer and raises
    `SendError` when one of them was a refusal.
    """

    def __init__(self, settings: StreamSettings, *, client_id: str) -> None:
        from kafka import KafkaProducer
        from kafka.errors import KafkaError

        timeout_ms = int(settings.broker_timeout_s * 1000)
        self._topics = event_topics(settings.topics)
        try:
            self._producer = KafkaProducer(
                bootstrap_servers=settings.bootstrap_servers.split(","),
                client_id=client_id,
                acks="all",
                linger_ms=_LINGER_MS,
                batch_size=256 << 10,
                bootstrap_timeout_ms=timeout_ms,
                max_block_ms=timeout_ms,
                request_timeout_ms=timeout_ms,
                delivery_timeout_ms=timeout_ms + _LINGER_MS,
                **settings.client_options,
            )
        except KafkaError as error:
            raise BrokerAwayError(settings.bootstrap_servers, error) from error
        self._errors: list[tuple[str, BaseException]] = []

    def send(self, event: Event) -> None:
        """Send one event; the answer is awaited by `flush`."""
        self.send_bytes(
            self._topics[type(event)],
            event_key(event),
            encode(event),
            timestamp_ms=event_time_ms(event) or None,
            everywhere=isinstance(event, UserForgotten),
        )

    def send_bytes(
        self, topic: str, key: str, payload: bytes, *, timestamp_ms: int | None = None, everywhere: bool = False
    ) -> None:
        """Send bytes as they are to the key's partition, or ``everywhere``; the answer is awaited by `flush`.

        Raises
        ------
        SendError
            They are not even accepted for sending: they are too large, or the broker is away.
        """
        from kafka.errors import KafkaError

        for partition in self.partitions(topic) if everywhere else [None]:
            try:
                future: Any = self._producer.send(
                    topic, key=key.encode(), value=payload, timestamp_ms=timestamp_ms, partition=partition
                )
            except KafkaError as error:
                raise SendError(topic, error) from error
            future.add_errback(lambda error: self._errors.append((topic, error)))

    def partitions(self, topic: str) -> list[int]:
        """Return the partitions of a topic."""
        return sorted(self._producer.partitions_for(topic) or [0])

    def flush(self) -> None:
        """Wait until the broker has everything.

        Raises
        ------
        SendError
            The broker refused an event, or did not answer in time.
        """
        self._producer.flush()
        if self._errors:
            topic, error = self._errors[0]
            self._errors.clear()
            raise SendError(topic, error) from error

    def close(self) -> None:
        """Send what is left and close the connection."""
        self._producer.close()

    def __enter__(self) -> EventProducer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
