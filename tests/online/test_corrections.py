"""Corrections on the whole pipeline: what was added is taken back, of a user nothing is left, and the rest stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from online.ledger import Ledger
from online.pipeline import Pipeline
from online.replay import unpack_rows
from online.settings import LedgerSettings, OnlineSettings
from online.worker import build_pipeline
from osmf.verify import broken_invariants
from state.reading import StateView, open_view
from state.records import ImpressionRecord, OutboxRecord, WaitingClickRecord
from state.store import Store, Table
from streams.codec import encode, event_time_ms, event_topics
from streams.events import Click, ClickRetracted, Creative, DeadLetter, Event, Impression, Product, UserForgotten
from streams.merge import Message
from streams.settings import JoinSettings, StreamSettings
from tests.faults.traces import traces

START_MS = 1_748_822_400_000
USER = "the-user-in-question"
STREAMS = StreamSettings(
    join=JoinSettings(allowed_lateness_s=1, label_window_s=60, attribution_window_s=600, click_wait_s=120)
)


def product() -> Product:
    return Product(product_id="p", title="lamp", updated_at_ms=START_MS)


def creative() -> Creative:
    return Creative(creative_id="c", product_id="p", created_at_ms=START_MS)


def shown(name: str, user_id: str = USER, at_s: int = 1, arm: str | None = "all", product_id: str = "p") -> Impression:
    return Impression(
        impression_id=f"impression-{name}",
        user_id=user_id,
        product_id=product_id,
        creative_id="c",
        shown_at_ms=START_MS + at_s * 1_000,
        attributes={"age": "old", "tier": "2", "city": user_id},
        experiment="e",
        arm=arm,
    )


def clicked(name: str, at_s: int = 2) -> Click:
    return Click(impression_id=f"impression-{name}", product_id="p", clicked_at_ms=START_MS + at_s * 1_000)


def retracted(name: str) -> ClickRetracted:
    return ClickRetracted(impression_id=f"impression-{name}", product_id="p", retracted_at_ms=START_MS)


def forgotten(user_id: str = USER) -> UserForgotten:
    return UserForgotten(user_id=user_id, forgotten_at_ms=START_MS)


def time(at_s: int) -> Impression:
    """Return an impression of somebody else that moves the time."""
    return msgspec.structs.replace(shown("", "somebody-else", at_s, arm=None), impression_id=f"tick-{at_s}")


class Run:
    """A pipeline over a store that is given batches of events."""

    def __init__(self, store: Store, online: OnlineSettings, streams: StreamSettings = STREAMS) -> None:
        self.store = store
        self.online = online
        self.streams = streams
        self.pipeline = self.restarted()
        self.offsets: Counter[str] = Counter()

    def restarted(self) -> Pipeline:
        pipeline = build_pipeline(self.streams, self.online)
        pipeline.restore(self.store)
        return pipeline

    def work_off(self, *events: Event) -> None:
        messages = []
        for event in events:
            topic = event_topics(self.streams.topics)[type(event)]
            messages.append(Message(topic, 0, self.offsets[topic], event_time_ms(event), encode(event)))
            self.offsets[topic] += 1
        with self.store.read() as txn:
            changes, _ = self.pipeline.run(messages, txn)
        self.store.commit(changes)
        with self.store.read() as txn:
            decoder = msgspec.msgpack.Decoder(WaitingClickRecord)
            waiting = [decoder.decode(value) for _, value in txn.scan(Table.WAITING_CLICKS)]
            assert broken_invariants(StateView({0: txn}), waiting, self.streams) == []

    def counts(self) -> tuple[int, int]:
        with open_view(self.store) as view:
            cells = view.cells()
            arms = [record for (_, arm, _), record in view.arms().items() if arm == "all"]
        n, x = sum(cell.n_impressions for cell in cells), sum(cell.n_clicks for cell in cells)
        assert sum(record.n_clicks for record in arms) <= x
        return n, x

    def letters(self) -> list[DeadLetter]:
        with self.store.read() as txn:
            records = [msgspec.msgpack.decode(value, type=OutboxRecord) for _, value in txn.scan(Table.OUTBOX)]
        return [msgspec.json.decode(record.payload, type=DeadLetter) for record in records]

    def duplicates(self) -> int:
        with open_view(self.store) as view:
            return view.offsets()[self.streams.topics.corrections, 0].n_duplicates

    def traces(self, *names: str) -> list[str]:
        ids = [f"impression-{name}" for name in names]
        with self.store.read() as txn:
            return traces(txn, USER, ids, Ledger(self.online.ledger), None)


@pytest.fixture
def run(tmp_path: Path, online: OnlineSettings) -> Any:
    with Store(tmp_path, map_size_mib=32, sync=False) as store:
        made = Run(store, online)
        made.work_off(product(), creative())
        yield made


Batches = list[list[Event]]

CASES: dict[str, tuple[Batches, tuple[int, int]]] = {
    "in the batch that shows it": ([[shown("a"), clicked("a"), forgotten()]], (0, 0)),
    "before its label": ([[shown("a"), clicked("a")], [forgotten()]], (0, 0)),
    "after its label": ([[shown("a"), clicked("a")], [time(100)], [forgotten()]], (1, 0)),
    "after its click could come": ([[shown("a"), clicked("a")], [time(1_000)], [forgotten()]], (1, 0)),
    "without a click": ([[shown("a"), shown("b", "another")], [forgotten()]], (1, 0)),
    "with a late click": ([[shown("a")], [time(100)], [clicked("a", 99)], [forgotten()]], (1, 0)),
    "with a retracted click": ([[shown("a"), clicked("a")], [retracted("a")], [forgotten()]], (0, 0)),
    "and shown again in the same batch": ([[shown("a"), forgotten(), shown("a")]], (1, 0)),
    "and shown again later": ([[shown("a"), clicked("a")], [forgotten(), shown("a")], [clicked("a")]], (1, 1)),
    "clicked in the batch that forgets, before it": ([[shown("a")], [clicked("a"), forgotten()]], (0, 0)),
    "clicked in the batch that forgets, after it": ([[shown("a")], [forgotten(), clicked("a")]], (0, 0)),
    "while a click waits for it": ([[clicked("a")], [shown("a"), forgotten()]], (0, 0)),
    "twice": ([[shown("a"), clicked("a")], [forgotten()], [forgotten()]], (0, 0)),
    "in every partition's copy": ([[shown("a"), clicked("a")], [forgotten(), forgotten(), forgotten()]], (0, 0)),
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("batches", "expected"), CASES.values(), ids=CASES.keys())
def test_a_user_is_forgotten(run: Run, batches: Batches, expected: tuple[int, int], restart: bool) -> None:
    for batch in batches:
        run.work_off(*batch)
        if restart:
            run.pipeline = run.restarted()
    assert run.counts() == expected
    last = batches[-1][-1]
    if isinstance(last, UserForgotten):
        assert run.traces("a") == []


def test_what_does_nothing_a_second_time_is_a_duplicate(run: Run) -> None:
    run.work_off(shown("a"), clicked("a"), shown("b", "another"), clicked("b"))
    run.work_off(retracted("b"), retracted("b"), forgotten("nobody"), forgotten(), forgotten())
    assert run.duplicates() == 3
    run.work_off(forgotten(), retracted("b"))
    assert (run.duplicates(), run.counts()) == (5, (1, 0))
    with open_view(run.store) as view:
        ledger = view.ledger()
        assert list(view.forgettings()) == [(STREAMS.topics.corrections, 0, 4, 0)]  # the last copy
    assert (ledger.n_users_forgotten, ledger.n_impressions_taken_back, ledger.n_clicks_taken_back) == (1, 1, 1)
    assert ledger.n_clicks_retracted == 1


def test_a_click_can_be_retracted_as_long_as_the_ledger_holds_it(run: Run) -> None:
    run.work_off(shown("a"), clicked("a"), shown("b"), clicked("b"))
    run.work_off(time(1_000))
    with run.store.read() as txn:
        assert txn.get(Table.IMPRESSIONS, b"impression-a") is None
    run.work_off(retracted("a"))
    assert run.counts() == (3, 1)
    run.pipeline = run.restarted()
    run.work_off(retracted("a"))
    assert (run.counts(), run.duplicates()) == ((3, 1), 1)
    retention_s = run.online.ledger.retention_s
    run.work_off(time(retention_s + 2_000))
    run.work_off(retracted("b"), forgotten())
    (letter,) = run.letters()
    assert letter.reason == "unknown_impression"
    assert run.counts() == (4, 1)
    with open_view(run.store) as view:
        assert view.ledger().n_expired == 4  # two impressions, one of somebody else, and a retraction


def test_without_a_ledger_corrections_are_refused(run: Run, tmp_path: Path) -> None:
    run.work_off(shown("a"), clicked("a"))
    run.online = run.online.model_copy(update={"ledger": LedgerSettings(retention_s=0)})
    run.pipeline = run.restarted()
    run.work_off(retracted("a"), forgotten(), shown("b"))
    assert run.counts() == (2, 1)
    assert [letter.reason for letter in run.letters()] == ["ledger_off"] * 2
    assert all("online.ledger.retention_s is 0" in letter.detail for letter in run.letters())
    with run.store.read() as txn:
        assert txn.count(Table.LEDGER) == txn.count(Table.LEDGER_INDEX) == 0


def test_dead_letters_that_wait_are_emptied_and_keep_their_place(run: Run) -> None:
    run.work_off(shown("a"))
    run.work_off(shown("b", product_id="q"), shown("c", "another", product_id="q"), retracted("a"), clicked("z", 1))
    run.work_off(time(900))
    run.work_off(forgotten())
    by_place = {letter.event_id: letter for letter in run.letters()}
    topics = STREAMS.topics
    emptied = {place for place, letter in by_place.items() if letter.detail.startswith("removed: ")}
    assert emptied == {f"{topics.impressions}-0-1-0", f"{topics.corrections}-0-0-0"}
    assert all(not by_place[place].payload for place in emptied)
    assert by_place[f"{topics.impressions}-0-2-0"].payload
    assert [letter.reason for letter in by_place.values()] == [
        "unknown_product",
        "unknown_product",
        "unknown_click",
        "unknown_impression",
    ]
    assert run.traces("a", "b") == []


def test_timers_that_were_set_with_other_windows_go_too(run: Run) -> None:
    run.work_off(shown("a"), shown("b", "another"))
    join = STREAMS.join.model_copy(update={"label_window_s": 90, "attribution_window_s": 700})
    run.streams = STREAMS.model_copy(update={"join": join})
    run.pipeline = run.restarted()
    run.work_off(forgotten())
    assert run.traces("a") == []
    with run.store.read() as txn:
        assert txn.count(Table.TIMERS) == txn.count(Table.IMPRESSIONS) == 1


def test_a_user_leaves_samples_of_parked_products_though_the_ledger_knows_nothing_any_more(
    tmp_path: Path, online: OnlineSettings
) -> None:
    online = online.model_copy(
        update={
            "ledger": LedgerSettings(retention_s=700),
            "limits": online.limits.model_copy(update={"resident_products": 1}),
        }
    )
    with Store(tmp_path, map_size_mib=32, sync=False) as store:
        run = Run(store, online)
        other = (
            msgspec.structs.replace(product(), product_id="other"),
            msgspec.structs.replace(creative(), product_id="other"),
        )
        run.work_off(product(), creative(), *other)
        run.work_off(shown("a"), shown("b", "another"))
        for at_s in range(900, 3_000, 300):
            run.work_off(msgspec.structs.replace(time(at_s), product_id="other"))
        with open_view(store) as view:
            assert (view.n_parked_products(), view.ledger().n_expired >= 2) == (1, True)
        assert run.traces("a") == ["clusterings: its key"]
        run.work_off(forgotten())
        assert run.traces("a") == []
        assert run.counts()[0] == 9  # it stays counted


# --- The model


def p_click(run: Run) -> float:
    """Return the probability that the user clicks."""
    core = run.pipeline._core
    codes = core.schema.encode_many([shown("x").attributes])
    record = ImpressionRecord("p", "c", codes[0].tobytes(), 0, 0, 0, None, None, False, False)
    return float(core.learner.predict_many(core._rows([record]))[0])


def replayed(run: Run) -> list[tuple[bool, int]]:
    """Return the labels in the state's replay with their weights."""
    with run.store.read() as txn:
        blocks = [unpack_rows(value, 3) for _, value in txn.scan(Table.REPLAY)]
    return [
        (bool(click), int(weight))
        for block in blocks
        for click, weight in zip(block.clicks, block.weights, strict=True)
    ]


def test_the_model_takes_clicks_back(tmp_path: Path, online: OnlineSettings) -> None:
    names = [f"{batch}-{number}" for batch in range(6) for number in range(50)]
    corrections: dict[str, list[Event]] = {
        "none": [],
        "retract": [retracted(name) for name in names],
        "forget": [forgotten()],
    }
    found = {}
    for correction, events in corrections.items():
        with Store(tmp_path / correction, map_size_mib=32, sync=False) as store:
            run = Run(store, online)
            run.work_off(product(), creative())
            for start in range(0, len(names), 50):
                part = names[start : start + 50]
                run.work_off(*(shown(name, at_s=start) for name in part), *(clicked(name, start + 1) for name in part))
            run.work_off(time(500))
            before = p_click(run)
            run.work_off(*events)
            if correction == "forget":
                assert replayed(run) == []
            if correction == "retract":
                rows = Counter(replayed(run))
                assert rows == {(True, 1): 300, (True, -1): 300, (False, 1): 300}
            # Learning goes on with what others do, who click now and then.
            for step in range(10):
                others = [shown(f"o-{step}-{n}", f"other-{n}", 510 + 70 * step) for n in range(30)]
                run.work_off(*others, *(clicked(f"o-{step}-{n}", 511 + 70 * step) for n in range(0, 30, 4)))
            found[correction] = (before, p_click(run))
    assert found["none"][0] == found["retract"][0] == found["forget"][0] > 0.5
    assert max(found["retract"][1], found["forget"][1]) < found["none"][1] - 0.05


@pytest.fixture(scope="module")
def worked_off(tmp_path_factory: pytest.TempPathFactory, log: Any, new_pipeline: Callable[[], Pipeline]) -> Path:
    path = tmp_path_factory.mktemp("corrected")
    with Store(path, map_size_mib=64, sync=False) as store:
        pipeline = new_pipeline()
        for start in range(0, len(log.messages), 250):
            with store.read() as txn:
                changes, _ = pipeline.run(log.messages[start : start + 250], txn)
            store.commit(changes)
    return path


def test_of_the_forgotten_users_of_a_long_log_nothing_is_left(
    worked_off: Path, online: OnlineSettings, log: Any
) -> None:
    with Store(worked_off, readonly=True) as store, store.read() as txn:
        ledger = Ledger(online.ledger)
        # The one who was forgotten last, after all clicks but the late ones; "u1" would be in every "u17".
        found = traces(txn, "u3", [], ledger, None)
        assert [trace for trace in found if "b'u3'" not in trace] == []
        assert traces(txn, "u5", [], ledger, None)  # somebody who is still there is found
