"""The store: one LMDB environment, written one whole change set at a time.

Logic never holds a write transaction. It collects a `ChangeSet`, and `Store.commit` applies it in
one transaction: all of it or nothing, consumer offsets included. A full map grows and the same
change set is applied again, which is why a change set is data and not a callback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import TracebackType

import lmdb

LAYOUT_VERSION = 4
"""Version of the tables and record layouts; another version is refused, never guessed."""


class Table(StrEnum):
    """A named table of the environment."""

    META = "meta"
    OFFSETS = "offsets"
    PRODUCTS = "products"
    CREATIVES = "creatives"
    IMPRESSIONS = "impressions"
    WAITING_CLICKS = "waiting_clicks"
    TIMERS = "timers"
    CELLS = "cells"
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
    SHIFTS = "shifts"
    OUTBOX = "outbox"


class StateError(RuntimeError):
    """The state cannot be used as it is."""


class StateMissingError(StateError):
    """There is no state at a path that is to be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"no state at {path}: nothing has been committed there yet. "
            "Start `osmf online` first, or set state.path (OSMF_STATE__PATH) to the folder that it writes."
        )
        self.path = path


class StateLayoutError(StateError):
    """The state was written with another layout version."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(
            f"state at {path} has layout version {found!r}, this program reads {LAYOUT_VERSION}: "
            "it is left untouched. Use the program version that wrote it, or start with an empty state.path."
        )
        self.path = path
        self.found = found


class StateLockedError(StateError):
    """Another process writes this state."""

    def __init__(self, path: Path, pid: str) -> None:
        super().__init__(
            f"state at {path} is being written by process {pid}: a state has one writer, so nothing was opened. "
            "Stop that process first, or set another state.path."
        )
        self.path = path


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
    map_size_mib
        First size of the memory map, MiB; it doubles when a commit needs more.
    sync
        Whether a commit waits for the disk.

    Raises
    ------
    StateMissingError
        ``readonly`` and there is no state.
    StateLayoutError
        The state has another layout version.
    StateLockedError
        Another process has the state open for writing.
    """

    def __init__(self, path: Path, *, readonly: bool = False, map_size_mib: int = 1024, sync: bool = True) -> None:
        self.path = path
        self.readonly = readonly
        self._writer_lock: _WriterLock | None = None
        if readonly:
            data = path / "data.mdb"
            if not data.exists() or not data.stat().st_size:
                raise StateMissingError(path)
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._writer_lock = _WriterLock(path)
        try:
            self._env = lmdb.open(
                str(path),
                map_size=map_size_mib << 20,
                max_dbs=len(Table),
                readonly=readonly,
                sync=sync,
                max_readers=510,
                readahead=False,
            )
            self._tables = self._open_tables()
            self._check_layout()
        except BaseException:
            if self._writer_lock is not None:
                self._writer_lock.release()
            raise

    def _open_tables(self) -> dict[Table, lmdb._Database]:
        if self.readonly:
            try:
                return {table: self._env.open_db(table.encode(), create=False) for table in Table}
            except lmdb.NotFoundError as error:
                raise StateMissingError(self.path) from error
        return {table: self._env.open_db(table.encode()) for table in Table}

    def _check_layout(self) -> None:
        with self.read() as txn:
            found = txn.get(Table.META, b"layout_version")
        if found is None and not self.readonly:
            changes = ChangeSet()
            changes.put(Table.META, b"layout_version", str(LAYOUT_VERSION).encode())
            self.commit(changes)
        elif found is None:
            raise StateMissingError(self.path)
        elif found != str(LAYOUT_VERSION).encode():
            self.close()
            raise StateLayoutError(self.path, found.decode(errors="replace"))

    @contextmanager
    def read(self) -> Iterator[ReadTransaction]:
        """Open a consistent view of the last commit."""
        try:
            txn = self._env.begin()
        except lmdb.MapResizedError:
            # The writer, in another process, has grown the map: adopt its size.
            self._env.set_mapsize(0)
            txn = self._env.begin()
        with txn:
            yield ReadTransaction(txn, self._tables)

    def commit(self, changes: ChangeSet) -> None:
        """Apply ``changes`` in one transaction: all of them, or none.

        A full map is doubled, and the change set applied again from the start.
        """
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    for table, key, value in changes:
                        if value is None:
                            txn.delete(key, db=self._tables[table])
                        else:
                            txn.put(key, value, db=self._tables[table])
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(self._env.info()["map_size"] * 2)

    def size_bytes(self) -> int:
        """Return how many bytes of the map are in use."""
        info = self._env.info()
        return int((info["last_pgno"] + 1) * self._env.stat()["psize"])

    def close(self) -> None:
        """Close the environment; a second call does nothing."""
        self._env.close()
        if self._writer_lock is not None:
            self._writer_lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _WriterLock:
    """An advisory file lock that dies with its process, so that a killed writer leaves nothing to clean up."""

    def __init__(self, path: Path) -> None:
        import fcntl

        self._file = (path / "writer.lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            pid = self._file.read().strip() or "unknown"
            self._file.close()
            raise StateLockedError(path, pid) from None
        import os

        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()
