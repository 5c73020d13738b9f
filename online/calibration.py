"""Calibration: how far users follow the preferences that the model sees in them."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from online.rows import LabelledRows
from state.records import SEPARATOR
from state.store import ChangeSet, ReadTransaction, Table

Floats = npt.NDArray[np.float64]

HALF_LIFE_ROWS = 100_000.0
"""Impressions after which one counts half: long against a change of tastes, which must not look like the habit."""

CATEGORY_HALF_LIFE_ROWS = 20_000.0
"""The same of a category's impressions in its own slope."""

PRIOR_INFORMATION = 25.0
"""What the belief is worth that preferences are as the model says, and a category as all: a deviation of a fifth."""

SLOPE_RANGE = (0.5, 2.0)


class Sums(msgspec.Struct, array_like=True):
    """Sums over impressions: score and information of the logistic regression at a slope of 1."""

    score: float = 0.0
    information: float = 0.0

    def add(self, score: float, information: float, kept: float) -> None:
        """Add what some impressions tell to the share that is kept of the sums so far."""
        self.score, self.information = kept * self.score + score, kept * self.information + information


class PreferenceCalibration:
    """The slope of clicks on the users' preferences: below 1 the model is too sure of them, above 1 not enough.

    Averaged and decayed weights make preferences too small, rows learnt by heart make them too large, and in one
    category more than in another. It is one Newton step of a logistic regression from a slope of 1, over the
    impressions of late; a category's own is shrunk towards that of all.
    """

    def __init__(self) -> None:
        self._overall = Sums()
        self._categories: dict[str, Sums] = {}
        self._changed: dict[str | None, None] = {}

    def slope(self, category: str | None = None) -> float:
        """Return the slope of a category; of all where there is none."""
        low, high = SLOPE_RANGE
        slope = 1.0 + self._overall.score / (self._overall.information + PRIOR_INFORMATION)
        own = None if category is None else self._categories.get(category)
        if own is not None:
            slope += (own.score - (slope - 1.0) * own.information) / (own.information + PRIOR_INFORMATION)
        return min(max(slope, low), high)

    def observe_many(
        self,
        given: LabelledRows,
        p_click: npt.NDArray[np.float32],
        preference: Floats,
        category: str | None = None,
    ) -> None:
        """Take in labelled impressions of a category: their predicted probabilities and preferences, all (B,)."""
        p = np.clip(p_click.astype(np.float64), 1e-6, 1 - 1e-6)
        score = float((given.weights * (given.clicks - p) * preference).sum())
        information = float((given.weights * p * (1 - p) * preference**2).sum())
        n_rows = float(given.weights.sum())
        self._overall.add(score, information, 0.5 ** (n_rows / HALF_LIFE_ROWS))
        self._changed[None] = None
        if category is not None:
            own = self._categories.setdefault(category, Sums())
            own.add(score, information, 0.5 ** (n_rows / CATEGORY_HALF_LIFE_ROWS))
            self._changed[category] = None

    def restart(self, category: str) -> None:
        """Forget a category's own slope: its tastes have changed and are learnt anew."""
        self._categories[category] = Sums()
        self._changed[category] = None

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""
        for key, value in txn.scan(Table.META, prefix=_KEY):
            sums = msgspec.msgpack.decode(value, type=Sums)
            if key == _KEY:
                self._overall = sums
            else:
                self._categories[key.removeprefix(_KEY + SEPARATOR).decode()] = sums

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        for category in self._changed:
            key = _KEY if category is None else _KEY + SEPARATOR + category.encode()
            sums = self._overall if category is None else self._categories[category]
            changes.put(Table.META, key, msgspec.msgpack.encode(sums))
        self._changed.clear()


_KEY = b"preference_slope"
