"""The benchmark of reward models, on a small world."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.core_run import CoreRun
from benchmarks.reward import Oracle, drawn_lessons, make_reward_world
from benchmarks.worlds import BenchWorld, bench_world
from offline.evaluation import evaluate
from offline.labelled_pair import read_pairs
from offline.pairs import HELD_OUT, TRAIN
from offline.settings import OfflineSettings
from online.settings import EncoderSettings, OnlineSettings


@pytest.mark.slow
def test_the_oracle_is_nearly_always_right():
    simulator = bench_world(mean_ctr=0.2)
    catalogue = simulator.catalogue.model_copy(update={"n_products": 8, "source": "drawn", "creative_side_px": 64})
    simulator = simulator.model_copy(update={"seed": 101, "catalogue": catalogue})
    online = OnlineSettings(encoders=EncoderSettings(text="hashed", image="hashed"))
    world = BenchWorld(simulator, online)
    course = CoreRun(world, online, micro_batch_rows=1_024)
    for _ in course.work_off(world.draw(30_000, np.random.default_rng(0))):
        pass
    made = make_reward_world(world, course, OfflineSettings(min_pair_probability=0.9, held_out_share=0.5))
    pairs = read_pairs(made.dataset, TRAIN) + read_pairs(made.dataset, HELD_OUT)
    assert len(pairs) > 50
    assert evaluate(Oracle(made), pairs).accuracy > 0.9
    lessons = drawn_lessons(world, [world.stage.products[0].product_id], 2, np.random.default_rng(0))
    assert [picture.open().size for picture, _ in lessons] == [(256, 256)] * 2
