"""Prequential metrics by category, against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from online.category_metrics import CategoryMetrics, CategoryReading, read_category_metrics
from state.reading import open_view
from state.store import ChangeSet, Store


def draw(n: int, seed: int, factor: float = 1.0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return clicks and what was predicted: ``factor`` times the truth."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(2.7 - 0.8 * rng.standard_normal(n)))
    return (rng.random(n) < p).astype(np.float32), (factor * p).astype(np.float32)


def read(path: Path, metrics: CategoryMetrics) -> dict[str, CategoryReading]:
    changes = ChangeSet()
    metrics.write(changes)
    with Store(path, sync=False) as store:
        store.commit(changes)
        with open_view(store) as view:
            return {reading.category: reading for reading in read_category_metrics(view)}


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_metrics_are_sklearns_and_calibration_is_clicks_by_expected(tmp_path: Path, factor: float) -> None:
    metrics = CategoryMetrics()
    drawn = {"shoes": draw(20_000, 1, factor), "": draw(5_000, 2, factor)}
    for category, (clicks, p) in drawn.items():
        for start in range(0, len(clicks), 500):
            metrics.update_many(category, clicks[start : start + 500], p[start : start + 500])
    found = read(tmp_path, metrics)
    assert found.keys() == drawn.keys()
    for category, (clicks, p) in drawn.items():
        reading = found[category]
        assert reading.n_labelled == len(clicks)
        assert reading.auroc == pytest.approx(roc_auc_score(clicks, p), abs=3e-3)
        assert reading.log_loss == pytest.approx(log_loss(clicks, p.astype(float)), abs=1e-5)
        assert reading.calibration == pytest.approx(clicks.sum() / p.sum(), rel=1e-5)
        assert reading.calibration == pytest.approx(1 / factor, rel=0.15)


@pytest.mark.parametrize(("click", "p"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_predictions_that_are_sure_are_measured_too(tmp_path: Path, click: float, p: float) -> None:
    metrics = CategoryMetrics()
    metrics.update_many("shoes", np.full(3, click, np.float32), np.full(3, p, np.float32))
    reading = read(tmp_path, metrics)["shoes"]
    assert np.isfinite([reading.log_loss, reading.calibration]).all()
    assert reading.auroc == 0.5


def test_metrics_go_on_after_a_restart(tmp_path: Path) -> None:
    clicks, p = draw(4_000, 3)
    whole, first = CategoryMetrics(), CategoryMetrics()
    whole.update_many("shoes", clicks[:2_000], p[:2_000])
    whole.update_many("shoes", clicks[2_000:], p[2_000:])
    first.update_many("shoes", clicks[:2_000], p[:2_000])
    read(tmp_path / "halves", first)
    second = CategoryMetrics()
    with Store(tmp_path / "halves", sync=False) as store, store.read() as txn:
        second.restore(txn)
    second.update_many("shoes", clicks[2_000:], p[2_000:])
    assert read(tmp_path / "halves", second) == read(tmp_path / "whole", whole)
