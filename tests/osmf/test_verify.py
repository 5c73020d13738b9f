"""Verify: the recount's rules, one at a time, on logs whose counts are plain to see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from osmf.log_entry import KINDS, LogEntry
from osmf.recount import Counts, recount_entries
from streams.codec import encode, event_key, event_time_ms, event_topics
from streams.events import Click, ClickRetracted, Creative, Event, Impression, Product, UserForgotten
from streams.settings import StreamSettings

STREAMS = StreamSettings()
WINDOW_MS = STREAMS.join.attribution_window_s * 1000
WAIT_MS = (STREAMS.join.click_wait_s + STREAMS.join.allowed_lateness_s) * 1000
START_MS = 1_700_000_000_000


def product(product_id: str = "p") -> Product:
    return Product(product_id=product_id, title="A lamp", updated_at_ms=START_MS)


def creative(creative_id: str = "c", product_id: str = "p") -> Creative:
    return Creative(creative_id=creative_id, product_id=product_id, created_at_ms=START_MS)


def shown(impression_id: str, creative_id: str = "c", product_id: str = "p") -> Impression:
    return Impression(
        impression_id=impression_id,
        user_id="u",
        product_id=product_id,
        creative_id=creative_id,
        shown_at_ms=START_MS,
    )


def clicked(impression_id: str, after_ms: int = 1_000) -> Click:
    return Click(impression_id=impression_id, product_id="p", clicked_at_ms=START_MS + after_ms)


def retracted(impression_id: str) -> ClickRetracted:
    return ClickRetracted(impression_id=impression_id, product_id="p", retracted_at_ms=START_MS)


def forgotten(user_id: str = "u") -> UserForgotten:
    return UserForgotten(user_id=user_id, forgotten_at_ms=START_MS)


def log(*events: Event) -> Iterator[LogEntry]:
    kind_of = {
        event_type: kind
        for kind in KINDS
        for event_type, topic in event_topics(STREAMS.topics).items()
        if topic == getattr(STREAMS.topics, kind)
    }
    for event in events:
        yield LogEntry(event_time_ms(event), kind_of[type(event)], event_key(event), encode(event))


KNOWN = (product(), creative(), creative("d"))

CASES: dict[str, tuple[tuple[Event, ...], dict[tuple[str, str], tuple[int, int]]]] = {
    "nothing shown": (KNOWN, {}),
    "a retracted click": ((*KNOWN, shown("1"), clicked("1"), retracted("1")), {("p", "c"): (1, 0)}),
    "a retraction twice": ((*KNOWN, shown("1"), clicked("1"), retracted("1"), retracted("1")), {("p", "c"): (1, 0)}),
    "a click again after its retraction": (
        (*KNOWN, shown("1"), clicked("1"), retracted("1"), clicked("1")),
        {("p", "c"): (1, 0)},
    ),
    "a retraction ahead of its click": ((*KNOWN, shown("1"), retracted("1"), clicked("1")), {("p", "c"): (1, 1)}),
    "a retraction of a click that waited": (
        (*KNOWN, clicked("1", -5_000), retracted("1"), shown("1")),
        {("p", "c"): (1, 0)},
    ),
    "a forgotten user": ((*KNOWN, shown("1"), shown("2", "d"), clicked("1"), forgotten()), {}),
    "a forgotten user comes again": (
        (*KNOWN, shown("1"), clicked("1"), forgotten(), shown("1"), shown("2"), clicked("2")),
        {("p", "c"): (2, 1)},
    ),
    "a click ahead of a forgotten impression": ((*KNOWN, clicked("1", -5_000), shown("1"), forgotten()), {}),
    "another user is forgotten": ((*KNOWN, shown("1"), forgotten("v")), {("p", "c"): (1, 0)}),
    "shown and clicked": ((*KNOWN, shown("1"), shown("2"), clicked("2")), {("p", "c"): (2, 1)}),
    "an impression twice": ((*KNOWN, shown("1"), shown("1", "d")), {("p", "c"): (1, 0)}),
    "a click twice": ((*KNOWN, shown("1"), clicked("1"), clicked("1", 9_000)), {("p", "c"): (1, 1)}),
    "a click without impression": ((*KNOWN, shown("1"), clicked("7")), {("p", "c"): (1, 0)}),
    "a click at the window's end": ((*KNOWN, shown("1"), clicked("1", WINDOW_MS)), {("p", "c"): (1, 1)}),
    "a click after the window": ((*KNOWN, shown("1"), clicked("1", WINDOW_MS + 1)), {("p", "c"): (1, 0)}),
    "a click ahead of its impression": ((*KNOWN, clicked("1", -5_000), shown("1")), {("p", "c"): (1, 1)}),
    "a click too far ahead": ((*KNOWN, clicked("1", -WAIT_MS - 1), shown("1")), {("p", "c"): (1, 0)}),
    "an unknown product": ((*KNOWN, shown("1", product_id="q")), {}),
    "an unknown creative": ((*KNOWN, shown("1", "e"), clicked("1")), {}),
    "a creative ahead of its product": ((creative("x", "q"), product("q"), shown("1", "x", "q")), {}),
}


@pytest.mark.parametrize(("events", "expected"), CASES.values(), ids=CASES.keys())
def test_a_recount(events: tuple[Event, ...], expected: dict[tuple[str, str], tuple[int, int]]) -> None:
    assert recount_entries(lambda: log(*events), STREAMS) == {
        name: Counts(*counts) for name, counts in expected.items()
    }


def test_bad_rows_are_not_counted() -> None:
    bad = LogEntry(START_MS, "impressions", "p", b'{"impression_id": "2"')
    assert recount_entries(lambda: [*log(*KNOWN), bad, *log(shown("1"))], STREAMS) == {("p", "c"): Counts(1, 0)}
