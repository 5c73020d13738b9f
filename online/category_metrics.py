"""Category metrics: how good the predictions of each category are, before they are learnt."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from online.metrics import histogram_auroc
from state.reading import StateView
from state.records import CategoryMetricsRecord, encode_record
from state.store import ChangeSet, ReadTransaction, Table

N_BINS = 256

Counts = npt.NDArray[np.uint32]


class CategoryReading(NamedTuple):
    """The prequential metrics of one category.

    ``calibration`` is clicks by expected clicks: below 1 the predictions are too high, above 1 too low.
    """

    category: str
    n_labelled: int
    auroc: float
    log_loss: float
    calibration: float


class CategoryMetrics:
    """AUROC, log-loss and calibration by category; products without one count together, under ""."""

    def __init__(self) -> None:
        self._records: dict[str, CategoryMetricsRecord] = {}
        self._changed: dict[str, None] = {}

    def update_many(self, category: str, clicks: npt.NDArray[np.float32], p_click: npt.NDArray[np.float32]) -> None:
        """Take in a category's predictions and what happened then, (B,)."""
        old = self._records.get(category)
        histogram = np.zeros((2, N_BINS), np.uint32) if old is None else _histogram(old).copy()
        # Click rates crowd near 0: equal steps of the square root, which keeps their order, spread them.
        bins = np.minimum((np.sqrt(p_click) * N_BINS).astype(np.int64), N_BINS - 1)
        np.add.at(histogram, (clicks.astype(np.int64), bins), 1)
        p = np.clip(p_click.astype(np.float64), 1e-7, 1 - 1e-7)
        losses = -np.where(clicks > 0, np.log(p), np.log1p(-p))
        before = (0, 0, 0.0, 0.0) if old is None else (old.n_labelled, old.n_clicks, old.n_expected, old.log_loss_sum)
        self._records[category] = CategoryMetricsRecord(
            before[0] + len(clicks),
            before[1] + int(clicks.sum()),
            before[2] + float(p.sum()),
            before[3] + float(losses.sum()),
            histogram.tobytes(),
        )
        self._changed[category] = None

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""
        decoder = msgspec.msgpack.Decoder(CategoryMetricsRecord)
        for key, value in txn.scan(Table.CATEGORY_METRICS):
            self._records[_category(key)] = decoder.decode(value)

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        for category in self._changed:
            changes.put(Table.CATEGORY_METRICS, _PREFIX + category.encode(), encode_record(self._records[category]))
        self._changed.clear()


def read_category_metrics(view: StateView) -> list[CategoryReading]:
    """Return the metrics of every category in the state, by name."""
    sums: dict[str, CategoryMetricsRecord] = {}
    for key, record in view.category_metrics():
        category = _category(key)
        sums[category] = record if category not in sums else _sum(sums[category], record)
    return [_reading(category, record) for category, record in sums.items()]


def _sum(one: CategoryMetricsRecord, other: CategoryMetricsRecord) -> CategoryMetricsRecord:
    """Return the sums over the products of a category in two shards."""
    return CategoryMetricsRecord(
        one.n_labelled + other.n_labelled,
        one.n_clicks + other.n_clicks,
        one.n_expected + other.n_expected,
        one.log_loss_sum + other.log_loss_sum,
        (_histogram(one) + _histogram(other)).tobytes(),
    )


_PREFIX = b"category "
"""A key may not be empty, and a product may have no category."""


def _category(key: bytes) -> str:
    return key.removeprefix(_PREFIX).decode()


def _histogram(record: CategoryMetricsRecord) -> Counts:
    return np.frombuffer(record.histogram, np.uint32).reshape(2, N_BINS)


def _reading(category: str, record: CategoryMetricsRecord) -> CategoryReading:
    return CategoryReading(
        category,
        record.n_labelled,
        histogram_auroc(_histogram(record).astype(np.float64)),
        record.log_loss_sum / record.n_labelled,
        record.n_clicks / record.n_expected,
    )
