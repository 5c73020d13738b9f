"""The gate: which reward models and policies may not be used, and why."""

from __future__ import annotations

import numpy as np
import pytest

from generator.comparison import Comparison, Picture
from offline.evaluation import AccuracyDifference, PairAccuracy, accuracy_difference, evaluate
from offline.gate import GroupChange, gain_interval, grm_refusals, group_refusals
from offline.labelled_pair import Pair
from offline.settings import GroupGateSettings


def accuracy(low: float, high: float) -> PairAccuracy:
    return PairAccuracy("grm", 100, 8, (low + high) / 2, low, high, 0.0, 0.5, 0.1, ())


@pytest.mark.parametrize(
    ("measured", "to_champion", "reasons"),
    [
        pytest.param(accuracy(0.6, 0.8), None, [], id="above chance, and the first"),
        pytest.param(accuracy(0.6, 0.8), AccuracyDifference(0.05, -0.02, 0.1), [], id="better than the champion"),
        pytest.param(accuracy(0.6, 0.8), AccuracyDifference(-0.05, -0.1, 0.01), [], id="perhaps worse"),
        pytest.param(
            accuracy(0.6, 0.8),
            AccuracyDifference(-0.05, -0.1, -0.01),
            ["names 5.0% fewer of the held-out winners than the champion's (1.0% to 10.0% fewer)"],
            id="clearly worse",
        ),
        pytest.param(
            accuracy(0.5, 0.7),
            None,
            ["names 60.0% of the held-out winners (50.0% to 70.0%), which may be chance"],
            id="chance",
        ),
        pytest.param(None, None, ["there is no held-out pair"], id="nothing to measure on"),
    ],
)
def test_reward_models_have_to_know_held_out_pairs(
    measured: PairAccuracy | None, to_champion: AccuracyDifference | None, reasons: list[str]
) -> None:
    found = grm_refusals(measured, to_champion)
    assert len(found) == len(reasons)
    assert all(reason in said for reason, said in zip(reasons, found, strict=True))


@pytest.mark.parametrize(
    ("gain", "low", "high", "is_refused"),
    [
        (0.3, 0.1, 0.5, False),
        (-0.3, -0.7, 0.1, False),
        (-0.3, -0.5, -0.1, True),
        (-0.05, -0.08, -0.02, False),  # worse for sure, by less than is allowed
    ],
)
def test_no_group_may_get_clearly_worse_creatives(gain: float, low: float, high: float, is_refused: bool) -> None:
    fine = GroupChange("p1", "Oak chair", 3, 0.2, 0.1, 0.3)
    found = group_refusals([fine, GroupChange("p2", "Red lamp", 7, gain, low, high)], GroupGateSettings(max_loss=0.1))
    if is_refused:
        [reason] = found
        assert reason == (
            "group 7 of product 'p2' (Red lamp) would get worse creatives: -0.30 log-odds (-0.50 to -0.10), "
            "down to -0.10 is allowed"
        )
    else:
        assert found == []


def test_intervals_of_a_gain_hold_the_true_one_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    n_missed = 0
    for _ in range(2_000):
        gain, low, high = gain_interval(rng.normal(0, 1, 8), rng.normal(0.5, 2, 5), p_error=0.1)
        assert low < gain < high
        n_missed += not low <= 0.5 <= high
    assert n_missed / 2_000 == pytest.approx(0.1, abs=0.03)
    assert gain_interval(np.zeros(3), np.ones(3), p_error=0.1) == (1.0, 1.0, 1.0)


class Knows:
    """Names the winners of some products, and is wrong about all others."""

    name = "knows"

    def __init__(self, products: set[str]) -> None:
        self._products = products

    def p_first_wins(self, comparisons: list[Comparison]) -> np.ndarray:
        winner_first = np.array([row.first.key < row.second.key for row in comparisons])
        knows = np.array([row.product_id in self._products for row in comparisons])
        return np.where(winner_first == knows, 0.9, 0.1)


def pairs(n_products: int) -> list[Pair]:
    pictures = [Picture(key, bytes) for key in ("a", "b")]
    feature = np.zeros((11, 128), np.float32)
    return [
        Pair(Comparison(f"p{product}", "t", feature, pictures[0], pictures[1]), 0.9, 0.2, 0.1)
        for product in range(n_products)
        for _ in range(3)
    ]


def test_two_reward_models_are_compared_on_the_same_pairs() -> None:
    found = pairs(10)
    all_but_two, half = Knows({f"p{n}" for n in range(8)}), Knows({f"p{n}" for n in range(5)})
    difference = accuracy_difference(all_but_two, half, found)
    assert difference.difference == pytest.approx(0.3)
    assert evaluate(all_but_two, found).accuracy - evaluate(half, found).accuracy == pytest.approx(0.3)
    assert 0.0 <= difference.low < 0.3 < difference.high <= 0.6
    same = accuracy_difference(half, half, found)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="0 pairs"):
        accuracy_difference(half, half, [])
