"""Limits: what a product holds stays below what was promised, however long it lives."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from online.attributes import AttributeSchema
from online.clustering import FEATURE_PERCENTILES
from online.core import ProductPart
from online.counts import Counts
from online.expectation import Expectations
from online.grouped_product import UNGROUPED
from online.grouping import Grouping
from online.limits import DEAD_GROUPS_KEPT, LINEAGE_KEPT, ProductBytes, most_product_bytes
from online.pipeline import Pipeline
from online.settings import (
    AttributeSettings,
    GroupSettings,
    LimitSettings,
    ModelSettings,
    OnlineSettings,
    ShiftSettings,
)
from online.shift import Observed, ShiftDetection
from state.reading import open_view
from state.records import N_FEATURE_POINTS, ImpressionRecord
from state.store import ChangeSet, Store, Table

PRODUCT = "p".ljust(200, "p")
CREATIVES = [str(number).rjust(200, "c") for number in range(24)]


def test_features_have_as_many_points_as_the_bound_counts() -> None:
    assert 1 + len(FEATURE_PERCENTILES) == N_FEATURE_POINTS


@pytest.mark.parametrize(
    ("changed", "grows"),
    [
        ({"n_sampled": 1_024}, {"sample"}),
        ({"n_attributes": 40}, {"sample"}),
        ({"d_model": 256}, {"groups"}),
        ({"k_max": 8}, {"sample", "groups", "counts"}),
        ({"k_min": 5}, {"sample", "groups"}),  # fewer centroids and labels
        ({"n_creatives": 25}, {"counts"}),
    ],
)
def test_the_bound_follows_the_settings(changed: dict[str, int], grows: set[str]) -> None:
    before = {"n_sampled": 512, "n_attributes": 20, "d_model": 128, "k_min": 2, "k_max": 5, "n_creatives": 24}
    a, b = most_product_bytes(**before), most_product_bytes(**before | changed)
    assert {name for name in ProductBytes._fields if getattr(a, name) != getattr(b, name)} == grows
    assert (b.total > a.total) == ("k_min" not in changed)


def test_settings_under_which_a_product_may_need_more_are_refused() -> None:
    message = (
        r"bytes_per_product is 300,000, a product may need 372,888 bytes: 16,384 .*reservoir_users = 512, 20 "
        r"online.attributes.*97,656 .*k_max = 5, online.model.d_model = 128.*258,848 .*creatives_per_product = 24"
    )
    with pytest.raises(ValidationError, match=message):
        OnlineSettings(limits=LimitSettings(bytes_per_product=300_000))
    few = LimitSettings(bytes_per_product=300_000, creatives_per_product=15)
    assert OnlineSettings(limits=few).limits == few
    with pytest.raises(ValidationError, match=r"k_max = 16"):
        OnlineSettings(groups=GroupSettings(k_max=16))


class Noise:
    """An encoder whose users change places with every version, so that groups come and go."""

    def __init__(self, weights: bytes) -> None:
        self._rng = np.random.default_rng(list(weights))

    def embed_many(self, products: np.ndarray, attributes: np.ndarray) -> np.ndarray:
        hidden = np.maximum(attributes.astype(np.float32) @ self._rng.normal(size=(attributes.shape[1], 64)), 0)
        return (hidden @ self._rng.normal(size=(64, 128))).astype(np.float32)


@contextmanager
def traced_bytes() -> Iterator[Callable[[], int]]:
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    def traced() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    try:
        yield traced
    finally:
        tracemalloc.stop()


def new_grouping(settings: GroupSettings, schema: AttributeSchema) -> Grouping:
    """Return a grouping in which a new product borrows from any that can lend."""
    return Grouping(
        settings,
        schema,
        ModelSettings().d_model,
        Noise,  # type: ignore[arg-type]
        lambda new, lenders: [lenders[0] if lenders else None] * len(new),
        0,
    )


def test_lent_users_are_within_the_bound(tmp_path: Path) -> None:
    settings, schema = GroupSettings(survive_overlap=1.0), AttributeSchema(AttributeSettings())
    grouping = new_grouping(settings, schema)
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(c, size=2_000) for c in schema.cardinalities], axis=1).astype(np.uint8)
    numbers, keys = np.zeros(2_000, np.int64), np.arange(2_000, dtype=np.uint32)
    lender = "l" + PRODUCT[1:]
    grouping.observe_many([lender] * 2_000, numbers, codes, keys, 0, 0)
    grouping.adopt(b"")
    grouping.refresh(lender, 0, 0)
    grouping.observe_many([PRODUCT] * 2_000, 1 + numbers, codes, keys, 1, 1)  # its reservoir is full at once
    groups = grouping.groups_of(PRODUCT)
    assert groups is not None
    assert groups.borrowed_from == lender
    bound = most_product_bytes(
        n_sampled=settings.reservoir_users,
        n_attributes=len(schema.names),
        d_model=ModelSettings().d_model,
        k_min=settings.k_min,
        k_max=len(groups.groups),
        n_creatives=0,
    )
    changes, again = ChangeSet(), new_grouping(settings, schema)
    grouping.write(changes)
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        store.commit(changes)
        with store.read() as txn, traced_bytes() as traced:
            again.bring_in(PRODUCT, txn)
            assert 16_000 < traced() < bound.sample + bound.groups
    assert len(again.sample(PRODUCT, 10_000)[0]) == settings.reservoir_users


def test_a_product_that_has_everything_stays_below_the_bound(tmp_path: Path) -> None:
    settings, schema = GroupSettings(survive_overlap=1.0), AttributeSchema(AttributeSettings())

    def parts() -> tuple[Grouping, Counts, Expectations, ShiftDetection]:
        grouping = new_grouping(settings, schema)
        return grouping, Counts(1e6), Expectations(), ShiftDetection(ShiftSettings(warm_up_impressions=0))

    grouping, counts, expectations, detection = parts()
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(c, size=2_000) for c in schema.cardinalities], axis=1).astype(np.uint8)
    numbers, keys = np.zeros(2_000, np.int64), np.arange(2_000, dtype=np.uint32)
    for version in range(40):
        grouping.observe_many([PRODUCT] * 2_000, numbers, codes, keys, version, version)
        grouping.adopt(bytes([version]))
        grouping.refresh(PRODUCT, 0, version)
    groups = grouping.groups_of(PRODUCT)
    assert groups is not None
    assert len(groups.lineage) == LINEAGE_KEPT
    group_ids = [2**32 - 1 - number for number in range(1 + settings.k_max + DEAD_GROUPS_KEPT)]
    shown = [
        ImpressionRecord(PRODUCT, creative, b"", group_id, 10**12, 0, None, None, False, False)
        for group_id in group_ids
        for creative in CREATIVES
    ]
    for _ in range(300):
        counts.count_impressions(shown, 10**12)
    cells = {(record.group_id, record.creative_id): (10**6, 10**5) for record in shown}
    detection.own_preferences(PRODUCT, None, np.arange(len(CREATIVES)), *np.ones((2, len(CREATIVES))))
    detection.observe_many([Observed(PRODUCT, None, np.ones(4), np.ones(4), cells)])
    log_relative = np.ones((settings.k_max, len(CREATIVES)), np.float32)
    expectations.put(
        PRODUCT, group_ids[: settings.k_max], list(range(10**9, 10**9 + len(CREATIVES))), log_relative, 10**9
    )
    changes = ChangeSet()
    for part in (grouping, counts, expectations, detection):
        part.write(changes)
    bound = most_product_bytes(
        n_sampled=settings.reservoir_users,
        n_attributes=len(schema.names),
        d_model=ModelSettings().d_model,
        k_min=settings.k_min,
        k_max=max(settings.k_max, len(groups.groups)),
        n_creatives=len(CREATIVES),
    )
    of_product = (Table.GROUPS, Table.CLUSTERINGS, Table.CELLS, Table.EXPECTATIONS, Table.DETECTORS)
    in_state = sum(len(key) + len(value or b"") for table in of_product for key, value in changes.of(table))
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        store.commit(changes)
        again: tuple[ProductPart, ...] = parts()
        with store.read() as txn, traced_bytes() as traced:
            for part in again:
                part.bring_in(PRODUCT, txn)
            in_memory = traced()
    assert bound.total / 4 < in_state < in_memory < bound.total <= LimitSettings().bytes_per_product


def test_counts_of_groups_that_died_long_ago_go_on_together(
    log: Any,
    online: OnlineSettings,
    pipeline_with: Callable[[OnlineSettings], Pipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("online.regrouping.DEAD_GROUPS_KEPT", 1)
    # Before an attribute is known to decide, groups come and go.
    monkeypatch.setattr("online.relevance.MIN_RELEVANCE", math.inf)
    # No group survives a regrouping, and few are taken over whole.
    groups = online.groups.model_copy(
        update={
            "survive_overlap": 1.0,
            "k_hysteresis": 0.0,
            "adopt_every_impressions": 60,
            "refresh_every_impressions": 1,
            "k_tolerance": 0.0,
            "refresh_products_per_batch": 3,
        }
    )
    pipeline = pipeline_with(online.model_copy(update={"groups": groups}))
    n_most = 1 + groups.k_max + 1
    with Store(tmp_path, map_size_mib=64, sync=False) as store:
        for start in range(0, len(log.messages), 100):
            with store.read() as txn:
                changes, _ = pipeline.run(log.messages[start : start + 100], txn)
            store.commit(changes)
        with open_view(store) as view:
            cells, retired = view.cells(), Counter[int]()
            for product in view.products():
                found = view.groups(product.product_id)
                assert found is not None
                retired.update(found.successors.values())
                own = {cell.group_id for cell in cells if cell.product_id == product.product_id}
                assert len(own) <= n_most
                assert own.isdisjoint(found.successors)
    assert retired[UNGROUPED] > 0
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for cell in cells:
        assert 0 <= cell.n_clicks <= cell.n_impressions
        n, x = totals.get((cell.product_id, cell.creative_id), (0, 0))
        totals[cell.product_id, cell.creative_id] = (n + cell.n_impressions, x + cell.n_clicks)
    assert totals == log.by_creative
