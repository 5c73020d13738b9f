"""Shrinkage of CTRs, and what it shares with their comparisons."""

from __future__ import annotations

import math
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.ctr import (
    MAX_STRENGTH,
    MIN_STRENGTH,
    PRIOR_SPREAD,
    SPREAD_RANGE,
    CountsShapeError,
    ImpossibleCountError,
    ProbabilityLevelError,
    creative_spread,
    scale,
    shrink,
)
from online.significance import interaction_p_value, ratio_interval
from tests.online.tables import count_tables


def hierarchical_world(rng, n_groups, n_creatives, ctr, creative_strength, cell_strength, n_mean):
    """Return the true cell CTRs and counts drawn from them, with exposures that vary widely."""
    creative = rng.beta(ctr * creative_strength, (1 - ctr) * creative_strength, n_creatives)
    cell = rng.beta(creative * cell_strength, (1 - creative) * cell_strength, (n_groups, n_creatives))
    n = rng.poisson(rng.gamma(2, n_mean / 2, cell.shape))
    return cell, n.astype(float), rng.binomial(n, cell).astype(float)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("n_groups", "n_creatives", "ctr", "creative_strength", "cell_strength", "n_mean"),
    [
        (5, 12, 0.05, 300, 300, 200),
        (5, 12, 0.05, 300, 300, 20),
        (3, 8, 0.06, 100, 100, 400),
        (2, 6, 0.015, 1000, 700, 1000),
        (5, 8, 0.06, 60, 100, 300),
    ],
)
def test_intervals_hold_and_error_is_below_raw(
    seed, n_groups, n_creatives, ctr, creative_strength, cell_strength, n_mean
):
    rng = np.random.default_rng([seed, n_groups, n_mean])
    held, error, raw_error = [], [], []
    for _ in range(150):
        truth, n, x = hierarchical_world(rng, n_groups, n_creatives, ctr, creative_strength, cell_strength, n_mean)
        found = shrink(n, x)
        held.append((truth >= found.ctr_low) & (truth <= found.ctr_high))
        raw = np.where(n > 0, x / np.maximum(n, 1), x.sum() / n.sum())
        error.append(np.square(found.ctr - truth))
        raw_error.append(np.square(raw - truth))
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.mean(error) < 0.8 * np.mean(raw_error)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.99])
def test_intervals_of_other_levels_hold(level):
    rng = np.random.default_rng(5)
    held = []
    for _ in range(150):
        truth, n, x = hierarchical_world(rng, 4, 10, 0.05, 300, 300, 200)
        found = shrink(n, x, level=level)
        held.append(((truth >= found.ctr_low) & (truth <= found.ctr_high)).mean())
    assert np.mean(held) == pytest.approx(level, abs=0.035)


@pytest.mark.parametrize(("n_groups", "n_creatives"), [(1, 1), (1, 8), (5, 1), (2, 2)])
def test_small_shapes_hold_too(n_groups, n_creatives):
    rng = np.random.default_rng([7, n_groups, n_creatives])
    held = []
    for _ in range(400):
        cell_strength = 1e7 if n_groups == 1 else 300
        truth, n, x = hierarchical_world(rng, n_groups, n_creatives, 0.05, 300, cell_strength, 200)
        found = shrink(n, x)
        held.append(((truth >= found.ctr_low) & (truth <= found.ctr_high)).mean())
    assert 0.92 <= np.mean(held) <= 0.985


def test_decayed_counts_keep_intervals_and_leave_the_interaction_test_cautious():
    rng = np.random.default_rng(41)
    held, p_values = [], []

    def decay(truth):
        clicks = rng.random((*truth.shape, 400)) < truth[..., None]
        weight = 0.5 ** rng.uniform(0, 3, clicks.shape)  # ages of up to three half-lives
        return weight.sum(axis=-1), (weight * clicks).sum(axis=-1)

    for _ in range(150):
        creative = rng.beta(15, 285, 8)
        truth = rng.beta(creative * 300, (1 - creative) * 300, (4, 8))
        found = shrink(*decay(truth))
        held.append(((truth >= found.ctr_low) & (truth <= found.ctr_high)).mean())
        p_values.append(interaction_p_value(*decay(np.broadcast_to(creative, (4, 8)))))
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.mean(np.array(p_values) < 0.05) <= 0.05


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (5, 12)])
def test_nothing_seen_gives_the_product_prior(shape):
    found = shrink(np.zeros(shape), np.zeros(shape))
    assert found.ctr == pytest.approx(np.full(shape, 1 / 20))
    assert found.product_ctr == pytest.approx(1 / 20)
    assert found.creative_ctr == pytest.approx(np.full(shape[1], 1 / 20))
    assert (found.ctr_low < 0.005).all()
    assert (found.ctr_high > 0.15).all()


def test_one_cell_is_the_smoothed_ratio():
    found = shrink([[80.0]], [[7.0]])
    # One cell's counts say little about the spread: the answer stays close to (7 + 1) / (80 + 20).
    assert found.ctr[0, 0] == pytest.approx(0.08, abs=0.004)


def test_cells_without_impressions_get_their_creative():
    n = np.array([[1e5, 1e5, 1e5], [1e5, 1e5, 0.0]])
    x = n * np.array([0.02, 0.05, 0.09])
    found = shrink(n, x)
    assert found.ctr[1, 2] == pytest.approx(found.creative_ctr[2])
    # Its creative was seen by one group only, so it is drawn a little to the product (0.053).
    assert 0.075 < found.ctr[1, 2] < 0.09
    assert found.ctr_high[1, 2] - found.ctr_low[1, 2] > 2 * (found.ctr_high[0, 2] - found.ctr_low[0, 2])


def test_a_new_creative_gets_the_product():
    n = np.array([[1e4, 1e4, 0.0]])
    found = shrink(n, n * np.array([0.04, 0.06, 0.0]))
    assert found.ctr[0, 2] == pytest.approx(found.product_ctr)
    assert found.ctr_low[0, 2] < 0.04
    assert found.ctr_high[0, 2] > 0.06


def test_many_impressions_leave_the_data_alone():
    n = np.full((2, 3), 1e7)
    x = n * np.array([[0.01, 0.05, 0.02], [0.09, 0.03, 0.04]])
    assert shrink(n, x).ctr == pytest.approx(x / n, rel=2e-3)


def test_strength_follows_the_true_spread():
    rng = np.random.default_rng(11)
    strengths = []
    for cell_strength in (30, 300, 3000):
        found = [
            shrink(*hierarchical_world(rng, 5, 12, 0.05, 300, cell_strength, 2000)[1:]).strengths for _ in range(20)
        ]
        strengths.append(np.median([strength.cell for strength in found]))
    assert strengths[0] == pytest.approx(30, rel=0.3)
    assert strengths[1] == pytest.approx(300, rel=0.3)
    assert strengths[2] > 1000


def expected_world(rng, n_mean, ctr=0.06, spread=0.4, strength=1000):
    """Return true cell CTRs that lie near their creative's times a ratio, the ratios, and counts."""
    creative = rng.beta(ctr * 100, (1 - ctr) * 100, 8)
    ratio = np.exp(rng.normal(0, spread, (3, 8)))
    mean = creative * ratio
    cell = rng.beta(mean * strength, (1 - mean) * strength)
    n = rng.poisson(n_mean, cell.shape)
    return cell, ratio, n.astype(float), rng.binomial(n, cell).astype(float)


@pytest.mark.parametrize(("n_mean", "gain", "loss"), [(30, 0.6, 1.5), (300, 0.7, 1.15), (3000, 0.93, 1.05)])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_right_expectation_lowers_the_error_and_a_wrong_one_costs_little(seed, n_mean, gain, loss):
    rng = np.random.default_rng([seed, n_mean, 7])
    plain, right, wrong, held = [], [], [], []
    for _ in range(200):
        cell, ratio, n, x = expected_world(rng, n_mean)
        found = shrink(n, x, relative=ratio)
        held.append((found.ctr_low <= cell) & (cell <= found.ctr_high))
        right.append((found.ctr - cell) ** 2)
        plain.append((shrink(n, x).ctr - cell) ** 2)
        wrong.append((shrink(n, x, relative=np.exp(rng.normal(0, 0.4, ratio.shape))).ctr - cell) ** 2)
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.mean(right) < gain * np.mean(plain)
    assert np.mean(wrong) < loss * np.mean(plain)


def test_expecting_nothing_changes_nothing():
    n, x = np.array([[100.0, 20.0], [50.0, 400.0]]), np.array([[9.0, 0.0], [1.0, 40.0]])
    plain, told = shrink(n, x), shrink(n, x, relative=np.ones((2, 2)))
    assert (plain.ctr == told.ctr).all()
    assert (plain.ctr_high == told.ctr_high).all()


def test_a_cell_without_impressions_gets_what_is_expected():
    n, x = np.array([[5000.0, 0.0], [5000.0, 5000.0]]), np.array([[250.0, 0.0], [250.0, 500.0]])
    found = shrink(n, x, relative=np.array([[1.0, 0.5], [1.0, 1.0]]))
    assert found.ctr[0, 1] == pytest.approx(0.5 * found.creative_ctr[1], rel=1e-6)
    all_users = shrink(n.sum(axis=0, keepdims=True), x.sum(axis=0, keepdims=True))
    assert scale(all_users, [[2.0, 0.5]]).ctr[0] == pytest.approx(all_users.ctr[0] * [2, 0.5])


@pytest.mark.parametrize("relative", [np.ones((1, 2)), np.ones(2), np.ones((2, 3))])
def test_an_expectation_of_another_shape_is_refused(relative):
    with pytest.raises(CountsShapeError, match=re.escape("(2, 2)")):
        shrink(np.ones((2, 2)), np.zeros((2, 2)), relative=relative)


def test_a_scale_of_other_creatives_is_refused():
    with pytest.raises(CountsShapeError, match=re.escape("(1, 2)")):
        scale(shrink([[1.0, 1.0]], [[0.0, 0.0]]), np.ones((2, 3)))


def chance_of_the_favourite(found, best, rng):
    """Return the chance that the creative of the highest CTR is said to be the best, and whether it is."""
    favourite = int(found.ctr[0].argmax())
    draws = rng.beta(found.alpha[0], found.beta[0], (200, found.ctr.shape[1]))
    return (draws.argmax(axis=1) == favourite).mean(), favourite == best


@pytest.mark.parametrize("n_mean", [0, 10, 100])
def test_how_sure_it_is_which_creative_is_best_is_told_given_the_product(n_mean):
    """A new product's CTR is hardly known, but that is no doubt about which of its creatives is better."""
    rng = np.random.default_rng([n_mean, 5])
    told = {True: [], False: []}
    for _ in range(1_500):
        ctr, ratio = max(rng.beta(1, 19), 0.005), np.exp(rng.normal(0, 0.3, 5))
        strength = (1 - ctr) / (0.25**2 * ctr)
        creative = np.minimum(rng.beta(ctr * strength, (1 - ctr) * strength, 5) * ratio, 1)
        n = rng.poisson(n_mean, (1, 5)).astype(float)
        x = rng.binomial(n.astype(int), creative).astype(float)
        for given_product, said in told.items():
            found = scale(shrink(n, x, given_product=given_product), ratio[None])
            said.append(chance_of_the_favourite(found, int(creative.argmax()), rng))
    (given, true), (wide, _) = (np.mean(told[which], axis=0) for which in (True, False))
    assert given == pytest.approx(true, abs=0.06)
    assert wide < given - (0.15 if n_mean < 100 else 0)


@given(count_tables())
@settings(max_examples=100, deadline=None)
def test_given_the_product_the_ctrs_are_the_same_and_surer(table):
    n, x = table
    found, sure = shrink(n, x), shrink(n, x, given_product=True)
    assert (sure.ctr == found.ctr).all()
    assert (sure.alpha + sure.beta >= (found.alpha + found.beta) * (1 - 1e-9)).all()


def catalogue(rng, spread, n_products, n_creatives=8, n_mean=300):
    """Return the true CTRs of products' creatives, (P, C), and counts; each product has a CTR of its own."""
    product = rng.beta(20, 380, n_products)[:, None]
    strength = (1 - product) / product / spread**2
    truth = rng.beta(product * strength, (1 - product) * strength, (n_products, n_creatives))
    n = rng.poisson(n_mean, truth.shape)
    return truth, n.astype(float), rng.binomial(n, truth).astype(float)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.1, 0.25, 0.5])
def test_the_spread_of_creatives_is_found_in_many_products(seed, spread):
    rng = np.random.default_rng([seed, 17])
    _, n, x = catalogue(rng, spread, 200)
    assert creative_spread(np.stack([n, x], axis=1)) == pytest.approx(spread, abs=0.03)


def test_what_nobody_knows_is_the_prior_spread():
    seen = np.array([50.0, 70.0])
    assert creative_spread([]) == PRIOR_SPREAD
    assert creative_spread([np.zeros((2, 3))]) == PRIOR_SPREAD
    assert creative_spread([np.array([seen, [0, 0]]), np.array([[50], [1]]), np.array([seen, seen])]) == PRIOR_SPREAD
    told = shrink(seen[None], [[3.0, 5.0]], spread=PRIOR_SPREAD)
    assert (told.ctr == shrink(seen[None], [[3.0, 5.0]]).ctr).all()


@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_the_spread_of_others_makes_estimates_better_and_leaves_intervals_right(spread):
    held, told, alone = [], [], []
    for seed in range(3):
        truth, n, x = catalogue(np.random.default_rng([seed, 18]), spread, 200)
        found = creative_spread(np.stack([n, x], axis=1))
        for row in range(200):
            shrunk = shrink(n[row : row + 1], x[row : row + 1], spread=found)
            held.append((truth[row] >= shrunk.ctr_low) & (truth[row] <= shrunk.ctr_high))
            told.append((shrunk.ctr[0] - truth[row]) ** 2)
            alone.append((shrink(n[row : row + 1], x[row : row + 1]).ctr[0] - truth[row]) ** 2)
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.mean(told) < 0.99 * np.mean(alone)


@given(st.lists(count_tables(), max_size=6))
@settings(max_examples=50, deadline=None)
def test_the_spread_of_any_counts_is_one_that_can_be(tables):
    low, high = SPREAD_RANGE
    assert low <= creative_spread(np.stack(table).sum(axis=1) for table in tables) <= high


@given(count_tables())
@settings(max_examples=200, deadline=None)
def test_laws_of_shrinkage(table):
    n, x = table
    found = shrink(n, x)
    assert (found.ctr > 0).all()
    assert (found.ctr < 1).all()
    assert (found.ctr_low < found.ctr_high).all()
    assert found.alpha / (found.alpha + found.beta) == pytest.approx(found.ctr)
    assert all(MIN_STRENGTH * 0.999 <= strength <= MAX_STRENGTH * 1.001 for strength in found.strengths)
    # Shrinkage moves a cell between its own CTR and its creative's, never past either.
    raw = np.where(n > 0, x / np.maximum(n, 1e-300), found.creative_ctr)
    assert (found.ctr <= np.maximum(raw, found.creative_ctr) + 1e-9).all()
    assert (found.ctr >= np.minimum(raw, found.creative_ctr) - 1e-9).all()


@given(count_tables(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_order_of_groups_and_creatives_does_not_matter(table, random):
    n, x = table
    rows, columns = list(range(n.shape[0])), list(range(n.shape[1]))
    random.shuffle(rows)
    random.shuffle(columns)
    place = np.ix_(rows, columns)
    assert shrink(n[place], x[place]).ctr == pytest.approx(shrink(n, x).ctr[place], rel=1e-6)


@pytest.mark.parametrize(
    ("n", "x", "cell"),
    [
        ([[10.0, 5.0]], [[1.0, 6.0]], r"cell \(0, 1\) has 6 clicks of 5 impressions"),
        ([[10.0], [-1.0]], [[1.0], [0.0]], r"cell \(1, 0\) has 0 clicks of -1 impressions"),
        ([[10.0]], [[-2.0]], r"cell \(0, 0\) has -2 clicks"),
        ([[math.nan]], [[0.0]], r"cell \(0, 0\) has 0 clicks of nan"),
        ([[math.inf]], [[0.0]], r"cell \(0, 0\) has 0 clicks of inf"),
        ([[1.0]], [[math.nan]], r"cell \(0, 0\) has nan clicks"),
    ],
)
@pytest.mark.parametrize("function", [shrink, interaction_p_value])
def test_impossible_counts_are_refused_by_cell(function, n, x, cell):
    with pytest.raises(ImpossibleCountError, match=cell):
        function(n, x)


@pytest.mark.parametrize(
    ("n", "x"), [([1.0], [1.0]), ([[1.0]], [[1.0, 0.0]]), (np.zeros((0, 3)), np.zeros((0, 3))), (1.0, 0.0)]
)
@pytest.mark.parametrize("function", [shrink, interaction_p_value])
def test_wrong_shapes_are_refused(function, n, x):
    with pytest.raises(CountsShapeError, match=r"\(G, C\)"):
        function(n, x)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, math.nan])
def test_wrong_levels_are_refused(level):
    with pytest.raises(ProbabilityLevelError):
        shrink([[1.0]], [[0.0]], level=level)
    with pytest.raises(ProbabilityLevelError):
        ratio_interval([1, 1], [0, 1], [1, 1], [0, 1], level=level)


def test_rounding_of_decayed_counts_is_forgiven():
    n = 3.3333333333
    assert shrink([[n]], [[n * (1 + 1e-12)]]).ctr[0, 0] < 1


@pytest.mark.parametrize(("function", "limit_ms"), [(shrink, 1.0), (interaction_p_value, 2.0)])
def test_fast_enough_to_serve(function, limit_ms):
    _, n, x = hierarchical_world(np.random.default_rng(0), 5, 12, 0.05, 300, 300, 200)
    durations_s = []
    for _ in range(50):
        start_s = time.perf_counter()
        function(n, x)
        durations_s.append(time.perf_counter() - start_s)
    assert min(durations_s) * 1e3 < limit_ms
