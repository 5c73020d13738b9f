"""Word posteriors: what a group makes of every slot word, from what it has clicked.

Every creative that the group has seen since the change says something about the five slot words of its prompt. A
logistic model adds the words' effects up, each pulled towards zero as strongly as the product's groups together suggest
(empirical Bayes); groups of other products may lend their clicks where they predict this group's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from generator.prompt import VOCABULARY, Prompt

Floats = npt.NDArray[np.float64]

SlotWords = tuple[str, ...]
"""The five words of a prompt, in the vocabulary's order."""

WORDS: Final[tuple[tuple[str, str], ...]] = tuple((slot, word) for slot in VOCABULARY for word in VOCABULARY[slot])
"""Every (slot, word), in the order of the effects."""

_COLUMN: Final = {slot_word: column for column, slot_word in enumerate(WORDS)}
_SPREADS: Final = (0.1, 0.2, 0.4, 0.8)  # standard deviations of a word's effect that are tried, in logits
_TYPICAL_SPREAD: Final = 0.4  # a word moves a CTR by a factor of 1.5: where the evidence does not say otherwise
_SPREAD_OF_LOG: Final = 0.7
_LENT: Final = (0.1, 0.3, 1.0)  # shares of the look-alikes' impressions that are tried
_LENT_UNSEEN: Final = 0.3  # of them, where a group has clicked nothing yet that could speak for or against it
_MIN_GAIN_NATS: Final = 1.0  # what borrowing must add to the log evidence of the group's own clicks
_UNSEEN_BASE: Final = float(np.log(0.05 / 0.95))  # a CTR of 5%, where nobody knows better
_BASE_SPREAD: Final = 0.5  # of a group's base rate about its mean CTR, in logits


class WordEffect(msgspec.Struct, frozen=True, array_like=True):
    """What a group makes of a slot word.

    ``effect`` is on the logit of the CTR with its standard ``deviation``; ``n_impressions`` are the group's own of
    creatives with that word since the change, 0 for one that it has not seen.
    """

    slot: str
    word: str
    effect: float
    deviation: float
    n_impressions: int


@dataclass(frozen=True)
class Shown:
    """A creative that a group has seen: its prompt, where it has one, and the counts."""

    prompt: Prompt | None
    n_impressions: float
    n_clicks: float


@dataclass(frozen=True)
class LookAlike:
    """A group of another product: how similar it is, in (0, 1], and what it has seen."""

    similarity: float
    shown: Sequence[Shown]


@dataclass(frozen=True)
class WordPosterior:
    """What is known of a group's words: a normal posterior of the base rate and the 35 effects.

    ``mean`` is (36,), the base rate first, in logits; ``covariance`` (36, 36).
    """

    mean: Floats
    covariance: Floats
    n_impressions: Floats
    lent_share: float

    def expected_ctr(self, words: SlotWords) -> float:
        """Return the CTR of a prompt at the posterior's mode."""
        columns = [1 + _COLUMN[slot_word] for slot_word in zip(VOCABULARY, words, strict=True)]
        return float(_sigmoid(self.mean[0] + self.mean[columns].sum()))

    def deviation(self, words: SlotWords) -> float:
        """Return the standard deviation of the sum of a prompt's effects, in logits."""
        columns = [1 + _COLUMN[slot_word] for slot_word in zip(VOCABULARY, words, strict=True)]
        return float(np.sqrt(self.covariance[np.ix_(columns, columns)].sum()))

    def effect(self, slot: str, word: str) -> WordEffect:
        """Return what is known of one word."""
        column = _COLUMN[slot, word]
        deviation = float(np.sqrt(self.covariance[1 + column, 1 + column]))
        return WordEffect(slot, word, float(self.mean[1 + column]), deviation, int(self.n_impressions[column]))


@dataclass(frozen=True)
class _Rows:
    """Counts as the rows of a regression: words (R, 35), impressions and clicks (R,), base rates in logits (R,)."""

    words: Floats
    n_impressions: Floats
    n_clicks: Floats
    base: Floats


def word_posteriors(
    shown: Mapping[int, Sequence[Shown]], look_alikes: Mapping[int, Sequence[LookAlike]]
) -> dict[int, WordPosterior]:
    """Estimate what every group of a product makes of every slot word.

    Binomial counts, effects normal around zero; posteriors by Laplace's method. The spread of the effects is that
    under which the counts of all groups together are most probable. Look-alikes make a power prior: their impressions
    count by similarity times a share, and the share is that under which the group's own clicks are most probable; it
    is 0 unless that is better by 1 nat, because after a change of tastes those who were alike need not be. Of a group
    that has seen nothing, as those of a new product, it is 0.3.

    Parameters
    ----------
    shown
        What each group has seen since the change.
    look_alikes
        Similar groups of other products, by group; a group may have none.
    """
    rows = {group_id: _rows(of_group) for group_id, of_group in shown.items()}
    n_words = len(WORDS)

    def own_fit(group_id: int, mean: Floats, precision: Floats) -> tuple[Floats, Floats, float]:
        own = rows[group_id]
        design = np.column_stack([np.ones(len(own.base)), own.words])  # (R, 36)
        full = np.zeros((1 + n_words, 1 + n_words))
        full[0, 0], full[1:, 1:] = _BASE_SPREAD**-2, precision
        return _laplace(design, own.n_impressions, own.n_clicks, own.base, np.r_[0.0, mean], full)

    zero, eye = np.zeros(n_words), np.eye(n_words)

    def log_evidence(spread: float) -> float:
        prior = -0.5 * (np.log(spread / _TYPICAL_SPREAD) / _SPREAD_OF_LOG) ** 2
        return float(prior + sum(own_fit(group_id, zero, eye / spread**2)[2] for group_id in rows))

    spread = max(_SPREADS, key=log_evidence)
    posteriors = {}
    for group_id, own in rows.items():
        best = own_fit(group_id, zero, eye / spread**2)
        lent, needed = 0.0, best[2] + _MIN_GAIN_NATS
        others = [(_rows(other.shown), other.similarity) for other in look_alikes.get(group_id, ())]
        bases = [rows.base[0] for rows, _ in others if rows.n_impressions.sum()]
        unseen_base = float(np.mean(bases)) if bases else _UNSEEN_BASE
        if others and not own.n_impressions.sum():
            best, lent = own_fit(group_id, *_lent_prior(others, _LENT_UNSEEN, eye / spread**2)), _LENT_UNSEEN
            others = []
        for share in _LENT if others else ():
            mean, precision = _lent_prior(others, share, eye / spread**2)
            fit = own_fit(group_id, mean, precision)
            if fit[2] > needed:
                best, lent, needed = fit, share, fit[2]
        base = own.base[0] if own.n_impressions.sum() else unseen_base
        mode = best[0].copy()
        mode[0] += base
        covariance = np.asarray(np.linalg.inv(best[1]), dtype=np.float64)
        posteriors[group_id] = WordPosterior(mode, covariance, own.n_impressions @ own.words, lent)
    return posteriors


def _lent_prior(others: list[tuple[_Rows, float]], share: float, precision: Floats) -> tuple[Floats, Floats]:
    weights = np.concatenate([np.full(len(rows.base), similarity * share) for rows, similarity in others])
    fit = _laplace(
        np.concatenate([rows.words for rows, _ in others]),
        weights * np.concatenate([rows.n_impressions for rows, _ in others]),
        weights * np.concatenate([rows.n_clicks for rows, _ in others]),
        np.concatenate([rows.base for rows, _ in others]),
        np.zeros(len(precision)),
        precision,
    )
    return fit[0], fit[1]


def _rows(shown: Sequence[Shown]) -> _Rows:
    words = np.zeros((len(shown), len(WORDS)))
    for row, creative in enumerate(shown):
        if creative.prompt is not None:
            for slot_word in creative.prompt.slots().items():
                words[row, _COLUMN[slot_word]] = 1.0
    n_impressions = np.array([max(creative.n_impressions, 0.0) for creative in shown], dtype=np.float64)
    n_clicks = np.clip(np.array([creative.n_clicks for creative in shown], dtype=np.float64), 0.0, n_impressions)
    ctr = (n_clicks.sum() + 0.5) / (n_impressions.sum() + 1.0)
    return _Rows(words, n_impressions, n_clicks, np.full(len(shown), _logit(ctr)))


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def _sigmoid(x: Floats | float) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -40, 40))))


def _laplace(
    design: Floats, n_impressions: Floats, n_clicks: Floats, offset: Floats, mean: Floats, precision: Floats
) -> tuple[Floats, Floats, float]:
    """Return the mode (P,), the precision there (P, P) and the log evidence of a binomial model, by Newton steps.

    The log evidence leaves out the binomial coefficients, which are the same for every prior.
    """

    def log_posterior(at: Floats) -> float:
        x = np.clip(offset + design @ at, -40, 40)
        away = at - mean
        return float(n_clicks @ x - n_impressions @ np.logaddexp(0, x) - 0.5 * away @ precision @ away)

    mode, value = mean.copy(), log_posterior(mean)
    hessian = precision
    for _ in range(30):
        p = _sigmoid(offset + design @ mode)
        hessian = precision + (design * (n_impressions * p * (1 - p))[:, None]).T @ design
        gradient = design.T @ (n_clicks - n_impressions * p) - precision @ (mode - mean)
        step = np.linalg.solve(hessian, gradient)
        if float(np.abs(step).max(initial=0.0)) < 1e-8:
            break
        # The objective is concave, so halving a step that overshoots always ends.
        scale, new_value = 1.0, log_posterior(mode + step)
        while new_value < value and scale > 1e-6:
            scale /= 2
            new_value = log_posterior(mode + scale * step)
        mode, value = mode + scale * step, new_value
    evidence = value + 0.5 * (float(np.linalg.slogdet(precision)[1]) - float(np.linalg.slogdet(hessian)[1]))
    return mode, hessian, evidence
