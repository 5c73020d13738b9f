"""Pages: every data file that LMDB writes is whole, and one that it would trip over is not."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import lmdb
import pytest

from state.errors import StateDamagedError
from state.pages import PageError, check_pages
from state.store import ChangeSet, Store, Table

PAGE = 4096


def fill(path: Path, n_commits: int = 40) -> None:
    """Write, overwrite and remove small and big values, and check the file after each commit."""
    rng = random.Random(4)
    with Store(path, map_size_mib=64, sync=False) as store:
        for _ in range(n_commits):
            changes = ChangeSet()
            for _ in range(100):
                key = b"%04d" % rng.randrange(3_000)
                changes.put(Table.IMPRESSIONS, key, rng.randbytes(rng.choice([10, 200])))
                changes.delete(Table.TIMERS, key)
                changes.put(Table.TIMERS, b"%04d" % rng.randrange(3_000), b"")
            for _ in range(3):
                changes.put(Table.REPLAY, b"%d" % rng.randrange(9), rng.randbytes(rng.randrange(60_000)))
                changes.delete(Table.REPLAY, b"%d" % rng.randrange(9))
            store.commit(changes)
            check_pages(path / "data.mdb", every=True)
            check_pages(path / "data.mdb", every=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "state"
    fill(path)
    return path


@pytest.fixture
def state(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "state")
    return tmp_path / "state"


def test_what_lmdb_writes_is_whole(tmp_path: Path) -> None:
    fill(tmp_path / "state")


def test_a_file_may_end_before_a_last_page_that_is_free(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    with lmdb.open(str(path), subdir=False, map_size=64 << 20, sync=False) as environment:
        n_short = 0
        for number in range(60):
            with environment.begin(write=True) as txn:
                txn.put(b"kept%d" % number, bytes(9_000))
                for other in range(20):
                    txn.put(b"%d" % other, bytes(50_000))
                for other in range(20):
                    txn.delete(b"%d" % other)
            n_short += path.stat().st_size < (environment.info()["last_pgno"] + 1) * PAGE
            check_pages(path, every=False)
    assert n_short  # otherwise this shows nothing


def referred_page(data: bytes, flags: int, folder: Path) -> int:
    """Return a page of a kind that the last commit refers to: one whose loss is seen."""
    for number in range(len(data) // PAGE - 1, 1, -1):
        own_number, _, found = struct.unpack_from("=QHH", data, number * PAGE)
        if (own_number, found) != (number, flags):
            continue
        (folder / "try.mdb").write_bytes(data[: number * PAGE] + bytes(PAGE) + data[(number + 1) * PAGE :])
        try:
            check_pages(folder / "try.mdb", every=True)
        except PageError:
            return number
    raise AssertionError(f"no page of kind {flags}")


BRANCH, LEAF, OVERFLOW = 1, 2, 4


@pytest.mark.parametrize("kind", [BRANCH, LEAF, OVERFLOW], ids=["branch", "leaf", "overflow"])
@pytest.mark.parametrize("harm", ["zeroes", "another page", "random", "pointers"])
def test_a_corrupt_page_is_refused_at_open(state: Path, tmp_path: Path, kind: int, harm: str) -> None:
    data = bytearray((state / "data.mdb").read_bytes())
    at = referred_page(bytes(data), kind, tmp_path) * PAGE
    if harm == "zeroes":
        data[at : at + PAGE] = bytes(PAGE)
    elif harm == "another page":
        data[at : at + PAGE] = data[PAGE : 2 * PAGE]
    elif harm == "random":
        data[at : at + PAGE] = random.Random(1).randbytes(PAGE)
    else:
        data[at + 12 : at + 14] = b"\x01\x00"
    (state / "data.mdb").write_bytes(data)
    before = (state / "data.mdb").read_bytes()
    with pytest.raises(StateDamagedError, match=r"page \d+ .*data\.mdb.*osmf restore DIR --force"):
        Store(state)
    assert (state / "data.mdb").read_bytes() == before


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused_at_open(state: Path, share: float, readonly: bool) -> None:
    n_bytes = (state / "data.mdb").stat().st_size
    os.truncate(state / "data.mdb", int(share * n_bytes))
    with pytest.raises(StateDamagedError, match=r"data\.mdb"):
        Store(state, readonly=readonly)
    assert (state / "data.mdb").stat().st_size == int(share * n_bytes)  # not begun anew


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    ("at", "harm", "reason"),
    [
        (0, bytes(PAGE), "no LMDB meta page at byte 0"),
        (PAGE, bytes(PAGE), "no LMDB meta page at byte 4096"),
        (16, b"\x00", "no LMDB meta page"),
        (20, b"\x02", "format 2, known is 1"),
        (40, b"\x03", "pages of 4099 bytes"),
        (0, b"a text file\n" * 1_000, "no LMDB meta page"),
    ],
)
def test_first_pages_that_are_none_are_refused(state: Path, at: int, harm: bytes, reason: str, readonly: bool) -> None:
    with (state / "data.mdb").open("r+b") as file:
        file.seek(at)
        file.write(harm)
    with pytest.raises(StateDamagedError, match=reason):
        Store(state, readonly=readonly)


def test_a_page_that_two_refer_to_is_refused(state: Path) -> None:
    data = bytearray((state / "data.mdb").read_bytes())
    # The newer meta page's two trees get one root.
    at = max((0, PAGE), key=lambda page: struct.unpack_from("=Q", data, page + 16 + 24 + 96 + 8)[0])
    free_root, main_root = at + 16 + 24 + 40, at + 16 + 24 + 48 + 40
    data[free_root : free_root + 8] = data[main_root : main_root + 8]
    (state / "data.mdb").write_bytes(data)
    with pytest.raises(StateDamagedError, match="referred to twice"):
        Store(state)
