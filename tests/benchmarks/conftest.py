from __future__ import annotations

import numpy as np
import pytest

from benchmarks.core_run import CoreRun
from benchmarks.reward import RewardWorld, make_reward_world
from benchmarks.worlds import BenchWorld, bench_world
from offline.settings import OfflineSettings
from online.settings import EncoderSettings, GroupSettings, OnlineSettings
from simulator.settings import CatalogueSettings, ShiftSettings, SimulatorSettings, TrafficSettings, WorldSettings


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> SimulatorSettings:
    """A small world of drawn products, with a little of everything that a log can hold."""
    return SimulatorSettings(
        cache_dir=tmp_path_factory.mktemp("cache"),
        decider="uniform",
        catalogue=CatalogueSettings(source="drawn", n_products=6, creative_side_px=64, max_creatives=6),
        world=WorldSettings(n_users=1_500, mean_ctr=0.2, taste_strength=1.5),
        traffic=TrafficSettings(n_impressions=5_000, n_spoiled_per_reason=2),
        shift=ShiftSettings(n_categories=0),
        n_truth_users=300,
    )


@pytest.fixture(scope="session")
def online() -> OnlineSettings:
    return OnlineSettings(
        encoders=EncoderSettings(text="hashed", image="hashed"),
        groups=GroupSettings(warm_up_impressions=2_000, adopt_every_impressions=1_000, reservoir_users=128),
    )


@pytest.fixture(scope="session")
def reward_world(tmp_path_factory: pytest.TempPathFactory) -> RewardWorld:
    """What the stream of a small world has left, and the truth about it."""
    simulator = bench_world(mean_ctr=0.2)
    catalogue = simulator.catalogue.model_copy(update={"n_products": 8, "source": "drawn", "creative_side_px": 64})
    simulator = simulator.model_copy(
        update={"seed": 101, "catalogue": catalogue, "cache_dir": tmp_path_factory.mktemp("cache")}
    )
    online = OnlineSettings(encoders=EncoderSettings(text="hashed", image="hashed"))
    world = BenchWorld(simulator, online)
    course = CoreRun(world, online, micro_batch_rows=1_024)
    for _ in course.work_off(world.draw(30_000, np.random.default_rng(0))):
        pass
    return make_reward_world(
        world, course, online, OfflineSettings(min_pair_probability=0.9, held_out_share=0.5, held_out_by="product")
    )
