from __future__ import annotations

import numpy as np
import pytest

from benchmarks.baselines import creative_ctrs, factorization_machine, logistic
from benchmarks.learn import LearnRun, bench_learn
from benchmarks.measured import Measured
from benchmarks.worlds import BenchWorld
from online.rows import LabelledRows, Rows
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings


@pytest.fixture(scope="module")
def measured(simulator: SimulatorSettings, online: OnlineSettings) -> Measured:
    runs = {"": LearnRun(simulator, 8_000, 4_000, compared=True), "other_": LearnRun(simulator, 2_000, 2_000)}
    return bench_learn(quick=True, seeds=(21, 22), runs=runs, online=online)


def test_every_figure_has_its_interval(measured: Measured) -> None:
    models = ["auroc_batch", "auroc_fm", "auroc_logistic", "auroc_creative_ctr", "rows_ratio_plain"]
    common = ["auroc", "auroc_ceiling", "auroc_share", "ctr", "rows_s"]
    assert {name for name in measured.metrics if not name.endswith(("_low", "_high"))} == {
        *common,
        *models,
        *(f"other_{name}" for name in common),
    }
    for name in (*common, *models):
        assert measured.metrics[f"{name}_low"] <= measured.metrics[name] <= measured.metrics[f"{name}_high"]
    assert all(np.isfinite(value) for value in measured.metrics.values())
    assert measured.seeds == {"world_0": 21, "world_1": 22}


def test_the_ceiling_is_above_every_model_in_every_world(measured: Measured) -> None:
    assert len(measured.detail["by_seed"]) == 2
    for run in measured.detail["by_seed"].values():
        models = [
            value for name, value in run.items() if name.startswith("auroc") and name[6:] not in ("ceiling", "share")
        ]
        assert len(models) == 5
        assert run["auroc_ceiling"] > max(models)
        assert run["auroc_share"] == pytest.approx((run["auroc"] - 0.5) / (run["auroc_ceiling"] - 0.5))


def test_clicks_are_as_common_as_the_world_says(measured: Measured) -> None:
    assert measured.metrics["ctr"] == pytest.approx(0.2, abs=0.02)


def test_a_world_draws_the_same_impressions_again_and_its_ceiling_is_their_mean_ctr(
    simulator: SimulatorSettings, online: OnlineSettings
) -> None:
    world = BenchWorld(simulator, online)
    first, second = (world.draw(30_000, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first.creatives, second.creatives)
    assert np.array_equal(first.clicks, second.clicks)
    for impression in range(0, 30_000, 997):
        assert first.creatives[impression] in world.creative_numbers[first.products[impression]]
    assert world.ceiling(first).mean() == pytest.approx(first.clicks.mean(), abs=0.01)


@pytest.fixture(scope="module")
def opposite() -> tuple[LabelledRows, Rows]:
    """Creative 0 is clicked by users of code 0 and creative 1 by those of code 1; creative 2 by everybody."""
    rng = np.random.default_rng(0)
    creatives = rng.integers(3, size=20_000)
    codes = rng.integers(2, size=20_000)
    p_click = np.where(creatives == 2, 0.6, np.where(creatives == codes, 0.4, 0.05))
    clicks = (rng.random(20_000) < p_click).astype(np.float32)
    rows = Rows(np.zeros(20_000, np.int64), creatives, codes[:, None].astype(np.uint8))
    asked = Rows(np.zeros(5, np.int64), np.array([0, 0, 1, 1, 2]), np.array([[0], [1], [0], [1], [0]], np.uint8))
    return LabelledRows(rows, clicks, np.ones(20_000, np.float32)), asked


def test_a_creatives_ctr_is_the_same_for_everybody(opposite: tuple[LabelledRows, Rows]) -> None:
    assert creative_ctrs(*opposite) == pytest.approx([0.225, 0.225, 0.225, 0.225, 0.6], abs=0.02)


def test_the_baselines_that_see_attributes_find_who_likes_what(opposite: tuple[LabelledRows, Rows]) -> None:
    expected = [0.4, 0.05, 0.05, 0.4, 0.6]
    assert logistic(*opposite) == pytest.approx(expected, abs=0.06)
    learnt, asked = opposite
    again = LabelledRows.concatenate([learnt] * 8)
    assert factorization_machine(again, asked, seed=0) == pytest.approx(expected, abs=0.06)
