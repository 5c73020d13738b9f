"""The benchmark of changing tastes: every figure is there, and a run goes on from a saved one as if undisturbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.core_run import CoreRun
from benchmarks.learn import predict
from benchmarks.measured import Measured
from benchmarks.shift import KINDS, ShiftRun, bench_shift
from benchmarks.worlds import BenchWorld
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings
from state.store import Store


@pytest.fixture(scope="module")
def measured(simulator: SimulatorSettings, online: OnlineSettings) -> Measured:
    return bench_shift(quick=True, seeds=(21,), run=ShiftRun(simulator, 16_000, 12_000, 4_000, 2, 4_000), online=online)


def test_every_figure_is_there_and_possible(measured: Measured) -> None:
    shares = {"found_share", "soon_share", "nmi_share", "nmi", "others_nmi"}
    detected = ["impressions_to_detect_first", "impressions_to_detect", "impressions_to_detect_last"]
    counts = {*detected, "impressions_to_nmi"}
    assert set(measured.metrics) == {
        "nmi_before",
        "false_alarms_per_million",
        *(f"{kind}_{name}" for kind in KINDS for name in (*shares, *counts, "others_auroc_loss")),
    }
    for kind in KINDS:
        assert all(0 <= measured.metrics[f"{kind}_{name}"] <= 1 for name in shares)
        assert all(0 < measured.metrics[f"{kind}_{name}"] <= 12_000 for name in counts)
        in_order = [measured.metrics[f"{kind}_{name}"] for name in detected]
        assert in_order == sorted(in_order)
        assert abs(measured.metrics[f"{kind}_others_auroc_loss"]) < 0.5


def test_a_branch_goes_on_as_the_run_that_was_saved(
    simulator: SimulatorSettings, online: OnlineSettings, tmp_path: Path
) -> None:
    world = BenchWorld(simulator.model_copy(update={"seed": 22}), online)
    run = CoreRun(world, online, micro_batch_rows=500)
    for _ in run.work_off(world.draw(4_000, np.random.default_rng(1))):
        pass
    with Store(tmp_path, sync=False) as store:
        run.save(store)
        branch = run.branch(world, store)
    rest = world.draw(2_000, np.random.default_rng(2))
    for (_, groups, _), (_, again, _) in zip(run.work_off(rest), branch.work_off(rest), strict=True):
        assert np.array_equal(groups, again)
    asked = world.rows(rest).rows
    assert np.array_equal(predict(run.core.learner, asked), predict(branch.core.learner, asked))
    users = np.arange(200)
    for product in range(world.n_products):
        assert np.array_equal(run.groups(product, users), branch.groups(product, users))


def test_a_world_that_shifts_changes_the_named_categories_alone(
    simulator: SimulatorSettings, online: OnlineSettings
) -> None:
    world = BenchWorld(simulator.model_copy(update={"seed": 23}), online)
    (changed,) = world.world.draw_categories(1, np.random.default_rng(0))
    after = world.shifted([changed], "driver")
    same = [
        np.array_equal(world.segment_ctrs(product), after.segment_ctrs(product)) for product in range(world.n_products)
    ]
    assert same == [category != changed for category in world.world.product_categories]
