"""Where the simulator's events go: a protocol that the Kafka producer fulfils, and a plain list for tests."""

from __future__ import annotations

from typing import Protocol

from streams.events import Event


class EventSink(Protocol):
    """Takes events and raw messages; :class:`streams.producer.EventProducer` is one."""

    def send(self, event: Event) -> None:
        """Send one event to the topic of its type, keyed by its product."""
        ...

    def send_bytes(self, topic: str, key: str, payload: bytes) -> None:
        """Send bytes as they are."""
        ...

    def flush(self) -> None:
        """Wait until everything is sent."""
        ...


class ListSink:
    """Keeps events and raw messages in lists, in the order in which they came."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.raw: list[tuple[str, str, bytes]] = []
        self.n_flushes = 0

    def send(self, event: Event) -> None:
        """Keep an event."""
        self.events.append(event)

    def send_bytes(self, topic: str, key: str, payload: bytes) -> None:
        """Keep a message."""
        self.raw.append((topic, key, payload))

    def flush(self) -> None:
        """Count the call."""
        self.n_flushes += 1
