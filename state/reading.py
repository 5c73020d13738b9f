"""Reading the state: typed views over one consistent read transaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from state.records import (
    SEPARATOR,
    SPACE_KEY,
    ArmRecord,
    CategoryMetricsRecord,
    Cell,
    CreativeRecord,
    ExpectationRecord,
    ForgettingRecord,
    LedgerRecord,
    OffsetRecord,
    ProductGroups,
    ProductRecord,
    ShiftRecord,
    SlopeRecord,
    decode_cell,
    split_arm_key,
    split_number_key,
    split_partition_key,
    split_place_key,
)
from state.store import ReadTransaction, Store, Table

_PRODUCT = msgspec.msgpack.Decoder(ProductRecord)
_CREATIVE = msgspec.msgpack.Decoder(CreativeRecord)
_GROUPS = msgspec.msgpack.Decoder(ProductGroups)
_OFFSET = msgspec.msgpack.Decoder(OffsetRecord)
_ARM = msgspec.msgpack.Decoder(ArmRecord)
_EXPECTATION = msgspec.msgpack.Decoder(ExpectationRecord)
_CATEGORY_METRICS = msgspec.msgpack.Decoder(CategoryMetricsRecord)
_SLOPE = msgspec.msgpack.Decoder(SlopeRecord)
_LEDGER = msgspec.msgpack.Decoder(LedgerRecord)
_FORGETTING = msgspec.msgpack.Decoder(ForgettingRecord)
_SHIFT = msgspec.msgpack.Decoder(ShiftRecord)


class StateView:
    """What the state held at one commit, as records.

    Get one from `open_view`; it is valid only inside that ``with`` block.
    """

    def __init__(self, txn: ReadTransaction) -> None:
        self._txn = txn

    def products(self) -> list[ProductRecord]:
        """Return every registered product, by id."""
        return [_PRODUCT.decode(value) for _, value in self._txn.scan(Table.PRODUCTS)]

    def creatives(self, product_id: str | None = None) -> list[CreativeRecord]:
        """Return the creatives of one product, or of all, by product and id."""
        prefix = b"" if product_id is None else product_id.encode() + SEPARATOR
        return [_CREATIVE.decode(value) for _, value in self._txn.scan(Table.CREATIVES, prefix=prefix)]

    def groups(self, product_id: str) -> ProductGroups | None:
        """Return the groups of one product, or None before its first grouping."""
        value = self._txn.get(Table.GROUPS, product_id.encode())
        return None if value is None else _GROUPS.decode(value)

    def clustering(self, product_id: str) -> bytes | None:
        """Return the clustering record of one product, undecoded (`state.records.ClusteringRecord`)."""
        return self._txn.get(Table.CLUSTERINGS, product_id.encode())

    def expectation(self, product_id: str) -> ExpectationRecord | None:
        """Return which creatives the groups of a product are expected to prefer, or None before its first grouping."""
        value = self._txn.get(Table.EXPECTATIONS, product_id.encode())
        return None if value is None else _EXPECTATION.decode(value)

    def slope(self, key: bytes) -> SlopeRecord | None:
        """Return how far expectations have proved right, by the key that `online.expectation` gives it."""
        value = self._txn.get(Table.SLOPES, key)
        return None if value is None else _SLOPE.decode(value)

    def category_metrics(self) -> list[tuple[bytes, CategoryMetricsRecord]]:
        """Return the sums of every category's predictions, by the key that `online.category_metrics` gives it."""
        return [(key, _CATEGORY_METRICS.decode(value)) for key, value in self._txn.scan(Table.CATEGORY_METRICS)]

    def cells(self, product_id: str | None = None) -> list[Cell]:
        """Return the (product, group, creative) counts of one product, or of all."""
        prefix = b"" if product_id is None else product_id.encode() + SEPARATOR
        return [decode_cell(key, value) for key, value in self._txn.scan(Table.CELLS, prefix=prefix)]

    def n_impressions(self) -> dict[str, int]:
        """Return how many impressions of each product have been counted, by id; of one without any nothing."""
        counted: dict[str, int] = {}
        for key, value in self._txn.scan(Table.CELLS):
            cell = decode_cell(key, value)
            counted[cell.product_id] = counted.get(cell.product_id, 0) + cell.n_impressions
        return counted

    def offsets(self) -> dict[tuple[str, int], OffsetRecord]:
        """Return what has been consumed, by (topic, partition)."""
        return {split_partition_key(key): _OFFSET.decode(value) for key, value in self._txn.scan(Table.OFFSETS)}

    def arms(self) -> dict[tuple[str, str, int], ArmRecord]:
        """Return the counts of the experiments, by (experiment, arm, user bucket)."""
        return {split_arm_key(key): _ARM.decode(value) for key, value in self._txn.scan(Table.ARMS)}

    def ledger(self) -> LedgerRecord:
        """Return the numbers of the ledger: what it holds, what has left it, and what has been taken back."""
        value = self._txn.get(Table.META, b"ledger")
        return LedgerRecord() if value is None else _LEDGER.decode(value)

    def forgettings(self) -> dict[tuple[str, int, int, int], ForgettingRecord]:
        """Return what forgotten users' events took back, by their place: topic, partition, offset and row."""
        return {split_place_key(key): _FORGETTING.decode(value) for key, value in self._txn.scan(Table.FORGETTINGS)}

    def shifts(self) -> list[ShiftRecord]:
        """Return every published shift, oldest first."""
        found = [_SHIFT.decode(value) for _, value in self._txn.scan(Table.SHIFTS)]
        return sorted(found, key=lambda shift: (shift.detected_at_ms, shift.event_id))

    def encoder_weights(self, version: int) -> bytes | None:
        """Return the weights of one encoder version, as the learner wrote them."""
        return self._txn.get(Table.ENCODERS, b"v" + version.to_bytes(8, "big"))

    def encoder_space(self) -> bytes | None:
        """Return what users are clustered by, as the grouping wrote it; None before the first version."""
        return self._txn.get(Table.ENCODERS, SPACE_KEY)

    def encoder_versions(self) -> list[int]:
        """Return the encoder versions that are kept, oldest first."""
        return [split_number_key(key[1:]) for key in self._txn.keys(Table.ENCODERS, prefix=b"v")]

    def meta(self, key: str) -> bytes | None:
        """Return one entry of the meta table."""
        return self._txn.get(Table.META, key.encode())

    def n_waiting_clicks(self) -> int:
        """Return how many clicks wait for their impression."""
        return self._txn.count(Table.WAITING_CLICKS)

    def n_resident_products(self) -> int:
        """Return of how many products the online process holds groups and counts in memory."""
        return self._txn.count(Table.RESIDENTS)

    def n_parked_products(self) -> int:
        """Return how many products have been shown, but not lately: they are held in the state only."""
        return self._txn.count(Table.CLUSTERINGS) - self._txn.count(Table.RESIDENTS)

    def n_outbox(self) -> int:
        """Return how many outbound messages wait for the broker."""
        return self._txn.count(Table.OUTBOX)


@contextmanager
def open_view(store: Store) -> Iterator[StateView]:
    """Open a typed view of the last commit."""
    with store.read() as txn:
        yield StateView(txn)
