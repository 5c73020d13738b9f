"""Group records: the groups that a clustering gives, as the state keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from online.attributes import AttributeSchema
from online.clustering import Clustering, Floats, group_feature, squared_distances
from online.profile import group_profile
from state.records import GroupRecord


def group_records(
    embedded: Floats,
    clustering: Clustering,
    group_ids: Sequence[int],
    born_at_ms: Mapping[int, int],
    now_ms: int,
    schema: AttributeSchema,
) -> list[GroupRecord]:
    """Return the groups of a product whose users have just been clustered: one for each cluster, in order.

    Parameters
    ----------
    embedded, clustering
        The reservoir's users, (n, D), and their clusters.
    group_ids
        The clusters' groups, (K,).
    born_at_ms
        When the older ones of them were born.
    now_ms
        When the others are.
    schema
        The attributes, for profiles.
    """
    k = len(group_ids)
    records = []
    for cluster, group_id in enumerate(group_ids):
        members, centroid = clustering.labels[k] == cluster, clustering.centroids[k][cluster]
        distances = squared_distances(embedded[members], centroid[None])[:, 0]
        records.append(
            GroupRecord(
                group_id,
                float(members.mean()),
                int(members.sum()),
                group_feature(embedded[members], centroid).tobytes(),
                group_profile(clustering.attributes[members], clustering.attributes, schema),
                born_at_ms.get(group_id, now_ms),
                float(np.sqrt(distances.mean())) if len(distances) else 0.0,
            )
        )
    return records
