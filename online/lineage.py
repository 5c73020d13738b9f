"""Lineage: which of the new groups is which of the old, and who takes over whose counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from state.records import LineageRecord


@dataclass(frozen=True)
class Lineage:
    """The outcome of a regrouping.

    ``group_ids`` are the ids of the new clusters, in order. ``born`` of them are new; ``merged``
    maps a group that is no more to the one that takes over its counts; ``died`` lists those whose
    counts stay under their old id, for no single group follows them (a split). ``moved_share`` of the users are in
    another group than before.
    """

    group_ids: list[int]
    born: list[int]
    merged: dict[int, int]
    died: list[int]
    moved_share: float = 0.0


def match_groups(
    old_labels: npt.NDArray[np.uint8],
    old_ids: list[int],
    new_labels: npt.NDArray[np.uint8],
    n_new: int,
    next_group_id: int,
    survive_overlap: float,
) -> Lineage:
    """Match new clusters to old groups by the members they share (Hungarian method).

    Parameters
    ----------
    old_labels, new_labels
        The same users' old and new clusters, (n,).
    old_ids
        Ids of the old clusters.
    n_new, next_group_id
        Number of new clusters, and the first id that has never been used.
    survive_overlap
        Jaccard overlap from which a new cluster is the old group.
    """
    from scipy.optimize import linear_sum_assignment

    shared = np.zeros((len(old_ids), n_new))
    np.add.at(shared, (old_labels.astype(np.int64), new_labels.astype(np.int64)), 1)
    old_sizes, new_sizes = shared.sum(axis=1), shared.sum(axis=0)
    union = old_sizes[:, None] + new_sizes[None, :] - shared
    jaccard = shared / np.maximum(union, 1)
    ids: dict[int, int] = {}
    for old, new in zip(*linear_sum_assignment(-jaccard), strict=True):
        if jaccard[old, new] >= survive_overlap:
            ids[int(new)] = old_ids[int(old)]
    born = []
    for new in range(n_new):
        if new not in ids:
            ids[new] = next_group_id
            born.append(next_group_id)
            next_group_id += 1
    survived = set(ids.values()) - set(born)
    merged, died = {}, []
    for old, old_id in enumerate(old_ids):
        if old_id in survived:
            continue
        heir = int(shared[old].argmax())
        if shared[old, heir] > old_sizes[old] / 2 and ids[heir] in survived:
            merged[old_id] = ids[heir]
        else:
            died.append(old_id)
    n_stayed = sum(shared[row, new] for row, old_id in enumerate(old_ids) for new in ids if ids[new] == old_id)
    moved_share = 1.0 - float(n_stayed) / max(len(old_labels), 1)
    return Lineage([ids[new] for new in range(n_new)], born, merged, died, moved_share)


def lineage_records(lineage: Lineage, now_ms: int) -> list[LineageRecord]:
    """Return what became of the groups, as it is kept."""
    return [
        *(LineageRecord(now_ms, "birth", group_id, None) for group_id in lineage.born),
        *(LineageRecord(now_ms, "merge", old, heir) for old, heir in lineage.merged.items()),
        *(LineageRecord(now_ms, "death", group_id, None) for group_id in lineage.died),
    ]
