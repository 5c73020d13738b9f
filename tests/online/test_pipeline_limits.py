"""The pipeline's limits: times far ahead, a full registry, too many arms, large dead letters, expired messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from online.head import HEAD_KEY, Head, read_head
from online.pipeline import Pipeline
from online.settings import OnlineSettings
from online.worker import build_pipeline
from state.reading import open_view
from state.records import OutboxRecord
from state.store import Store, Table
from streams.codec import encode
from streams.events import Click, Creative, DeadLetter, Event, Impression, Product
from streams.merge import Message
from streams.settings import StreamSettings

HASHED = {"text": "hashed", "image": "hashed"}
HOUR_MS = 3_600_000
T = 100 * HOUR_MS


def show(number: int, at_ms: int = T, **more: str) -> Impression:
    ids = {"product_id": "p", "creative_id": "c", **more}
    return Impression(impression_id=f"i{number}", user_id=f"u{number}", shown_at_ms=at_ms, **ids)  # type: ignore[arg-type]


@dataclass
class Bench:
    """A pipeline over a store, fed message by message."""

    store: Store
    pipeline: Pipeline
    streams: StreamSettings
    n_messages: int = 0

    def run(self, *events: Event | bytes, stamp_ms: int = T, n_expired_before: int = 0) -> None:
        topics = {Product: self.streams.topics.products, Creative: self.streams.topics.creatives}
        topics |= {Click: self.streams.topics.clicks, Impression: self.streams.topics.impressions}
        messages = []
        for event in events:
            topic = topics[Impression if isinstance(event, bytes) else type(event)]
            value = event if isinstance(event, bytes) else encode(event)
            messages.append(Message(topic, 0, self.n_messages, stamp_ms, value, n_expired_before))
            self.n_messages += 1
        with self.store.read() as txn:
            changes, _ = self.pipeline.run(messages, txn)
        self.store.commit(changes)

    def letters(self) -> list[DeadLetter]:
        with self.store.read() as txn:
            records = [msgspec.msgpack.decode(value, type=OutboxRecord) for _, value in txn.scan(Table.OUTBOX)]
        return [msgspec.json.decode(each.payload, type=DeadLetter) for each in records]

    def head(self) -> Head:
        with self.store.read() as txn:
            return read_head(txn.get(Table.META, HEAD_KEY))

    def n_impressions(self) -> int:
        with open_view(self.store) as view:
            return sum(cell.n_impressions for cell in view.cells())


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    settings: dict[str, dict[str, object]] = request.param
    streams = StreamSettings.model_validate(settings.get("streams", {}))
    online = OnlineSettings.model_validate({"encoders": HASHED, "limits": settings.get("limits", {})})
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        made = Bench(store, build_pipeline(streams, online), streams)
        made.run(Product(product_id="p", title="A lamp", updated_at_ms=T))
        made.run(Creative(creative_id="c", product_id="p", created_at_ms=T))
        yield made


@pytest.mark.parametrize("bench", [{"streams": {"max_ahead_s": 60}}], indirect=True)
@pytest.mark.parametrize(
    ("stamp_ms", "at_ms", "is_used"),
    [
        (T, T, True),
        (T, T - 50 * HOUR_MS, True),
        (T, T + 60_000, True),
        (T, T + 60_001, False),
        (T, T + 90_000 * HOUR_MS, False),
        (0, T + 90_000 * HOUR_MS, True),  # a message without a stamp says nothing
    ],
)
def test_an_event_far_ahead_of_its_message_moves_nothing(
    bench: Bench, stamp_ms: int, at_ms: int, is_used: bool
) -> None:
    bench.run(show(0))
    bench.run(show(1, at_ms), stamp_ms=stamp_ms)
    bench.run(Click(impression_id="i0", product_id="p", clicked_at_ms=at_ms), stamp_ms=stamp_ms)
    assert bench.n_impressions() == 1 + is_used
    reasons = Counter(letter.reason for letter in bench.letters())
    assert reasons.get("time_ahead", 0) == (0 if is_used else 2)
    assert bench.head().refused == reasons
    assert bench.head().newest_event_ms == (max(at_ms, T) if is_used else T)


@pytest.mark.parametrize("bench", [{"limits": {"products": 2, "creatives": 2}}], indirect=True)
def test_a_full_registry_takes_no_more_and_says_so(bench: Bench) -> None:
    bench.run(Product(product_id="q", title="A desk", updated_at_ms=T))
    bench.run(Product(product_id="r", title="A chair", updated_at_ms=T))
    bench.run(Creative(creative_id="d", product_id="q", created_at_ms=T))
    bench.run(Creative(creative_id="e", product_id="q", created_at_ms=T))
    bench.run(Product(product_id="q", title="A large desk", updated_at_ms=T))  # a known one may change
    bench.run(Creative(creative_id="d", product_id="q", created_at_ms=T))  # and come again
    letters = bench.letters()
    assert [letter.reason for letter in letters] == ["over_limit", "over_limit"]
    assert "product 'r' is not registered: online.limits.products = 2 are" in letters[0].detail
    assert "creative 'e' is not registered: online.limits.creatives = 2 are" in letters[1].detail
    with open_view(bench.store) as view:
        assert [product.title for product in view.products()] == ["A lamp", "A large desk"]


@pytest.mark.parametrize("bench", [{"limits": {"arms": 2}}], indirect=True)
def test_events_of_too_many_arms_count_for_their_groups_only(bench: Bench) -> None:
    for number, arm in enumerate(["group", "all", "new", "group", "newer"]):
        bench.run(show(number, experiment="groups", arm=arm))
    bench.run(Click(impression_id="i2", product_id="p", clicked_at_ms=T))
    with open_view(bench.store) as view:
        counted = Counter[str]()
        for (_, arm, _), record in view.arms().items():
            counted[arm] += record.n_impressions
    assert counted == {"group": 2, "all": 1}
    assert bench.n_impressions() == 5
    assert bench.head().n_left_out_of_arms == 3


@pytest.mark.parametrize("bench", [{"streams": {"dead_letter_kib": 1}}], indirect=True)
def test_a_dead_letter_carries_no_more_than_it_may(bench: Bench) -> None:
    bench.run(b"{" + bytes(range(32, 127)) * 100, b"{")
    large, small = bench.letters()
    assert len(large.payload) == 1_024
    assert large.detail.endswith("; of its 9,501 bytes the first 1,024 are here (streams.dead_letter_kib)")
    assert small.payload == b"{"


@pytest.mark.parametrize("bench", [{}], indirect=True)
def test_expired_messages_are_counted_with_the_next_one(bench: Bench) -> None:
    bench.run(show(0))
    bench.run(show(1), n_expired_before=70)
    bench.run(show(2))
    with open_view(bench.store) as view:
        offset = view.offsets()[bench.streams.topics.impressions, 0]
    assert (offset.n_consumed, offset.n_expired) == (3, 70)
