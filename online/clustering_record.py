"""Clustering records: a product's clustering as it lies in the state."""

from __future__ import annotations

import numpy as np

from online.clustering import Clustering
from state.records import ClusteringRecord


def pack_clustering(
    clustering: Clustering, version: int, k: int, group_ids: list[int], n_since_refresh: int
) -> ClusteringRecord:
    """Return the record of a clustering."""
    ks = clustering.ks if clustering.ready else ()
    return ClusteringRecord(
        version,
        k,
        group_ids,
        b"".join(clustering.centroids[each].tobytes() for each in ks),
        b"".join(clustering.masses[each].tobytes() for each in ks),
        clustering.n_seen,
        clustering.attributes.tobytes(),
        clustering.user_keys.tobytes(),
        b"".join(clustering.labels[each].tobytes() for each in ks),
        n_since_refresh,
        clustering.n_lent,
    )


def unpack_clustering(record: ClusteringRecord, ks: tuple[int, ...], n_fields: int, d_model: int) -> Clustering:
    """Return the clustering of a record."""
    user_keys = np.frombuffer(record.user_keys, np.uint32).copy()
    clustering = Clustering(
        ks,
        np.frombuffer(record.reservoir, np.uint8).reshape(-1, n_fields).copy(),
        user_keys,
        record.n_seen,
        record.n_lent,
    )
    if record.centroids:
        centroids = np.frombuffer(record.centroids, np.float32).reshape(-1, d_model)
        masses = np.frombuffer(record.masses, np.float32)
        labels = np.frombuffer(record.labels, np.uint8).reshape(len(ks), len(user_keys))
        start = 0
        for row, k in enumerate(ks):
            clustering.centroids[k] = centroids[start : start + k].copy()
            clustering.masses[k] = masses[start : start + k].copy()
            clustering.labels[k] = labels[row].copy()
            start += k
    return clustering
