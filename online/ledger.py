"""The ledger: who added what to counts and model, for a bounded time, so that it can be taken back.

An append-only list in blocks: every impression that was counted with all that was added for it, and what became of its
click later. Users are in it by a keyed hash only. A correction looks its entries up by scanning the blocks' index, 12
bytes an entry, which is rare; writing an entry is what has to be cheap.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from online.mismatch import LedgerKeyError
from online.settings import LedgerSettings
from state.records import (
    ClickEntry,
    ImpressionRecord,
    LedgerBlock,
    LedgerRecord,
    RetractionEntry,
    encode_record,
    number_key,
    split_number_key,
)
from state.store import ChangeSet, ReadTransaction, Table

BLOCK_ENTRIES = 2_048
"""Entries from which a block is full; until then every commit writes it again."""

BLOCK_SHARE = 1 / 32
"""Share of the retention after which a block is full, too: entries leave by blocks, and none stays much longer."""

Starts = dict[str, dict[int, int]]
"""Where partitions stand: offsets by topic and partition."""

SHOWN, CLICKED, RETRACTED = 0, 1, 2

_HEADER = struct.Struct("<QQ")  # newest watermark, number of entries
_BLOCK = msgspec.msgpack.Decoder(LedgerBlock)
_RECORD = msgspec.msgpack.Decoder(ImpressionRecord)
_CLICK = msgspec.msgpack.Decoder(ClickEntry)
_RETRACTION = msgspec.msgpack.Decoder(RetractionEntry)
_HEAD = msgspec.msgpack.Decoder(LedgerRecord)


class Index(NamedTuple):
    """What a block is searched by.

    Of each entry the user's hash, ``users`` uint64 (n,), 0 but for impressions, and the CRC-32 of the impression's id,
    ``crcs`` uint32 (n,). ``newest_ms`` is the newest watermark.
    """

    newest_ms: int
    users: npt.NDArray[np.uint64]
    crcs: npt.NDArray[np.uint32]

    def pack(self) -> bytes:
        """Return the index as bytes."""
        return _HEADER.pack(self.newest_ms, len(self.users)) + self.users.tobytes() + self.crcs.tobytes()

    @staticmethod
    def unpack(value: bytes) -> Index:
        """Return the index of its bytes."""
        newest_ms, n_entries = _HEADER.unpack_from(value)
        users = np.frombuffer(value, np.uint64, n_entries, _HEADER.size)
        return Index(newest_ms, users, np.frombuffer(value, np.uint32, n_entries, _HEADER.size + users.nbytes))


@dataclass
class Life:
    """An impression as the ledger holds it, from being shown to what became of its click.

    ``places`` are its entries: block and row.
    """

    user_hash: int
    impression_id: str
    record: ImpressionRecord
    places: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Block:
    """A block, with its index."""

    number: int
    index: Index
    content: LedgerBlock


class Ledger:
    """The entries of the last ``retention_s`` seconds of event time, at most ``max_entries``, the oldest leave first.

    Parameters
    ----------
    settings
        How long, how many, and the key of the hash.
    """

    def __init__(self, settings: LedgerSettings) -> None:
        self._settings = settings
        self._key = hashlib.sha512(settings.hash_key.get_secret_value().encode()).digest()
        self._keyed = hashlib.blake2b(key=self._key, digest_size=8)
        self._block_entries = min(BLOCK_ENTRIES, max(settings.max_entries // 8, 1))
        self._kept: dict[int, tuple[int, int]] = {}  # newest watermark and entries of each block, oldest first
        self._open: _Block | None = None
        self._changed: dict[int, _Block | None] = {}
        self.numbers = LedgerRecord()

    @property
    def is_on(self) -> bool:
        """Whether anything is kept, so that corrections are possible."""
        return self._settings.retention_s > 0

    def user_hash(self, user_id: str) -> int:
        """Return the keyed hash of a user, 64 bits."""
        hashed = self._keyed.copy()
        hashed.update(user_id.encode())
        return int.from_bytes(hashed.digest(), "little")

    def append(
        self,
        impressions: Sequence[tuple[str, str, bytes]],
        clicks: Iterable[tuple[str, ClickEntry]],
        retractions: Iterable[tuple[str, RetractionEntry]],
        starts: Starts,
        now_ms: int,
    ) -> None:
        """Append what one micro-batch counted.

        Parameters
        ----------
        impressions
            Of each the user, the impression's id and its encoded `ImpressionRecord`.
        clicks, retractions
            Those of impressions of earlier micro-batches, by the impression's id.
        starts
            Where the partitions of impressions stood before the micro-batch.
        now_ms
            The watermark.
        """
        if not self.is_on:
            return
        later = [(CLICKED, name, encode_record(entry)) for name, entry in clicks]
        later += [(RETRACTED, name, encode_record(entry)) for name, entry in retractions]
        n_new = len(impressions) + len(later)
        if not n_new:
            return
        hashes = {user_id: self.user_hash(user_id) for user_id, _, _ in impressions}
        users = np.zeros(n_new, np.uint64)
        users[: len(impressions)] = [hashes[user_id] for user_id, _, _ in impressions]
        names = [name for _, name, _ in impressions] + [name for _, name, _ in later]
        crcs = np.fromiter(map(_crc, names), np.uint32, n_new)
        block = self._open_block(starts, now_ms)
        block.index = Index(
            max(block.index.newest_ms, now_ms),
            np.concatenate([block.index.users, users]),
            np.concatenate([block.index.crcs, crcs]),
        )
        content = block.content
        content.kinds += bytes(len(impressions)) + bytes(kind for kind, _, _ in later)
        content.impression_ids += names
        content.details += [record for _, _, record in impressions]
        content.details += [detail for _, _, detail in later]
        self.numbers.n_entries += n_new
        self._put(block)
        if len(block.index.users) >= self._block_entries:
            self._open, self.numbers.open_block = None, None

    def _open_block(self, starts: Starts, now_ms: int) -> _Block:
        if (
            self._open is None
            or now_ms - self._open.content.oldest_ms > BLOCK_SHARE * self._settings.retention_s * 1000
        ):
            empty = Index(0, np.zeros(0, np.uint64), np.zeros(0, np.uint32))
            self._open = _Block(self.numbers.n_blocks, empty, LedgerBlock(now_ms, starts, b"", [], []))
            self.numbers.open_block = self.numbers.n_blocks
            self.numbers.n_blocks += 1
        return self._open

    def _put(self, block: _Block) -> None:
        """Note that a block has changed; one without entries goes, unless it is still open."""
        if len(block.index.users) or block is self._open:
            self._changed[block.number] = block
            self._kept[block.number] = (block.index.newest_ms, len(block.index.users))
        else:
            self._changed[block.number] = None
            del self._kept[block.number]

    def lives(self, txn: ReadTransaction, users: Collection[int], impression_ids: Collection[str]) -> list[Life]:
        """Return the impressions of users, and those of some ids, as of the last commit, oldest first."""
        found: list[Life] = []
        if not users and not impression_ids:
            return found
        latest: dict[str, Life] = {}
        wanted_users = np.fromiter(users, np.uint64, len(users))
        wanted_crcs = {_crc(name) for name in impression_ids}
        for key, value in txn.scan(Table.LEDGER_INDEX):
            index, content = Index.unpack(value), None
            of_users = np.flatnonzero(np.isin(index.users, wanted_users))
            if len(of_users):
                content = _content(txn, key)
                wanted_crcs.update(index.crcs[of_users].tolist())
            rows = np.flatnonzero(np.isin(index.crcs, np.fromiter(wanted_crcs, np.uint32, len(wanted_crcs))))
            if not len(rows):
                continue
            content = content or _content(txn, key)
            for row in rows.tolist():
                name, detail = content.impression_ids[row], content.details[row]
                if content.kinds[row] == SHOWN:
                    life = Life(int(index.users[row]), name, _RECORD.decode(detail))
                    latest[name] = life
                    if life.user_hash in users or name in impression_ids:
                        found.append(life)
                elif name in latest:
                    life = latest[name]
                    _continue(life.record, content.kinds[row], detail)
                else:
                    continue
                life.places.append((split_number_key(key), row))
        return found

    def erase(self, lives: Iterable[Life], txn: ReadTransaction) -> None:
        """Remove every entry of some impressions."""
        rows_of: dict[int, list[int]] = {}
        for life in lives:
            for number, row in life.places:
                rows_of.setdefault(number, []).append(row)
        for number, rows in rows_of.items():
            block = self._block(number, txn)
            kept = np.ones(len(block.index.users), np.bool_)
            kept[rows] = False
            block.index = Index(block.index.newest_ms, block.index.users[kept], block.index.crcs[kept])
            places, content = np.flatnonzero(kept).tolist(), block.content
            content.kinds = bytes(content.kinds[place] for place in places)
            content.impression_ids = [content.impression_ids[place] for place in places]
            content.details = [content.details[place] for place in places]
            self.numbers.n_entries -= len(rows)
            self.numbers.n_forgotten += len(rows)
            self._put(block)

    def starts(self, txn: ReadTransaction) -> Starts:
        """Return where the partitions of impressions stood before the oldest entry that is kept."""
        return self._block(next(iter(self._kept)), txn).content.starts if self._kept else {}

    def _block(self, number: int, txn: ReadTransaction) -> _Block:
        return self._open if self._open is not None and self._open.number == number else _read(txn, number)

    def expire(self, now_ms: int) -> None:
        """Let go of blocks that are older than the retention, and of the oldest beyond the ceiling."""
        horizon_ms = now_ms - self._settings.retention_s * 1000
        while self._kept and (not self.is_on or next(iter(self._kept.values()))[0] < horizon_ms):
            self.numbers.n_expired += self._drop()
        while self.numbers.n_entries > self._settings.max_entries and len(self._kept) > 1:
            self.numbers.n_dropped += self._drop()

    def _drop(self) -> int:
        number = next(iter(self._kept))
        _, n_entries = self._kept.pop(number)
        self._changed[number] = None
        if number == self.numbers.open_block:
            self._open, self.numbers.open_block = None, None
        self.numbers.n_entries -= n_entries
        return n_entries

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state.

        Raises
        ------
        online.mismatch.LedgerKeyError
            Its users were hashed with another key.
        """
        value = txn.get(Table.META, b"ledger")
        if value is not None:
            self.numbers = _HEAD.decode(value)
        if self.is_on and self.numbers.n_entries and self.numbers.key_mark != self._mark():
            raise LedgerKeyError
        for key, packed in txn.scan(Table.LEDGER_INDEX):
            newest_ms, n_entries = _HEADER.unpack_from(packed)
            self._kept[split_number_key(key)] = (newest_ms, n_entries)
        if self.numbers.open_block is not None:
            self._open = _read(txn, self.numbers.open_block)

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        for number, block in self._changed.items():
            key = number_key(number)
            if block is None:
                changes.delete(Table.LEDGER, key)
                changes.delete(Table.LEDGER_INDEX, key)
            else:
                changes.put(Table.LEDGER, key, encode_record(block.content))
                changes.put(Table.LEDGER_INDEX, key, block.index.pack())
        self._changed.clear()
        self.numbers.key_mark = self._mark()
        changes.put(Table.META, b"ledger", encode_record(self.numbers))

    def _mark(self) -> bytes:
        return hashlib.blake2b(b"mark", key=self._key, digest_size=8).digest()


def offsets_by_topic(offsets: Mapping[tuple[str, int], int], topics: Collection[str]) -> Starts:
    """Return the offsets of the partitions of some topics, in order: as they are after a restart."""
    found: Starts = {}
    for (topic, partition), offset in sorted(offsets.items()):
        if topic in topics:
            found.setdefault(topic, {})[partition] = offset
    return found


def _continue(record: ImpressionRecord, kind: int, detail: bytes) -> None:
    """Let a later entry say what became of an impression."""
    if kind == CLICKED:
        click = _CLICK.decode(detail)
        record.clicked, record.clicked_ms, record.clicked_late = True, click.clicked_ms, click.late
    else:
        record.retracted, record.retracted_late = True, _RETRACTION.decode(detail).late


def _content(txn: ReadTransaction, key: bytes) -> LedgerBlock:
    value = txn.get(Table.LEDGER, key)
    assert value is not None, key
    return _BLOCK.decode(value)


def _read(txn: ReadTransaction, number: int) -> _Block:
    key = number_key(number)
    packed = txn.get(Table.LEDGER_INDEX, key)
    assert packed is not None, number
    return _Block(number, Index.unpack(packed), _content(txn, key))


def _crc(impression_id: str) -> int:
    return zlib.crc32(impression_id.encode())
