from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.attributes import ATTRIBUTES
from simulator.decider import Decision
from simulator.settings import TrafficSettings, WorldSettings
from simulator.sink import ListSink
from simulator.spoil import SPOIL_REASONS, spoil, spoil_plan
from simulator.traffic import Traffic, user_attributes
from simulator.world import N_STYLE_DIMS, World
from streams.codec import Undecodable, encode, topic_decoders
from streams.events import Click, Impression
from streams.settings import FieldMapSettings, TopicSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOPICS = TopicSettings()
PRODUCTS = [f"p{i}" for i in range(6)]
ATTRIBUTES_OF_USERS = [{"age": "18-20", "gender": "female"}, {"age": "over 70"}, {}]


def flat_chance(
    users: NDArray[np.int64], products: NDArray[np.int64], styles: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.full(len(users), 0.2)


def run(settings: TrafficSettings, seed: int = 1, batch: int = 100) -> tuple[Traffic, ListSink]:
    traffic = Traffic(settings, PRODUCTS, ATTRIBUTES_OF_USERS, np.random.default_rng(seed), run_id="t")
    sink = ListSink()
    while traffic.counts.n_impressions < settings.n_impressions:
        requests = traffic.draw(min(batch, settings.n_impressions - traffic.counts.n_impressions))
        decisions = [Decision(f"{PRODUCTS[p]}-c0", 0.5, "arm-a", "exp") for p in requests.product_index.tolist()]
        styles = np.zeros((len(requests), N_STYLE_DIMS))
        traffic.send(traffic.show(requests, decisions, styles, flat_chance), sink, TOPICS)
    for requests in traffic.draw_closing():
        decisions = [Decision(f"{PRODUCTS[p]}-c0") for p in requests.product_index.tolist()]
        styles = np.zeros((len(requests), N_STYLE_DIMS))
        traffic.send(traffic.show(requests, decisions, styles, flat_chance), sink, TOPICS)
    traffic.send(traffic.finish(), sink, TOPICS)
    return traffic, sink


@pytest.fixture(scope="module")
def whole_run() -> tuple[Traffic, ListSink]:
    return run(TrafficSettings(n_impressions=20_000))


def split(sink: ListSink) -> tuple[list[Impression], list[Click]]:
    return (
        [event for event in sink.events if isinstance(event, Impression)],
        [event for event in sink.events if isinstance(event, Click)],
    )


def test_produced_is_the_sum_of_its_kinds(whole_run: tuple[Traffic, ListSink]) -> None:
    traffic, sink = whole_run
    counts = traffic.counts
    impressions, clicks = split(sink)
    assert traffic.n_on_their_way == 0
    assert len({e.impression_id for e in impressions}) == counts.n_impressions
    assert len({e.impression_id for e in clicks}) == counts.n_clicks
    assert len(impressions) == counts.n_impressions + counts.duplicates["impressions"]
    assert len(clicks) == counts.n_clicks + counts.duplicates["clicks"]
    for topic, n_events in (("impressions", len(impressions)), ("clicks", len(clicks))):
        assert counts.produced[topic] == n_events + counts.spoiled_by_topic[topic]
    assert sum(counts.spoiled_by_topic.values()) == counts.n_spoiled == len(sink.raw)
    assert sum(n for n, _ in counts.by_creative.values()) == counts.n_impressions
    assert sum(n for _, n in counts.by_arm.values()) == counts.n_clicks


def test_rates_are_those_of_the_settings(whole_run: tuple[Traffic, ListSink]) -> None:
    traffic, _ = whole_run
    counts, settings = traffic.counts, traffic.settings
    assert counts.n_clicks / counts.n_impressions == pytest.approx(0.2, abs=0.01)
    assert counts.n_late_clicks / counts.n_clicks == pytest.approx(settings.p_late_click, abs=0.01)
    assert counts.duplicates["impressions"] / counts.n_impressions == pytest.approx(settings.p_duplicate, abs=0.002)
    hours = (traffic.now_ms - settings.start_ms) / 3_600_000 - settings.closing_hours
    assert settings.n_impressions / hours == pytest.approx(settings.impressions_per_hour, rel=0.03)


def test_spoiled_messages_are_refused_for_their_reason_and_the_others_are_not(
    whole_run: tuple[Traffic, ListSink],
) -> None:
    traffic, sink = whole_run
    decoders = topic_decoders(TOPICS, FieldMapSettings())
    reasons = dict.fromkeys(SPOIL_REASONS, 0)
    shown = {e.impression_id for e in split(sink)[0]}
    for topic, key, payload in sink.raw:
        (event,) = decoders[topic].decode(payload)
        if isinstance(event, Undecodable):
            reasons[event.reason] += 1  # type: ignore[index]
            assert key in PRODUCTS
        elif isinstance(event, Click):
            assert event.impression_id not in shown
            reasons["unknown_impression"] += 1
        else:
            assert isinstance(event, Impression)
            unknown = "unknown_product" if event.product_id not in PRODUCTS else "unknown_creative"
            assert unknown == "unknown_product" or event.creative_id.startswith("no-such-creative")
            reasons[unknown] += 1  # type: ignore[index]
    assert reasons == traffic.counts.spoiled == dict.fromkeys(SPOIL_REASONS, 12)
    for event in sink.events[:200]:
        topic = TOPICS.impressions if isinstance(event, Impression) else TOPICS.clicks
        assert decoders[topic].decode(encode(event)) == [event]


def test_clicks_follow_their_impression_and_never_run_ahead_of_event_time(
    whole_run: tuple[Traffic, ListSink],
) -> None:
    traffic, sink = whole_run
    impressions, clicks = split(sink)
    shown_at = {e.impression_id: e.shown_at_ms for e in impressions}
    delays = np.array([c.clicked_at_ms - shown_at[c.impression_id] for c in clicks]) / 1000
    settings = traffic.settings
    assert delays.min() > 0
    assert delays.max() <= settings.late_click_until_s + 1
    on_time = delays[delays < settings.late_click_after_s]
    assert np.median(on_time) == pytest.approx(settings.click_delay_s * np.log(2), rel=0.1)


def test_messages_arrive_out_of_order_within_limits(whole_run: tuple[Traffic, ListSink]) -> None:
    _, sink = whole_run
    impressions, _ = split(sink)
    first: dict[str, int] = {}
    for event in impressions:
        first.setdefault(event.impression_id, event.shown_at_ms)
    times = np.array(list(first.values()))
    behind = np.maximum.accumulate(times) - times
    assert 0.01 < (behind > 0).mean() < 0.6
    assert behind.max() < 120_000


def test_duplicates_are_the_same_byte_by_byte(whole_run: tuple[Traffic, ListSink]) -> None:
    traffic, sink = whole_run
    seen: dict[str, bytes] = {}
    n_again = 0
    for event in split(sink)[0]:
        payload = encode(event)
        if event.impression_id in seen:
            n_again += 1
            assert seen[event.impression_id] == payload
        seen[event.impression_id] = payload
    assert n_again == traffic.counts.duplicates["impressions"] > 0


def test_nothing_is_spoiled_late_and_the_closing_stretch_passes_all_windows(
    whole_run: tuple[Traffic, ListSink],
) -> None:
    traffic, sink = whole_run
    impressions, _ = split(sink)
    decoder = topic_decoders(TOPICS, FieldMapSettings())[TOPICS.clicks]
    orphans = [e for t, _, p in sink.raw if t == TOPICS.clicks for e in decoder.decode(p) if isinstance(e, Click)]
    last_regular = impressions[traffic.settings.n_impressions - 1].shown_at_ms
    run_ms = last_regular - traffic.settings.start_ms
    assert max(e.clicked_at_ms for e in orphans) < traffic.settings.start_ms + 0.63 * run_ms
    closing = [e for e in impressions if e.shown_at_ms > last_regular + 3_000_000]
    assert {e.product_id for e in closing} == set(PRODUCTS)
    assert closing[-1].shown_at_ms - last_regular >= 25 * 3_600_000


def test_the_same_seed_makes_the_same_stream() -> None:
    settings = TrafficSettings(n_impressions=1_500)
    first, second, other = (run(settings, seed)[1] for seed in (3, 3, 4))
    assert first.events == second.events
    assert first.raw == second.raw
    assert first.events != other.events


@given(
    n_impressions=st.integers(1, 400),
    batch=st.integers(1, 97),
    n_spoiled=st.integers(0, 5),
    p_duplicate=st.floats(0, 1),
    p_late=st.floats(0, 1),
)
@settings(max_examples=25, deadline=None)
def test_whatever_the_settings_all_that_is_counted_is_sent(
    n_impressions: int, batch: int, n_spoiled: int, p_duplicate: float, p_late: float
) -> None:
    traffic, sink = run(
        TrafficSettings(
            n_impressions=n_impressions,
            n_spoiled_per_reason=n_spoiled,
            p_duplicate=p_duplicate,
            p_late_click=p_late,
            closing_hours=2,
        ),
        batch=batch,
    )
    counts = traffic.counts
    assert counts.n_impressions == n_impressions + 2 * len(PRODUCTS)
    assert sum(counts.produced.values()) == len(sink.events) + len(sink.raw)
    assert counts.n_spoiled == n_spoiled * len(SPOIL_REASONS)
    assert len(sink.events) == counts.n_impressions + counts.n_clicks + sum(counts.duplicates.values())


def test_messages_come_in_the_order_of_arrival() -> None:
    traffic = Traffic(
        TrafficSettings(n_impressions=300), PRODUCTS, ATTRIBUTES_OF_USERS, np.random.default_rng(2), run_id="t"
    )
    requests = traffic.draw(300)
    decisions = [Decision("c")] * 300
    arrived = traffic.show(requests, decisions, np.zeros((300, N_STYLE_DIMS)), flat_chance)
    n_waiting = traffic.n_on_their_way
    assert n_waiting > 0
    waiting = [entry[0] for entry in traffic._on_their_way]
    assert min(waiting) > traffic.now_ms
    assert heapq.nsmallest(1, waiting)[0] > requests.shown_at_ms[-1]
    assert len(traffic.finish()) == n_waiting
    assert len(arrived) + n_waiting >= 300


@pytest.mark.parametrize(
    ("n_impressions", "n_each", "until"), [(1_000, 12, 0.6), (10, 3, 0.5), (1, 2, 1.0), (50, 0, 1.0)]
)
def test_spoil_plan_holds_every_reason_as_often_as_asked(n_impressions: int, n_each: int, until: float) -> None:
    plan = spoil_plan(n_impressions, n_each, until)
    reasons = [reason for at in sorted(plan) for reason in plan[at]]
    assert {reason: reasons.count(reason) for reason in SPOIL_REASONS} == dict.fromkeys(SPOIL_REASONS, n_each)
    assert all(0 <= at < max(1, n_impressions * until) for at in plan)


@pytest.mark.parametrize("reason", SPOIL_REASONS)
@pytest.mark.parametrize("seed", range(8))
def test_a_spoiled_message_is_wrong_in_its_own_way(reason: str, seed: int) -> None:
    like = Impression(impression_id="i", user_id="u", product_id="p0", creative_id="c", shown_at_ms=5)
    topic, _, payload = spoil(reason, like, "s-1", np.random.default_rng(seed))  # type: ignore[arg-type]
    (event,) = topic_decoders(TOPICS, FieldMapSettings())[f"osmf.{topic}"].decode(payload)
    if reason.startswith("unknown_") and reason != "unknown_version":
        assert not isinstance(event, Undecodable)
        assert payload.count(b"s-1") >= 1
    else:
        assert isinstance(event, Undecodable)
        assert event.reason == reason


def test_about_three_percent_of_the_values_are_missing_and_the_others_true() -> None:
    world = World.create(WorldSettings(n_users=2_000), ["seating"], 1)
    known = user_attributes(world, 0.03, np.random.default_rng(0))
    share = sum(map(len, known)) / (2_000 * len(ATTRIBUTES))
    assert share == pytest.approx(0.97, abs=0.005)
    for user in range(100):
        assert known[user].items() <= world.attribute_values(user).items()
