"""Borrowing: a product that nobody has been shown yet starts with the clusters of a neighbour's users.

Some of these users stay in its reservoir, before its own, so that it can be moved to another encoder version, and what
its groups prefer can be expected, without the neighbour. When it has users enough they are sent away.
"""

from __future__ import annotations

import numpy as np

from online.clustering import Clustering, Floats, kmeans

BORROWED_IMPRESSIONS = 64.0
"""Impressions for which borrowed centroids stand, all clusters together: as many of its own weigh the same."""

LENT_USERS = 256
"""Users, at most, that stay in the reservoir of the product that borrows: enough to regroup it into any K."""


def borrow(lender: Clustering, embedded: Floats) -> Clustering:
    """Return a neighbour's clustering as another product sees the same users: centroids and labels of every K.

    ``embedded`` is the neighbour's reservoir in the space of the product that borrows, (n, D). Clusters start as what
    they are there, and settle.
    """
    lent = Clustering(lender.ks, lender.attributes, lender.user_keys)
    for k in lender.ks:
        labels = lender.labels[k]
        members = [embedded[labels == cluster] for cluster in range(k)]
        start = np.stack([each.mean(axis=0) if len(each) else embedded[0] for each in members])
        lent.centroids[k], new_labels, _ = kmeans(embedded, start)
        lent.labels[k] = new_labels.astype(np.uint8)
        masses = BORROWED_IMPRESSIONS * np.bincount(new_labels, minlength=k) / len(embedded)
        lent.masses[k] = masses.astype(np.float32)
    return lent


def with_lent_users(borrowed: Clustering, n_most: int) -> Clustering:
    """Return what `borrow` gave for a product without users of its own, with at most ``n_most`` of those lent to it."""
    n_lent = min(n_most, borrowed.n_users)
    return Clustering(
        borrowed.ks,
        borrowed.attributes[:n_lent].copy(),
        # A user is in a reservoir once. Those lent have no key: each may come to the product as one of its own.
        np.zeros(n_lent, np.uint32),
        0,
        n_lent,
        borrowed.centroids,
        borrowed.masses,
        {k: labels[:n_lent].copy() for k, labels in borrowed.labels.items()},
    )


def send_away(clustering: Clustering) -> None:
    """Take the users that were lent out of a reservoir."""
    n_lent, clustering.n_lent = clustering.n_lent, 0
    clustering.attributes = clustering.attributes[n_lent:]
    clustering.user_keys = clustering.user_keys[n_lent:]
    clustering.labels = {k: labels[n_lent:] for k, labels in clustering.labels.items()}
