"""Prequential metrics, against scikit-learn."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from online.metrics import HISTORY_POINTS, MetricPoint, PrequentialMetrics, histogram_auroc, read_metrics
from state.reading import StateReader
from state.shards import shard_folder
from state.store import ChangeSet, Store, Table


def read(*shards: ChangeSet) -> list[MetricPoint]:
    """Return the metrics of a state to whose shards these changes are all that was committed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for number, changes in enumerate(shards):
            with Store(path if len(shards) == 1 else shard_folder(path, number), map_size_mib=16) as store:
                store.commit(changes)
        with StateReader(path) as state, state.view() as view:
            return read_metrics(view)


def draw(
    n: int, seed: int, mean_logit: float = -2.7, spread: float = 0.8
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-(mean_logit + spread * rng.standard_normal(n))))
    return (rng.random(n) < p).astype(np.float32), p.astype(np.float32)


@pytest.mark.parametrize(("mean_logit", "spread"), [(-2.7, 0.8), (-5.0, 0.5), (0.0, 2.0), (3.0, 1.0)])
def test_auroc_and_log_loss_are_sklearns(tmp_path: Path, mean_logit: float, spread: float) -> None:
    clicks, p = draw(20_000, 1, mean_logit, spread)
    metrics = PrequentialMetrics()
    for start in range(0, 20_000, 500):
        metrics.update_many(clicks[start : start + 500], p[start : start + 500], start)
    changes = ChangeSet()
    metrics.write(changes)
    points = read(changes)
    assert len(points) == 40
    for point in (points[19], points[-1]):
        n = point.n_labelled
        assert n == point.event_time_ms + 500
        assert point.auroc == pytest.approx(roc_auc_score(clicks[:n], p[:n]), abs=2e-3)
        assert point.log_loss == pytest.approx(log_loss(clicks[:n], p[:n].astype(float)), abs=1e-6)


@pytest.mark.parametrize(
    ("histogram", "expected"),
    [
        ([[1, 0], [0, 1]], 1.0),
        ([[0, 1], [1, 0]], 0.0),
        ([[1, 1], [1, 1]], 0.5),
        ([[0, 4], [0, 2]], 0.5),
        ([[3, 1], [1, 3]], 0.75),
        ([[0, 0], [1, 2]], 0.5),
        ([[2, 1], [0, 0]], 0.5),
    ],
)
def test_histogram_cases(histogram: list[list[int]], expected: float) -> None:
    assert histogram_auroc(np.array(histogram, float)) == pytest.approx(expected)


def test_recent_auroc_forgets_what_was_long_ago() -> None:
    metrics = PrequentialMetrics()
    rng = np.random.default_rng(0)
    for step in range(160):
        p = rng.random(500).astype(np.float32)
        clicks = (rng.random(500) < (p if step >= 80 else 1 - p)).astype(np.float32)  # first all wrong, then right
        metrics.update_many(clicks, p, step)
    changes = ChangeSet()
    metrics.write(changes)
    points = read(changes)
    assert points[79].recent_auroc < 0.2
    assert points[-1].auroc == pytest.approx(0.5, abs=0.02)
    assert points[-1].recent_auroc > 0.75


def test_the_curve_is_thinned_but_keeps_its_whole_length() -> None:
    metrics = PrequentialMetrics()
    n_batches = 3 * HISTORY_POINTS
    for step in range(n_batches):
        metrics.update_many(np.array([step % 2], np.float32), np.array([0.3], np.float32), step)
    changes = ChangeSet()
    metrics.write(changes)
    points = read(changes)
    assert HISTORY_POINTS // 2 <= len(points) <= HISTORY_POINTS
    numbers = [point.n_labelled for point in points]
    assert numbers == sorted(set(numbers))
    assert numbers[0] <= 16
    assert numbers[-1] == n_batches


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_sure_predictions_are_taken(p: float) -> None:
    metrics = PrequentialMetrics()
    metrics.update_many(np.array([0, 1], np.float32), np.full(2, p, np.float32), 0)
    changes = ChangeSet()
    metrics.write(changes)
    (point,) = read(changes)
    assert point.auroc == 0.5
    assert np.isfinite(point.log_loss)


def test_an_empty_batch_leaves_no_point() -> None:
    metrics, changes = PrequentialMetrics(), ChangeSet()
    metrics.update_many(np.zeros(0, np.float32), np.zeros(0, np.float32), 5)
    metrics.write(changes)
    assert read(changes) == []
    assert read(ChangeSet()) == []


def test_metrics_go_on_from_the_state_bit_by_bit(tmp_path: Path) -> None:
    undisturbed, restarted = PrequentialMetrics(), PrequentialMetrics()
    clicks, p = draw(6_000, 3)
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        for start in range(0, 6_000, 300):
            written = []
            for metrics in (undisturbed, restarted):
                changes = ChangeSet()
                metrics.update_many(clicks[start : start + 300], p[start : start + 300], start)
                metrics.write(changes)
                written.append(changes.of(Table.META))
            assert written[0] == written[1]
            store.commit(changes)
            restarted = PrequentialMetrics()
            with store.read() as txn:
                restarted.restore(txn)


def test_the_metrics_of_two_shards_are_their_means_by_impressions() -> None:
    shards = []
    for n, p_right, at_ms in ((300, 1.0, 10), (100, 0.0, 20)):
        metrics, changes = PrequentialMetrics(), ChangeSet()
        clicks = np.arange(n) % 2
        p = np.where(clicks == 1, p_right, 1 - p_right)
        metrics.update_many(clicks.astype(np.float32), p.astype(np.float32), at_ms)
        metrics.write(changes)
        shards.append(changes)
    points = read(*shards)
    assert [(point.n_labelled, point.event_time_ms) for point in points] == [(300, 10), (400, 20)]
    assert [point.auroc for point in points] == [1.0, 0.75]
