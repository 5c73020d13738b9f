"""A small state to take snapshots of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from state.records import (
    Cell,
    CreativeRecord,
    GroupRecord,
    OffsetRecord,
    ProductGroups,
    ProductRecord,
    cell_key,
    creative_key,
    encode_cell,
    encode_record,
    partition_key,
)
from state.store import ChangeSet, Store, Table


@dataclass
class StateWriter:
    """Writes records of products, creatives, groups and counts as the online process does."""

    path: Path
    d_feature: int = 128
    pictures: Path | None = None
    """Where creatives' pictures are drawn; without a folder their URIs lead nowhere."""
    changes: ChangeSet = field(default_factory=ChangeSet)
    n_records: int = 0

    def product(self, product_id: str, *, title: str = "A chair", category: str | None = "chairs") -> None:
        self.n_records += 1
        record = ProductRecord(self.n_records, product_id, title, category, None, 1_000, b"")
        self.changes.put(Table.PRODUCTS, product_id.encode(), encode_record(record))

    def creative(self, product_id: str, creative_id: str, *, prompt: str | None = None) -> None:
        self.n_records += 1
        image_uri = f"file:///{creative_id}.png"
        if self.pictures is not None:
            path = self.pictures / f"{creative_id}.png"
            Image.new("RGB", (32, 32), creative_id.rpartition("-")[2]).save(path)
            image_uri = path.as_uri()
        record = CreativeRecord(
            self.n_records,
            creative_id,
            product_id,
            image_uri,
            None,
            prompt,
            "catalogue",
            None,
            None,
            1_000,
            1_000,
            b"",
        )
        self.changes.put(Table.CREATIVES, creative_key(product_id, creative_id), encode_record(record))

    def feature(self, group_id: int) -> np.ndarray:
        return np.full((11, self.d_feature), group_id + 0.5, dtype="<f4")

    def groups(self, product_id: str, group_ids: list[int], *, features: dict[int, bytes] | None = None) -> None:
        groups = [
            GroupRecord(
                group_id,
                1 / len(group_ids),
                100,
                (features or {}).get(group_id, self.feature(group_id).tobytes()),
                [],
                1_000,
            )
            for group_id in group_ids
        ]
        record = ProductGroups(product_id, 7, groups, max(group_ids) + 1, {2: 0.4}, 0.01, True, 2_000, [], {})
        self.changes.put(Table.GROUPS, product_id.encode(), encode_record(record))

    def cell(
        self, product_id: str, group_id: int, creative_id: str, n: int, x: int, live: tuple[float, float] | None = None
    ) -> None:
        cell = Cell(product_id, group_id, creative_id, n, x, *(live or (float(n), float(x))), 3_000)
        self.changes.put(Table.CELLS, cell_key(product_id, group_id, creative_id), encode_cell(cell))

    def offset(self, topic: str, partition: int, next_offset: int) -> None:
        record = OffsetRecord(next_offset, next_offset, next_offset, 0, 0, 3_000)
        self.changes.put(Table.OFFSETS, partition_key(topic, partition), encode_record(record))

    def conflict(self, product_id: str, n: int = 1_000) -> None:
        """Write a product whose two groups prefer opposite creatives of three."""
        self.product(product_id)
        for name in ("red", "green", "blue"):
            self.creative(product_id, f"{product_id}-{name}", prompt=f"a {name} wall")
        self.groups(product_id, [0, 1])
        for group_id, clicks in ((0, (20, 60, 120)), (1, (120, 60, 20))):
            for name, per_thousand in zip(("red", "green", "blue"), clicks, strict=True):
                self.cell(product_id, group_id, f"{product_id}-{name}", n, per_thousand * n // 1_000)

    def commit(self) -> None:
        """Commit what was written since the last commit."""
        with Store(self.path, map_size_mib=32, sync=False) as store:
            store.commit(self.changes)
        self.changes = ChangeSet()


@pytest.fixture
def state_writer(tmp_path: Path) -> Callable[..., StateWriter]:
    """Return a maker of state writers, all on one state under the test's folder."""

    def make(**options: int) -> StateWriter:
        return StateWriter(tmp_path / "state", **options)

    return make
