"""What is known of users makes their missing values more or less probable, exactly as often as they are so."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.attributes import ATTRIBUTES, draw_users, value_chances


@pytest.mark.parametrize("attribute", ["age", "gender", "child_age"])
def test_chances_of_missing_values_are_calibrated_and_better_than_the_shares(attribute: str) -> None:
    _, codes = draw_users(20_000, np.random.default_rng(1))
    known = np.ones(codes.shape, bool)
    column = list(ATTRIBUTES).index(attribute)
    known[:, column] = False
    chances = value_chances(codes, known, attribute)
    assert chances.sum(axis=1) == pytest.approx(np.ones(len(codes)))
    truth = np.eye(chances.shape[1])[codes[:, column]]
    for value in range(chances.shape[1]):
        order = np.argsort(chances[:, value])
        for part in np.array_split(order, 4):
            spread = np.sqrt(chances[part, value].mean() / len(part))
            assert truth[part, value].mean() == pytest.approx(chances[part, value].mean(), abs=4.5 * spread + 1e-3)
    shares = truth.mean(axis=0)
    assert (truth * np.log(chances)).sum() > (truth * np.log(np.maximum(shares, 1e-9))).sum()


def test_a_known_value_is_certain() -> None:
    _, codes = draw_users(50, np.random.default_rng(2))
    chances = value_chances(codes, np.ones(codes.shape, bool), "age")
    assert np.array_equal(chances.argmax(axis=1), codes[:, list(ATTRIBUTES).index("age")])
    assert (chances.max(axis=1) == 1).all()
