"""Decisions: which creative to show to a user of a product, from the newest state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from online.assignment import Assigner
from online.ctr import ShrunkCtr, creative_spread, shrink
from online.expectation import group_ctrs, read_relative_ctrs
from online.settings import OnlineSettings
from serving.policy import Arm, Floats, add_prior, arm_of, best_chances
from serving.settings import ServingSettings
from state.reading import StateReader, StateView
from state.records import Cell, ProductRecord


class DecisionRequest(msgspec.Struct, frozen=True):
    """A user who is about to see a product."""

    user_id: str
    product_id: str
    attributes: dict[str, str] = {}


class Decision(msgspec.Struct, frozen=True):
    """What to show, and what to log with it.

    ``arm`` and ``experiment`` are None where both arms do the same (the product warms up): such an
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
    creative_ids: list[str]
    for_all: Floats
    for_groups: dict[int, Floats] | None


@dataclass(frozen=True)
class _Policy:
    products: dict[str, _ProductPolicy]
    n_impressions: int


def impressions_of_the_shown(n_impressions: Mapping[str, int]) -> float:
    """Return how many impressions the product of an impression has had, on average over all impressions.

    Where all products are shown alike it is what each has had. Products that are hardly shown, as new ones, hardly
    count.

    Parameters
    ----------
    n_impressions
        Impressions of each product.
    """
    total = sum(n_impressions.values())
    return sum(n**2 for n in n_impressions.values()) / total if total else 0.0


class DecisionService:
    """Decides for batches of requests; `refresh` takes over what the stream has learnt since.

    Parameters
    ----------
    state
        The state, opened for reading.
    online
        Settings that the state was built with.
    serving
        The policy's settings.
    impressions_topic
        Topic whose consumption `n_impressions` tells.
    """

    def __init__(
        self, state: StateReader, online: OnlineSettings, serving: ServingSettings, *, impressions_topic: str
    ) -> None:
        self._topic = impressions_topic
        self._state = state
        self._settings = serving
        self._assigner = Assigner(online)
        # Two streams of draws: refreshing runs beside deciding, in another thread.
        self._rng, self._policy_rng = np.random.default_rng(serving.seed).spawn(2)
        self._policy = _Policy({}, 0)

    def refresh(self) -> None:
        """Read the state and work out the policy; decisions go on with the old one meanwhile."""
        with self._state.view() as view:
            self._assigner.load(view)
            counted, totals = {}, []
            for product_id, cells in view.cells_by_product():
                counted[product_id] = sum(cell.n_impressions for cell in cells)
                totals.append(_by_creative(cells, list(dict.fromkeys(cell.creative_id for cell in cells))))
            usual, spread = impressions_of_the_shown(counted), creative_spread(totals)
            policies = {}
            for record in view.products():
                n_known = max(counted.get(record.product_id, 0), usual)
                warm = n_known >= self._settings.warm_up_impressions
                policy = self._product_policy(view, record, spread, warm=warm)
                if policy is not None:
                    policies[record.product_id] = policy
            n_impressions = sum(
                offset.n_consumed for (topic, _), offset in view.offsets().items() if topic == self._topic
            )
        self._policy = _Policy(policies, n_impressions)

    def _product_policy(
        self, view: StateView, product: ProductRecord, spread: float, *, warm: bool
    ) -> _ProductPolicy | None:
        creatives = view.creatives(product.product_id)
        creative_ids = [creative.creative_id for creative in creatives]
        if not creative_ids:
            return None
        column = {creative_id: position for position, creative_id in enumerate(creative_ids)}
        groups, cells = view.groups(product.product_id), view.cells(product.product_id)
        if groups is None or not groups.groups or not (warm or groups.distinct):
            uniform = np.full((1, len(creative_ids)), 1 / len(creative_ids))
            return _ProductPolicy(creative_ids, uniform, None)
        row = {group.group_id: position for position, group in enumerate(groups.groups)}
        impressions, clicks = np.zeros((len(row), len(column))), np.zeros((len(row), len(column)))
        for cell in cells:
            if cell.group_id in row:
                place = row[cell.group_id], column[cell.creative_id]
                impressions[place], clicks[place] = cell.live_impressions, cell.live_clicks
        total = _by_creative(cells, creative_ids)
        for_all = shrink(*total[:, None], given_product=True, spread=spread)
        for creative in creatives:
            if creative.prior_impressions and creative.group_id in row:
                place = row[creative.group_id], column[creative.creative_id]
                add_prior(impressions, clicks, place, creative, product_ctr=for_all.product_ctr)
        numbers = [creative.number for creative in creatives]
        relative = read_relative_ctrs(view, product.product_id, product.category, list(row), numbers)
        ctrs = group_ctrs(for_all, impressions, clicks, relative, spread=spread, distinct=groups.distinct)
        chances = self._chances(ctrs)
        return _ProductPolicy(
            creative_ids,
            self._chances(for_all),
            {group_id: chances[position] for group_id, position in row.items()},
        )

    def _chances(self, posterior: ShrunkCtr) -> Floats:
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
        group_ids = self._assigner.assign_many(
            [request.product_id for request in requests], [request.attributes for request in requests]
        )
        draws = self._rng.random(len(requests))
        return [
            self._decide(request, policy.products[request.product_id], group_id, draw)
            for request, group_id, draw in zip(requests, group_ids, draws, strict=True)
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


def _by_creative(cells: Sequence[Cell], creative_ids: Sequence[str]) -> Floats:
    """Return the live impressions and clicks of a product's creatives, of all groups together, (2, C)."""
    column = {creative_id: position for position, creative_id in enumerate(creative_ids)}
    total = np.zeros((2, len(column)))
    for cell in cells:
        total[:, column[cell.creative_id]] += cell.live_impressions, cell.live_clicks
    return total
