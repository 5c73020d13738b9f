"""A state with a product whose groups differ, one whose groups do not, a fresh one and one without creatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from online.settings import AttributeSettings, EncoderSettings, GroupSettings, ModelSettings, OnlineSettings
from online.worker import build_pipeline
from serving.decisions import DecisionService
from serving.settings import ServingSettings
from state.reading import StateReader
from state.store import Store
from streams.codec import encode, event_time_ms, event_topics
from streams.events import Click, Creative, Event, Impression, Product
from streams.merge import Message
from streams.settings import JoinSettings, StreamSettings

START_MS = 1_748_822_400_000
CREATIVES = ("a", "b", "c", "d")
BEST = {"old": "a", "young": "d"}
"""The creative of "split" that each age likes; of "same" everybody likes "b"."""

N_IMPRESSIONS = 5_000


@dataclass(frozen=True)
class State:
    """A state on disk, and the settings that it was made with."""

    path: Path
    online: OnlineSettings
    streams: StreamSettings


def events() -> Iterator[Event]:
    for product in ("split", "same", "fresh", "bare"):
        yield Product(product_id=product, title=f"the {product} product", updated_at_ms=START_MS)
        if product != "bare":
            for creative in CREATIVES:
                yield Creative(creative_id=creative, product_id=product, created_at_ms=START_MS)
    rng = np.random.default_rng(1)
    for number in range(N_IMPRESSIONS):
        at_ms = START_MS + 100 * number
        user = int(rng.integers(400))
        age, product, creative = ("young", "old")[user % 2], ("split", "same")[number % 2], str(rng.choice(CREATIVES))
        yield Impression(
            impression_id=f"i{number}",
            user_id=f"u{user}",
            product_id=product,
            creative_id=creative,
            shown_at_ms=at_ms,
            attributes={"age": age, "tier": str(1 + user % 3)},
        )
        liked = BEST[age] if product == "split" else "b"
        if rng.random() < (0.5 if creative == liked else 0.05):
            yield Click(impression_id=f"i{number}", product_id=product, clicked_at_ms=at_ms + 50)


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> State:
    streams = StreamSettings(join=JoinSettings(allowed_lateness_s=0, label_window_s=5))
    online = OnlineSettings(
        attributes=AttributeSettings(values={"age": ("young", "old"), "tier": ("1", "2", "3")}),
        encoders=EncoderSettings(text="hashed", image="hashed"),
        model=ModelSettings(d_model=16, d_field=4, d_hidden=16, learning_rate=0.01, batch_rows=64, ema_steps=8),
        groups=GroupSettings(k_max=2, reservoir_users=128, warm_up_impressions=1_500, adopt_every_impressions=1_500),
    )
    path = tmp_path_factory.mktemp("state")
    topic_of = event_topics(streams.topics)
    messages = [
        Message(topic_of[type(event)], 0, offset, event_time_ms(event), encode(event))
        for offset, event in enumerate(events())
    ]
    with Store(path, map_size_mib=32, sync=False) as store:
        pipeline = build_pipeline(streams, online)
        pipeline.restore(store)
        for start in range(0, len(messages), 250):
            with store.read() as txn:
                changes, _ = pipeline.run(messages[start : start + 250], txn)
            store.commit(changes)
    return State(path, online, streams)


@pytest.fixture
def reader(state: State) -> Iterator[StateReader]:
    with StateReader(state.path) as opened:
        yield opened


@pytest.fixture
def settings() -> ServingSettings:
    return ServingSettings(warm_up_impressions=1_000, seed=4)


@pytest.fixture
def service(state: State, reader: StateReader, settings: ServingSettings) -> DecisionService:
    made = DecisionService(reader, state.online, settings, impressions_topic=state.streams.topics.impressions)
    made.refresh()
    return made
