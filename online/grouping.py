"""Grouping: the users of every product in groups that stay themselves while the encoder moves.

Every group belongs to one encoder version, the one under which its centroids were made. A new
version is adopted at intervals; products then move to it a few at a time, so that no micro-batch
takes long. A product on an old version goes on with that version's weights until its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.clustering import (
    Clustering,
    Floats,
    assign,
    choose_k,
    group_feature,
    move_many,
    recluster,
    sample_many,
)
from online.clustering_record import pack_clustering, unpack_clustering
from online.learner import Encoder
from online.limits import LINEAGE_KEPT
from online.lineage import Lineage, match_groups
from online.mismatch import check_space
from online.profile import group_profile
from online.settings import GroupSettings
from state.records import (
    SPACE_KEY,
    ClusteringRecord,
    GroupRecord,
    LineageRecord,
    ProductGroups,
    encode_record,
    number_key,
)
from state.store import ChangeSet, ReadTransaction, Table

UNGROUPED = 0
"""Id of the group of all users from before the first grouping."""

_CLUSTERING = msgspec.msgpack.Decoder(ClusteringRecord)
_GROUPS = msgspec.msgpack.Decoder(ProductGroups)

KEPT_VERSIONS = 8
"""Encoder versions that a product may be behind the newest."""

YOUNG_SHARE = 0.25
"""Share of a product's impressions so far after which it is regrouped at first: the model still learns fast then."""

EncoderOf = Callable[[bytes], Encoder]
"""Makes an encoder of weights."""


@dataclass
class _Product:
    clustering: Clustering
    groups: ProductGroups
    k: int
    group_ids: list[int]
    n_since_refresh: int = 0

    def nearest_groups(self, embedded: Floats) -> npt.NDArray[np.int64]:
        if self.k == 1:
            return np.full(len(embedded), self.group_ids[0], np.int64)
        return np.asarray(self.group_ids)[assign(embedded, self.clustering.centroids[self.k])]


class Grouping:
    """Groups of the products that are resident.

    Parameters
    ----------
    settings
        How many groups, how often, with what hysteresis.
    schema
        The attributes, for profiles.
    d_model
        Width of the user embeddings.
    encoder_of
        Makes an encoder of weights.
    seed
        Seed of the reservoirs and of k-means.
    """

    def __init__(
        self, settings: GroupSettings, schema: AttributeSchema, d_model: int, encoder_of: EncoderOf, seed: int
    ) -> None:
        self._settings = settings
        self._schema = schema
        self._d_model = d_model
        self._encoder_of = encoder_of
        self._seed = seed
        self._ks = tuple(range(settings.k_min, settings.k_max + 1))
        self._products: dict[str, _Product] = {}
        self._encoders: dict[int, Encoder] = {}
        self._new_weights: dict[int, bytes] = {}
        self._changed_groups: dict[str, None] = {}
        self._changed_clusterings: dict[str, None] = {}
        self.version = 0

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state, with its encoder versions and no product.

        Raises
        ------
        online.mismatch.SpaceMismatchError
            Its users are grouped in another space than the settings name.
        """
        check_space(txn.get(Table.ENCODERS, SPACE_KEY), self._settings.space)
        for key, weights in txn.scan(Table.ENCODERS, prefix=b"v"):
            version = int.from_bytes(key[1:], "big")
            self._encoders[version] = self._encoder_of(weights)
            self.version = max(self.version, version)

    def bring_in(self, product_id: str, txn: ReadTransaction) -> None:
        """Take a product over from the state, if it holds its groups."""
        value, groups = txn.get(Table.CLUSTERINGS, product_id.encode()), txn.get(Table.GROUPS, product_id.encode())
        if value is None or groups is None:
            return
        record = _CLUSTERING.decode(value)
        self._products[product_id] = _Product(
            unpack_clustering(record, self._ks, len(self._schema.names), self._d_model),
            _GROUPS.decode(groups),
            record.k,
            record.group_ids,
            record.n_since_refresh,
        )

    def park(self, product_id: str) -> None:
        """Forget a product, all of which has been written; the encoder version that it is on is not kept for it."""
        self._products.pop(product_id, None)

    def has_encoder(self, product_id: str) -> bool:
        """Return whether new users of a product can be embedded: its encoder version may have gone while it was parked.

        A product that has not been grouped needs none.
        """
        version = self._version_of(product_id)
        return not version or version in self._encoders

    def groups_of(self, product_id: str) -> ProductGroups | None:
        """Return a product's groups as of its last regrouping."""
        product = self._products.get(product_id)
        return None if product is None else product.groups

    def current_group(self, product_id: str, group_id: int) -> int:
        """Return the group that has taken over a group's counts; itself where none has."""
        product = self._products.get(product_id)
        if product is None:
            return group_id
        while group_id in product.groups.successors:
            group_id = product.groups.successors[group_id]
        return group_id

    def adopt(self, weights: bytes) -> None:
        """Adopt a new encoder version; products move to it by `refresh_some`."""
        self.version += 1
        self._encoders[self.version] = self._encoder_of(weights)
        self._new_weights[self.version] = weights

    def observe_many(
        self,
        product_ids: list[str],
        product_numbers: npt.NDArray[np.int64],
        attributes: npt.NDArray[np.uint8],
        user_keys: npt.NDArray[np.uint32],
        now_ms: int,
        batch_number: int,
    ) -> npt.NDArray[np.int64]:
        """Take in a batch of impressions; return each user's group, (B,).

        Parameters
        ----------
        product_ids, product_numbers
            The impressions' products, by id and registration number, (B,).
        attributes, user_keys
            Their users, (B, N) and (B,).
        now_ms, batch_number
            Event time, and the number of the batch, which seeds the draws.
        """
        group_ids = np.zeros(len(product_ids), np.int64)
        numbers, first, inverse = np.unique(product_numbers, return_index=True, return_inverse=True)
        embedded = self._embed(numbers, [product_ids[row] for row in first], inverse, product_numbers, attributes)
        # By user within a product, so that the order of a batch's events changes nothing.
        order = np.lexsort((user_keys, inverse))
        bounds = np.searchsorted(inverse[order], np.arange(len(numbers) + 1))
        products = [self._product(product_ids[row], now_ms) for row in first]
        labels = self._move_many(products, inverse[order], embedded[order])
        for position, (number, product) in enumerate(zip(numbers.tolist(), products, strict=True)):
            part = slice(bounds[position], bounds[position + 1])
            rows = order[part]
            sample_many(
                product.clustering,
                attributes[rows],
                user_keys[rows],
                labels[:, part],
                reservoir_users=self._settings.reservoir_users,
                reservoir_memory=self._settings.reservoir_memory,
                rng=np.random.default_rng([self._seed, batch_number, number]),
            )
            product.n_since_refresh += len(rows)
            self._changed_clusterings[product_ids[first[position]]] = None
            group_ids[rows] = product.nearest_groups(embedded[rows])
        return group_ids

    def _move_many(
        self, products: list[_Product], owners: npt.NDArray[np.int64], embedded: Floats
    ) -> npt.NDArray[np.uint8]:
        """Move the centroids of products that have any; return the users' clusters before, (number of Ks, B)."""
        labels = np.zeros((len(self._ks), len(owners)), np.uint8)
        ready = np.array([product.clustering.ready for product in products])
        if ready.any():
            rows = ready[owners]
            places = np.cumsum(ready) - 1  # of each product among those
            clusterings = [product.clustering for product in products if product.clustering.ready]
            labels[:, rows] = move_many(
                clusterings, places[owners[rows]], embedded[rows], self._settings.centroid_memory
            )
        return labels

    def _embed(
        self,
        numbers: npt.NDArray[np.int64],
        product_ids: list[str],
        inverse: npt.NDArray[np.int64],
        product_numbers: npt.NDArray[np.int64],
        attributes: npt.NDArray[np.uint8],
    ) -> Floats:
        embedded = np.zeros((len(attributes), self._d_model), np.float32)
        versions = np.array([self._version_of(product_id) for product_id in product_ids])
        for version in np.unique(versions):
            if version:
                rows = (versions == version)[inverse]
                embedded[rows] = self._encoders[int(version)].embed_many(product_numbers[rows], attributes[rows])
        return embedded

    def assign_many(
        self, product_id: str, product_number: int, attributes: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.int64]:
        """Return the present group of users of a product, (B,), from their attributes alone; nothing is learnt."""
        product = self._products.get(product_id)
        if product is None:
            return np.zeros(len(attributes), np.int64)
        return product.nearest_groups(self.embed_many(product_id, product_number, attributes))

    def embed_many(self, product_id: str, product_number: int, attributes: npt.NDArray[np.uint8]) -> Floats:
        """Return users in the space in which a product has grouped them, (B, D); zeros before it has."""
        rows = np.zeros(len(attributes), np.int64)
        numbers = np.array([product_number])
        return self._embed(numbers, [product_id], rows, numbers[rows], attributes)

    def _version_of(self, product_id: str) -> int:
        product = self._products.get(product_id)
        return 0 if product is None else product.groups.encoder_version

    def _product(self, product_id: str, now_ms: int) -> _Product:
        product = self._products.get(product_id)
        if product is None:
            n_fields = len(self._schema.names)
            empty = Clustering(self._ks, np.zeros((0, n_fields), np.uint8), np.zeros(0, np.uint32))
            groups = ProductGroups(product_id, 0, [], 1, {}, None, False, now_ms, [], {})
            product = self._products[product_id] = _Product(empty, groups, 1, [UNGROUPED])
            self._changed_groups[product_id] = None
        return product

    def waiting(self, relearnt: Collection[str] = ()) -> list[str]:
        """Return the resident products that are to move to the newest encoder version, those on the oldest first.

        So every product has its turn, also where versions come faster than all could move to each. A product waits
        until it has had enough impressions since its last move. Those that are ``relearnt``, because their tastes have
        changed, do not, and nor do those whose version is about to be dropped.
        """
        waiting = sorted(
            (product.groups.encoder_version, product_id)
            for product_id, product in self._products.items()
            if product.groups.encoder_version < self.version
            and product.clustering.n_users >= MIN_USERS_PER_GROUP * self._settings.k_max
            and (
                product.groups.encoder_version <= max(self.version - KEPT_VERSIONS, 0)
                or product.n_since_refresh >= self._n_before_refresh(product)
                or product_id in relearnt
            )
        )
        return [product_id for _, product_id in waiting]

    def _n_before_refresh(self, product: _Product) -> float:
        return min(self._settings.refresh_every_impressions, YOUNG_SHARE * product.clustering.n_seen)

    def refresh(self, product_id: str, product_number: int, now_ms: int) -> Lineage:
        """Move a product to the newest encoder version and regroup its users. Algorithm 1."""
        product = self._products[product_id]
        clustering, settings = product.clustering, self._settings
        old_labels = clustering.labels.get(product.k)
        numbers = np.full(clustering.n_users, product_number, np.int64)
        embedded = self._encoders[self.version].embed_many(numbers, clustering.attributes)
        rng = np.random.default_rng([self._seed, self.version, product_number])
        silhouettes = recluster(clustering, embedded, rng)
        k = choose_k(
            _with_large_groups(silhouettes, clustering, settings.min_share),
            product.k if product.k > 1 else None,
            settings.k_tolerance,
            settings.k_hysteresis,
        )
        labels = clustering.labels[k]
        if old_labels is None:
            next_id = product.groups.next_group_id
            lineage = Lineage(list(range(next_id, next_id + k)), list(range(next_id, next_id + k)), {}, [UNGROUPED])
        else:
            lineage = match_groups(
                old_labels, product.group_ids, labels, k, product.groups.next_group_id, settings.survive_overlap
            )
        born_at = {group.group_id: group.born_at_ms for group in product.groups.groups}
        groups = [
            self._group(embedded, clustering, k, cluster, group_id, born_at.get(group_id, now_ms))
            for cluster, group_id in enumerate(lineage.group_ids)
        ]
        product.k, product.group_ids, product.n_since_refresh = k, lineage.group_ids, 0
        product.groups = ProductGroups(
            product_id,
            self.version,
            groups,
            product.groups.next_group_id + len(lineage.born),
            silhouettes,
            None if lineage.born else product.groups.p_value,
            product.groups.distinct and not lineage.born,
            now_ms,
            (product.groups.lineage + _lineage_records(lineage, now_ms))[-LINEAGE_KEPT:],
            {**product.groups.successors, **lineage.merged},
        )
        self._changed_groups[product_id] = None
        self._changed_clusterings[product_id] = None
        return lineage

    def retire(self, product_id: str, group_id: int) -> None:
        """Record that the counts of a group that died long ago go on under `UNGROUPED`."""
        product = self._products[product_id]
        successors = {**product.groups.successors, group_id: UNGROUPED}
        product.groups = msgspec.structs.replace(product.groups, successors=successors)
        self._changed_groups[product_id] = None

    def _group(
        self, embedded: Floats, clustering: Clustering, k: int, cluster: int, group_id: int, born_at_ms: int
    ) -> GroupRecord:
        members = clustering.labels[k] == cluster
        return GroupRecord(
            group_id,
            float(members.mean()),
            int(members.sum()),
            group_feature(embedded[members], clustering.centroids[k][cluster]).tobytes(),
            group_profile(clustering.attributes[members], clustering.attributes, self._schema),
            born_at_ms,
        )

    def sample(self, product_id: str, n_users: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return some users of a product, (U, N), and the places of their groups among the product's, (U,)."""
        product = self._products[product_id]
        attributes = product.clustering.attributes[:n_users]
        if product.k == 1:
            return attributes, np.zeros(len(attributes), np.int64)
        return attributes, product.clustering.labels[product.k][:n_users].astype(np.int64)

    def set_p_value(self, product_id: str, p_value: float | None) -> None:
        """Record how probable the groups' different preferences are by chance alone."""
        product = self._products[product_id]
        distinct = p_value is not None and p_value < self._settings.distinct_p_value
        if (product.groups.p_value, product.groups.distinct) != (p_value, distinct):
            product.groups = msgspec.structs.replace(product.groups, p_value=p_value, distinct=distinct)
            self._changed_groups[product_id] = None

    def product_ids(self) -> list[str]:
        """Return the resident products, in order of their ids."""
        return sorted(self._products)

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call, and drop encoder versions that no resident product is on."""
        for product_id in self._changed_groups:
            changes.put(Table.GROUPS, product_id.encode(), encode_record(self._products[product_id].groups))
        for product_id in self._changed_clusterings:
            product = self._products[product_id]
            record = pack_clustering(
                product.clustering,
                product.groups.encoder_version,
                product.k,
                product.group_ids,
                product.n_since_refresh,
            )
            changes.put(Table.CLUSTERINGS, product_id.encode(), encode_record(record))
        for version, weights in self._new_weights.items():
            changes.put(Table.ENCODERS, b"v" + number_key(version), weights)
            changes.put(Table.ENCODERS, SPACE_KEY, self._settings.space.encode())
        in_use = {product.groups.encoder_version for product in self._products.values()} | {self.version}
        for version in sorted(set(self._encoders) - in_use):
            del self._encoders[version]
            changes.delete(Table.ENCODERS, b"v" + number_key(version))
        self._changed_groups.clear()
        self._changed_clusterings.clear()
        self._new_weights.clear()


MIN_USERS_PER_GROUP = 16
"""Reservoir users for each of K_max groups before a product is grouped at all."""


def _with_large_groups(silhouettes: dict[int, float], clustering: Clustering, min_share: float) -> dict[int, float]:
    """Return the silhouettes of those K whose smallest cluster is large enough; the smallest K where none is."""
    smallest = {k: np.bincount(clustering.labels[k], minlength=k).min() / clustering.n_users for k in silhouettes}
    kept = {k: value for k, value in silhouettes.items() if smallest[k] >= min_share}
    first = min(silhouettes)
    return kept or {first: silhouettes[first]}


def _lineage_records(lineage: Lineage, now_ms: int) -> list[LineageRecord]:
    return [
        *(LineageRecord(now_ms, "birth", group_id, None) for group_id in lineage.born),
        *(LineageRecord(now_ms, "merge", old, heir) for old, heir in lineage.merged.items()),
        *(LineageRecord(now_ms, "death", group_id, None) for group_id in lineage.died),
    ]
