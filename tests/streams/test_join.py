"""The join of impressions and clicks: every case by a table, and nothing is lost in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.records import ImpressionRecord
from state.store import ChangeSet, Store, Table
from streams.codec import encode, event_time_ms
from streams.events import Click, ClickRetracted, Impression
from streams.join import Join, Joined, Tally, new_impressions
from streams.merge import Message
from streams.received import Received, Refused
from streams.settings import JoinSettings

WINDOWS = JoinSettings(allowed_lateness_s=10, label_window_s=100, attribution_window_s=1_000, click_wait_s=200)
"""An impression at t is labelled once the newest event is past t + 110 s, and forgotten past t + 1010 s."""


@dataclass
class Outcome:
    """What all batches gave together."""

    clicked: list[str] = field(default_factory=list)
    labelled: list[tuple[str, bool]] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    retracted: list[str] = field(default_factory=list)
    uncorrected: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    of_retractions: Tally = field(default_factory=Tally)


class Runner:
    """Feeds batches of (id, time in s) to a join over a real store, as the pipeline does."""

    def __init__(self, store: Store, windows: JoinSettings) -> None:
        self.store = store
        self.windows = windows
        self.watermark_ms = 0
        self.newest_ms = 0
        self.n_messages = 0
        self.n_closed_early = 0
        self.outcome = Outcome()

    def run(self, batch: Sequence[Impression | Click | ClickRetracted]) -> None:
        received = []
        for event in batch:
            topic = "corrections" if isinstance(event, ClickRetracted) else "log"
            message = Message(topic, 0, self.n_messages, event_time_ms(event), encode(event))
            received.append(Received(event, message, 0))
            self.n_messages += 1
        joined, changes = Joined(), ChangeSet()
        # A new join for every batch: all that it knows must be in the store.
        join = Join(self.windows, self.watermark_ms)
        with self.store.read() as txn:
            fresh = new_impressions(txn, [r for r in received if isinstance(r.event, Impression)], joined)
            records = {r.event.impression_id: record(r.event) for r in fresh if isinstance(r.event, Impression)}
            clicks = [r for r in received if isinstance(r.event, Click | ClickRetracted)]
            # As in the pipeline: duplicates and retractions do not move time.
            timed = [*fresh, *(r for r in clicks if isinstance(r.event, Click))]
            newest = max((event_time_ms(r.event) for r in timed), default=0)
            self.newest_ms = max(self.newest_ms, newest)
            join.run(txn, changes, records, clicks, self.newest_ms, joined)
        self.store.commit(changes)
        self.watermark_ms = join.watermark_ms
        self.n_closed_early += joined.n_closed_early
        out = self.outcome
        out.clicked += [name(r) for r in joined.clicked]
        out.labelled += [(name(r), r.click_counts) for r in joined.labelled]
        out.corrected += [name(r) for r in joined.corrected]
        out.retracted += [name(r) for r in joined.retracted]
        out.uncorrected += [name(r) for r in joined.uncorrected]
        out.refused += joined.refused
        out.tally.n_consumed += len(batch)
        for (topic, _), tally in joined.tallies.items():
            for total in (out.tally, out.of_retractions)[: 1 + (topic == "corrections")]:
                total.n_used += tally.n_used
                total.n_duplicates += tally.n_duplicates
                total.n_dead_letters += tally.n_dead_letters

    def count(self, table: Table) -> int:
        with self.store.read() as txn:
            return txn.count(table)


def record(event: Impression) -> ImpressionRecord:
    return ImpressionRecord(
        event.product_id, event.impression_id, b"", 0, event.shown_at_ms, 0, None, None, False, False
    )


def name(impression: ImpressionRecord) -> str:
    return impression.creative_id  # the impression's id, see `record`


def show(impression_id: str, at_s: int) -> Impression:
    return Impression(
        impression_id=impression_id, user_id="u", product_id="p", creative_id="c", shown_at_ms=at_s * 1000
    )


def click(impression_id: str, at_s: int) -> Click:
    return Click(impression_id=impression_id, product_id="p", clicked_at_ms=at_s * 1000)


def retract(impression_id: str, at_s: int = 0) -> ClickRetracted:
    return ClickRetracted(impression_id=impression_id, product_id="p", retracted_at_ms=at_s * 1000)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        yield Runner(store, WINDOWS)


Batch = list[Impression | Click | ClickRetracted]
T = 10_000
"""The time at which "a" is shown."""


@dataclass(frozen=True)
class Case:
    """Batches, and what they must give together; ids but "a" only move the time."""

    batches: list[Batch]
    clicked: int = 0
    labelled: list[bool] = field(default_factory=list)
    corrected: int = 0
    retracted: int = 0
    uncorrected: int = 0
    dead: int = 0
    duplicates: int = 0
    waiting: int = 0


CASES = {
    "an impression is not labelled while its window is open": Case([[show("a", T)], [show("x", T + 110)]]),
    "an impression without a click is labelled when its window closes": Case(
        [[show("a", T)], [show("x", T + 111)]], labelled=[False]
    ),
    "a click in the window makes a positive label, once": Case(
        [[show("a", T)], [click("a", T + 99)], [show("x", T + 111)]], clicked=1, labelled=[True]
    ),
    "a click in the impression's own batch": Case(
        [[show("a", T), click("a", T + 1)], [show("x", T + 111)]], clicked=1, labelled=[True]
    ),
    "a click in the batch that closes the window still makes the label": Case(
        [[show("a", T)], [click("a", T + 50), show("x", T + 500)]], clicked=1, labelled=[True]
    ),
    "a late click corrects the label": Case(
        [[show("a", T)], [show("x", T + 111)], [click("a", T + 300)]], clicked=1, labelled=[False], corrected=1
    ),
    "a click at the end of the attribution window still counts": Case(
        [[show("a", T)], [show("x", T + 111)], [click("a", T + 1_000)]], clicked=1, labelled=[False], corrected=1
    ),
    "a click after the attribution window is refused": Case(
        [[show("a", T)], [show("x", T + 111)], [click("a", T + 1_001)]], labelled=[False], dead=1
    ),
    "a click on a forgotten impression waits, then is refused": Case(
        [[show("a", T)], [show("x", T + 1_011)], [click("a", T + 1_011)], [show("y", T + 1_300)]],
        labelled=[False],
        dead=1,
    ),
    "a click twice counts once": Case(
        [[show("a", T)], [click("a", T + 5)], [click("a", T + 6)], [show("x", T + 111)]],
        clicked=1,
        labelled=[True],
        duplicates=1,
    ),
    "a click twice in one batch counts once": Case(
        [[show("a", T)], [click("a", T + 5), click("a", T + 5)]], clicked=1, duplicates=1
    ),
    "a late click twice corrects once": Case(
        [[show("a", T)], [show("x", T + 111)], [click("a", T + 200)], [click("a", T + 200)]],
        clicked=1,
        labelled=[False],
        corrected=1,
        duplicates=1,
    ),
    "an impression twice counts once": Case(
        [[show("a", T)], [show("a", T)], [show("x", T + 111)]], labelled=[False], duplicates=1
    ),
    "an impression twice in one batch counts once": Case(
        [[show("a", T), show("a", T)], [show("x", T + 111)]], labelled=[False], duplicates=1
    ),
    "a repeated impression does not lose its click": Case(
        [[show("a", T)], [click("a", T + 1)], [show("a", T)], [show("x", T + 111)]],
        clicked=1,
        labelled=[True],
        duplicates=1,
    ),
    "a click ahead of its impression waits for it": Case([[click("a", T + 5)]], waiting=1),
    "a click ahead of its impression is credited when it comes": Case(
        [[click("a", T + 5)], [show("a", T)], [show("x", T + 111)]], clicked=1, labelled=[True]
    ),
    "a click ahead of its impression in the same batch": Case([[click("a", T + 5), show("a", T)]], clicked=1),
    "a waiting click twice counts once": Case(
        [[click("a", T + 5)], [click("a", T + 5)], [show("a", T)]], clicked=1, duplicates=1
    ),
    "a waiting click twice in one batch counts once": Case(
        [[click("a", T + 5), click("a", T + 5)], [show("a", T)]], clicked=1, duplicates=1
    ),
    "a click whose impression never comes is refused after the wait": Case(
        [[click("a", T)], [show("x", T + 211)]], dead=1
    ),
    "a click waits up to the end of its wait": Case([[click("a", T)], [show("x", T + 210)]], waiting=1),
    "an impression that comes in the batch that ends the wait still gets its click": Case(
        [[click("a", T)], [show("a", T - 5), show("x", T + 500)]], clicked=1, labelled=[True]
    ),
    "an impression that comes long after its window closed is labelled at once": Case(
        [[show("x", T + 900)], [show("a", T)]], labelled=[False]
    ),
    "an impression that comes after its attribution window is labelled and forgotten": Case(
        [[show("x", T + 2_000)], [show("a", T)], [click("a", T + 1)]], labelled=[False], dead=1
    ),
    "a click that is retracted in its label window makes no positive label": Case(
        [[show("a", T)], [click("a", T + 5)], [retract("a")], [show("x", T + 111)]],
        clicked=1,
        labelled=[False],
        retracted=1,
    ),
    "a click and its retraction in the impression's own batch": Case(
        [[show("a", T), click("a", T + 5), retract("a")], [show("x", T + 111)]],
        clicked=1,
        labelled=[False],
        retracted=1,
    ),
    "a click that is retracted after it was learnt takes its label back": Case(
        [[show("a", T), click("a", T + 5)], [show("x", T + 111)], [retract("a")]],
        clicked=1,
        labelled=[True],
        retracted=1,
        uncorrected=1,
    ),
    "a late click that is retracted is corrected both ways": Case(
        [[show("a", T)], [show("x", T + 111)], [click("a", T + 300), retract("a")]],
        clicked=1,
        labelled=[False],
        corrected=1,
        retracted=1,
        uncorrected=1,
    ),
    "a retraction twice takes back once": Case(
        [[show("a", T), click("a", T + 5)], [retract("a")], [retract("a")]], clicked=1, retracted=1, duplicates=1
    ),
    "a click that comes again after its retraction has no effect": Case(
        [[show("a", T), click("a", T + 5), retract("a")], [click("a", T + 6)], [show("x", T + 111)]],
        clicked=1,
        labelled=[False],
        retracted=1,
        duplicates=1,
    ),
    "a retraction ahead of its click is refused": Case(
        [[show("a", T)], [retract("a"), click("a", T + 5)]], clicked=1, dead=1
    ),
    "a retraction of an impression that was never shown is refused": Case([[retract("a")]], dead=1),
    "a retraction moves no time": Case(
        [[show("a", T), click("a", T + 5)], [retract("a", T + 999)]], clicked=1, retracted=1
    ),
    "a click that waits can be retracted": Case(
        [[click("a", T + 5)], [retract("a")], [show("a", T), click("a", T + 6)], [show("x", T + 111)]],
        clicked=1,
        labelled=[False],
        retracted=1,
        duplicates=1,
    ),
    "a click that waits, its retraction and its impression in one batch": Case(
        [[click("a", T + 5), retract("a"), show("a", T), click("a", T + 6)], [show("x", T + 111)]],
        clicked=1,
        labelled=[False],
        retracted=1,
        duplicates=1,
    ),
    "a click that was retracted while it waited, and whose impression never comes": Case(
        [[click("a", T)], [retract("a"), retract("a")], [show("x", T + 211)]], dead=1, duplicates=1
    ),
    "a click that is said to come before its impression counts": Case(
        [[show("a", T)], [click("a", T - 50)]], clicked=1
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_case(runner: Runner, case: Case) -> None:
    for batch in case.batches:
        runner.run(batch)
    out = runner.outcome
    assert [clicked for each, clicked in out.labelled if each == "a"] == case.labelled
    assert out.clicked == ["a"] * case.clicked
    assert out.corrected == ["a"] * case.corrected
    assert out.retracted == ["a"] * case.retracted
    assert out.uncorrected == ["a"] * case.uncorrected
    assert len(out.refused) == out.tally.n_dead_letters == case.dead
    assert {refused.reason for refused in out.refused} <= {"unknown_impression", "unknown_click"}
    assert out.tally.n_duplicates == case.duplicates
    assert runner.count(Table.WAITING_CLICKS) == case.waiting
    assert out.tally.n_consumed == out.tally.n_used + out.tally.n_dead_letters + case.waiting


def test_a_refused_retraction_says_why(runner: Runner) -> None:
    runner.run([show("a", T), retract("a"), retract("never-shown")])
    unclicked, unknown = runner.outcome.refused
    assert (unclicked.reason, unclicked.detail) == ("unknown_click", "no click on impression 'a' has been counted")
    assert (unknown.reason, unknown.offset) == ("unknown_impression", 2)
    assert "nothing is known of impression 'never-shown', or no longer" in unknown.detail


def test_a_click_that_no_longer_waits_has_no_timer_left(runner: Runner) -> None:
    runner.run([click("a", T + 5)])
    assert runner.count(Table.TIMERS) == 1
    runner.run([show("a", T)])
    assert runner.count(Table.TIMERS) == 1  # the label's


def test_a_refused_click_says_why_and_where(runner: Runner) -> None:
    orphan = click("never-shown", T)
    for batch in ([show("a", T)], [orphan], [click("a", T + 1_200)]):
        runner.run(batch)
    late, waited = runner.outcome.refused
    assert (late.topic, late.partition, late.offset, late.row) == ("log", 0, 2, 0)
    assert late.detail == (
        "the click came 1200 s after impression 'a'; it is credited up to "
        "streams.join.attribution_window_s = 1000 s after it"
    )
    assert (waited.offset, waited.payload) == (1, encode(orphan))
    assert waited.detail == "no impression 'never-shown' within streams.join.click_wait_s = 200 s"


def test_nothing_is_kept_once_all_windows_have_closed(runner: Runner) -> None:
    runner.run([show("a", T), show("b", T), click("b", T + 1), click("orphan", T)])
    assert (runner.count(Table.IMPRESSIONS), runner.count(Table.WAITING_CLICKS)) == (2, 1)
    runner.run([show("z", T + 5_000)])
    assert runner.count(Table.IMPRESSIONS) == 1  # z itself
    assert runner.count(Table.TIMERS) == 1
    assert runner.count(Table.WAITING_CLICKS) == 0


def test_a_clock_that_steps_back_does_not_move_the_watermark_back(runner: Runner) -> None:
    runner.run([show("a", T)])
    assert runner.watermark_ms == (T - 10) * 1000
    runner.run([show("b", T - 500)])
    assert runner.watermark_ms == (T - 10) * 1000


@pytest.mark.parametrize("attribution_s", [50, 100, 101])
def test_an_attribution_window_not_longer_than_the_label_window(tmp_path: Path, attribution_s: int) -> None:
    windows = WINDOWS.model_copy(update={"attribution_window_s": attribution_s})
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        runner = Runner(store, windows)
        runner.run([show("a", T), show("b", T), click("a", T + attribution_s), click("b", T + attribution_s + 1)])
        runner.run([show("z", T + 5_000)])
        assert runner.outcome.clicked == ["a"]
        assert sorted(runner.outcome.labelled) == [("a", True), ("b", False)]
        assert len(runner.outcome.refused) == 1
        assert runner.count(Table.TIMERS) == runner.count(Table.IMPRESSIONS) == 1


events = st.one_of(
    st.builds(show, st.sampled_from("abcdef"), st.integers(0, 3_000)),
    st.builds(click, st.sampled_from("abcdefgh"), st.integers(0, 3_000)),
    st.builds(retract, st.sampled_from("abcdefgh"), st.integers(0, 3_000)),
)


@settings(max_examples=150)
@given(st.lists(st.lists(events, max_size=5), max_size=8))
def test_everything_consumed_is_used_dead_or_waiting(
    tmp_path_factory: pytest.TempPathFactory, batches: list[Batch]
) -> None:
    with Store(tmp_path_factory.mktemp("join"), map_size_mib=16, sync=False) as store:
        runner = Runner(store, WINDOWS)
        for batch in batches:
            runner.run(batch)
            tally = runner.outcome.tally
            waiting = runner.count(Table.WAITING_CLICKS)
            assert tally.n_consumed == tally.n_used + tally.n_dead_letters + waiting
        # Time passes: every impression gets exactly one label, every click ends, nothing is left behind.
        runner.run([show("end", 100_000)])
        tally = runner.outcome.tally
        assert runner.count(Table.WAITING_CLICKS) == 0
        assert runner.count(Table.IMPRESSIONS) == runner.count(Table.TIMERS) == 1
        assert tally.n_consumed == tally.n_used + tally.n_dead_letters
        n_impressions = sum(isinstance(event, Impression) for batch in batches for event in batch)
        n_clicks = sum(isinstance(event, Click) for batch in batches for event in batch)
        n_labelled = len(runner.outcome.labelled)
        n_clicked = len(runner.outcome.clicked)
        out, of_retractions = runner.outcome, runner.outcome.of_retractions
        n_duplicates = tally.n_duplicates - of_retractions.n_duplicates
        n_dead = tally.n_dead_letters - of_retractions.n_dead_letters
        assert n_labelled + n_clicked + n_duplicates + n_dead == n_impressions + n_clicks
        positives = sum(clicked for _, clicked in out.labelled)
        assert positives + len(out.corrected) - len(out.uncorrected) == n_clicked - len(out.retracted)
        # A retraction of a click that waits is used, though the click may turn out to be none of an impression.
        assert len(out.retracted) <= of_retractions.n_used - of_retractions.n_duplicates
        assert len(out.retracted) <= n_clicked <= n_labelled


@settings(max_examples=60)
@given(st.lists(events, max_size=14), st.integers(1, 6))
def test_without_lateness_the_size_of_batches_does_not_change_the_counts(
    tmp_path_factory: pytest.TempPathFactory, log: Batch, size: int
) -> None:
    log = sorted(log, key=event_time_ms)
    found = []
    for n in (1, size):
        with Store(tmp_path_factory.mktemp("join"), map_size_mib=16, sync=False) as store:
            runner = Runner(store, WINDOWS.model_copy(update={"allowed_lateness_s": 4_000, "click_wait_s": 9_000}))
            for start in range(0, len(log), n):
                runner.run(log[start : start + n])
            runner.run([show("end", 100_000)])
            out = runner.outcome
            found.append((sorted(out.clicked), sorted(out.labelled), out.tally))
    assert found[0] == found[1]
