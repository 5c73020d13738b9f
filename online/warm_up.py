"""Warm-up: values of attributes that no learnt row has had count like the average user's.

The embedding of such a value is noise at first and nothing later, when it has decayed; neither stands for anybody.
It is kept at the mean of the field's learnt values, each weighted by how often it was learnt, and learning starts from
there when the value comes at last. A value that has been learnt is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from online.model import PreferenceModel
from online.rows import LabelledRows
from state.store import ChangeSet, ReadTransaction, Table

_KEY = b"value_counts"


class ValueWarmUp:
    """Counts how often each value of each attribute was learnt, and sets the embeddings of those that never were.

    Parameters
    ----------
    cardinalities
        Number of codes of each attribute; their sum is V.
    """

    def __init__(self, cardinalities: Sequence[int]) -> None:
        self._starts = np.cumsum([0, *cardinalities[:-1]])
        self._field_of = np.repeat(np.arange(len(cardinalities)), cardinalities)  # (V,)
        self._n_learnt = np.zeros(len(self._field_of))

    def observe_many(self, labelled: LabelledRows) -> None:
        """Count the values of learnt rows; a label that is taken back counts against the one that was given."""
        codes = labelled.rows.attributes.astype(np.int64) + self._starts  # (B, N)
        weights = np.repeat(labelled.weights, codes.shape[1])
        self._n_learnt += np.bincount(codes.ravel(), weights=weights, minlength=len(self._n_learnt))

    @torch.no_grad()
    def fill(self, *models: PreferenceModel) -> None:
        """Set the embeddings of values never learnt to the mean of their field's; one with none learnt stays."""
        of_field = np.bincount(self._field_of, weights=self._n_learnt)  # (N,)
        never = np.flatnonzero((self._n_learnt == 0) & (of_field[self._field_of] > 0))
        if not len(never):
            return
        shares = self._n_learnt / np.maximum(of_field, 1)[self._field_of]
        weights = torch.from_numpy(shares.astype(np.float32)).unsqueeze(-1)  # (V, 1)
        field_of = torch.from_numpy(self._field_of)
        for model in models:
            values = model.fields.weight  # (V, d_field)
            means = torch.zeros(len(of_field), values.shape[1]).index_add_(0, field_of, values * weights)
            values[never] = means[field_of[never]]

    def write(self, changes: ChangeSet) -> None:
        """Write the counts."""
        changes.put(Table.LEARNER, _KEY, self._n_learnt.tobytes())

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state, which holds a learner."""
        value = txn.get(Table.LEARNER, _KEY)
        assert value is not None, _KEY
        self._n_learnt = np.frombuffer(value).copy()
