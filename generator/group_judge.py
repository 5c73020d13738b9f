"""Group judge: the GRM asked which of some new pictures a group clicks most, beside the creatives that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from generator.champion_models import ChampionModels
from generator.creative_scorer import Audience, Candidate, scores_of
from generator.likeness import Vector
from generator.prior import Prior, grm_prior
from generator.prompt import UNNAMED_CAPTION
from generator.proposal import Proposal
from generator.renderer import Rendering
from streams.events import ShiftedGroup

_PRIOR_CLICKS, _PRIOR_IMPRESSIONS = 1.0, 20.0  # a CTR of 5%, where a group has seen nothing


@dataclass(frozen=True, eq=False)
class Drawn:
    """A proposal's picture that has passed the checks.

    ``log_odds`` is what the GRM says, that the group clicks it more than a typical one of the creatives that it knows,
    or where it knows none, of the other new pictures; ``prior`` is what that is worth.
    """

    number: int
    proposal: Proposal
    rendering: Rendering
    features: Vector
    log_odds: float | None = None
    prior: Prior | None = None


def group_ctr(group: ShiftedGroup) -> float:
    """Return the CTR of a group over all creatives."""
    n_clicks = sum(creative.n_clicks for creative in group.creatives)
    n_impressions = sum(creative.n_impressions for creative in group.creatives)
    return (n_clicks + _PRIOR_CLICKS) / (n_impressions + _PRIOR_IMPRESSIONS)


class GroupJudge:
    """Ranks pictures for one group.

    Parameters
    ----------
    models
        The champion's.
    audience
        The group.
    known
        The creatives that the group knows.
    ctr
        CTR of the group.
    spread
        Standard deviation of log-CTRs of creatives.
    """

    def __init__(
        self, models: ChampionModels, audience: Audience, known: Sequence[Candidate], *, ctr: float, spread: float
    ) -> None:
        self._models = models
        self._audience = audience
        self._known = list(known)
        self._ctr = ctr
        self._spread = spread

    @property
    def name(self) -> str:
        """The GRM's artifact."""
        return self._models.scorer.name

    def ranked(self, drawn: Sequence[Drawn]) -> list[Drawn]:
        """Return pictures in the order of how much the group clicks them, most first, with what the GRM says of each.

        Raises
        ------
        generator.creative_scorer.ScoresUnusable
            The GRM gave no finite score.
        """
        if not drawn:
            return []
        candidates = [
            Candidate(each.proposal.prompt.named(UNNAMED_CAPTION).text, each.rendering.image) for each in drawn
        ]
        scores = scores_of(self._models.scorer, self._audience, [*candidates, *self._known])
        new, known = scores[: len(drawn)], scores[len(drawn) :]
        log_odds = new - (known if len(known) else new).mean()
        r = self._models.r if len(known) else 0.0  # of how it does beside what is shown nothing has been said
        return [
            replace(
                drawn[place],
                log_odds=float(log_odds[place]),
                prior=grm_prior(float(log_odds[place]), r, ctr=self._ctr, spread=self._spread),
            )
            for place in np.argsort(-log_odds, kind="stable")
        ]
