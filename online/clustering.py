"""Clustering: k-means of one product's users for every K at once, kept up to date as they come.

Algorithm 1 of the paper in a streaming form: between two encoder versions centroids move by
mini-batches with a rate of 1/n; at a new version the reservoir is embedded anew and every K is
clustered again, from where its members were. Pure numpy, no state of its own beyond `Clustering`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FEATURE_PERCENTILES = (15.0, 15.0, 55.0, 55.0, 55.0, 95.0, 95.0, 95.0, 95.0, 95.0)
"""Percentile distances of the peripheral points of Eq. 6: the 15th twice, the 55th three times, the 95th five times."""

LLOYD_ITERATIONS = 12


@dataclass
class Clustering:
    """K-means of one product's users, for each K of ``ks``.

    ``centroids[K]`` is (K, D), ``masses[K]`` (K,) the impressions that each centroid remembers,
    ``labels[K]`` (n,) the reservoir's clusters. ``attributes`` (n, A) and ``user_keys`` (n,) are
    the reservoir: a sample of the product's users, ``n_seen`` of how many impressions. The first
    ``n_lent`` of them are users of another product, whose clusters it has borrowed (`online.borrowing`).
    """

    ks: tuple[int, ...]
    attributes: npt.NDArray[np.uint8]
    user_keys: npt.NDArray[np.uint32]
    n_seen: int = 0
    n_lent: int = 0
    centroids: dict[int, Floats] = field(default_factory=dict)
    masses: dict[int, Floats] = field(default_factory=dict)
    labels: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def n_users(self) -> int:
        """Users in the reservoir."""
        return len(self.user_keys)

    @property
    def ready(self) -> bool:
        """Whether the users have been clustered."""
        return bool(self.centroids)


def squared_distances(points: Floats, centroids: Floats) -> Floats:
    """Return the squared Euclidean distances of (n, D) points to (K, D) centroids, (n, K)."""
    cross = points @ centroids.T  # (n, K)
    square = (points**2).sum(axis=1)[:, None] + (centroids**2).sum(axis=1)[None, :] - 2 * cross
    return np.asarray(np.maximum(square, 0), np.float32)


def assign(points: Floats, centroids: Floats) -> npt.NDArray[np.uint8]:
    """Return the nearest centroid of each point, (n,)."""
    return np.asarray(squared_distances(points, centroids).argmin(axis=1), np.uint8)


def kmeans(points: Floats, centroids: Floats, n_iterations: int = LLOYD_ITERATIONS) -> tuple[Floats, Ints, float]:
    """Run Lloyd's iterations from given centroids; return centroids (K, D), labels (n,) and inertia. Eq. 5.

    A cluster that runs empty takes the point farthest from its own centroid.
    """
    k = len(centroids)
    centroids = centroids.copy()
    labels = np.full(len(points), -1)
    for _ in range(n_iterations):
        distances = squared_distances(points, centroids)
        new_labels = distances.argmin(axis=1)
        nearest = distances[np.arange(len(points)), new_labels]
        counts = np.bincount(new_labels, minlength=k)
        for empty in np.flatnonzero(counts == 0):
            farthest = int(nearest.argmax())
            counts[new_labels[farthest]] -= 1
            new_labels[farthest] = empty
            counts[empty] += 1
            nearest[farthest] = 0
        if np.array_equal(new_labels, labels):
            break
        labels = new_labels
        centroids = _means(points, labels, k)
    distances = squared_distances(points, centroids)
    return centroids, labels, float(distances[np.arange(len(points)), labels].sum())


def _means(points: Floats, labels: Ints, k: int) -> Floats:
    onehot = np.zeros((k, len(points)), np.float32)
    onehot[labels, np.arange(len(points))] = 1
    return np.asarray((onehot @ points) / np.maximum(onehot.sum(axis=1, keepdims=True), 1), np.float32)


def kmeans_plus_plus(points: Floats, k: int, rng: np.random.Generator) -> Floats:
    """Return k starting centroids among the points, far from each other (k-means++)."""
    chosen = [int(rng.integers(len(points)))]
    nearest = squared_distances(points, points[chosen]).min(axis=1)
    for _ in range(1, k):
        total = float(nearest.sum())
        index = int(rng.choice(len(points), p=nearest / total)) if total > 0 else int(rng.integers(len(points)))
        chosen.append(index)
        nearest = np.minimum(nearest, squared_distances(points, points[[index]])[:, 0])
    return points[chosen].copy()


def mean_silhouette(distances: Floats, labels: Ints) -> float:
    """Return the mean silhouette coefficient of labels, given all distances (n, n).

    A point alone in its cluster counts as 0, as usual; fewer than two clusters give -1.
    """
    k = int(labels.max()) + 1
    counts = np.bincount(labels, minlength=k)
    if (counts > 0).sum() < 2:
        return -1.0
    onehot = np.zeros((len(labels), k), np.float32)
    onehot[np.arange(len(labels)), labels] = 1
    sums = distances @ onehot  # (n, K)
    own = sums[np.arange(len(labels)), labels] / np.maximum(counts[labels] - 1, 1)
    other = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    other[np.arange(len(labels)), labels] = np.inf
    nearest = other.min(axis=1)
    score = np.where(counts[labels] > 1, (nearest - own) / np.maximum(np.maximum(nearest, own), 1e-12), 0)
    return float(score.mean())


def with_large_groups(silhouettes: dict[int, float], clustering: Clustering, min_share: float) -> dict[int, float]:
    """Return the silhouettes of those K whose smallest cluster is large enough; the smallest K where none is."""
    smallest = {k: np.bincount(clustering.labels[k], minlength=k).min() / clustering.n_users for k in silhouettes}
    kept = {k: value for k, value in silhouettes.items() if smallest[k] >= min_share}
    first = min(silhouettes)
    return kept or {first: silhouettes[first]}


def choose_k(silhouettes: dict[int, float], current: int | None, hysteresis: float) -> int:
    """Return the K of the best silhouette; the current one stays unless another is better by ``hysteresis``."""
    best = max(silhouettes, key=lambda k: (silhouettes[k], -k))
    if current in silhouettes and silhouettes[best] < silhouettes[current] + hysteresis:
        return current
    return best


def observe_many(
    clustering: Clustering,
    embedded: Floats,
    attributes: npt.NDArray[np.uint8],
    user_keys: npt.NDArray[np.uint32],
    *,
    reservoir_users: int,
    reservoir_memory: float,
    centroid_memory: float,
    rng: np.random.Generator,
) -> None:
    """Move the centroids of every K towards a batch of users, and sample users into the reservoir.

    Parameters
    ----------
    embedded
        e_{u|t} of the batch, (b, D), of the same encoder version as the centroids.
    attributes, user_keys
        The batch's users, (b, A) and (b,).
    reservoir_users, reservoir_memory, centroid_memory
        See `online.settings.GroupSettings`.
    rng
        Source of the reservoir's draws.
    """
    labels = {}
    if clustering.ready:
        for k in clustering.ks:
            labels[k] = assign(embedded, clustering.centroids[k])
            _move(clustering.centroids[k], clustering.masses[k], embedded, labels[k], centroid_memory)
    # Algorithm R, with n capped: an old user is then replaced at a constant rate and the sample follows the stream.
    capacity = reservoir_users
    draws = rng.random(len(user_keys))
    for row in range(len(user_keys)):
        clustering.n_seen += 1
        if clustering.n_users < capacity:
            if (clustering.user_keys == user_keys[row]).any():
                continue
            clustering.attributes = np.concatenate([clustering.attributes, attributes[row : row + 1]])
            clustering.user_keys = np.append(clustering.user_keys, user_keys[row])
            for k, label in labels.items():
                clustering.labels[k] = np.append(clustering.labels[k], label[row])
            continue
        slot = int(draws[row] * min(clustering.n_seen, capacity * reservoir_memory))
        if slot >= capacity or (clustering.user_keys == user_keys[row]).any():
            continue
        clustering.attributes[slot] = attributes[row]
        clustering.user_keys[slot] = user_keys[row]
        for k, label in labels.items():
            clustering.labels[k][slot] = label[row]


def _move(centroids: Floats, masses: Floats, points: Floats, labels: npt.NDArray[np.uint8], memory: float) -> None:
    k = len(centroids)
    counts = np.bincount(labels, minlength=k).astype(np.float32)
    means = _means(points, labels.astype(np.int64), k)
    masses += counts
    rate = np.where(counts > 0, counts / np.maximum(masses, 1), 0)[:, None]
    centroids += rate * (means - centroids)
    np.minimum(masses, memory, out=masses)


def recluster(clustering: Clustering, embedded: Floats, rng: np.random.Generator) -> dict[int, float]:
    """Cluster the reservoir anew for every K; return the mean silhouette of each.

    ``embedded`` is the reservoir under the new encoder, (n, D). Each K starts from the means of its
    old members, so that clusters stay what they were while the encoder moves; a fresh start
    (k-means++) wins only where it is clearly better.
    """
    distances = np.sqrt(squared_distances(embedded, embedded))  # (n, n)
    silhouettes = {}
    for k in clustering.ks:
        fresh = kmeans(embedded, kmeans_plus_plus(embedded, k, rng))
        if k in clustering.labels and len(np.unique(clustering.labels[k])) == k:
            warm = kmeans(embedded, _means(embedded, clustering.labels[k].astype(np.int64), k))
            if fresh[2] >= 0.97 * warm[2]:
                fresh = warm
        centroids, labels, _ = fresh
        clustering.centroids[k] = centroids
        clustering.masses[k] = np.bincount(labels, minlength=k).astype(np.float32)
        clustering.labels[k] = labels.astype(np.uint8)
        silhouettes[k] = mean_silhouette(distances, labels)
    return silhouettes


def group_feature(members: Floats, centroid: Floats) -> Floats:
    """Return the group feature, (11, D): the centroid and ten members at percentile distances. Eq. 6, Algorithm 1.

    Members are taken by the rank of their distance; where a percentile is asked for several times,
    they are neighbours in rank around it.
    """
    if not len(members):
        return np.repeat(centroid[None], 1 + len(FEATURE_PERCENTILES), axis=0)
    order = np.argsort(squared_distances(members, centroid[None])[:, 0], kind="stable")
    picks: list[int] = []
    for percentile in sorted(set(FEATURE_PERCENTILES)):
        n_points = FEATURE_PERCENTILES.count(percentile)
        middle = percentile / 100 * (len(order) - 1)
        start = int(np.clip(round(middle - (n_points - 1) / 2), 0, max(len(order) - n_points, 0)))
        picks += [int(order[min(start + step, len(order) - 1)]) for step in range(n_points)]
    return np.concatenate([centroid[None], members[picks]]).astype(np.float32)
