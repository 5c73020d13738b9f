"""Comparisons, tests and intervals of CTRs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, special, stats

from online.ctr import CountsShapeError, ImpossibleCountError
from online.significance import BetaParameterError, interaction_p_value, p_better, ratio_interval
from tests.online.tables import count_tables


def p_better_exact(alpha_a, beta_a, alpha_b, beta_b):
    """Return P(A > B) by adaptive quadrature over the logit of B."""

    def integrand(t):
        log_density = -alpha_b * np.logaddexp(0, -t) - beta_b * np.logaddexp(0, t) - special.betaln(alpha_b, beta_b)
        return math.exp(log_density) * special.betainc(beta_a, alpha_a, special.expit(-t))

    mode = math.log(alpha_b / beta_b)
    reach = (50 / alpha_b + 10, 50 / beta_b + 10)
    points = [mode - 1, mode, mode + 1]
    value, _ = integrate.quad(integrand, mode - reach[0], mode + reach[1], points=points, limit=500, epsabs=1e-7)
    return value


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((8, 8), (8, 8)),
        ((8, 2000), (12, 1800)),
        ((9, 60), (250, 2200)),
        ((40, 760), (60, 940)),
        ((3000, 97000), (2900, 97000)),
        ((1, 19), (1, 19)),
        ((1, 19), (3, 300)),
        ((0.5, 40), (7, 90)),
        ((2, 3), (30, 900)),
        ((0.3, 5), (0.4, 1000)),
        ((5, 0.7), (0.9, 0.5)),
        ((1.5, 1e5), (1.2, 1e5)),
    ],
)
def test_p_better_agrees_with_adaptive_quadrature(a, b):
    assert float(p_better(*a, *b)) == pytest.approx(p_better_exact(*a, *b), abs=5e-4 if min(*a, *b) >= 8 else 1e-6)


def test_p_better_agrees_with_draws():
    rng = np.random.default_rng(3)
    a, b = rng.beta(4, 60, 400_000), rng.beta(9, 200, 400_000)
    assert float(p_better(4, 60, 9, 200)) == pytest.approx((a > b).mean(), abs=3e-3)


@given(hnp.arrays(float, (4, 5), elements=st.floats(0.3, 1e5)))
@settings(max_examples=200, deadline=None)
def test_p_better_is_antisymmetric_and_a_probability(parameters):
    alpha_a, beta_a, alpha_b, beta_b = parameters
    p = p_better(alpha_a, beta_a, alpha_b, beta_b)
    assert ((p >= 0) & (p <= 1)).all()
    assert p + p_better(alpha_b, beta_b, alpha_a, beta_a) == pytest.approx(1.0, abs=1e-6)


def test_p_better_broadcasts():
    p = p_better([[20.0], [30.0]], 400.0, [20.0, 25.0, 30.0], 400.0)
    assert p.shape == (2, 3)
    assert p[0, 0] == pytest.approx(0.5)
    assert (np.diff(p, axis=1) < 0).all()
    assert (p[1] > p[0]).all()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_p_better_refuses_impossible_parameters(value):
    with pytest.raises(BetaParameterError, match="beta_a"):
        p_better(1.0, value, 1.0, 1.0)


def logistic_table(rng, n_groups, n_creatives, ctr, n_mean, interaction=0.0):
    """Return counts of groups that click more or less, and creatives that are better or worse."""
    effects = (
        special.logit(ctr)
        + 0.3 * rng.normal(size=(n_groups, 1))
        + 0.3 * rng.normal(size=(1, n_creatives))
        + interaction * rng.normal(size=(n_groups, n_creatives))
    )
    n = rng.poisson(rng.gamma(2, n_mean / 2, effects.shape))
    return n.astype(float), rng.binomial(n, special.expit(effects)).astype(float)


@pytest.mark.parametrize(
    ("n_groups", "n_creatives", "ctr", "n_mean"),
    [(3, 8, 0.06, 100), (5, 12, 0.05, 60), (2, 6, 0.015, 1000), (4, 8, 0.06, 600), (5, 10, 0.02, 2000)],
)
def test_false_positives_of_the_interaction_test(n_groups, n_creatives, ctr, n_mean):
    rng = np.random.default_rng([13, n_groups, n_mean])
    p = np.array([interaction_p_value(*logistic_table(rng, n_groups, n_creatives, ctr, n_mean)) for _ in range(400)])
    assert 0.02 <= (p < 0.05).mean() <= 0.08
    assert stats.kstest(p, "uniform").statistic < 0.12


@pytest.mark.parametrize(
    ("n_groups", "n_creatives", "ctr", "n_mean"),
    [(3, 8, 0.06, 10), (5, 12, 0.05, 10), (2, 2, 0.02, 100), (5, 3, 0.001, 300)],
)
def test_few_clicks_make_the_interaction_test_cautious(n_groups, n_creatives, ctr, n_mean):
    rng = np.random.default_rng([17, n_groups, n_mean])
    p = np.array([interaction_p_value(*logistic_table(rng, n_groups, n_creatives, ctr, n_mean)) for _ in range(400)])
    assert (p < 0.05).mean() <= 0.08


@pytest.mark.parametrize(
    ("n_groups", "n_creatives", "ctr", "n_mean", "least"),
    [(3, 8, 0.06, 200, 0.8), (4, 8, 0.06, 400, 0.95), (5, 10, 0.02, 2000, 0.99)],
)
def test_power_of_the_interaction_test(n_groups, n_creatives, ctr, n_mean, least):
    rng = np.random.default_rng([19, n_groups, n_mean])
    p = [interaction_p_value(*logistic_table(rng, n_groups, n_creatives, ctr, n_mean, 0.5)) for _ in range(100)]
    assert np.mean(np.array(p) < 0.05) >= least


@pytest.mark.parametrize(
    ("n", "x", "expected"),
    [
        pytest.param([[1000.0, 1000.0]], [[50.0, 90.0]], 1.0, id="one group"),
        pytest.param([[1000.0], [1000.0]], [[50.0], [90.0]], 1.0, id="one creative"),
        pytest.param(np.zeros((3, 4)), np.zeros((3, 4)), 1.0, id="nothing seen"),
        pytest.param(np.full((3, 4), 100.0), np.zeros((3, 4)), 1.0, id="no click"),
        pytest.param(np.full((3, 4), 100.0), np.full((3, 4), 100.0), 1.0, id="clicks only"),
        pytest.param([[1000.0, 0.0], [0.0, 1000.0]], [[50.0, 0.0], [0.0, 90.0]], 1.0, id="groups share no creative"),
        pytest.param([[1000.0, 1000.0], [1000.0, 0.0]], [[50.0, 90.0], [70.0, 0.0]], 1.0, id="a tree of cells"),
        pytest.param(np.full((3, 4), 1e6), np.full((3, 4), 5e4), 1.0, id="exactly alike"),
    ],
)
def test_interaction_without_anything_to_test(n, x, expected):
    assert interaction_p_value(n, x) == pytest.approx(expected)


def test_interaction_agrees_with_a_textbook_table():
    # Two groups, two creatives: the statistic is the deviance of the model without interaction, df 1.
    n = np.array([[4000.0, 4000.0], [4000.0, 4000.0]])
    x = np.array([[200.0, 260.0], [240.0, 220.0]])
    misses = n - x

    # Maximum likelihood by hand: one common odds ratio of creatives, solved on the two group margins.
    def deviance(effect):
        total = 0.0
        for g in range(2):
            low, high = -20.0, 20.0
            for _ in range(200):
                middle = 0.5 * (low + high)
                fitted = n[g] * special.expit(middle + np.array([0.0, effect]))
                low, high = (middle, high) if fitted.sum() < x[g].sum() else (low, middle)
            total += 2 * float((x[g] * np.log(x[g] / fitted) + misses[g] * np.log(misses[g] / (n[g] - fitted))).sum())
        return total

    smallest = min(deviance(effect) for effect in np.linspace(0.0, 0.2, 401))
    assert interaction_p_value(n, x) == pytest.approx(stats.chi2.sf(smallest, 1), rel=0.02)


def test_empty_groups_and_creatives_change_nothing():
    rng = np.random.default_rng(23)
    n, x = logistic_table(rng, 3, 6, 0.05, 300, 0.2)
    padded_n, padded_x = np.zeros((5, 8)), np.zeros((5, 8))
    padded_n[1:4, 1:7], padded_x[1:4, 1:7] = n, x
    assert interaction_p_value(padded_n, padded_x) == pytest.approx(interaction_p_value(n, x))


@given(count_tables())
@settings(max_examples=200, deadline=None)
def test_interaction_p_value_is_a_probability(table):
    assert 0.0 <= interaction_p_value(*table) <= 1.0


def arm_of_users(rng, n_users, n_mean, ctr, spread, n_buckets=64):
    """Return bucketed counts of users whose own CTRs and numbers of impressions differ."""
    own = np.clip(rng.lognormal(-(spread**2) / 2, spread, n_users) * ctr, 0, 0.9)
    n = rng.poisson(rng.gamma(1, n_mean, n_users))
    bucket = rng.integers(0, n_buckets, n_users)
    return np.bincount(bucket, n, n_buckets), np.bincount(bucket, rng.binomial(n, own), n_buckets)


@pytest.mark.parametrize(
    ("n_users", "n_mean", "ctr", "spread"), [(2000, 5, 0.05, 0.8), (500, 20, 0.05, 1.0), (5000, 10, 0.015, 1.0)]
)
def test_ratio_interval_holds_for_clustered_clicks(n_users, n_mean, ctr, spread):
    rng = np.random.default_rng([29, n_users])
    held, ratios = [], []
    for _ in range(400):
        a, b = arm_of_users(rng, n_users, n_mean, 1.2 * ctr, spread), arm_of_users(rng, n_users, n_mean, ctr, spread)
        found = ratio_interval(*a, *b)
        held.append(found.low <= 1.2 <= found.high)
        ratios.append(found.ratio)
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.median(ratios) == pytest.approx(1.2, rel=0.03)


def test_ratio_interval_is_wider_than_one_that_ignores_users():
    rng = np.random.default_rng(31)
    a, b = arm_of_users(rng, 300, 60, 0.05, 1.2), arm_of_users(rng, 300, 60, 0.05, 1.2)
    found = ratio_interval(*a, *b)
    binomial = 2 * 1.96 * math.sqrt(1 / a[1].sum() + 1 / b[1].sum())
    assert math.log(found.high / found.low) > 1.5 * binomial


def test_ratio_interval_turns_over_with_its_arms():
    rng = np.random.default_rng(37)
    a, b = arm_of_users(rng, 500, 10, 0.06, 0.5), arm_of_users(rng, 400, 10, 0.05, 0.5)
    there, back = ratio_interval(*a, *b), ratio_interval(*b, *a)
    assert (1 / back.ratio, 1 / back.high, 1 / back.low) == pytest.approx(tuple(there))


@pytest.mark.parametrize(
    ("x_a", "x_b", "ratio"), [([0, 0], [1, 2], 0.0), ([1, 2], [0, 0], math.inf), ([0, 0], [0, 0], math.nan)]
)
def test_ratio_without_clicks_is_unknown_in_scale(x_a, x_b, ratio):
    found = ratio_interval([50, 50], x_a, [50, 50], x_b)
    assert found.ratio == pytest.approx(ratio, nan_ok=True)
    assert (found.low, found.high) == (0.0, math.inf)


def test_ratio_of_an_arm_without_impressions_is_unknown():
    found = ratio_interval([0, 0], [0, 0], [50, 50], [1, 2])
    assert math.isnan(found.ratio)
    assert (found.low, found.high) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 1, 1], [0, 0, 0], [1, 1], [0, 0]), CountsShapeError, "the same|one length"),
        (([1], [0], [1], [0]), CountsShapeError, "at least two buckets"),
        (([5, 5], [1, 6], [5, 5], [1, 1]), ImpossibleCountError, r"cell \(1\) has 6 clicks of 5"),
    ],
)
def test_ratio_interval_refuses_impossible_buckets(arguments, error, message):
    with pytest.raises(error, match=message):
        ratio_interval(*arguments)
