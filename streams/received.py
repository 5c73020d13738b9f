"""Received events: what a message held, with its place in the log, and what became unusable."""

from __future__ import annotations

import msgspec

from streams.codec import Undecodable
from streams.events import Click, ClickRetracted, DeadLetterReason, Impression, UserForgotten
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
        return Refused(at.topic, at.partition, at.offset, self.row, reason, detail, at.value or b"")


def undecodable(message: Message, row: int, failure: Undecodable) -> Refused:
    """Return a message that could not be decoded as one that cannot be used."""
    return Refused(
        message.topic, message.partition, message.offset, row, failure.reason, failure.detail, failure.payload
    )
