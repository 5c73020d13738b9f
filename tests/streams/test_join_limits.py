"""The join's limits: what they drop is the oldest, is counted, and breaks no account."""

from __future__ import annotations

from pathlib import Path

import pytest

from state.store import Store, Table
from streams.codec import encode
from streams.events import Impression
from streams.join import Joined
from streams.merge import Message
from streams.received import Received
from streams.settings import JoinSettings
from tests.streams.test_join import WINDOWS, Runner, click, show

T = 10_000


def limited(path: Path, **limits: int) -> Runner:
    return Runner(Store(path, map_size_mib=16, sync=False), WINDOWS.model_copy(update=limits))


def test_of_too_many_impressions_the_oldest_labelled_ones_are_closed_first(tmp_path: Path) -> None:
    runner = limited(tmp_path, max_pending_impressions=3)
    with runner.store:
        runner.run([show("a", T), show("b", T + 1)])
        runner.run([show("c", T + 200), show("d", T + 201)])  # "a" and "b" are labelled, "a" is one too many
        assert sorted(runner.outcome.labelled) == [("a", False), ("b", False)]
        assert runner.count(Table.IMPRESSIONS) == 3
        runner.run([click("b", T + 202), click("a", T + 203)])
        assert runner.outcome.clicked == ["b"]
        assert runner.outcome.corrected == ["b"]
        assert runner.count(Table.WAITING_CLICKS) == 1  # of "a" nothing is known any more


def test_without_labelled_ones_the_oldest_are_labelled_early(tmp_path: Path) -> None:
    runner = limited(tmp_path, max_pending_impressions=2)
    with runner.store:
        runner.run([show(name, T + number) for number, name in enumerate("abcd")] + [click("a", T + 3)])
        assert runner.outcome.labelled == [("a", True), ("b", False)]
        assert runner.n_closed_early == 2
        assert (runner.count(Table.IMPRESSIONS), runner.count(Table.TIMERS)) == (2, 2)
        runner.run([show("x", T + 5_000)])
        assert sorted(runner.outcome.labelled) == [("a", True), ("b", False), ("c", False), ("d", False)]


def test_a_lowered_limit_is_reached_step_by_step(tmp_path: Path) -> None:
    runner = limited(tmp_path)
    with runner.store:
        runner.run([show(f"i{number}", T + number) for number in range(50)])
        runner.windows = WINDOWS.model_copy(update={"max_pending_impressions": 10, "max_timers_per_batch": 15})
        left = []
        for number in range(4):
            runner.run([show(f"j{number}", T + 50 + number)])
            left.append(runner.count(Table.IMPRESSIONS))
        assert left == [36, 22, 10, 10]
        assert runner.n_closed_early == 44


def test_while_as_many_clicks_wait_as_may_further_ones_are_refused(tmp_path: Path) -> None:
    runner = limited(tmp_path, max_waiting_clicks=2)
    with runner.store:
        runner.run([click("a", T), click("b", T)])
        runner.run([click("c", T), click("a", T)])
        assert [refused.reason for refused in runner.outcome.refused] == ["over_limit"]
        assert "streams.join.max_waiting_clicks = 2 clicks wait for theirs already" in runner.outcome.refused[0].detail
        runner.run([show("a", T), click("d", T), show("c", T)])  # there is room again
        assert runner.outcome.clicked == ["a"]
        assert len(runner.outcome.refused) == 1
        tally = runner.outcome.tally
        assert tally.n_consumed == tally.n_used + tally.n_dead_letters + runner.count(Table.WAITING_CLICKS)


def test_a_click_that_has_found_its_impression_leaves_no_timer(tmp_path: Path) -> None:
    runner = limited(tmp_path)
    with runner.store:
        runner.run([click("a", T)])
        assert runner.count(Table.TIMERS) == 1
        runner.run([show("a", T)])
        assert runner.count(Table.TIMERS) == 1  # of its label window


def test_of_a_batch_of_many_events_a_refused_one_is_kept_by_itself() -> None:
    event = Impression(impression_id="i", user_id="u", product_id="p", creative_id="c", shown_at_ms=5)
    batch = Message("t", 0, 0, 5, b"\xff\xff\xff\xff" + bytes(100_000))
    assert Received(event, batch, 3).refuse("unknown_product", "none").payload == encode(event)
    alone = Message("t", 0, 0, 5, b'{"its": "own bytes"}')
    assert Received(event, alone, 0).refuse("unknown_product", "none").payload == alone.value


@pytest.mark.parametrize("name", ["max_pending_impressions", "max_waiting_clicks"])
def test_limits_are_far_from_the_usual_course(name: str) -> None:
    assert getattr(JoinSettings(), name) >= 1_000_000
    assert Joined().n_closed_early == 0
