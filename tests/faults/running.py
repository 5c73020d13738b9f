"""``osmf online``'s loop in a thread of the test, against topics of the test's own, and events to send there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from online.pipeline import BatchSummary
from online.settings import OnlineSettings
from online.worker import run_online
from osmf.verify import Verification, verify_state
from state.errors import StateMissingError
from state.reading import open_view
from state.records import OffsetRecord
from state.settings import StateSettings
from state.store import Store
from streams.codec import encode
from streams.events import Click, Creative, Impression, Product
from streams.settings import StreamSettings, TopicSettings

ONLINE = OnlineSettings.model_validate({"encoders": {"text": "hashed", "image": "hashed"}})
PRODUCTS, CREATIVES = ("p0", "p1"), ("a", "b")
N_REGISTRATIONS = 6
S_MS = 1_000
HOUR_MS = 3_600_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def own_topics(prefix: str) -> TopicSettings:
    """Return topics that no other test of the same broker has."""
    return TopicSettings(**{name: f"{prefix}.{name}" for name in TopicSettings.model_fields})


def impression(number: int, at_ms: int) -> Impression:
    return Impression(
        impression_id=f"i{number}",
        user_id=f"u{number % 17}",
        product_id=PRODUCTS[number % 2],
        creative_id=CREATIVES[number // 2 % 2],
        shown_at_ms=at_ms,
    )


def click(number: int, at_ms: int) -> Click:
    return Click(impression_id=f"i{number}", product_id=PRODUCTS[number % 2], clicked_at_ms=at_ms)


class Sender:
    """Sends messages to a test's topics, to any partition and with any stamp."""

    def __init__(self, bootstrap_servers: str, topics: TopicSettings) -> None:
        from kafka import KafkaProducer

        self._topics = topics
        self._producer: Any = KafkaProducer(bootstrap_servers=[bootstrap_servers])

    def register(self, at_ms: int) -> None:
        """Announce the products, and then their creatives."""
        for product_id in PRODUCTS:
            event = Product(product_id=product_id, title=f"A {product_id}", updated_at_ms=at_ms)
            self.put(self._topics.products, encode(event), at_ms)
        for product_id in PRODUCTS:
            for creative_id in CREATIVES:
                of = Creative(creative_id=creative_id, product_id=product_id, created_at_ms=at_ms)
                self.put(self._topics.creatives, encode(of), at_ms + 1)
        self.flush()

    def put(self, topic: str, value: bytes, stamp_ms: int, partition: int = 0) -> None:
        self._producer.send(topic, value=value, timestamp_ms=stamp_ms, partition=partition)

    def show(self, number: int, at_ms: int, *, stamp_ms: int | None = None, partition: int = 0) -> None:
        self.put(self._topics.impressions, encode(impression(number, at_ms)), stamp_ms or at_ms, partition)

    def click(self, number: int, at_ms: int, *, stamp_ms: int | None = None) -> None:
        self.put(self._topics.clicks, encode(click(number, at_ms)), stamp_ms or at_ms)

    def flush(self) -> None:
        self._producer.flush()

    def close(self) -> None:
        self._producer.close()


class Running:
    """The loop of ``osmf online`` in a thread, until the ``with`` block ends; then what it raised is raised."""

    def __init__(self, streams: StreamSettings, state: Path, online: OnlineSettings = ONLINE) -> None:
        self._streams = streams
        self.state = state
        self._online = online
        self._stop = threading.Event()
        self.error: BaseException | None = None
        self._n_consumed = n_consumed(state)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            run_online(
                self._streams,
                self._online,
                StateSettings(path=self.state, map_size_mib=16, sync=False),
                clock_s=time.monotonic,
                stop=self._stop.is_set,
                on_batch=self._count,
            )
        except BaseException as error:
            self.error = error

    def _count(self, batch: BatchSummary) -> None:
        self._n_consumed += batch.n_messages

    def wait_for(self, what: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait until something is so; fail when the loop ends before, or it takes too long."""
        deadline_s = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline_s, f"{self._n_consumed} events consumed"
            if not self._thread.is_alive():
                raise self.error or AssertionError("it has ended")
            time.sleep(0.02)

    def wait_until_consumed(self, n_events: int, seconds: float = 30.0) -> None:
        self.wait_for(lambda: self._n_consumed >= n_events, seconds)

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "it does not stop"
        if self.error is not None and error is None:
            raise self.error


def offsets(state: Path) -> dict[tuple[str, int], OffsetRecord]:
    try:
        with Store(state, readonly=True) as store, open_view(store) as view:
            return view.offsets()
    except StateMissingError:
        return {}


def n_consumed(state: Path) -> int:
    return sum(offset.n_consumed for offset in offsets(state).values())


def verified(state: Path, streams: StreamSettings) -> Verification:
    """Recount the topics; fail where the state contradicts them or itself."""
    found = verify_state(state, streams, from_topics=True)
    assert (found.differences, found.broken) == ([], [])
    return found
