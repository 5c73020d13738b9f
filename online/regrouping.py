"""Regrouping: products move to new encoder versions a few at a time, and what hangs on their groups moves along."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable

import numpy as np
import numpy.typing as npt

from online.counts import Counts
from online.expectation import Expectations, expected_log_relative
from online.grouped_product import UNGROUPED
from online.grouping import Grouping
from online.learner import PreferenceLearner
from online.limits import DEAD_GROUPS_KEPT
from online.registry import Registry
from online.rows import Audience
from online.settings import GroupSettings
from online.significance import interaction_p_value

Floats = npt.NDArray[np.float64]

MIN_CELL_IMPRESSIONS = 30
"""Impressions that a group needs on average per creative before its preferences are compared."""

MOVED_SHARE = 0.02
"""Share of a product's users in another group than before from which its live counts are told apart anew."""

HELD_SHARE = 0.9
"""Share of a product's impressions that replay has to hold for that: what came before would count ever less."""

SETTLED_SHARE = 0.05
"""Share of its impressions so far after which a product is asked about again: what is learnt of it settles."""

N_EXPECTED_USERS = 128
"""Users of a product, at most, from whom it is told which creatives each group is expected to prefer."""


class Regrouping:
    """What is done for products after a micro-batch, a few of them at a time: it asks the model and moves the counts.

    Parameters
    ----------
    settings
        How many products, and how often.
    registry
        The products and creatives.
    learner, grouping, counts, expectations
        What it asks and moves.
    """

    def __init__(
        self,
        settings: GroupSettings,
        registry: Registry,
        learner: PreferenceLearner,
        grouping: Grouping,
        counts: Counts,
        expectations: Expectations,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._learner = learner
        self._grouping = grouping
        self._counts = counts
        self._expectations = expectations

    def run(self, now_ms: int, batch_number: int) -> None:
        """Adopt a new encoder version if one is due, and move some products to the newest."""
        settings = self._settings
        n_learnt = self._learner.n_rows_learnt
        due = 0
        if n_learnt >= settings.warm_up_impressions:
            due = 1 + (n_learnt - settings.warm_up_impressions) // settings.adopt_every_impressions
        # One version a batch: after a long batch the missed ones would be the same weights.
        if due > self._grouping.version:
            self._grouping.adopt(self._learner.average_weights())
        asked = dict.fromkeys(self._grouping.take_borrowed())
        relearnt = {self._registry.product_ids[number] for number in self._learner.relearnt()}
        for product_id in self._grouping.waiting(relearnt)[: settings.refresh_products_per_batch]:
            self._move(product_id, now_ms)
            asked[product_id] = None
        product_ids = self._grouping.product_ids()
        n_most = min(settings.refresh_products_per_batch, len(product_ids))
        for step in range(n_most):
            product_id = product_ids[(batch_number * n_most + step) % len(product_ids)]
            creatives = self._registry.creative_numbers[self._registry.products[product_id].number]
            if 0 < len(self._expectations.creatives(product_id)) < len(creatives):
                asked[product_id] = None
        asked |= dict.fromkeys(self._outdated(asked, relearnt))
        self._expect_many(asked)
        for product_id in asked:
            self._compare(product_id)

    def refresh(self, product_id: str, now_ms: int) -> None:
        """Move a product to the newest encoder version, and what hangs on its groups along."""
        self._move(product_id, now_ms)
        self._expect_many([product_id])
        self._compare(product_id)

    def _move(self, product_id: str, now_ms: int) -> None:
        lineage = self._grouping.refresh(product_id, self._registry.products[product_id].number, now_ms)
        for old, heir in lineage.merged.items():
            self._counts.hand_over(product_id, old, heir, now_ms)
        counted = {group_id for group_id, _ in self._counts.cells_of(product_id)}
        for dead in sorted(counted - {UNGROUPED, *lineage.group_ids})[:-DEAD_GROUPS_KEPT]:
            self._grouping.retire(product_id, dead)
            self._counts.hand_over(product_id, dead, UNGROUPED, now_ms)
        if lineage.born:
            self._distribute(product_id, now_ms)
        elif lineage.moved_share >= MOVED_SHARE:
            self._distribute(product_id, now_ms, least_share=HELD_SHARE)

    def _distribute(self, product_id: str, now_ms: int, least_share: float = 0.0) -> None:
        """Give groups the live counts of the users that they have now, as far as replay holds them.

        Nothing is done where it holds less than ``least_share`` of the product's impressions.
        """
        number = self._registry.products[product_id].number
        remembered = self._learner.remembered(number)
        if len(remembered) <= least_share * self._grouping.n_seen(product_id):
            return
        group_ids = self._grouping.assign_many(product_id, number, remembered.rows.attributes)
        names = {
            self._registry.creatives[product_id, creative_id].number: creative_id
            for creative_id in {creative_id for _, creative_id in self._counts.cells_of(product_id)}
        }
        n_numbers = int(remembered.rows.creatives.max()) + 1
        cells, index = np.unique(group_ids * n_numbers + remembered.rows.creatives, return_inverse=True)
        n_impressions = np.bincount(index)
        n_clicks = np.bincount(index, weights=remembered.clicks)
        found = {
            (int(group_id), names[int(creative)]): (int(n), int(x))
            for group_id, creative, n, x in zip(*divmod(cells, n_numbers), n_impressions, n_clicks, strict=True)
        }
        self._counts.distribute_live(product_id, found, now_ms)

    def _outdated(self, others: Container[str], relearnt: Container[str]) -> list[str]:
        """Return the products, beside others, whose groups it is time to ask the model about again.

        Those that are ``relearnt`` are asked about as often as if they were young.
        """
        due = []
        for product_id, n_impressions in self._expectations.n_impressions().items():
            share = 0.0 if product_id in relearnt else SETTLED_SHARE
            age = self._grouping.n_seen(product_id) - n_impressions
            is_due = age >= max(self._settings.expect_every_impressions, share * n_impressions)
            if is_due and product_id not in others and self._group_ids(product_id):
                due.append((age, product_id))
        return [product_id for _, product_id in heapq.nlargest(self._settings.expect_products_per_batch, due)]

    def _expect_many(self, product_ids: Iterable[str]) -> None:
        """Ask the model which creatives each group of some products prefers."""
        audiences, labels = [], []
        # A product that has been ungrouped, because too few of its users are left, has nobody to ask about.
        product_ids = [product_id for product_id in product_ids if self._group_ids(product_id)]
        for product_id in product_ids:
            number = self._registry.products[product_id].number
            attributes, of_product = self._grouping.sample(product_id, N_EXPECTED_USERS)
            audiences.append(Audience(number, attributes, self._registry.creative_numbers[number]))
            labels.append(of_product)
        p_clicks = self._learner.expect_many(audiences)
        for product_id, audience, of_product, p_click in zip(product_ids, audiences, labels, p_clicks, strict=True):
            group_ids = self._group_ids(product_id)
            log_relative = expected_log_relative(p_click, of_product, len(group_ids))
            self._expectations.put(
                product_id, group_ids, audience.creatives.tolist(), log_relative, self._grouping.n_seen(product_id)
            )

    def _group_ids(self, product_id: str) -> list[int]:
        groups = self._grouping.groups_of(product_id)
        return [] if groups is None else [group.group_id for group in groups.groups]

    def _compare(self, product_id: str) -> None:
        """Test whether a product's groups prefer different creatives."""
        groups = self._grouping.groups_of(product_id)
        if groups is None or len(groups.groups) < 2:
            return
        impressions, clicks, creative_ids = self.table(product_id, live=False)
        if not creative_ids:  # groups are borrowed before anything is counted, and who was counted may be forgotten
            return
        filled = impressions.sum(axis=1) >= MIN_CELL_IMPRESSIONS * impressions.shape[1]
        if filled.sum() < 2:
            return
        self._grouping.set_p_value(product_id, interaction_p_value(impressions[filled], clicks[filled]))

    def table(self, product_id: str, *, live: bool) -> tuple[Floats, Floats, list[str]]:
        """Return impressions and clicks of a product's present groups, (G, C), and the creatives' ids."""
        groups = self._grouping.groups_of(product_id)
        assert groups is not None
        cells = self._counts.cells_of(product_id)
        creative_ids = sorted({creative_id for _, creative_id in cells})
        shape = (len(groups.groups), len(creative_ids))
        impressions, clicks = np.zeros(shape), np.zeros(shape)
        for row, group in enumerate(groups.groups):
            for column, creative_id in enumerate(creative_ids):
                cell = cells.get((group.group_id, creative_id))
                if cell is not None:
                    impressions[row, column] = cell.live_impressions if live else cell.n_impressions
                    clicks[row, column] = cell.live_clicks if live else cell.n_clicks
        return impressions, clicks, creative_ids
