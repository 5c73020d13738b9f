"""Grouped products: one product's clustering, its groups, and which cluster is which group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.borrowing import borrow, with_lent_users
from online.clustering import Clustering, Floats, assign
from online.clustering_record import pack_clustering, unpack_clustering
from online.group_record import group_records
from online.limits import LINEAGE_KEPT
from online.lineage import Lineage, lineage_records
from online.settings import GroupSettings
from state.records import ClusteringRecord, ProductGroups

UNGROUPED = 0
"""Id of the group of all users from before the first grouping."""

KEPT_VERSIONS = 8
"""Encoder versions that a product may be behind the newest."""

YOUNG_SHARE = 0.25
"""Share of a product's impressions so far after which it is regrouped at first: the model still learns fast then."""

MIN_USERS_PER_GROUP = 16
"""Reservoir users for each of K_max groups before a product is grouped at all."""


def users_needed(settings: GroupSettings) -> int:
    """Return how many users of a product are needed to group them."""
    return MIN_USERS_PER_GROUP * settings.k_max


@dataclass
class GroupedProduct:
    """The grouping of one product.

    ``k`` is the chosen K, 1 before the first grouping; ``group_ids`` are its clusters' groups, (k,).
    ``n_since_refresh`` counts the impressions since it was last regrouped.
    """

    clustering: Clustering
    groups: ProductGroups
    k: int
    group_ids: list[int]
    n_since_refresh: int = 0

    @classmethod
    def new(cls, product_id: str, ks: tuple[int, ...], n_fields: int, now_ms: int) -> Self:
        """Return a product whose users are not grouped yet."""
        empty = Clustering(ks, np.zeros((0, n_fields), np.uint8), np.zeros(0, np.uint32))
        return cls(empty, ProductGroups(product_id, 0, [], 1, {}, None, False, now_ms, [], {}), 1, [UNGROUPED])

    @classmethod
    def borrowed(
        cls,
        product_id: str,
        lender: GroupedProduct,
        embedded: Floats,
        n_lent: int,
        now_ms: int,
        schema: AttributeSchema,
    ) -> Self:
        """Return a product that has no users yet, on groups of its own made of a neighbour's users.

        Parameters
        ----------
        product_id, lender
            The product, and its neighbour.
        embedded
            The neighbour's reservoir as the product sees it, of the neighbour's encoder version, (n, D).
        n_lent
            Users, at most, that stay in its reservoir.
        now_ms
            When the groups are born.
        schema
            The attributes, for profiles.
        """
        clustering = borrow(lender.clustering, embedded)
        group_ids = list(range(UNGROUPED + 1, UNGROUPED + 1 + lender.k))
        groups = ProductGroups(
            product_id,
            lender.groups.encoder_version,
            group_records(embedded, clustering, group_ids, {}, now_ms, schema),
            group_ids[-1] + 1,
            lender.groups.silhouettes,
            None,
            False,
            now_ms,
            lineage_records(Lineage(group_ids, group_ids, {}, []), now_ms),
            {},
            lender.groups.product_id,
        )
        return cls(with_lent_users(clustering, n_lent), groups, lender.k, group_ids)

    @classmethod
    def of_records(
        cls, record: ClusteringRecord, groups: ProductGroups, ks: tuple[int, ...], n_fields: int, d_model: int
    ) -> Self:
        """Return a product as the state holds it."""
        clustering = unpack_clustering(record, ks, n_fields, d_model)
        return cls(clustering, groups, record.k, record.group_ids, record.n_since_refresh)

    def clustering_record(self) -> ClusteringRecord:
        """Return the moving part, as the state holds it beside the groups."""
        version = self.groups.encoder_version
        return pack_clustering(self.clustering, version, self.k, self.group_ids, self.n_since_refresh)

    def is_to_move(self, version: int, settings: GroupSettings, *, relearnt: bool) -> bool:
        """Return whether it is to be regrouped under the newest encoder version; see `Grouping.waiting`."""
        own, clustering = self.groups.encoder_version, self.clustering
        if own == version or clustering.n_users < users_needed(settings):
            return False
        n_before = min(settings.refresh_every_impressions, YOUNG_SHARE * clustering.n_seen)
        return relearnt or own <= max(version - KEPT_VERSIONS, 0) or self.n_since_refresh >= n_before

    def sample(self, n_users: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return some of its users, (U, N), and the places of their groups among its groups, (U,)."""
        attributes = self.clustering.attributes[:n_users]
        if self.k == 1:
            return attributes, np.zeros(len(attributes), np.int64)
        return attributes, self.clustering.labels[self.k][:n_users].astype(np.int64)

    def dissolve(self, now_ms: int) -> list[int]:
        """Let its users be ungrouped, as before its first grouping; return the groups that were.

        Their counts go on under `UNGROUPED`.
        """
        former, clustering = self.group_ids, self.clustering
        clustering.centroids, clustering.masses, clustering.labels = {}, {}, {}
        lineage = Lineage([], [], dict.fromkeys(former, UNGROUPED), [])
        self.k, self.group_ids = 1, [UNGROUPED]
        self.groups = msgspec.structs.replace(
            self.groups,
            encoder_version=0,
            groups=[],
            silhouettes={},
            p_value=None,
            distinct=False,
            lineage=(self.groups.lineage + lineage_records(lineage, now_ms))[-LINEAGE_KEPT:],
            successors={**self.groups.successors, **lineage.merged},
            borrowed_from=None,
        )
        return former

    @property
    def own_groups(self) -> bool:
        """Whether its own users have been grouped."""
        return self.clustering.ready and self.groups.borrowed_from is None

    @property
    def n_own_users(self) -> int:
        """Users in the reservoir that were not lent."""
        return self.clustering.n_users - self.clustering.n_lent

    def groups_of_clusters(self, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Return the groups of users, (B,), from their clusters for every K, (number of Ks, B)."""
        if self.k == 1:
            return np.full(labels.shape[1], self.group_ids[0], np.int64)
        group_ids = np.asarray(self.group_ids)
        return np.asarray(group_ids[labels[self.clustering.ks.index(self.k)]], np.int64)

    def nearest_groups(self, embedded: Floats) -> npt.NDArray[np.int64]:
        """Return the groups of users, (B,), from their embeddings of its encoder version, (B, D)."""
        if self.k == 1:
            return np.full(len(embedded), self.group_ids[0], np.int64)
        return np.asarray(self.group_ids)[assign(embedded, self.clustering.centroids[self.k])]
