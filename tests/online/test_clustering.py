"""Clustering: against scikit-learn, and the reservoir against the uniform distribution."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from online.clustering import (
    FEATURE_PERCENTILES,
    Clustering,
    assign,
    choose_k,
    group_feature,
    kmeans,
    kmeans_plus_plus,
    mean_silhouettes,
    move_many,
    recluster,
    sample_many,
    squared_distances,
)

Floats = npt.NDArray[np.float32]


def blobs(n: int, k: int, dim: int, spread: float, seed: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 3, (k, dim))
    truth = rng.integers(k, size=n)
    return np.asarray(centres[truth] + spread * rng.standard_normal((n, dim)), np.float32), truth


def start_of(points: Floats, k: int, seed: int) -> Floats:
    return points[kmeans_plus_plus(squared_distances(points, points), k, np.random.default_rng(seed))]


def all_distances(points: Floats) -> Floats:
    return np.sqrt(squared_distances(points, points))


def test_squared_distances_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(5, 1, (20, 7)).astype(np.float32), rng.normal(5, 1, (3, 7)).astype(np.float32)
    expected = ((a[:, None].astype(float) - b[None].astype(float)) ** 2).sum(axis=2)
    assert np.allclose(squared_distances(a, b), expected, rtol=1e-4, atol=1e-3)
    assert (squared_distances(a, a) >= 0).all()
    assert (assign(a, b) == expected.argmin(axis=1)).all()


@pytest.mark.parametrize(("k", "spread", "seed"), [(2, 0.5, 0), (3, 1.0, 1), (5, 2.0, 2), (4, 4.0, 3)])
def test_lloyd_gives_sklearns_clusters_from_the_same_start(k: int, spread: float, seed: int) -> None:
    points, _ = blobs(300, k, 8, spread, seed)
    start = start_of(points, k, seed)
    centroids, labels, inertia = kmeans(points, start, n_iterations=200)
    theirs = KMeans(k, init=start, n_init=1, max_iter=200, tol=0, algorithm="lloyd").fit(points)
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-4)
    assert adjusted_rand_score(theirs.labels_, labels) == 1
    assert np.allclose(centroids, theirs.cluster_centers_, atol=1e-3)


def test_a_few_iterations_from_far_starts_are_near_sklearns_best() -> None:
    points, truth = blobs(400, 4, 8, 1.0, 7)
    best = min(
        (kmeans(points, start_of(points, 4, seed)) for seed in range(5)),
        key=lambda found: found[2],
    )
    theirs = KMeans(4, n_init=10, random_state=0).fit(points)
    assert best[2] <= 1.001 * theirs.inertia_
    assert adjusted_rand_score(truth, best[1]) > 0.99


def test_a_cluster_that_runs_empty_takes_a_point() -> None:
    points, _ = blobs(50, 2, 4, 0.5, 1)
    start = np.concatenate([points[:2], np.full((1, 4), 1e3, np.float32)])  # nobody is near the third
    _, labels, _ = kmeans(points, start)
    assert np.bincount(labels, minlength=3).min() >= 1


def test_starting_centroids_are_different_points() -> None:
    points, _ = blobs(60, 3, 5, 0.2, 2)
    for seed in range(10):
        chosen = start_of(points, 3, seed)
        assert all((points == row).all(axis=1).any() for row in chosen)
        assert len(np.unique(chosen, axis=0)) == 3
    same = np.ones((10, 5), np.float32)
    assert start_of(same, 3, 0).shape == (3, 5)


def test_starting_centroids_are_drawn_by_their_squared_distance() -> None:
    points = np.array([[0], [1], [3]], np.float32)
    squares = squared_distances(points, points)
    drawn = [kmeans_plus_plus(squares, 2, np.random.default_rng(seed)).tolist() for seed in range(6_000)]
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(np.array(drawn).T), 1)
    assert chisquare(counts.sum(axis=1)).pvalue > 1e-3
    expected = squares / squares.sum(axis=1, keepdims=True) * counts.sum(axis=1, keepdims=True)
    assert (counts[squares == 0] == 0).all()
    assert np.abs((counts - expected) / np.sqrt(np.maximum(expected, 1))).max() < 4


@pytest.mark.parametrize(
    ("n", "k", "spread", "seed"), [(30, 2, 0.5, 0), (200, 3, 1.0, 1), (200, 5, 3.0, 2), (100, 4, 9.0, 3)]
)
def test_the_mean_silhouette_is_sklearns(n: int, k: int, spread: float, seed: int) -> None:
    points, truth = blobs(n, k, 6, spread, seed)
    expected = silhouette_score(points.astype(float), truth)
    assert mean_silhouettes(all_distances(points), [truth]) == [pytest.approx(expected, abs=1e-3)]


def test_silhouettes_of_odd_labels_are_sklearns() -> None:
    points, labels = blobs(40, 3, 6, 1.0, 4)
    labels[labels == 1] = 0  # an unused label between used ones
    labels[:1] = 4  # a point on its own counts as 0
    others = np.arange(40) % 3
    expected = [silhouette_score(points.astype(float), each) for each in (labels, others)]
    found = mean_silhouettes(all_distances(points), [labels, np.zeros(40, np.int64), others])
    assert found == [pytest.approx(expected[0], abs=1e-3), -1, pytest.approx(expected[1], abs=1e-3)]


BUMP = {2: 0.3, 3: 0.5, 4: 0.4}
RISING = {2: 0.40, 3: 0.50, 4: 0.55, 5: 0.58}


@pytest.mark.parametrize(
    ("silhouettes", "current", "tolerance", "hysteresis", "expected"),
    [
        pytest.param(BUMP, None, 0.0, 0.1, 3, id="without tolerance the best"),
        pytest.param({2: -0.5, 3: -0.1}, None, 0.0, 0.0, 3, id="the best below 0"),
        pytest.param({2: 0.5, 3: 0.5}, None, 0.0, 0.0, 2, id="the fewest of equals"),
        pytest.param(BUMP, 4, 0.0, 0.2, 4, id="without tolerance the current one within the margin"),
        pytest.param(BUMP, 4, 0.0, 0.05, 3, id="without tolerance the best beyond the margin"),
        pytest.param(BUMP, 2, 0.0, 0.25, 2, id="without tolerance fewer within the margin"),
        pytest.param({2: 0.5, 3: 0.9}, 7, 0.0, 0.9, 3, id="a current one that is not among them does not stay"),
        pytest.param(RISING, None, 0.1, 0.0, 3, id="the fewest that are as good"),
        pytest.param(RISING, None, 0.05, 0.0, 4, id="of a smaller tolerance more"),
        pytest.param(RISING, None, 0.5, 0.0, 2, id="of a large one the fewest there are"),
        pytest.param(RISING, 5, 0.1, 0.01, 3, id="fewer that are good enough by the margin"),
        pytest.param(RISING, 5, 0.1, 0.03, 4, id="fewer, but not as few as are good enough barely"),
        pytest.param(RISING, 4, 0.1, 0.03, 4, id="fewer that are good enough barely do not replace it"),
        pytest.param(RISING, 5, 0.02, 0.1, 5, id="the best one where no fewer are as good"),
        pytest.param(RISING, 5, 0.05, 0.1, 5, id="of a margin above the tolerance the current one within both"),
        pytest.param({2: 0.5, 3: 0.3}, 3, 0.05, 0.1, 2, id="of a margin above the tolerance fewer beyond both"),
        pytest.param(RISING, 3, 0.1, 0.05, 3, id="the one that is chosen"),
        pytest.param(RISING, 2, 0.1, 0.1, 2, id="fewer groups stay while they are nearly as good"),
        pytest.param(RISING, 2, 0.1, 0.07, 3, id="more replace fewer that are worse by the margin"),
    ],
)
def test_k_is_the_fewest_groups_that_are_as_good_with_hysteresis(
    silhouettes: dict[int, float], current: int | None, tolerance: float, hysteresis: float, expected: int
) -> None:
    assert choose_k(silhouettes, current, tolerance, hysteresis) == expected


SILHOUETTES = st.dictionaries(st.integers(2, 9), st.integers(-100, 100).map(lambda n: n / 100), min_size=1)


@given(SILHOUETTES, st.integers(2, 9), st.integers(0, 50), st.integers(0, 50))
def test_a_k_that_replaces_another_is_good_enough_and_stays(
    silhouettes: dict[int, float], current: int, tolerance: int, hysteresis: int
) -> None:
    # Fractions of a hundredth keep the thresholds clear of the silhouettes, so that no rounding decides.
    settings = (tolerance + 0.25) / 100, (hysteresis + 0.5) / 100
    chosen = choose_k(silhouettes, current, *settings)
    if chosen != current:
        assert silhouettes[chosen] >= max(silhouettes.values()) - settings[0]
        assert choose_k(silhouettes, chosen, *settings) == chosen


# --- The group feature, Eq. 6


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 11, 101, 500])
def test_a_group_feature_is_the_centroid_and_ten_members(n: int) -> None:
    rng = np.random.default_rng(n)
    members = rng.standard_normal((n, 16)).astype(np.float32)
    centroid = members.mean(axis=0)
    feature = group_feature(members, centroid)
    assert feature.shape == (11, 16)
    assert feature.dtype == np.float32
    assert (feature[0] == centroid).all()
    for row in feature[1:]:
        assert (members == row).all(axis=1).any()


def test_members_of_a_group_feature_lie_at_their_percentile_distances() -> None:
    n = 1_001
    distances = np.random.default_rng(0).permutation(n).astype(np.float32)
    members = np.zeros((n, 4), np.float32)
    members[:, 0] = distances
    feature = group_feature(members, np.zeros(4, np.float32))
    found = sorted(feature[1:, 0].tolist())
    assert list(FEATURE_PERCENTILES) == [15, 15, 55, 55, 55, 95, 95, 95, 95, 95]
    # The distance at a percentile of 0..1000 is ten times the percentile; several are neighbours in rank.
    assert np.allclose(found, [10 * p for p in FEATURE_PERCENTILES], atol=2)
    assert len(set(found)) == 10


def test_an_empty_group_has_its_centroid_eleven_times() -> None:
    centroid = np.arange(5, dtype=np.float32)
    feature = group_feature(np.zeros((0, 5), np.float32), centroid)
    assert (feature == centroid).all()
    assert feature.shape == (11, 5)


# --- Streams


def new_clustering(ks: tuple[int, ...] = (2, 3), n_fields: int = 1) -> Clustering:
    return Clustering(ks, np.zeros((0, n_fields), np.uint8), np.zeros(0, np.uint32))


def observe(clustering: Clustering, embedded: Floats, keys: npt.NDArray[np.uint32], seed: int, **more: float) -> None:
    labels = np.zeros((len(clustering.ks), len(keys)), np.uint8)
    if clustering.ready:
        owners = np.zeros(len(keys), np.int64)
        labels = move_many([clustering], owners, embedded, more.get("centroid_memory", 1e9))
    sample_many(
        clustering,
        np.asarray(keys % 251, np.uint8)[:, None],
        keys,
        labels,
        reservoir_users=int(more.get("reservoir_users", 64)),
        reservoir_memory=more.get("reservoir_memory", 1e9),
        rng=np.random.default_rng(seed),
    )


def clustered(ks: tuple[int, ...], dim: int, rng: np.random.Generator) -> Clustering:
    clustering = new_clustering(ks)
    for k in ks:
        clustering.centroids[k] = rng.normal(0, 2, (k, dim)).astype(np.float32)
        clustering.masses[k] = rng.uniform(1, 50, k).astype(np.float32)
        clustering.labels[k] = np.zeros(0, np.uint8)
    return clustering


def test_centroids_of_several_products_move_as_each_would_by_the_definition() -> None:
    rng, ks, memory = np.random.default_rng(3), (2, 3, 5), 40.0
    clusterings = [clustered(ks, 6, rng) for _ in range(4)]
    before = copy.deepcopy(clusterings)
    owners = np.repeat(np.arange(4), (1, 30, 7, 12))
    points = rng.normal(0, 2, (50, 6)).astype(np.float32)
    labels = move_many(clusterings, owners, points, memory)
    assert labels.dtype == np.uint8
    for place, (old, new) in enumerate(zip(before, clusterings, strict=True)):
        own = points[owners == place]
        for row, k in enumerate(ks):
            nearest = ((own[:, None] - old.centroids[k][None]) ** 2).sum(axis=2).argmin(axis=1)
            assert (labels[row, owners == place] == nearest).all()
            for cluster in range(k):
                members = own[nearest == cluster].astype(float)
                mass = old.masses[k][cluster] + len(members)
                centroid = old.centroids[k][cluster].astype(float)
                if len(members):
                    centroid += len(members) / mass * (members.mean(axis=0) - centroid)
                assert np.allclose(new.centroids[k][cluster], centroid, atol=1e-5)
                assert new.masses[k][cluster] == pytest.approx(min(mass, memory), rel=1e-6)


def sample_row_by_row(
    clustering: Clustering,
    keys: list[int],
    labels: npt.NDArray[np.uint8],
    draws: npt.NDArray[np.float64],
    memory: float,
) -> None:
    """Take users into a reservoir of 64 one after the other: Algorithm R as it is written."""
    for row, key in enumerate(keys):
        clustering.n_seen += 1
        slot = clustering.n_users
        if slot == 64:
            slot = int(draws[row] * min(clustering.n_seen, 64 * memory))
        if slot >= 64 or key in clustering.user_keys.tolist():
            continue
        append = slot == clustering.n_users
        clustering.user_keys = np.resize(clustering.user_keys, clustering.n_users + append)
        clustering.user_keys[slot] = key
        clustering.attributes = np.asarray(clustering.user_keys % 251, np.uint8)[:, None]
        for place, k in enumerate(clustering.ks):
            clustering.labels[k] = np.resize(clustering.labels[k], clustering.n_users)
            clustering.labels[k][slot] = labels[place, row]


@pytest.mark.parametrize(("n_users", "memory"), [(50, 1e9), (70, 2.0), (300, 1.0), (5_000, 4.0)])
def test_a_batch_fills_the_reservoir_as_its_users_would_one_by_one(n_users: int, memory: float) -> None:
    rng = np.random.default_rng(n_users)
    by_batch, by_row = clustered((2, 3), 2, rng), clustered((2, 3), 2, rng)
    for step in range(40):
        keys = rng.integers(n_users, size=int(rng.integers(1, 40))).astype(np.uint32)
        labels = rng.integers(2, size=(2, len(keys))).astype(np.uint8)
        sample_many(
            by_batch,
            np.asarray(keys % 251, np.uint8)[:, None],
            keys,
            labels,
            reservoir_users=64,
            reservoir_memory=memory,
            rng=np.random.default_rng(step),
        )
        draws = np.random.default_rng(step).random(len(keys))
        sample_row_by_row(by_row, keys.tolist(), labels, draws, memory)
        assert by_batch.n_seen == by_row.n_seen
        assert (by_batch.user_keys == by_row.user_keys).all()
        assert (by_batch.attributes == by_row.attributes).all()
        assert all((by_batch.labels[k] == by_row.labels[k]).all() for k in (2, 3))


def sample_of(n_users: int, memory: float, seed: int) -> npt.NDArray[np.uint32]:
    clustering = new_clustering()
    keys = np.arange(n_users, dtype=np.uint32)
    for start in range(0, n_users, 100):
        batch = keys[start : start + 100]
        observe(clustering, np.zeros((len(batch), 2), np.float32), batch, seed * 1_000 + start, reservoir_memory=memory)
    assert clustering.n_users == 64
    assert clustering.n_seen == n_users
    assert len(set(clustering.user_keys.tolist())) == 64
    assert (
        clustering.attributes[:, 0] == clustering.user_keys % 251
    ).all()  # a user's key and attributes stay together
    return clustering.user_keys


def test_the_reservoir_is_a_uniform_sample() -> None:
    n_users, n_runs = 800, 60
    drawn = np.concatenate([sample_of(n_users, 1e9, seed) for seed in range(n_runs)])
    per_tenth = np.bincount(drawn * 10 // n_users, minlength=10)
    assert chisquare(per_tenth).pvalue > 1e-3, per_tenth


def test_the_reservoir_forgets_by_its_memory() -> None:
    drawn = np.concatenate([sample_of(800, 2, seed) for seed in range(20)])
    per_half = np.bincount(drawn // 400, minlength=2)
    # 400 impressions at a replacement rate of 1/128 leave exp(-400/128) of what was there.
    assert per_half[0] / per_half.sum() == pytest.approx(np.exp(-400 / 128), abs=0.02)


def test_a_user_is_in_the_reservoir_once() -> None:
    clustering = new_clustering()
    for seed in range(30):
        observe(clustering, np.zeros((40, 2), np.float32), np.arange(40, dtype=np.uint32), seed)
    assert sorted(clustering.user_keys.tolist()) == list(range(40))
    assert clustering.n_seen == 1_200


def test_centroids_are_the_running_means_of_their_points() -> None:
    clustering = new_clustering((2,))
    clustering.centroids[2] = np.array([[0, 0], [10, 10]], np.float32)
    clustering.masses[2] = np.array([1, 1], np.float32)
    clustering.labels[2] = np.zeros(0, np.uint8)
    rng = np.random.default_rng(0)
    near = rng.normal(1, 0.1, (300, 2)).astype(np.float32)
    for start in range(0, 300, 30):
        observe(clustering, near[start : start + 30], np.arange(start, start + 30, dtype=np.uint32), start)
    assert np.allclose(clustering.centroids[2][0], near.sum(axis=0) / 301, atol=1e-3)
    assert (clustering.centroids[2][1] == 10).all()
    assert clustering.masses[2].tolist() == [301, 1]
    assert len(clustering.labels[2]) == clustering.n_users == 64
    assert (clustering.labels[2] == 0).all()


def test_centroids_with_a_short_memory_follow_the_stream() -> None:
    clustering = new_clustering((2,))
    clustering.centroids[2] = np.array([[0, 0], [100, 100]], np.float32)
    clustering.masses[2] = np.array([50, 50], np.float32)
    clustering.labels[2] = np.zeros(0, np.uint8)
    for step in range(20):
        points = np.full((10, 2), 5, np.float32)
        observe(clustering, points, np.arange(10, dtype=np.uint32), step, centroid_memory=50)
    # Each batch of 10 against a memory of 50 leaves 5/6 of the distance.
    assert clustering.centroids[2][0, 0] == pytest.approx(5 - 5 * (50 / 60) ** 20, rel=1e-4)


def test_reclustering_finds_the_groups_and_keeps_their_numbers_while_the_encoder_moves() -> None:
    points, truth = blobs(300, 3, 8, 0.4, 5)
    clustering = new_clustering((2, 3, 4))
    observe(clustering, points, np.arange(300, dtype=np.uint32), 0, reservoir_users=300)
    silhouettes = recluster(clustering, points, np.random.default_rng(0))
    assert choose_k(silhouettes, None, 0.0, 0.02) == 3
    assert choose_k(silhouettes, None, 0.1, 0.02) == 3
    assert silhouettes[3] == pytest.approx(silhouette_score(points, truth), abs=1e-3)
    assert adjusted_rand_score(truth, clustering.labels[3]) == 1
    before = clustering.labels[3].copy()
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    moved = np.asarray(points @ rotation + 2, np.float32)
    recluster(clustering, moved, np.random.default_rng(99))
    assert (clustering.labels[3] == before).all()
    assert (assign(moved, clustering.centroids[3]) == before).all()
    assert clustering.masses[3].tolist() == np.bincount(before).tolist()
