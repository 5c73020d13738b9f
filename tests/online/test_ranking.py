"""NDCG between groups and its null."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from online.ctr import CountsShapeError
from online.ranking import RankingError, mean_ndcg_between_groups, ndcg_at, null_ndcg

LOG3 = math.log2(3)


@pytest.mark.parametrize(
    ("reference", "predicted", "k", "expected"),
    [
        pytest.param([0.1], [0.5], 5, 1.0, id="one creative"),
        pytest.param([0.3, 0.2, 0.1], [0.9, 0.8, 0.7], 5, 1.0, id="same order"),
        pytest.param([0.2, 0.1], [0.1, 0.2], 5, (0.1 + 0.2 / LOG3) / (0.2 + 0.1 / LOG3), id="two swapped"),
        pytest.param([0.2, 0.1, 0.0], [0.1, 0.2, 0.3], 1, 0.0, id="top one is worth nothing"),
        pytest.param([0.3, 0.2, 0.1], [0.3, 0.1, 0.2], 1, 1.0, id="below k nothing counts"),
        pytest.param([0.2, 0.1], [0.7, 0.7], 1, 0.75, id="a tie is half of each"),
        pytest.param([0.0, 0.0], [0.1, 0.2], 5, 1.0, id="no order is worse"),
    ],
)
def test_ndcg(reference, predicted, k, expected):
    assert ndcg_at(reference, predicted, k) == pytest.approx(expected)


ctrs = hnp.arrays(float, st.integers(1, 12), elements=st.floats(0, 1, width=16))


@given(ctrs, st.data())
def test_laws_of_ndcg(reference, data):
    predicted = data.draw(hnp.arrays(float, reference.size, elements=st.floats(0, 1, width=16)))
    k = data.draw(st.integers(1, 14))
    score = ndcg_at(reference, predicted, k)
    assert 0.0 <= score <= 1.0
    order = data.draw(st.permutations(range(reference.size)))
    assert ndcg_at(reference[order], predicted[order], k) == pytest.approx(score)
    assert ndcg_at(reference, predicted * 0.5 + 1.0, k) == pytest.approx(score)
    if np.unique(reference).size == reference.size:
        assert ndcg_at(reference, reference, k) == pytest.approx(1.0)


def test_a_tie_is_the_mean_of_all_orders():
    reference = np.array([0.3, 0.05, 0.2, 0.1])
    orders = [ndcg_at(reference, np.array([*place, -1.0]), 2) for place in itertools.permutations([1.0, 2.0, 3.0])]
    assert ndcg_at(reference, [2.0, 2.0, 2.0, -1.0], 2) == pytest.approx(np.mean(orders))


@pytest.mark.parametrize(
    ("reference", "predicted", "k", "message"),
    [
        ([0.1, 0.2], [0.1], 5, "shape"),
        ([], [], 5, "at least 1"),
        ([0.1], [0.1], 0, "k is 0"),
        ([-0.1], [0.1], 5, "negative"),
        ([0.1], [math.nan], 5, "not finite"),
    ],
)
def test_ndcg_refuses(reference, predicted, k, message):
    with pytest.raises(RankingError, match=message):
        ndcg_at(reference, predicted, k)


def counts(rng, ctr, n):
    table = np.full(ctr.shape, n)
    return table, rng.binomial(table, ctr)


@pytest.mark.parametrize("n", [50, 1_000])
def test_equal_groups_score_like_their_null(n):
    rng = np.random.default_rng(n)
    scores, nulls = [], []
    for _ in range(150):
        ctr = np.clip(0.06 * rng.lognormal(0, 0.6, 9), 0, 0.9)
        table = counts(rng, np.stack([ctr, ctr, ctr]), n)
        scores.append(mean_ndcg_between_groups(*table))
        nulls.append(null_ndcg(*table, rng))
    assert np.mean(scores) > 0.95
    assert np.mean(scores) == pytest.approx(np.mean(nulls), abs=0.01)


def test_conflicting_groups_score_below_their_null():
    rng = np.random.default_rng(3)
    for _ in range(10):
        ctr = 0.02 * np.arange(1, 10)
        table = counts(rng, np.stack([ctr, ctr[::-1]]), 1_000)
        score, null = mean_ndcg_between_groups(*table), null_ndcg(*table, rng, n_splits=3)
        assert score is not None
        assert null is not None
        assert score < 0.6
        assert null > 0.9


@pytest.mark.parametrize(
    ("n", "x"),
    [([[100, 100]], [[5, 6]]), ([[100, 100], [0, 0]], [[5, 6], [0, 0]]), ([[0, 0], [0, 0]], [[0, 0], [0, 0]])],
)
def test_without_two_groups_there_is_no_score(n, x):
    assert mean_ndcg_between_groups(n, x) is None
    assert null_ndcg(n, x, np.random.default_rng(0)) is None


def test_null_of_decayed_counts():
    n = np.array([[100.4, 20.6], [50.5, 80.2]])
    score = null_ndcg(n, n * 0.1, np.random.default_rng(0), n_splits=5)
    assert score is not None
    assert 0.5 < score <= 1.0


def test_null_follows_its_generator():
    table = counts(np.random.default_rng(1), np.full((2, 6), 0.05), 200)
    assert null_ndcg(*table, np.random.default_rng(4)) == null_ndcg(*table, np.random.default_rng(4))


def test_null_refuses():
    with pytest.raises(CountsShapeError):
        null_ndcg([1, 2], [1, 2], np.random.default_rng(0))
    with pytest.raises(RankingError, match="n_splits is 0"):
        null_ndcg([[1]], [[1]], np.random.default_rng(0), n_splits=0)
