"""Ownership of a shared state: the last process to open it commits, all others are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from state.errors import StateDamagedError, StateFencedError, StateLockedError
from state.ownership import OWNER_KEY, Owner, Process, next_owner, read_owner
from state.store import ChangeSet, Store, Table

ROOT = Path(__file__).parents[2]

FREEZES_IN_ITS_COMMIT = """
import os, signal, sys
from pathlib import Path
from state.store import ChangeSet, Store, Table

class Frozen(ChangeSet):
    def __iter__(self):
        for change in super().__iter__():
            yield change
            os.kill(os.getpid(), signal.SIGSTOP)

store = Store(Path(sys.argv[1]), shared=True)
changes = Frozen()
changes.put(Table.CELLS, b"half", b"done")
store.commit(changes)
"""


def put(key: bytes, value: bytes = b"1") -> ChangeSet:
    changes = ChangeSet()
    changes.put(Table.CELLS, key, value)
    return changes


def cells(path: Path) -> dict[bytes, bytes]:
    with Store(path, readonly=True) as store, store.read() as txn:
        return dict(txn.scan(Table.CELLS))


def in_other_process(path: Path, statement: str) -> None:
    """Run a statement in a fresh interpreter, with ``store`` open: LMDB wants an environment once a process."""
    script = f"from pathlib import Path\nfrom state.store import *\nstore = Store(Path({str(path)!r}), shared=True)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script + statement], check=True, env=environment, cwd=ROOT)


def test_a_commit_after_a_take_over_is_refused_whole(tmp_path: Path) -> None:
    with Store(tmp_path, shared=True) as zombie:
        zombie.commit(put(b"before"))
        in_other_process(tmp_path, "c = ChangeSet(); c.put(Table.CELLS, b'new', b'2'); store.commit(c)")
        with pytest.raises(StateFencedError, match=r"was taken over by process \d+ on .* \(epoch 2, ours was 1\)"):
            zombie.commit(put(b"after"))
        with pytest.raises(StateFencedError):
            zombie.commit(put(b"again"))
    assert cells(tmp_path) == {b"before": b"1", b"new": b"2"}


def test_the_same_process_may_take_its_own_state_over(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        with Store(tmp_path, shared=True) as store:
            store.commit(put(b"epoch", str(epoch).encode()))
            with store.read() as txn:
                owner = read_owner(txn.get(Table.META, OWNER_KEY))
            assert owner is not None
            assert (owner.epoch, owner.process.pid) == (epoch, os.getpid())
    assert cells(tmp_path) == {b"epoch": b"3"}


def test_a_map_that_the_new_owner_has_grown_refuses_the_old_one_all_the_same(tmp_path: Path) -> None:
    with Store(tmp_path, shared=True, map_size_mib=16) as zombie:
        in_other_process(tmp_path, "c = ChangeSet(); c.put(Table.CELLS, b'big', bytes(40 << 20)); store.commit(c)")
        with pytest.raises(StateFencedError):
            zombie.commit(put(b"after"))
    assert list(cells(tmp_path)) == [b"big"]


def test_a_shared_state_and_a_lone_writer_exclude_each_other(tmp_path: Path) -> None:
    with Store(tmp_path, shared=True), pytest.raises(StateLockedError, match=f"process {os.getpid()}"):
        Store(tmp_path)
    with Store(tmp_path) as alone:
        with pytest.raises(StateLockedError):
            Store(tmp_path, shared=True)
        alone.commit(put(b"alone"))
    assert cells(tmp_path) == {b"alone": b"1"}


def test_a_damaged_state_is_refused_at_a_take_over(tmp_path: Path) -> None:
    with Store(tmp_path, shared=True) as store:
        store.commit(put(b"cell", bytes(100_000)))
    size = (tmp_path / "data.mdb").stat().st_size
    with (tmp_path / "data.mdb").open("r+b") as file:
        file.truncate(size - 8_192)
    with pytest.raises(StateDamagedError):
        Store(tmp_path, shared=True)


@pytest.mark.skipif(sys.platform != "linux", reason="LMDB takes back the lock of a killed process on Linux")
def test_an_owner_that_is_frozen_within_its_commit_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    frozen = subprocess.Popen([sys.executable, "-c", FREEZES_IN_ITS_COMMIT, str(tmp_path)], env=environment, cwd=ROOT)
    try:
        while psutil.Process(frozen.pid).status() != psutil.STATUS_STOPPED:
            assert frozen.poll() is None
            time.sleep(0.01)
        with Store(tmp_path, shared=True) as store:
            store.commit(put(b"whole"))
        assert frozen.wait(5) == -signal.SIGKILL
    finally:
        frozen.kill()
    assert cells(tmp_path) == {b"whole": b"1"}


@pytest.mark.parametrize(
    ("former", "epoch"),
    [(None, 1), (Owner(4, Process("elsewhere", 1, 0.0)), 5), (Owner(9, Process("here", os.getpid(), 1.0)), 10)],
)
def test_every_owner_has_the_next_epoch(former: Owner | None, epoch: int) -> None:
    owner = next_owner(former)
    assert (owner.epoch, owner.process.pid) == (epoch, os.getpid())
    assert read_owner(msgspec.msgpack.encode(owner)) == owner
