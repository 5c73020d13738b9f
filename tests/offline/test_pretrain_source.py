"""What pre-training reads from a state that a small stream has made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from offline.pretrain_source import ProductSource, in_words, kept_clicks, most_common, read_sources
from online.attributes import AttributeSchema
from online.replay import pack_rows
from online.rows import LabelledRows, Rows
from online.settings import AttributeSettings, EncoderSettings, GroupSettings, ModelSettings, OnlineSettings
from online.worker import build_pipeline
from state.reading import open_view
from state.store import Store
from streams.codec import encode, event_time_ms, event_topics
from streams.events import Click, Creative, Event, Impression, Product
from streams.merge import Message
from streams.settings import JoinSettings, StreamSettings

START_MS = 1_748_822_400_000
STREAMS = StreamSettings(join=JoinSettings(allowed_lateness_s=0, label_window_s=5))
ONLINE = OnlineSettings(
    attributes=AttributeSettings(
        values={"age": ("young", "old"), "tier": ("1", "2", "3"), "shade": tuple(map(str, range(50)))}
    ),
    encoders=EncoderSettings(text="hashed", image="hashed"),
    model=ModelSettings(d_model=16, d_field=4, d_hidden=16, learning_rate=0.01, batch_rows=64, ema_steps=8),
    groups=GroupSettings(k_max=2, reservoir_users=64, warm_up_impressions=1_000, adopt_every_impressions=1_000),
)


def events() -> Iterator[Event]:
    """Yield a product whose young users click one creative and old ones another, and one that nobody has seen."""
    for product in ("split", "unseen"):
        yield Product(product_id=product, title=f"the {product} product", updated_at_ms=START_MS, category="things")
    for creative in "ab":
        yield Creative(creative_id=creative, product_id="split", created_at_ms=START_MS)
    rng = np.random.default_rng(1)
    for number in range(2_500):
        at_ms = START_MS + 100 * number
        age, creative = ("young", "old")[number % 2], "ab"[int(rng.integers(2))]
        yield Impression(
            impression_id=f"i{number}",
            user_id=f"u{number}",
            product_id="split",
            creative_id=creative,
            shown_at_ms=at_ms,
            attributes={"age": age, "tier": str(1 + int(rng.integers(3))), "shade": str(int(rng.integers(50)))},
        )
        if rng.random() < (0.6 if creative == {"old": "a", "young": "b"}[age] else 0.05):
            yield Click(impression_id=f"i{number}", product_id="split", clicked_at_ms=at_ms + 50)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ProductSource]:
    topic_of = event_topics(STREAMS.topics)
    messages = [
        Message(topic_of[type(event)], 0, offset, event_time_ms(event), encode(event))
        for offset, event in enumerate(events())
    ]
    with Store(tmp_path_factory.mktemp("state"), map_size_mib=32, sync=False) as store:
        pipeline = build_pipeline(STREAMS, ONLINE)
        pipeline.restore(store)
        for start in range(0, len(messages), 250):
            with store.read() as txn:
                changes, _ = pipeline.run(messages[start : start + 250], txn)
            store.commit(changes)
        with open_view(store) as view:
            return read_sources(view, ONLINE)


def test_only_grouped_products_are_sources(sources: list[ProductSource]) -> None:
    assert [source.product_id for source in sources] == ["split"]
    assert sources[0].title == "the split product"
    assert sources[0].category == "things"
    assert sources[0].picture_uri is None


def test_groups_have_the_most_common_values_of_their_own_members(sources: list[ProductSource]) -> None:
    groups = sources[0].groups
    assert len(groups) == 2
    assert {group.typical["age"] for group in groups} == {"young", "old"}
    assert all(set(group.typical) == {"age", "tier", "shade"} for group in groups)
    assert all(group.feature.shape == (11, 16) for group in groups)


def test_clickers_are_of_the_group_and_outside_its_sample(sources: list[ProductSource]) -> None:
    for group in sources[0].groups:
        assert len(group.clickers) > 50
        assert np.mean([clicker["age"] == group.typical["age"] for clicker in group.clickers]) > 0.95
    # A user in the sample has the same three values as one of its 64 users; of the 300 kinds of user most have not.
    kinds = {tuple(clicker.values()) for group in sources[0].groups for clicker in group.clickers}
    assert 100 < len(kinds) <= 300 - 50


def test_clicks_that_were_taken_back_are_left_out() -> None:
    users = np.array([[2, 2], [3, 3], [3, 3], [2, 4]], np.uint8)
    rows = Rows(np.array([7, 7, 7, 8]), np.array([1, 1, 1, 2]), users)
    given = LabelledRows(rows, np.array([1, 1, 1, 0], np.float32), np.ones(4, np.float32))
    taken = LabelledRows(rows.take(np.array([0, 1])), np.ones(2, np.float32), -np.ones(2, np.float32))
    clicks = kept_clicks([pack_rows(given), pack_rows(taken)], n_fields=2)
    assert [(product, codes.tolist()) for product, codes in clicks] == [(7, [3, 3])]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([[2, 3, 2], [2, 4, 2], [3, 4, 3]], {"age": "young", "tier": "3", "shade": "0"}),
        ([[2, 0, 0], [3, 0, 1]], {"age": "young"}),  # as common: the first listed; a value that is missing is none
        ([[1, 1, 1]], {}),
    ],
)
def test_most_common_values(codes: list[list[int]], expected: dict[str, str]) -> None:
    assert most_common(np.array(codes, np.uint8), AttributeSchema(ONLINE.attributes)) == expected


def test_a_user_in_words_leaves_out_what_is_not_known() -> None:
    assert in_words(np.array([3, 0, 1], np.uint8), AttributeSchema(ONLINE.attributes)) == {"age": "old"}
