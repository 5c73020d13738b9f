"""Corrections through a broker with two partitions: they reach all of them, and a recount of the topics agrees."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from online.settings import EncoderSettings, LedgerSettings, LimitSettings, OnlineSettings
from online.worker import run_online
from osmf.verify import verify_state
from state.reading import open_view
from state.settings import StateSettings
from state.store import Store
from streams.broker import LocalBroker
from streams.events import Click, ClickRetracted, Creative, Event, Impression, Product, UserForgotten
from streams.producer import EventProducer
from streams.settings import JoinSettings, StreamSettings
from streams.tail import Tail

pytestmark = pytest.mark.broker

START_MS = 1_748_822_400_000
N_IMPRESSIONS = 600
PRODUCTS = tuple(f"product-{number}" for number in range(6))
FORGOTTEN = ("user-3", "user-7")


def catalogue() -> list[Event]:
    products: list[Event] = [Product(product_id=p, title=p, updated_at_ms=START_MS) for p in PRODUCTS]
    return products + [Creative(creative_id=c, product_id=p, created_at_ms=START_MS) for p in PRODUCTS for c in "ab"]


def traffic() -> list[Event]:
    """Return impressions and clicks in order of time; users are forgotten and clicks retracted in the midst of it."""
    rng = np.random.default_rng(3)
    events: list[Event] = []
    for number in range(N_IMPRESSIONS):
        at_ms = START_MS + 10_000 + number * 1_000
        product_id = str(rng.choice(PRODUCTS))
        impression_id = f"i{number}"
        events.append(
            Impression(
                impression_id=impression_id,
                user_id=f"user-{rng.integers(20)}",
                product_id=product_id,
                creative_id=str(rng.choice(["a", "b"])),
                shown_at_ms=at_ms,
            )
        )
        if rng.random() < 0.5:
            events.append(Click(impression_id=impression_id, product_id=product_id, clicked_at_ms=at_ms + 300))
            if rng.random() < 0.3:
                late_ms = at_ms + (400 if number % 2 else 90_000)
                events.append(
                    ClickRetracted(impression_id=impression_id, product_id=product_id, retracted_at_ms=late_ms)
                )
        elif number % 40 == 0:
            events.append(ClickRetracted(impression_id=impression_id, product_id=product_id, retracted_at_ms=at_ms + 1))
        if number in (250, 400):
            events.append(UserForgotten(user_id=FORGOTTEN[number == 400], forgotten_at_ms=at_ms + 500))
    return events


def test_corrections_reach_every_partition_and_a_recount_agrees(tmp_path: Path) -> None:
    with LocalBroker(log_path=tmp_path / "broker.log") as broker:
        streams = StreamSettings(
            bootstrap_servers=broker.bootstrap_servers,
            n_partitions=2,
            batch_events=150,
            join=JoinSettings(allowed_lateness_s=1, label_window_s=20, attribution_window_s=60, click_wait_s=20),
        )
        broker.create_topics(dict.fromkeys(streams.topics.model_dump().values(), streams.n_partitions))
        with EventProducer(streams, client_id="test") as producer:
            for events in (catalogue(), traffic()):
                for event in events:
                    producer.send(event)
                producer.flush()
        with Tail(streams, streams.topics.corrections, UserForgotten) as tail:
            copies: list[UserForgotten] = []
            deadline_s = time.monotonic() + 20
            while len(copies) < 4 and time.monotonic() < deadline_s:
                copies += [event for event in tail.poll(300) if isinstance(event, UserForgotten)]
        assert sorted(event.user_id for event in copies) == sorted(FORGOTTEN * 2)
        state = StateSettings(path=tmp_path / "state", sync=False)
        online = OnlineSettings(
            encoders=EncoderSettings(text="hashed", image="hashed"),
            # Some leave the ledger before they could be taken back: what stays counted is no difference.
            ledger=LedgerSettings(retention_s=200),
            limits=LimitSettings(resident_products=3),
        )
        run_online(streams, online, state, clock_s=time.monotonic, stop=lambda: False, until_idle_s=1.5)
        found = verify_state(state.path, streams, from_topics=True)
        assert (found.broken, found.differences) == ([], [])
        assert found.n_compared == len(PRODUCTS) * 2
        with Store(state.path, readonly=True) as store, open_view(store) as view:
            ledger, forgettings = view.ledger(), view.forgettings()
    # Copies can be apart: what is dated far ahead holds up its partition. The user may have come again in between.
    assert 2 <= ledger.n_users_forgotten <= 4
    assert ledger.n_expired > 0
    assert ledger.n_impressions_taken_back > 10
    assert ledger.n_clicks_retracted > 20
    assert len(forgettings) == ledger.n_users_forgotten
