"""Backups: one commit, whole or refused; a restore keeps what it replaces."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from state.backup import (
    BackupDamagedError,
    BackupMissingError,
    BackupTargetError,
    StateThereError,
    read_manifest,
    restore_backup,
    write_backup,
)
from state.errors import StateDamagedError, StateLayoutError, StateLockedError, StateMissingError
from state.store import LAYOUT_VERSION, ChangeSet, Store, Table

ROOT = Path(__file__).parents[2]
NOW_MS = 1_750_000_000_000

# Commit k: the offset is 10k, each of ten cells has k impressions, and much else is written that takes time to copy.
WRITER = """
import random, sys
from pathlib import Path
from state.records import (
    Cell, CreativeRecord, OffsetRecord, cell_key, creative_key, encode_cell, encode_record, partition_key
)
from state.store import ChangeSet, Store, Table

def change(k, rng):
    changes = ChangeSet()
    for n in range(10):
        creative = CreativeRecord(n, f"c{n}", "p", None, None, None, "catalogue", None, None, 0, 0, b"")
        changes.put(Table.CREATIVES, creative_key("p", f"c{n}"), encode_record(creative))
        changes.put(Table.CELLS, cell_key("p", 0, f"c{n}"), encode_cell(Cell("p", 0, f"c{n}", k, 0, k, 0, k)))
    offset = OffsetRecord(10 * k, 10 * k, 10 * k, 0, 0, k)
    changes.put(Table.OFFSETS, partition_key("osmf.impressions", 0), encode_record(offset))
    for _ in range(20):
        changes.put(Table.REPLAY, b"%d" % rng.randrange(600), rng.randbytes(30_000))
    return changes

if __name__ == "__main__":
    rng = random.Random(1)
    with Store(Path(sys.argv[1]), map_size_mib=16, sync=False) as store:
        k = 0
        while len(sys.argv) < 3 or k < int(sys.argv[2]):
            k += 1
            store.commit(change(k, rng))
            print(k, flush=True)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "state"
    with start(WRITER, path, 30) as writer:
        writer.communicate()
        assert writer.returncode == 0
    return path


@pytest.fixture
def state(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def backup(state: Path, tmp_path: Path) -> Path:
    write_backup(state, tmp_path / "backup", now_ms=NOW_MS, osmf_version="1.2")
    return tmp_path / "backup"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that goes on committing to ``tmp_path / "live"``."""
    with start(WRITER, tmp_path / "live") as process:
        assert process.stdout is not None
        for _ in range(40):
            assert process.stdout.readline()
        yield process
        process.kill()
        process.communicate()


def content(path: Path) -> dict[tuple[Table, bytes], bytes]:
    with Store(path, readonly=True) as store, store.read() as txn:
        return {(table, key): value for table in Table for key, value in txn.scan(table)}


def change_state(path: Path) -> None:
    with Store(path, sync=False) as store:
        changes = ChangeSet()
        changes.put(Table.META, b"later", b"yes")
        store.commit(changes)


def test_a_backup_is_one_commit_of_a_state_that_is_being_written(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    from osmf.verify import verify_state
    from streams.settings import StreamSettings

    commits = []
    for number in range(4):
        folder = tmp_path / f"backup{number}"
        manifest = write_backup(tmp_path / "live", folder, now_ms=NOW_MS, osmf_version="1.2")
        (offset,) = manifest.offsets
        assert manifest.n_impressions == offset.next_offset
        assert manifest.n_cells == manifest.n_creatives == 10
        found = verify_state(folder, StreamSettings())
        assert (found.broken, found.totals.n_impressions) == ([], offset.next_offset)
        commits.append(offset.next_offset)
    assert writer.poll() is None
    assert commits == sorted(set(commits))  # it did go on meanwhile
    assert commits[0] >= 400


def test_a_restored_state_is_the_one_that_was_backed_up(state: Path, backup: Path, tmp_path: Path) -> None:
    before = content(state)
    manifest, aside = restore_backup(backup, tmp_path / "new" / "state", now_ms=NOW_MS, force=False)
    assert aside is None
    assert content(tmp_path / "new" / "state") == before
    assert (manifest.created_at_ms, manifest.osmf_version, manifest.layout_version) == (NOW_MS, "1.2", LAYOUT_VERSION)
    change_state(tmp_path / "new" / "state")  # it can be written on
    assert {path.name for path in backup.iterdir()} == {"data.mdb", "manifest.json"}


def test_a_state_that_is_there_is_kept(state: Path, backup: Path) -> None:
    before = content(state)
    change_state(state)
    changed = content(state)
    with pytest.raises(StateThereError, match=r"nothing was restored\. `--force`"):
        restore_backup(backup, state, now_ms=NOW_MS, force=False)
    assert content(state) == changed
    _, aside = restore_backup(backup, state, now_ms=NOW_MS, force=True)
    assert aside == state / "before-restore-20250615T150640.000000Z"
    assert content(state) == before
    assert content(aside) == changed
    assert not (state / "data.mdb.next").exists()


def test_a_damaged_state_is_replaced_and_kept_as_it_is(state: Path, backup: Path) -> None:
    before = content(state)
    os.truncate(state / "data.mdb", 100_000)
    damaged = (state / "data.mdb").read_bytes()
    with pytest.raises(StateDamagedError):
        Store(state)
    _, aside = restore_backup(backup, state, now_ms=NOW_MS, force=True)
    assert content(state) == before
    assert aside is not None
    assert (aside / "data.mdb").read_bytes() == damaged


def test_readers_of_the_former_state_do_not_disturb_the_new_one(state: Path, backup: Path) -> None:
    change_state(state)
    with Store(state, readonly=True) as reader, reader.read() as old:
        restore_backup(backup, state, now_ms=NOW_MS, force=True)
        assert old.get(Table.META, b"later") == b"yes"
        with start(WRITER, state, 5) as process:
            process.communicate()
        assert process.returncode == 0
        assert old.get(Table.META, b"later") == b"yes"
    assert (Table.META, b"later") not in content(state)


def test_a_state_that_is_being_written_is_not_replaced(
    tmp_path: Path, backup: Path, writer: subprocess.Popen[str]
) -> None:
    with pytest.raises(StateLockedError, match=rf"written by process {writer.pid}\b"):
        restore_backup(backup, tmp_path / "live", now_ms=NOW_MS, force=True)
    assert writer.poll() is None
    assert not list((tmp_path / "live").glob("before-*"))


@pytest.mark.parametrize("at", [0, 40, 5_000, -1])
def test_one_flipped_byte_is_found(state: Path, backup: Path, at: int) -> None:
    data = bytearray((backup / "data.mdb").read_bytes())
    data[at] ^= 1
    (backup / "data.mdb").write_bytes(data)
    before = content(state)
    with pytest.raises(BackupDamagedError, match=r"SHA-256.*Nothing was restored"):
        restore_backup(backup, state, now_ms=NOW_MS, force=True)
    assert content(state) == before
    assert not (state / "data.mdb.next").exists()


@pytest.mark.parametrize(
    ("harm", "error", "reason"),
    [
        ("short", BackupDamagedError, "the manifest says"),
        ("no data", BackupDamagedError, "data.mdb is missing"),
        ("no manifest", BackupMissingError, "it has no manifest.json"),
        ("no folder", BackupMissingError, "no such folder"),
        ("half a manifest", BackupDamagedError, "cannot be read"),
        ("a field more", BackupDamagedError, "cannot be read"),
        ("another format", BackupDamagedError, "format 2, this program reads 1"),
        ("newer layout", StateLayoutError, "A newer program wrote it: install that one"),
        ("older layout", StateLayoutError, "Older layouts are not continued"),
        ("layout of nobody", StateLayoutError, "No program version writes that one"),
    ],
)
def test_what_is_no_whole_backup_is_refused(
    state: Path, backup: Path, harm: str, error: type[Exception], reason: str
) -> None:
    manifest = backup / "manifest.json"
    raw = msgspec.json.decode(manifest.read_bytes())
    match harm:
        case "short":
            os.truncate(backup / "data.mdb", raw["n_bytes"] - 1)
        case "no data":
            (backup / "data.mdb").unlink()
        case "no manifest":
            manifest.unlink()
        case "no folder":
            backup = backup / "other"
        case "half a manifest":
            os.truncate(manifest, manifest.stat().st_size // 2)
        case "a field more":
            manifest.write_bytes(msgspec.json.encode(raw | {"more": 1}))
        case "another format":
            manifest.write_bytes(msgspec.json.encode({"format_version": 2}))
        case _:
            layout = {"newer layout": LAYOUT_VERSION + 1, "older layout": LAYOUT_VERSION - 1}.get(harm, 0)
            manifest.write_bytes(msgspec.json.encode(raw | {"layout_version": layout}))
    before = content(state)
    with pytest.raises(error, match=re.escape(reason)):
        restore_backup(backup, state, now_ms=NOW_MS, force=True)
    assert content(state) == before


KILLED = """
import os, sys
from pathlib import Path
import state.backup as module
from state.store import Store

def kill(*_):
    os.kill(os.getpid(), 9)

match sys.argv[3]:
    case "in the copy":
        copy_to = Store.copy_to
        def half(store, target):
            copy_to(store, target)
            os.truncate(target, target.stat().st_size // 2)
            kill()
        Store.copy_to = half
    case "after the copy":
        module._describe = kill
    case "before the manifest":
        module._write_json = kill
    case "before the manifest has its name":
        Path.rename = kill
module.write_backup(Path(sys.argv[1]), Path(sys.argv[2]), now_ms=1, osmf_version="1")
"""


@pytest.mark.parametrize(
    "moment", ["in the copy", "after the copy", "before the manifest", "before the manifest has its name"]
)
def test_a_backup_that_was_killed_is_none(state: Path, tmp_path: Path, moment: str) -> None:
    half = tmp_path / "half"
    with start(KILLED, state, half, moment) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (half / "data.mdb").stat().st_size
    with pytest.raises(BackupMissingError, match=r"no manifest\.json.*interrupted can be removed"):
        restore_backup(half, tmp_path / "new", now_ms=NOW_MS, force=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(BackupTargetError, match="no empty folder"):
        write_backup(state, half, now_ms=NOW_MS, osmf_version="1.2")


RESTORE_KILLED = """
import os, sys
from pathlib import Path
import state.backup, state.files

def kill(*_, **__):
    os.kill(os.getpid(), 9)

match sys.argv[3]:
    case "after the copy":
        state.backup.replace_data = kill
    case "with the old one aside":
        state.files.os.replace = kill
    case "with the new one in place":
        Path.unlink = kill
state.backup.restore_backup(Path(sys.argv[1]), Path(sys.argv[2]), now_ms=1, force=True)
"""


@pytest.mark.parametrize(
    ("moment", "restored"),
    [("after the copy", False), ("with the old one aside", False), ("with the new one in place", True)],
)
def test_a_restore_that_was_killed_leaves_one_state_or_the_other(
    state: Path, backup: Path, moment: str, restored: bool
) -> None:
    at_backup = content(state)
    change_state(state)
    later = content(state)
    with start(RESTORE_KILLED, backup, state, moment) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert content(state) == (at_backup if restored else later)
    restore_backup(backup, state, now_ms=NOW_MS, force=True)
    assert content(state) == at_backup
    change_state(state)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("state", "lies in the state"),
        ("state/backups/1", "lies in the state"),
        ("link/backup", "lies in the state"),
        ("full", "no empty folder"),
        ("full/file", "no empty folder"),
    ],
)
def test_a_backup_goes_nowhere_else(state: Path, tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(state)
    before = sorted(state.rglob("*"))
    with pytest.raises(BackupTargetError, match=reason):
        write_backup(state, tmp_path / target, now_ms=NOW_MS, osmf_version="1.2")
    assert sorted(state.rglob("*")) == before
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_an_empty_folder_is_a_target_and_a_missing_state_no_source(state: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_backup(state, tmp_path / "empty", now_ms=NOW_MS, osmf_version="1.2")
    assert read_manifest(tmp_path / "empty").n_impressions == 300
    with pytest.raises(StateMissingError):
        write_backup(tmp_path / "none", tmp_path / "other", now_ms=NOW_MS, osmf_version="1.2")
    assert not (tmp_path / "other").exists()


def test_a_backup_that_fails_leaves_an_empty_folder(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("state.backup._describe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_backup(state, tmp_path / "backup", now_ms=NOW_MS, osmf_version="1.2")
    assert list((tmp_path / "backup").iterdir()) == []
