"""Traces: where a state still holds something of a user."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Collection

import msgspec
import numpy as np

from online.ledger import Ledger
from online.replay import unpack_rows
from state.records import ClusteringRecord, ImpressionRecord, LedgerBlock, OutboxRecord
from state.store import ReadTransaction, Table
from streams.events import DeadLetter


def traces(
    txn: ReadTransaction,
    user_id: str,
    impression_ids: Collection[str],
    ledger: Ledger,
    codes: bytes | None,
) -> list[str]:
    """Return where a user is found: by id, by the ids of impressions, by hash, by key, or by attributes.

    Every key and value of every table is searched for the ids and the hash. ``codes`` are the attributes of a user who
    has them alone; None: others have them too.
    """
    user_hash = ledger.user_hash(user_id)
    needles = [user_id.encode(), *(name.encode() for name in impression_ids)]
    hashes = [user_hash.to_bytes(8, "little"), user_hash.to_bytes(8, "big")]
    found = []
    for table in Table:
        for key, value in txn.scan(table):
            haystack = b"\n".join([key, value, *_unpacked(table, value)])
            found += [f"{table}: {needle!r}" for needle in (*needles, *hashes) if needle in haystack]
    key_bytes = np.uint32(zlib.crc32(user_id.encode()))
    for _, value in txn.scan(Table.CLUSTERINGS):
        clustering = msgspec.msgpack.decode(value, type=ClusteringRecord)
        if (np.frombuffer(clustering.user_keys, np.uint32) == key_bytes).any():
            found.append("clusterings: its key")
    if codes is not None:
        found += [f"{name}: its attributes" for name, rows in _attributes(txn, len(codes)) if codes in rows]
    return found


def _unpacked(table: Table, value: bytes) -> list[bytes]:
    """Return what lies in base64 in a dead letter that waits."""
    if table is not Table.OUTBOX:
        return []
    payload = msgspec.msgpack.decode(value, type=OutboxRecord).payload
    try:
        return [base64.b64encode(b"") + msgspec.json.decode(payload, type=DeadLetter).payload]
    except msgspec.ValidationError:
        return []


def _attributes(txn: ReadTransaction, n_fields: int) -> list[tuple[str, set[bytes]]]:
    """Return the attributes of every single user that the state holds, by table."""
    samples, replayed, kept = set(), set(), set()
    for _, value in txn.scan(Table.CLUSTERINGS):
        reservoir = msgspec.msgpack.decode(value, type=ClusteringRecord).reservoir
        samples |= {reservoir[start : start + n_fields] for start in range(0, len(reservoir), n_fields)}
    for _, value in txn.scan(Table.REPLAY):
        replayed |= {row.tobytes() for row in unpack_rows(value, n_fields).rows.attributes}
    for _, value in txn.scan(Table.IMPRESSIONS):
        kept.add(msgspec.msgpack.decode(value, type=ImpressionRecord).attributes)
    for _, value in txn.scan(Table.LEDGER):
        block = msgspec.msgpack.decode(value, type=LedgerBlock)
        records = [detail for kind, detail in zip(block.kinds, block.details, strict=True) if kind == 0]
        kept |= {msgspec.msgpack.decode(record, type=ImpressionRecord).attributes for record in records}
    return [("samples", samples), ("replay", replayed), ("impressions and ledger", kept)]
