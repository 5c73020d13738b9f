"""Decisions: which creative to show to a user of a product, from the newest state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.clustering import Floats as Embedded
from online.clustering import assign
from online.ctr import shrink
from online.encoders import feature_dims
from online.features import FeatureBank
from online.learner import Encoder
from online.model import PreferenceModel
from online.settings import OnlineSettings
from serving.policy import Arm, Floats, arm_of, best_chances
from serving.settings import ServingSettings
from state.reading import StateView, open_view
from state.records import ClusteringRecord, ProductRecord
from state.store import Store


class DecisionRequest(msgspec.Struct, frozen=True):
    """A user who is about to see a product."""

    user_id: str
    product_id: str
    attributes: dict[str, str] = {}


class Decision(msgspec.Struct, frozen=True):
    """What to show, and what to log with it.

    ``arm`` and ``experiment`` are None where both arms would do the same (no groups yet): such an
    impression is no part of the experiment.
    """

    creative_id: str
    p_shown: float
    arm: str | None
    experiment: str | None
    group_id: int | None


class UnservableProductError(ValueError):
    """A product of which nothing can be shown."""

    def __init__(self, product_id: str) -> None:
        super().__init__(
            f"product {product_id!r} is unknown or has no registered creative: nothing was decided for the whole "
            "request. GET /v1/products lists the products that can be served."
        )
        self.product_id = product_id


@dataclass(frozen=True)
class _ProductPolicy:
    number: int
    version: int
    creative_ids: list[str]
    for_all: Floats
    for_groups: dict[int, Floats] | None
    centroids: Embedded | None
    group_ids: list[int]


@dataclass(frozen=True)
class _Policy:
    products: dict[str, _ProductPolicy]
    encoders: dict[int, Encoder]
    n_impressions: int


class DecisionService:
    """Decides for batches of requests; `refresh` takes over what the stream has learnt since.

    Parameters
    ----------
    store
        The state, opened for reading.
    online
        Settings that the state was built with.
    serving
        The policy's settings.
    """

    def __init__(self, store: Store, online: OnlineSettings, serving: ServingSettings) -> None:
        self._store = store
        self._settings = serving
        self._online = online
        self._schema = AttributeSchema(online.attributes)
        self._bank = FeatureBank(*feature_dims(online.encoders))
        self._titles: dict[str, bytes] = {}
        # Two streams of draws: refreshing runs beside deciding, in another thread.
        self._rng, self._policy_rng = np.random.default_rng(serving.seed).spawn(2)
        self._policy = _Policy({}, {}, 0)
        self._clusterings = msgspec.msgpack.Decoder(ClusteringRecord)

    def refresh(self) -> None:
        """Read the state and work out the policy; decisions go on with the old one meanwhile."""
        with open_view(self._store) as view:
            products = {record.product_id: record for record in view.products()}
            policies = {}
            for product_id, record in products.items():
                if self._titles.get(product_id) != record.title_features:
                    self._bank.put_title(record.number, record.title_features)
                    self._titles[product_id] = record.title_features
                policy = self._product_policy(view, record)
                if policy is not None:
                    policies[product_id] = policy
            encoders = {}
            for version in {policy.version for policy in policies.values()} - {0}:
                encoders[version] = self._policy.encoders.get(version) or self._encoder(view, version)
            n_impressions = sum(
                offset.n_consumed for (topic, _), offset in view.offsets().items() if topic.endswith("impressions")
            )
        self._policy = _Policy(policies, encoders, n_impressions)

    def _encoder(self, view: StateView, version: int) -> Encoder:
        weights = view.encoder_weights(version)
        assert weights is not None, f"encoder version {version} is in use but not kept"
        title_dim, image_dim = feature_dims(self._online.encoders)
        model = PreferenceModel(self._schema.cardinalities, title_dim, image_dim, self._online.model)
        return Encoder(model, weights, self._bank)

    def _product_policy(self, view: StateView, product: ProductRecord) -> _ProductPolicy | None:
        creative_ids = [creative.creative_id for creative in view.creatives(product.product_id)]
        if not creative_ids:
            return None
        column = {creative_id: position for position, creative_id in enumerate(creative_ids)}
        groups = view.groups(product.product_id)
        if groups is None or not groups.groups:
            uniform = np.full((1, len(creative_ids)), 1 / len(creative_ids))
            return _ProductPolicy(product.number, 0, creative_ids, uniform, None, None, [])
        value = view.clustering(product.product_id)
        assert value is not None
        clustering = self._clusterings.decode(value)
        d = self._online.model.d_model
        centroids = np.frombuffer(clustering.centroids, np.float32).reshape(-1, d)
        start = sum(range(self._online.groups.k_min, clustering.k))
        row = {group.group_id: position for position, group in enumerate(groups.groups)}
        impressions, clicks = np.zeros((len(row), len(column))), np.zeros((len(row), len(column)))
        total = np.zeros((2, 1, len(column)))
        for cell in view.cells(product.product_id):
            position = column[cell.creative_id]
            total[0, 0, position] += cell.live_impressions
            total[1, 0, position] += cell.live_clicks
            if cell.group_id in row:
                impressions[row[cell.group_id], position] = cell.live_impressions
                clicks[row[cell.group_id], position] = cell.live_clicks
        for_all = self._chances(*total)
        chances = self._chances(impressions, clicks) if groups.distinct else np.repeat(for_all, len(row), axis=0)
        return _ProductPolicy(
            product.number,
            clustering.encoder_version,
            creative_ids,
            for_all,
            {group_id: chances[position] for group_id, position in row.items()},
            centroids[start : start + clustering.k],
            clustering.group_ids,
        )

    def _chances(self, impressions: Floats, clicks: Floats) -> Floats:
        posterior = shrink(impressions, clicks)
        return best_chances(
            posterior.alpha,
            posterior.beta,
            n_draws=self._settings.n_draws,
            explore_share=self._settings.explore_share,
            rng=self._policy_rng,
        )

    @property
    def n_impressions(self) -> int:
        """Impressions that the state includes, as of the last refresh."""
        return self._policy.n_impressions

    def n_creatives(self) -> dict[str, int]:
        """Return how many creatives of each product can be shown."""
        return {product_id: len(policy.creative_ids) for product_id, policy in self._policy.products.items()}

    def decide_many(self, requests: Sequence[DecisionRequest]) -> list[Decision]:
        """Return one decision for each request.

        Raises
        ------
        UnservableProductError
            A request's product is unknown, or has no creative.
        """
        policy = self._policy
        for request in requests:
            if request.product_id not in policy.products:
                raise UnservableProductError(request.product_id)
        products = [policy.products[request.product_id] for request in requests]
        group_ids = self._groups(policy, products, requests)
        draws = self._rng.random(len(requests))
        return [
            self._decide(request, product, group_id, draw)
            for request, product, group_id, draw in zip(requests, products, group_ids, draws, strict=True)
        ]

    def _decide(self, request: DecisionRequest, product: _ProductPolicy, group_id: int | None, draw: float) -> Decision:
        arm: Arm | None = None
        chances = product.for_all[0]
        if product.for_groups is not None and group_id is not None:
            arm = arm_of(self._settings.experiment, request.user_id)
            if arm == "group":
                chances = product.for_groups.get(group_id, chances)
        chosen = min(int(np.searchsorted(np.cumsum(chances), draw, side="right")), len(chances) - 1)
        return Decision(
            product.creative_ids[chosen],
            float(chances[chosen]),
            arm,
            self._settings.experiment if arm else None,
            group_id,
        )

    def _groups(
        self, policy: _Policy, products: list[_ProductPolicy], requests: Sequence[DecisionRequest]
    ) -> list[int | None]:
        group_ids: list[int | None] = [None] * len(requests)
        attributes = self._schema.encode_many([request.attributes for request in requests])
        numbers = np.fromiter((product.number for product in products), np.int64, len(products))
        versions = np.fromiter((product.version for product in products), np.int64, len(products))
        for version in np.unique(versions[versions > 0]):
            rows: npt.NDArray[np.int64] = np.flatnonzero(versions == version)
            embedded = policy.encoders[int(version)].embed_many(numbers[rows], attributes[rows])
            for number in np.unique(numbers[rows]):
                of_product = np.flatnonzero(numbers[rows] == number)
                product = products[rows[of_product[0]]]
                assert product.centroids is not None
                for row, label in zip(rows[of_product], assign(embedded[of_product], product.centroids), strict=True):
                    group_ids[row] = product.group_ids[label]
        return group_ids
