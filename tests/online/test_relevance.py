"""Relevance: zero on average where an attribute does not matter, and the attribute that does stands out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from online.relevance import MIN_USERS, attribute_relevance

CARDINALITIES = (2, 5, 12)
N_IMAGES, DIM = 20, 6


def found(seed: int, n: int, driver: int | None, strength: float = 0.8) -> npt.NDArray[np.float64]:
    """Relevance of the attributes where users click by the driver's value times an image's first coordinate."""
    rng = np.random.default_rng(seed)
    attributes = np.stack([rng.integers(c, size=n) for c in CARDINALITIES], axis=1).astype(np.uint8)
    images = rng.standard_normal((N_IMAGES, DIM))
    values = images[rng.integers(N_IMAGES, size=n)]
    taste = 0.0 if driver is None else strength * (2 * (attributes[:, driver] % 2) - 1.0) * values[:, 0]
    p_click = 1 / (1 + np.exp(2.5 - taste))
    clicks = rng.random(n) < p_click
    return attribute_relevance(clicks - clicks.mean(), values, attributes, CARDINALITIES)


@pytest.mark.parametrize("driver", range(3))
def test_the_attribute_that_decides_stands_out(driver: int) -> None:
    for seed in range(5):
        relevance = found(seed, 4_000, driver)
        assert relevance.argmax() == driver
        assert relevance[driver] > 5


def test_without_a_driver_relevance_is_zero_on_average_and_one_in_spread() -> None:
    drawn = np.array([found(seed, 1_500, None) for seed in range(300)])
    assert np.abs(drawn.mean(axis=0)).max() < 4 / np.sqrt(300)
    assert drawn.std(axis=0) == pytest.approx(np.ones(3), abs=0.2)
    assert (drawn.max(axis=1) > 5).mean() < 0.01


def test_values_of_few_users_and_images_that_do_not_differ_say_nothing() -> None:
    attributes = np.zeros((100, 2), np.uint8)
    attributes[: MIN_USERS - 1, 0] = 1
    attributes[:50, 1] = 1
    residuals = np.linspace(-1, 1, 100)
    rng = np.random.default_rng(0)
    assert attribute_relevance(residuals, rng.standard_normal((100, 3)), attributes, (2, 2))[0] == 0
    assert (attribute_relevance(residuals, np.zeros((100, 3)), attributes, (2, 2)) == 0).all()
