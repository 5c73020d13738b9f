"""Displacement: in units of the radius, from the regrouping to now, the same in memory and from the state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from online.attributes import AttributeSchema
from online.clustering import Clustering, move_many, recluster, sample_many
from online.clustering_record import pack_clustering
from online.displacement import centroid_displacements, read_centroid_displacements
from online.group_record import group_records
from online.settings import AttributeSettings
from state.reading import open_view
from state.records import ProductGroups, encode_record
from state.store import ChangeSet, Store, Table

Floats = npt.NDArray[np.float32]

N_USERS, DIM = 120, 3
SCHEMA = AttributeSchema(AttributeSettings(values={"age": ("young", "old")}))


def clustered(k: int) -> tuple[Clustering, ProductGroups, Floats]:
    """Return users around three centres, clustered, with the groups of one K."""
    rng = np.random.default_rng(1)
    points = (0.5 * rng.standard_normal((N_USERS, DIM)) + 10 * np.eye(DIM)[np.arange(N_USERS) % 3]).astype(np.float32)
    attributes = np.full((N_USERS, len(SCHEMA.names)), 2, np.uint8)
    clustering = Clustering((2, 3), attributes, np.arange(N_USERS, dtype=np.uint32), N_USERS)
    silhouettes = recluster(clustering, points, np.random.default_rng(0))
    groups = group_records(points, clustering, list(range(7, 7 + k)), {}, 0, SCHEMA)
    return clustering, ProductGroups("p", 1, groups, 10, silhouettes, None, False, 0, [], {}), points


def test_the_radius_is_the_root_mean_square_distance() -> None:
    clustering, groups, points = clustered(3)
    for cluster, group in enumerate(groups.groups):
        members = points[clustering.labels[3] == cluster].astype(np.float64)
        expected = np.sqrt(((members - members.mean(axis=0)) ** 2).sum(axis=1).mean())
        assert group.radius == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("radii", [0.0, 0.5, 3.0])
def test_a_centroid_that_moves_by_radii_is_displaced_by_as_many(radii: float) -> None:
    clustering, groups, _ = clustered(3)
    assert centroid_displacements(groups, clustering.centroids[3]) == [0.0, 0.0, 0.0]
    moved = clustering.centroids[3].copy()
    moved[1, 2] += radii * groups.groups[1].radius
    assert centroid_displacements(groups, moved) == pytest.approx([0.0, radii, 0.0], abs=1e-4)


def test_where_there_is_nothing_to_tell_it_is_none() -> None:
    clustering, groups, points = clustered(3)
    alone = ProductGroups("p", 1, groups.groups[:1], 10, {}, None, False, 0, [], {})
    assert centroid_displacements(alone, clustering.centroids[3][:1]) == [None]
    points[:] = points[0]
    clustering.centroids[2][:] = points[0]
    alike = group_records(points, clustering, [0, 1], {}, 0, SCHEMA)
    same = ProductGroups("p", 1, alike, 10, {}, None, False, 0, [], {})
    assert centroid_displacements(same, clustering.centroids[2] + 1) == [None, None]


@pytest.mark.parametrize("k", [2, 3])
def test_from_the_state_it_is_what_users_have_moved(tmp_path: Path, k: int) -> None:
    clustering, groups, points = clustered(k)
    rng = np.random.default_rng(5)
    users = rng.integers(N_USERS, size=60)
    labels = move_many([clustering], np.zeros(60, np.int64), points[users] + np.float32(1), 4_096)
    sample_many(
        clustering,
        clustering.attributes[users],
        users.astype(np.uint32),
        labels,
        reservoir_users=N_USERS,
        reservoir_memory=8,
        rng=rng,
    )
    expected = centroid_displacements(groups, clustering.centroids[k])
    assert min(displacement or 0 for displacement in expected) > 0.01
    changes = ChangeSet()
    record = pack_clustering(clustering, 1, k, [group.group_id for group in groups.groups], 60)
    changes.put(Table.GROUPS, b"p", encode_record(groups))
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        store.commit(changes)
        with open_view(store) as view:
            assert read_centroid_displacements(view, groups) == [None] * k  # no clustering is kept
        changes.put(Table.CLUSTERINGS, b"p", encode_record(record))
        store.commit(changes)
        with open_view(store) as view:
            assert read_centroid_displacements(view, groups) == expected
