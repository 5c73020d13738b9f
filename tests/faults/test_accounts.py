"""Accounts under kills, with two partitions a topic: every event is used or refused once, refusals are sent once."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from generator.procedural import ProceduralRenderer
from simulator.decider import UniformDecider
from simulator.session import Session
from simulator.settings import CatalogueSettings, SimulatorSettings, TrafficSettings, WorldSettings
from simulator.stage import set_stage
from simulator.truth import Truth
from state.errors import StateMissingError
from state.reading import open_view
from state.store import Store
from streams.broker import LocalBroker
from streams.events import DeadLetter
from streams.producer import EventProducer
from streams.settings import StreamSettings
from streams.tail import Tail
from tests.faults.stream import ROOT, StampedSink, online_environment

pytestmark = pytest.mark.broker

N_KILLS = 3


@dataclass(frozen=True)
class Account:
    """What was consumed of a topic, and what became of it."""

    consumed: int
    used: int
    dead: int


def simulate(streams: StreamSettings, folder: Path) -> Truth:
    settings = SimulatorSettings(
        cache_dir=folder / "cache",
        out_dir=folder / "out",
        catalogue=CatalogueSettings(source="drawn", n_products=6, creative_side_px=64, max_creatives=7),
        world=WorldSettings(n_users=2_000),
        traffic=TrafficSettings(n_impressions=6_000, impressions_per_hour=1_000),
        n_truth_users=0,
    )
    stage = set_stage(settings, ProceduralRenderer())
    ids = {p.product_id: [c.creative_id for c in cs] for p, cs in zip(stage.products, stage.creatives, strict=True)}
    with EventProducer(streams, client_id="simulator") as producer:
        decider = UniformDecider(ids, np.random.default_rng(0))
        return Session(settings, streams.topics, stage, StampedSink(producer), decider).run()


def start_online(streams: StreamSettings, state: Path) -> subprocess.Popen[bytes]:
    with (state.parent / "online.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "osmf", "online", "--until-idle-s", "1"],
            cwd=ROOT,
            env=online_environment(streams, state),
            stdout=log,
            stderr=log,
        )


def n_consumed(state: Path) -> int:
    try:
        with Store(state, readonly=True) as store, open_view(store) as view:
            return sum(record.n_consumed for record in view.offsets().values())
    except StateMissingError:
        return 0


def kill_at(process: subprocess.Popen[bytes], state: Path, n_events: float, then_s: float) -> None:
    deadline = time.monotonic() + 60
    log = state.parent / "online.log"
    try:
        while n_consumed(state) <= n_events:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        time.sleep(then_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


def test_every_event_is_accounted_for_across_kills(tmp_path: Path) -> None:
    rng = random.Random(3)
    state = tmp_path / "state"
    with LocalBroker(log_path=tmp_path / "broker.log") as broker:
        streams = StreamSettings(bootstrap_servers=broker.bootstrap_servers, n_partitions=2, batch_events=256)
        topics = streams.topics
        broker.create_topics(dict.fromkeys(topics.model_dump().values(), streams.n_partitions))
        truth = simulate(streams, tmp_path)
        n_events = sum(truth.produced.values())
        for point in sorted(rng.uniform(0, 0.9) * n_events for _ in range(N_KILLS)):
            kill_at(start_online(streams, state), state, point, rng.uniform(0, 0.1))
        process = start_online(streams, state)
        assert process.wait(100) == 0, (tmp_path / "online.log").read_text()
        with Tail(streams, topics.dead_letters, DeadLetter) as tail:
            letters = list(itertools.chain.from_iterable(iter(lambda: tail.poll(500), [])))

    with Store(state, readonly=True) as store, open_view(store) as view:
        offsets, cells, n_waiting = view.offsets(), view.cells(), view.n_waiting_clicks()
    assert n_waiting == 0
    accounts: dict[str, Account] = {}
    for (topic, _), record in offsets.items():
        so_far = accounts.get(topic, Account(0, 0, 0))
        assert record.next_offset == record.n_consumed
        accounts[topic] = Account(
            so_far.consumed + record.n_consumed, so_far.used + record.n_used, so_far.dead + record.n_dead_letters
        )
    for topic, account in accounts.items():
        assert account.consumed == account.used + account.dead, topic
    assert accounts[topics.impressions].consumed == truth.produced["impressions"]
    assert accounts[topics.clicks].consumed == truth.produced["clicks"]
    assert accounts[topics.products].consumed == 6
    # Each wrong event is refused for what is wrong with it, under an id of its own, and nothing else is.
    by_id = {letter.event_id: letter.reason for letter in letters}
    assert Counter(by_id.values()) == {reason: n for reason, n in truth.spoiled.items() if n}
    assert sum(account.dead for account in accounts.values()) == len(by_id)
    # Every impression and every click counts once, late and repeated ones too.
    assert sum(cell.n_impressions for cell in cells) == truth.n_impressions
    assert sum(cell.n_clicks for cell in cells) == truth.n_clicks
