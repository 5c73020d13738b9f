"""Refresh: from a shifted group to stored pictures that may be published, or the reasons why not."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import msgspec
from PIL import Image

from generator.checks import Fingerprint, check_file, check_rendering, fingerprint, refusal
from generator.composition import EmptyCutout
from generator.proposal import Proposal, propose
from generator.renderer import Renderer
from generator.settings import GeneratorSettings
from generator.storage import ImageStore, ImageTampered, ImageUnreadable, encode, metadata_of, open_image
from generator.surroundings import Surroundings, read_prompt
from state.records import CreativeRecord
from streams.events import Creative, GroupsShifted

log = logging.getLogger(__name__)

_BAD_PICTURE = (ImageUnreadable, ImageTampered, Image.DecompressionBombError, ImportError, ValueError)
"""What reading somebody's picture may raise; ImportError and ValueError come from a URL of an unknown scheme."""


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """A proposal and what became of it: a published creative, or the reason why it was refused."""

    proposal: Proposal
    creative_id: str | None
    refused: str | None


class HandledGroup(msgspec.Struct, frozen=True, array_like=True):
    """What a shift led to in one group; ``skipped`` says why it got no proposals."""

    group_id: int
    candidates: list[Candidate]
    skipped: str | None


class HandledShift(msgspec.Struct, frozen=True, array_like=True):
    """A shift that has been worked off: the value of the generator's shift table, by the event id's SHA-256."""

    event_id: str
    product_id: str
    detected_at_ms: int
    groups: list[HandledGroup]


@dataclass(frozen=True)
class Refreshed:
    """What a shift led to: its record, and the creatives to publish, whose files are stored."""

    record: HandledShift
    creatives: list[Creative]


class Refresher:
    """Makes creatives for the groups of a shifted product.

    The same shift in the same surroundings gives the same creatives, byte for byte.

    Parameters
    ----------
    settings
        How many prompts and creatives, and the limits of the checks.
    renderer, images
        Draws pictures, and keeps them.
    """

    def __init__(self, settings: GeneratorSettings, renderer: Renderer, images: ImageStore) -> None:
        self._settings = settings
        self._renderer = renderer
        self._images = images
        self._fingerprints: dict[tuple[str, str], Fingerprint | None] = {}

    def refresh(self, event: GroupsShifted, around: Surroundings) -> Refreshed:
        """Propose, draw, check and store creatives for every group that is large enough.

        Raises
        ------
        OSError
            A picture could not be stored.
        """
        wanted: list[int] = []
        groups: list[HandledGroup] = []
        creatives: list[Creative] = []
        for group in event.groups:
            if group.share >= self._settings.min_share:
                wanted.append(group.group_id)
            else:
                why = f"share {group.share:.3f} is below generator.min_share = {self._settings.min_share:g}"
                groups.append(HandledGroup(group.group_id, [], why))
        try:
            cutout = _open_cutout(event.product_id, around.product.image_uri)
        except _BAD_PICTURE as error:
            why = f"no cut-out: {error}"
            log.warning("shift %s: %s", event.event_id, why)
            groups += [HandledGroup(group_id, [], why) for group_id in wanted]
        else:
            proposals = propose(
                event,
                around.product.title,
                {creative.creative_id: read_prompt(creative.prompt) for creative in around.creatives},
                around.look_alikes,
                group_ids=wanted,
                n_candidates=self._settings.n_candidates,
                exploration=self._settings.exploration,
            )
            existing = self._existing(around.creatives)
            for group_id, of_group in proposals.items():
                candidates = self._publish(event, cutout, of_group, existing, creatives)
                groups.append(HandledGroup(group_id, candidates, None))
        return Refreshed(HandledShift(event.event_id, event.product_id, event.detected_at_ms, groups), creatives)

    def _publish(
        self,
        event: GroupsShifted,
        cutout: Image.Image,
        proposals: list[Proposal],
        existing: dict[str, Fingerprint],
        creatives: list[Creative],
    ) -> list[Candidate]:
        """Draw a group's proposals, best first, until enough have passed the checks; store those."""
        settings, candidates, rank = self._settings, [], 0
        for number, proposal in enumerate(proposals):
            if rank == settings.n_published:
                break
            creative_id = _creative_id(event.event_id, proposal.group_id, rank)
            try:
                rendering = self._renderer.render(
                    cutout,
                    proposal.prompt.text,
                    seed=_seed(event.event_id, proposal.group_id, number),
                    size_px=settings.size_px,
                )
            except EmptyCutout as error:
                candidates.append(_refuse(event, proposal, str(error)))
                continue
            metadata = metadata_of(
                rendering.provenance,
                creative_id=creative_id,
                product_id=event.product_id,
                group_id=proposal.group_id,
                caused_by=event.event_id,
            )
            payload = encode(
                rendering.image, metadata, image_format=settings.image_format, jpeg_quality=settings.jpeg_quality
            )
            outcomes = (
                *check_rendering(rendering, existing, settings.checks),
                check_file(payload, settings.size_px),
            )
            why = refusal(outcomes)
            if why is not None:
                candidates.append(_refuse(event, proposal, why))
                continue
            stored = self._images.put(rendering.image, metadata)
            existing[creative_id] = fingerprint(rendering.image)
            creative = Creative(
                creative_id=creative_id,
                product_id=event.product_id,
                created_at_ms=event.detected_at_ms,
                image_uri=stored.uri,
                image_sha256=stored.sha256,
                prompt=proposal.prompt.text,
                origin="generated",
                group_id=proposal.group_id,
                caused_by=event.event_id,
            )
            creatives.append(creative)
            candidates.append(Candidate(proposal, creative_id, None))
            rank += 1
            log.info(
                "shift %s, group %d (%s): %r, expected CTR %.4f; %s",
                event.event_id,
                proposal.group_id,
                proposal.reasons.profile,
                proposal.prompt.text,
                proposal.expected_ctr,
                ", ".join(f"{w.word} {w.effect:+.2f}±{w.deviation:.2f}" for w in proposal.reasons.words),
            )
        return candidates

    def _existing(self, creatives: list[CreativeRecord]) -> dict[str, Fingerprint]:
        """Return the fingerprints of a product's creatives; those whose picture cannot be read are left out."""
        found = {}
        for creative in creatives:
            if creative.image_uri is None:
                continue
            key = (creative.creative_id, creative.image_uri)
            if key not in self._fingerprints:
                try:
                    self._fingerprints[key] = fingerprint(open_image(creative.image_uri))
                except _BAD_PICTURE as error:
                    log.warning("creative %s is not compared with new ones: %s", creative.creative_id, error)
                    self._fingerprints[key] = None
            known = self._fingerprints[key]
            if known is not None:
                found[creative.creative_id] = known
        return found


def _open_cutout(product_id: str, uri: str | None) -> Image.Image:
    if uri is None:
        raise ImageUnreadable(f"the picture of product {product_id!r}", "the product has none")
    return open_image(uri)


def _refuse(event: GroupsShifted, proposal: Proposal, why: str) -> Candidate:
    log.warning("shift %s, group %d: %r refused: %s", event.event_id, proposal.group_id, proposal.prompt.text, why)
    return Candidate(proposal, None, why)


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("|".join(map(str, parts)).encode()).digest()


def _creative_id(event_id: str, group_id: int, rank: int) -> str:
    return f"gen-{_digest(event_id, group_id, rank).hex()[:24]}"


def _seed(event_id: str, group_id: int, number: int) -> int:
    return int.from_bytes(_digest("seed", event_id, group_id, number)[:4], "big")
