"""The pipeline: exact counts, and the same messages in the same batches give the same state, bit by bit."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from online.assignment import Assigner
from online.mismatch import SpaceMismatchError
from online.pipeline import Pipeline
from online.ranking import ndcg_at
from online.settings import OnlineSettings
from online.worker import build_pipeline
from state.reading import open_view
from state.records import OutboxRecord
from state.store import ChangeSet, Store, Table
from streams.codec import encode
from streams.events import Click, Creative, DeadLetter, Event, GroupsShifted, Impression, Product
from streams.merge import Message
from streams.settings import StreamSettings

NewPipeline = Callable[[], Pipeline]
Content = dict[tuple[Table, bytes], bytes]

BATCH = 300


def content(store: Store) -> Content:
    with store.read() as txn:
        return {(table, key): value for table in Table for key, value in txn.scan(table)}


def differences(a: Content, b: Content) -> list[tuple[str, bytes]]:
    return [
        (table.value, key) for table, key in sorted(a.keys() | b.keys()) if a.get((table, key)) != b.get((table, key))
    ]


def run_all(
    path: Path,
    messages: list[Message],
    new_pipeline: NewPipeline,
    *,
    batch: int = BATCH,
    restart: Callable[[int], bool] = lambda _: False,
) -> Content:
    """Work off a log in batches, with a new pipeline from the store where ``restart`` says so."""
    with Store(path, map_size_mib=64, sync=False) as store:
        pipeline = new_pipeline()
        pipeline.restore(store)
        for number, start in enumerate(range(0, len(messages), batch)):
            if restart(number):
                pipeline = new_pipeline()
                pipeline.restore(store)
            with store.read() as txn:
                changes, _ = pipeline.run(messages[start : start + batch], txn)
            store.commit(changes)
        return content(store)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, log: Any, new_pipeline: NewPipeline) -> tuple[Path, Content]:
    path = tmp_path_factory.mktemp("undisturbed")
    return path, run_all(path, log.messages, new_pipeline)


# --- What it does


def test_every_event_is_accounted_for(undisturbed: tuple[Path, Content], log: Any, streams: StreamSettings) -> None:
    with Store(undisturbed[0], readonly=True) as store, open_view(store) as view:
        offsets, waiting = view.offsets(), view.n_waiting_clicks()
        outbox = view.n_outbox()
        n_shifts = len(view.shifts())
    n_arrow_rows = 4 * 50 - 4
    assert waiting == 0
    assert sum(record.n_consumed for record in offsets.values()) == len(log.messages) + n_arrow_rows
    for partition, record in offsets.items():
        assert record.n_consumed == record.n_used + record.n_dead_letters, partition
        last = [m for m in log.messages if (m.topic, m.partition) == partition][-1]
        assert record.next_offset == last.offset + 1
    assert sum(record.n_duplicates for record in offsets.values()) == log.n_duplicates
    n_dead = sum(record.n_dead_letters for record in offsets.values())
    assert n_dead == sum(log.dead.values()) == outbox - n_shifts


def test_dead_letters_say_why_and_where(undisturbed: tuple[Path, Content], log: Any, streams: StreamSettings) -> None:
    outbox = [
        msgspec.msgpack.decode(value, type=OutboxRecord)
        for (table, _), value in undisturbed[1].items()
        if table is Table.OUTBOX
    ]
    letters = [
        msgspec.json.decode(record.payload, type=DeadLetter)
        for record in outbox
        if record.topic == streams.topics.dead_letters
    ]
    assert Counter(letter.reason for letter in letters) == log.dead
    at = {(m.topic, m.partition, m.offset): m for m in log.messages}
    for letter in letters:
        message = at[letter.topic, letter.partition, letter.offset]
        assert letter.payload == message.value
        assert letter.event_id == f"{letter.topic}-{letter.partition}-{letter.offset}-0"
        assert letter.detail
    assert len({letter.event_id for letter in letters}) == len(letters)


def test_counts_are_exact_whatever_the_groups_did(undisturbed: tuple[Path, Content], log: Any) -> None:
    with Store(undisturbed[0], readonly=True) as store, open_view(store) as view:
        cells = view.cells()
        groups = {product.product_id: view.groups(product.product_id) for product in view.products()}
        arms = view.arms()
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for cell in cells:
        n, x = found.get((cell.product_id, cell.creative_id), (0, 0))
        found[cell.product_id, cell.creative_id] = (n + cell.n_impressions, x + cell.n_clicks)
        assert 0 <= cell.n_clicks <= cell.n_impressions
        assert 0 <= cell.live_clicks <= cell.live_impressions
    assert found == log.by_creative
    assert sum(n for n, _ in found.values()) == log.n_impressions
    assert sum(x for _, x in found.values()) == log.n_clicks
    for product_groups in groups.values():
        assert product_groups is not None
        assert len(product_groups.groups) >= 2
        assert product_groups.encoder_version > 1
    by_arm = {"group": (0, 0), "all": (0, 0)}
    for (experiment, arm, bucket), record in arms.items():
        n, x = by_arm[arm]
        by_arm[arm] = (n + record.n_impressions, x + record.n_clicks)
        assert (experiment, 0 <= bucket < 4) == ("groups", True)
    assert by_arm == log.by_arm


def test_the_change_of_tastes_is_published(undisturbed: tuple[Path, Content], streams: StreamSettings) -> None:
    with Store(undisturbed[0], readonly=True) as store, open_view(store) as view:
        shifts = view.shifts()
    assert "p0" in {shift.product_id for shift in shifts}
    agreements = []
    for (table, _), value in undisturbed[1].items():
        if table is not Table.OUTBOX:
            continue
        record = msgspec.msgpack.decode(value, type=OutboxRecord)
        if record.topic == streams.topics.groups_shifted:
            event = msgspec.json.decode(record.payload, type=GroupsShifted)
            assert event.statistic >= event.threshold
            assert record.key == event.product_id
            assert {group.group_id for group in event.groups}
            n_shown = sum(c.n_impressions for group in event.groups for c in group.creatives)
            assert 0 < n_shown <= event.n_impressions_since_change
            for group in event.groups:
                assert 0 < group.ranking_agreement <= 1
                agreements.append(group.ranking_agreement)
                assert group.centroid_displacement is not None
                assert 0 <= group.centroid_displacement < 1  # tastes have changed, the users have not
                for creative in group.creatives:
                    assert 0 <= creative.n_clicks <= creative.n_impressions
                    assert 0 <= creative.ctr_low <= creative.ctr <= creative.ctr_high <= 1
                    assert creative.ctr_before is not None
                    assert 0 <= creative.ctr_before <= 1
                ranked = ndcg_at([c.ctr for c in group.creatives], [c.ctr_before or 0 for c in group.creatives])
                assert group.ranking_agreement == pytest.approx(ranked)
    assert min(agreements) < 0.95  # some group ranks its creatives in another way


def test_creatives_that_come_before_all_impressions_are_registered_at_their_messages_times(
    undisturbed: tuple[Path, Content],
) -> None:
    with Store(undisturbed[0], readonly=True) as store, open_view(store) as view:
        waited_ms = {
            record.creative_id: record.registered_at_ms - record.created_at_ms for record in view.creatives("p1")
        }
    assert waited_ms.pop("new") >= 0  # in the middle of the log
    assert set(waited_ms.values()) == {1}


# --- The same again


def test_the_log_covers_what_the_equalities_are_about(undisturbed: tuple[Path, Content]) -> None:
    tables = Counter(table for table, _ in undisturbed[1])
    for table in set(Table) - {Table.WAITING_CLICKS, Table.REVIEWS, Table.FILES}:  # the last two are the generator's
        assert tables[table], table
    with Store(undisturbed[0], readonly=True) as store, open_view(store) as view:
        lineage = {record.kind for p in view.products() for record in (view.groups(p.product_id) or _none()).lineage}
        assert min(view.encoder_versions()) > (0, 1)  # old versions are dropped
        assert "birth" in lineage
    assert min(key for table, key in undisturbed[1] if table is Table.REPLAY) > bytes(8)  # old blocks are dropped


def _none() -> Any:
    raise AssertionError("a product has no groups")


def test_the_same_batches_give_the_same_state(
    undisturbed: tuple[Path, Content], log: Any, new_pipeline: NewPipeline, tmp_path: Path
) -> None:
    assert differences(undisturbed[1], run_all(tmp_path, log.messages, new_pipeline)) == []


def test_a_restart_before_every_batch_changes_no_bit(
    undisturbed: tuple[Path, Content], log: Any, new_pipeline: NewPipeline, tmp_path: Path
) -> None:
    found = run_all(tmp_path, log.messages, new_pipeline, restart=lambda _: True)
    assert differences(undisturbed[1], found) == []


@pytest.mark.parametrize("seed", range(2))
def test_restarts_at_random_batches_change_no_bit(
    undisturbed: tuple[Path, Content], log: Any, new_pipeline: NewPipeline, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    found = run_all(tmp_path, log.messages, new_pipeline, restart=lambda _: rng.random() < 0.3)
    assert differences(undisturbed[1], found) == []


def test_a_batch_that_was_never_committed_is_repeated_exactly(
    log: Any, new_pipeline: NewPipeline, tmp_path: Path
) -> None:
    with Store(tmp_path, map_size_mib=64, sync=False) as store:
        for start in range(0, 6 * BATCH, BATCH):
            written = []
            for _ in range(2):  # the first is "killed" before its commit
                pipeline = new_pipeline()
                pipeline.restore(store)
                with store.read() as txn:
                    changes, _ = pipeline.run(log.messages[start : start + BATCH], txn)
                written.append(list(changes))
            assert written[0] == written[1]
            store.commit(changes)


@pytest.mark.parametrize("batch", [77, 1_000])
def test_counts_do_not_depend_on_the_batches(
    undisturbed: tuple[Path, Content], log: Any, new_pipeline: NewPipeline, tmp_path: Path, batch: int
) -> None:
    run_all(tmp_path, log.messages, new_pipeline, batch=batch)
    found = []
    for path in (undisturbed[0], tmp_path):
        with Store(path, readonly=True) as store, open_view(store) as view:
            by_creative: Counter[tuple[str, str, str]] = Counter()
            for cell in view.cells():
                by_creative[cell.product_id, cell.creative_id, "n"] += cell.n_impressions
                by_creative[cell.product_id, cell.creative_id, "x"] += cell.n_clicks
            offsets = {p: (o.next_offset, o.n_consumed, o.n_used, o.n_duplicates) for p, o in view.offsets().items()}
            found.append((by_creative, offsets, view.arms()))
    assert found[0] == found[1]


# --- Whatever comes


def mutate(rng: random.Random, payload: bytes) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        changed = bytearray(payload)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 1:
        return payload[: rng.randrange(len(payload))]
    raw = json.loads(payload)
    name = rng.choice(list(raw))
    if kind == 2:
        del raw[name]
    else:
        raw[name] = rng.choice(
            [
                None,
                0,
                -1,
                10**30,
                253_402_300_799_999,
                2**32 - 1,
                1.5,
                "",
                "é" * 100,
                "日" * 199,
                "x" * 200,
                [],
                {},
                "zip://a::/",
            ]
        )
    return json.dumps(raw).encode()


def test_10_000_mutations_of_good_events_stop_nothing(
    streams: StreamSettings, new_pipeline: NewPipeline, tmp_path: Path
) -> None:
    rng = random.Random(11)
    topics = streams.topics
    at = 1_748_822_400_000
    good: list[tuple[str, Event]] = [
        (topics.products, Product(product_id="p", title="t", updated_at_ms=at, category="c")),
        (topics.creatives, Creative(creative_id="c", product_id="p", created_at_ms=at, group_id=1)),
    ]
    messages = [Message(topic, 0, 0, at, encode(event)) for topic, event in good]
    offsets = Counter({topics.products: 1, topics.creatives: 1})
    for number in range(10_000):
        topic, event = [
            *good,
            (
                topics.impressions,
                Impression(
                    impression_id=f"i{number}",
                    user_id="u",
                    product_id="p",
                    creative_id="c",
                    shown_at_ms=at,
                    attributes={"age": "old"},
                    experiment="e",
                    arm="a",
                    p_shown=0.5,
                ),
            ),
            (topics.clicks, Click(impression_id=f"i{number - 1}", product_id="p", clicked_at_ms=at)),
        ][number % 4]
        payload = encode(event).replace(b'"clicked_at_ms":%d' % at, b'"at":{"ms":%d}' % at)
        messages.append(Message(topic, 0, offsets[topic], at, mutate(rng, payload)))
        offsets[topic] += 1
    found = run_all(tmp_path, messages, new_pipeline, batch=1_000, restart=lambda number: number == 5)
    with Store(tmp_path, readonly=True) as store, open_view(store) as view:
        records, waiting = view.offsets(), view.n_waiting_clicks()
    assert {topic: record.next_offset for (topic, _), record in records.items()} == offsets
    assert sum(r.n_consumed for r in records.values()) == len(messages)
    assert len(messages) == waiting + sum(r.n_used + r.n_dead_letters for r in records.values())
    n_dead = sum(r.n_dead_letters for r in records.values())
    assert sum(table is Table.OUTBOX for table, _ in found) == n_dead
    assert n_dead > 3_000
    assert sum(r.n_used for r in records.values()) > 1_000


def test_an_empty_batch_changes_nothing_but_the_number_of_batches(new_pipeline: NewPipeline, tmp_path: Path) -> None:
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        pipeline = new_pipeline()
        pipeline.restore(store)
        with store.read() as txn:
            changes, summary = pipeline.run([], txn)
        assert isinstance(changes, ChangeSet)
        assert (summary.n_messages, summary.n_impressions, summary.shifts) == (0, 0, [])
        assert pipeline.next_offsets() == {}


def test_a_state_whose_users_are_grouped_by_something_else_is_refused(
    undisturbed: tuple[Path, Content], streams: StreamSettings, online: OnlineSettings
) -> None:
    other = online.model_copy(update={"groups": online.groups.model_copy(update={"space": "embedding"})})
    message = "grouped by taste, online.groups.space is 'embedding': no user was grouped"
    with Store(undisturbed[0], readonly=True) as store:
        with pytest.raises(SpaceMismatchError, match=message):
            build_pipeline(streams, other).restore(store)
        with open_view(store) as view, pytest.raises(SpaceMismatchError, match=message):
            Assigner(other).load(view)
        with open_view(store) as view:
            Assigner(online).load(view)
