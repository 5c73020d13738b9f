"""The benchmark of delayed clicks: every policy gives every label that it should, and when it should."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.delay import POLICIES, DelayRun, Stream, bench_delay
from benchmarks.learn import new_learner
from benchmarks.measured import Measured
from benchmarks.worlds import BenchWorld
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings

N = 400


@pytest.fixture(scope="module")
def stream(simulator: SimulatorSettings, online: OnlineSettings) -> Stream:
    world = BenchWorld(simulator.model_copy(update={"seed": 31}), online)
    rng = np.random.default_rng(1)
    return Stream(world, world.rows(world.draw(N, rng)), rng.exponential(30, size=N).astype(np.int64), 27)


@pytest.mark.parametrize("step", [1, 50, 64])
@pytest.mark.parametrize("name", POLICIES)
def test_labels_add_up_to_what_the_policy_can_know(
    name: str, step: int, stream: Stream, online: OnlineSettings
) -> None:
    learner = new_learner(stream.world, online)
    clicks, rows = 0.0, 0.0
    for start in range(0, N + 2_000, step):
        for part in POLICIES[name](stream, learner, start, start + step):
            if name == "fnw":
                assert (part.weights > 0).all()
                part = type(part)(part.rows, part.clicks, np.ones(len(part), np.float32))
            clicks += float((part.clicks * part.weights).sum())
            rows += float(part.weights.sum())
    clicked = stream.rows.clicks > 0
    in_time = clicked & (stream.delays <= 27)
    assert in_time.sum() < clicked.sum()
    expected = {
        "oracle": (clicked.sum(), N),
        "wait": ((clicked & (stream.delays <= 147)).sum(), N),
        "plain": (in_time.sum(), N),
        "fnw": (clicked.sum(), N + clicked.sum()),
        "retraction": (clicked.sum(), N),
    }
    assert (clicks, rows) == expected[name]


def test_every_figure_is_there_and_plain_is_the_worst(simulator: SimulatorSettings, online: OnlineSettings) -> None:
    measured: Measured = bench_delay(
        quick=True, seeds=(31,), run=DelayRun(simulator, 12_000, 6_000, 600), online=online
    )
    assert set(measured.metrics) == {
        *(f"excess_log_loss_{name}" for name in POLICIES if name != "oracle"),
        "log_loss_oracle",
        "log_loss_ceiling",
        "late_share",
    }
    assert measured.metrics["late_share"] == pytest.approx(0.4, abs=0.05)
    assert measured.metrics["log_loss_ceiling"] < measured.metrics["log_loss_oracle"]
    plain = measured.metrics["excess_log_loss_plain"]
    assert plain > max(abs(measured.metrics["excess_log_loss_retraction"]), 0.005)
