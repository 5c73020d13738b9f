"""Backup, restore and state info on the command line: words for people, figures for machines, 1 for a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from osmf.cli import app
from osmf.replay import REPLAY_MARK
from state.records import Cell, OffsetRecord, cell_key, encode_cell, encode_record, partition_key
from state.shards import shard_folder
from state.store import LAYOUT_VERSION, ChangeSet, Store, Table


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSMF_STATE__PATH", str(tmp_path / "state"))
    write(tmp_path / "state", n_impressions=7)
    return tmp_path / "state"


def write(path: Path, n_impressions: int) -> None:
    changes = ChangeSet()
    offset = OffsetRecord(n_impressions, n_impressions, n_impressions, 0, 0, 1)
    changes.put(Table.OFFSETS, partition_key("osmf.impressions", 3), encode_record(offset))
    changes.put(Table.CELLS, cell_key("p", 0, "c"), encode_cell(Cell("p", 0, "c", n_impressions, 2, 1, 1, 1)))
    with Store(path, sync=False) as store:
        store.commit(changes)


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def figures(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(*arguments, "--json", "-"))
    return found


def test_a_backup_is_restored(state: Path, tmp_path: Path) -> None:
    backed = figures("backup", "backups/1")
    assert backed["command"] == "backup"
    assert backed["metrics"] == {
        "shards": 1,
        "products": 0,
        "creatives": 0,
        "cells": 1,
        "impressions": 7,
        "clicks": 2,
        "bytes": (tmp_path / "backups/1/data.mdb").stat().st_size,
    }
    (manifest,) = backed["detail"]["manifests"]
    assert manifest == json.loads((tmp_path / "backups/1/manifest.json").read_text())
    assert manifest["offsets"] == [{"topic": "osmf.impressions", "partition": 3, "next_offset": 7}]
    write(state, n_impressions=9)
    (state / REPLAY_MARK).touch()
    restored = figures("restore", "backups/1", "--force")
    assert restored["command"] == "restore"
    assert restored["detail"]["manifests"] == [manifest]
    former = restored["detail"]["former_state"]
    assert figures("state", "info")["detail"]["next_offsets"] == {"osmf.impressions[3]": 7}
    assert figures("state", "info", "--state", former)["detail"]["next_offsets"] == {"osmf.impressions[3]": 9}
    # What a backup brought back is not a replay's to remove.
    assert not (state / REPLAY_MARK).exists()


def test_a_shared_state_is_backed_up_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (0, 4):
        write(shard_folder(Path("shared"), number), n_impressions=5 + number)
    backed = figures("backup", "b", "--state", "shared")
    assert (backed["metrics"]["shards"], backed["metrics"]["impressions"]) == (2, 14)
    assert figures("restore", "b", "--state", "new")["metrics"] == backed["metrics"]
    assert figures("state", "info", "--state", "new")["metrics"]["shards"] == 2
    # All or nothing: a shard that is there, or a backup that is not whole, leaves everything as it was.
    shutil.rmtree(shard_folder(Path("new"), 0))
    assert "there is a state at new/partition-00004" in call("restore", "b", "--state", "new", code=1)
    assert not shard_folder(Path("new"), 0).exists()
    Path("b/shards.json").unlink()
    assert "it holds backups of shards, but no shards.json" in call("restore", "b", "--state", "newer", code=1)
    assert not Path("newer").exists()


def test_what_was_done_is_said(state: Path) -> None:
    said = call("backup", "b")
    assert "b: backup of " in said
    assert "7 impressions and 2 clicks in 1 cells" in said
    assert "Continues with osmf.impressions[3] at 7" in said
    shutil.rmtree(state)
    said = call("restore", "b")
    assert "restored from b, made at 20" in said
    assert "kept" not in said
    assert "The former state is kept in " in call("restore", "b", "--force")


def test_a_refusal_ends_with_1(state: Path) -> None:
    call("backup", "b")
    assert "osmf: there is a state at " in call("restore", "b", code=1)
    assert "osmf: no backup was written to b: it is no empty folder" in call("backup", "b", code=1)
    assert "osmf: no backup was written to " in call("backup", str(state / "b"), code=1)
    assert "osmf: no whole backup in c: there is no such folder" in call("restore", "c", code=1)
    assert "osmf: no state at none" in call("backup", "c", "--state", "none", code=1)
    assert "osmf: no state at none" in call("state", "info", "--state", "none", code=1)
    with Store(state):
        assert "is being written by process" in call("restore", "b", "--force", code=1)


def test_info_tells_the_files_of_a_state(state: Path) -> None:
    found = figures("state", "info")
    assert found["metrics"]["layout_version"] == LAYOUT_VERSION
    assert found["metrics"]["file_bytes"] == (state / "data.mdb").stat().st_size
    assert found["metrics"]["used_bytes"] <= found["metrics"]["map_bytes"]
    assert found["detail"]["tables"] == {table.value: 0 for table in Table} | {"meta": 1, "offsets": 1, "cells": 1}
    said = call("state", "info")
    assert f"layout {LAYOUT_VERSION}" in said
    assert "osmf.impressions[3]" in said


@pytest.mark.parametrize("command", [["online"], ["serve"], ["inspect"], ["verify"], ["state", "info"]])
def test_a_damaged_state_ends_every_command_in_words(state: Path, command: list[str]) -> None:
    data = state / "data.mdb"
    data.write_bytes(data.read_bytes()[:5_000])
    before = data.read_bytes()
    assert f"osmf: state at {state} is damaged: " in call(*command, code=1)
    assert data.read_bytes() == before
