"""Displacement: how far the centroids of a product's groups have moved since it was regrouped."""

from __future__ import annotations

import msgspec
import numpy as np

from online.clustering import Floats
from state.reading import StateView
from state.records import ClusteringRecord, GroupRecord, ProductGroups

_CLUSTERING = msgspec.msgpack.Decoder(ClusteringRecord)


def centroid_displacements(groups: ProductGroups, centroids: Floats | None) -> list[float | None]:
    """Return how far each group's centroid has moved since the regrouping, in units of the group's radius then, (G,).

    It is the same encoder version before and after, so that only the users have changed. None where there is nothing to
    tell: a product with one group, or a group whose members were all alike.

    Parameters
    ----------
    groups
        A product's groups.
    centroids
        Where their centroids are now, (G, D); None: there are none.
    """
    if centroids is None or len(groups.groups) < 2:
        return [None] * len(groups.groups)
    return [_displacement(group, centroid) for group, centroid in zip(groups.groups, centroids, strict=True)]


def _displacement(group: GroupRecord, centroid: Floats) -> float | None:
    if not group.radius:
        return None
    before = np.frombuffer(group.feature, np.float32)[: len(centroid)]
    return float(np.linalg.norm(centroid - before)) / group.radius


def read_centroid_displacements(view: StateView, groups: ProductGroups) -> list[float | None]:
    """Return `centroid_displacements` of a product from the state."""
    value = view.clustering(groups.product_id)
    if value is None or len(groups.groups) < 2:
        return centroid_displacements(groups, None)
    record = _CLUSTERING.decode(value)
    # The record holds the centroids of every K that was tried, one K after the other.
    rows = np.frombuffer(record.centroids, np.float32).reshape(sum(groups.silhouettes), -1)
    start = sum(k for k in groups.silhouettes if k < record.k)
    return centroid_displacements(groups, rows[start : start + record.k])
