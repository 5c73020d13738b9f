"""Expectation: which creatives the preference model expects each group to prefer, and how far it has proved right.

A group's counts of a creative are few for long; what the model has learnt of the group's users from all products is
there at once, and for a creative that nobody has been shown yet. It enters as the mean towards which a cell's CTR is
shrunk, weighed by a calibration slope: how much of the expected differences the clicks since then have shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from online.ctr import ShrunkCtr, scale, shrink
from online.rows import LabelledRows
from state.reading import StateView
from state.records import ExpectationRecord, SlopeRecord, encode_record, scope_key
from state.store import ChangeSet, ReadTransaction, Table

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HALF_LIFE_ROWS = 10_000.0
"""Impressions of a category after which one counts half in its slope."""

OVERALL_HALF_LIFE_ROWS = 100_000.0
"""The same of all impressions in the slope of all categories together."""

PRIOR_INFORMATION = 4.0
"""What a belief held beforehand is worth: that the model knows nothing, and of a category that it is as the others.

About 10,000 impressions at first, at a CTR of 5%.
"""

CAUTION = 1.0
"""Standard errors that are taken off the slope of all categories: at first it is above 0 by chance half of the time."""

DISTRUST = 10 * PRIOR_INFORMATION
"""Information against the model with which a category starts anew when its tastes have changed."""

MAX_SLOPE = 2.0
"""How many times the expected differences are believed, at most: the model's are too small, as its weights are decayed.

In world 101 the true ones were 1.3 times as large after 2,500 and after 6,250 impressions a product.
"""

MAX_LOG_RELATIVE = 2.0

_EXPECTATION = msgspec.msgpack.Decoder(ExpectationRecord)
_SLOPE = msgspec.msgpack.Decoder(SlopeRecord)


def expected_log_relative(p_click: npt.NDArray[np.float32], labels: Ints, n_groups: int) -> npt.NDArray[np.float32]:
    """Return how much more than all users, relatively, a group is expected to click each creative, (G, C) logarithms.

    What a group clicks more on all creatives is taken out: only its preference among them remains.

    Parameters
    ----------
    p_click
        Click probabilities of some users for each creative, (U, C).
    labels
        The users' groups, (U,): places from 0 on.
    n_groups
        How many groups there are, G; one without a user is expected to be as all are.
    """
    p = np.clip(p_click.astype(np.float64), 1e-6, 1 - 1e-6)
    sizes = np.bincount(labels, minlength=n_groups)
    sums = np.zeros((n_groups, p.shape[1]))
    np.add.at(sums, labels, p)
    mean = p.mean(axis=0)  # (C,)
    log_relative = np.log(np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], mean) / mean)
    log_relative -= log_relative.mean(axis=1, keepdims=True)
    return np.asarray(np.clip(log_relative, -MAX_LOG_RELATIVE, MAX_LOG_RELATIVE), np.float32)


def slope(of_all: SlopeRecord | None, of_category: SlopeRecord | None) -> float:
    """Return a category's calibration slope: 0 where nothing speaks for what is expected, 1 where it is as expected.

    Beyond 1 the differences are larger than expected.

    What is believed of all categories is what has been shown of them, `CAUTION` standard errors below the estimate.
    """
    shown = _slope(of_all, 0.0) - CAUTION / math.sqrt((of_all or _NOTHING).information + PRIOR_INFORMATION)
    return min(max(_slope(of_category, max(shown, 0.0)), 0.0), MAX_SLOPE)


_NOTHING = SlopeRecord(0.0, 0.0)


def _slope(record: SlopeRecord | None, before: float) -> float:
    found = record or _NOTHING
    return (found.score + PRIOR_INFORMATION * before) / (found.information + PRIOR_INFORMATION)


def relative_ctrs(
    expected: ExpectationRecord | None, weight: float, group_ids: Sequence[int], creatives: Sequence[int]
) -> Floats:
    """Return the CTR of each group relative to all users' for each creative, as expected, (G, C); 1 where unknown.

    Parameters
    ----------
    expected
        What is expected of the product.
    weight
        The slope of its category.
    group_ids, creatives
        Groups, and the creatives' registration numbers.
    """
    relative = np.ones((len(group_ids), len(creatives)))
    if expected is None:
        return relative
    rows = {group_id: row for row, group_id in enumerate(expected.group_ids)}
    columns = {number: column for column, number in enumerate(expected.creatives)}
    table = _table(expected)
    for row, group_id in enumerate(group_ids):
        for column, number in enumerate(creatives):
            if group_id in rows and number in columns:
                relative[row, column] = np.exp(weight * table[rows[group_id], columns[number]])
    return relative


def group_ctrs(
    for_all: ShrunkCtr, n_impressions: Floats, n_clicks: Floats, relative: Floats, *, spread: float, distinct: bool
) -> ShrunkCtr:
    """Return the CTRs of groups, by which a creative is chosen for each; how sure they are, given the product's CTR.

    Where the groups have been shown to differ their own counts decide, shrunk towards what is expected of them.
    Elsewhere a group's counts would be noise; it has all users' CTRs, and of the model's what has proved right.

    Parameters
    ----------
    for_all
        All users' CTRs, (1, C), given the product's.
    n_impressions, n_clicks, relative
        The groups' counts, and what `relative_ctrs` expects, (G, C).
    spread
        That of the creatives of all products (`online.ctr.creative_spread`).
    distinct
        Whether the groups have been shown to differ.
    """
    if distinct:
        return shrink(n_impressions, n_clicks, relative=relative, given_product=True, spread=spread)
    return scale(for_all, relative)


def read_relative_ctrs(
    view: StateView, product_id: str, category: str | None, group_ids: Sequence[int], creatives: Sequence[int]
) -> Floats:
    """Return `relative_ctrs` of a product from the state."""
    weight = slope(*(view.slope(product_id, key) for key in _keys(product_id, category)))
    return relative_ctrs(view.expectation(product_id), weight, group_ids, creatives)


class Expectations:
    """What is expected of resident products' groups; the slopes, of all and of each category (or product without)."""

    def __init__(self) -> None:
        self._products: dict[str, ExpectationRecord] = {}
        self._slopes: dict[bytes, SlopeRecord] = {}
        self._changed_products: dict[str, None] = {}
        self._changed_slopes: dict[bytes, None] = {}

    def put(
        self,
        product_id: str,
        group_ids: list[int],
        creatives: list[int],
        log_relative: npt.NDArray[np.float32],
        n_impressions: int,
    ) -> None:
        """Set what is expected of a product's groups, (G, C), after ``n_impressions``; see `expected_log_relative`."""
        self._products[product_id] = ExpectationRecord(group_ids, creatives, log_relative.tobytes(), n_impressions)
        self._changed_products[product_id] = None

    def n_impressions(self) -> dict[str, int]:
        """Return after how many of its impressions the model was last asked about each resident product."""
        return {product_id: expected.n_impressions for product_id, expected in self._products.items()}

    def creatives(self, product_id: str) -> list[int]:
        """Return the creatives, by registration number, of which anything is expected."""
        expected = self._products.get(product_id)
        return [] if expected is None else expected.creatives

    def relative_ctrs(
        self, product_id: str, category: str | None, group_ids: Sequence[int], creatives: Sequence[int]
    ) -> Floats:
        """Return the groups' CTRs relative to all users', (G, C), as far as they have proved right."""
        weight = slope(*(self._slopes.get(key) for key in _keys(product_id, category)))
        return relative_ctrs(self._products.get(product_id), weight, group_ids, creatives)

    def observe_many(
        self,
        product_id: str,
        category: str | None,
        group_ids: Ints,
        given: LabelledRows,
        p_click: npt.NDArray[np.float32],
    ) -> None:
        """Learn from labelled impressions of a product how far what is expected of its groups is right.

        It is one Newton step of a logistic regression of the clicks on the expected differences, from a slope of 0.

        Parameters
        ----------
        product_id, category
            The product.
        group_ids
            The users' present groups, (B,).
        given, p_click
            What happened, and its predicted probability before it was learnt, (B,).
        """
        expected = self._products.get(product_id)
        if expected is None:
            return
        log_relative = _looked_up(expected, group_ids, given.rows.creatives)  # (B,)
        p = np.clip(p_click.astype(np.float64), 1e-6, 1 - 1e-6)
        without = 1 / (1 + (1 - p) / p * np.exp(log_relative))
        score = float((given.weights * (given.clicks - without) * log_relative).sum())
        information = float((given.weights * without * (1 - without) * log_relative**2).sum())
        for key, half_life in zip(_keys(product_id, category), (OVERALL_HALF_LIFE_ROWS, HALF_LIFE_ROWS), strict=True):
            old = self._slopes.get(key, SlopeRecord(0.0, 0.0))
            kept = 0.5 ** (float(given.weights.sum()) / half_life)
            self._slopes[key] = SlopeRecord(kept * old.score + score, kept * old.information + information)
            self._changed_slopes[key] = None

    def restart(self, product_id: str, category: str | None) -> None:
        """Expect nothing of a category until it proves right again: its tastes have changed."""
        key = scope_key(product_id, category)
        self._slopes[key] = SlopeRecord(0.0, DISTRUST)
        self._changed_slopes[key] = None

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state, with the slopes of all and of its categories, and no product."""
        for prefix in (_OVERALL, scope_key("", "")):
            for key, value in txn.scan(Table.SLOPES, prefix=prefix):
                self._slopes[key] = _SLOPE.decode(value)

    def bring_in(self, product_id: str, txn: ReadTransaction) -> None:
        """Take over from the state what is expected of a product's groups, and its slope if it has one of its own."""
        value = txn.get(Table.EXPECTATIONS, product_id.encode())
        if value is not None:
            self._products[product_id] = _EXPECTATION.decode(value)
        own = scope_key(product_id, None)
        value = txn.get(Table.SLOPES, own)
        if value is not None:
            self._slopes[own] = _SLOPE.decode(value)

    def park(self, product_id: str) -> None:
        """Forget what is expected of a product's groups and its own slope, which have been written."""
        self._products.pop(product_id, None)
        self._slopes.pop(scope_key(product_id, None), None)

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        for product_id in self._changed_products:
            changes.put(Table.EXPECTATIONS, product_id.encode(), encode_record(self._products[product_id]))
        for key in self._changed_slopes:
            changes.put(Table.SLOPES, key, encode_record(self._slopes[key]))
        self._changed_products.clear()
        self._changed_slopes.clear()


_OVERALL = b"all"


def _keys(product_id: str, category: str | None) -> tuple[bytes, bytes]:
    """Return the keys of the slope of all categories and of a product's own."""
    return _OVERALL, scope_key(product_id, category)


def _table(expected: ExpectationRecord) -> npt.NDArray[np.float32]:
    return np.frombuffer(expected.log_relative, np.float32).reshape(len(expected.group_ids), len(expected.creatives))


def _looked_up(expected: ExpectationRecord, group_ids: Ints, creatives: Ints) -> Floats:
    """Return what is expected of each row's group and creative, (B,); 0 where nothing is."""
    groups, numbers = np.array(expected.group_ids), np.array(expected.creatives)
    order = np.argsort(groups)
    rows = order[np.searchsorted(groups[order], group_ids).clip(max=len(groups) - 1)]
    columns = np.searchsorted(numbers, creatives).clip(max=len(numbers) - 1)  # numbers are in order
    known = (groups[rows] == group_ids) & (numbers[columns] == creatives)
    return np.where(known, _table(expected)[rows, columns], 0.0).astype(np.float64)
