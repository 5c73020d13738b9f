"""Shift detection: tastes that no longer are what was learnt.

Each labelled impression is scored by a log-likelihood ratio: how much better the click (or its
absence) is explained if the user had no preference among the creatives at all. Of the two things that
happen, preferences that turn round and preferences that mean nothing any more, this is the second,
which is the harder to see; the first is found as soon. While tastes stay, the scores drift down; when
they change, up. Their one-sided cumulative sum (CUSUM) raises the alarm, and
what was counted since it last stood at zero is the evidence of the change. If the model is right,
false alarms are at least exp(threshold) impressions apart on average, whatever the scores'
distribution; in truth some hundred times as many, which is measured and sets the threshold for the
rate of false alarms that is accepted.

Every product has such a sum, and every category has one over its products: tastes usually change
for a kind of product, and together its products show it several times sooner.

River's Page-Hinkley test and ADWIN watch for a change of a mean and so throw away what this test
rests on: that the scores' mean is below zero while tastes stay. On the same worlds Page-Hinkley gave
false alarms wherever it was set to find a change at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from online.counts import TakenBack
from online.settings import ShiftSettings
from state.records import SEPARATOR
from state.store import ChangeSet, ReadTransaction, Table
from streams.events import ShiftScope

Floats = npt.NDArray[np.float32]

CellCounts = dict[tuple[int, str], tuple[int, int]]
"""Impressions and clicks by (group, creative)."""


@dataclass(frozen=True)
class Observed:
    """One product's labelled impressions of a micro-batch: their scores and weights, (B,), and counts.

    A weight is 1 for a label that is given and -1 for one that is taken back.
    """

    product_id: str
    category: str | None
    scores: npt.NDArray[np.float64]
    weights: Floats
    cells: CellCounts


@dataclass(frozen=True)
class Shift:
    """Tastes of a product have changed: the evidence since then.

    ``statistic`` is the sum that raised the alarm: the product's own, or that of its category (``scope``).
    ``n_impressions`` and ``cells`` are the product's, labelled since the watermark ``evidence_from_ms``.
    """

    product_id: str
    scope: ShiftScope
    statistic: float
    n_impressions: int
    cells: CellCounts
    evidence_from_ms: int = 0


def indifference_scores(
    clicks: Floats, p_click: Floats, own: npt.NDArray[np.float64], slope: float
) -> npt.NDArray[np.float64]:
    """Return the log-likelihood ratio of having no preference to having the learnt one, of each impression, (B,).

    Parameters
    ----------
    clicks, p_click
        What happened, and its predicted probability, (B,).
    own
        The users' own preferences, (B,).
    slope
        How far users follow them (`online.calibration`): while tastes stay, ``slope`` times is the truth.
    """
    p = np.clip(p_click.astype(np.float64), 1e-6, 1 - 1e-6)
    indifferent = np.log(p / (1 - p)) - own
    learnt = indifferent + slope * own
    # log of p(click | indifferent) / p(click | learnt), with log(1 - sigmoid(x)) = -log(1 + exp(x))
    return np.asarray(np.logaddexp(0, learnt) - np.logaddexp(0, indifferent) + clicks * (indifferent - learnt))


MAX_PREFERENCE = 1.5


class Sum(msgspec.Struct, array_like=True):
    """A cumulative sum of scores, and over how many of them it has been above zero."""

    value: float = 0.0
    n_scores: int = 0

    def add(self, scores: npt.NDArray[np.float64], weights: Floats) -> None:
        """Add weighted scores; the sum never falls below zero, where it starts anew."""
        self.value = max(0.0, self.value + float((weights * scores).sum()))
        self.n_scores = self.n_scores + int(weights.sum()) if self.value > 0 else 0


class Common(msgspec.Struct, array_like=True):
    """What all users have in common about a creative: their mean preference, lately."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, preferences: float, weight: float) -> None:
        """Add the weighted sum of some users' preferences."""
        self.total, self.weight = self.total + preferences, self.weight + weight
        if self.weight > COMMON_MEMORY:
            self.total, self.weight = self.total * COMMON_MEMORY / self.weight, COMMON_MEMORY

    @property
    def mean(self) -> float:
        """The mean; 0 before anything is known."""
        return self.total / self.weight if self.weight > 0 else 0.0


COMMON_MEMORY = 200.0
"""Impressions of a creative that its mean preference remembers: few against the rows in which weights change."""


class Detector(msgspec.Struct, array_like=True):
    """One product's sum, and the counts since it last stood at zero, from the watermark ``evidence_from_ms`` on.

    ``common`` is by the creatives' registration numbers.
    """

    category: str | None
    n_seen: int
    sum: Sum
    evidence: dict[int, dict[str, tuple[int, int]]]
    quiet_until: int
    evidence_from_ms: int = 0
    common: dict[int, Common] = {}


class ShiftDetection:
    """A detector for each resident product, and a sum for each category.

    When a category's sum raises the alarm, products that are parked are not among those named: nothing of them has
    been seen lately. Their detectors go on where they stood when they are brought in again.
    """

    def __init__(self, settings: ShiftSettings) -> None:
        self._settings = settings
        self._detectors: dict[str, Detector] = {}
        self._categories: dict[str, Sum] = {}
        self._members: dict[str, dict[str, None]] = {}
        self._changed: dict[str, None] = {}
        self._changed_categories: dict[str, None] = {}

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state, with the sums of its categories and no product."""
        decoder = msgspec.msgpack.Decoder(Sum)
        prefix = _CATEGORY + SEPARATOR
        for key, value in txn.scan(Table.DETECTORS, prefix=prefix):
            self._categories[key.removeprefix(prefix).decode()] = decoder.decode(value)

    def bring_in(self, product_id: str, txn: ReadTransaction) -> None:
        """Take a product's detector over from the state, if it has one."""
        value = txn.get(Table.DETECTORS, _PRODUCT + SEPARATOR + product_id.encode())
        if value is not None:
            self._add(product_id, _DETECTOR.decode(value))

    def park(self, product_id: str) -> None:
        """Forget a product's detector, which has been written."""
        self._remove(product_id)

    def own_preferences(
        self,
        product_id: str,
        category: str | None,
        creatives: npt.NDArray[np.int64],
        preference: Floats,
        weights: Floats,
    ) -> npt.NDArray[np.float64]:
        """Return what of users' preferences is their own, (B,): less what all users have in common about a creative.

        It is the mean of late, over micro-batches: one of them holds a creative too seldom to tell.

        Parameters
        ----------
        product_id, category
            The product.
        creatives
            The creatives, by registration number, (B,).
        preference
            The user's preference for this creative among the product's, in logits, (B,).
        weights
            1 for a label that is given and -1 for one that is taken back, (B,).
        """
        common = self._detector(product_id, category).common
        self._changed[product_id] = None
        numbers, index = np.unique(creatives, return_inverse=True)
        totals, added = np.bincount(index, weights=weights * preference), np.bincount(index, weights=weights)
        means = np.empty(len(numbers))
        for place, (number, total, weight) in enumerate(zip(numbers.tolist(), totals, added, strict=True)):
            of_creative = common.setdefault(number, Common())
            of_creative.add(float(total), float(weight))
            means[place] = of_creative.mean
        return np.clip(preference - means[index], -MAX_PREFERENCE, MAX_PREFERENCE)

    def observe_many(self, observed: list[Observed], before_ms: int = 0) -> list[Shift]:
        """Take in the watched products of one micro-batch; return the shifts that it completes, one for a product.

        ``before_ms`` is the watermark before the micro-batch.
        """
        by_category: dict[str, list[Observed]] = {}
        shifts: dict[str, Shift] = {}
        for item in observed:
            if not self._observe(item, before_ms):
                continue
            detector = self._detectors[item.product_id]
            if self._is_alarm(detector.sum, "product"):
                shifts[item.product_id] = _shift(item.product_id, "product", detector.sum.value, detector)
            if item.category is not None:
                by_category.setdefault(item.category, []).append(item)
        for category, items in by_category.items():
            total = self._categories.setdefault(category, Sum())
            self._changed_categories[category] = None
            total.add(np.concatenate([item.scores for item in items]), np.concatenate([item.weights for item in items]))
            if self._is_alarm(total, "category"):
                for product_id in self._supporting(category):
                    shift = _shift(product_id, "category", total.value, self._detectors[product_id])
                    shifts.setdefault(product_id, shift)
                self._categories[category] = Sum()
        for product_id in shifts:
            detector = self._detectors[product_id]
            detector.sum, detector.evidence, detector.common = Sum(), {}, {}
            detector.quiet_until = detector.n_seen + self._settings.cool_down_impressions
            self._changed[product_id] = None
        return list(shifts.values())

    def _observe(self, item: Observed, before_ms: int) -> bool:
        """Add to a product's own sum; return whether it is watched, past its warm-up and its last shift."""
        detector = self._detector(item.product_id, item.category)
        self._changed[item.product_id] = None
        detector.n_seen += int(item.weights.sum())
        if detector.n_seen <= max(self._settings.warm_up_impressions, detector.quiet_until):
            return False
        detector.sum.add(item.scores, item.weights)
        if not detector.sum.n_scores:
            detector.evidence = {}
            return True
        if not detector.evidence:
            detector.evidence_from_ms = before_ms
        for (group_id, creative_id), (n_impressions, n_clicks) in item.cells.items():
            seen = detector.evidence.setdefault(group_id, {}).get(creative_id, (0, 0))
            detector.evidence[group_id][creative_id] = (seen[0] + n_impressions, seen[1] + n_clicks)
        return True

    def _detector(self, product_id: str, category: str | None) -> Detector:
        """Return a product's detector, a new one if it has none or has moved to another category."""
        detector = self._detectors.get(product_id)
        if detector is None or detector.category != category:
            self._remove(product_id)
            detector = Detector(category, 0, Sum(), {}, 0)
            self._add(product_id, detector)
        return detector

    def take_back(self, taken: TakenBack, *, impression: bool, click: bool) -> None:
        """Take an impression, its click, or both out of the evidence of a change, where they are there."""
        record = taken.record
        detector = self._detectors.get(record.product_id)
        if detector is None or not taken.is_evidence(detector.evidence_from_ms):
            return
        clicked = click and not record.clicked_late
        for group_id in (record.group_id, taken.group_id):
            cells = detector.evidence.get(group_id, {})
            n_impressions, n_clicks = cells.get(record.creative_id, (0, 0))
            if n_impressions and (impression or n_clicks):
                n_impressions -= impression
                cells[record.creative_id] = (n_impressions, min(max(n_clicks - clicked, 0), n_impressions))
                self._changed[record.product_id] = None
                return

    def _is_alarm(self, total: Sum, scope: ShiftScope) -> bool:
        return total.value >= self._settings.threshold(scope) and total.n_scores >= self._settings.min_impressions

    def _supporting(self, category: str) -> list[str]:
        """Return the products of a category whose own impressions speak for a change too."""
        members = self._members.get(category, {})
        return sorted(product_id for product_id in members if self._detectors[product_id].sum.value > 0)

    def restart(self, product_id: str) -> None:
        """Forget a product's scores: its groups do not differ, so there are no tastes to watch."""
        if self._remove(product_id):
            self._changed[product_id] = None

    def _remove(self, product_id: str) -> bool:
        detector = self._detectors.pop(product_id, None)
        if detector is not None and detector.category is not None:
            del self._members[detector.category][product_id]
        return detector is not None

    def _add(self, product_id: str, detector: Detector) -> None:
        self._detectors[product_id] = detector
        if detector.category is not None:
            self._members.setdefault(detector.category, {})[product_id] = None

    def write(self, changes: ChangeSet) -> None:
        """Write the detectors that have changed since the last call."""
        for product_id in self._changed:
            key = _PRODUCT + SEPARATOR + product_id.encode()
            detector = self._detectors.get(product_id)
            if detector is None:
                changes.delete(Table.DETECTORS, key)
            else:
                changes.put(Table.DETECTORS, key, msgspec.msgpack.encode(detector))
        for category in self._changed_categories:
            key = _CATEGORY + SEPARATOR + category.encode()
            changes.put(Table.DETECTORS, key, msgspec.msgpack.encode(self._categories[category]))
        self._changed.clear()
        self._changed_categories.clear()


_PRODUCT, _CATEGORY = b"product", b"category"
_DETECTOR = msgspec.msgpack.Decoder(Detector)


def _shift(product_id: str, scope: ShiftScope, statistic: float, detector: Detector) -> Shift:
    cells = {
        (group_id, creative_id): counts
        for group_id, of_group in detector.evidence.items()
        for creative_id, counts in of_group.items()
    }
    return Shift(product_id, scope, statistic, detector.sum.n_scores, cells, detector.evidence_from_ms)
