"""Snapshots: the state at one commit as Arrow tables of what was counted, before anything is made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import pyarrow as pa

from state.reading import StateReader, StateView
from state.records import N_FEATURE_POINTS, Cell, CreativeRecord, ProductGroups, ProductRecord

D_FEATURE: Final = 128
"""Width of a group feature where no group says otherwise."""


class SnapshotError(RuntimeError):
    """The state cannot be turned into tables."""


class UnknownCreativeError(SnapshotError):
    """A cell counts a creative that is not registered."""

    def __init__(self, product_id: str, creative_id: str) -> None:
        super().__init__(
            f"the state counts creative {creative_id!r} of product {product_id!r}, which is not registered; "
            "every counted creative must be. No table was made: the state is damaged."
        )


class GroupFeatureError(SnapshotError):
    """A group's feature does not have the size of the others."""

    def __init__(self, product_id: str, group_id: int, n_bytes: int, allowed: str) -> None:
        super().__init__(
            f"the feature of group {group_id} of product {product_id!r} has {n_bytes} bytes; allowed is {allowed}. "
            "No table was made."
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the state held at one commit.

    ``offsets`` are the next offsets by ``topic/partition``; the same offsets give the same ``snapshot_id``.
    ``n_impressions`` and ``n_clicks`` are for life and over everything.
    """

    snapshot_id: str
    offsets: dict[str, int]
    products: pa.Table
    creatives: pa.Table
    groups: pa.Table
    cells: pa.Table
    n_impressions: int
    n_clicks: int

    @property
    def tables(self) -> dict[str, pa.Table]:
        """The tables by name."""
        return {"products": self.products, "creatives": self.creatives, "groups": self.groups, "cells": self.cells}

    @property
    def metadata(self) -> dict[str, str]:
        """What tables made of this snapshot say about it."""
        offsets = msgspec.json.encode(self.offsets, order="sorted").decode()
        return {"osmf.snapshot_id": self.snapshot_id, "osmf.offsets": offsets}


def snapshot_schemas(d_feature: int = D_FEATURE) -> dict[str, pa.Schema]:
    """Return the schemas of a snapshot's tables by name, for features of 11 x ``d_feature``."""
    product = pa.field("product_id", pa.string(), nullable=False)
    creative = pa.field("creative_id", pa.string(), nullable=False)
    group = pa.field("group_id", pa.int32(), nullable=False)
    return {
        "products": pa.schema([product, _field("title", pa.string()), pa.field("category", pa.string())]),
        "creatives": pa.schema(
            [product, creative, pa.field("image_uri", pa.string()), pa.field("prompt", pa.string())]
        ),
        "groups": pa.schema(
            [
                product,
                group,
                _field("group_share", pa.float64()),
                _field("groups_distinct", pa.bool_()),
                _field("encoder_version", pa.int64()),
                _field("group_feature", pa.list_(pa.float32(), N_FEATURE_POINTS * d_feature)),
            ]
        ),
        "cells": pa.schema(
            [
                product,
                group,
                creative,
                _field("n_impressions", pa.int64()),
                _field("n_clicks", pa.int64()),
                _field("live_impressions", pa.float64()),
                _field("live_clicks", pa.float64()),
            ]
        ),
    }


def take_snapshot(state: StateReader) -> Snapshot:
    """Read the state, each shard in one transaction.

    Raises
    ------
    SnapshotError
        If the state contradicts itself.
    """
    with state.view() as view:
        return snapshot_of(view)


def snapshot_of(view: StateView) -> Snapshot:
    """Return the tables of a state's view; see `take_snapshot`."""
    offsets = {f"{topic}/{partition}": record.next_offset for (topic, partition), record in view.offsets().items()}
    products, creatives, cells = view.products(), view.creatives(), view.cells()
    registered = {(creative.product_id, creative.creative_id) for creative in creatives}
    for cell in cells:
        if (cell.product_id, cell.creative_id) not in registered:
            raise UnknownCreativeError(cell.product_id, cell.creative_id)
    grouped = [found for product in products if (found := view.groups(product.product_id)) is not None]
    features = _features(grouped)
    width = features.shape[1]
    schemas = snapshot_schemas(width // N_FEATURE_POINTS)
    group_columns: Mapping[str, list[object]] = {
        "product_id": [of.product_id for of in grouped for _ in of.groups],
        "group_id": [group.group_id for of in grouped for group in of.groups],
        "group_share": [group.share for of in grouped for group in of.groups],
        "groups_distinct": [of.distinct for of in grouped for _ in of.groups],
        "encoder_version": [of.encoder_version for of in grouped for _ in of.groups],
    }
    schema = schemas["groups"]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel(), pa.float32()), width)
    groups = pa.table(
        [pa.array(values, schema.field(name).type) for name, values in group_columns.items()] + [flat], schema=schema
    )
    return Snapshot(
        snapshot_id="snapshot-" + hashlib.sha256(msgspec.json.encode(offsets, order="sorted")).hexdigest()[:16],
        offsets=offsets,
        products=_table(products, schemas["products"]),
        creatives=_table(creatives, schemas["creatives"]),
        groups=groups,
        cells=_table(cells, schemas["cells"]),
        n_impressions=sum(cell.n_impressions for cell in cells),
        n_clicks=sum(cell.n_clicks for cell in cells),
    )


def _features(grouped: list[ProductGroups]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return the features of all groups, (n_groups, 11 * D)."""
    size = N_FEATURE_POINTS * 4
    found: list[np.ndarray[tuple[int], np.dtype[np.float32]]] = []
    for of in grouped:
        for group in of.groups:
            n_bytes = len(group.feature)
            if n_bytes == 0 or n_bytes % size:
                allowed = f"a multiple of {size}, {N_FEATURE_POINTS} points"
                raise GroupFeatureError(of.product_id, group.group_id, n_bytes, allowed)
            if found and n_bytes != found[0].nbytes:
                raise GroupFeatureError(of.product_id, group.group_id, n_bytes, f"{found[0].nbytes} as for the others")
            found.append(np.frombuffer(group.feature, dtype="<f4"))
    return np.stack(found) if found else np.empty((0, N_FEATURE_POINTS * D_FEATURE), np.float32)


def _table(records: list[ProductRecord] | list[CreativeRecord] | list[Cell], schema: pa.Schema) -> pa.Table:
    """Return records as a table: columns are named as the records' fields."""
    wanted = schema.names
    rows = [msgspec.structs.asdict(record) for record in records]
    return pa.table(
        {name: pa.array([row[name] for row in rows], schema.field(name).type) for name in wanted}, schema=schema
    )


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)
