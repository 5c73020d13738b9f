"""Residency: which products are held in memory; the others are parked, whole, in the state.

Everything that is learnt of a product is in the state after each commit. So a product is parked by forgetting it, and
brought in again by reading it when the stream shows it. Which ones are parked depends on the log alone: the products
whose last impression, click or label lies the most micro-batches back.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from state.records import number_key, split_number_key
from state.store import ChangeSet, ReadTransaction, Table


class Residency:
    """The resident products, the least recently active first.

    Parameters
    ----------
    resident_products
        How many there are at most between two micro-batches. One micro-batch may have more: it is worked off all the
        same, and the rest is parked after it.
    """

    def __init__(self, resident_products: int) -> None:
        self._resident_products = resident_products
        self._last_batch: dict[str, int] = {}  # least recently active first, those of one batch by their ids
        self._active: dict[str, int] = {}
        self._parked: list[str] = []

    @property
    def product_ids(self) -> list[str]:
        """The products that were resident after the last micro-batch, the least recently active first."""
        return list(self._last_batch)

    def touch(self, product_ids: Iterable[str], batch_number: int) -> list[str]:
        """Note that products are active in a micro-batch; return those that have to be brought in, each once."""
        missing = []
        for product_id in product_ids:
            if product_id not in self._active:
                self._active[product_id] = batch_number
                if product_id not in self._last_batch:
                    missing.append(product_id)
        return missing

    def park(self) -> list[str]:
        """End a micro-batch: return the products that have to be parked, the least recently active first.

        Where products were last active in the same batch, their ids decide, so that a restart parks the same.
        """
        for product_id in sorted(self._active):
            self._last_batch.pop(product_id, None)
            self._last_batch[product_id] = self._active[product_id]
        n_surplus = max(len(self._last_batch) - self._resident_products, 0)
        parked = list(islice(self._last_batch, n_surplus))
        for product_id in parked:
            del self._last_batch[product_id]
        self._parked += parked
        return parked

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""
        found = ((split_number_key(value), key.decode()) for key, value in txn.scan(Table.RESIDENTS))
        self._last_batch = {product_id: batch_number for batch_number, product_id in sorted(found)}

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        for product_id in self._active:
            changes.put(Table.RESIDENTS, product_id.encode(), number_key(self._active[product_id]))
        for product_id in self._parked:
            changes.delete(Table.RESIDENTS, product_id.encode())
        self._active.clear()
        self._parked.clear()
