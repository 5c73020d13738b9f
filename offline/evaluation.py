"""Evaluation of scorers of pairs: pair accuracy with interval, order consistency and calibration, for all alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from generator.comparison import Comparison, Floats
from offline.labelled_pair import Pair, PairScorer


class ScorerOutputError(ValueError):
    """A scorer whose answer is not one probability for each comparison."""

    def __init__(self, scorer: str, found: str) -> None:
        super().__init__(
            f"{scorer} answered {found}; allowed is one probability from 0 to 1 for each comparison. "
            "It was not evaluated."
        )


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Comparisons of about one confidence: how sure the scorer was of its winner, and how often it was right."""

    n_pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """What a scorer is worth on pairs.

    ``accuracy`` is the share of pairs whose winner it names, its 95% interval from a bootstrap over products: pairs of
    one product share pictures and groups, and are no independent evidence. A tie counts a half.
    ``order_inconsistency`` is the share of pairs of which it names the same place, first or second, as winner in both
    orders. ``log_loss`` is in nats, ``calibration_error`` the mean distance of confidence and accuracy over the bins
    of ``reliability``.
    """

    scorer: str
    n_pairs: int
    n_products: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    order_inconsistency: float
    log_loss: float
    calibration_error: float
    reliability: tuple[ReliabilityBin, ...]


def evaluate(
    scorer: PairScorer, pairs: Sequence[Pair], *, n_bootstrap: int = 2_000, n_bins: int = 10, seed: int = 0
) -> PairAccuracy:
    """Evaluate a scorer on held-out pairs; it is asked about each pair in both orders.

    Which order counts for the accuracy depends on the pictures' keys, so that a scorer that always names the first is
    right about half of the time.

    Raises
    ------
    ScorerOutputError
        If the scorer does not answer with probabilities.
    ValueError
        If there is no pair.
    """
    if not pairs:
        raise ValueError("there are 0 pairs to evaluate on; allowed is 1 or more. Nothing was evaluated.")
    first, second, p_winner, right = _answers(scorer, pairs)
    low, high = _interval(right, pairs, n_bootstrap, seed)
    reliability = _reliability(p_winner, right, n_bins)
    bounded = np.clip(p_winner, 1e-6, 1.0)
    return PairAccuracy(
        scorer=scorer.name,
        n_pairs=len(pairs),
        n_products=len({pair.product_id for pair in pairs}),
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        order_inconsistency=float(np.mean((first > 0.5) == (second > 0.5))),
        log_loss=float(-np.log(bounded).mean()),
        calibration_error=sum(part.n_pairs * abs(part.confidence - part.accuracy) for part in reliability) / len(pairs),
        reliability=reliability,
    )


@dataclass(frozen=True, slots=True)
class AccuracyDifference:
    """By how much one scorer names more winners than another, with the 95% interval of a bootstrap over products."""

    difference: float
    low: float
    high: float


def accuracy_difference(
    scorer: PairScorer, other: PairScorer, pairs: Sequence[Pair], *, n_bootstrap: int = 2_000, seed: int = 0
) -> AccuracyDifference:
    """Return the pair accuracy of a scorer less that of another on the same pairs; products are drawn for both at once.

    Raises
    ------
    ScorerOutputError
        If one of them does not answer with probabilities.
    ValueError
        If there is no pair.
    """
    if not pairs:
        raise ValueError("there are 0 pairs to compare on; allowed is 1 or more. Nothing was compared.")
    more = _answers(scorer, pairs)[-1] - _answers(other, pairs)[-1]
    return AccuracyDifference(float(more.mean()), *_interval(more, pairs, n_bootstrap, seed))


def _answers(scorer: PairScorer, pairs: Sequence[Pair]) -> tuple[Floats, Floats, Floats, Floats]:
    """Return P(first wins) with the winner first and second, P of the winner, and 1 where it is named, each (n,)."""
    turned = np.array([pair.is_turned() for pair in pairs])
    winner_first = [pair.winner_first for pair in pairs]
    first = _asked(scorer, winner_first)
    second = _asked(scorer, [comparison.swapped() for comparison in winner_first])
    p_winner = np.where(turned, 1.0 - second, first)  # (n,)
    right = np.where(p_winner == 0.5, 0.5, (p_winner > 0.5).astype(np.float64))
    return first, second, p_winner, right


def _interval(values: Floats, pairs: Sequence[Pair], n_bootstrap: int, seed: int) -> tuple[float, float]:
    """Return the 95% interval of the mean of pairs' values (n,), by a bootstrap over products."""
    products, of_product = np.unique([pair.product_id for pair in pairs], return_inverse=True)
    sums, n_of = np.bincount(of_product, weights=values), np.bincount(of_product)
    drawn = np.random.default_rng(seed).integers(len(products), size=(n_bootstrap, len(products)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / n_of[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _asked(scorer: PairScorer, comparisons: list[Comparison]) -> Floats:
    answers = np.asarray(scorer.p_first_wins(comparisons), dtype=np.float64)
    if answers.shape != (len(comparisons),):
        raise ScorerOutputError(scorer.name, f"an array of shape {answers.shape} to {len(comparisons)} comparisons")
    if not ((answers >= 0.0) & (answers <= 1.0)).all():
        raise ScorerOutputError(scorer.name, f"{answers[~((answers >= 0.0) & (answers <= 1.0))][0]!r}")
    return answers


def _reliability(p_winner: Floats, right: Floats, n_bins: int) -> tuple[ReliabilityBin, ...]:
    """Return the bins, of equal width in the confidence from 0.5 to 1, that hold any pair."""
    confidence = np.maximum(p_winner, 1.0 - p_winner)
    place = np.minimum(((confidence - 0.5) * 2.0 * n_bins).astype(np.int64), n_bins - 1)
    found = []
    for number in range(n_bins):
        inside = place == number
        if inside.any():
            found.append(
                ReliabilityBin(int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
            )
    return tuple(found)
