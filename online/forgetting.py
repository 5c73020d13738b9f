"""Forgetting: users taken out of products' samples, and their points out of the groups' features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from online.clustering import Clustering, Floats, group_feature
from state.records import GroupRecord


class ForgottenUsers(NamedTuple):
    """Users as samples know them: ``keys`` uint32 (U,), and the vectors of codes, uint8 (N,), they were seen with."""

    keys: npt.NDArray[np.uint32]
    codes: list[bytes]

    def are_in(self, clustering: Clustering) -> bool:
        """Return whether any of them is in a reservoir, or equal to one that was lent to it."""
        if np.isin(clustering.user_keys[clustering.n_lent :], self.keys).any():
            return True
        lent = {row.tobytes() for row in clustering.attributes[: clustering.n_lent]} if clustering.n_lent else set()
        return not lent.isdisjoint(self.codes)

    def may_be_in(self, record: bytes) -> bool:
        """Return whether an encoded clustering can hold any of them; true now and then by chance."""
        return any(each in record for each in (*(key.tobytes() for key in self.keys), *self.codes))


def forget_users(clustering: Clustering, users: ForgottenUsers) -> set[int]:
    """Take users out of a reservoir; return the keys of those who were there as its own.

    Lent users have no key. Of those that are equal to a user in all attributes, one goes for each such vector: if
    the user was lent, what is left is the same as if another one had been.
    """
    kept = ~np.isin(clustering.user_keys, users.keys)
    kept[: clustering.n_lent] = True
    n_lent = clustering.n_lent
    for codes in users.codes:
        equal = (clustering.attributes[:n_lent] == np.frombuffer(codes, np.uint8)).all(axis=1) & kept[:n_lent]
        kept[np.flatnonzero(equal)[:1]] = False
    found = set(clustering.user_keys[n_lent:][~kept[n_lent:]].tolist())
    clustering.n_lent = int(kept[:n_lent].sum())
    clustering.attributes = clustering.attributes[kept]
    clustering.user_keys = clustering.user_keys[kept]
    clustering.labels = {k: labels[kept] for k, labels in clustering.labels.items()}
    return found


def without_former_points(
    groups: Sequence[GroupRecord], embedded: Floats, labels: npt.NDArray[np.uint8]
) -> list[GroupRecord]:
    """Return groups whose features are made of the users that are in the reservoir now, around the same centroids.

    Parameters
    ----------
    groups
        A product's groups, in the order of its clusters.
    embedded, labels
        The reservoir's users, (n, D), of the groups' encoder version, and their clusters, (n,).
    """
    found = []
    for cluster, group in enumerate(groups):
        centroid = np.frombuffer(group.feature, np.float32)[: embedded.shape[1]]
        feature = group_feature(embedded[labels == cluster], centroid)
        found.append(msgspec.structs.replace(group, feature=feature.tobytes()))
    return found
