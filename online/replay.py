"""Replay: the last labelled rows, from which each step learns some again.

A label that was taken back is not replayed: neither the row that it was given to nor the one that took it back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from online.rows import LabelledRows, Rows

Ints = npt.NDArray[np.int64]

NO_ROWS = LabelledRows(
    Rows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 0), np.uint8)),
    np.zeros(0, np.float32),
    np.zeros(0, np.float32),
)


TAKEN_BACK = 2


@dataclass
class _Block:
    """The rows of one micro-batch, taken back or given as they were learnt, and which of them count: ``live`` is 1."""

    number: int
    rows: LabelledRows
    live: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)


class Replay:
    """The last labelled rows, in blocks of one micro-batch."""

    def __init__(self, n_rows_kept: int) -> None:
        self._n_rows_kept = n_rows_kept
        self._blocks: deque[_Block] = deque()
        self._n_rows = 0
        self._all: tuple[LabelledRows, Ints] | None = None
        self._substitutes: tuple[dict[int, int], Ints] | None = None

    @property
    def oldest(self) -> int:
        """Return the number of the oldest block that is kept; 0 without any."""
        return self._blocks[0].number if self._blocks else 0

    def append(self, number: int, rows: LabelledRows) -> list[int]:
        """Append a block; return the numbers of those that fell out."""
        self._blocks.append(_Block(number, rows, np.maximum(rows.weights, 0)))
        for row in np.flatnonzero(rows.weights < 0):
            self._cancel(rows, int(row))
        self._n_rows += len(rows)
        self._all = None
        dropped = []
        while self._n_rows - len(self._blocks[0]) >= self._n_rows_kept:
            old = self._blocks.popleft()
            self._n_rows -= len(old)
            dropped.append(old.number)
        return dropped

    def forget(self, rows: LabelledRows) -> dict[int, LabelledRows]:
        """Remove rows as if they had never been there, those taken back too; return the blocks as they are left.

        Of equal rows the newest goes: any does. One that has fallen out is passed over. ``rows`` are all of their
        impressions', so that each label that is taken back is among those given.
        """
        changed: dict[int, _Block] = {}
        stands = rows.weights > 0
        for row in np.flatnonzero(rows.weights < 0):
            # With a label that was taken back the row goes that it was given to.
            stands[_equal(rows, rows, int(row), stands)[0]] = False
            if self._remove(rows, int(row), changed, sign=-1, live=0):
                self._remove(rows, int(row), changed, sign=1, live=0)
        for row in np.flatnonzero(stands):
            self._remove(rows, int(row), changed, sign=1, live=1)
        self._blocks = deque(block for block in self._blocks if len(block))
        return {number: block.rows for number, block in changed.items()}

    def _remove(self, rows: LabelledRows, row: int, changed: dict[int, _Block], *, sign: int, live: int) -> bool:
        for block in reversed(self._blocks):
            found = _equal(block.rows, rows, row, (block.rows.weights == sign) & (block.live == live))
            if len(found):
                kept = np.arange(len(block)) != found[-1]
                block.rows, block.live = block.rows.take(kept), block.live[kept]
                self._n_rows -= 1
                self._all = None
                changed[block.number] = block
                return True
        return False

    def _cancel(self, taken_back: LabelledRows, row: int) -> None:
        """Give weight 0 to the newest row that is equal to one whose label is taken back; it may have fallen out.

        Any equal row does, and the newest is the same after a restart, when those that fell out are not there.
        """
        for block in reversed(self._blocks):
            found = _equal(block.rows, taken_back, row, block.live > 0)
            if len(found):
                block.live[found[-1]] = 0
                self._all = None
                return

    def _rows(self) -> tuple[LabelledRows, Ints]:
        """Return all rows, and the block that each is of."""
        if self._all is None:
            self._substitutes = None
            self._all = (
                LabelledRows.concatenate(
                    [LabelledRows(block.rows.rows, block.rows.clicks, block.live) for block in self._blocks]
                ),
                np.concatenate([np.full(len(block), block.number) for block in self._blocks]),
            )
        return self._all

    def sample(self, n_rows: int, floors: dict[int, int], rng: np.random.Generator) -> LabelledRows:
        """Return up to ``n_rows`` rows, drawn uniformly, without those whose label was taken back.

        In place of rows below their product's floor others come that such products have above it, so that what is
        learnt anew keeps its share.
        """
        if not self._blocks or not n_rows:
            return NO_ROWS
        rows, _ = self._rows()
        index = rng.integers(len(rows), size=n_rows)
        if floors:
            index = self._above_floors(index, floors, rng)
        return rows.take(index[rows.weights[index] > 0])

    def of_product(self, product: int, floor: int) -> LabelledRows:
        """Return a product's rows from block ``floor`` on, without those whose label was taken back."""
        if not self._blocks:
            return NO_ROWS
        rows, numbers = self._rows()
        return rows.take((rows.rows.products == product) & (numbers >= floor) & (rows.weights > 0))

    def _above_floors(self, index: Ints, floors: dict[int, int], rng: np.random.Generator) -> Ints:
        rows, numbers = self._rows()
        lost = _below(rows.rows.products[index], numbers[index], floors)
        substitutes = self._substitutes_for(floors)
        if len(substitutes):
            index[lost] = substitutes[rng.integers(len(substitutes), size=int(lost.sum()))]
            return index
        kept: Ints = index[~lost]
        return kept

    def _substitutes_for(self, floors: dict[int, int]) -> Ints:
        """Return the rows above their floor, of products that have one; found once for the same rows and floors."""
        if self._substitutes is None or self._substitutes[0] != floors:
            rows, numbers = self._rows()
            floored = np.isin(rows.rows.products, list(floors))
            found: Ints = np.flatnonzero(floored & ~_below(rows.rows.products, numbers, floors))
            self._substitutes = dict(floors), found
        return self._substitutes[1]


def _equal(rows: LabelledRows, others: LabelledRows, row: int, among: npt.NDArray[np.bool_]) -> Ints:
    """Return which of some rows are equal to one of others, label included."""
    equal = among & (rows.rows.creatives == others.rows.creatives[row])
    equal &= (rows.rows.products == others.rows.products[row]) & (rows.clicks == others.clicks[row])
    found = np.flatnonzero(equal)
    alike: Ints = found[(rows.rows.attributes[found] == others.rows.attributes[row]).all(axis=1)]
    return alike


def _below(products: Ints, numbers: Ints, floors: dict[int, int]) -> npt.NDArray[np.bool_]:
    """Return which rows are of a block before their product's floor."""
    below = np.zeros(len(products), np.bool_)
    for product, floor in floors.items():
        below |= (products == product) & (numbers < floor)
    return below


def pack_rows(labelled: LabelledRows) -> bytes:
    """Return labelled rows as bytes: product and creative (uint32), label and attributes (uint8 each).

    The label is 1 for a click and 0 for none, with 2 added where it is taken back.
    """
    packed = np.empty(len(labelled), _row_dtype(labelled.rows.attributes.shape[1]))
    packed["product"] = labelled.rows.products
    packed["creative"] = labelled.rows.creatives
    packed["label"] = labelled.clicks + TAKEN_BACK * (labelled.weights < 0)
    packed["attributes"] = labelled.rows.attributes
    return packed.tobytes()


def unpack_rows(block: bytes, n_fields: int) -> LabelledRows:
    """Return the labelled rows of bytes that `pack_rows` made."""
    packed = np.frombuffer(block, _row_dtype(n_fields))
    return LabelledRows(
        Rows(packed["product"].astype(np.int64), packed["creative"].astype(np.int64), packed["attributes"].copy()),
        (packed["label"] % TAKEN_BACK).astype(np.float32),
        np.where(packed["label"] < TAKEN_BACK, 1, -1).astype(np.float32),
    )


def _row_dtype(n_fields: int) -> np.dtype[np.void]:
    return np.dtype([("product", "<u4"), ("creative", "<u4"), ("label", "u1"), ("attributes", "u1", (n_fields,))])
