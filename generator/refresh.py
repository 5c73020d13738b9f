"""Refresh: from a shifted group to pictures that may be published, or the reasons why not."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from PIL import Image

from generator.composition import EmptyCutout
from generator.inspection import Inspector
from generator.likeness import ImageFeatures, LikenessIndex, Vector
from generator.matting import Matting
from generator.proposal import Proposal, propose
from generator.renderer import Renderer, Rendering, RenderRequest
from generator.review import ReviewRecord, review_of
from generator.settings import GeneratorSettings
from generator.storage import (
    ImageFile,
    ImageStore,
    ImageTampered,
    ImageUnreadable,
    metadata_of,
    open_image,
)
from generator.surroundings import Surroundings, read_prompt
from generator.weights import WeightsMissing
from state.records import CreativeRecord
from streams.events import Creative, GroupsShifted

log = logging.getLogger(__name__)

_BAD_PICTURE = (ImageUnreadable, ImageTampered, Image.DecompressionBombError, ImportError, ValueError)
"""What reading somebody's picture may raise; ImportError and ValueError come from a URL of an unknown scheme."""


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """A proposal and what became of it: a creative that is published or waits, or the reason why it was refused."""

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
    """What a shift led to: its record, the creatives to publish, those refused or waiting, and all their files."""

    record: HandledShift
    creatives: list[Creative] = field(default_factory=list)
    reviews: list[ReviewRecord] = field(default_factory=list)
    files: list[ImageFile] = field(default_factory=list)


class Refresher:
    """Makes creatives for the groups of a shifted product.

    The same shift in the same surroundings gives the same creatives; their files too, byte for byte, but for the
    manifest's signature.

    Parameters
    ----------
    settings
        How many prompts and creatives, and the limits of the checks.
    renderer, images
        Draws pictures, and says where they belong.
    features
        Tells duplicates.
    """

    def __init__(
        self, settings: GeneratorSettings, renderer: Renderer, images: ImageStore, features: ImageFeatures
    ) -> None:
        self._settings = settings
        self._renderer = renderer
        self._images = images
        self._review_images = ImageStore.of_review(settings)
        self._features = features
        self._inspector = Inspector(settings, features)
        self._matting = Matting(settings.matting)
        self._kept: OrderedDict[tuple[str, str], Vector] = OrderedDict()  # by creative and URI, last used last

    def refresh(self, event: GroupsShifted, around: Surroundings, read: Callable[[str], bytes]) -> Refreshed:
        """Propose, draw and check creatives for every group that is large enough; nothing is written.

        Parameters
        ----------
        event, around
            The shift, and what is known around it.
        read
            Reads a creative's file by its URI, also one that is still to be written.
        """
        wanted: list[int] = []
        groups: list[HandledGroup] = []
        refreshed = Refreshed(HandledShift(event.event_id, event.product_id, event.detected_at_ms, groups))
        for group in event.groups:
            if group.share >= self._settings.min_share:
                wanted.append(group.group_id)
            else:
                why = f"share {group.share:.3f} is below generator.min_share = {self._settings.min_share:g}"
                groups.append(HandledGroup(group.group_id, [], why))
        try:
            cutout = self._open_cutout(event.product_id, around.product.image_uri)
        except (*_BAD_PICTURE, WeightsMissing) as error:
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
            existing = self._existing(around.creatives, read)
            for group_id, of_group in proposals.items():
                candidates = self._make(event, cutout, of_group, existing, refreshed)
                groups.append(HandledGroup(group_id, candidates, None))
        return refreshed

    def _make(
        self,
        event: GroupsShifted,
        cutout: Image.Image,
        proposals: list[Proposal],
        existing: LikenessIndex,
        refreshed: Refreshed,
    ) -> list[Candidate]:
        """Draw a group's proposals, best first, until enough have passed the checks; record those."""
        candidates: list[Candidate] = []
        rank = 0
        waiting = list(enumerate(proposals))
        while waiting and rank < self._settings.n_published:
            n_wanted = self._settings.n_published - rank
            batch, waiting = waiting[:n_wanted], waiting[n_wanted:]
            try:
                renderings = self._draw(event, cutout, batch)
            except EmptyCutout as error:
                candidates += [self._refuse(event, p, n, str(error), None, refreshed) for n, p in batch]
                continue
            for (number, proposal), rendering in zip(batch, renderings, strict=True):
                creative_id = _creative_id(event.event_id, proposal.group_id, rank)
                metadata = metadata_of(
                    rendering.provenance,
                    creative_id=creative_id,
                    product_id=event.product_id,
                    group_id=proposal.group_id,
                    caused_by=event.event_id,
                )
                payload = self._images.encode(rendering.image, metadata)
                inspected = self._inspector.inspect(rendering, payload, existing)
                if inspected.refused is not None:
                    kept = self._review_images.prepare(payload, metadata)
                    refreshed.files.append(kept)
                    candidates.append(self._refuse(event, proposal, number, inspected.refused, kept.uri, refreshed))
                    continue
                existing.add(creative_id, inspected.features)
                if self._settings.approval == "manual":
                    file = self._review_images.prepare(payload, metadata)
                    refreshed.reviews.append(_review(event, proposal, creative_id, file.uri, None))
                else:
                    file = self._images.prepare(payload, metadata)
                    refreshed.creatives.append(_creative(event, proposal, creative_id, file))
                refreshed.files.append(file)
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

    def _draw(self, event: GroupsShifted, cutout: Image.Image, batch: list[tuple[int, Proposal]]) -> list[Rendering]:
        requests = [
            RenderRequest(cutout, proposal.prompt.text, _seed(event.event_id, proposal.group_id, number))
            for number, proposal in batch
        ]
        return self._renderer.render_many(requests, size_px=self._settings.size_px)

    def _refuse(
        self,
        event: GroupsShifted,
        proposal: Proposal,
        number: int,
        why: str,
        image_uri: str | None,
        refreshed: Refreshed,
    ) -> Candidate:
        log.warning("shift %s, group %d: %r refused: %s", event.event_id, proposal.group_id, proposal.prompt.text, why)
        refused_id = f"refused-{_digest('refused', event.event_id, proposal.group_id, number).hex()[:24]}"
        refreshed.reviews.append(_review(event, proposal, refused_id, image_uri, why))
        return Candidate(proposal, None, why)

    def _existing(self, creatives: list[CreativeRecord], read: Callable[[str], bytes]) -> LikenessIndex:
        """Return the features of a product's creatives; those whose picture cannot be read are left out."""
        found = {}
        for creative in creatives:
            if creative.image_uri is None:
                continue
            try:
                found[creative.creative_id] = self._features_of(creative.creative_id, creative.image_uri, read)
            except _BAD_PICTURE as error:
                log.warning("creative %s is not compared with new ones: %s", creative.creative_id, error)
        return LikenessIndex(self._features.dim, found)

    def _features_of(self, creative_id: str, image_uri: str, read: Callable[[str], bytes]) -> Vector:
        features = self._kept.pop((creative_id, image_uri), None)
        if features is None:
            features = self._features.encode(read(image_uri), creative_id)
        self._kept[creative_id, image_uri] = features
        if len(self._kept) > self._settings.features_kept:
            self._kept.popitem(last=False)
        return features

    def _open_cutout(self, product_id: str, uri: str | None) -> Image.Image:
        if uri is None:
            raise ImageUnreadable(f"the picture of product {product_id!r}", "the product has none")
        return self._matting.cut_out(open_image(uri))


def _review(
    event: GroupsShifted, proposal: Proposal, creative_id: str, image_uri: str | None, refused: str | None
) -> ReviewRecord:
    text = proposal.prompt.text
    return review_of(event, proposal.group_id, creative_id, text, proposal.expected_ctr, image_uri, refused)


def _creative(event: GroupsShifted, proposal: Proposal, creative_id: str, file: ImageFile) -> Creative:
    return Creative(
        creative_id=creative_id,
        product_id=event.product_id,
        created_at_ms=event.detected_at_ms,
        image_uri=file.uri,
        image_sha256=file.sha256,
        prompt=proposal.prompt.text,
        origin="generated",
        group_id=proposal.group_id,
        caused_by=event.event_id,
    )


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("|".join(map(str, parts)).encode()).digest()


def _creative_id(event_id: str, group_id: int, rank: int) -> str:
    return f"gen-{_digest(event_id, group_id, rank).hex()[:24]}"


def _seed(event_id: str, group_id: int, number: int) -> int:
    return int.from_bytes(_digest("seed", event_id, group_id, number)[:4], "big")
