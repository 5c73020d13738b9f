"""What the machine refuses the store: disk, memory, permission. Each ends in words, and costs no earlier commit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from state.errors import StatePermissionError
from state.store import Store, Table

ROOT = Path(__file__).parents[2]

# Commits until the store refuses, says why, and shows that what was committed is there and can be added to.
COMMITS = """
import os, resource, sys
from pathlib import Path
from state.errors import StateError
from state.store import ChangeSet, Store, Table

path, limit = Path(sys.argv[1]), sys.argv[2]

def change(k):
    changes = ChangeSet()
    changes.put(Table.OFFSETS, b"next", b"%d" % k)
    for n in range(40):
        changes.put(Table.REPLAY, b"%d-%d" % (k, n), bytes(9_000))
    return changes

def entries(store):
    with store.read() as txn:
        return int(txn.get(Table.OFFSETS, b"next")), txn.count(Table.REPLAY)

with Store(path, map_size_mib=16) as store:
    store.commit(change(1))
    if limit == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_001, resource.RLIM_INFINITY))
    if limit == "address space":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
    k = 1
    try:
        while True:
            store.commit(change(k + 1))
            k += 1
    except StateError as error:
        print(type(error).__name__, error)
    if limit != "address space":
        assert entries(store) == (k, 40 * k), (entries(store), k)
        if limit == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        else:
            os.remove(path.parent / "ballast")
        store.commit(change(k + 1))
        k += 1
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with Store(path) as store:
    assert entries(store) == (k, 40 * k), (entries(store), k)
print("commits", k)
"""

# Opens a state on a disk that is full already.
OPEN = """
import sys
from pathlib import Path
from state.errors import StateError
from state.store import Store

try:
    Store(Path(sys.argv[1]), readonly=sys.argv[2] == "reader").close()
    print("opened")
except StateError as error:
    print(type(error).__name__, error)
"""

# Copies a state to a disk that has no room for it.
BACKUP = """
import sys
from pathlib import Path
from state.errors import StateError
from state.backup import write_backup

try:
    write_backup(Path(sys.argv[1]), Path(sys.argv[2]), now_ms=1, osmf_version="1")
except StateError as error:
    print(type(error).__name__, error)
print(sorted(path.name for path in Path(sys.argv[2]).iterdir()))
"""


def run(*command: object) -> str:
    """Run a command to its end; return what it prints. A signal, such as SIGBUS, fails the test."""
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_small_disk(folder: Path, size: str, shell: str, script: str, *arguments: object) -> str:
    """Run a script with a small tmpfs at ``folder``, in a mount namespace of its own; ``shell`` comes before it."""
    folder.mkdir()
    quoted = f'mount -t tmpfs -o size={size} tmpfs "{folder}" && {shell} && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*inside, f'mount -t tmpfs tmpfs "{folder}"'], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this system lets nobody mount a small disk in a namespace: {error}")
    return run(*inside, quoted, "sh", sys.executable, "-c", script, *arguments)


def test_a_full_disk_stops_a_commit_before_any_offset_moves(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    said = in_small_disk(disk, "4m", f'head -c 800K /dev/zero > "{disk}/ballast"', COMMITS, disk / "state", "disk")
    assert "StateDiskError state at " in said
    assert "(mdb_txn_commit: " in said
    assert " MiB are free on its disk): what was to be written was dropped whole, offsets included" in said
    assert "Make room on that disk" in said
    assert int(said.split()[-1]) > 3


def test_a_limit_on_file_sizes_stops_a_commit_before_any_offset_moves(tmp_path: Path) -> None:
    said = run(sys.executable, "-c", COMMITS, tmp_path / "state", "file size")
    assert "StateDiskError state at " in said
    assert "lift the limit on file sizes, and start again: it continues from the last commit" in said
    assert int(said.split()[-1]) > 3


def test_a_map_that_cannot_grow_ends_in_words(tmp_path: Path) -> None:
    said = run(sys.executable, "-c", COMMITS, tmp_path / "state", "address space")
    assert "StateMapError state at " in said
    assert (
        "needs a memory map of 32 MiB, which the system refused (mdb_env_set_mapsize: Cannot allocate memory)" in said
    )
    assert int(said.split()[-1]) > 20


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_a_state_on_a_full_disk_is_opened_or_refused_in_words(tmp_path: Path, who: str) -> None:
    with Store(tmp_path / "made", sync=False):
        pass
    disk = tmp_path / "disk"
    full = f'head -c 2M /dev/zero > "{disk}/ballast" 2> /dev/null || true'
    # LMDB's lock file is new there: written through a map, it would be a SIGBUS.
    copied = f'mkdir "{disk}/state" && cp "{tmp_path}/made/data.mdb" "{disk}/state" && {{ {full}; }}'
    said = in_small_disk(disk, "1m", copied, OPEN, disk / "state", who)
    assert said.startswith("StateDiskError state at ")
    assert "No space left on device" in said
    assert " 0.0 MiB are free on its disk" in said


def test_no_state_is_begun_on_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    full = f'{{ head -c 2M /dev/zero > "{disk}/ballast" 2> /dev/null || true; }}'
    said = in_small_disk(disk, "1m", full, OPEN, disk / "state", "writer")
    assert said.startswith("StateDiskError state at ")


def test_a_backup_to_a_full_disk_is_none(tmp_path: Path) -> None:
    run(sys.executable, "-c", COMMITS, tmp_path / "state", "file size")
    disk = tmp_path / "disk"
    said = in_small_disk(disk, "1m", "true", BACKUP, tmp_path / "state", disk / "backup")
    assert said.startswith(f"BackupTargetError no backup was written to {disk}/backup: ")
    assert "MiB are free on its disk. Name a folder" in said
    assert said.splitlines()[-1] == "[]"


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that everybody may enter, and a user without rights: root, who may do anything, becomes another."""
    folder = Path(tempfile.mkdtemp(prefix="osmf-"))
    folder.chmod(0o755)
    yield folder
    if os.geteuid() != os.getuid():
        os.seteuid(os.getuid())
    for each in folder.rglob("*"):
        each.chmod(0o755)
    shutil.rmtree(folder)


def become_nobody() -> None:
    if os.getuid() == 0:
        os.seteuid(65_534)


@pytest.mark.parametrize(
    ("closed", "mode", "readonly"),
    [
        (".", 0o555, False),
        ("state", 0o000, False),
        ("state", 0o000, True),
        ("state/data.mdb", 0o000, True),
        ("state/data.mdb", 0o444, False),
        ("state/lock.mdb", 0o444, True),
        ("state/writer.lock", 0o444, False),
    ],
)
def test_what_this_user_may_not_do_is_said(as_nobody: Path, closed: str, mode: int, readonly: bool) -> None:
    path = as_nobody / "state"
    if closed != ".":
        with Store(path, sync=False):
            pass
        for each in (path, *path.iterdir()):
            each.chmod(0o777)
    (as_nobody / closed).chmod(mode)
    become_nobody()
    with pytest.raises(StatePermissionError, match=r"cannot be opened \(.*ermission denied.*\): nothing was changed"):
        Store(path, readonly=readonly)


def test_a_reader_finds_everything_after_the_disk_was_full(tmp_path: Path) -> None:
    run(sys.executable, "-c", COMMITS, tmp_path / "state", "file size")
    with Store(tmp_path / "state", readonly=True) as store, store.read() as txn:
        n_commits = int(txn.get(Table.OFFSETS, b"next") or 0)
        assert txn.count(Table.REPLAY) == 40 * n_commits
