"""Conservation: whatever comes in whatever order, and wherever the process dies, nothing is lost or made up.

A state machine of impressions, clicks, late and repeated ones, retractions, forgotten users, regroupings, parked
products and crashes, on the real pipeline over a real store.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from online.ledger import CLICKED, SHOWN, Ledger
from online.pipeline import Pipeline
from online.replay import unpack_rows
from online.settings import (
    AttributeSettings,
    CountSettings,
    EncoderSettings,
    GroupSettings,
    LedgerSettings,
    LimitSettings,
    ModelSettings,
    OnlineSettings,
    ShiftSettings,
)
from online.worker import build_pipeline
from osmf.verify import broken_invariants
from state.reading import StateView
from state.records import ImpressionRecord, LedgerBlock, WaitingClickRecord
from state.store import Store, Table
from streams.codec import encode, event_time_ms, event_topics
from streams.events import Click, ClickRetracted, Creative, Event, Impression, Product, UserForgotten
from streams.merge import Message
from streams.settings import JoinSettings, StreamSettings
from tests.faults.plain_recount import PlainRecount
from tests.faults.traces import traces

N_USERS = 120
N_UNIQUE = 60
"""Of the users, those who have a tag of their own, by which a trace is found; the others share theirs with three."""

PRODUCTS = ("lamp", "sofa", "vase", "desk")
"""The first two are there from the beginning."""

CREATIVES = ("a", "b")
START_MS = 1_748_822_400_000

STREAMS = StreamSettings(
    join=JoinSettings(allowed_lateness_s=1, label_window_s=10, attribution_window_s=60, click_wait_s=30)
)
ONLINE = OnlineSettings(
    seed=7,
    # Age is what tastes follow.
    attributes=AttributeSettings(
        values={"age": ("young", "old"), "tag": tuple(f"t{user}" for user in range(N_USERS))},
    ),
    encoders=EncoderSettings(text="hashed", image="hashed"),
    model=ModelSettings(
        d_model=8, d_field=2, d_hidden=8, learning_rate=0.02, batch_rows=32, replay_rows=100_000, ema_steps=4
    ),
    groups=GroupSettings(
        k_max=3,
        reservoir_users=96,
        warm_up_impressions=40,
        adopt_every_impressions=30,
        refresh_every_impressions=1,
        refresh_products_per_batch=3,
        min_share=0.0,
        k_hysteresis=0.0,
        survive_overlap=0.3,
        distinct_p_value=0.9,
    ),
    counts=CountSettings(half_life_s=60, user_buckets=4),
    shift=ShiftSettings(
        warm_up_impressions=5, false_alarms_per_million=500, min_impressions=5, cool_down_impressions=10
    ),
    ledger=LedgerSettings(max_entries=1_000_000, hash_key="a secret"),
    limits=LimitSettings(resident_products=2),
)
TOPIC_OF = event_topics(STREAMS.topics)


def user_of(number: int) -> tuple[str, dict[str, str]]:
    tag = number if number < N_UNIQUE else number - number % 4
    return f"user-{number:04d}-is-nobody-else", {"age": ("young", "old")[tag // 4 % 2], "tag": f"t{tag}"}


class Conservation(RuleBasedStateMachine):
    """The pipeline over a store, and beside it a plain recount of everything that has been committed."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="osmf-conservation-"))
        self.store = Store(self.folder / "state", map_size_mib=64, sync=False)
        self.pipeline = self._restored()
        self.plain = PlainRecount(STREAMS.join.attribution_window_s * 1000)
        self.rng = np.random.default_rng(0)
        self.now_ms = START_MS
        self.pending: list[Event] = []
        self.next_offsets: Counter[str] = Counter()
        self.sent: dict[str, Impression] = {}  # by id, as it was sent last
        self.clicked_ms: dict[str, int] = {}
        self.likes = 0
        self.n_products = 0
        self.n_sent = 0

    def _restored(self) -> Pipeline:
        def no_picture(uri: str) -> bytes:
            raise FileNotFoundError(uri)

        pipeline = build_pipeline(STREAMS, ONLINE, no_picture)
        pipeline.restore(self.store)
        return pipeline

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    # --- What may happen

    @initialize(seed=st.integers(0, 999))
    def begin(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.register()
        self.register()
        for _ in range(5):
            self.show(120, 1.0)
            self.work_off(10_000)

    def _send(self, event: Event) -> None:
        self.pending.append(event)

    @precondition(lambda self: self.n_products < len(PRODUCTS))
    @rule()
    def register(self) -> None:
        """Register a product; one that comes later borrows the groups of another."""
        product_id = PRODUCTS[self.n_products]
        self._send(Product(product_id=product_id, title=product_id, updated_at_ms=self.now_ms, category="things"))
        for creative_id in CREATIVES:
            self._send(Creative(creative_id=creative_id, product_id=product_id, created_at_ms=self.now_ms))
        self.n_products += 1

    @rule(n=st.integers(1, 150), p_click=st.sampled_from([0.0, 0.5, 1.0]))
    def show(self, n: int, p_click: float) -> None:
        """Show creatives; users of an age like different ones, and click those with a chance."""
        for _ in range(n):
            self.now_ms += int(self.rng.integers(1, 100))
            impression = self._impression(f"shown-{self.n_sent:05d}-here")
            self._send(impression)
            likes = (impression.attributes["age"] == "old") == (impression.creative_id == CREATIVES[self.likes])
            if likes and self.rng.random() < p_click:
                self._click(impression.impression_id, 1)

    @rule()
    def change_tastes(self) -> None:
        self.likes = 1 - self.likes

    def _impression(self, impression_id: str) -> Impression:
        self.n_sent += 1
        user_id, attributes = user_of(int(self.rng.integers(N_USERS)))
        impression = Impression(
            impression_id=impression_id,
            user_id=user_id,
            product_id=str(self.rng.choice(PRODUCTS[: self.n_products])),
            creative_id=str(self.rng.choice(CREATIVES)),
            shown_at_ms=self.now_ms - int(self.rng.integers(0, 3_000)),
            attributes=attributes,
            experiment="groups" if self.rng.random() < 0.7 else None,
            arm=str(self.rng.choice(["group", "all"])),
        )
        self.sent[impression_id] = impression
        return impression

    def _click(self, impression_id: str, after_ms: int) -> None:
        at_ms = self.sent[impression_id].shown_at_ms + after_ms
        self.clicked_ms[impression_id] = at_ms
        self._send(Click(impression_id=impression_id, product_id="-", clicked_at_ms=at_ms))

    def _some(self, youngest_ms: int, oldest_ms: int, n: int) -> list[str]:
        """Return ids of impressions that are so old."""
        found = [i for i, e in self.sent.items() if youngest_ms <= self.now_ms - e.shown_at_ms <= oldest_ms]
        return [found[int(place)] for place in self.rng.integers(0, len(found), n)] if found else []

    @rule(n=st.integers(1, 10))
    def click(self, n: int) -> None:
        """Click impressions in their label window, or after it."""
        for impression_id in self._some(0, 45_000, n):
            self._click(impression_id, self.now_ms - self.sent[impression_id].shown_at_ms)

    @rule(n=st.integers(1, 3))
    def click_too_late(self, n: int) -> None:
        for impression_id in self._some(75_000, 10**9, n):
            self._click(impression_id, self.now_ms - self.sent[impression_id].shown_at_ms)

    @rule(n=st.integers(1, 3), retracted=st.booleans())
    def click_ahead(self, n: int, retracted: bool) -> None:
        """Click impressions that come after their clicks, and perhaps after the retraction of these."""
        for _ in range(n):
            impression = self._impression(f"ahead-{self.n_sent:05d}-here")
            self._click(impression.impression_id, 5)
            if retracted:
                self._retract(impression.impression_id)
            if self.rng.random() < 0.5:
                self.work_off(len(self.pending))
            self._send(impression)

    @rule(n=st.integers(1, 10))
    def repeat(self, n: int) -> None:
        """Send impressions and clicks once more."""
        for impression_id in self._some(0, 45_000, n):
            self._send(self.sent[impression_id])
            if impression_id in self.clicked_ms:
                at_ms = self.clicked_ms[impression_id]
                self._send(Click(impression_id=impression_id, product_id="-", clicked_at_ms=at_ms))

    def _retract(self, impression_id: str) -> None:
        self._send(ClickRetracted(impression_id=impression_id, product_id="-", retracted_at_ms=self.now_ms))

    @rule(n=st.integers(1, 12))
    def retract(self, n: int) -> None:
        """Retract clicks, old ones too, some twice, and some that never were."""
        clicked = list(self.clicked_ms)
        for place in self.rng.integers(0, len(clicked), n).tolist() if clicked else []:
            self._retract(clicked[place])
        for impression_id in self._some(0, 10**9, 1):
            self._retract(impression_id)

    @rule(n=st.integers(1, 3), everything=st.booleans())
    def forget(self, n: int, everything: bool) -> None:
        """Forget users; with everything that has been sent worked off, no trace of them may be left."""
        users = sorted({self._somebody() for _ in range(n)})
        for user in users:
            self._send(UserForgotten(user_id=user_of(user)[0], forgotten_at_ms=self.now_ms))
        if not everything:
            return
        forgotten_before = set(self.plain.forgotten)
        self.work_off(len(self.pending))
        with self.store.read() as txn:
            for user in users:
                user_id = user_of(user)[0]
                ids = [name for name, impression in self.sent.items() if impression.user_id == user_id]
                waiting = {key.decode() for key, _ in txn.scan(Table.WAITING_CLICKS)}
                # Clicks and retractions of impressions that had never come, or had been forgotten, name no user.
                ids = [name for name in ids if name not in waiting | forgotten_before]
                found = traces(txn, user_id, ids, self._ledger(), self._codes(user))
                assert found == [], found

    def _somebody(self) -> int:
        """Return a user, by turns anyone and one of those whose click came ahead lately."""
        ahead = [event.user_id for name, event in self.sent.items() if name.startswith("ahead")][-4:]
        if ahead and self.rng.random() < 0.5:
            return int(ahead[int(self.rng.integers(len(ahead)))].split("-")[1])
        return int(self.rng.integers(N_USERS))

    def _ledger(self) -> Ledger:
        return Ledger(ONLINE.ledger)

    def _codes(self, user: int) -> bytes | None:
        if user >= N_UNIQUE:
            return None
        codes: bytes = self.pipeline._core.schema.encode_many([user_of(user)[1]])[0].tobytes()
        return codes

    @precondition(lambda self: self.n_sent > 1_000)
    @rule()
    def forget_many(self) -> None:
        """Forget so many users that samples run low."""
        for user in self.rng.permutation(N_USERS)[: N_USERS - 8].tolist():
            self._send(UserForgotten(user_id=user_of(user)[0], forgotten_at_ms=self.now_ms))

    @rule(seconds=st.sampled_from([2, 12, 65, 4_000]))
    def pass_time(self, seconds: int) -> None:
        self.now_ms += seconds * 1_000

    @rule(n=st.sampled_from([30, 150, 10_000]))
    def work_off(self, n: int) -> None:
        """Work off a micro-batch and commit it."""
        batch = self.pending[:n]
        if not batch:
            return
        with self.store.read() as txn:
            changes, _ = self.pipeline.run(self._messages(batch), txn)
        self.store.commit(changes)
        for event in batch:
            self.next_offsets[TOPIC_OF[type(event)]] += 1
            self.plain.add(event)
        del self.pending[:n]

    def _messages(self, batch: list[Event]) -> list[Message]:
        offsets = Counter(self.next_offsets)
        messages = []
        for event in batch:
            topic = TOPIC_OF[type(event)]
            messages.append(Message(topic, 0, offsets[topic], event_time_ms(event), encode(event)))
            offsets[topic] += 1
        return messages

    @precondition(lambda self: self.pending)
    @rule(n=st.sampled_from([30, 150, 10_000]))
    def crash(self, n: int) -> None:
        """Die before the commit; what comes after is the same."""
        messages = self._messages(self.pending[:n])
        with self.store.read() as txn:
            before, _ = self.pipeline.run(messages, txn)
        self.pipeline = self._restored()
        with self.store.read() as txn:
            again, _ = self.pipeline.run(messages, txn)
        assert list(before) == list(again)
        self.pipeline = self._restored()

    @rule()
    def restart(self) -> None:
        self.pipeline = self._restored()

    # --- What must hold

    @invariant()
    def counts_are_those_of_a_plain_recount(self) -> None:
        with self.store.read() as txn:
            view = StateView({0: txn})
            cells, arms = view.cells(), view.arms()
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for cell in cells:
            n, x = found.get((cell.product_id, cell.creative_id), (0, 0))
            found[cell.product_id, cell.creative_id] = (n + cell.n_impressions, x + cell.n_clicks)
            assert 0 <= cell.n_clicks <= cell.n_impressions
            assert 0 <= cell.live_clicks <= cell.live_impressions + 1e-9
        assert {name: counts for name, counts in found.items() if counts[0]} == self.plain.by_creative()
        by_arm: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for (_, arm, _), record in arms.items():
            by_arm[arm] = (by_arm[arm][0] + record.n_impressions, by_arm[arm][1] + record.n_clicks)
            assert 0 <= record.n_clicks <= record.n_impressions
        in_experiment = PlainRecount(0, {k: c for k, c in self.plain.shown.items() if c.impression.experiment})
        assert {arm: counts for arm, counts in by_arm.items() if counts[0]} == in_experiment.by_arm()

    @invariant()
    def cells_are_those_of_the_ledger(self) -> None:
        """Each impression is counted in the group that it was shown to, or the one that has taken that over since."""
        with self.store.read() as txn:
            view = StateView({0: txn})
            lives, successors = ledger_lives(txn), {}
            for product_id in PRODUCTS:
                groups = view.groups(product_id)
                successors[product_id] = {} if groups is None else groups.successors
            cells = {
                (cell.product_id, cell.group_id, cell.creative_id): (cell.n_impressions, cell.n_clicks)
                for cell in view.cells()
                if cell.n_impressions
            }
        expected: dict[tuple[str, int, str], tuple[int, int]] = {}
        for record in lives:
            group_id = record.group_id
            while group_id in successors[record.product_id]:
                group_id = successors[record.product_id][group_id]
            name = (record.product_id, group_id, record.creative_id)
            n, x = expected.get(name, (0, 0))
            expected[name] = (n + 1, x + record.click_counts)
        assert cells == expected

    @invariant()
    def replay_holds_the_labels_that_stand(self) -> None:
        with self.store.read() as txn:
            net: Counter[tuple[int, int, bytes, bool]] = Counter()
            n_fields = len(ONLINE.attributes.values)
            for _, value in txn.scan(Table.REPLAY):
                rows = unpack_rows(value, n_fields)
                for place in range(len(rows)):
                    name = (
                        int(rows.rows.products[place]),
                        int(rows.rows.creatives[place]),
                        rows.rows.attributes[place].tobytes(),
                        bool(rows.clicks[place]),
                    )
                    net[name] += int(rows.weights[place])
            view = StateView({0: txn})
            products = {product.product_id: product.number for product in view.products()}
            creatives = {(each.product_id, each.creative_id): each.number for each in view.creatives()}
            expected = Counter(
                (
                    products[record.product_id],
                    creatives[record.product_id, record.creative_id],
                    record.attributes,
                    record.click_counts,
                )
                for record in ledger_lives(txn)
                if record.labelled
            )
        assert +net == +expected
        assert not -net

    @invariant()
    def the_state_does_not_contradict_itself(self) -> None:
        with self.store.read() as txn:
            decoder = msgspec.msgpack.Decoder(WaitingClickRecord)
            waiting = [decoder.decode(value) for _, value in txn.scan(Table.WAITING_CLICKS)]
            assert broken_invariants(StateView({0: txn}), waiting, STREAMS) == []


def ledger_lives(txn: Any) -> list[ImpressionRecord]:
    """Return every impression in the ledger with what became of its click; labelled unless its window is open."""
    lives: dict[str, ImpressionRecord] = {}
    for _, value in txn.scan(Table.LEDGER):
        block = msgspec.msgpack.decode(value, type=LedgerBlock)
        for kind, name, detail in zip(block.kinds, block.impression_ids, block.details, strict=True):
            if kind == SHOWN:
                assert name not in lives
                lives[name] = msgspec.msgpack.decode(detail, type=ImpressionRecord)
            elif kind == CLICKED:
                lives[name].clicked = True
            else:
                lives[name].retracted = True
    for name, record in lives.items():
        value = txn.get(Table.IMPRESSIONS, name.encode())
        record.labelled = value is None or msgspec.msgpack.decode(value, type=ImpressionRecord).labelled
    return list(lives.values())


def test_nothing_is_lost_or_made_up() -> None:
    run_state_machine_as_test(
        Conservation,
        settings=settings(
            max_examples=4,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_nothing_is_lost_or_made_up_at_length() -> None:
    run_state_machine_as_test(
        Conservation,
        settings=settings(
            max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
