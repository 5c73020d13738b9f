"""The benchmarks of groups and of their value: figures that a world with known tastes must give."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.core_run import CoreRun
from benchmarks.groups import GroupRun, bench_group
from benchmarks.learn import of_form
from benchmarks.measured import Measured
from benchmarks.value import ValueRun, bench_value
from benchmarks.worlds import BenchWorld
from online.ctr import SPREAD_RANGE
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings

RATED_PER_PRODUCT = (100, 500)


@pytest.fixture(scope="module")
def flat(simulator: SimulatorSettings) -> SimulatorSettings:
    return simulator.model_copy(update={"world": simulator.world.model_copy(update={"taste_strength": 0.0})})


@pytest.fixture(scope="module")
def measured(simulator: SimulatorSettings, flat: SimulatorSettings, online: OnlineSettings) -> Measured:
    runs = {
        "": GroupRun(simulator, 24_000, rated_per_product=RATED_PER_PRODUCT),
        "flat_": GroupRun(flat, 12_000),
        "paper_": GroupRun(simulator, 3_000, "paper"),
    }
    return bench_group(quick=True, seeds=(21,), runs=runs, online=online)


def test_value_is_rated_on_the_way(measured: Measured, simulator: SimulatorSettings, online: OnlineSettings) -> None:
    rated = bench_value(quick=True, seeds=(21,), runs={"": ValueRun(simulator, RATED_PER_PRODUCT)}, online=online)
    assert rated.metrics == {name: measured.metrics[name] for name in rated.metrics}


def test_every_figure_is_a_share(measured: Measured) -> None:
    shares = ("auroc", "nmi", "k1_share", "id_churn", "k_near_share", "ndcg_between_groups", "ndcg_null_split")
    for prefix in ("", "flat_", "paper_"):
        for name in shares:
            assert 0 <= measured.metrics[prefix + name] <= 1, prefix + name
        for name in ("ari_batch", "ari_batch_same_rule"):
            assert -1 <= measured.metrics[prefix + name] <= 1


def test_groups_differ_where_tastes_do_and_not_where_they_do_not(measured: Measured) -> None:
    assert measured.metrics["k1_share"] <= 0.5
    assert measured.metrics["flat_k1_share"] >= 0.8
    assert measured.metrics["nmi"] > measured.metrics["flat_nmi"] + 0.2
    assert measured.metrics["ndcg_between_groups"] < measured.metrics["ndcg_null_split"]


def test_the_papers_form_groups_by_the_embedding(online: OnlineSettings) -> None:
    assert of_form(online, "paper").groups.space == "embedding"
    assert of_form(online, "shipped") == online


def test_value_lies_between_chance_and_the_oracle_and_groups_are_worth_nothing_where_users_are_equal(
    simulator: SimulatorSettings, flat: SimulatorSettings, online: OnlineSettings
) -> None:
    runs = {"": ValueRun(simulator, (500, 5_000)), "flat_": ValueRun(flat, (3_000,))}
    metrics = bench_value(quick=True, seeds=(21,), runs=runs, online=online).metrics
    for name, value in metrics.items():
        assert -0.5 <= value <= 1 or name.endswith("uplift"), name
    for at in (500, 5_000):
        difference = metrics[f"group_share_{at}"] - metrics[f"all_share_{at}"]
        assert metrics[f"excess_{at}"] == pytest.approx(difference)
    assert metrics["group_share_5000"] > max(metrics["all_share_5000"], 0.5)
    assert abs(metrics["flat_excess_3000"]) < 0.1
    assert metrics["oracle_uplift"] > metrics["flat_oracle_uplift"] > 0


def test_every_group_has_its_best_creative(simulator: SimulatorSettings, online: OnlineSettings) -> None:
    world = BenchWorld(simulator.model_copy(update={"seed": 21}), online)
    course = CoreRun(world, online, micro_batch_rows=500)
    assert course.best_creatives(0, course.creative_spread())[1] == {}
    assert course.version(0) == 0
    for _ in course.work_off(world.draw(20_000, np.random.default_rng(1))):
        pass
    by_group, spread = 0, course.creative_spread()
    assert SPREAD_RANGE[0] < spread < SPREAD_RANGE[1]
    for product in range(world.n_products):
        groups = course.core.grouping.groups_of(world.registry.product_ids[product])
        assert groups is not None
        for_all, best = course.best_creatives(product, spread)
        n_creatives = len(world.creative_numbers[product])
        assert all(0 <= creative < n_creatives for creative in (for_all, *best.values()))
        assert set(best) == {group.group_id for group in groups.groups}
        by_group += len(set(best.values())) > 1
    assert by_group > 0
