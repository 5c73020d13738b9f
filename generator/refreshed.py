"""What an occasion led to: the record that is kept of it, and the creatives, reviews and files that come of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import msgspec

from generator.decision import Decision
from generator.occasion import Occasion
from generator.proposal import Proposal
from generator.renderer import Rendering
from generator.review import ReviewRecord
from generator.storage import ImageFile, MetadataValue, metadata_of
from streams.events import Creative, CreativePrior


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """A proposal and what became of it: a creative that is published or waits, or the reason why it was refused.

    One that is neither was drawn and passed the checks, but ranked lower. ``log_odds`` is the GRM's, that the group
    clicks it more than a typical one of the creatives that it knows, or where it knows none, of the other candidates.
    """

    proposal: Proposal
    creative_id: str | None
    refused: str | None
    log_odds: float | None = None


class HandledGroup(msgspec.Struct, frozen=True, array_like=True):
    """What it led to in one group: ``skipped`` says why nothing was drawn, ``decision`` has the numbers."""

    group_id: int
    candidates: list[Candidate]
    skipped: str | None
    decision: Decision | None = None


class HandledOccasion(msgspec.Struct, frozen=True, array_like=True):
    """A shift or a request that has been worked off: the value of the generator's table of shifts, by its id's SHA-256.

    ``superseded_by`` is the later shift of the product that was worked off in its place. ``borrowed_from`` is the
    product that had lent the groups (`state.records.ProductGroups`).
    """

    event_id: str
    product_id: str
    at_ms: int
    groups: list[HandledGroup]
    cause: str = "shift"
    superseded_by: str | None = None
    borrowed_from: str | None = None


@dataclass
class Refreshed:
    """What an occasion led to: its record, the creatives to publish, those refused or waiting, and all their files."""

    record: HandledOccasion
    creatives: list[Creative] = field(default_factory=list)
    reviews: list[ReviewRecord] = field(default_factory=list)
    files: list[ImageFile] = field(default_factory=list)
    n_drawn: int = 0


def metadata_for(
    occasion: Occasion, proposal: Proposal, rendering: Rendering, creative_id: str | None
) -> dict[str, MetadataValue]:
    """Return what a file says of itself."""
    return metadata_of(
        rendering.provenance,
        creative_id=creative_id,
        product_id=occasion.product_id,
        group_id=proposal.group_id,
        caused_by=occasion.event_id,
        prompt_writer=proposal.writer,
        groups_borrowed_from=occasion.borrowed_from,
        lent_share=proposal.reasons.lent_share,
    )


def review_for(
    occasion: Occasion,
    proposal: Proposal,
    creative_id: str,
    image_uri: str | None,
    refused: str | None,
    prior: CreativePrior | None,
) -> ReviewRecord:
    """Return the record of a new creative: refused for a reason, or else waiting."""
    return ReviewRecord(
        creative_id=creative_id,
        product_id=occasion.product_id,
        group_id=proposal.group_id,
        caused_by=occasion.event_id,
        created_at_ms=occasion.at_ms,
        prompt=proposal.prompt.text,
        expected_ctr=proposal.expected_ctr,
        image_uri=image_uri,
        status="waiting" if refused is None else "refused",
        reason=refused or "",
        prompt_writer=proposal.writer,
        prior=prior,
    )


def creative_for(
    occasion: Occasion, proposal: Proposal, creative_id: str, file: ImageFile, prior: CreativePrior | None
) -> Creative:
    """Return the event that publishes a creative."""
    return Creative(
        creative_id=creative_id,
        product_id=occasion.product_id,
        created_at_ms=occasion.at_ms,
        image_uri=file.uri,
        image_sha256=file.sha256,
        prompt=proposal.prompt.text,
        origin="generated",
        group_id=proposal.group_id,
        caused_by=occasion.event_id,
        prompt_writer=proposal.writer,
        prior=prior,
    )


def digest(*parts: object) -> bytes:
    """Return a hash of some values, 32 bytes."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).digest()


def creative_id_for(event_id: str, group_id: int, rank: int) -> str:
    """Return the id of the creative of a rank; the same occasion gives the same ids."""
    return f"gen-{digest(event_id, group_id, rank).hex()[:24]}"


def seed_for(event_id: str, group_id: int, number: int) -> int:
    """Return the seed with which a proposal is drawn."""
    return int.from_bytes(digest("seed", event_id, group_id, number)[:4], "big")
