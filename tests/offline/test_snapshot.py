"""Snapshots: what the state counted, as tables."""

from __future__ import annotations

import numpy as np
import pytest

from offline.snapshot import GroupFeatureError, UnknownCreativeError, snapshot_schemas, take_snapshot
from state.reading import StateReader


def snapshot(writer):
    writer.commit()
    with StateReader(writer.path) as state:
        return take_snapshot(state)


def test_tables_are_the_state(state_writer):
    writer = state_writer()
    writer.conflict("p1")
    writer.offset("impressions", 0, 6_000)
    writer.offset("clicks", 0, 400)
    found = snapshot(writer)
    assert (found.n_impressions, found.n_clicks) == (6_000, 400)
    assert found.offsets == {"impressions/0": 6_000, "clicks/0": 400}
    assert found.products.to_pylist() == [{"product_id": "p1", "title": "A chair", "category": "chairs"}]
    assert found.creatives.num_rows == 3
    assert found.creatives.to_pylist()[0] == {
        "product_id": "p1",
        "creative_id": "p1-blue",
        "image_uri": "file:///p1-blue.png",
        "prompt": "a blue wall",
    }
    group = found.groups.to_pylist()[1]
    assert group.pop("group_feature") == [1.5] * (11 * 128)
    assert group == {
        "product_id": "p1",
        "group_id": 1,
        "group_share": 0.5,
        "groups_distinct": True,
        "encoder_version": 7,
    }
    assert found.cells.to_pylist()[0] == {
        "product_id": "p1",
        "group_id": 0,
        "creative_id": "p1-blue",
        "n_impressions": 1_000,
        "n_clicks": 120,
        "live_impressions": 1_000.0,
        "live_clicks": 120.0,
    }


def test_schemas(state_writer):
    writer = state_writer(d_feature=16)
    writer.conflict("p1")
    found = snapshot(writer).tables
    assert {name: table.schema for name, table in found.items()} == snapshot_schemas(16)


def test_an_empty_state_has_empty_tables(state_writer):
    found = snapshot(state_writer()).tables
    assert {name: table.schema for name, table in found.items()} == snapshot_schemas()
    assert not any(table.num_rows for table in found.values())


def test_snapshot_id_depends_on_the_offsets_alone(state_writer):
    writer = state_writer()
    writer.conflict("p1")
    writer.offset("clicks", 0, 9)
    first, again = snapshot(writer), snapshot(writer)
    writer.offset("clicks", 0, 10)
    assert first.snapshot_id == again.snapshot_id != snapshot(writer).snapshot_id
    assert first.tables == again.tables


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
