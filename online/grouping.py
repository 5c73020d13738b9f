"""Grouping: the users of every product in groups that stay themselves while the encoder moves.

Every group belongs to one encoder version, the one under which its centroids were made. A new
version is adopted at intervals; products then move to it a few at a time, so that no micro-batch
takes long. A product on an old version goes on with that version's weights until its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.borrowing import LENT_USERS, send_away
from online.clustering import Floats, choose_k, move_many, recluster, sample_many, with_large_groups
from online.displacement import centroid_displacements
from online.forgetting import ForgottenUsers, forget_users, without_former_points
from online.group_record import group_records
from online.grouped_product import UNGROUPED, GroupedProduct, users_needed
from online.learner import Encoder
from online.limits import LINEAGE_KEPT
from online.lineage import Lineage, lineage_records, match_groups
from online.mismatch import check_space
from online.settings import GroupSettings
from state.records import SPACE_KEY, ClusteringRecord, ProductGroups, encode_record, number_key
from state.store import ChangeSet, ReadTransaction, Table

_CLUSTERING = msgspec.msgpack.Decoder(ClusteringRecord)
_GROUPS = msgspec.msgpack.Decoder(ProductGroups)

EncoderOf = Callable[[bytes], Encoder]
"""Makes an encoder of weights."""

NearestOf = Callable[[Sequence[str], Sequence[str]], list[str | None]]
"""Finds, for each of some products, the nearest of others; see `online.neighbours.ProductNeighbours`."""


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
    nearest_of
        Finds the product whose groups a new one borrows.
    seed
        Seed of the reservoirs and of k-means.
    """

    def __init__(
        self,
        settings: GroupSettings,
        schema: AttributeSchema,
        d_model: int,
        encoder_of: EncoderOf,
        nearest_of: NearestOf,
        seed: int,
    ) -> None:
        self._settings = settings
        self._schema = schema
        self._d_model = d_model
        self._encoder_of = encoder_of
        self._nearest_of = nearest_of
        self._seed = seed
        self._ks = tuple(range(settings.k_min, settings.k_max + 1))
        self._n_users_needed = users_needed(settings)
        self._n_users_lent = min(LENT_USERS, settings.reservoir_users - self._n_users_needed)
        self._products: dict[str, GroupedProduct] = {}
        self._encoders: dict[int, Encoder] = {}
        self._new_weights: dict[int, bytes] = {}
        self._changed_groups: dict[str, None] = {}
        self._changed_clusterings: dict[str, None] = {}
        self._newly_borrowed: list[str] = []
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
        self._products[product_id] = GroupedProduct.of_records(
            _CLUSTERING.decode(value), _GROUPS.decode(groups), self._ks, len(self._schema.names), self._d_model
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

    def displacements(self, product_id: str) -> list[float | None]:
        """Return how far the centroid of each of a product's groups has moved since the regrouping, in radii, (G,)."""
        product = self._products[product_id]
        return centroid_displacements(product.groups, product.clustering.centroids.get(product.k))

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
        distinct_ids = [product_ids[row] for row in first]
        self._admit(distinct_ids, numbers, now_ms)
        embedded = self._embed(numbers, distinct_ids, inverse, product_numbers, attributes)
        # By user within a product, so that the order of a batch's events changes nothing.
        order = np.lexsort((user_keys, inverse))
        bounds = np.searchsorted(inverse[order], np.arange(len(numbers) + 1))
        products = [self._products[product_id] for product_id in distinct_ids]
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
            self._changed_clusterings[distinct_ids[position]] = None
            group_ids[rows] = product.groups_of_clusters(labels[:, part])
        return group_ids

    def _move_many(
        self, products: list[GroupedProduct], owners: npt.NDArray[np.int64], embedded: Floats
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

    def _admit(self, product_ids: list[str], numbers: npt.NDArray[np.int64], now_ms: int) -> None:
        """Start the grouping of products that come for the first time, on a near neighbour's groups if one has any."""
        number_of = dict(zip(product_ids, numbers.tolist(), strict=True))
        new = [product_id for product_id in product_ids if product_id not in self._products]
        if not new:
            return
        lenders: list[str] = []
        # With the lent users alone a product can be regrouped, as it is when its encoder version went while it was
        # parked. A reservoir without room for so many, beside as many of its own, borrows nothing.
        if self._n_users_lent >= self._n_users_needed:
            lenders = [product_id for product_id, product in self._products.items() if product.own_groups]
        for product_id, lender in zip(new, self._nearest_of(new, lenders), strict=True):
            if lender is None:
                self._products[product_id] = GroupedProduct.new(product_id, self._ks, len(self._schema.names), now_ms)
            else:
                neighbour = self._products[lender]
                self._products[product_id] = self._borrow(product_id, number_of[product_id], neighbour, now_ms)
                self._newly_borrowed.append(product_id)
            self._changed_groups[product_id] = None

    def _borrow(self, product_id: str, number: int, lender: GroupedProduct, now_ms: int) -> GroupedProduct:
        numbers = np.full(lender.clustering.n_users, number, np.int64)
        encoder = self._encoders[lender.groups.encoder_version]
        embedded = encoder.embed_many(numbers, lender.clustering.attributes)
        return GroupedProduct.borrowed(product_id, lender, embedded, self._n_users_lent, now_ms, self._schema)

    def take_borrowed(self) -> list[str]:
        """Return the products that have borrowed groups since the last call."""
        taken, self._newly_borrowed = self._newly_borrowed, []
        return taken

    def waiting(self, relearnt: Collection[str] = ()) -> list[str]:
        """Return the resident products that are to be regrouped, those on the oldest encoder version first.

        So every product has its turn, also where versions come faster than all could move to each. A product that is
        not on the newest version waits until it has had enough impressions since its last move. Those that are
        ``relearnt``, because their tastes have changed, do not, and nor do those whose version is about to be dropped,
        or that have come to be in no more need of borrowed groups.
        """
        waiting = sorted(
            (product.groups.encoder_version, product_id)
            for product_id, product in self._products.items()
            if product.is_to_move(self.version, self._settings, relearnt=product_id in relearnt)
            or (product.groups.borrowed_from is not None and product.n_own_users >= self._n_users_needed)
        )
        return [product_id for _, product_id in waiting]

    def refresh(self, product_id: str, product_number: int, now_ms: int) -> Lineage:
        """Move a product to the newest encoder version and regroup its users. Algorithm 1."""
        product = self._products[product_id]
        clustering, settings = product.clustering, self._settings
        lender = product.groups.borrowed_from
        if lender is not None and product.n_own_users >= self._n_users_needed:
            lender = None
            send_away(clustering)
        old_labels = clustering.labels.get(product.k)
        numbers = np.full(clustering.n_users, product_number, np.int64)
        embedded = self._encoders[self.version].embed_many(numbers, clustering.attributes)
        rng = np.random.default_rng([self._seed, self.version, product_number])
        silhouettes = recluster(clustering, embedded, rng)
        k = choose_k(
            with_large_groups(silhouettes, clustering, settings.min_share),
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
        product.k, product.group_ids, product.n_since_refresh = k, lineage.group_ids, 0
        product.groups = ProductGroups(
            product_id,
            self.version,
            group_records(embedded, clustering, lineage.group_ids, born_at, now_ms, self._schema),
            product.groups.next_group_id + len(lineage.born),
            silhouettes,
            None if lineage.born else product.groups.p_value,
            product.groups.distinct and not lineage.born,
            now_ms,
            (product.groups.lineage + lineage_records(lineage, now_ms))[-LINEAGE_KEPT:],
            {**product.groups.successors, **lineage.merged},
            lender,
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

    def n_seen(self, product_id: str) -> int:
        """Return how many impressions of a product have been observed."""
        return self._products[product_id].clustering.n_seen

    def sample(self, product_id: str, n_users: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return some users of a product, (U, N), and the places of their groups among the product's, (U,)."""
        return self._products[product_id].sample(n_users)

    def forget(self, product_id: str, product_number: int, users: ForgottenUsers) -> set[int]:
        """Take users out of a product's sample and its groups' features; return the keys of those in the sample."""
        product = self._products[product_id]
        found, clustering = forget_users(product.clustering, users), product.clustering
        if product.groups.groups:
            embedded = self.embed_many(product_id, product_number, clustering.attributes)
            groups = without_former_points(product.groups.groups, embedded, clustering.labels[product.k])
            product.groups = msgspec.structs.replace(product.groups, groups=groups)
        self._changed_groups[product_id] = self._changed_clusterings[product_id] = None
        return found

    def products_with(self, users: ForgottenUsers) -> list[str]:
        """Return the resident products in whose sample any of some users is."""
        return [product_id for product_id, product in self._products.items() if users.are_in(product.clustering)]

    def dissolve_if_too_small(self, product_id: str, now_ms: int) -> list[int]:
        """Ungroup a product that has fewer users than groups may be tried; return the groups that were."""
        product = self._products[product_id]
        too_small = product.clustering.ready and product.clustering.n_users < self._settings.k_max
        return product.dissolve(now_ms) if too_small else []

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
            record = self._products[product_id].clustering_record()
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
