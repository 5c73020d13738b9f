"""Wilson's interval of a share."""

from __future__ import annotations

import pytest

from generator.wilson import wilson_interval


def test_an_interval_is_wilsons() -> None:
    low, high = wilson_interval(40 / 1_000, 1_000)
    assert (low, high) == pytest.approx((0.0296, 0.0540), abs=5e-4)
    assert wilson_interval(0 / 100, 100)[0] == pytest.approx(0.0, abs=1e-12)
