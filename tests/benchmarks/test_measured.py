from __future__ import annotations

import pytest

from benchmarks.measured import QUICK_SEEDS, REPORTING_SEEDS, over_seeds


@pytest.mark.parametrize(
    ("values", "mean", "low", "high"),
    [
        # Sample deviation 1, t(0.975, 2) = 4.302653: 2 ± 4.302653 / sqrt(3).
        ([1.0, 2.0, 3.0], 2.0, -0.484138, 4.484138),
        # Sample deviation sqrt(0.5), t(0.975, 1) = 12.706205: 0.5 ± 12.706205 * sqrt(0.5) / sqrt(2).
        ([0.0, 1.0], 0.5, -5.853102, 6.853102),
        ([0.7, 0.7, 0.7], 0.7, 0.7, 0.7),
    ],
)
def test_interval_is_students(values: list[float], mean: float, low: float, high: float) -> None:
    metrics = over_seeds({seed: {"x": value} for seed, value in enumerate(values)}).metrics
    assert metrics == pytest.approx({"x": mean, "x_low": low, "x_high": high}, abs=1e-6)


def test_one_seed_has_no_interval() -> None:
    measured = over_seeds({11: {"x": 1.5}})
    assert measured.metrics == {"x": 1.5}
    assert measured.seeds == {"world_0": 11}
    assert measured.detail == {"by_seed": {"11": {"x": 1.5}}}


def test_no_tuning_seed_is_reported() -> None:
    assert not {*REPORTING_SEEDS, *QUICK_SEEDS} & set(range(101, 105))
