"""Parts: what is learnt, piece by piece, as it is kept in the state."""

from __future__ import annotations

from typing import Protocol

from state.store import ChangeSet, ReadTransaction


class Part(Protocol):
    """A part of what is learnt that is kept in the state."""

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""


class ProductPart(Part, Protocol):
    """A part that knows something of every product: in memory of those that are resident, in the state of all."""

    def bring_in(self, product_id: str, txn: ReadTransaction) -> None:
        """Take a product over from the state as it was parked; of one that the state knows nothing of, nothing."""

    def park(self, product_id: str) -> None:
        """Forget a product. Everything that changed of it has been written, so the state holds it whole."""
