"""Surroundings: how often a product is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from generator.occasion import Occasion
from generator.settings import GeneratorSettings
from generator.surroundings import look_around
from state.reading import StateReader
from state.records import Cell, CreativeRecord, ProductRecord, cell_key, creative_key, encode_cell, encode_record
from state.store import ChangeSet, Store, Table

DAY_MS = 86_400_000
START_MS = 20_000 * DAY_MS


@pytest.mark.parametrize(
    ("created_at_ms", "registered_at_ms"),
    [
        (START_MS, START_MS),
        (START_MS - 900 * DAY_MS, START_MS),  # an old creative in a young stream
        (START_MS, 0),  # as states of before have it, where it came before the first impression
    ],
)
def test_a_product_is_shown_as_often_as_since_its_creatives_are_known(
    tmp_path: Path, created_at_ms: int, registered_at_ms: int
) -> None:
    changes = ChangeSet()
    product = ProductRecord(0, "p", "A lamp", None, None, START_MS, b"")
    changes.put(Table.PRODUCTS, b"p", encode_record(product))
    record = CreativeRecord(
        *(0, "c", "p", None, None, None, "catalogue", None, None), created_at_ms, registered_at_ms, b""
    )
    changes.put(Table.CREATIVES, creative_key("p", "c"), encode_record(record))
    cell = Cell("p", 1, "c", 600, 30, 600.0, 30.0, START_MS + 2 * DAY_MS)
    changes.put(Table.CELLS, cell_key("p", 1, "c"), encode_cell(cell))
    with Store(tmp_path, map_size_mib=16) as store:
        store.commit(changes)
    with StateReader(tmp_path) as state, state.view() as view:
        around = look_around(Occasion("o", "p", START_MS, "shift", []), view, [], GeneratorSettings())
    assert around.impressions_per_day == pytest.approx(300.0)
