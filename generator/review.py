"""Review: creatives that a check has refused or that wait for a person, and what people decide.

A verdict comes as a :class:`streams.events.CreativeReviewed` on a topic. So the generator's state keeps its one writer,
and a verdict is as safe from a kill, and as little repeated, as a shift is.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from state.records import CreativeRecord
from streams.events import Creative, CreativePrior, CreativeReviewed, DeadLetterReason

ReviewStatus = Literal["refused", "waiting", "accepted", "rejected"]
"""Refused by a check; waiting for a person; accepted or rejected by one."""


class ReviewRecord(msgspec.Struct, frozen=True, array_like=True):
    """A creative that was not simply published: the value of the generator's table of reviews.

    ``image_uri`` is its picture among those for review, None where nothing could be drawn. ``reason`` is the
    check's or the person's. ``expected_ctr`` is that of its prompt when it was proposed, ``prior`` what is believed of
    the picture.
    """

    creative_id: str
    product_id: str
    group_id: int
    caused_by: str
    created_at_ms: int
    prompt: str
    expected_ctr: float
    image_uri: str | None
    status: ReviewStatus
    reason: str = ""
    reviewed_by: str | None = None
    reviewed_at_ms: int | None = None
    prompt_writer: str | None = None
    prior: CreativePrior | None = None


class UnusableReview(ValueError):
    """A verdict that decodes but cannot be carried out."""

    def __init__(self, reason: DeadLetterReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def judge(event: CreativeReviewed, record: ReviewRecord | None) -> ReviewRecord | None:
    """Return what a verdict makes of a review; None where there was one already: the first holds.

    Raises
    ------
    UnusableReview
        There is no such creative, or the checks have refused it: that no person can undo.
    """
    if record is None:
        detail = f"no creative {event.creative_id!r} of product {event.product_id!r} waits to be accepted"
        raise UnusableReview("unknown_creative", detail)
    if record.status == "refused":
        detail = f"creative {event.creative_id!r} was refused by the checks ({record.reason}) and stays so"
        raise UnusableReview("unknown_creative", detail)
    if record.status != "waiting":
        return None
    return msgspec.structs.replace(
        record,
        status=event.verdict,
        reason=event.reason,
        reviewed_by=event.reviewed_by,
        reviewed_at_ms=event.reviewed_at_ms,
    )


def accepted_creative(record: ReviewRecord, image_uri: str, image_sha256: str) -> Creative:
    """Return the event that publishes an accepted creative, whose picture now lies at ``image_uri``."""
    return Creative(
        creative_id=record.creative_id,
        product_id=record.product_id,
        created_at_ms=record.created_at_ms,
        image_uri=image_uri,
        image_sha256=image_sha256,
        prompt=record.prompt,
        origin="generated",
        group_id=record.group_id,
        caused_by=record.caused_by,
        prompt_writer=record.prompt_writer,
        prior=record.prior,
    )


def unpublished_creative(record: ReviewRecord) -> CreativeRecord:
    """Return a waiting or rejected creative as one of the product's: neither is proposed or drawn again."""
    return CreativeRecord(
        0,
        record.creative_id,
        record.product_id,
        record.image_uri,
        None,
        record.prompt,
        "generated",
        record.group_id,
        record.caused_by,
        record.created_at_ms,
        record.created_at_ms,
        b"",
    )
