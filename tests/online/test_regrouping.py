"""What follows a micro-batch for products: which the model is asked about again, and that no more are than may be."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest

from online.core import OnlineCore
from online.encoders import HashedImageEncoder, HashedTextEncoder
from online.expectation import expected_log_relative
from online.features import FeatureBank
from online.forgetting import ForgottenUsers
from online.registry import Registry
from online.regrouping import N_EXPECTED_USERS, SETTLED_SHARE
from online.rows import Audience
from online.settings import OnlineSettings
from state.records import ImpressionRecord
from state.store import ChangeSet
from streams.events import Creative, Product

PRODUCTS = ("chair", "bench", "lamp", "spot")
SHARES = (0.4, 0.3, 0.2, 0.1)
CREATIVES = ("a", "b", "c")
BATCH_ROWS = 100


def open_nothing(uri: str) -> bytes:
    raise FileNotFoundError(uri)


@dataclass
class Batch:
    """What one micro-batch left: impressions of every product so far, and about which the model was asked."""

    n_seen: dict[str, int]
    moved: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)


class Course:
    """A core that works off impressions shown by chance."""

    def __init__(self, online: OnlineSettings) -> None:
        text, image = HashedTextEncoder(), HashedImageEncoder()
        bank = FeatureBank(text.dim, image.dim)
        registry = Registry(lambda: text, lambda: image, open_nothing, bank)
        for product_id in PRODUCTS:
            registry.put_product(
                Product(product_id=product_id, title=product_id, updated_at_ms=0, category="things"), ChangeSet()
            )
            for creative_id in CREATIVES:
                creative = Creative(creative_id=creative_id, product_id=product_id, created_at_ms=0)
                registry.put_creative(creative, 0, ChangeSet())
        self.core = OnlineCore(online, registry, bank)
        self._rng = np.random.default_rng(1)
        self._n_batches = 0

    def run(self, n_batches: int) -> list[Batch]:
        return [self._batch() for _ in range(n_batches)]

    def _batch(self) -> Batch:
        core, rng = self.core, self._rng
        numbers = rng.choice(len(PRODUCTS), BATCH_ROWS, p=SHARES)
        product_ids = [PRODUCTS[number] for number in numbers]
        users = rng.integers(400, size=BATCH_ROWS)
        keys = np.array([zlib.crc32(str(user).encode()) for user in users], np.uint32)
        codes = np.stack([2 + users % 2, 2 + users % 3, users % 5], axis=1).astype(np.uint8)
        before = self.versions(), core.expectations.n_impressions()
        core.bring_in(product_ids, None, 0, self._n_batches)
        group_ids = core.grouping.observe_many(product_ids, numbers, codes, keys, 0, self._n_batches)
        creatives = rng.choice(CREATIVES, BATCH_ROWS)
        clicked = rng.random(BATCH_ROWS) < np.where((creatives == "a") == (users % 2 == 0), 0.5, 0.05)
        records = [
            ImpressionRecord(product_id, str(creative), code.tobytes(), group_id, 0, 0, None, None, bool(click), True)
            for product_id, creative, code, group_id, click in zip(
                product_ids, creatives, codes, group_ids.tolist(), clicked, strict=True
            )
        ]
        core.count(records, [record for record in records if record.clicked], 0)
        core.learn(records, [], 0)
        core.regroup(0, self._n_batches)
        self._n_batches += 1
        after = self.versions(), core.expectations.n_impressions()
        return Batch(
            {product_id: core.grouping.n_seen(product_id) for product_id in core.grouping.product_ids()},
            {product_id for product_id, version in after[0].items() if version != before[0].get(product_id, 0)},
            {product_id for product_id, n in after[1].items() if n != before[1].get(product_id, 0)},
        )

    def group_ids(self, product_id: str) -> list[int]:
        groups = self.core.grouping.groups_of(product_id)
        return [] if groups is None else [group.group_id for group in groups.groups]

    def versions(self) -> dict[str, int]:
        found = {}
        for product_id in self.core.grouping.product_ids():
            groups = self.core.grouping.groups_of(product_id)
            found[product_id] = 0 if groups is None else groups.encoder_version
        return found


def settings(online: OnlineSettings, **groups: int) -> OnlineSettings:
    return online.model_copy(update={"groups": online.groups.model_copy(update=groups)})


@pytest.mark.parametrize("n_most", [0, 1, 2])
def test_the_model_is_asked_again_about_those_with_most_impressions_since(online: OnlineSettings, n_most: int) -> None:
    every = 35
    course = Course(settings(online, expect_every_impressions=every, expect_products_per_batch=n_most))
    last: dict[str, int] = {}
    n_again = 0
    for batch in course.run(30):
        assert batch.moved <= batch.asked  # new groups are always asked about
        again = batch.asked - batch.moved
        ages = {product_id: batch.n_seen[product_id] - last[product_id] for product_id in last.keys() - batch.moved}
        waits = {product_id: max(every, SETTLED_SHARE * last[product_id]) for product_id in ages}
        due = sorted((age for product_id, age in ages.items() if age >= waits[product_id]), reverse=True)[:n_most]
        assert sorted((ages[product_id] for product_id in again), reverse=True) == due
        last |= {product_id: batch.n_seen[product_id] for product_id in batch.asked}
        n_again += len(again)
    assert set(last) == set(PRODUCTS)
    assert (n_again > 0) == (n_most > 0)


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("online.regrouping.SETTLED_SHARE", 0.0)


@pytest.mark.usefixtures("unsettled")
def test_what_is_expected_is_what_the_model_says_now(online: OnlineSettings) -> None:
    # Groups are made once and stay: only what is expected of them can move.
    once = settings(online, adopt_every_impressions=10_000, expect_every_impressions=1)
    differences = []
    for n_most in (0, len(PRODUCTS)):
        core = (course := Course(settings(once, expect_products_per_batch=n_most))).core
        course.run(20)
        for number, product_id in enumerate(PRODUCTS):
            expected = core.expectations._products[product_id]
            attributes, labels = core.grouping.sample(product_id, N_EXPECTED_USERS)
            (p_click,) = core.learner.expect_many([Audience(number, attributes, np.array(expected.creatives))])
            now = expected_log_relative(p_click, labels, len(expected.group_ids))
            found = np.frombuffer(expected.log_relative, np.float32).reshape(now.shape)
            differences.append((n_most, float(np.abs(found - now).max())))
    assert all(difference < 1e-5 if n_most else difference > 0.1 for n_most, difference in differences)


@pytest.mark.usefixtures("unsettled")
def test_a_product_whose_users_have_all_been_forgotten_is_not_asked_about(online: OnlineSettings) -> None:
    course = Course(settings(online, expect_every_impressions=1, expect_products_per_batch=1))
    course.run(15)
    core = course.core

    def outdated() -> set[str]:
        asked_at = core.expectations.n_impressions()
        return {product_id for product_id in PRODUCTS if asked_at[product_id] < core.grouping.n_seen(product_id)}

    forgotten = max(outdated())
    keys = core.grouping._products[forgotten].clustering.user_keys.copy()
    assert core.forget_users(forgotten, ForgottenUsers(keys, []), 0) == set(keys.tolist())
    for _ in PRODUCTS:
        core.regroup(0, 15)
    assert outdated() == {forgotten}


@pytest.mark.parametrize(
    ("moved_share", "replay_rows", "follow"),
    [(0.0, 2_000, True), (1.1, 2_000, False), (0.0, 1_000, False)],  # 2,000 are shown
)
def test_live_counts_follow_users_who_are_in_another_group_now(
    online: OnlineSettings, monkeypatch: pytest.MonkeyPatch, moved_share: float, replay_rows: int, *, follow: bool
) -> None:
    monkeypatch.setattr("online.regrouping.MOVED_SHARE", moved_share)
    model = online.model.model_copy(update={"replay_rows": replay_rows})
    core = (course := Course(online.model_copy(update={"model": model}))).core
    course.run(20)
    for number, product_id in enumerate(PRODUCTS):
        one, other = [group_id for group_id in course.group_ids(product_id) if group_id][:2]
        core.counts.hand_over(product_id, one, other, 0)
        core._regrouping.refresh(product_id, 0)
        rows = core.learner.remembered(number).rows
        in_one = core.grouping.assign_many(product_id, number, rows.attributes) == one
        assert in_one.any()
        cells = core.counts.cells_of(product_id).items()
        live = sum(cell.live_impressions for (group_id, _), cell in cells if group_id == one)
        assert live == pytest.approx(in_one.sum() if follow else 0)
