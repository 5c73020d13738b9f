"""The store: one LMDB environment, written one whole change set at a time.

Logic never holds a write transaction. It collects a `ChangeSet`, and `Store.commit` applies it in
one transaction: all of it or nothing, consumer offsets included. A full map grows and the same
change set is applied again, which is why a change set is data and not a callback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from types import TracebackType

import lmdb
import msgspec

from state.environment import LAYOUT_KEY, check_data, damage, refused_writes
from state.errors import (
    StateFencedError,
    StateForeignError,
    StateLayoutError,
    StateMapError,
    StateMissingError,
    StatePermissionError,
)
from state.files import (
    DATA_FILE,
    NEXT_FILE,
    WriterLock,
    opening,
    replace_data,
    reserve_lock_file,
    system_errors,
)
from state.ownership import OWNER_KEY, Owner, next_owner, read_owner, unblock

LAYOUT_VERSION = 7
"""Version of the tables and record layouts; another version is refused, never guessed."""

MIGRATES_FROM = 4
"""The oldest layout from which `state.migration` leads to this one."""


class Table(StrEnum):
    """A named table of the environment."""

    META = "meta"
    OFFSETS = "offsets"
    PRODUCTS = "products"
    CREATIVES = "creatives"
    IMPRESSIONS = "impressions"
    WAITING_CLICKS = "waiting_clicks"
    TIMERS = "timers"
    LEDGER = "ledger"
    LEDGER_INDEX = "ledger_index"
    FORGETTINGS = "forgettings"
    CELLS = "cells"
    LIVE_RESTARTS = "live_restarts"
    GROUPS = "groups"
    CLUSTERINGS = "clusterings"
    EXPECTATIONS = "expectations"
    SLOPES = "slopes"
    CATEGORY_METRICS = "category_metrics"
    LEARNER = "learner"
    ENCODERS = "encoders"
    REPLAY = "replay"
    SEARCHES = "searches"
    ARMS = "arms"
    DETECTORS = "detectors"
    RESIDENTS = "residents"
    SHIFTS = "shifts"
    REVIEWS = "reviews"
    FILES = "files"
    OUTBOX = "outbox"


class ChangeSet:
    """Everything that one commit changes, in the order in which it was said.

    The last change of a key wins.
    """

    def __init__(self) -> None:
        self._changes: dict[Table, dict[bytes, bytes | None]] = {table: {} for table in Table}

    def put(self, table: Table, key: bytes, value: bytes) -> None:
        """Set ``key`` to ``value``."""
        self._changes[table][key] = value

    def delete(self, table: Table, key: bytes) -> None:
        """Remove ``key``; one that is not there is fine."""
        self._changes[table][key] = None

    def has(self, table: Table, key: bytes) -> bool:
        """Return whether ``key`` is put or removed by this change set."""
        return key in self._changes[table]

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return what this change set puts at ``key``; None when it removes it or says nothing."""
        return self._changes[table].get(key)

    def of(self, table: Table) -> list[tuple[bytes, bytes | None]]:
        """Return the changes of one table, None for a removal."""
        return list(self._changes[table].items())

    def __len__(self) -> int:
        return sum(map(len, self._changes.values()))

    def __iter__(self) -> Iterator[tuple[Table, bytes, bytes | None]]:
        for table, changes in self._changes.items():
            for key, value in changes.items():
                yield table, key, value


class ReadTransaction:
    """A consistent view of every table, as of one commit."""

    def __init__(self, txn: lmdb.Transaction, tables: dict[Table, lmdb._Database]) -> None:
        self._txn = txn
        self._tables = tables

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the value of ``key``, or None."""
        value = self._txn.get(key, db=self._tables[table])
        return None if value is None else bytes(value)

    def get_many(self, table: Table, keys: list[bytes]) -> dict[bytes, bytes]:
        """Return the values of those of ``keys`` that are there."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            return {bytes(key): bytes(value) for key, value in cursor.getmulti(keys)}

    def scan(self, table: Table, *, prefix: bytes = b"", start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) in key order, from ``start`` (default: the prefix) on, while the prefix holds."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            first = start if start is not None else prefix
            found = cursor.set_range(first) if first else cursor.first()
            if not found:
                return
            for key, value in cursor:
                if not bytes(key).startswith(prefix):
                    return
                yield bytes(key), bytes(value)

    def keys(self, table: Table, *, prefix: bytes = b"") -> Iterator[bytes]:
        """Yield the keys that begin with ``prefix``, in order; their values are not read."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if cursor.set_range(prefix) if prefix else cursor.first():
                for key in cursor.iternext(values=False):
                    if not bytes(key).startswith(prefix):
                        return
                    yield bytes(key)

    def count(self, table: Table) -> int:
        """Return the number of keys in ``table``."""
        return int(self._txn.stat(self._tables[table])["entries"])


class Store:
    """One LMDB environment: many readers in any process, one writer.

    Parameters
    ----------
    path
        Folder of the environment; made when it is missing and the store is opened for writing.
    readonly
        Whether this process only reads. Readers never wait for the writer.
    shared
        Whether others may take the state over while this process has it open for writing. Opening it makes this
        process its owner; commits of the former owner are refused from then on.
    map_size_mib
        First size of the memory map, MiB; it doubles when a commit needs more.
    sync
        Whether a commit waits for the disk.

    Raises
    ------
    StateMissingError
        ``readonly`` and there is no state.
    StateForeignError
        What lies there is no state of this program.
    StateLayoutError
        The state has another layout version.
    StateLockedError
        Another process has the state open for writing, and does not share it.
    StateDamagedError
        The data file is not whole.
    StatePermissionError, StateDiskError, StateMapError
        The system refused the files, the room on the disk or the memory map.
    """

    def __init__(
        self,
        path: Path,
        *,
        readonly: bool = False,
        shared: bool = False,
        map_size_mib: int = 1024,
        sync: bool = True,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self._owner: Owner | None = None
        self._writer_lock: WriterLock | None = None
        self._env: lmdb.Environment | None = None
        with system_errors(path):
            if path.exists() and not path.is_dir():
                raise StateForeignError(path, "is no folder")
            is_there = (path / DATA_FILE).exists()
        if readonly and not is_there:
            raise StateMissingError(path)
        try:
            if not readonly and not is_there:
                with WriterLock(path):
                    # Only now: another writer may have made the state since.
                    if not (path / DATA_FILE).exists():
                        _create(path, sync=sync)
            if not readonly:
                self._writer_lock = WriterLock(path, shared=shared)
                unblock(path, self._writer_lock.former)
            with opening(path):
                # Under a writer pages move; the writer itself has checked them all before it began.
                check_data(path, every=not (readonly or shared))
                reserve_lock_file(path)
                self._env = _open_environment(path, readonly=readonly, map_size_mib=map_size_mib, sync=sync)
            self._tables = _open_tables(path, self._env)
            if shared and not readonly:
                self._take_over()
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        """Become the owner of a shared state, and look whether it is whole: nobody else commits from now on."""
        with self._writing() as txn:
            owner = next_owner(read_owner(txn.get(OWNER_KEY, db=self._tables[Table.META])))
            txn.put(OWNER_KEY, msgspec.msgpack.encode(owner), db=self._tables[Table.META])
        self._owner = owner
        check_data(self.path, every=True)

    @contextmanager
    def read(self) -> Iterator[ReadTransaction]:
        """Open a consistent view of the last commit."""
        with damage(self.path):
            try:
                txn = self._environment.begin()
            except lmdb.MapResizedError:
                # The writer, in another process, has grown the map: adopt its size.
                self._resize(0)
                txn = self._environment.begin()
            with txn:
                yield ReadTransaction(txn, self._tables)

    def commit(self, changes: ChangeSet) -> None:
        """Apply ``changes`` in one transaction: all of them, or none.

        A full map is doubled, and the change set applied again from the start.

        Raises
        ------
        StateDiskError
            The disk is full, or refused the write for another reason. The state is as it was before.
        StateMapError
            The map cannot grow. The state is as it was before, and closed.
        StateFencedError
            Another process has taken this shared state over. Its state is as that process left it.
        """
        while True:
            try:
                with self._writing() as txn:
                    self._check_owner(txn)
                    for table, key, value in changes:
                        if value is None:
                            txn.delete(key, db=self._tables[table])
                        else:
                            txn.put(key, value, db=self._tables[table])
                return
            except lmdb.MapFullError:
                self._resize(self.map_bytes() * 2)

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        with damage(self.path), refused_writes(self.path):
            try:
                txn = self._environment.begin(write=True)
            except lmdb.MapResizedError:
                # Another process, which shares this state, has grown the map.
                self._resize(0)
                txn = self._environment.begin(write=True)
            with txn:
                yield txn

    def _check_owner(self, txn: lmdb.Transaction) -> None:
        if self._owner is None:
            return
        owner = read_owner(txn.get(OWNER_KEY, db=self._tables[Table.META]))
        if owner != self._owner:
            assert owner is not None, "the owner of a shared state is never removed"
            raise StateFencedError(self.path, self._owner.epoch, str(owner.process), owner.epoch)

    def _resize(self, n_bytes: int) -> None:
        """Give the map another size; 0: that which the writer, in another process, has given it."""
        try:
            self._environment.set_mapsize(n_bytes)
        except lmdb.MemoryError as error:
            # LMDB has given up the old map by now, and would touch it again.
            self.close()
            raise StateMapError(self.path, n_bytes or (self.path / DATA_FILE).stat().st_size, str(error)) from error

    def copy_to(self, target: Path) -> None:
        """Write the last commit to a new file, as a data file without free pages; commits go on meanwhile.

        Raises
        ------
        StateDiskError
            The target's disk is full.
        """
        with target.open("xb", buffering=0) as file, damage(self.path), refused_writes(target.parent):
            self._environment.copyfd(file.fileno(), compact=True)
            os.fsync(file.fileno())

    def size_bytes(self) -> int:
        """Return how many bytes of the map are in use."""
        info = self._environment.info()
        return int((info["last_pgno"] + 1) * self._environment.stat()["psize"])

    def map_bytes(self) -> int:
        """Return the size of the memory map in bytes."""
        return int(self._environment.info()["map_size"])

    @property
    def _environment(self) -> lmdb.Environment:
        assert self._env is not None, "only a store that could not be opened has no environment"
        return self._env

    def close(self) -> None:
        """Close the environment; a second call does nothing."""
        if self._env is not None:
            self._env.close()
        if self._writer_lock is not None:
            self._writer_lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _create(path: Path, *, sync: bool) -> None:
    """Make an empty state. It is made beside and renamed, so that a data file that is there has been whole once."""
    (path / NEXT_FILE).unlink(missing_ok=True)
    with system_errors(path), refused_writes(path):
        with (
            closing(
                lmdb.open(str(path / NEXT_FILE), subdir=False, lock=False, max_dbs=len(Table), sync=sync)
            ) as environment,
            environment.begin(write=True) as txn,
        ):
            for table in Table:
                environment.open_db(table.encode(), txn=txn)
            meta = environment.open_db(Table.META.encode(), txn=txn)
            txn.put(LAYOUT_KEY, str(LAYOUT_VERSION).encode(), db=meta)
        replace_data(path, None, sync=sync)


def _open_environment(path: Path, *, readonly: bool, map_size_mib: int, sync: bool) -> lmdb.Environment:
    try:
        with damage(path), refused_writes(path):
            return lmdb.open(
                str(path),
                map_size=map_size_mib << 20,
                max_dbs=len(Table),
                readonly=readonly,
                sync=sync,
                max_readers=510,
                readahead=False,
            )
    except lmdb.ReadonlyError as error:
        raise StatePermissionError(path, str(error)) from error
    except lmdb.MemoryError as error:
        raise StateMapError(path, map_size_mib << 20, str(error)) from error


def _open_tables(path: Path, environment: lmdb.Environment) -> dict[Table, lmdb._Database]:
    """Open every table, after the layout has proved to be this program's."""
    try:
        meta = environment.open_db(Table.META.encode(), create=False)
        with environment.begin() as txn:
            layout = txn.get(LAYOUT_KEY, db=meta)
    except (lmdb.NotFoundError, lmdb.IncompatibleError) as error:
        raise StateForeignError(path, "holds an LMDB environment of another program") from error
    if layout is None:
        raise StateForeignError(path, "holds an LMDB environment without a layout version")
    if layout != str(LAYOUT_VERSION).encode():
        raise StateLayoutError(path, layout.decode(errors="replace"), LAYOUT_VERSION, migrates_from=MIGRATES_FROM)
    try:
        return {table: environment.open_db(table.encode(), create=False) for table in Table}
    except lmdb.NotFoundError as error:
        raise StateForeignError(path, f"lacks a table of layout {LAYOUT_VERSION} ({error})") from error
