"""Residency: parked products lose nothing, whatever the limit, whenever they come back, and across restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online.assignment import Assigner
from online.counts import CellId
from online.pipeline import Pipeline
from online.residency import Residency
from online.settings import LimitSettings, OnlineSettings
from online.worker import build_pipeline
from state.reading import StateView, open_view
from state.records import ProductGroups, decode_cell, scope_key
from state.store import ChangeSet, Store, Table
from streams.codec import encode, event_topics
from streams.events import Click, Creative, Event, Impression, Product
from streams.merge import Message
from streams.settings import JoinSettings, StreamSettings

Content = dict[tuple[Table, bytes], bytes]

BATCH = 150
LIMIT = 2

USERS = [{"age": age, "tier": tier} for age in ("young", "old") for tier in "123"]


# --- Which products are resident


class Plain:
    """Residency as it is said, without any bookkeeping."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.last_batch: dict[str, int] = {}
        self.resident: set[str] = set()

    def run(self, product_ids: list[str], batch_number: int) -> tuple[set[str], list[str]]:
        missing = set(product_ids) - self.resident
        self.last_batch |= dict.fromkeys(product_ids, batch_number)
        held = sorted(self.resident | set(product_ids), key=lambda each: (self.last_batch[each], each))
        parked = held[: max(len(held) - self.limit, 0)]
        self.resident = set(held) - set(parked)
        return missing, parked


IDS = st.lists(st.sampled_from(["a", "b", "c", "d", "é", "日"]), max_size=8)


@settings(max_examples=150, deadline=None)
@given(limit=st.integers(1, 4), batches=st.lists(st.tuples(IDS, IDS, st.booleans()), max_size=12))
def test_the_least_recently_active_are_parked_and_a_restart_parks_the_same(
    tmp_path_factory: pytest.TempPathFactory, limit: int, batches: list[tuple[list[str], list[str], bool]]
) -> None:
    plain, residency = Plain(limit), Residency(limit)
    with Store(tmp_path_factory.mktemp("state"), map_size_mib=16, sync=False) as store:
        for number, (shown, labelled, restart) in enumerate(batches):
            if restart:
                residency = Residency(limit)
                with store.read() as txn:
                    residency.restore(txn)
            first, second = residency.touch(shown, number), residency.touch(labelled, number)
            parked, changes = residency.park(), ChangeSet()
            residency.write(changes)
            store.commit(changes)
            missing, least_active = plain.run(shown + labelled, number)
            assert Counter(first + second) == Counter(missing)
            assert parked == least_active
            assert set(residency.product_ids) == plain.resident
            assert len(plain.resident) <= limit
            with open_view(store) as view:
                assert view.n_resident_products() == len(plain.resident)


# --- What is learnt of them


@dataclass(frozen=True)
class Pauses:
    """A log in which two products at a time are shown, and come back after the others."""

    messages: list[Message]
    by_creative: dict[tuple[str, str], tuple[int, int]]


PAIRS = (("p0", "p1"), ("p2", "p3"), ("p4", "p5"))
PRODUCTS = [product for pair in PAIRS for product in pair]
STRETCH = 400
N_STRETCHES = 7


@pytest.fixture(scope="module")
def pausing_streams() -> StreamSettings:
    return StreamSettings(join=JoinSettings(allowed_lateness_s=2, label_window_s=10, attribution_window_s=150))


@pytest.fixture(scope="module")
def pauses(pausing_streams: StreamSettings) -> Pauses:
    rng, start_ms = np.random.default_rng(8), 1_748_822_400_000
    sent: list[tuple[int, Event]] = []
    for product in PRODUCTS:
        sent.append((start_ms, Product(product_id=product, title=f"thing {product}", updated_at_ms=start_ms)))
        sent += [
            (start_ms + 1, Creative(creative_id=name, product_id=product, created_at_ms=start_ms)) for name in "abc"
        ]
    by_creative: Counter[tuple[str, str, bool]] = Counter()
    for number in range(STRETCH * N_STRETCHES):
        at_ms = start_ms + 2_000 + 100 * number
        product = PAIRS[number // STRETCH % len(PAIRS)][int(rng.integers(2))]
        creative, user = str(rng.choice(list("abc"))), int(rng.integers(300))
        old = user % 2
        impression = Impression(
            impression_id=f"i{number}",
            user_id=f"u{user}",
            product_id=product,
            creative_id=creative,
            shown_at_ms=at_ms,
            attributes={"age": ("young", "old")[old], "tier": str(1 + user % 3)},
        )
        sent.append((at_ms, impression))
        by_creative[product, creative, False] += 1
        if rng.random() < (0.5 if (creative == "a") == bool(old) else 0.05):
            by_creative[product, creative, True] += 1
            # Late ones find their product parked.
            delay_ms = 500 if rng.random() < 0.9 else 20_000
            click = Click(impression_id=f"i{number}", product_id=product, clicked_at_ms=at_ms + delay_ms)
            sent.append((click.clicked_at_ms, click))
    sent.sort(key=lambda each: each[0])
    topics = event_topics(pausing_streams.topics)
    offsets: Counter[str] = Counter()
    messages = []
    for at_ms, event in sent:
        topic = topics[type(event)]
        messages.append(Message(topic, 0, offsets[topic], at_ms, encode(event)))
        offsets[topic] += 1
    expected = {key[:2]: (by_creative[*key[:2], False], by_creative[*key[:2], True]) for key in by_creative}
    return Pauses(messages, expected)


def limited(online: OnlineSettings, resident_products: int, **groups: Any) -> OnlineSettings:
    return online.model_copy(
        update={
            "limits": LimitSettings(resident_products=resident_products),
            "groups": online.groups.model_copy(update=groups),
        }
    )


def run_all(
    path: Path,
    messages: list[Message],
    new_pipeline: Callable[[], Pipeline],
    *,
    batch: int = BATCH,
    restart: bool = False,
    after: Callable[[Pipeline, StateView], None] = lambda _, __: None,
) -> Content:
    with Store(path, map_size_mib=64, sync=False) as store:
        pipeline = new_pipeline()
        for start in range(0, len(messages), batch):
            if restart:
                pipeline = new_pipeline()
                pipeline.restore(store)
            with store.read() as txn:
                changes, _ = pipeline.run(messages[start : start + batch], txn)
            store.commit(changes)
            with open_view(store) as view:
                after(pipeline, view)
        with store.read() as txn:
            return {(table, key): value for table in Table for key, value in txn.scan(table)}


def differences(a: Content, b: Content) -> list[tuple[Table, bytes]]:
    return [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]


def totals(content: Content) -> dict[tuple[str, str], tuple[int, int]]:
    found: Counter[tuple[str, str, bool]] = Counter()
    for cell in (decode_cell(key, value) for (table, key), value in content.items() if table is Table.CELLS):
        assert 0 <= cell.n_clicks <= cell.n_impressions
        found[cell.product_id, cell.creative_id, False] += cell.n_impressions
        found[cell.product_id, cell.creative_id, True] += cell.n_clicks
    return {key[:2]: (found[*key[:2], False], found[*key[:2], True]) for key in found}


def groups_of(content: Content, product_id: str) -> ProductGroups:
    return msgspec.msgpack.decode(content[Table.GROUPS, product_id.encode()], type=ProductGroups)


@pytest.fixture(scope="module")
def parked(
    tmp_path_factory: pytest.TempPathFactory, pauses: Pauses, pausing_streams: StreamSettings, online: OnlineSettings
) -> tuple[Path, Content]:
    """The log with pauses, worked off with two residents; after every commit there are no more."""
    path = tmp_path_factory.mktemp("parked")

    def no_more(pipeline: Pipeline, view: StateView) -> None:
        core = pipeline._core
        assert {key for key in core.expectations._slopes if key.startswith(b"product")} <= {
            scope_key(product_id, None) for product_id in core.grouping.product_ids()
        }
        held = set(core.grouping.product_ids())
        assert len(held) == view.n_resident_products() <= LIMIT
        others = (core.counts._cells, core.expectations._products, core._detection._detectors)
        assert all(set(of_part) <= held for of_part in others)

    content = run_all(
        path, pauses.messages, lambda: build_pipeline(pausing_streams, limited(online, LIMIT)), after=no_more
    )
    return path, content


def test_parking_loses_no_event(
    parked: tuple[Path, Content],
    pauses: Pauses,
    pausing_streams: StreamSettings,
    online: OnlineSettings,
    tmp_path: Path,
) -> None:
    unlimited = run_all(tmp_path, pauses.messages, lambda: build_pipeline(pausing_streams, online))
    assert totals(parked[1]) == totals(unlimited) == pauses.by_creative
    of_the_log = (Table.OFFSETS, Table.TIMERS, Table.WAITING_CLICKS, Table.REPLAY, Table.ARMS)
    assert not [key for key in differences(parked[1], unlimited) if key[0] in of_the_log]


def test_products_of_which_nothing_was_due_meanwhile_come_back_bit_by_bit(
    pauses: Pauses, pausing_streams: StreamSettings, online: OnlineSettings, tmp_path: Path
) -> None:
    """Without encoder versions nothing happens to a product while others are shown, so it must not matter."""
    found = [
        run_all(
            tmp_path / str(limit),
            pauses.messages,
            lambda limit=limit: build_pipeline(pausing_streams, limited(online, limit, warm_up_impressions=10**6)),
        )
        for limit in (1, 100)
    ]
    assert {table for table, _ in differences(*found)} == {Table.RESIDENTS}


def test_a_limit_changes_no_bit_where_every_batch_shows_every_product(
    log: Any, online: OnlineSettings, pipeline_with: Callable[[OnlineSettings], Pipeline], tmp_path: Path
) -> None:
    """Two of the three products are parked after every batch, and brought in for the next."""
    found = [
        run_all(
            tmp_path / str(limit),
            log.messages,
            lambda limit=limit: pipeline_with(limited(online, limit)),
            batch=300,
        )
        for limit in (1, 100)
    ]
    assert {table for table, _ in differences(*found)} == {Table.RESIDENTS}
    assert sum(table is Table.SHIFTS for table, _ in found[0]) > 0


def test_a_restart_before_every_batch_changes_no_bit(
    parked: tuple[Path, Content],
    pauses: Pauses,
    pausing_streams: StreamSettings,
    online: OnlineSettings,
    tmp_path: Path,
) -> None:
    again = run_all(
        tmp_path, pauses.messages, lambda: build_pipeline(pausing_streams, limited(online, LIMIT)), restart=True
    )
    assert differences(parked[1], again) == []


def test_what_is_brought_in_is_written_as_it_was(
    parked: tuple[Path, Content], pausing_streams: StreamSettings, online: OnlineSettings
) -> None:
    settings = limited(online, 100)
    with Store(parked[0], readonly=True) as store, store.read() as txn:
        core = build_pipeline(pausing_streams, settings)._core
        core.restore(txn)
        resident = set(core.grouping.product_ids())
        core.bring_in(PRODUCTS, None, 0, 99)  # only noted: what is read is what is looked at
        for product_id in PRODUCTS:
            core._take_over(product_id, txn)
            core.grouping._changed_groups[product_id] = core.grouping._changed_clusterings[product_id] = None
            core.expectations._changed_products[product_id] = core._detection._changed[product_id] = None
            cells = core.counts.cells_of(product_id)
            core.counts._changed_cells |= dict.fromkeys(CellId(product_id, *cell) for cell in cells)
        changes = ChangeSet()
        core.write(changes)
        tables = (Table.CELLS, Table.GROUPS, Table.CLUSTERINGS, Table.EXPECTATIONS)
        for table in tables:
            assert dict(changes.of(table)) == dict(txn.scan(table))
        detectors = {key: value for key, value in changes.of(Table.DETECTORS) if value is not None}
        assert detectors == dict(txn.scan(Table.DETECTORS, prefix=b"product")) != {}
    assert len(resident) == LIMIT < len(PRODUCTS)


def test_a_product_whose_encoder_version_is_gone_is_regrouped_when_it_returns(
    parked: tuple[Path, Content],
    pauses: Pauses,
    pausing_streams: StreamSettings,
    online: OnlineSettings,
    tmp_path: Path,
) -> None:
    before = groups_of(parked[1], "p2")
    copytree(parked[0], tmp_path, dirs_exist_ok=True)
    assigner = Assigner(online)
    with Store(tmp_path, map_size_mib=64, sync=False) as store:
        with open_view(store) as view:
            kept = [version for _, version in view.encoder_versions()]
            assert before.encoder_version not in kept
            assert len(kept) <= LIMIT + 1
            assigner.load(view)
        # It is told apart no more, and says so; the residents are.
        assert assigner.assign_many(["p2"] * len(USERS), USERS) == [None] * len(USERS)
        assert set(assigner.assign_many(["p0"] * len(USERS), USERS)) <= {
            group.group_id for group in groups_of(parked[1], "p0").groups
        }
        assert "p2" not in assigner.product_ids()
        pipeline = build_pipeline(pausing_streams, limited(online, LIMIT))
        pipeline.restore(store)
        last = pauses.messages[-1]
        late = Click(impression_id="i2800", product_id="p2", clicked_at_ms=last.timestamp_ms + 1)
        shown = Impression(
            impression_id="i2800",
            user_id="u",
            product_id="p2",
            creative_id="a",
            shown_at_ms=last.timestamp_ms,
            attributes=USERS[0],
        )
        for topic, event in ((pausing_streams.topics.impressions, shown), (pausing_streams.topics.clicks, late)):
            offset = pipeline.next_offsets()[topic, 0]
            with store.read() as txn:
                changes, _ = pipeline.run([Message(topic, 0, offset, last.timestamp_ms, encode(event))], txn)
            store.commit(changes)
        with store.read() as txn:
            found = {(table, key): value for table in Table for key, value in txn.scan(table)}
        with open_view(store) as view:
            assigner.load(view)
    after = groups_of(found, "p2")
    ids = {group.group_id for group in after.groups}
    assert after.encoder_version == max(kept) > before.encoder_version
    assert ids & {group.group_id for group in before.groups}  # they stay themselves
    assert ids <= set(range(after.next_group_id))
    assert set(assigner.assign_many(["p2"] * len(USERS), USERS)) <= ids
    n_impressions, n_clicks = pauses.by_creative["p2", "a"]
    assert totals(found) == pauses.by_creative | {("p2", "a"): (n_impressions + 1, n_clicks + 1)}


def test_a_batch_of_more_products_than_may_be_resident_is_worked_off(
    pauses: Pauses,
    pausing_streams: StreamSettings,
    online: OnlineSettings,
    tmp_path: Path,
) -> None:
    content = run_all(
        tmp_path,
        pauses.messages,
        lambda: build_pipeline(pausing_streams, limited(online, 1)),
        batch=STRETCH * 3,
    )
    assert totals(content) == pauses.by_creative
    assert sum(table is Table.RESIDENTS for table, _ in content) == 1
    assert sum(table is Table.CLUSTERINGS for table, _ in content) == len(PRODUCTS)
