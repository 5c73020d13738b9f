"""The policy: exact chances, never without exploring, and two arms of equal size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.policy import ARMS, add_prior, arm_of, best_chances
from state.records import CreativeRecord

counts = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 10_000)), min_size=1, max_size=8)


@given(counts, st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**32))
def test_chances_sum_to_1_and_keep_the_floor(
    of: list[tuple[int, int]], n_groups: int, explore_share: float, seed: int
) -> None:
    alpha = np.tile([1.0 + clicks for clicks, _ in of], (n_groups, 1))
    beta = np.tile([19.0 + others for _, others in of], (n_groups, 1))
    rng = np.random.default_rng(seed)
    chances = best_chances(alpha, beta, n_draws=64, explore_share=explore_share, rng=rng)
    assert chances.shape == alpha.shape
    assert chances.sum(axis=1) == pytest.approx(np.ones(n_groups))
    assert (chances >= explore_share / len(of) - 1e-12).all()
    assert (chances <= 1 + 1e-12).all()


def test_the_best_creative_of_each_group_gets_most() -> None:
    alpha = np.array([[60.0, 20.0, 20.0], [20.0, 20.0, 60.0]])
    beta = 1_000 - alpha
    chances = best_chances(alpha, beta, n_draws=2_000, explore_share=0.12, rng=np.random.default_rng(0))
    assert chances.argmax(axis=1).tolist() == [0, 2]
    assert chances[0] == pytest.approx([0.92, 0.04, 0.04], abs=0.005)
    assert chances[1] == pytest.approx([0.04, 0.04, 0.92], abs=0.005)


def test_creatives_of_which_nothing_is_known_share_alike() -> None:
    chances = best_chances(
        np.ones((1, 4)), np.full((1, 4), 19.0), n_draws=20_000, explore_share=0.0, rng=np.random.default_rng(0)
    )
    assert chances[0] == pytest.approx([0.25] * 4, abs=0.015)


def test_chances_are_the_probability_of_being_the_best() -> None:
    # Of Beta(1, 1) and Beta(2, 1), the second is the larger with probability 2/3.
    chances = best_chances(
        np.array([[1.0, 2.0]]), np.ones((1, 2)), n_draws=40_000, explore_share=0.0, rng=np.random.default_rng(0)
    )
    assert chances[0, 1] == pytest.approx(2 / 3, abs=0.01)


def test_exploring_only_is_uniform() -> None:
    alpha, beta = np.array([[500.0, 1.0]]), np.array([[1.0, 500.0]])
    rng = np.random.default_rng(0)
    assert best_chances(alpha, beta, n_draws=16, explore_share=1.0, rng=rng).tolist() == [[0.5, 0.5]]
    assert best_chances(alpha, beta, n_draws=16, explore_share=0.0, rng=rng).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("experiment", ["groups", "another", "x"])
@pytest.mark.parametrize("pattern", ["u{:06d}", "{}", "user-{}@shop.example"])
def test_half_of_the_users_are_in_each_arm(experiment: str, pattern: str) -> None:
    arms = [arm_of(experiment, pattern.format(n)) for n in range(10_000)]
    assert set(arms) == set(ARMS)
    # Five standard errors of a fair coin.
    assert arms.count("group") == pytest.approx(5_000, abs=250)


def test_a_user_stays_in_an_arm_and_experiments_split_independently() -> None:
    users = [f"u{n}" for n in range(4_000)]
    first = [arm_of("one", user) for user in users]
    assert first == [arm_of("one", user) for user in users]
    second = [arm_of("two", user) for user in users]
    both = sum(a == b for a, b in zip(first, second, strict=True))
    assert both == pytest.approx(2_000, abs=200)


@pytest.mark.parametrize(
    ("others", "ctr"),
    [((1_000.0, 50.0), 0.05), ((0.0, 0.0), 0.08)],
    ids=["of the group's other creatives", "of the product where the group has seen none"],
)
def test_a_prior_counts_as_impressions_at_the_ctr(others: tuple[float, float], ctr: float) -> None:
    creative = CreativeRecord(2, "new", "p", None, None, None, "generated", 1, "shift-1", 0, 0, b"", 1.5, 80.0)
    impressions, clicks = np.zeros((2, 2)), np.zeros((2, 2))
    impressions[1, 0], clicks[1, 0] = others
    impressions[1, 1], clicks[1, 1] = 10.0, 1.0  # what it has really had is no part of the CTR that it is measured by
    add_prior(impressions, clicks, (1, 1), creative, product_ctr=0.08)
    assert impressions[1, 1] == 90.0
    assert clicks[1, 1] == pytest.approx(1.0 + 80.0 * 1.5 * ctr, rel=0.001)
    assert not impressions[0].any()
    assert (impressions[1, 0], clicks[1, 0]) == others


def test_a_prior_never_has_more_clicks_than_impressions() -> None:
    creative = CreativeRecord(2, "new", "p", None, None, None, "generated", 0, "shift-1", 0, 0, b"", 90.0, 80.0)
    impressions, clicks = np.array([[100.0, 0.0]]), np.array([[60.0, 0.0]])
    add_prior(impressions, clicks, (0, 1), creative, product_ctr=0.08)
    assert clicks[0, 1] == impressions[0, 1] == 80.0
