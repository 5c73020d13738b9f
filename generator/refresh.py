"""Refresh: from an occasion to pictures that may be published, or the reasons why not."""

from __future__ import annotations

import logging

from PIL import Image

from generator import creative_scorer as scorers
from generator.champion_models import ChampionModels
from generator.checks import check_not_duplicate
from generator.composition import EmptyCutout
from generator.decision import Decision, decide
from generator.group_judge import Drawn, GroupJudge, group_ctr
from generator.inspection import Inspector
from generator.known_pictures import BAD_PICTURE, KnownPictures, Read, open_known
from generator.likeness import ImageFeatures, LikenessIndex
from generator.matting import Matting
from generator.occasion import Occasion
from generator.prompt import Prompt
from generator.proposal import GRAMMAR, Proposal, propose
from generator.refreshed import (
    Candidate,
    HandledGroup,
    HandledOccasion,
    Refreshed,
    creative_for,
    creative_id_for,
    digest,
    metadata_for,
    review_for,
    seed_for,
)
from generator.renderer import Renderer, Rendering, RenderRequest
from generator.settings import GeneratorSettings
from generator.storage import ImageStore, ImageUnreadable, open_image
from generator.surroundings import Surroundings, read_prompt
from generator.weights import WeightsMissing
from streams.events import CreativePrior, ShiftedGroup

log = logging.getLogger(__name__)


class Refresher:
    """Makes creatives for the groups of a product.

    The same occasion in the same surroundings gives the same creatives; their files too, byte for byte, but for the
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
        self._inspector = Inspector(settings, features)
        self._matting = Matting(settings.matting)
        self._known = KnownPictures(features, settings.features_kept)

    def refresh(
        self,
        occasion: Occasion,
        around: Surroundings,
        read: Read,
        models: ChampionModels | None = None,
        *,
        spent: float = 0.0,
    ) -> Refreshed:
        """Propose, draw and check creatives for every group that they are worth it for; nothing is written.

        Parameters
        ----------
        occasion, around
            Why, and what is known around it.
        read
            Reads a creative's file by its URI, also one that is still to be written.
        models
            Who writes prompts and ranks pictures; None: the grammar writes, and the CTR expected of the words ranks.
        spent
            What pictures of the product have cost on that day.
        """
        groups: list[HandledGroup] = []
        record = HandledOccasion(
            occasion.event_id,
            occasion.product_id,
            occasion.at_ms,
            groups,
            occasion.cause,
            borrowed_from=occasion.borrowed_from,
        )
        refreshed = Refreshed(record)
        models = _that_read(around, models)
        decisions = self._weigh(occasion, around, groups, models, spent)
        wanted = [group_id for group_id, decision in decisions.items() if decision.refused is None]
        if not wanted:
            return refreshed
        try:
            cutout = self._open_cutout(occasion.product_id, around.product.image_uri)
        except (*BAD_PICTURE, WeightsMissing) as error:
            why = f"no cut-out: {error}"
            log.warning("%s %s: %s", occasion.cause, occasion.event_id, why)
            groups += [HandledGroup(group_id, [], why, decisions[group_id]) for group_id in wanted]
            return refreshed
        written = self._write(occasion, around, cutout, wanted, models)
        proposals = self._propose(occasion, around, wanted, written, models)
        existing = self._known.index(around.creatives, read)
        for group in occasion.groups:
            if group.group_id in proposals:
                judge = None if models is None else self._judge(group, around, read, models)
                made = self._make(occasion, cutout, proposals[group.group_id], existing, judge, refreshed)
                groups.append(HandledGroup(group.group_id, made, None, decisions[group.group_id]))
        return refreshed

    def _weigh(
        self,
        occasion: Occasion,
        around: Surroundings,
        skipped: list[HandledGroup],
        models: ChampionModels | None,
        spent: float,
    ) -> dict[int, Decision]:
        """Decide for every group, the one that gains most first; those that get nothing are added to ``skipped``."""
        large: list[int] = []
        for group in occasion.groups:
            if occasion.wanted not in {None, group.group_id}:
                skipped.append(HandledGroup(group.group_id, [], f"only group {occasion.wanted} was asked for"))
            elif group.share < self._settings.min_share and not occasion.is_ordered:
                why = f"share {group.share:.3f} is below generator.min_share = {self._settings.min_share:g}"
                skipped.append(HandledGroup(group.group_id, [], why))
            else:
                large.append(group.group_id)
        if not large:
            return {}
        best = {
            group_id: of_group[0] for group_id, of_group in self._propose(occasion, around, large, {}, None).items()
        }
        by_id = {group.group_id: group for group in occasion.groups}
        left = self._settings.refresh.budget_per_product_day - spent

        def decided(group_id: int) -> Decision:
            return decide(
                self._settings.refresh,
                best_ctr=max((creative.ctr for creative in by_id[group_id].creatives), default=0.0),
                expected_ctr=best[group_id].expected_ctr,
                deviation=best[group_id].deviation,
                r=0.0 if models is None else models.r,
                n_candidates=self._settings.n_candidates,
                n_images=self._settings.n_published if models is None else self._settings.n_candidates,
                impressions_per_day=around.impressions_per_day * by_id[group_id].share,
                budget_left=left,
                is_ordered=occasion.is_ordered,
            )

        decisions: dict[int, Decision] = {}
        for group_id in sorted(best, key=lambda group_id: (-decided(group_id).gained_clicks, group_id)):
            decisions[group_id] = decision = decided(group_id)
            log.info(
                "%s %s, group %d: best CTR %.4f, expected %.4f (log ±%.2f), %.0f impressions a day: %.1f clicks more "
                "in %g days; costs %.3g of %.3g left: %s",
                *(occasion.cause, occasion.event_id, group_id, decision.best_ctr, decision.expected_ctr),
                *(decision.deviation, decision.impressions_per_day, decision.gained_clicks),
                *(self._settings.refresh.horizon_days, decision.cost, decision.budget_left),
                decision.refused or "worth it",
            )
            if decision.refused is None:
                left -= decision.cost
            else:
                skipped.append(HandledGroup(group_id, [], decision.refused, decision))
        return decisions

    def _propose(
        self,
        occasion: Occasion,
        around: Surroundings,
        wanted: list[int],
        written: dict[int, list[Prompt]],
        models: ChampionModels | None,
    ) -> dict[int, list[Proposal]]:
        return propose(
            occasion,
            around.product.title,
            {creative.creative_id: read_prompt(creative.prompt) for creative in around.creatives},
            around.look_alikes,
            group_ids=wanted,
            n_candidates=self._settings.n_candidates,
            exploration=self._settings.exploration,
            written=written,
            writer=GRAMMAR if models is None else models.writer.name,
        )

    def _write(
        self,
        occasion: Occasion,
        around: Surroundings,
        cutout: Image.Image,
        wanted: list[int],
        models: ChampionModels | None,
    ) -> dict[int, list[Prompt]]:
        """Let the G-MLLM write prompts for those groups that have a feature now."""
        features = {group_id: around.features[group_id] for group_id in wanted if group_id in around.features}
        if models is None or not features:
            return {}
        n_prompts = self._settings.n_candidates
        seed = int.from_bytes(digest("write", occasion.event_id)[:4], "big")
        written = models.writer.write(around.product.title, cutout, features, n_prompts=n_prompts, seed=seed)
        n_kept = sum(map(len, written.values()))
        log.info(
            "%s %s: %s wrote %d prompts, of which %d are well formed and different",
            *(occasion.cause, occasion.event_id, models.writer.name, n_prompts * len(features), n_kept),
        )
        return written

    def _judge(
        self, group: ShiftedGroup, around: Surroundings, read: Read, models: ChampionModels
    ) -> GroupJudge | None:
        """Return who ranks pictures for a group; None where its feature is not known any more."""
        feature = around.features.get(group.group_id)
        if feature is None:
            return None
        by_id = {creative.creative_id: creative for creative in around.creatives}
        known: list[scorers.Candidate] = []
        for shown in sorted(group.creatives, key=lambda c: (-c.n_impressions, c.creative_id)):
            creative = by_id.get(shown.creative_id)
            image = None if creative is None or len(known) == self._settings.n_compared else open_known(creative, read)
            if creative is not None and image is not None:
                known.append(scorers.Candidate(creative.prompt or "", image))
        audience = scorers.Audience(around.product.product_id, around.product.title, group.group_id, feature)
        return GroupJudge(models, audience, known, ctr=group_ctr(group), spread=self._settings.ctr_spread)

    def _make(
        self,
        occasion: Occasion,
        cutout: Image.Image,
        proposals: list[Proposal],
        existing: LikenessIndex,
        judge: GroupJudge | None,
        refreshed: Refreshed,
    ) -> list[Candidate]:
        """Draw a group's proposals and choose the best that pass the checks; record all of them.

        With a judge all are drawn, and ranked by their pictures; without, only as many as are needed, best words first.
        """
        candidates: list[Candidate] = []
        n_chosen = 0
        waiting = list(enumerate(proposals))
        while waiting and n_chosen < self._settings.n_published:
            n_wanted = self._settings.n_published - n_chosen if judge is None else len(waiting)
            batch, waiting = waiting[:n_wanted], waiting[n_wanted:]
            drawn = self._check(occasion, cutout, batch, existing, candidates, refreshed)
            for picture in drawn if judge is None else _ranked(judge, drawn):
                if n_chosen == self._settings.n_published:
                    candidates.append(Candidate(picture.proposal, None, None, picture.log_odds))
                    continue
                # Since it was checked, another one of this shift may have been chosen that it is too much like.
                outcome = check_not_duplicate(existing.nearest(picture.features), self._settings.checks)
                if not outcome.passed:
                    why = f"{outcome.name}: {outcome.detail}"
                    candidates.append(
                        self._refuse(
                            occasion,
                            picture.proposal,
                            picture.number,
                            why,
                            picture.rendering,
                            refreshed,
                            picture.log_odds,
                        )
                    )
                    continue
                candidates.append(self._choose(occasion, picture, n_chosen, judge, refreshed))
                existing.add(candidates[-1].creative_id or "", picture.features)
                n_chosen += 1
        return candidates

    def _check(
        self,
        occasion: Occasion,
        cutout: Image.Image,
        batch: list[tuple[int, Proposal]],
        existing: LikenessIndex,
        candidates: list[Candidate],
        refreshed: Refreshed,
    ) -> list[Drawn]:
        """Draw some proposals; return those that pass the checks, and add the others to ``candidates``."""
        requests = [
            RenderRequest(cutout, proposal.prompt.text, seed_for(occasion.event_id, proposal.group_id, number))
            for number, proposal in batch
        ]
        try:
            renderings = self._renderer.render_many(requests, size_px=self._settings.size_px)
        except EmptyCutout as error:
            candidates += [self._refuse(occasion, proposal, n, str(error), None, refreshed) for n, proposal in batch]
            return []
        refreshed.n_drawn += len(renderings)
        passed = []
        for (number, proposal), rendering in zip(batch, renderings, strict=True):
            payload = self._images.encode(rendering.image, metadata_for(occasion, proposal, rendering, None))
            inspected = self._inspector.inspect(rendering, payload, existing)
            if inspected.refused is None:
                passed.append(Drawn(number, proposal, rendering, inspected.features))
            else:
                why = inspected.refused
                candidates.append(self._refuse(occasion, proposal, number, why, rendering, refreshed))
        return passed

    def _choose(
        self, occasion: Occasion, drawn: Drawn, rank: int, judge: GroupJudge | None, refreshed: Refreshed
    ) -> Candidate:
        """Publish a picture, or let it wait for a person."""
        proposal = drawn.proposal
        creative_id = creative_id_for(occasion.event_id, proposal.group_id, rank)
        prior = None
        if judge is not None and drawn.prior is not None:
            prior = CreativePrior(
                relative_ctr=drawn.prior.relative_ctr,
                n_impressions=drawn.prior.n_impressions,
                reward_model=judge.name,
            )
        metadata = metadata_for(occasion, proposal, drawn.rendering, creative_id)
        payload = self._images.encode(drawn.rendering.image, metadata)
        if self._settings.approval == "manual":
            file = self._review_images.prepare(payload, metadata)
            refreshed.reviews.append(review_for(occasion, proposal, creative_id, file.uri, None, prior))
        else:
            file = self._images.prepare(payload, metadata)
            refreshed.creatives.append(creative_for(occasion, proposal, creative_id, file, prior))
        refreshed.files.append(file)
        log.info(
            "%s %s, group %d (%s): %s wrote %r, expected CTR %.4f; %s%s",
            occasion.cause,
            occasion.event_id,
            proposal.group_id,
            proposal.reasons.profile,
            proposal.writer,
            proposal.prompt.text,
            proposal.expected_ctr,
            ", ".join(f"{w.word} {w.effect:+.2f}±{w.deviation:.2f}" for w in proposal.reasons.words),
            ""
            if prior is None
            else f"; {prior.reward_model}: CTR x{prior.relative_ctr:.2f} for {prior.n_impressions:.0f} impressions",
        )
        return Candidate(proposal, creative_id, None, drawn.log_odds)

    def _refuse(
        self,
        occasion: Occasion,
        proposal: Proposal,
        number: int,
        why: str,
        rendering: Rendering | None,
        refreshed: Refreshed,
        log_odds: float | None = None,
    ) -> Candidate:
        log.warning(
            "%s %s, group %d: %r refused: %s",
            *(occasion.cause, occasion.event_id, proposal.group_id, proposal.prompt.text, why),
        )
        refused_id = f"refused-{digest('refused', occasion.event_id, proposal.group_id, number).hex()[:24]}"
        uri = None
        if rendering is not None:
            metadata = metadata_for(occasion, proposal, rendering, refused_id)
            file = self._review_images.prepare(self._images.encode(rendering.image, metadata), metadata)
            refreshed.files.append(file)
            uri = file.uri
        refreshed.reviews.append(review_for(occasion, proposal, refused_id, uri, why, None))
        return Candidate(proposal, None, why, log_odds)

    def _open_cutout(self, product_id: str, uri: str | None) -> Image.Image:
        if uri is None:
            raise ImageUnreadable(f"the picture of product {product_id!r}", "the product has none")
        return self._matting.cut_out(open_image(uri))


def _that_read(around: Surroundings, models: ChampionModels | None) -> ChampionModels | None:
    """Return the models if they read the product's group features: these may have another width than they know."""
    shapes = {feature.shape for feature in around.features.values()}
    if models is None or shapes <= {models.feature_shape}:
        return models
    log.error(
        "the champion %s reads group features of %s, those of product %s have %s (online.model.d_model): the grammar "
        "writes its prompts",
        *(models.writer.name, models.feature_shape, around.product.product_id, sorted(shapes)),
    )
    return None


def _ranked(judge: GroupJudge, drawn: list[Drawn]) -> list[Drawn]:
    try:
        return judge.ranked(drawn)
    except scorers.ScoresUnusable as error:
        log.error("%s The CTR expected of the words ranks.", error)
        return drawn
