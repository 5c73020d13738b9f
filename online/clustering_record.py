"""Clustering records: a product's clustering and its groups as the state keeps them."""

from __future__ import annotations

import numpy as np

from online.attributes import AttributeSchema
from online.clustering import Clustering, Floats, group_feature, squared_distances
from online.profile import group_profile
from state.records import ClusteringRecord, GroupRecord


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
    )


def unpack_clustering(record: ClusteringRecord, ks: tuple[int, ...], n_fields: int, d_model: int) -> Clustering:
    """Return the clustering of a record."""
    user_keys = np.frombuffer(record.user_keys, np.uint32).copy()
    clustering = Clustering(
        ks,
        np.frombuffer(record.reservoir, np.uint8).reshape(-1, n_fields).copy(),
        user_keys,
        record.n_seen,
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


def group_record(
    embedded: Floats,
    clustering: Clustering,
    k: int,
    cluster: int,
    group_id: int,
    schema: AttributeSchema,
    *,
    born_at_ms: int,
) -> GroupRecord:
    """Return the record of a group that has just been made: one cluster of the reservoir, ``embedded`` (n, D)."""
    members = clustering.labels[k] == cluster
    centroid = clustering.centroids[k][cluster]
    distances = squared_distances(embedded[members], centroid[None])[:, 0]
    return GroupRecord(
        group_id,
        float(members.mean()),
        int(members.sum()),
        group_feature(embedded[members], centroid).tobytes(),
        group_profile(clustering.attributes[members], clustering.attributes, schema),
        born_at_ms,
        float(np.sqrt(distances.mean())) if len(distances) else 0.0,
    )
