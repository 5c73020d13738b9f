"""Label history: every way of an impression to its last label."""

from __future__ import annotations

import numpy as np
import pytest

from online.label_history import Label, label_history, unlearnt_rows
from online.rows import Rows
from state.records import ImpressionRecord

NO, YES = False, True


def record(
    *,
    labelled: bool = True,
    clicked: bool = False,
    late: bool = False,
    retracted: bool = False,
    retracted_late: bool = False,
) -> ImpressionRecord:
    made = ImpressionRecord("p", "c", b"", 0, 0, 0, None, None, clicked, labelled)
    made.clicked_late, made.retracted, made.retracted_late = late, retracted, retracted_late
    return made


CASES: dict[str, tuple[ImpressionRecord, list[Label]]] = {
    "its window is open": (record(labelled=False, clicked=True), []),
    "no click": (record(), [(NO, 1)]),
    "a click": (record(clicked=True), [(YES, 1)]),
    "a late click": (record(clicked=True, late=True), [(NO, 1), (NO, -1), (YES, 1)]),
    "a click retracted in the window": (record(clicked=True, retracted=True), [(NO, 1)]),
    "a click retracted after it": (
        record(clicked=True, retracted=True, retracted_late=True),
        [(YES, 1), (YES, -1), (NO, 1)],
    ),
    "a late click retracted": (
        record(clicked=True, late=True, retracted=True, retracted_late=True),
        [(NO, 1), (NO, -1), (YES, 1), (YES, -1), (NO, 1)],
    ),
}


@pytest.mark.parametrize(("impression", "expected"), CASES.values(), ids=CASES.keys())
def test_the_labels_of_an_impression(impression: ImpressionRecord, expected: list[Label]) -> None:
    assert label_history(impression) == expected
    if expected:
        # One label stands, and it is what the impression is now.
        assert sum(weight for _, weight in expected) == 1
        assert expected[-1] == (impression.click_counts, 1)


def test_the_last_label_is_taken_back_and_all_rows_are_named() -> None:
    records = [impression for impression, expected in CASES.values() if expected]
    n = len(records)
    rows = Rows(np.arange(n), np.arange(n) + 10, np.arange(n, dtype=np.uint8)[:, None])
    unlearnt, learnt = unlearnt_rows(rows, records)
    assert unlearnt.weights.tolist() == [-1] * n
    assert unlearnt.clicks.tolist() == [float(impression.click_counts) for impression in records]
    found = [
        (int(product), bool(click), int(weight))
        for product, click, weight in zip(learnt.rows.products, learnt.clicks, learnt.weights, strict=True)
    ]
    expected_rows = [
        (place, click, weight) for place, each in enumerate(records) for click, weight in label_history(each)
    ]
    assert found == expected_rows
