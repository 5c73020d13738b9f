"""The store: commits are whole or nothing, the map grows by itself, and a state has one writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.errors import StateForeignError, StateLayoutError, StateLockedError, StateMissingError
from state.reading import open_view
from state.records import ArmRecord, Cell, OffsetRecord, arm_key, cell_key, encode_cell, encode_record, partition_key
from state.store import LAYOUT_VERSION, MIGRATES_FROM, ChangeSet, Store, Table

ROOT = Path(__file__).parents[2]


def change(*puts: tuple[Table, bytes, bytes | None]) -> ChangeSet:
    changes = ChangeSet()
    for table, key, value in puts:
        if value is None:
            changes.delete(table, key)
        else:
            changes.put(table, key, value)
    return changes


def content(store: Store) -> dict[tuple[Table, bytes], bytes]:
    with store.read() as txn:
        return {(table, key): value for table in Table for key, value in txn.scan(table)}


def environment(path: Path, key: bytes, value: bytes, table: bytes | None = None) -> None:
    """Write one entry to an LMDB environment that this program did not make."""
    with lmdb.open(str(path), max_dbs=2) as other, other.begin(write=True) as txn:
        txn.put(key, value, db=None if table is None else other.open_db(table, txn=txn))


@contextmanager
def other_process(script: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a script in a fresh interpreter; it talks line by line."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def say(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return hear(process)


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


WRITER = """
import sys, time
from pathlib import Path
from state.store import ChangeSet, Store, Table
store = Store(Path(sys.argv[1]), map_size_mib=16)
changes = ChangeSet()
changes.put(Table.META, b"who", b"the other")
store.commit(changes)
print("open", flush=True)
time.sleep(60)
"""

READER = """
import sys
from pathlib import Path
from state.store import Store, Table
store = Store(Path(sys.argv[1]), readonly=True)
for _ in sys.stdin:
    with store.read() as txn:
        values = [value for _, value in txn.scan(Table.REPLAY)]
    print(len(values), sum(map(len, values)), flush=True)
"""


def test_a_commit_is_read_back_by_a_later_process(tmp_path: Path) -> None:
    with Store(tmp_path / "new" / "state") as store:
        store.commit(change((Table.CELLS, b"a", b"1"), (Table.ARMS, b"a", b"2")))
    with Store(tmp_path / "new" / "state", readonly=True) as store:
        found = content(store)
    assert found == {
        (Table.META, b"layout_version"): str(LAYOUT_VERSION).encode(),
        (Table.CELLS, b"a"): b"1",
        (Table.ARMS, b"a"): b"2",
    }


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param((Table.OUTBOX, b"k" * 600, b"value"), id="key too long"),
        pytest.param((Table.OUTBOX, b"", b"value"), id="empty key"),
    ],
)
def test_a_commit_that_fails_changes_nothing(tmp_path: Path, bad: tuple[Table, bytes, bytes]) -> None:
    with Store(tmp_path) as store:
        store.commit(change((Table.CELLS, b"old", b"1"), (Table.OFFSETS, b"at", b"10")))
        before = content(store)
        with pytest.raises(lmdb.Error):
            # META comes before OUTBOX, so some of it was put when the bad one came.
            store.commit(
                change((Table.META, b"x", b"y"), (Table.CELLS, b"old", None), (Table.OFFSETS, b"at", b"20"), bad)
            )
        assert content(store) == before
        store.commit(change((Table.CELLS, b"old", b"2")))
        assert content(store) == {**before, (Table.CELLS, b"old"): b"2"}


def test_a_reader_keeps_its_view_while_others_commit(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.commit(change((Table.CELLS, b"a", b"1")))
        with store.read() as txn:
            store.commit(change((Table.CELLS, b"a", b"2"), (Table.CELLS, b"b", b"2")))
            assert list(txn.scan(Table.CELLS)) == [(b"a", b"1")]
            assert txn.count(Table.CELLS) == 1
        with store.read() as txn:
            assert list(txn.scan(Table.CELLS)) == [(b"a", b"2"), (b"b", b"2")]


def test_the_map_grows_by_itself_and_readers_elsewhere_follow(tmp_path: Path) -> None:
    block = bytes(1 << 20)
    with Store(tmp_path, map_size_mib=16) as store:
        store.commit(change((Table.REPLAY, b"\x00", block)))
        with other_process(READER, tmp_path) as reader:
            assert say(reader, "read") == f"1 {len(block)}"
            # Far more than the first map holds, in one change set: it takes several doublings.
            store.commit(change(*((Table.REPLAY, bytes([n]), block) for n in range(1, 70))))
            assert store.size_bytes() > 64 << 20
            assert say(reader, "read") == f"70 {70 * len(block)}"
            store.commit(change(*((Table.REPLAY, bytes([n]), None) for n in range(1, 70))))
            assert say(reader, "read") == f"1 {len(block)}"
    with Store(tmp_path, map_size_mib=16) as store:  # a grown state opens with a smaller first size
        store.commit(change(*((Table.REPLAY, bytes([n]), block) for n in range(1, 70))))
        with store.read() as txn:
            assert txn.count(Table.REPLAY) == 70


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    with other_process(WRITER, tmp_path) as writer:
        assert hear(writer) == "open"
        with pytest.raises(StateLockedError, match=rf"being written by process {writer.pid}\b.*one writer"):
            Store(tmp_path)
        with Store(tmp_path, readonly=True) as store:  # readers are welcome
            assert content(store)[Table.META, b"who"] == b"the other"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_writer_that_dies_leaves_no_lock(tmp_path: Path, how: signal.Signals) -> None:
    with other_process(WRITER, tmp_path) as writer:
        assert hear(writer) == "open"
        writer.send_signal(how)
        writer.wait(10)
        with Store(tmp_path) as store:
            store.commit(change((Table.META, b"mine", b"now")))
            found = content(store)
    assert found[Table.META, b"who"] == b"the other"
    assert found[Table.META, b"mine"] == b"now"


def test_a_closed_writer_gives_its_lock_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StateLockedError, match=f"process {os.getpid()}"):
        Store(tmp_path)
    store.close()
    store.close()
    with Store(tmp_path):
        pass


def test_another_layout_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.commit(change((Table.META, b"layout_version", b"99"), (Table.CELLS, b"a", b"1")))
    for readonly in (False, True, False):  # the refusal gives the lock back
        with pytest.raises(
            StateLayoutError, match=rf"layout version '99', this program reads {LAYOUT_VERSION}.*untouched"
        ):
            Store(tmp_path, readonly=readonly)
    with lmdb.open(str(tmp_path), max_dbs=len(Table)) as other, other.begin() as txn:
        assert txn.get(b"a", db=other.open_db(b"cells", txn=txn)) == b"1"
        assert txn.get(b"layout_version", db=other.open_db(b"meta", txn=txn)) == b"99"


@pytest.mark.parametrize(
    ("layout", "advice"),
    [
        (str(LAYOUT_VERSION + 1), "A newer program wrote it: install that one"),
        (str(MIGRATES_FROM - 1), "Older layouts are not continued. Use the program version that wrote it, or start"),
        (str(MIGRATES_FROM), "`osmf state migrate` brings it to this program's layout"),
        ("0", "No program version writes that one"),
        ("x", "No program version writes that one"),
    ],
)
def test_another_layout_is_refused_with_what_to_do(tmp_path: Path, layout: str, advice: str) -> None:
    with Store(tmp_path, sync=False) as store:
        store.commit(change((Table.META, b"layout_version", layout.encode())))
    with pytest.raises(StateLayoutError, match=rf"layout version '{layout}'.*{advice}"):
        Store(tmp_path)


def test_an_older_layout_with_fewer_tables_is_refused_and_gets_none(tmp_path: Path) -> None:
    environment(tmp_path, b"layout_version", b"2", b"meta")
    before = (tmp_path / "data.mdb").read_bytes()
    for readonly in (True, False):
        with pytest.raises(StateLayoutError, match="layout version '2'"):
            Store(tmp_path, readonly=readonly)
    assert (tmp_path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("empty environment", "an LMDB environment of another program"),
        ("entries without tables", "an LMDB environment of another program"),
        ("an entry named as a table is", "an LMDB environment of another program"),
        ("a table named as one of ours", "an LMDB environment without a layout version"),
        ("our layout without our tables", "lacks a table of layout"),
        ("a file", "is no folder"),
    ],
)
@pytest.mark.parametrize("readonly", [False, True])
def test_what_is_no_state_is_left_alone(tmp_path: Path, made: str, reason: str, readonly: bool) -> None:
    path = tmp_path / "state"
    match made:
        case "empty environment":
            lmdb.open(str(path)).close()
        case "entries without tables":
            environment(path, b"a", b"b")
        case "an entry named as a table is":
            environment(path, b"meta", b"b")
        case "a table named as one of ours":
            environment(path, b"a", b"b", b"meta")
        case "our layout without our tables":
            environment(path, b"layout_version", str(LAYOUT_VERSION).encode(), b"meta")
        case _:
            path.write_text("mine")
    data = path if made == "a file" else path / "data.mdb"
    before = data.read_bytes()
    with pytest.raises(StateForeignError, match=f"no state, it .*{reason}.*left untouched"):
        Store(path, readonly=readonly)
    assert data.read_bytes() == before


@pytest.mark.parametrize("made", ["nothing", "folder"])
def test_a_missing_state_is_named_with_what_to_do(tmp_path: Path, made: str) -> None:
    path = tmp_path / "state"
    if made == "folder":
        path.mkdir()
    with pytest.raises(StateMissingError, match=r"no state at .*Start `osmf online` first, or set state\.path") as info:
        Store(path, readonly=True)
    assert info.value.path == path
    if made == "nothing":
        assert not path.exists()


def test_a_read_only_store_cannot_commit(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with Store(tmp_path, readonly=True) as store, pytest.raises(lmdb.ReadonlyError):
        store.commit(change((Table.META, b"a", b"b")))


def test_the_last_change_of_a_key_wins() -> None:
    changes = ChangeSet()
    assert len(changes) == 0
    assert not changes.has(Table.CELLS, b"a")
    changes.put(Table.CELLS, b"a", b"1")
    changes.put(Table.ARMS, b"a", b"other table")
    changes.delete(Table.CELLS, b"a")
    assert changes.has(Table.CELLS, b"a")
    assert changes.get(Table.CELLS, b"a") is None
    changes.put(Table.CELLS, b"a", b"3")
    changes.delete(Table.CELLS, b"b")
    assert changes.get(Table.CELLS, b"a") == b"3"
    assert changes.of(Table.CELLS) == [(b"a", b"3"), (b"b", None)]
    assert len(changes) == len(list(changes)) == 3


@pytest.mark.parametrize(
    ("prefix", "start", "expected"),
    [
        (b"", None, [b"a\x001", b"a\x002", b"aa\x001", b"b\x001", b"\xff\xff"]),
        (b"a\x00", None, [b"a\x001", b"a\x002"]),
        (b"a", None, [b"a\x001", b"a\x002", b"aa\x001"]),
        (b"a\x00", b"a\x002", [b"a\x002"]),
        (b"a\x00", b"a\x0011", [b"a\x002"]),
        (b"", b"aa", [b"aa\x001", b"b\x001", b"\xff\xff"]),
        (b"c", None, []),
        (b"\xff", None, [b"\xff\xff"]),
        (b"a\x00", b"b", []),
    ],
)
def test_scan_yields_keys_in_order_while_the_prefix_holds(
    tmp_path: Path, prefix: bytes, start: bytes | None, expected: list[bytes]
) -> None:
    keys = [b"b\x001", b"a\x002", b"aa\x001", b"\xff\xff", b"a\x001"]
    with Store(tmp_path) as store:
        store.commit(change(*((Table.TIMERS, key, b"v" + key) for key in keys)))
        with store.read() as txn:
            assert list(txn.scan(Table.TIMERS, prefix=prefix, start=start)) == [(key, b"v" + key) for key in expected]
            assert list(txn.scan(Table.OUTBOX, prefix=prefix, start=start)) == []
            if start is None:
                assert list(txn.keys(Table.TIMERS, prefix=prefix)) == expected
                assert list(txn.keys(Table.OUTBOX, prefix=prefix)) == []


def test_get_many_returns_those_that_are_there(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.commit(change((Table.CELLS, b"a", b"1"), (Table.CELLS, b"b", b"")))
        with store.read() as txn:
            assert txn.get_many(Table.CELLS, [b"b", b"missing", b"a", b"a"]) == {b"a": b"1", b"b": b""}
            assert txn.get_many(Table.CELLS, []) == {}
            assert txn.get(Table.CELLS, b"b") == b""
            assert txn.get(Table.CELLS, b"missing") is None


keys = st.binary(min_size=1, max_size=3)
steps = st.lists(
    st.lists(
        st.tuples(st.sampled_from([Table.CELLS, Table.META]), keys, st.none() | st.binary(max_size=4)), max_size=6
    ),
    max_size=5,
)


@given(steps)
def test_a_store_is_a_dictionary_of_its_commits(
    tmp_path_factory: pytest.TempPathFactory, commits: list[list[tuple[Table, bytes, bytes | None]]]
) -> None:
    expected: dict[tuple[Table, bytes], bytes] = {(Table.META, b"layout_version"): str(LAYOUT_VERSION).encode()}
    with Store(tmp_path_factory.mktemp("store"), map_size_mib=16, sync=False) as store:
        for puts in commits:
            store.commit(change(*puts))
            for table, key, value in puts:
                expected.pop((table, key), None)
                if value is not None:
                    expected[table, key] = value
            assert content(store) == expected


def test_a_view_reads_records_by_product(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.commit(
            change(
                *(
                    (Table.CELLS, cell_key(p, g, c), encode_cell(Cell(p, g, c, 2, 1, 1.5, 0.5, 7)))
                    for p, g, c in [("p", 1, "a"), ("p", 0, "b"), ("pp", 0, "a")]
                ),
                (Table.OFFSETS, partition_key("t", 2), encode_record(OffsetRecord(5, 5, 4, 1, 1, 9))),
                (Table.ARMS, arm_key("e", "all", 63), encode_record(ArmRecord(8, 1))),
                (Table.WAITING_CLICKS, b"i", b"w"),
            )
        )
        with open_view(store) as view:
            assert view.cells("p") == [Cell("p", 0, "b", 2, 1, 1.5, 0.5, 7), Cell("p", 1, "a", 2, 1, 1.5, 0.5, 7)]
            assert len(view.cells()) == 3
            assert view.offsets() == {("t", 2): OffsetRecord(5, 5, 4, 1, 1, 9)}
            assert view.arms() == {("e", "all", 63): ArmRecord(8, 1)}
            assert (view.n_waiting_clicks(), view.n_outbox()) == (1, 0)
            assert view.products() == []
            assert view.groups("p") is None
