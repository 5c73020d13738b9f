"""Shift detection: tastes that no longer are what was learnt.

Each labelled impression of a product is scored by a log-likelihood ratio: how much better the click
(or its absence) is explained if the user's preference among the creatives were the opposite of what
was learnt. While tastes stay, the scores drift down; when they change, up. Their one-sided
cumulative sum (CUSUM) raises the alarm, and what was counted since it last stood at zero is the
evidence of the change. If the model is right, false alarms are at least exp(threshold) impressions
apart on average, whatever the scores' distribution.

River's Page-Hinkley test and ADWIN watch for a change of a mean and so throw away what this test
rests on: that the scores' mean is below zero while tastes stay. On the same worlds Page-Hinkley gave
false alarms wherever it was set to find a change at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from online.settings import ShiftSettings
from state.store import ChangeSet, ReadTransaction, Table

Floats = npt.NDArray[np.float32]

CellCounts = dict[tuple[int, str], tuple[int, int]]
"""Impressions and clicks by (group, creative)."""


@dataclass(frozen=True)
class Shift:
    """Tastes of a product have changed: the evidence since then."""

    product_id: str
    statistic: float
    n_impressions: int
    cells: CellCounts


def opposition_scores(
    clicks: Floats, p_click: Floats, preference: Floats, creatives: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the log-likelihood ratio of opposite preferences to those learnt, of each impression, (B,).

    Parameters
    ----------
    clicks, p_click
        What happened, and its predicted probability, (B,).
    preference
        The user's preference for this creative among the product's, in logits, (B,).
    creatives
        The creatives, (B,): what all users have in common about one is no matter of groups and is left as it is.
    """
    _, index = np.unique(creatives, return_inverse=True)
    common = np.bincount(index, weights=preference) / np.bincount(index)
    own = np.clip(preference - common[index], -MAX_PREFERENCE, MAX_PREFERENCE)
    p = np.clip(p_click.astype(np.float64), 1e-6, 1 - 1e-6)
    opposite = np.log(p / (1 - p)) - 2 * own
    # log of p(click | opposite) / p(click | learnt), with log(1 - sigmoid(x)) = -log(1 + exp(x))
    no_click = -np.logaddexp(0, opposite) - np.log1p(-p)
    return np.asarray(no_click + clicks * (opposite - np.log(p / (1 - p))))


MAX_PREFERENCE = 1.5


class Detector(msgspec.Struct, array_like=True):
    """One product's cumulative sum, and the counts since it last stood at zero."""

    n_scores: int = 0
    cusum: float = 0.0
    n_evidence: int = 0
    evidence: dict[int, dict[str, tuple[int, int]]] = {}
    quiet_until: int = 0


class ShiftDetection:
    """A detector for each product."""

    def __init__(self, settings: ShiftSettings) -> None:
        self._settings = settings
        self._detectors: dict[str, Detector] = {}
        self._changed: dict[str, None] = {}

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""
        decoder = msgspec.msgpack.Decoder(Detector)
        for key, value in txn.scan(Table.DETECTORS):
            self._detectors[key.decode()] = decoder.decode(value)

    def observe(self, product_id: str, scores: npt.NDArray[np.float64], cells: CellCounts) -> Shift | None:
        """Take in a product's scores of one micro-batch; return the shift that they complete, if any."""
        settings = self._settings
        detector = self._detectors.setdefault(product_id, Detector())
        self._changed[product_id] = None
        detector.n_scores += len(scores)
        if detector.n_scores <= max(settings.warm_up_impressions, detector.quiet_until):
            return None
        detector.cusum = max(0.0, detector.cusum + float(scores.sum()))
        if detector.cusum == 0.0:
            detector.n_evidence, detector.evidence = 0, {}
            return None
        detector.n_evidence += len(scores)
        for (group_id, creative_id), (n_impressions, n_clicks) in cells.items():
            seen = detector.evidence.setdefault(group_id, {}).get(creative_id, (0, 0))
            detector.evidence[group_id][creative_id] = (seen[0] + n_impressions, seen[1] + n_clicks)
        if detector.cusum < settings.threshold or detector.n_evidence < settings.min_impressions:
            return None
        shift = Shift(
            product_id,
            detector.cusum,
            detector.n_evidence,
            {
                (group_id, creative_id): counts
                for group_id, of_group in detector.evidence.items()
                for creative_id, counts in of_group.items()
            },
        )
        self._detectors[product_id] = Detector(
            detector.n_scores, quiet_until=detector.n_scores + settings.cool_down_impressions
        )
        return shift

    def restart(self, product_id: str) -> None:
        """Forget a product's scores: its groups do not differ, so there are no tastes to watch."""
        if self._detectors.pop(product_id, None) is not None:
            self._changed[product_id] = None

    def write(self, changes: ChangeSet) -> None:
        """Write the detectors that have changed since the last call."""
        for product_id in self._changed:
            detector = self._detectors.get(product_id)
            if detector is None:
                changes.delete(Table.DETECTORS, product_id.encode())
            else:
                changes.put(Table.DETECTORS, product_id.encode(), msgspec.msgpack.encode(detector))
        self._changed.clear()
