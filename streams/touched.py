"""Touched impressions: those that a micro-batch's join looks at, loaded in bulk and written once."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from state.records import ImpressionRecord, encode_record
from state.store import ChangeSet, ReadTransaction, Table

_IMPRESSION = msgspec.msgpack.Decoder(ImpressionRecord)


class TouchedImpressions:
    """The impressions that a batch looks at: loaded in bulk, written once."""

    def __init__(self, txn: ReadTransaction, new: dict[str, ImpressionRecord], forgotten: Collection[str] = ()) -> None:
        self._txn = txn
        self._new = new
        self._records: dict[str, ImpressionRecord] = dict(new)
        self._dirty: dict[str, None] = dict.fromkeys(new)
        self._dropped: set[str] = set(forgotten) - new.keys()

    def load(self, impression_ids: Iterable[str]) -> None:
        """Load impressions from the state, where it has them."""
        wanted = [
            impression_id.encode()
            for impression_id in impression_ids
            if impression_id not in self._records and impression_id not in self._dropped
        ]
        for key, value in self._txn.get_many(Table.IMPRESSIONS, wanted).items():
            self._records[key.decode()] = _IMPRESSION.decode(value)

    @property
    def n_dropped(self) -> int:
        """How many have been dropped."""
        return len(self._dropped)

    def get(self, impression_id: str) -> ImpressionRecord | None:
        """Return an impression; None if it is not loaded or has been dropped."""
        return self._records.get(impression_id)

    def is_new(self, impression_id: str) -> bool:
        """Return whether an impression is of this batch."""
        return impression_id in self._new

    def mark(self, impression_id: str) -> None:
        """Note that an impression has changed."""
        self._dirty[impression_id] = None

    def drop(self, impression_id: str) -> None:
        """Let go of an impression."""
        del self._records[impression_id]
        self._dirty.pop(impression_id, None)
        self._dropped.add(impression_id)

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed."""
        for impression_id in self._dirty:
            changes.put(Table.IMPRESSIONS, impression_id.encode(), encode_record(self._records[impression_id]))
        for impression_id in self._dropped:
            changes.delete(Table.IMPRESSIONS, impression_id.encode())
