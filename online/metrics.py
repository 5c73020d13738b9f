"""Prequential metrics: each impression is predicted before it is learnt.

Log-loss is River's. AUROC is computed from two histograms of the predictions, because River's
updates every threshold at every event (20 µs at 100 thresholds, more than learning the event).
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from state.reading import StateView
from state.store import ChangeSet, ReadTransaction, Table

if TYPE_CHECKING:
    from river import metrics

HISTORY_POINTS = 400
N_BINS = 1_024
RECENT_HALF_LIFE = 10_000
"""Impressions after which one counts half in the recent AUROC."""


class MetricPoint(msgspec.Struct, frozen=True, array_like=True):
    """The metrics at one time of the stream; ``recent_auroc`` is of about the last 20,000 impressions."""

    n_labelled: int
    event_time_ms: int
    auroc: float
    recent_auroc: float
    log_loss: float


class Metrics(msgspec.Struct, frozen=True):
    """What readers of the state are shown."""

    points: list[MetricPoint]


def histogram_auroc(histogram: npt.NDArray[np.float64]) -> float:
    """Return the AUROC of predictions in bins, (2, n_bins): not clicked, clicked.

    Ties count half; with only one class it is 0.5.
    """
    negatives, positives = histogram
    if not negatives.sum() or not positives.sum():
        return 0.5
    below = np.cumsum(negatives) - negatives
    wins = (positives * (below + negatives / 2)).sum()
    return float(wins / (negatives.sum() * positives.sum()))


class PrequentialMetrics:
    """AUROC, over all and lately, and log-loss of the predictions so far."""

    def __init__(self) -> None:
        from river import metrics

        self._all = np.zeros((2, N_BINS))
        self._recent = np.zeros((2, N_BINS))
        self._log_loss: metrics.LogLoss = metrics.LogLoss()  # type: ignore[no-untyped-call]
        self._points: list[MetricPoint] = []
        self._n_labelled = 0

    def update_many(
        self, clicks: npt.NDArray[np.float32], p_click: npt.NDArray[np.float32], event_time_ms: int
    ) -> None:
        """Take in predictions and what happened then."""
        if not len(clicks):
            return
        # Click rates crowd near 0: equal steps of the square root, which keeps their order, spread them.
        bins = np.minimum((np.sqrt(p_click) * N_BINS).astype(np.int64), N_BINS - 1)
        cells = np.bincount(clicks.astype(np.int64) * N_BINS + bins, minlength=2 * N_BINS).reshape(2, N_BINS)
        self._all += cells
        self._recent *= 0.5 ** (len(clicks) / RECENT_HALF_LIFE)
        self._recent += cells
        for click, p in zip(clicks.astype(bool).tolist(), p_click.astype(float).tolist(), strict=True):
            self._log_loss.update(click, p)
        self._n_labelled += len(clicks)
        self._points.append(
            MetricPoint(
                self._n_labelled,
                event_time_ms,
                histogram_auroc(self._all),
                histogram_auroc(self._recent),
                float(self._log_loss.get()),  # type: ignore[no-untyped-call]
            )
        )
        if len(self._points) > HISTORY_POINTS:
            # Half of the points go, every second one, so that the curve keeps its whole length.
            self._points = self._points[1::2]

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state, which only this program writes (River's metric is pickled)."""
        value = txn.get(Table.META, b"prequential")
        if value is not None:
            self._all, self._recent, self._log_loss, self._n_labelled = pickle.loads(value)
        points = txn.get(Table.META, b"metrics")
        self._points = [] if points is None else _points(points)

    def write(self, changes: ChangeSet) -> None:
        """Write the metrics."""
        state = (self._all, self._recent, self._log_loss, self._n_labelled)
        changes.put(Table.META, b"prequential", pickle.dumps(state, protocol=5))
        changes.put(Table.META, b"metrics", msgspec.msgpack.encode(Metrics(self._points)))


def _points(value: bytes) -> list[MetricPoint]:
    return msgspec.msgpack.decode(value, type=Metrics).points


def read_metrics(view: StateView) -> list[MetricPoint]:
    """Return the metrics over the stream, oldest first.

    Of a state with several shards they are the means over the shards by impressions, at every time of any of them.
    """
    histories = [_points(value) for value in view.meta("metrics")]
    if len(histories) == 1:
        return histories[0]
    latest: dict[int, MetricPoint] = {}
    means = []
    order = sorted(
        ((point.event_time_ms, shard, point) for shard, history in enumerate(histories) for point in history),
        key=lambda item: item[:2],
    )
    for at_ms, shard, point in order:
        latest[shard] = point
        n = np.array([each.n_labelled for each in latest.values()])
        values = [(each.auroc, each.recent_auroc, each.log_loss) for each in latest.values()]
        means.append(MetricPoint(int(n.sum()), at_ms, *(n @ np.array(values) / n.sum()).tolist()))
    return means
