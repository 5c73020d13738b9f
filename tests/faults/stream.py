"""A stream from the simulated world, and ``osmf online`` as a process that works it off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from generator.procedural import ProceduralRenderer
from simulator.decider import UniformDecider
from simulator.session import Session
from simulator.settings import CatalogueSettings, SimulatorSettings, TrafficSettings
from simulator.stage import set_stage
from state.errors import StateMissingError
from state.reading import open_view
from state.store import Store, Table
from streams.producer import EventProducer
from streams.settings import StreamSettings

SEED = 23
IDLE_S = 1.5


def produce(streams: StreamSettings, folder: Path, n_impressions: int) -> int:
    """Fill the topics from the simulated world; return how many messages they hold."""
    settings = SimulatorSettings(
        seed=SEED,
        decider="uniform",
        cache_dir=folder / "cache",
        out_dir=folder / "simulate",
        catalogue=CatalogueSettings(source="drawn", n_products=6, creative_side_px=64),
        traffic=TrafficSettings(n_impressions=n_impressions, impressions_per_hour=n_impressions / 14),
    )
    stage = set_stage(settings, ProceduralRenderer())
    creatives = {
        product.product_id: [creative.creative_id for creative in of_product]
        for product, of_product in zip(stage.products, stage.creatives, strict=True)
    }
    decider = UniformDecider(creatives, np.random.default_rng(SEED))
    with EventProducer(streams, client_id="test") as producer:
        truth = Session(settings, streams.topics, stage, producer, decider).run()
    return sum(truth.produced.values())


class Online:
    """``osmf online`` as a process of its own."""

    def __init__(self, streams: StreamSettings, state: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OSMF_")}
        self._environment = {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "OSMF_STREAMS": streams.model_dump_json(),
            "OSMF_STATE__PATH": str(state),
            "OSMF_ONLINE__ENCODERS": '{"text": "hashed", "image": "hashed"}',
            "OSMF_ONLINE__GROUPS": '{"warm_up_impressions": 4000, "adopt_every_impressions": 3000}',
        }
        self.log = state.parent / f"{state.name}.log"

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "osmf", "online", "--until-idle-s", str(IDLE_S)],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def run_to_its_end(self) -> None:
        assert self.start().wait(300) == 0, self.log.read_text()


def content(state: Path) -> dict[tuple[str, bytes], bytes]:
    """Return everything that a state holds."""
    with Store(state, readonly=True) as store, store.read() as txn:
        return {(table.value, key): value for table in Table for key, value in txn.scan(table)}


def n_consumed(state: Path) -> int:
    """Return how many messages a state includes; 0 before it is there."""
    try:
        with Store(state, readonly=True) as store, open_view(store) as view:
            return sum(offset.next_offset for offset in view.offsets().values())
    except StateMissingError:
        return 0


def differences(one: Path, other: Path) -> list[tuple[str, bytes]]:
    """Return the keys at which two states differ."""
    expected, found = content(one), content(other)
    return [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
