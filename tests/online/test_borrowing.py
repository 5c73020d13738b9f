"""Borrowing: a new product has its neighbour's groups from its first impression on, and its own when it has users."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from online.assignment import Assigner
from online.borrowing import BORROWED_IMPRESSIONS, borrow, send_away, with_lent_users
from online.clustering import Clustering, Floats, assign, move_many, recluster, sample_many
from online.core import OnlineCore
from online.encoders import HashedImageEncoder, HashedTextEncoder, feature_dims
from online.features import FeatureBank
from online.grouped_product import MIN_USERS_PER_GROUP
from online.pipeline import Pipeline
from online.registry import Registry
from online.settings import OnlineSettings
from state.reading import open_view
from state.records import ClusteringRecord, ImpressionRecord
from state.store import ChangeSet, Store, Table
from streams.codec import encode
from streams.events import Creative, Event, Impression, Product
from streams.merge import Message
from streams.settings import StreamSettings

Codes = npt.NDArray[np.uint8]

N_USERS = 400


class Town:
    """A core with some products whose users come in batches of one product each."""

    def __init__(self, settings: OnlineSettings, products: dict[str, str | None]) -> None:
        self.bank = FeatureBank(*feature_dims(settings))
        self.registry = Registry(HashedTextEncoder, HashedImageEncoder, lambda _: b"", self.bank)
        for product_id, category in products.items():
            event = Product(product_id=product_id, title=product_id, updated_at_ms=0, category=category)
            self.registry.put_product(event, ChangeSet())
            for creative in ("a", "b", "c"):
                creative_id = f"{product_id}-{creative}"
                self.registry.put_creative(
                    Creative(creative_id=creative_id, product_id=product_id, created_at_ms=0), 0, ChangeSet()
                )
        self.core = OnlineCore(settings, self.registry, self.bank)
        rng = np.random.default_rng(0)
        self.users: Codes = np.stack(
            [rng.integers(2, cardinality, N_USERS) for cardinality in self.core.schema.cardinalities], axis=1
        ).astype(np.uint8)
        self.n_batches = 0

    def show(self, product_id: str, users: npt.NDArray[np.int64]) -> list[int]:
        """Show a product to users; return their groups."""
        number = self.registry.products[product_id].number
        group_ids = self.core.grouping.observe_many(
            [product_id] * len(users),
            np.full(len(users), number),
            self.users[users],
            users.astype(np.uint32),
            self.n_batches,
            self.n_batches,
        )
        records = [
            ImpressionRecord(
                product_id,
                f"{product_id}-{'abc'[user % 3]}",
                b"",
                group_id,
                self.n_batches,
                0,
                None,
                None,
                False,
                False,
            )
            for user, group_id in zip(users.tolist(), group_ids.tolist(), strict=True)
        ]
        self.core.count(records, [], self.n_batches)
        self.core.regroup(self.n_batches, self.n_batches)
        self.n_batches += 1
        return group_ids.tolist()


@pytest.fixture
def town(online: OnlineSettings) -> Town:
    """Two products on their own groups, and others that nobody has been shown."""
    made = Town(online, {"old chair": "seating", "old lamp": "lamps", "new chair": "seating", "new mug": "kitchen"})
    for product_id in ("old chair", "old lamp"):
        made.show(product_id, np.arange(60))
    made.core.grouping.adopt(made.core.learner.average_weights())
    for product_id in ("old chair", "old lamp"):
        made.show(product_id, np.arange(60, 120))
    return made


def test_a_new_product_has_its_neighbours_groups_from_its_first_impression_on(town: Town) -> None:
    grouping = town.core.grouping
    lender = grouping.groups_of("old chair")
    assert lender is not None
    assert lender.borrowed_from is None
    first = town.show("new chair", np.array([200]))
    groups = grouping.groups_of("new chair")
    assert groups is not None
    assert groups.borrowed_from == "old chair"
    assert (groups.encoder_version, groups.distinct, groups.p_value) == (lender.encoder_version, False, None)
    group_ids = [group.group_id for group in groups.groups]
    assert group_ids == list(range(1, len(lender.groups) + 1))
    assert groups.next_group_id == len(group_ids) + 1
    assert set(first) <= set(group_ids)
    assert sum(group.share for group in groups.groups) == pytest.approx(1)
    assert all(group.feature for group in groups.groups)
    asked = grouping.assign_many("new chair", town.registry.products["new chair"].number, town.users)
    assert set(asked.tolist()) <= set(group_ids)
    assert len(set(asked.tolist())) > 1


def test_what_its_groups_prefer_is_expected_at_once(town: Town) -> None:
    town.show("new chair", np.array([200]))
    creatives = town.registry.creative_numbers[town.registry.products["new chair"].number]
    assert town.core.expectations.creatives("new chair") == creatives.tolist()
    groups = town.core.grouping.groups_of("new chair")
    assert groups is not None
    attributes, labels = town.core.grouping.sample("new chair", 100)
    assert len(attributes) == len(labels) > 10  # the neighbour's users: of its own there is one
    assert set(labels.tolist()) <= set(range(len(groups.groups)))


def test_groups_with_nothing_counted_yet_are_not_compared(town: Town) -> None:
    number = town.registry.products["new chair"].number
    town.core.grouping.observe_many(
        ["new chair"], np.array([number]), town.users[:1], np.zeros(1, np.uint32), town.n_batches, town.n_batches
    )
    for _ in range(4):  # so that it is its turn
        town.n_batches += 1
        town.core.regroup(town.n_batches, town.n_batches)
    groups = town.core.grouping.groups_of("new chair")
    assert groups is not None
    assert len(groups.groups) > 1
    assert groups.p_value is None


def test_its_own_users_take_over(town: Town, online: OnlineSettings) -> None:
    grouping = town.core.grouping
    town.show("new chair", np.array([200]))
    borrowed = grouping.groups_of("new chair")
    assert borrowed is not None
    before = grouping.assign_many("new chair", 2, town.users)
    n_needed = MIN_USERS_PER_GROUP * online.groups.k_max
    town.show("new chair", np.arange(201, 199 + n_needed))
    assert (grouping.groups_of("new chair") or borrowed).borrowed_from == "old chair"
    town.show("new chair", np.arange(300, 310))
    own = grouping.groups_of("new chair")
    assert own is not None
    assert own.borrowed_from is None
    assert sum(group.n_members for group in own.groups) >= n_needed
    # Whose users it mostly has, keeps its id.
    kept = {group.group_id for group in own.groups} & {group.group_id for group in borrowed.groups}
    assert kept
    after = grouping.assign_many("new chair", 2, town.users)
    assert np.isin(after, list(kept)).mean() > 0.3
    assert (after[np.isin(after, list(kept))] == before[np.isin(after, list(kept))]).mean() > 0.6


def test_it_moves_with_the_encoder_while_it_has_few_users(town: Town) -> None:
    grouping = town.core.grouping
    town.show("new chair", np.arange(200, 234))
    borrowed = grouping.groups_of("new chair")
    assert borrowed is not None
    assert grouping.waiting() == []
    grouping.adopt(town.core.learner.average_weights())
    town.show("new chair", np.arange(200, 201))
    moved = grouping.groups_of("new chair")
    assert moved is not None
    assert moved.borrowed_from == "old chair"
    assert moved.encoder_version == borrowed.encoder_version + 1
    # The weights are the same, and so are most groups.
    assert {group.group_id for group in moved.groups} & {group.group_id for group in borrowed.groups}
    assert len(town.core.expectations.creatives("new chair")) == 3


def test_nothing_is_borrowed_where_the_reservoir_has_no_room_for_two_samples(online: OnlineSettings) -> None:
    """Lent users must be enough to regroup a product that returns when its encoder version is gone."""
    n_needed = MIN_USERS_PER_GROUP * 3
    for reservoir_users, borrows in ((2 * n_needed - 1, False), (2 * n_needed, True)):
        groups = online.groups.model_copy(update={"k_max": 3, "reservoir_users": reservoir_users})
        made = Town(online.model_copy(update={"groups": groups}), {"old chair": "seating", "new chair": "seating"})
        made.core.grouping.adopt(made.core.learner.average_weights())
        made.show("old chair", np.arange(200))
        made.show("new chair", np.arange(200, 201))
        found = made.core.grouping.groups_of("new chair")
        assert found is not None
        assert (found.borrowed_from is not None) == borrows
        assert len(made.core.grouping.sample("new chair", 1_000)[0]) == (n_needed + 1 if borrows else 1)


@pytest.mark.parametrize("n_users", [1, 40])
def test_a_parked_borrower_returns_when_its_encoder_version_is_gone(
    town: Town, online: OnlineSettings, tmp_path: Path, n_users: int
) -> None:
    """With what it was lent, or with its own users if they are enough by now."""
    grouping = town.core.grouping
    with Store(tmp_path, map_size_mib=16, sync=False) as store:

        def commit() -> None:
            changes = ChangeSet()
            town.core.write(changes)
            store.commit(changes)

        town.show("new chair", np.array([200]))
        before = grouping.groups_of("new chair")
        assert before is not None
        town.show("new chair", np.arange(201, 200 + n_users))
        commit()
        for part in town.core._product_parts():
            part.park("new chair")
        grouping.adopt(town.core.learner.average_weights())
        for product_id in ("old chair", "old lamp"):
            town.show(product_id, np.arange(60, 120))
        commit()
        with store.read() as txn:
            town.core.bring_in(["new chair"], txn, town.n_batches, town.n_batches)
    after = grouping.groups_of("new chair")
    assert after is not None
    assert after.encoder_version == grouping.version > before.encoder_version
    own = n_users >= MIN_USERS_PER_GROUP * online.groups.k_max
    assert after.borrowed_from == (None if own else "old chair")
    assert {group.group_id for group in after.groups} & {group.group_id for group in before.groups}
    assert set(town.show("new chair", np.arange(300, 310))) <= {group.group_id for group in after.groups}


def test_a_product_far_from_all_starts_without_groups(town: Town) -> None:
    assert town.show("new mug", np.arange(3)) == [0, 0, 0]
    groups = town.core.grouping.groups_of("new mug")
    assert groups is not None
    assert (groups.groups, groups.borrowed_from, groups.encoder_version) == ([], None, 0)
    assert town.core.expectations.creatives("new mug") == []


def test_nothing_is_borrowed_from_borrowers_or_before_there_are_groups(online: OnlineSettings) -> None:
    made = Town(online, {"first": "seating", "second": "seating", "third": "seating"})
    assert made.show("first", np.arange(10)) == [0] * 10
    made.core.grouping.adopt(made.core.learner.average_weights())
    assert made.show("second", np.arange(10)) == [0] * 10  # "first" has not been grouped
    made.show("first", np.arange(10, 100))
    made.show("third", np.arange(1))
    groups = made.core.grouping.groups_of("third")
    assert groups is not None
    assert groups.borrowed_from == "first"
    assert made.show("second", np.arange(10, 12)) == [0, 0]  # it has had its first impression


def test_centroids_are_displaced_by_the_users_that_come(town: Town) -> None:
    grouping = town.core.grouping
    assert grouping.displacements("old chair") == pytest.approx([0.0] * len(grouping.displacements("old chair")))
    town.show("old chair", np.arange(130, 190))
    moved = [displacement or 0.0 for displacement in grouping.displacements("old chair")]
    assert 0 < max(moved) < 2
    groups = grouping.groups_of("old chair")
    assert groups is not None
    assert len(moved) == len(groups.groups)
    town.show("new mug", np.arange(3))
    assert grouping.displacements("new mug") == []


# --- What is lent


def lender(n: int = 200) -> tuple[Clustering, Floats]:
    """Return a clustering of two blobs and the users' embeddings."""
    rng = np.random.default_rng(3)
    points = (rng.standard_normal((n, 4)) + 8 * (np.arange(n) % 2)[:, None]).astype(np.float32)
    attributes = rng.integers(2, 5, (n, 3)).astype(np.uint8)
    clustering = Clustering((2, 3), attributes, np.arange(n, dtype=np.uint32), n)
    recluster(clustering, points, np.random.default_rng(0))
    return clustering, points


def test_clusters_keep_their_users_where_the_borrower_sees_them_elsewhere() -> None:
    clustering, points = lender()
    seen = np.asarray(-2 * points[:, ::-1] + 5, np.float32)
    lent = borrow(clustering, seen)
    assert (lent.labels[2] == clustering.labels[2]).all()
    assert lent.centroids[2][0] == pytest.approx(seen[clustering.labels[2] == 0].mean(axis=0), abs=1e-3)
    for k in (2, 3):
        assert lent.masses[k].sum() == pytest.approx(BORROWED_IMPRESSIONS)
        assert (assign(seen, lent.centroids[k]) == lent.labels[k]).all()


def test_a_cluster_without_users_is_no_trouble() -> None:
    clustering, points = lender()
    clustering.labels[3][:] = clustering.labels[2]
    lent = borrow(clustering, points)
    assert np.isfinite(lent.centroids[3]).all()
    assert len(np.unique(lent.labels[3])) == 3


def test_lent_users_come_first_and_go_when_they_are_sent_away() -> None:
    clustering, points = lender()
    centroids = {k: values.copy() for k, values in clustering.centroids.items()}
    own = with_lent_users(borrow(clustering, points), 30)
    assert (own.n_users, own.n_lent, own.n_seen, own.ready) == (30, 30, 0, True)
    assert (own.attributes == clustering.attributes[:30]).all()
    users = np.array([5, 5, 7], np.uint32)  # the first of them was lent too, and is the product's own all the same
    sample_many(
        own,
        clustering.attributes[users],
        users,
        move_many([own], np.zeros(3, np.int64), points[users], 4_096),
        reservoir_users=64,
        reservoir_memory=8,
        rng=np.random.default_rng(0),
    )
    assert own.n_users == 32
    labels = {k: own.labels[k][30:].copy() for k in own.ks}
    send_away(own)
    assert (own.n_users, own.n_lent) == (2, 0)
    assert own.user_keys.tolist() == [5, 7]
    assert (own.attributes == clustering.attributes[[5, 7]]).all()
    assert all((own.labels[k] == labels[k]).all() for k in own.ks)
    # The lender is as it was.
    assert all((clustering.centroids[k] == centroids[k]).all() for k in clustering.ks)
    assert clustering.n_users == 200


@pytest.mark.parametrize(("n_most", "expected"), [(0, 0), (30, 30), (10_000, 200)])
def test_no_more_are_lent_than_there_is_room_for(n_most: int, expected: int) -> None:
    clustering, points = lender()
    assert with_lent_users(borrow(clustering, points), n_most).n_users == expected


# --- From the stream


def later(log: Any, streams: StreamSettings, n_impressions: int) -> list[Message]:
    """Return the first half of a log, then a product that is new, and impressions of it."""
    messages: list[Message] = log.messages[: len(log.messages) // 2]
    at_ms = messages[-1].timestamp_ms
    events: list[tuple[str, Event]] = [
        (
            streams.topics.products,
            Product(product_id="late", title="blue stool", updated_at_ms=at_ms, category="things"),
        ),
        *(
            (streams.topics.creatives, Creative(creative_id=creative, product_id="late", created_at_ms=at_ms))
            for creative in ("a", "b")
        ),
    ]
    for number in range(n_impressions):
        impression = Impression(
            impression_id=f"late{number}",
            user_id=f"u{number}",
            product_id="late",
            creative_id="ab"[number % 2],
            shown_at_ms=at_ms + number,
            attributes={"age": ("young", "old")[number % 2], "tier": str(1 + number % 3)},
        )
        events.append((streams.topics.impressions, impression))
    return messages + [
        Message(topic, 7, offset, at_ms + offset, encode(event)) for offset, (topic, event) in enumerate(events)
    ]


def run(
    path: Path, messages: list[Message], n_new: int, new_pipeline: Callable[[], Pipeline], *, restart: bool
) -> dict[Any, bytes]:
    """Work off messages, the last ``n_new`` in small batches, each by a new pipeline if asked; return the state."""
    n_old = len(messages) - n_new
    bounds = [*range(0, n_old, 300), *range(n_old, len(messages), 20), len(messages)]
    with Store(path, map_size_mib=64, sync=False) as store:
        pipeline = new_pipeline()
        pipeline.restore(store)
        for start, end in pairwise(bounds):
            if restart and start >= n_old:
                pipeline = new_pipeline()
                pipeline.restore(store)
            with store.read() as txn:
                changes, _ = pipeline.run(messages[start:end], txn)
            store.commit(changes)
        with store.read() as txn:
            return {(table, key): value for table in Table for key, value in txn.scan(table)}


@pytest.mark.parametrize(("n_impressions", "borrows"), [(30, True), (120, False)])
def test_a_restart_while_groups_are_borrowed_changes_no_bit(
    log: Any,
    streams: StreamSettings,
    online: OnlineSettings,
    new_pipeline: Callable[[], Pipeline],
    tmp_path: Path,
    n_impressions: int,
    borrows: bool,
) -> None:
    messages = later(log, streams, n_impressions)
    n_new = n_impressions + 3
    undisturbed = run(tmp_path / "a", messages, n_new, new_pipeline, restart=False)
    assert run(tmp_path / "b", messages, n_new, new_pipeline, restart=True) == undisturbed
    with Store(tmp_path / "a", readonly=True) as store, open_view(store) as view:
        groups, expected = view.groups("late"), view.expectation("late")
        clustering = msgspec.msgpack.decode(view.clustering("late") or b"", type=ClusteringRecord)
        assigner = Assigner(online)
        assigner.load(view)
        cells = view.cells("late")
    assert groups is not None
    assert (groups.borrowed_from in ("p0", "p1", "p2")) == borrows
    assert (groups.borrowed_from is None) != borrows
    assert expected is not None
    assert (clustering.n_lent > 0) == borrows
    assert len(clustering.user_keys) // 4 == min(clustering.n_lent + n_impressions, online.groups.reservoir_users)
    assert sum(cell.n_impressions for cell in cells) == n_impressions
    # Who reads the state sees groups like any others; no impression was without one.
    assert {cell.group_id for cell in cells} <= set(range(1, groups.next_group_id))
    group_ids = {group.group_id for group in groups.groups}
    assert set(assigner.assign_many(["late"] * 2, [{"age": "old"}, {"age": "young"}])) <= group_ids
