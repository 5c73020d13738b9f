"""Lineage: which new group is which old one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.lineage import Lineage, match_groups


def labels(*sizes: int) -> list[int]:
    """Return labels 0, 1, ... repeated by their sizes."""
    return [label for label, size in enumerate(sizes) for _ in range(size)]


@dataclass(frozen=True)
class Case:
    """Old labels of ids, new labels, and the expected lineage; ids from 10 on have never been used."""

    old: list[int]
    old_ids: list[int]
    new: list[int]
    n_new: int
    expected: Lineage


CASES = {
    "all survive": Case(labels(5, 5), [3, 4], labels(5, 5), 2, Lineage([3, 4], [], {}, [])),
    "numbers swap, ids stay with the members": Case(
        labels(5, 5), [3, 4], [1] * 5 + [0] * 5, 2, Lineage([4, 3], [], {}, [])
    ),
    "a few members change sides": Case(labels(10, 10), [3, 4], labels(12, 8), 2, Lineage([3, 4], [], {}, [], 2 / 20)),
    "a group splits in two: the half that still overlaps enough stays the old one": Case(
        labels(6, 10), [3, 4], [0] * 6 + [1] * 5 + [2] * 5, 3, Lineage([3, 4, 10], [10], {}, [], 5 / 16)
    ),
    "a group falls apart: nobody is its heir": Case(
        labels(9, 9),
        [3, 4],
        [0] * 9 + [1] * 3 + [2] * 3 + [3] * 3,
        4,
        Lineage([3, 10, 11, 12], [10, 11, 12], {}, [4], 9 / 18),
    ),
    "a small group merges into a large one": Case(
        labels(12, 4), [3, 4], [0] * 16, 1, Lineage([3], [], {4: 3}, [], 4 / 16)
    ),
    "two equal groups merge: the larger overlap survives and inherits": Case(
        labels(6, 5), [3, 4], [0] * 11, 1, Lineage([3], [], {4: 3}, [], 5 / 11)
    ),
    "everything is mixed: all are new, the old ones stay as they were": Case(
        [0, 1, 2] * 6, [3, 4, 5], labels(6, 6, 6), 3, Lineage([10, 11, 12], [10, 11, 12], {}, [3, 4, 5], 1.0)
    ),
    "one dies into another while a third is born": Case(
        labels(8, 8, 3),
        [3, 4, 5],
        [0] * 8 + [1] * 4 + [2] * 4 + [0] * 3,
        3,
        Lineage([3, 4, 10], [10], {5: 3}, [], 7 / 19),
    ),
    "a group that nobody is in any more": Case(labels(5, 5), [3, 4, 5], labels(5, 5), 2, Lineage([3, 4], [], {}, [5])),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_case(case: Case) -> None:
    found = match_groups(np.array(case.old, np.uint8), case.old_ids, np.array(case.new, np.uint8), case.n_new, 10, 0.5)
    assert found.moved_share == pytest.approx(case.expected.moved_share)
    assert replace(found, moved_share=case.expected.moved_share) == case.expected


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=60)


@given(pairs, st.floats(0.05, 1.0))
def test_every_group_has_one_fate(members: list[tuple[int, int]], overlap: float) -> None:
    old, new = (np.array(side, np.uint8) for side in zip(*members, strict=True))
    old_ids = [7, 3, 9, 5]
    found = match_groups(old, old_ids, new, 5, 10, overlap)
    assert len(found.group_ids) == len(set(found.group_ids)) == 5
    survived = set(found.group_ids) & set(old_ids)
    assert found.born == sorted(set(found.group_ids) - survived) == list(range(10, 10 + 5 - len(survived)))
    assert sorted([*survived, *found.merged, *found.died]) == sorted(old_ids)
    # Counts are only ever handed to a group that is there and was there before.
    assert set(found.merged.values()) <= survived
    for cluster, group_id in enumerate(found.group_ids):
        if group_id in survived:
            before, now = old == old_ids.index(group_id), new == cluster
            assert (before & now).sum() >= overlap * (before | now).sum() - 1e-9


@given(pairs, st.permutations(range(5)))
def test_the_numbers_of_clusters_do_not_matter(members: list[tuple[int, int]], renumbered: list[int]) -> None:
    old, new = (np.array(side, np.uint8) for side in zip(*members, strict=True))
    a = match_groups(old, [7, 3, 9, 5], new, 5, 10, 0.51)
    b = match_groups(old, [7, 3, 9, 5], np.array(renumbered, np.uint8)[new], 5, 10, 0.51)
    # More than half of the union can be shared with one partner only, so the outcome is unique.
    for cluster, group_id in enumerate(a.group_ids):
        if group_id < 10:
            assert b.group_ids[renumbered[cluster]] == group_id
    assert set(a.merged) == set(b.merged)
    assert sorted(a.died) == sorted(b.died)
