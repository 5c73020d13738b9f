"""Scoring of candidate creatives: how much a group clicks each of some pictures of a product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from generator.comparison import Comparison, Feature, Floats, Picture

if TYPE_CHECKING:
    from generator.grm import Grm


class ScoresUnusable(ValueError):
    """Scores that rank nothing."""

    def __init__(self, scorer: str, scores: Any, n_candidates: int) -> None:
        super().__init__(
            f"{scorer} gave the scores {scores!r}; allowed are {n_candidates} finite numbers, one for each candidate. "
            "Nothing was ranked by them."
        )


@dataclass(frozen=True, eq=False, slots=True)
class Audience:
    """Who is to click: a group of a product. ``feature`` is (11, D), Eq. 6."""

    product_id: str
    title: str
    group_id: int
    feature: Feature


@dataclass(frozen=True, eq=False, slots=True)
class Candidate:
    """A prompt as the G-MLLM wrote it, which does not name the product, and the picture that it gives."""

    prompt: str
    image: Image.Image


class CreativeScorer(Protocol):
    """Says how much a group clicks pictures of a product: a reward model, or who knows the truth."""

    @property
    def name(self) -> str:
        """What it is called in manifests, with its version."""
        ...

    def score_many(self, audience: Audience, candidates: Sequence[Candidate]) -> Floats:
        """Return log-odds (n,): candidate i is clicked more than j with probability sigmoid(s_i - s_j)."""
        ...


def scores_of(scorer: CreativeScorer, audience: Audience, candidates: Sequence[Candidate]) -> Floats:
    """Return a scorer's log-odds (n,), or refuse them.

    Raises
    ------
    ScoresUnusable
        If they are not one finite number for each candidate.
    """
    scores = np.asarray(scorer.score_many(audience, candidates), np.float64)
    if scores.shape != (len(candidates),) or not np.isfinite(scores).all():
        raise ScoresUnusable(scorer.name, scores, len(candidates))
    return scores


class GrmScorer:
    """A GRM as scorer of candidates: all pairs are compared, and the scores are the closest to their logits.

    Logits of a pair are antisymmetric, for both orders are averaged; so the least-squares fit of s_i - s_j to them
    is the mean over a candidate's row.

    Parameters
    ----------
    grm
        The reward model (Eq. 8).
    name
        Its artifact, such as ``grm/v000003``.
    """

    def __init__(self, grm: Grm, name: str) -> None:
        self._grm = grm
        self._name = name

    @property
    def name(self) -> str:
        """What it is called in manifests: the artifact."""
        return self._name

    def score_many(self, audience: Audience, candidates: Sequence[Candidate]) -> Floats:
        """Return calibrated log-odds (n,) that sum up to 0."""
        n = len(candidates)
        pictures = [Picture.of(candidate.image) for candidate in candidates]
        places = [(i, j) for i in range(n) for j in range(i + 1, n)]
        logits = self._grm.logits(
            [
                Comparison(audience.product_id, audience.title, audience.feature, pictures[i], pictures[j])
                for i, j in places
            ]
        )
        beats = np.zeros((n, n))
        for (i, j), logit in zip(places, logits / self._grm.temperature, strict=True):
            beats[i, j], beats[j, i] = logit, -logit
        log_odds: Floats = beats.sum(axis=1) / max(n, 1)
        return log_odds
