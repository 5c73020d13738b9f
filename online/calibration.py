"""Calibration: how far users follow the preferences that the model sees in them."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from online.rows import LabelledRows
from state.store import ChangeSet, ReadTransaction, Table

Floats = npt.NDArray[np.float64]

HALF_LIFE_ROWS = 100_000.0
"""Impressions after which one counts half: long against a change of tastes, which must not look like the habit."""

PRIOR_INFORMATION = 25.0
"""What the belief that preferences are as the model says is worth: a deviation of a fifth of them."""

SLOPE_RANGE = (0.5, 2.0)


class Sums(msgspec.Struct, array_like=True):
    """Sums over impressions: score and information of the logistic regression at a slope of 1."""

    score: float = 0.0
    information: float = 0.0


class PreferenceCalibration:
    """The slope of clicks on the users' preferences: below 1 the model is too sure of them, above 1 not enough.

    Averaged and decayed weights make preferences too small, rows learnt by heart make them too large. It is one Newton
    step of a logistic regression from a slope of 1, over the impressions of late.
    """

    def __init__(self) -> None:
        self._sums = Sums()
        self._changed = False

    @property
    def slope(self) -> float:
        """The slope."""
        low, high = SLOPE_RANGE
        return min(max(1.0 + self._sums.score / (self._sums.information + PRIOR_INFORMATION), low), high)

    def observe_many(self, given: LabelledRows, p_click: npt.NDArray[np.float32], preference: Floats) -> None:
        """Take in labelled impressions, their predicted probabilities, and the users' preferences, all (B,)."""
        p = np.clip(p_click.astype(np.float64), 1e-6, 1 - 1e-6)
        kept = 0.5 ** (float(given.weights.sum()) / HALF_LIFE_ROWS)
        score = float((given.weights * (given.clicks - p) * preference).sum())
        information = float((given.weights * p * (1 - p) * preference**2).sum())
        self._sums.score = kept * self._sums.score + score
        self._sums.information = kept * self._sums.information + information
        self._changed = True

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""
        value = txn.get(Table.META, b"preference_slope")
        if value is not None:
            self._sums = msgspec.msgpack.decode(value, type=Sums)

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call."""
        if self._changed:
            changes.put(Table.META, b"preference_slope", msgspec.msgpack.encode(self._sums))
        self._changed = False
