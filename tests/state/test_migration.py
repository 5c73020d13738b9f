"""Migration: a state of the layout before is carried over whole, any other is refused and left as it is."""

from __future__ import annotations

from pathlib import Path

import lmdb
import pytest
from typer.testing import CliRunner

from osmf.cli import app
from state.errors import StateLayoutError, StateLockedError, StateMissingError
from state.migration import NEW_TABLES, migrate_state
from state.records import Cell, cell_key, encode_cell, partition_key
from state.shards import shard_folder
from state.store import LAYOUT_VERSION, MIGRATES_FROM, Store, Table

CELL = Cell("p", 1, "c", 9, 2, 1.5, 0.5, 7)


def old_state(path: Path, layout: bytes = b"4") -> Path:
    """Write a state as a program of an older layout did: without the tables that came later."""
    new = {name for names in NEW_TABLES.values() for name in names}
    path.mkdir(parents=True)
    with lmdb.open(str(path), max_dbs=64) as environment, environment.begin(write=True) as txn:
        tables = {name: environment.open_db(name.encode(), txn=txn) for name in {t.value for t in Table} - new}
        txn.put(b"layout_version", layout, db=tables["meta"])
        txn.put(cell_key("p", 1, "c"), encode_cell(CELL), db=tables["cells"])
        # Six fields: what the record has beside them came later.
        txn.put(partition_key("t", 0), b"\x96\x05\x05\x05\x00\x00\x01", db=tables["offsets"])
    return path


def test_the_steps_lead_to_this_layout() -> None:
    assert list(NEW_TABLES) == list(range(MIGRATES_FROM, LAYOUT_VERSION))
    names = {table.value for table in Table}
    assert all(set(new) <= names for new in NEW_TABLES.values())


def test_a_state_of_the_layout_before_is_carried_over(tmp_path: Path) -> None:
    path = old_state(tmp_path / "state")
    with pytest.raises(StateLayoutError, match=r"`osmf state migrate` brings it to this program's layout"):
        Store(path)
    assert migrate_state(path) == {0: 4}
    with Store(path) as store, store.read() as txn:
        assert txn.get(Table.CELLS, cell_key("p", 1, "c")) == encode_cell(CELL)
        assert all(txn.count(Table(name)) == 0 for names in NEW_TABLES.values() for name in names)
        assert txn.get(Table.OFFSETS, partition_key("t", 0)) is not None
    assert migrate_state(path) == {0: LAYOUT_VERSION}


def test_every_shard_is_carried_over(tmp_path: Path) -> None:
    for number in (0, 3):
        old_state(shard_folder(tmp_path, number))
    assert migrate_state(tmp_path) == {0: 4, 3: 4}
    assert migrate_state(tmp_path) == {0: LAYOUT_VERSION, 3: LAYOUT_VERSION}


@pytest.mark.parametrize(
    ("layout", "advice"),
    [(b"3", "Older layouts are not continued"), (b"99", "A newer program wrote it"), (b"x", "No program version")],
)
def test_another_layout_is_refused_and_left_as_it_is(tmp_path: Path, layout: bytes, advice: str) -> None:
    path = old_state(tmp_path / "state", layout)
    before = (path / "data.mdb").read_bytes()
    with pytest.raises(StateLayoutError, match=advice):
        migrate_state(path)
    assert (path / "data.mdb").read_bytes() == before


def test_a_state_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with Store(tmp_path / "state"), pytest.raises(StateLockedError):
        migrate_state(tmp_path / "state")
    with pytest.raises(StateMissingError):
        migrate_state(tmp_path / "none")


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    path = old_state(tmp_path / "state")
    for said in (f"layout 4 is {LAYOUT_VERSION} now", f"has layout {LAYOUT_VERSION} already"):
        result = CliRunner().invoke(app, ["state", "migrate", "--state", str(path)])
        assert (result.exit_code, result.output) == (0, f"{path}: {said}\n")
