"""What a GRM's word is worth: nothing while it may be guessing, and what a simulation says where it is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator.prior import MAX_DEVIATIONS, correlation, grm_prior

MANY = 10**9


@pytest.mark.parametrize(
    ("accuracy", "n_pairs", "expected"),
    [
        (0.5, MANY, 0.0),
        (0.75, MANY, math.sin(math.pi / 4)),
        (1.0, MANY, 0.99),
        (0.75, 0, 0.0),
        (0.6, 50, 0.0),  # 0.46 to 0.72: it may be guessing
        (0.3, 10_000, 0.0),
    ],
)
def test_a_grm_that_may_be_guessing_is_not_believed(accuracy: float, n_pairs: int, expected: float) -> None:
    assert correlation(accuracy, n_pairs) == pytest.approx(expected, abs=1e-4)


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_more_pairs_of_the_same_accuracy_are_believed_more(accuracy: float, n_pairs: int) -> None:
    assert correlation(accuracy, n_pairs) <= correlation(accuracy, 2 * n_pairs) + 1e-9


@pytest.mark.parametrize("r", [0.3, 0.7])
def test_accuracy_gives_back_the_correlation_that_made_it(r: float) -> None:
    rng = np.random.default_rng(0)
    value = rng.standard_normal((200_000, 2))
    score = r * value + math.sqrt(1 - r**2) * rng.standard_normal(value.shape)
    agree = (value[:, 0] > value[:, 1]) == (score[:, 0] > score[:, 1])
    assert correlation(float(agree.mean()), MANY) == pytest.approx(r, abs=0.01)


def test_the_lift_is_what_creatives_with_such_odds_have() -> None:
    r, spread = 0.6, 0.25
    rng = np.random.default_rng(1)
    value = spread * rng.standard_normal((400_000, 2))  # log-CTRs of a new creative and of a typical one
    score = r * value / spread + math.sqrt(1 - r**2) * rng.standard_normal(value.shape)
    alike = np.abs(score[:, 0] - score[:, 1] - 1.0) < 0.05
    p = float((value[alike, 0] > value[alike, 1]).mean())
    prior = grm_prior(math.log(p / (1 - p)), r, ctr=0.05, spread=spread)
    assert prior is not None
    assert math.log(prior.relative_ctr) == pytest.approx((value[alike, 0] - value[alike, 1]).mean(), abs=0.01)


@given(st.floats(-60, 60), st.floats(0.01, 0.99), st.floats(0.001, 0.5), st.floats(0.05, 1.0))
def test_priors_are_bounded_and_follow_the_odds(log_odds: float, r: float, ctr: float, spread: float) -> None:
    prior = grm_prior(log_odds, r, ctr=ctr, spread=spread)
    assert prior is not None
    assert abs(math.log(prior.relative_ctr)) <= MAX_DEVIATIONS * r * spread * math.sqrt(2) + 1e-9
    assert (prior.relative_ctr >= 1.0) == (log_odds >= 0.0) or math.isclose(prior.relative_ctr, 1.0)
    assert prior.n_impressions > 0


def test_the_worth_in_impressions_is_what_the_docstring_says() -> None:
    prior = grm_prior(0.0, math.sqrt(0.5), ctr=0.06, spread=0.25)
    assert prior is not None
    assert prior.relative_ctr == pytest.approx(1.0)
    assert prior.n_impressions == pytest.approx(0.94 / (0.06 * 0.0625))


def test_no_word_no_prior() -> None:
    assert grm_prior(2.0, 0.0, ctr=0.05, spread=0.25) is None
