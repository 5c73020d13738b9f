"""Received events: what a message held, with its place in the log, and what became unusable."""

from __future__ import annotations

import msgspec

from streams.codec import ARROW_STREAM_MARK, Undecodable, encode
from streams.events import Click, ClickRetracted, DeadLetterReason, Event, Impression, UserForgotten
from streams.merge import Message


class Refused(msgspec.Struct, frozen=True):
    """An event that cannot be used, with its place in the log."""

    topic: str
    partition: int
    offset: int
    row: int
    reason: DeadLetterReason
    detail: str
    payload: bytes


class Received(msgspec.Struct, frozen=True):
    """An event with its place in the log; ``row`` counts the events of one message, ``order`` the batch's messages."""

    event: Impression | Click | ClickRetracted | UserForgotten
    message: Message
    row: int
    order: int = 0

    def refuse(self, reason: DeadLetterReason, detail: str) -> Refused:
        """Return this event as one that cannot be used."""
        at = self.message
        return Refused(at.topic, at.partition, at.offset, self.row, reason, detail, payload_of(self.event, at))


def payload_of(event: Event, message: Message) -> bytes:
    """Return the bytes that an event has in a dead letter: its message's, or of a batch of many events its own."""
    value = message.value or b""
    return encode(event) if value.startswith(ARROW_STREAM_MARK) else value


def undecodable(message: Message, row: int, failure: Undecodable) -> Refused:
    """Return a message that could not be decoded as one that cannot be used."""
    return Refused(
        message.topic, message.partition, message.offset, row, failure.reason, failure.detail, failure.payload
    )
