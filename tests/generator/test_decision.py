"""A refresh is made where it gains more than it costs, within the budget; gains are those of a simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator.decision import Decision, decide, expected_improvement, largest_of
from generator.settings import RefreshSettings

SETTINGS = RefreshSettings(value_per_click=0.1, cost_per_image=0.01, budget_per_product_day=1.0, horizon_days=10.0)


def decided(settings: RefreshSettings = SETTINGS, **changed: Any) -> Decision:
    numbers: dict[str, Any] = {
        "best_ctr": 0.06,
        "expected_ctr": 0.05,
        "deviation": 0.3,
        "r": 0.0,
        "n_candidates": 4,
        "n_images": 1,
        "impressions_per_day": 1_000.0,
        "budget_left": 1.0,
        "is_ordered": False,
    }
    return decide(settings, **{**numbers, **changed})


@pytest.mark.parametrize(("median", "deviation", "best"), [(0.05, 0.3, 0.06), (0.05, 0.05, 0.2), (0.08, 0.5, 0.05)])
def test_the_improvement_is_that_of_the_better_of_both(median: float, deviation: float, best: float) -> None:
    x = median * np.exp(deviation * np.random.default_rng(0).standard_normal(400_000))
    assert expected_improvement(median, deviation, best) == pytest.approx(np.maximum(x - best, 0).mean(), abs=1e-4)


@given(st.floats(1e-4, 0.5), st.floats(0, 1.0), st.floats(0, 0.5))
def test_an_improvement_is_never_negative_and_less_than_a_better_best_leaves(
    median: float, deviation: float, best: float
) -> None:
    gain = expected_improvement(median, deviation, best)
    assert gain >= 0.0
    assert gain >= expected_improvement(median, deviation, best + 0.01) - 1e-12
    assert gain >= median - best - 1e-12


def test_the_largest_of_n_normals() -> None:
    draws = np.random.default_rng(0).standard_normal((100_000, 16))
    for n in (1, 2, 4, 16):
        assert largest_of(n) == pytest.approx(draws[:, :n].max(axis=1).mean(), abs=0.03)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"impressions_per_day": 1.0}, "clicks more are expected in 10 days"),
        ({"best_ctr": 0.5}, "clicks more are expected in 10 days"),
        ({"deviation": 0.0}, "0.00 clicks more are expected"),
        ({"budget_left": 0.005}, "0.005 is left of generator.refresh.budget_per_product_day = 1"),
        ({"n_images": 101}, "it would cost 1.01 and 1 is left"),
        ({"impressions_per_day": 0.0, "is_ordered": True}, None),
        ({"budget_left": -3.0, "is_ordered": True}, None),
    ],
)
def test_it_is_made_where_it_is_worth_it_and_can_be_paid(changed: dict[str, Any], said: str | None) -> None:
    refused = decided(**changed).refused
    assert refused is None if said is None else said in (refused or "")


def test_a_good_grm_makes_more_of_the_same_words() -> None:
    without, with_grm = decided(), decided(r=0.7)
    assert with_grm.gained_clicks > without.gained_clicks
    assert with_grm.expected_ctr > without.expected_ctr
    assert with_grm.deviation < without.deviation
    assert decided(r=0.7, n_candidates=16).gained_clicks > with_grm.gained_clicks
