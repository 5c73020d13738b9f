from __future__ import annotations

import numpy as np
import pytest

from benchmarks import learn
from benchmarks.measured import Measured
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings


@pytest.fixture(scope="module")
def measured(simulator: SimulatorSettings, online: OnlineSettings) -> Measured:
    return learn.bench_learn(quick=True, seeds=(21, 22), simulator=simulator, online=online)


def test_every_figure_has_its_interval(measured: Measured) -> None:
    for name in ("auroc", "auroc_ceiling", "auroc_creative_ctr", "auroc_logistic"):
        assert 0.3 < measured.metrics[name] < 1.0
    names = ("auroc", "auroc_ceiling", "auroc_share", "auroc_creative_ctr", "auroc_logistic", "rows_s", "ctr")
    for name in names:
        assert measured.metrics[f"{name}_low"] <= measured.metrics[name] <= measured.metrics[f"{name}_high"]
    assert all(np.isfinite(value) for value in measured.metrics.values())
    assert measured.metrics["rows_s"] > 0
    assert measured.seeds == {"world_0": 21, "world_1": 22}


def test_the_ceiling_is_above_every_model_in_every_world(measured: Measured) -> None:
    assert len(measured.detail["by_seed"]) == 2
    for run in measured.detail["by_seed"].values():
        assert run["auroc_ceiling"] > max(run["auroc"], run["auroc_creative_ctr"], run["auroc_logistic"])
        assert run["auroc_share"] == pytest.approx((run["auroc"] - 0.5) / (run["auroc_ceiling"] - 0.5))


def test_clicks_are_as_common_as_the_world_says(measured: Measured) -> None:
    assert measured.metrics["ctr"] == pytest.approx(0.2, abs=0.02)
