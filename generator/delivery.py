"""Delivery: pictures' files, committed with the events that name them, and written before those are sent.

What has been decided is written out, whatever happens meanwhile; what has not been committed has left no file. So a
killed worker may decide anew, in a state of the online process that has moved on, and nothing is left of what it had
begun.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable

import msgspec

from generator.storage import ImageFile, read_bytes, write_bytes
from state.records import FileRecord, encode_record
from state.store import ChangeSet, Store, Table
from streams.outbox import Outbox

log = logging.getLogger(__name__)

_FILE = msgspec.msgpack.Decoder(FileRecord)


class FileOutbox:
    """Files that are to be written: in the state until they lie where they belong.

    Parameters
    ----------
    own
        The generator's state.
    """

    def __init__(self, own: Store) -> None:
        self._own = own
        self._written: set[bytes] = set()

    @staticmethod
    def add(files: Iterable[ImageFile], changes: ChangeSet) -> None:
        """Add files, as part of ``changes``."""
        for file in files:
            changes.put(Table.FILES, _key(file.uri), encode_record(FileRecord(file.uri, file.payload)))

    @staticmethod
    def read(uri: str, changes: ChangeSet) -> bytes:
        """Read a picture's file, also one that ``changes`` are to bring; see `generator.storage.read_bytes`."""
        value = changes.get(Table.FILES, _key(uri))
        return read_bytes(uri) if value is None else _FILE.decode(value).payload

    def write(self) -> bool:
        """Write what the state holds; return whether all of it lies where it belongs now."""
        with self._own.read() as txn:
            waiting = [key for key in txn.keys(Table.FILES) if key not in self._written]
        for number, key in enumerate(waiting):
            with self._own.read() as txn:
                value = txn.get(Table.FILES, key)
            assert value is not None, "nobody else removes it"
            file = _FILE.decode(value)
            try:
                write_bytes(file.uri, file.payload)
            except OSError as error:
                log.warning(
                    "%d files wait, and the events that name them: %s: %s", len(waiting) - number, file.uri, error
                )
                return False
            self._written.add(key)
        return True

    def clear(self, changes: ChangeSet) -> None:
        """Remove what has been written, as part of ``changes``."""
        for key in self._written:
            if not changes.has(Table.FILES, key):
                changes.delete(Table.FILES, key)
        self._written.clear()

    @property
    def n_waiting(self) -> int:
        """How many files are not written yet."""
        with self._own.read() as txn:
            return txn.count(Table.FILES) - len(self._written)


class Delivery:
    """Brings what has been committed to where it belongs: files first, then the events that name them.

    Parameters
    ----------
    own
        The generator's state.
    outbox
        Its outbound events.
    """

    def __init__(self, own: Store, outbox: Outbox) -> None:
        self._own = own
        self._files = FileOutbox(own)
        self._outbox = outbox

    def deliver(self) -> None:
        """Write and send what the state holds; what cannot be written or sent stays for the next time."""
        if self._files.write():
            self._outbox.send()

    @property
    def is_stuck(self) -> bool:
        """Whether so much waits that nothing further is to be decided."""
        return self._files.n_waiting > 0 or self._outbox.is_full

    def clear(self, changes: ChangeSet) -> None:
        """Remove what has been written and acknowledged, as part of ``changes``."""
        self._files.clear(changes)
        self._outbox.clear(changes)

    def settle(self) -> None:
        """Remove it in a commit of its own: nothing of it is written or sent again at the next start."""
        leftover = ChangeSet()
        self.clear(leftover)
        if len(leftover):
            self._own.commit(leftover)


def _key(uri: str) -> bytes:
    return hashlib.sha256(uri.encode()).digest()  # a URI can be longer than an LMDB key
