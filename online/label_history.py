"""Label history: which labels an impression was learnt with, and which of them were taken back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from online.rows import LabelledRows, Rows
from state.records import ImpressionRecord

Label = tuple[bool, int]
"""Whether it was a click, and the weight: 1 given, -1 taken back."""


def label_history(record: ImpressionRecord) -> list[Label]:
    """Return the labels of an impression, in the order in which they were learnt; none while its window is open."""
    if not record.labelled:
        return []
    in_time = record.clicked and not record.clicked_late and not (record.retracted and not record.retracted_late)
    labels = [in_time]
    if record.clicked and record.clicked_late:
        labels.append(True)
    if record.retracted and record.retracted_late:
        labels.append(False)
    history = [(labels[0], 1)]
    for before, after in itertools.pairwise(labels):
        history += [(before, -1), (after, 1)]
    return history


def unlearnt_rows(rows: Rows, records: Sequence[ImpressionRecord]) -> tuple[LabelledRows, LabelledRows]:
    """Return what takes the last label of labelled impressions back, and all rows that they were learnt with.

    Parameters
    ----------
    rows, records
        The same impressions as rows, (B,), and as records.
    """
    histories = [label_history(record) for record in records]
    index = np.repeat(np.arange(len(rows)), [len(history) for history in histories])
    labels = [label for history in histories for label in history]
    learnt = LabelledRows(
        rows.take(index),
        np.array([click for click, _ in labels], np.float32),
        np.array([weight for _, weight in labels], np.float32),
    )
    last = np.array([history[-1][0] for history in histories], np.float32)
    return LabelledRows(rows, last, np.full(len(rows), -1, np.float32)), learnt
