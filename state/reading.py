"""Reading the state: typed views over one consistent read transaction of each of its shards."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import TracebackType

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
    WaitingClickRecord,
    decode_cell,
    split_arm_key,
    split_number_key,
    split_partition_key,
    split_place_key,
)
from state.shards import shard_folders
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
_WAITING_CLICK = msgspec.msgpack.Decoder(WaitingClickRecord)
_SHIFT = msgspec.msgpack.Decoder(ShiftRecord)


class StateView:
    """What a state held at one commit of each of its shards, as records.

    Get one from `open_view` or `StateReader.view`; it is valid only inside that ``with`` block. Whatever is numbered
    anew by every shard (encoder versions, registrations) is asked for by product.

    Parameters
    ----------
    txns
        The shards' transactions, by shard.
    """

    def __init__(self, txns: Mapping[int, ReadTransaction]) -> None:
        self._txns = txns
        self._shard_of: dict[str, int] = {}

    def shard_of(self, product_id: str) -> int:
        """Return the shard that a product belongs to; the first one for a product that none has registered."""
        if len(self._txns) == 1:
            return next(iter(self._txns))
        found = self._shard_of.get(product_id)
        if found is None:
            key = product_id.encode()
            having = (shard for shard, txn in self._txns.items() if txn.get(Table.PRODUCTS, key) is not None)
            found = self._shard_of[product_id] = next(having, next(iter(self._txns)))
        return found

    def _of(self, product_id: str) -> ReadTransaction:
        return self._txns[self.shard_of(product_id)]

    def _scan(self, table: Table, product_id: str | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield the entries of one product, or of all shards in key order."""
        if product_id is not None:
            return self._of(product_id).scan(table, prefix=product_id.encode() + SEPARATOR)
        return heapq.merge(*(txn.scan(table) for txn in self._txns.values()))

    def _count(self, table: Table) -> int:
        return sum(txn.count(table) for txn in self._txns.values())

    def products(self) -> list[ProductRecord]:
        """Return every registered product, by id."""
        return [_PRODUCT.decode(value) for _, value in self._scan(Table.PRODUCTS)]

    def creatives(self, product_id: str | None = None) -> list[CreativeRecord]:
        """Return the creatives of one product, or of all, by product and id."""
        return [_CREATIVE.decode(value) for _, value in self._scan(Table.CREATIVES, product_id)]

    def groups(self, product_id: str) -> ProductGroups | None:
        """Return the groups of one product, or None before its first grouping."""
        value = self._of(product_id).get(Table.GROUPS, product_id.encode())
        return None if value is None else _GROUPS.decode(value)

    def clustering(self, product_id: str) -> bytes | None:
        """Return the clustering record of one product, undecoded (`state.records.ClusteringRecord`)."""
        return self._of(product_id).get(Table.CLUSTERINGS, product_id.encode())

    def expectation(self, product_id: str) -> ExpectationRecord | None:
        """Return which creatives the groups of a product are expected to prefer, or None before its first grouping."""
        value = self._of(product_id).get(Table.EXPECTATIONS, product_id.encode())
        return None if value is None else _EXPECTATION.decode(value)

    def slope(self, product_id: str, key: bytes) -> SlopeRecord | None:
        """Return how far a product's expectations have proved right, by the key that `online.expectation` gives it."""
        value = self._of(product_id).get(Table.SLOPES, key)
        return None if value is None else _SLOPE.decode(value)

    def category_metrics(self) -> list[tuple[bytes, CategoryMetricsRecord]]:
        """Return the sums of every category's predictions, by the key that `online.category_metrics` gives it.

        A category whose products lie in several shards is there once for each.
        """
        return [(key, _CATEGORY_METRICS.decode(value)) for key, value in self._scan(Table.CATEGORY_METRICS)]

    def cells(self, product_id: str | None = None) -> list[Cell]:
        """Return the (product, group, creative) counts of one product, or of all."""
        return [decode_cell(key, value) for key, value in self._scan(Table.CELLS, product_id)]

    def cells_by_product(self) -> Iterator[tuple[str, list[Cell]]]:
        """Yield the products of which anything has been counted, by id, each with its counts."""
        cells = (decode_cell(key, value) for key, value in self._scan(Table.CELLS))
        for product_id, of_product in groupby(cells, key=attrgetter("product_id")):
            yield product_id, list(of_product)

    def offsets(self) -> dict[tuple[str, int], OffsetRecord]:
        """Return what has been consumed, by (topic, partition)."""
        return {split_partition_key(key): _OFFSET.decode(value) for key, value in self._scan(Table.OFFSETS)}

    def arms(self) -> dict[tuple[str, str, int], ArmRecord]:
        """Return the counts of the experiments, by (experiment, arm, user bucket)."""
        found: dict[tuple[str, str, int], ArmRecord] = {}
        for key, value in self._scan(Table.ARMS):
            name, arm = split_arm_key(key), _ARM.decode(value)
            before = found.get(name, ArmRecord(0, 0))
            found[name] = ArmRecord(before.n_impressions + arm.n_impressions, before.n_clicks + arm.n_clicks)
        return found

    def ledger(self) -> LedgerRecord:
        """Return the numbers of the ledger, over all shards: what it holds, what has left it, what was taken back."""
        total = Counter[str]()
        for value in self.meta("ledger"):
            numbers = msgspec.structs.asdict(_LEDGER.decode(value))
            total.update({name: n for name, n in numbers.items() if name not in ("key_mark", "open_block")})
        return msgspec.structs.replace(LedgerRecord(), **total)

    def forgettings(self) -> dict[tuple[str, int, int, int], ForgettingRecord]:
        """Return what forgotten users' events took back, by their place: topic, partition, offset and row."""
        return {split_place_key(key): _FORGETTING.decode(value) for key, value in self._scan(Table.FORGETTINGS)}

    def shifts(self) -> list[ShiftRecord]:
        """Return every published shift, oldest first."""
        found = [_SHIFT.decode(value) for _, value in self._scan(Table.SHIFTS)]
        return sorted(found, key=lambda shift: (shift.detected_at_ms, shift.event_id))

    def waiting_clicks(self) -> list[WaitingClickRecord]:
        """Return the clicks that wait for their impression."""
        return [_WAITING_CLICK.decode(value) for _, value in self._scan(Table.WAITING_CLICKS)]

    def encoder_weights(self, shard: int, version: int) -> bytes | None:
        """Return the weights of one encoder version of a shard, as the learner wrote them."""
        return self._txns[shard].get(Table.ENCODERS, b"v" + version.to_bytes(8, "big"))

    def encoder_spaces(self) -> set[bytes | None]:
        """Return what users are clustered by, as the grouping wrote it; None before a shard's first version."""
        return {txn.get(Table.ENCODERS, SPACE_KEY) for txn in self._txns.values()}

    def replay_blocks(self) -> dict[int, list[bytes]]:
        """Return the blocks of rows kept for replay, as `online.replay` packed them, by shard, the oldest first."""
        return {shard: [block for _, block in txn.scan(Table.REPLAY)] for shard, txn in self._txns.items()}

    def encoder_versions(self) -> list[tuple[int, int]]:
        """Return the encoder versions that are kept, as (shard, version), each shard's oldest first."""
        return [
            (shard, split_number_key(key[1:]))
            for shard, txn in self._txns.items()
            for key in txn.keys(Table.ENCODERS, prefix=b"v")
        ]

    def meta(self, key: str) -> list[bytes]:
        """Return one entry of the meta table, of every shard that has it."""
        found = (txn.get(Table.META, key.encode()) for txn in self._txns.values())
        return [value for value in found if value is not None]

    def n_entries(self) -> dict[str, int]:
        """Return how many entries each table has."""
        return {table.value: self._count(table) for table in Table}

    def n_waiting_clicks(self) -> int:
        """Return how many clicks wait for their impression."""
        return self._count(Table.WAITING_CLICKS)

    def n_pending_impressions(self) -> int:
        """Return how many impressions are kept for their clicks."""
        return self._count(Table.IMPRESSIONS)

    def n_resident_products(self) -> int:
        """Return of how many products the online process holds groups and counts in memory."""
        return self._count(Table.RESIDENTS)

    def n_parked_products(self) -> int:
        """Return how many products have been shown, but not lately: they are held in the state only."""
        return self._count(Table.CLUSTERINGS) - self._count(Table.RESIDENTS)

    def n_outbox(self) -> int:
        """Return how many outbound messages wait for the broker."""
        return self._count(Table.OUTBOX)


class StateReader:
    """A state that is open for reading, with all of its shards.

    Parameters
    ----------
    path
        Folder of the state.
    map_size_mib
        First size of each memory map, MiB.

    Raises
    ------
    state.errors.StateError
        There is no state, or it cannot be used.
    """

    def __init__(self, path: Path, *, map_size_mib: int = 1024) -> None:
        self._path = path
        self._map_size_mib = map_size_mib
        self._stores: dict[int, Store] = {}
        self._is_whole = False
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, store: Store) -> StateReader:
        """Return a reader of a store that this process has open already: LMDB opens an environment once a process."""
        reader = cls.__new__(cls)
        reader._stores, reader._is_whole = {0: store}, True
        return reader

    def _open(self) -> None:
        """Open the shards that have come since the last call."""
        if self._is_whole:
            return
        for shard, folder in shard_folders(self._path).items():
            if shard not in self._stores:
                self._stores[shard] = Store(folder, readonly=True, map_size_mib=self._map_size_mib)

    @contextmanager
    def view(self) -> Iterator[StateView]:
        """Open a typed view of the last commit of every shard that is there by now."""
        self._open()
        with ExitStack() as open_txns:
            txns = {shard: open_txns.enter_context(store.read()) for shard, store in self._stores.items()}
            yield StateView(txns)

    @property
    def stores(self) -> dict[int, Store]:
        """The shards' stores."""
        return dict(self._stores)

    def close(self) -> None:
        """Close every shard."""
        for store in self._stores.values():
            store.close()

    def __enter__(self) -> StateReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def open_view(store: Store) -> Iterator[StateView]:
    """Open a typed view of the last commit of one store, which is the state's only shard."""
    with store.read() as txn:
        yield StateView({0: txn})
