"""Counts: impressions and clicks of every (product, group, creative), and of every arm.

Integers for life, and floats that decay with event time beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from state.records import (
    SEPARATOR,
    ArmRecord,
    ImpressionRecord,
    LiveRestartRecord,
    arm_key,
    cell_key,
    decode_cell,
    encode_cell,
    encode_record,
    split_arm_key,
)
from state.records import Cell as CellRecord
from state.store import ChangeSet, ReadTransaction, Table


class CellId(NamedTuple):
    """The name of a cell."""

    product_id: str
    group_id: int
    creative_id: str


class Cell(msgspec.Struct):
    """Counts of a cell; the live ones are as of ``updated_at_ms``."""

    n_impressions: int = 0
    n_clicks: int = 0
    live_impressions: float = 0.0
    live_clicks: float = 0.0
    updated_at_ms: int = 0

    def decay(self, now_ms: int, half_life_ms: float) -> None:
        """Let the live counts lose weight up to ``now_ms``; an earlier time changes nothing."""
        if now_ms > self.updated_at_ms:
            factor = 0.5 ** ((now_ms - self.updated_at_ms) / half_life_ms)
            self.live_impressions *= factor
            self.live_clicks *= factor
            self.updated_at_ms = now_ms


MIN_LIVE = 1e-6
"""A live count below which nothing is left of it."""


class TakenBack(NamedTuple):
    """An impression that is no more, or whose click is no more, in the group that has its counts now.

    ``due_ms`` is when its label was due.
    """

    record: ImpressionRecord
    group_id: int
    due_ms: int

    def is_evidence(self, from_ms: int) -> bool:
        """Return whether it was labelled since a watermark."""
        return self.record.labelled and (self.due_ms >= from_ms or self.record.counted_ms > from_ms)


class Counts:
    """Counts of arms and of the resident products' cells, with what changed since the last commit.

    Parameters
    ----------
    half_life_ms
        Time in which a live count loses half of its weight.
    most_arms
        Arms that are counted; events of further ones are left out of them.
    """

    def __init__(self, half_life_ms: float, most_arms: float = math.inf) -> None:
        self._half_life_ms = half_life_ms
        self._most_arms = most_arms
        self._arm_names: set[tuple[str, str]] = set()
        self._n_left_out = 0
        self._cells: dict[str, dict[tuple[int, str], Cell]] = {}
        self._changed_cells: dict[CellId, None] = {}
        self._arms: dict[tuple[str, str, int], list[int]] = {}
        self._changed_arms: dict[tuple[str, str, int], None] = {}
        self._restarts: dict[str, LiveRestartRecord] = {}
        self._changed_restarts: dict[str, None] = {}

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state, with its arms and no product."""
        decoder = msgspec.msgpack.Decoder(ArmRecord)
        for key, value in txn.scan(Table.ARMS):
            arm = decoder.decode(value)
            self._arms[split_arm_key(key)] = [arm.n_impressions, arm.n_clicks]
        self._arm_names = {(experiment, arm) for experiment, arm, _ in self._arms}

    def bring_in(self, product_id: str, txn: ReadTransaction) -> None:
        """Take a product's cells over from the state."""
        cells = {}
        for key, value in txn.scan(Table.CELLS, prefix=product_id.encode() + SEPARATOR):
            record = decode_cell(key, value)
            cells[record.group_id, record.creative_id] = Cell(
                record.n_impressions,
                record.n_clicks,
                record.live_impressions,
                record.live_clicks,
                record.updated_at_ms,
            )
        if cells:
            self._cells[product_id] = cells
        restart = txn.get(Table.LIVE_RESTARTS, product_id.encode())
        if restart is not None:
            self._restarts[product_id] = _RESTART.decode(restart)

    def park(self, product_id: str) -> None:
        """Forget a product's cells, all of which have been written."""
        self._cells.pop(product_id, None)
        self._restarts.pop(product_id, None)

    def count_impressions(self, impressions: Iterable[ImpressionRecord], now_ms: int) -> None:
        """Count new impressions, each in the group of its user."""
        for impression in impressions:
            cell = self._touch(impression, now_ms)
            cell.n_impressions += 1
            cell.live_impressions += 1
            self._count_arm(impression, 0)

    def count_clicks(self, impressions: Iterable[tuple[ImpressionRecord, int]], now_ms: int) -> None:
        """Count the clicks of impressions, each in the group given with it (its own, or that group's successor)."""
        for impression, group_id in impressions:
            cell = self._touch(impression, now_ms, group_id)
            cell.n_clicks += 1
            # A live click without its live impression (the counts started anew in between) would be a CTR over 1.
            cell.live_clicks = min(cell.live_clicks + 1, cell.live_impressions)
            self._count_arm(impression, 1)

    def take_back_click(self, taken: TakenBack, now_ms: int) -> None:
        """Take back the click of an impression: one for life, and what is left of it of the live counts."""
        record = taken.record
        cell = self._touch(record, now_ms, taken.group_id)
        left = self._left(taken, record.clicked_ms, now_ms, began_with=not record.clicked_late)
        cell.n_clicks -= 1
        cell.live_clicks = max(cell.live_clicks - left, 0.0) if cell.n_clicks else 0.0
        self._count_arm(record, 1, -1)

    def take_back_impression(self, taken: TakenBack, now_ms: int) -> None:
        """Take back an impression without a click, or whose click has been taken back.

        A cell without any goes, unless live counts of others have been distributed to it.
        """
        record = taken.record
        cell = self._touch(record, now_ms, taken.group_id)
        left = self._left(taken, record.counted_ms, now_ms, began_with=True)
        cell.n_impressions -= 1
        cell.live_impressions = max(cell.live_impressions - left, 0.0)
        cell.live_clicks = min(cell.live_clicks, cell.live_impressions)
        if not cell.n_impressions and cell.live_impressions < MIN_LIVE:
            del self._cells[record.product_id][taken.group_id, record.creative_id]
        self._count_arm(record, 0, -1)

    def _left(self, taken: TakenBack, counted_ms: int, now_ms: int, *, began_with: bool) -> float:
        """Return what is left of a live count.

        ``began_with``: it was among what the live counts began anew with, if its impression was.
        """
        restart = self._restarts.get(taken.record.product_id)
        if restart is not None and counted_ms <= restart.at_ms:
            counted_ms = restart.at_ms
            if not (began_with and taken.due_ms < restart.at_ms and taken.is_evidence(restart.evidence_from_ms)):
                return 0.0
        return float(0.5 ** (max(now_ms - counted_ms, 0) / self._half_life_ms))

    def _touch(self, impression: ImpressionRecord, now_ms: int, group_id: int | None = None) -> Cell:
        key = CellId(
            impression.product_id, impression.group_id if group_id is None else group_id, impression.creative_id
        )
        cells = self._cells.setdefault(key.product_id, {})
        cell = cells.get(key[1:])
        if cell is None:
            cell = cells[key[1:]] = Cell(updated_at_ms=now_ms)
        cell.decay(now_ms, self._half_life_ms)
        self._changed_cells[key] = None
        return cell

    def _count_arm(self, impression: ImpressionRecord, position: int, n: int = 1) -> None:
        if impression.experiment is None or impression.arm is None:
            return
        name = (impression.experiment, impression.arm)
        if name not in self._arm_names:
            if n < 0:
                return  # it was left out
            if len(self._arm_names) >= self._most_arms:
                self._n_left_out += 1
                return
            self._arm_names.add(name)
        counts = self._arms.setdefault((*name, impression.user_bucket), [0, 0])
        # What was left out of an arm that is counted by now is not taken back from it.
        counts[position] = max(counts[position] + n, 0)
        counts[1] = min(counts)
        key = (*name, impression.user_bucket)
        self._changed_arms[key] = None

    def take_left_out(self) -> int:
        """Return how many events have been left out of the arms since the last call."""
        n_left_out, self._n_left_out = self._n_left_out, 0
        return n_left_out

    def cells_of(self, product_id: str) -> dict[tuple[int, str], Cell]:
        """Return a product's cells by (group, creative)."""
        return self._cells.get(product_id, {})

    def hand_over(self, product_id: str, old_id: int, heir_id: int, now_ms: int) -> None:
        """Add a group's counts to those of the group that it merged into; the old cells are gone."""
        cells = self._cells.get(product_id, {})
        for group_id, creative_id in [key for key in cells if key[0] == old_id]:
            old = cells.pop((group_id, creative_id))
            heir = cells.setdefault((heir_id, creative_id), Cell(updated_at_ms=now_ms))
            old.decay(now_ms, self._half_life_ms)
            heir.decay(now_ms, self._half_life_ms)
            heir.n_impressions += old.n_impressions
            heir.n_clicks += old.n_clicks
            heir.live_impressions += old.live_impressions
            heir.live_clicks += old.live_clicks
            self._changed_cells[CellId(product_id, old_id, creative_id)] = None
            self._changed_cells[CellId(product_id, heir_id, creative_id)] = None

    def distribute_live(self, product_id: str, remembered: dict[tuple[int, str], tuple[int, int]], now_ms: int) -> None:
        """Distribute live counts anew over a product's groups, as far as it is remembered of whom they are.

        What is remembered of a creative is taken from its cells, from each the same share, and put where it belongs.
        The creative's totals stay.

        Parameters
        ----------
        product_id
            The product.
        remembered
            Impressions and clicks, by (group, creative).
        now_ms
            Event time.
        """
        cells = self._cells.get(product_id, {})
        for creative_id in dict.fromkeys(creative_id for _, creative_id in remembered):
            known = {key: counts for key, counts in remembered.items() if key[1] == creative_id}
            for key in known:
                cells.setdefault(key, Cell(updated_at_ms=now_ms))
            of_creative = {key: cell for key, cell in cells.items() if key[1] == creative_id}
            for cell in of_creative.values():
                cell.decay(now_ms, self._half_life_ms)
            n_known, n_clicks_known = (sum(counts[place] for counts in known.values()) for place in (0, 1))
            total = sum(cell.live_impressions for cell in of_creative.values())
            clicks = sum(cell.live_clicks for cell in of_creative.values())
            share = min(1.0, n_known / total) if total else 0.0
            for key, cell in of_creative.items():
                n, n_clicks = known.get(key, (0, 0))
                of_clicks = n_clicks / n_clicks_known if n_clicks_known else n / n_known
                cell.live_impressions += share * (total * n / n_known - cell.live_impressions)
                cell.live_clicks += share * (clicks * of_clicks - cell.live_clicks)
                # Where more of the clicks than of the impressions were before what is remembered.
                cell.live_clicks = min(cell.live_clicks, cell.live_impressions)
                self._changed_cells[CellId(product_id, *key)] = None

    def restart_live(
        self, product_id: str, live: dict[tuple[int, str], tuple[int, int]], now_ms: int, evidence_from_ms: int
    ) -> None:
        """Set a product's live counts to what was seen since its tastes changed: (impressions, clicks) by cell.

        It was labelled since the watermark ``evidence_from_ms``.
        """
        self._restarts[product_id] = LiveRestartRecord(now_ms, evidence_from_ms)
        self._changed_restarts[product_id] = None
        cells = self._cells.get(product_id, {})
        for key, cell in cells.items():
            n_impressions, n_clicks = live.get(key, (0, 0))
            cell.live_impressions, cell.live_clicks = float(n_impressions), float(n_clicks)
            cell.updated_at_ms = max(cell.updated_at_ms, now_ms)
            self._changed_cells[CellId(product_id, *key)] = None

    def write(self, changes: ChangeSet) -> None:
        """Write the cells and arms that have changed since the last call."""
        for key in self._changed_cells:
            found = self._cells.get(key.product_id, {}).get(key[1:])
            if found is None:
                changes.delete(Table.CELLS, cell_key(*key))
            else:
                record = CellRecord(*key, *msgspec.structs.astuple(found))
                changes.put(Table.CELLS, cell_key(*key), encode_cell(record))
        for arm in self._changed_arms:
            changes.put(Table.ARMS, arm_key(*arm), encode_record(ArmRecord(*self._arms[arm])))
        for product_id in self._changed_restarts:
            changes.put(Table.LIVE_RESTARTS, product_id.encode(), encode_record(self._restarts[product_id]))
        self._changed_cells.clear()
        self._changed_arms.clear()
        self._changed_restarts.clear()


_RESTART = msgspec.msgpack.Decoder(LiveRestartRecord)
