"""Shift detection: tastes that no longer are what was learnt.

Each labelled impression of a product gets a score: how far the click contradicts the preference that
the model saw in this user for this creative. While tastes stay, scores average at or below zero
(below: the model still learns); when they change, clicks fall where they were expected and come where they
were not. River's Page-Hinkley test watches the scores; the change is then located, backwards, as
the start of the stretch that speaks most for it, and what was counted since is the evidence.
"""

from __future__ import annotations

import pickle
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from online.settings import ShiftSettings
from state.store import ChangeSet, ReadTransaction, Table

if TYPE_CHECKING:
    from river.drift import PageHinkley

HISTORY_BATCHES = 128

CellCounts = dict[tuple[int, str], tuple[int, int]]
"""Impressions and clicks by (group, creative)."""


@dataclass(frozen=True)
class Stretch:
    """The scores and counts of one product in one micro-batch."""

    n_scores: int
    score_sum: float
    cells: CellCounts


@dataclass(frozen=True)
class Shift:
    """Tastes of a product have changed: the evidence since then."""

    product_id: str
    statistic: float
    n_impressions: int
    cells: CellCounts


def contradiction_scores(
    clicks: npt.NDArray[np.float32], p_click: npt.NDArray[np.float32], preference: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Return how far each click contradicts the preference seen, in standard deviations, (B,).

    Parameters
    ----------
    clicks, p_click
        What happened, and its predicted probability.
    preference
        The users' own part of the predicted logit. Only its differences within the product count.
    """
    centred = preference.astype(np.float64) - preference.mean()
    spread = max(float(centred.std()), 0.05)
    residual = clicks.astype(np.float64) - p_click
    noise = np.sqrt(np.maximum(p_click * (1 - p_click), 1e-4).astype(np.float64))
    return np.asarray(-np.clip(centred / spread, -3, 3) * residual / noise)


def locate_change(stretches: list[Stretch], delta: float) -> tuple[int, float]:
    """Return where the change most probably began, as an index, and the excess score from there on."""
    best_index, best_sum, total = len(stretches), 0.0, 0.0
    for index in range(len(stretches) - 1, -1, -1):
        total += stretches[index].score_sum - delta * stretches[index].n_scores
        if total > best_sum:
            best_index, best_sum = index, total
    return best_index, best_sum


def sum_cells(stretches: list[Stretch]) -> CellCounts:
    """Return the counts of several stretches together."""
    total: CellCounts = {}
    for stretch in stretches:
        for key, (n_impressions, n_clicks) in stretch.cells.items():
            seen = total.get(key, (0, 0))
            total[key] = (seen[0] + n_impressions, seen[1] + n_clicks)
    return total


@dataclass
class _Detector:
    test: PageHinkley
    history: deque[Stretch] = field(default_factory=lambda: deque(maxlen=HISTORY_BATCHES))
    n_scores: int = 0
    quiet_until: int = 0
    suspected: bool = False


class ShiftDetection:
    """A detector for each product."""

    def __init__(self, settings: ShiftSettings) -> None:
        self._settings = settings
        self._detectors: dict[str, _Detector] = {}
        self._changed: dict[str, None] = {}

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state, which only this program writes (the detectors are pickled)."""
        for key, value in txn.scan(Table.DETECTORS):
            self._detectors[key.decode()] = pickle.loads(value)

    def observe(self, product_id: str, scores: npt.NDArray[np.float64], cells: CellCounts) -> Shift | None:
        """Take in a product's scores of one micro-batch; return the shift that they complete, if any."""
        settings = self._settings
        detector = self._detectors.get(product_id)
        if detector is None:
            detector = self._detectors[product_id] = _Detector(self._new_test())
        self._changed[product_id] = None
        n_before = detector.n_scores
        detector.n_scores += len(scores)
        if n_before < settings.warm_up_impressions or detector.n_scores < detector.quiet_until:
            return None
        for score in scores:
            detector.test.update(float(score))  # type: ignore[no-untyped-call]
            detector.suspected |= bool(detector.test.drift_detected)
        detector.history.append(Stretch(len(scores), float(scores.sum()), cells))
        if not detector.suspected:
            return None
        stretches = list(detector.history)
        start, statistic = locate_change(stretches, settings.delta)
        evidence = stretches[start:]
        n_impressions = sum(stretch.n_scores for stretch in evidence)
        if not evidence:
            # The suspicion has not held up: nothing speaks for a change any more.
            detector.suspected = False
            detector.test = self._new_test()
            return None
        if n_impressions < settings.min_impressions:
            return None
        detector.suspected = False
        detector.test = self._new_test()
        detector.history.clear()
        detector.quiet_until = detector.n_scores + settings.cool_down_impressions
        return Shift(product_id, statistic, n_impressions, sum_cells(evidence))

    def _new_test(self) -> PageHinkley:
        from river.drift import PageHinkley

        return PageHinkley(
            min_instances=100,
            delta=self._settings.delta,
            threshold=self._settings.threshold,
            alpha=1.0,
            mode="up",
        )

    def write(self, changes: ChangeSet) -> None:
        """Write the detectors that have changed since the last call."""
        for product_id in self._changed:
            changes.put(Table.DETECTORS, product_id.encode(), pickle.dumps(self._detectors[product_id], protocol=5))
        self._changed.clear()
