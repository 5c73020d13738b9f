"""Datasets: GAIP rows and pairs, made from the Parquet tables of a snapshot by the engine of the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from offline.engine import Engine, open_engine
from offline.pairs import make_pairs, pairs_schema
from offline.rows import gaip_rows, gaip_schema
from offline.settings import OfflineSettings
from offline.snapshot import Snapshot
from state.records import N_FEATURE_POINTS

ROWS_FILE: Final = "rows.parquet"
PAIRS_FILE: Final = "pairs.parquet"


@dataclass(frozen=True, slots=True)
class Dataset:
    """GAIP rows (`offline.rows.gaip_schema`) and pairs (`offline.pairs.pairs_schema`) of one snapshot."""

    rows: pa.Table
    pairs: pa.Table

    @property
    def n_products(self) -> int:
        """Number of products with rows."""
        return len(self.rows["product_id"].unique())

    @classmethod
    def read(cls, folder: Path) -> Dataset:
        """Read the dataset that `make_dataset` left in a folder."""
        return cls(pq.read_table(folder / ROWS_FILE), pq.read_table(folder / PAIRS_FILE))


def make_dataset(snapshot: Snapshot, folder: Path, settings: OfflineSettings) -> Dataset:
    """Write a snapshot into a folder as Parquet, its dataset beside it, and return the dataset.

    Files are ``products``, ``creatives``, ``groups`` and ``cells`` as they were counted, ``rows`` and ``pairs``.

    Raises
    ------
    offline.engine.EngineMissingError
        If the engine is not installed.
    """
    for name, table in snapshot.tables.items():
        _write(table, folder / f"{name}.parquet")
    with open_engine(settings) as engine:
        rows = _rows(engine, snapshot, folder, settings)
        _write(rows, folder / ROWS_FILE)
        pairs = make_pairs(
            engine.read(folder / ROWS_FILE),
            floor=settings.min_pair_probability,
            held_out_share=settings.held_out_share,
            held_out_by=settings.held_out_by,
        )
        found = engine.fetch(pairs, pairs_schema().with_metadata(snapshot.metadata))
    _write(found, folder / PAIRS_FILE)
    return Dataset(rows, found)


def _rows(engine: Engine, snapshot: Snapshot, folder: Path, settings: OfflineSettings) -> pa.Table:
    products, creatives, groups, cells = (
        engine.read(folder / f"{name}.parquet") for name in ("products", "creatives", "groups", "cells")
    )
    rows = gaip_rows(products, creatives, groups, cells, settings).mutate(
        snapshot_id=ibis.literal(snapshot.snapshot_id)
    )
    width: int = snapshot.groups.schema.field("group_feature").type.list_size
    return engine.fetch(rows, gaip_schema(width // N_FEATURE_POINTS).with_metadata(snapshot.metadata))


def _write(table: pa.Table, path: Path) -> None:
    # Rows of a group lie side by side, so that zstd stores its feature about once.
    pq.write_table(table, path, compression="zstd", use_dictionary=True)
