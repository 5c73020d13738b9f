"""The batch reference of Algorithm 1: how a product's users group when all are there at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


class GroupingInputError(ValueError):
    """Embeddings or a range of K that cannot be clustered."""

    def __init__(self, found: str, allowed: str) -> None:
        super().__init__(f"{found}; allowed is {allowed}. No groups were made.")


@dataclass(frozen=True, slots=True)
class BatchGroups:
    """Groups by Algorithm 1: ``labels`` (n,) from 0 to ``k - 1``, and the mean silhouette of each K tried."""

    labels: NDArray[np.int64]
    k: int
    silhouettes: dict[int, float]


def batch_groups(
    embeddings: ArrayLike,
    *,
    k_min: int = 2,
    k_max: int = 5,
    seed: int = 0,
    n_iterations: int = 25,
    n_restarts: int = 4,
    max_silhouette_rows: int = 2_000,
) -> BatchGroups:
    """Group users as Algorithm 1 does: k-means for every K, and the K with the best mean silhouette.

    Parameters
    ----------
    embeddings
        e_{u|t} of a product's users, ``(n, D)``.
    k_min, k_max
        Range of K, from 2. A K that is not below the number of users is left out.
    seed
        Seed of k-means' starts and of the silhouette's sample.
    n_iterations, n_restarts
        Lloyd steps of a start, and starts of each K (the best one counts).
    max_silhouette_rows
        Users that the silhouette, whose cost is quadratic, is averaged over at most.

    Returns
    -------
    The groups. Users who are all alike make one group (K = 1), without silhouettes.

    Raises
    ------
    GroupingInputError
        If the embeddings are not a finite table of at least two rows, or the range of K is empty.
    """
    points = np.ascontiguousarray(embeddings, dtype=np.float32)
    if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] < 1:
        raise GroupingInputError(f"embeddings have shape {points.shape}", "(n, D), n at least 2 and D at least 1")
    if not np.isfinite(points).all():
        raise GroupingInputError("embeddings hold values that are not finite", "finite numbers")
    if not 2 <= k_min <= k_max:
        raise GroupingInputError(f"k_min is {k_min} and k_max {k_max}", "2 <= k_min <= k_max")
    import faiss
    from sklearn.metrics import silhouette_score

    # One thread: faiss and torch each bring an OpenMP, and their pools would fight for the cores.
    faiss.omp_set_num_threads(1)
    n, width = points.shape
    sample = np.random.default_rng(seed).permutation(n)[:max_silhouette_rows]
    best = BatchGroups(np.zeros(n, np.int64), 1, {})
    silhouettes: dict[int, float] = {}
    for k in range(k_min, min(k_max, n - 1) + 1):
        kmeans = faiss.Kmeans(
            width,
            k,
            niter=n_iterations,
            nredo=n_restarts,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=n,
        )
        kmeans.train(points)
        _, nearest = kmeans.index.search(points, 1)
        _, labels = np.unique(nearest[:, 0], return_inverse=True)
        n_in_sample = np.unique(labels[sample]).size
        if not 2 <= n_in_sample < sample.size:
            continue
        silhouettes[k] = float(silhouette_score(points[sample], labels[sample]))
        if silhouettes[k] > max((value for tried, value in silhouettes.items() if tried != k), default=-np.inf):
            best = BatchGroups(labels.astype(np.int64), int(labels.max()) + 1, silhouettes)
    return best


def agreement(labels: ArrayLike, other_labels: ArrayLike) -> float:
    """Return the adjusted Rand index of two groupings of the same users: 1 if equal, about 0 if unrelated.

    Raises
    ------
    GroupingInputError
        If the two do not label the same number of users, or none.
    """
    a, b = np.asarray(labels), np.asarray(other_labels)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise GroupingInputError(f"labels have shapes {a.shape} and {b.shape}", "(n,) for both, n at least 1")
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(a, b))
