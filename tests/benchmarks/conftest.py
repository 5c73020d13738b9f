from __future__ import annotations

import pytest

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
