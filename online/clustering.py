"""Clustering: k-means of one product's users for every K at once, kept up to date as they come.

Algorithm 1 of the paper in a streaming form: between two encoder versions centroids move by
mini-batches with a rate of 1/n; at a new version the reservoir is embedded anew and every K is
clustered again, from where its members were. Pure numpy, no state of its own beyond `Clustering`.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def squared_norms(points: Floats) -> Floats:
    """Return the squared lengths of (n, D) points, (n,)."""
    return np.asarray((points**2).sum(axis=1), np.float32)


def squared_distances(points: Floats, centroids: Floats, norms: Floats | None = None) -> Floats:
    """Return the squared Euclidean distances of (n, D) points to (K, D) centroids, (n, K).

    ``norms`` are the points' `squared_norms`, where they are known.
    """
    cross = points @ centroids.T  # (n, K)
    cross *= 2
    square = (squared_norms(points) if norms is None else norms)[:, None] + squared_norms(centroids)
    square -= cross
    return np.asarray(np.maximum(square, 0, out=square), np.float32)


def assign(points: Floats, centroids: Floats) -> npt.NDArray[np.uint8]:
    """Return the nearest centroid of each point, (n,)."""
    return np.asarray(squared_distances(points, centroids).argmin(axis=1), np.uint8)


def kmeans(
    points: Floats, centroids: Floats, n_iterations: int = LLOYD_ITERATIONS, norms: Floats | None = None
) -> tuple[Floats, Ints, float]:
    """Run Lloyd's iterations from given centroids; return centroids (K, D), labels (n,) and inertia. Eq. 5.

    A cluster that runs empty takes the point farthest from its own centroid. ``norms`` are the points'
    `squared_norms`, where they are known.
    """
    k = len(centroids)
    norms = squared_norms(points) if norms is None else norms
    centroids = centroids.copy()
    labels = np.full(len(points), -1)
    places = np.arange(len(points))
    for _ in range(n_iterations):
        distances = squared_distances(points, centroids, norms)
        new_labels = distances.argmin(axis=1)
        counts = np.bincount(new_labels, minlength=k)
        if not counts.all():
            nearest = distances[places, new_labels]
            for empty in np.flatnonzero(counts == 0):
                farthest = int(nearest.argmax())
                counts[new_labels[farthest]] -= 1
                new_labels[farthest] = empty
                counts[empty] += 1
                nearest[farthest] = 0
        if np.array_equal(new_labels, labels):
            break
        labels = new_labels
        centroids = _sums(points, labels, k) / np.maximum(counts, 1).astype(np.float32)[:, None]
    else:
        distances = squared_distances(points, centroids, norms)
    return centroids, labels, float(distances[places, labels].sum())


def _sums(points: Floats, labels: Ints, k: int) -> Floats:
    """Return the sum of the points of each label, (K, D)."""
    return np.asarray(_indicators(labels, k) @ points, np.float32)


def _indicators(labels: Ints, k: int) -> Floats:
    """Return which points have each label, (K, n): 1 or 0."""
    return np.asarray(labels == np.arange(k)[:, None], np.float32)


def kmeans_plus_plus(squares: Floats, k: int, rng: np.random.Generator) -> Ints:
    """Return k points to start from, far from each other (k-means++), (K,).

    ``squares`` are the squared distances of all points, (n, n).
    """
    chosen = [int(rng.integers(len(squares)))]
    nearest = squares[chosen[0]]
    for _ in range(1, k):
        cumulated = nearest.cumsum(dtype=np.float64)
        # A point is drawn in proportion to its squared distance from those chosen so far.
        index = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
        chosen.append(index if cumulated[-1] > 0 else int(rng.integers(len(squares))))
        nearest = np.minimum(nearest, squares[chosen[-1]])
    return np.array(chosen)


def mean_silhouettes(distances: Floats, labelings: Sequence[Ints]) -> list[float]:
    """Return the mean silhouette coefficient of each of some labelings (n,), given all distances (n, n).

    A point alone in its cluster counts as 0, as usual; fewer than two clusters give -1.
    """
    sizes = [int(labels.max()) + 1 for labels in labelings]
    indicators = [_indicators(labels, k) for labels, k in zip(labelings, sizes, strict=True)]
    # Distances are read once for all labelings.
    sums = np.concatenate(indicators) @ distances  # (sum of K, n)
    parts = np.split(sums, np.cumsum(sizes)[:-1])
    return [_mean_silhouette(part, labels) for part, labels in zip(parts, labelings, strict=True)]


def _mean_silhouette(sums: Floats, labels: Ints) -> float:
    """Return the mean silhouette of labels (n,), given every point's summed distances to each cluster, (K, n)."""
    counts = np.bincount(labels, minlength=len(sums))
    if (counts > 0).sum() < 2:
        return -1.0
    places = np.arange(len(labels))
    own_counts = counts[labels]
    own = sums[labels, places] / np.maximum(own_counts - 1, 1)
    other = np.where((counts > 0)[:, None], sums / np.maximum(counts, 1)[:, None], np.inf)
    other[labels, places] = np.inf
    nearest = other.min(axis=0)
    score = np.where(own_counts > 1, (nearest - own) / np.maximum(np.maximum(nearest, own), 1e-12), 0)
    return float(score.mean())


def with_large_groups(silhouettes: dict[int, float], clustering: Clustering, min_share: float) -> dict[int, float]:
    """Return the silhouettes of those K whose smallest cluster is large enough; the smallest K where none is."""
    smallest = {k: np.bincount(clustering.labels[k], minlength=k).min() / clustering.n_users for k in silhouettes}
    kept = {k: value for k, value in silhouettes.items() if smallest[k] >= min_share}
    first = min(silhouettes)
    return kept or {first: silhouettes[first]}


def choose_k(silhouettes: dict[int, float], current: int | None, tolerance: float, hysteresis: float) -> int:
    """Return the fewest groups whose silhouette is the best one but for ``tolerance``.

    Where few attributes matter, users coincide, and every further split of points that coincide makes the silhouette
    better still: the fewest that are as good are the groups that differ. The current K stays while it is within
    ``hysteresis`` of being chosen.
    """
    best = max(silhouettes.values())
    chosen = min(k for k, value in silhouettes.items() if value >= best - tolerance)
    if current not in silhouettes or silhouettes[current] < best - tolerance - hysteresis:
        return chosen
    # Fewer groups than the current ones have to be good enough by a margin.
    sure = [k for k, value in silhouettes.items() if value >= best - tolerance + hysteresis]
    return min([*sure, current])


def move_many(
    clusterings: Sequence[Clustering], owners: Ints, embedded: Floats, centroid_memory: float
) -> npt.NDArray[np.uint8]:
    """Move the centroids of several products towards a batch of their users, for every K.

    A batch has few users of a product, so that what costs is the number of operations: all products are moved at once.

    Parameters
    ----------
    clusterings
        P of them, all of the same Ks, and clustered before.
    owners
        The place of each user's clustering among them, (b,), in order; each has at least one.
    embedded
        e_{u|t} of the batch, (b, D), each of the same encoder version as its centroids.
    centroid_memory
        See `online.settings.GroupSettings`.

    Returns
    -------
    The users' clusters for every K before it moved, (number of Ks, b).
    """
    ks = clusterings[0].ks
    starts = np.cumsum(ks) - ks  # of each K among all centroids of a product
    centroids = np.stack([np.concatenate([each.centroids[k] for k in ks]) for each in clusterings])  # (P, sum of K, D)
    masses = np.stack([np.concatenate([each.masses[k] for k in ks]) for each in clusterings])
    bounds = np.searchsorted(owners, np.arange(len(clusterings) + 1))
    parts = [slice(start, end) for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    cross = np.concatenate([embedded[part] @ own.T for part, own in zip(parts, centroids, strict=True)])
    square = squared_norms(embedded)[:, None] + (centroids**2).sum(axis=2)[owners]
    distances = np.maximum(square - 2 * cross, 0)  # (b, sum of K)
    nearest = [distances[:, start : start + k].argmin(axis=1) for k, start in zip(ks, starts.tolist(), strict=True)]
    labels = np.stack(nearest)  # (number of Ks, b)
    indicators = np.zeros(distances.shape, np.float32)
    indicators[np.arange(len(owners)), labels + starts[:, None]] = 1
    counts = np.add.reduceat(indicators, bounds[:-1], axis=0)  # (P, sum of K)
    sums = np.stack([indicators[part].T @ embedded[part] for part in parts])
    masses += counts
    rate = np.where(counts > 0, counts / np.maximum(masses, 1), 0)[:, :, None]
    centroids += rate * (sums / np.maximum(counts, 1)[:, :, None] - centroids)
    np.minimum(masses, centroid_memory, out=masses)
    for each, own_centroids, own_masses in zip(clusterings, centroids, masses, strict=True):
        for k, start in zip(ks, starts.tolist(), strict=True):
            each.centroids[k][:] = own_centroids[start : start + k]
            each.masses[k][:] = own_masses[start : start + k]
    return labels.astype(np.uint8)


def sample_many(
    clustering: Clustering,
    attributes: npt.NDArray[np.uint8],
    user_keys: npt.NDArray[np.uint32],
    labels: npt.NDArray[np.uint8],
    *,
    reservoir_users: int,
    reservoir_memory: float,
    rng: np.random.Generator,
) -> None:
    """Sample a batch of users into a product's reservoir.

    Parameters
    ----------
    attributes, user_keys
        The batch's users, (b, A) and (b,).
    labels
        Their clusters for every K, (number of Ks, b); without meaning before the users have been clustered.
    reservoir_users, reservoir_memory
        See `online.settings.GroupSettings`.
    rng
        Source of the draws.
    """
    # Algorithm R, with n capped: an old user is then replaced at a constant rate and the sample follows the stream.
    n_seen = np.arange(clustering.n_seen + 1, clustering.n_seen + len(user_keys) + 1)
    slots = (rng.random(len(user_keys)) * np.minimum(n_seen, reservoir_users * reservoir_memory)).astype(np.int64)
    clustering.n_seen += len(user_keys)
    if clustering.n_users < reservoir_users:
        slots[: _fill(clustering, attributes, user_keys, labels, reservoir_users)] = reservoir_users
    rows_of: dict[int, int] = {}
    for row in np.flatnonzero(slots < reservoir_users).tolist():
        if not (clustering.user_keys == user_keys[row]).any():
            clustering.user_keys[slots[row]] = user_keys[row]
            rows_of[int(slots[row])] = row
    if rows_of:
        taken, rows = list(rows_of), list(rows_of.values())
        clustering.attributes[taken] = attributes[rows]
        if clustering.ready:
            for k, label in zip(clustering.ks, labels, strict=True):
                clustering.labels[k][taken] = label[rows]


def _fill(
    clustering: Clustering,
    attributes: npt.NDArray[np.uint8],
    user_keys: npt.NDArray[np.uint32],
    labels: npt.NDArray[np.uint8],
    capacity: int,
) -> int:
    """Take new users into a reservoir that is not full; return how many rows of the batch came before it was."""
    _, first = np.unique(user_keys, return_index=True)
    first.sort()
    n_free = capacity - clustering.n_users
    taken = first[~np.isin(user_keys[first], clustering.user_keys)][:n_free]
    clustering.attributes = np.concatenate([clustering.attributes, attributes[taken]])
    clustering.user_keys = np.concatenate([clustering.user_keys, user_keys[taken]])
    if clustering.ready:
        for k, label in zip(clustering.ks, labels, strict=True):
            clustering.labels[k] = np.concatenate([clustering.labels[k], label[taken]])
    return int(taken[-1]) + 1 if len(taken) == n_free else len(user_keys)


def recluster(clustering: Clustering, embedded: Floats, rng: np.random.Generator) -> dict[int, float]:
    """Cluster the reservoir anew for every K; return the mean silhouette of each.

    ``embedded`` is the reservoir under the new encoder, (n, D). Each K starts from the means of its
    old members, so that clusters stay what they were while the encoder moves; a fresh start
    (k-means++) wins only where it is clearly better.
    """
    norms = squared_norms(embedded)
    squares = squared_distances(embedded, embedded, norms)  # (n, n)
    found = []
    for k in clustering.ks:
        fresh = kmeans(embedded, embedded[kmeans_plus_plus(squares, k, rng)], norms=norms)
        if k in clustering.labels:
            old_labels = clustering.labels[k].astype(np.int64)
            counts = np.bincount(old_labels, minlength=k)
            if counts.all():
                means = _sums(embedded, old_labels, k) / counts.astype(np.float32)[:, None]
                warm = kmeans(embedded, means, norms=norms)
                if fresh[2] >= 0.97 * warm[2]:
                    fresh = warm
        centroids, labels, _ = fresh
        clustering.centroids[k] = centroids
        clustering.masses[k] = np.bincount(labels, minlength=k).astype(np.float32)
        clustering.labels[k] = labels.astype(np.uint8)
        found.append(labels)
    return dict(zip(clustering.ks, mean_silhouettes(np.sqrt(squares, out=squares), found), strict=True))


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
        start = min(max(round(middle - (n_points - 1) / 2), 0), max(len(order) - n_points, 0))
        picks += [int(order[min(start + step, len(order) - 1)]) for step in range(n_points)]
    return np.concatenate([centroid[None], members[picks]]).astype(np.float32)
