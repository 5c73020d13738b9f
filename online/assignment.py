"""Assignment: the groups of users, from the state; for processes that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.clustering import Floats, assign
from online.encoders import feature_dims
from online.features import FeatureBank
from online.forms import preference_model
from online.learner import Encoder
from online.mismatch import check_space
from online.settings import OnlineSettings
from state.reading import StateView
from state.records import ClusteringRecord

_CLUSTERING = msgspec.msgpack.Decoder(ClusteringRecord)


Version = tuple[int, int]
"""An encoder version: the shard that made it, and its number there."""


@dataclass(frozen=True)
class ProductAssignment:
    """How one product's users are told apart: the encoder version, its centroids (K, D) and their groups."""

    number: int
    version: Version
    centroids: Floats
    group_ids: list[int]


class Assigner:
    """Assigns users to the groups that the state holds.

    Parameters
    ----------
    settings
        The settings that the state was built with.
    """

    def __init__(self, settings: OnlineSettings) -> None:
        self._settings = settings
        self._schema = AttributeSchema(settings.attributes)
        self._bank = FeatureBank(*feature_dims(settings))
        self._titles: dict[str, bytes] = {}
        self._numbers: dict[str, int] = {}
        self._loaded: tuple[dict[str, ProductAssignment], dict[Version, Encoder]] = ({}, {})

    def load(self, view: StateView) -> None:
        """Take over the groups of a state; assignments in other threads go on with the old ones meanwhile.

        A product that was parked may be on an encoder version that is no longer kept. Its centroids then say nothing
        of new users, who cannot be embedded as it needs. So it is left out, as one whose users are not grouped yet,
        until its next impression brings it back under the newest version.

        Raises
        ------
        online.mismatch.SpaceMismatchError
            Its users are grouped in another space than the settings name.
        """
        for space in view.encoder_spaces():
            check_space(space, self._settings.groups.space)
        products = {}
        kept = set(view.encoder_versions())
        for record in view.products():
            # Every shard numbers its products: here they get numbers of their own.
            number = self._numbers.setdefault(record.product_id, len(self._numbers))
            if self._titles.get(record.product_id) != record.title_features:
                self._bank.put_title(number, record.title_features)
                self._titles[record.product_id] = record.title_features
            value = view.clustering(record.product_id)
            clustering = None if value is None else _CLUSTERING.decode(value)
            if clustering is None:
                continue
            version = (view.shard_of(record.product_id), clustering.encoder_version)
            if version not in kept:
                continue
            centroids = np.frombuffer(clustering.centroids, np.float32).reshape(-1, self._settings.model.d_model)
            # The record holds the centroids of every K, one K after the other.
            start = sum(range(self._settings.groups.k_min, clustering.k))
            products[record.product_id] = ProductAssignment(
                number, version, centroids[start : start + clustering.k], clustering.group_ids
            )
        versions = {product.version for product in products.values()}
        old = self._loaded[1]
        encoders = {version: old.get(version) or self._encoder(view, *version) for version in versions}
        self._loaded = (products, encoders)

    def _encoder(self, view: StateView, shard: int, version: int) -> Encoder:
        weights = view.encoder_weights(shard, version)
        assert weights is not None
        dims = feature_dims(self._settings)
        model = preference_model(self._schema.cardinalities, *dims, self._settings.model)
        return Encoder(model, weights, self._bank, self._settings.groups.space)

    def product_ids(self) -> list[str]:
        """Return the products whose users can be grouped."""
        return sorted(self._loaded[0])

    def embed_many(self, product_id: str, users: Sequence[dict[str, str]]) -> Floats:
        """Return users in the space in which a product has grouped them, (B, D)."""
        products, encoders = self._loaded
        product = products[product_id]
        numbers = np.full(len(users), product.number, np.int64)
        return encoders[product.version].embed_many(numbers, self._schema.encode_many(users))

    def assign_many(self, product_ids: Sequence[str], users: Sequence[dict[str, str]]) -> list[int | None]:
        """Return the group of each user of a product; None where its users are not grouped, or no longer (`load`)."""
        group_ids: list[int | None] = [None] * len(product_ids)
        products, encoders = self._loaded
        known = [(row, products[product_id]) for row, product_id in enumerate(product_ids) if product_id in products]
        if not known:
            return group_ids
        attributes = self._schema.encode_many([users[row] for row, _ in known])
        numbers = np.fromiter((product.number for _, product in known), np.int64, len(known))
        rows_of: dict[Version, list[int]] = {}
        for row, (_, product) in enumerate(known):
            rows_of.setdefault(product.version, []).append(row)
        for version in sorted(rows_of):
            rows: npt.NDArray[np.int64] = np.array(rows_of[version])
            embedded = encoders[version].embed_many(numbers[rows], attributes[rows])
            for number in np.unique(numbers[rows]):
                of_product = np.flatnonzero(numbers[rows] == number)
                product = known[rows[of_product[0]]][1]
                labels = assign(embedded[of_product], product.centroids)
                for row, label in zip(rows[of_product], labels, strict=True):
                    group_ids[known[row][0]] = product.group_ids[label]
        return group_ids
