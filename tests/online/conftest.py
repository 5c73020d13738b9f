"""A small log with everything in it: lates, repeats, wrong events, Arrow batches, a change of tastes, corrections."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from online.pipeline import Pipeline
from online.settings import (
    AttributeSettings,
    CountSettings,
    EncoderSettings,
    GroupSettings,
    ModelSettings,
    OnlineSettings,
    ShiftSettings,
)
from online.worker import build_pipeline
from streams.codec import encode, event_time_ms, event_topics
from streams.events import Click, ClickRetracted, Creative, Event, Impression, Product, UserForgotten
from streams.merge import Message
from streams.settings import FieldMapSettings, JoinSettings, StreamSettings

START_MS = 1_748_822_400_000
N_IMPRESSIONS = 4_000
PRODUCTS = ("p0", "p1", "p2")
CREATIVES = ("a", "b", "c", "d")
PICTURE = b"the bytes of a picture"
FORGOTTEN = (("u17", 1_700), ("u3", 3_990))
"""Users who are forgotten, and the impression after which they are."""


@dataclass(frozen=True, repr=False)
class Log:
    """Messages in merged order, and what is true about them."""

    messages: list[Message]
    n_impressions: int
    n_clicks: int
    n_duplicates: int
    dead: dict[str, int]
    by_creative: dict[tuple[str, str], tuple[int, int]]
    by_arm: dict[str, tuple[int, int]]


@pytest.fixture(scope="session")
def streams() -> StreamSettings:
    return StreamSettings(
        fields=FieldMapSettings(clicks={"clicked_at_ms": "at.ms"}),
        join=JoinSettings(allowed_lateness_s=5, label_window_s=60, attribution_window_s=600, click_wait_s=120),
    )


@pytest.fixture(scope="session")
def online() -> OnlineSettings:
    """Everything small, so that all of it happens in some thousand events."""
    return OnlineSettings(
        seed=3,
        attributes=AttributeSettings(values={"age": ("young", "old"), "tier": ("1", "2", "3")}, buckets={"city": 5}),
        encoders=EncoderSettings(text="hashed", image="hashed"),
        model=ModelSettings(
            user_weight_decay=0.1,
            d_model=16,
            d_field=4,
            d_hidden=16,
            learning_rate=0.01,
            batch_rows=64,
            replay_rows=1_000,
            ema_steps=8,
        ),
        groups=GroupSettings(
            k_max=3,
            reservoir_users=96,
            warm_up_impressions=600,
            adopt_every_impressions=400,
            refresh_products_per_batch=2,
        ),
        counts=CountSettings(half_life_s=900, user_buckets=4),
        shift=ShiftSettings(
            warm_up_impressions=100, false_alarms_per_million=10, min_impressions=40, cool_down_impressions=300
        ),
    )


class MissingPictureError(OSError):
    def __init__(self, uri: str) -> None:
        super().__init__(f"no {uri}")


def open_picture(uri: str) -> bytes:
    if uri != "memory://picture":
        raise MissingPictureError(uri)
    return PICTURE


@pytest.fixture(scope="session")
def new_pipeline(streams: StreamSettings, online: OnlineSettings) -> Callable[[], Pipeline]:
    return lambda: build_pipeline(streams, online, open_picture)


@pytest.fixture(scope="session")
def pipeline_with(streams: StreamSettings) -> Callable[[OnlineSettings], Pipeline]:
    return lambda settings: build_pipeline(streams, settings, open_picture)


def click_bytes(click: Click) -> bytes:
    """Return a click with its time where the field map looks for it."""
    return b'{"impression_id":"%s","product_id":"%s","at":{"ms":%d}}' % (
        click.impression_id.encode(),
        click.product_id.encode(),
        click.clicked_at_ms,
    )


def arrow_bytes(impressions: list[Impression]) -> bytes:
    names = ("impression_id", "user_id", "product_id", "creative_id", "shown_at_ms", "attributes", "experiment", "arm")
    table = pa.Table.from_pylist([{name: getattr(each, name) for name in names} for each in impressions])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@dataclass(frozen=True)
class Shown:
    """An impression of the log, with its number and when it arrives, and its click where it has one."""

    number: int
    impression: Impression
    arrival_ms: int
    click_arrival_ms: int | None


class _Builder:
    """Collects what is sent, by time of arrival."""

    def __init__(self, settings: StreamSettings) -> None:
        self._topic_of = event_topics(settings.topics)
        self._sent: list[tuple[int, int, str, int, bytes | None]] = []

    def send(self, event: Event, arrival_ms: int, value: bytes | None = None, partition: int = 0) -> None:
        payload = value if value is not None else click_bytes(event) if isinstance(event, Click) else encode(event)
        self.send_bytes(self._topic_of[type(event)], arrival_ms, payload, partition)

    def send_bytes(self, topic: str, arrival_ms: int, payload: bytes | None, partition: int = 0) -> None:
        self._sent.append((arrival_ms, len(self._sent), topic, partition, payload))

    def messages(self) -> list[Message]:
        next_offset: dict[tuple[str, int], int] = {}
        found = []
        for arrival_ms, _, topic, partition, payload in sorted(self._sent):
            offset = next_offset.get((topic, partition), 10)
            next_offset[topic, partition] = offset + 1
            found.append(Message(topic, partition, offset, arrival_ms, payload))
        return found


@pytest.fixture(scope="session")
def log(streams: StreamSettings) -> Log:
    rng = np.random.default_rng(5)
    out = _Builder(streams)
    topics = streams.topics
    for number, product in enumerate(PRODUCTS):
        title = f"{('oak chair', 'steel lamp', 'red sofa')[number]}"
        out.send(Product(product_id=product, title=title, updated_at_ms=START_MS, category="things"), START_MS)
        for creative in CREATIVES:
            out.send(Creative(creative_id=creative, product_id=product, created_at_ms=START_MS), START_MS + 1)
    digest = hashlib.sha256(PICTURE).hexdigest()
    later = START_MS + 500_000
    new = Creative(
        creative_id="new", product_id="p1", created_at_ms=later, image_uri="memory://picture", image_sha256=digest
    )
    out.send(new, later)
    out.send(new, later + 1)  # a repeat
    out.send(Product(product_id="p1", title="brass lamp", updated_at_ms=later, category="things"), later)
    dead = dict.fromkeys(
        ("bad_json", "bad_arrow", "unknown_version", "missing_field", "invalid_field", "unknown_product"), 1
    )
    dead |= {"unknown_creative": 1, "unreadable_image": 2, "unknown_impression": 2}
    out.send(Creative(creative_id="x", product_id="nobody's", created_at_ms=later), later)
    dead["unknown_product"] += 1
    out.send(Creative(creative_id="x", product_id="p0", created_at_ms=later, image_uri="memory://other"), later)
    wrong = Creative(
        creative_id="y", product_id="p0", created_at_ms=later, image_uri="memory://picture", image_sha256="0" * 64
    )
    out.send(wrong, later)
    n_duplicates = 1
    n_clicks = 0
    by_creative: dict[tuple[str, str], tuple[int, int]] = {}
    by_arm = {"group": (0, 0), "all": (0, 0)}
    pending: list[Impression] = []
    shown: list[Shown] = []
    for number in range(N_IMPRESSIONS):
        at_ms = START_MS + 2_000 + 250 * number
        user = int(rng.integers(300))
        product = PRODUCTS[int(rng.integers(3))]
        creative = str(rng.choice(CREATIVES))
        if at_ms > later + 10_000 and product == "p1" and rng.random() < 0.2:
            creative = "new"
        old = user % 2
        attributes = {"age": ("young", "old")[old], "tier": str(1 + user % 3), "city": f"c{user % 9}"}
        if user % 11 == 0:
            del attributes["tier"]
        impression = Impression(
            impression_id=f"i{number:05d}",
            user_id=f"u{user}",
            product_id=product,
            creative_id=creative,
            shown_at_ms=at_ms,
            attributes=attributes,
            experiment="groups" if user % 4 else None,
            arm=("group", "all")[user % 2] if user % 4 else None,
            p_shown=0.25,
        )
        n, x = by_creative.get((product, creative), (0, 0))
        likes = (creative in "ab") == bool(old)
        if product == "p0" and number > N_IMPRESSIONS * 0.6:
            likes = not likes
        clicked = rng.random() < (0.5 if likes else 0.05)
        by_creative[product, creative] = (n + 1, x + clicked)
        if impression.arm is not None:
            n, x = by_arm[impression.arm]
            by_arm[impression.arm] = (n + 1, x + clicked)
        arrival_ms = at_ms + int(rng.integers(0, 3_000))
        if 1_000 <= number < 1_200:  # a stretch that comes in Arrow batches
            pending.append(impression)
            if len(pending) == 50:
                out.send_bytes(topics.impressions, arrival_ms, arrow_bytes(pending), partition=1)
                pending = []
        else:
            out.send(impression, arrival_ms, partition=number % 2)
            if number % 50 == 0:
                out.send(impression, arrival_ms + 10_000, partition=number % 2)
                n_duplicates += 1
        click_arrival = None
        if clicked:
            n_clicks += 1
            overtakes = number % 40 == 0
            delay_s = float(rng.exponential(15)) if overtakes or rng.random() < 0.9 else float(rng.uniform(60, 500))
            click = Click(
                impression_id=impression.impression_id,
                product_id=product,
                clicked_at_ms=at_ms + max(1, int(1_000 * min(delay_s, 500))),
            )
            click_arrival = arrival_ms - 1_500 if overtakes else click.clicked_at_ms + int(rng.integers(3_000))
            out.send(click, click_arrival)
            if number % 30 == 0:
                out.send(click, click_arrival + 1)
                n_duplicates += 1
        shown.append(Shown(number, impression, arrival_ms, click_arrival))
        if number == 2_000:
            at = arrival_ms
            raw = encode(impression)
            out.send_bytes(topics.impressions, at, raw[:-9])
            out.send_bytes(topics.impressions, at, b"\xff\xff\xff\xff\x00\x01")
            out.send_bytes(topics.impressions, at, raw.replace(b'"schema_version":1', b'"schema_version":2'))
            out.send_bytes(topics.impressions, at, raw.replace(b'"user_id"', b'"user"'))
            out.send_bytes(topics.impressions, at, raw.replace(b"%d" % at_ms, b"-1"))
            out.send_bytes(topics.impressions, at, raw.replace(product.encode(), b"p9").replace(b"i02000", b"j1"))
            out.send_bytes(
                topics.impressions, at, raw.replace(b'"creative_id":"', b'"creative_id":"z').replace(b"i02000", b"j2")
            )
            for orphan in ("never-1", "never-2"):
                out.send(Click(impression_id=orphan, product_id="p0", clicked_at_ms=at_ms), at)

    def take_back(each: Shown, *, impression: bool) -> None:
        n_shown, was_clicked = int(impression), int(each.click_arrival_ms is not None)
        name = (each.impression.product_id, each.impression.creative_id)
        by_creative[name] = (by_creative[name][0] - n_shown, by_creative[name][1] - was_clicked)
        if each.impression.arm is not None:
            n, x = by_arm[each.impression.arm]
            by_arm[each.impression.arm] = (n - n_shown, x - was_clicked)

    n_forgotten = 0
    for user_id, at_number in FORGOTTEN:
        at_ms = START_MS + 2_000 + 250 * at_number
        out.send(UserForgotten(user_id=user_id, forgotten_at_ms=at_ms), at_ms)
        for each in shown:
            if each.impression.user_id != user_id or each.arrival_ms > at_ms:
                continue
            # No repeat comes after it, which would be a new event.
            assert (each.number % 50 and each.number % 30) or each.arrival_ms + 12_000 < at_ms
            n_forgotten += 1
            take_back(each, impression=True)
            if each.click_arrival_ms is not None:
                n_clicks -= 1
                dead["unknown_impression"] += each.click_arrival_ms > at_ms
    forgotten = {user_id for user_id, _ in FORGOTTEN}
    clicked_ones = [each for each in shown if each.click_arrival_ms and each.impression.user_id not in forgotten]
    for number, each in enumerate(clicked_ones[::9]):
        assert each.click_arrival_ms is not None
        retracted = ClickRetracted(
            impression_id=each.impression.impression_id,
            product_id=each.impression.product_id,
            retracted_at_ms=each.click_arrival_ms,
        )
        # Before the label is due, after it, and when the click could no longer come.
        retracted_ms = max(each.click_arrival_ms, each.arrival_ms) + (3_000, 100_000, 700_000)[number % 3]
        out.send(retracted, retracted_ms)
        if number % 5 == 0:
            out.send(retracted, retracted_ms + 1)
            n_duplicates += 1
        n_clicks -= 1
        take_back(each, impression=False)
    not_clicked = next(each.impression for each in shown if not each.click_arrival_ms)
    for impression_id in ("never-3", not_clicked.impression_id):
        wrong_one = ClickRetracted(impression_id=impression_id, product_id="p0", retracted_at_ms=later)
        out.send(wrong_one, later)
    dead["unknown_impression"] += 1
    dead["unknown_click"] = 1
    out.send(UserForgotten(user_id="nobody", forgotten_at_ms=later), later)
    n_duplicates += 1
    end_ms = START_MS + 2_000 + 250 * N_IMPRESSIONS + 2_000_000
    for number, product in enumerate(PRODUCTS):
        last = Impression(
            impression_id=f"end{number}", user_id="u", product_id=product, creative_id="a", shown_at_ms=end_ms
        )
        out.send(last, event_time_ms(last))
        n, x = by_creative[product, "a"]
        by_creative[product, "a"] = (n + 1, x)
    return Log(out.messages(), N_IMPRESSIONS + 3 - n_forgotten, n_clicks, n_duplicates, dead, by_creative, by_arm)
