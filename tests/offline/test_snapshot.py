"""GAIP rows from the state."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offline.settings import OfflineSettings
from offline.snapshot import GroupFeatureError, UnknownCreativeError, gaip_schema, take_snapshot
from online.ctr import shrink
from state.reading import StateReader

SETTINGS = OfflineSettings(min_product_impressions=400, min_cell_impressions=20)


def snapshot(writer, settings=SETTINGS):
    writer.commit()
    with StateReader(writer.path) as state:
        return take_snapshot(state, settings)


def test_rows_are_the_state(state_writer):
    writer = state_writer()
    writer.conflict("p1")
    writer.offset("impressions", 0, 6_000)
    writer.offset("clicks", 0, 400)
    found = snapshot(writer)
    assert (found.n_products, found.n_impressions, found.n_clicks) == (1, 6_000, 400)
    assert found.offsets == {"impressions/0": 6_000, "clicks/0": 400}
    assert found.rows.num_rows == 6
    rows = {(row["group_id"], row["creative_id"]): row for row in found.rows.to_pylist()}
    expected = shrink(
        np.full((2, 3), 1_000.0),
        [[120.0, 60.0, 20.0], [20.0, 60.0, 120.0]],  # creatives by id: blue, green, red
    )
    for group_id in (0, 1):
        for column, creative_id in enumerate(("p1-blue", "p1-green", "p1-red")):
            row = rows[group_id, creative_id]
            assert row["ctr"] == pytest.approx(expected.ctr[group_id, column])
            assert row["ctr_low"] == pytest.approx(expected.ctr_low[group_id, column])
            assert row["ctr_high"] == pytest.approx(expected.ctr_high[group_id, column])
            assert row["ctr_alpha"] / (row["ctr_alpha"] + row["ctr_beta"]) == pytest.approx(row["ctr"])
            assert row["group_feature"] == [group_id + 0.5] * (11 * 128)
    row = rows[1, "p1-red"]
    assert row | {"group_feature": None, "ctr": 0, "ctr_low": 0, "ctr_high": 0, "ctr_alpha": 0, "ctr_beta": 0} == {
        "snapshot_id": found.snapshot_id,
        "product_id": "p1",
        "title": "A chair",
        "category": "chairs",
        "group_id": 1,
        "group_share": 0.5,
        "groups_distinct": True,
        "encoder_version": 7,
        "creative_id": "p1-red",
        "image_uri": "file:///p1-red.png",
        "prompt": "a red wall",
        "group_feature": None,
        "n_impressions": 1_000,
        "n_clicks": 120,
        "live_impressions": 1_000.0,
        "live_clicks": 120.0,
        "ctr": 0,
        "ctr_low": 0,
        "ctr_high": 0,
        "ctr_alpha": 0,
        "ctr_beta": 0,
    }


def test_schema_is_kept_and_described(state_writer):
    writer = state_writer()
    writer.conflict("p1")
    found = snapshot(writer)
    assert found.rows.schema.equals(gaip_schema(), check_metadata=False)
    assert all(field.metadata[b"description"] for field in found.rows.schema)
    assert found.rows.schema.field("group_feature").type.list_size == 11 * 128


def test_metadata_holds_the_offsets(state_writer):
    writer = state_writer()
    writer.conflict("p1")
    writer.offset("clicks", 3, 9)
    metadata = snapshot(writer).rows.schema.metadata
    assert json.loads(metadata[b"osmf.offsets"]) == {"clicks/3": 9}


def test_snapshot_id_depends_on_the_offsets_alone(state_writer):
    writer = state_writer()
    writer.conflict("p1")
    writer.offset("clicks", 0, 9)
    first, again = snapshot(writer), snapshot(writer)
    writer.offset("clicks", 0, 10)
    assert first.snapshot_id == again.snapshot_id != snapshot(writer).snapshot_id
    assert first.rows.equals(again.rows)


@pytest.mark.parametrize(
    ("min_product", "min_cell", "expected"),
    [
        (0, 0, {"low": 4, "high": 4}),
        (399, 0, {"low": 4, "high": 4}),
        (400, 0, {"low": 4, "high": 4}),
        (401, 0, {"high": 4}),
        (0, 11, {"low": 3, "high": 4}),
        (0, 201, {"high": 4}),
        (5_000, 0, {}),
    ],
)
def test_exposure_filter(state_writer, min_product, min_cell, expected):
    writer = state_writer()
    for product_id, counts in {"low": (10, 50, 140, 200), "high": (1_000, 1_000, 1_000, 1_000)}.items():
        writer.product(product_id)
        writer.groups(product_id, [0, 1])
        for creative_id in ("a", "b"):
            writer.creative(product_id, creative_id)
        for n, place in zip(counts, ((0, "a"), (0, "b"), (1, "a"), (1, "b")), strict=True):
            writer.cell(product_id, *place, n, n // 20)
    settings = OfflineSettings(min_product_impressions=min_product, min_cell_impressions=min_cell)
    found = snapshot(writer, settings)
    products = found.rows["product_id"].to_pylist()
    assert {product_id: products.count(product_id) for product_id in set(products)} == expected
    assert found.n_products == len(expected)
    assert found.n_impressions == 4_400


def test_live_counts_follow_a_change_and_lifetime_counts_do_not(state_writer):
    writer = state_writer()
    writer.product("p")
    writer.groups("p", [0])
    for creative_id, live in (("old", (500.0, 5.0)), ("new", (500.0, 60.0))):
        writer.creative("p", creative_id)
        writer.cell("p", 0, creative_id, 10_000, 900 if creative_id == "old" else 100, live)
    found = {}
    for counts in ("live", "lifetime"):
        rows = snapshot(writer, OfflineSettings(counts=counts)).rows.to_pylist()
        found[counts] = {row["creative_id"]: row["ctr"] for row in rows}
    assert found["live"]["new"] > 0.08 > 0.03 > found["live"]["old"]
    assert found["lifetime"]["old"] > 0.08 > 0.02 > found["lifetime"]["new"]


def test_faded_counts_make_no_rows(state_writer):
    writer = state_writer()
    writer.product("p")
    writer.groups("p", [0])
    writer.creative("p", "c")
    writer.cell("p", 0, "c", 10_000, 500, (1e-9, 1e-10))
    settings = OfflineSettings(min_product_impressions=0, min_cell_impressions=0)
    assert snapshot(writer, settings).rows.num_rows == 0


def test_decay_may_leave_a_little_more_click_than_impression(state_writer):
    writer = state_writer()
    writer.product("p")
    writer.groups("p", [0])
    writer.creative("p", "c")
    writer.cell("p", 0, "c", 1, 1, (0.5, 1.0))
    settings = OfflineSettings(min_product_impressions=0, min_cell_impressions=0)
    assert snapshot(writer, settings).rows.num_rows == 1


def test_products_without_groups_or_counts_make_no_rows(state_writer):
    writer = state_writer()
    writer.product("ungrouped")
    writer.creative("ungrouped", "c")
    writer.cell("ungrouped", 0, "c", 900, 50)
    writer.product("unseen")
    writer.creative("unseen", "c")
    writer.groups("unseen", [0])
    writer.product("bare")
    writer.groups("bare", [0])
    found = snapshot(writer)
    assert (found.rows.num_rows, found.n_products, found.n_impressions) == (0, 0, 900)
    assert found.rows.schema.equals(gaip_schema(), check_metadata=False)


def test_counts_of_a_dead_group_are_counted_but_make_no_rows(state_writer):
    writer = state_writer()
    writer.conflict("p1")
    writer.cell("p1", 5, "p1-red", 700, 10)
    found = snapshot(writer)
    assert set(found.rows["group_id"].to_pylist()) == {0, 1}
    assert found.n_impressions == 6_700


def test_another_width_of_features_is_kept(state_writer):
    writer = state_writer(d_feature=16)
    writer.conflict("p1")
    assert snapshot(writer).rows.schema.field("group_feature").type.list_size == 11 * 16


def test_unregistered_creative_is_refused(state_writer):
    writer = state_writer()
    writer.conflict("p1")
    writer.cell("p1", 0, "stranger", 500, 10)
    with pytest.raises(UnknownCreativeError, match="'stranger' of product 'p1'"):
        snapshot(writer)


@pytest.mark.parametrize("feature", [b"", b"\0" * 45, np.zeros((11, 64), "<f4").tobytes()])
def test_odd_features_are_refused(state_writer, feature):
    writer = state_writer()
    writer.conflict("p1")
    writer.groups("p1", [0, 1], features={1: feature})
    with pytest.raises(GroupFeatureError, match="group 1 of product 'p1'"):
        snapshot(writer)
