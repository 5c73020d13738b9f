"""Inspect: what a state holds, as figures and as tables, against a state written by hand."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from online.category_metrics import CategoryMetrics
from online.ctr import shrink
from online.metrics import MetricPoint, Metrics
from osmf.inspect import MOST_ROWS, run_inspect
from osmf.inspection import ProductMissingError
from state.errors import StateMissingError
from state.records import (
    Cell,
    ClusteringRecord,
    CreativeRecord,
    GroupRecord,
    OffsetRecord,
    ProductGroups,
    ProductRecord,
    ProfileTrait,
    cell_key,
    creative_key,
    encode_cell,
    encode_record,
    partition_key,
)
from state.store import ChangeSet, Store, Table

CELLS = {
    ("lamp", 1, "a"): (1_000, 50),
    ("lamp", 1, "b"): (900, 20),
    ("lamp", 2, "a"): (800, 10),
    ("lamp", 2, "b"): (1_200, 70),
    ("desk", 0, "a"): (5, 0),
}
GROUPS = [
    GroupRecord(1, 0.6, 300, b"", [ProfileTrait("gender", "female", 0.9, 1.8)], 0),
    GroupRecord(2, 0.4, 200, b"", [], 0),
]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    changes = ChangeSet()
    for number, product_id in enumerate(["desk", "lamp", "unseen"]):
        product = ProductRecord(number, product_id, f"A {product_id}", "home", None, 0, b"")
        changes.put(Table.PRODUCTS, product_id.encode(), encode_record(product))
    for number, (product_id, creative_id) in enumerate([("desk", "a"), ("lamp", "a"), ("lamp", "b"), ("lamp", "new")]):
        origin = "generated" if creative_id == "new" else "catalogue"
        creative = CreativeRecord(number, creative_id, product_id, None, None, None, origin, None, None, 0, 0, b"")
        changes.put(Table.CREATIVES, creative_key(product_id, creative_id), encode_record(creative))
    for name, (shown, clicked) in CELLS.items():
        cell = Cell(*name, shown, clicked, shown / 2, clicked / 2, 0)
        changes.put(Table.CELLS, cell_key(*name), encode_cell(cell))
    groups = ProductGroups("lamp", 3, GROUPS, 3, {2: 0.4}, 1e-4, True, 0, [], {})
    changes.put(Table.GROUPS, b"lamp", encode_record(groups))
    clustering = ClusteringRecord(3, 2, [1, 2], np.zeros((2, 2), np.float32).tobytes(), b"", 0, b"", b"", b"", 0)
    for product_id in (b"desk", b"lamp", b"sold out"):
        changes.put(Table.CLUSTERINGS, product_id, encode_record(clustering))
    changes.put(Table.RESIDENTS, b"lamp", (7).to_bytes(8, "big"))
    changes.put(Table.OFFSETS, partition_key("osmf.clicks", 1), encode_record(OffsetRecord(163, 160, 155, 5, 5, 9)))
    metrics = Metrics([MetricPoint(3_000, 9, 0.61, 0.66, 0.17)])
    changes.put(Table.META, b"metrics", msgspec.msgpack.encode(metrics))
    changes.put(Table.ENCODERS, b"v" + (3).to_bytes(8, "big"), b"weights")
    with Store(tmp_path / "state") as store:
        store.commit(changes)
    return tmp_path / "state"


def text(path: Path, product_id: str | None = None) -> str:
    console = Console(width=200, record=True, file=StringIO())
    for table in run_inspect(path, product_id=product_id)[1]:
        console.print(table)
    return console.export_text()


def test_figures_hold_every_cell_and_the_sums(state: Path) -> None:
    figures, _ = run_inspect(state)
    cells = {
        (c["product_id"], c["group_id"], c["creative_id"]): (c["impressions"], c["clicks"])
        for c in figures.detail["cells"]
    }
    assert cells == CELLS
    sums = {(c["product_id"], c["creative_id"]): (c["impressions"], c["clicks"]) for c in figures.detail["creatives"]}
    assert sums == {
        ("desk", "a"): (5, 0),
        ("lamp", "a"): (1_800, 60),
        ("lamp", "b"): (2_100, 90),
        ("lamp", "new"): (0, 0),
    }
    expected = {"products": 3, "creatives": 4, "groups": 2, "cells": 5, "impressions": 3_905, "clicks": 150}
    expected |= {"consumed": 160, "used": 155, "duplicates": 5, "dead_letters": 5, "encoder_version": 3, "auroc": 0.61}
    expected |= {"products_resident": 1, "products_parked": 2}
    assert {name: figures.metrics[name] for name in expected} == expected


def test_ctrs_are_shrunk_over_the_products_table(state: Path) -> None:
    figures, _ = run_inspect(state, product_id="lamp")
    # Rows: groups 1 and 2; columns: creatives a, b and the new one, which nobody has seen.
    shrunk = shrink([[1_000, 900, 0], [800, 1_200, 0]], [[50, 20, 0], [10, 70, 0]])
    cell = next(c for c in figures.detail["cells"] if (c["group_id"], c["creative_id"]) == (2, "b"))
    assert (cell["ctr"], cell["ctr_low"], cell["ctr_high"]) == pytest.approx(
        (shrunk.ctr[1, 1], shrunk.ctr_low[1, 1], shrunk.ctr_high[1, 1])
    )
    assert cell["live_impressions"] == 600


def test_the_overview_and_one_product_in_words(state: Path) -> None:
    overview = text(state)
    assert "AUROC 0.610 over 3,000 labelled impressions" in " ".join(overview.split())
    assert "1 products resident, 2 parked" in " ".join(overview.split())
    assert [line.split("│")[1].strip() for line in overview.splitlines() if " A " in line] == ["lamp", "desk", "unseen"]
    lamp = text(state, "lamp")
    assert "gender female (90%, ×1.8)" in lamp
    assert "no attribute sets it apart" in lamp
    assert "prefer different creatives (p = 0.0001)" in lamp
    assert "70/1,200" in lamp
    assert "A desk" not in lamp


def test_groups_say_how_far_their_centroids_have_moved(state: Path) -> None:
    feature = np.zeros((11, 2), np.float32)
    records = [msgspec.structs.replace(group, feature=feature.tobytes(), radius=2.0) for group in GROUPS]
    groups = ProductGroups("lamp", 3, records, 3, {2: 0.4, 3: 0.1}, None, False, 0, [], {})
    centroids = np.array([[3, 4], [0, 1], *[[9, 9]] * 3], np.float32)  # of K = 2, then of K = 3
    clustering = ClusteringRecord(3, 2, [1, 2], centroids.tobytes(), b"", 0, b"", b"", b"", 0)
    changes = ChangeSet()
    changes.put(Table.GROUPS, b"lamp", encode_record(groups))
    changes.put(Table.CLUSTERINGS, b"lamp", encode_record(clustering))
    before, _ = run_inspect(state)  # groups whose members were all alike
    with Store(state) as store:
        store.commit(changes)
    after, _ = run_inspect(state)
    found = [[group["centroid_displacement"] for group in each.detail["groups"]] for each in (before, after)]
    assert found == [[None, None], [2.5, 0.5]]


def test_borrowed_groups_say_from_whom(state: Path) -> None:
    groups = ProductGroups("desk", 3, GROUPS, 3, {2: 0.4}, None, False, 0, [], {}, "lamp")
    changes = ChangeSet()
    changes.put(Table.GROUPS, b"desk", encode_record(groups))
    with Store(state) as store:
        store.commit(changes)
    figures, _ = run_inspect(state)
    found = {(group["product_id"], group["borrowed_from"]) for group in figures.detail["groups"]}
    assert found == {("desk", "lamp"), ("lamp", None)}
    assert "those of lamp, until there are enough users" in " ".join(text(state, "desk").split())


def test_the_overview_stays_short(state: Path) -> None:
    changes = ChangeSet()
    for number in range(100):
        product = ProductRecord(3 + number, f"p{number}", "Many", None, None, 0, b"")
        changes.put(Table.PRODUCTS, product.product_id.encode(), encode_record(product))
    with Store(state) as store:
        store.commit(changes)
    _, tables = run_inspect(state)
    assert tables[1].row_count == MOST_ROWS
    assert f"and {103 - MOST_ROWS} more products" in text(state)


def test_predictions_are_told_by_category(state: Path) -> None:
    metrics, changes = CategoryMetrics(), ChangeSet()
    metrics.update_many("lamps", np.array([1, 0, 0, 0], np.float32), np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    metrics.update_many("", np.array([0, 0], np.float32), np.array([0.5, 0.5], np.float32))
    metrics.write(changes)
    with Store(state) as store:
        store.commit(changes)
    shown, (figures, _) = text(state), run_inspect(state)
    assert "clicks per expected" in shown
    assert re.search(r"lamps .* 4 .* 1\.000 .* 0\.3120 .* 1\.000", shown)
    assert re.search(r"\(none\) .* 2 .* 0\.500 .* 0\.6931 .* 0\.000", shown)
    assert [reading["category"] for reading in figures.detail["categories"]] == ["", "lamps"]


def test_what_is_not_there_is_named(state: Path, tmp_path: Path) -> None:
    with pytest.raises(ProductMissingError, match=r"no product 'sofa' in this state; it has desk, lamp, unseen"):
        run_inspect(state, product_id="sofa")
    with pytest.raises(StateMissingError):
        run_inspect(tmp_path / "nowhere")
