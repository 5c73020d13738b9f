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
from streams.codec import event_time_ms
from streams.events import Event
from streams.producer import EventProducer
from streams.settings import StreamSettings

ROOT = Path(__file__).parents[2]
SEED = 23
IDLE_S = 1.5


class StampedSink:
    """Sends events, and stamps wrong ones, too, with the time of the log: that of the event sent last."""

    def __init__(self, producer: EventProducer) -> None:
        self._producer = producer
        self._now_ms = 0

    def send(self, event: Event) -> None:
        self._now_ms = event_time_ms(event)
        self._producer.send(event)

    def send_bytes(self, topic: str, key: str, payload: bytes) -> None:
        self._producer.send_bytes(topic, key, payload, timestamp_ms=self._now_ms)

    def flush(self) -> None:
        self._producer.flush()


def produce(streams: StreamSettings, folder: Path, n_impressions: int, n_products: int = 6) -> int:
    """Fill the topics from the simulated world, with duplicates, late and reordered events and wrong ones.

    Returns how many messages they hold.
    """
    settings = SimulatorSettings(
        seed=SEED,
        decider="uniform",
        cache_dir=folder / "cache",
        out_dir=folder / "simulate",
        catalogue=CatalogueSettings(source="drawn", n_products=n_products, creative_side_px=64),
        traffic=TrafficSettings(n_impressions=n_impressions, impressions_per_hour=n_impressions / 14),
    )
    stage = set_stage(settings, ProceduralRenderer())
    creatives = {
        product.product_id: [creative.creative_id for creative in of_product]
        for product, of_product in zip(stage.products, stage.creatives, strict=True)
    }
    decider = UniformDecider(creatives, np.random.default_rng(SEED))
    with EventProducer(streams, client_id="test") as producer:
        truth = Session(settings, streams.topics, stage, StampedSink(producer), decider).run()
    return sum(truth.produced.values()) + len(stage.products) + sum(map(len, stage.creatives))


def online_environment(streams: StreamSettings, state: Path) -> dict[str, str]:
    """Return the environment of an ``osmf online`` of this checkout, with quick encoders and no other settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OSMF_")}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OSMF_STREAMS": streams.model_dump_json(),
        "OSMF_STATE__PATH": str(state),
        "OSMF_ONLINE__ENCODERS": '{"text": "hashed", "image": "hashed"}',
    }


class Online:
    """``osmf online`` as a process of its own."""

    def __init__(self, streams: StreamSettings, state: Path) -> None:
        self._environment = {
            **online_environment(streams, state),
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
