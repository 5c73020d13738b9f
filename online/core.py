"""The core: what is learnt of labelled impressions, and the groups, counts and shifts that follow from it.

It knows nothing of messages and joins: impressions go in, in order, and a change set comes out. The pipeline
feeds it from the stream, benchmarks from simulated worlds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.calibration import PreferenceCalibration
from online.category_metrics import CategoryMetrics
from online.counts import Counts, TakenBack
from online.encoders import feature_dims
from online.expectation import Expectations
from online.features import FeatureBank
from online.forgetting import ForgottenUsers
from online.grouped_product import UNGROUPED
from online.grouping import Grouping
from online.label_history import unlearnt_rows
from online.learner import Encoder, PreferenceLearner
from online.metrics import PrequentialMetrics
from online.neighbours import ProductNeighbours
from online.part import Part, ProductPart
from online.registry import Registry
from online.regrouping import Regrouping
from online.residency import Residency
from online.rows import LabelledRows, Rows
from online.settings import OnlineSettings
from online.shift import CellCounts, Observed, Shift, ShiftDetection, indifference_scores
from state.records import ImpressionRecord
from state.store import ChangeSet, ReadTransaction

Floats = npt.NDArray[np.float64]


class OnlineCore:
    """Preference model, groups, counts and shift detection, one micro-batch at a time.

    Before a product is observed, counted or learnt it must be resident: `bring_in`. Products beyond
    ``limits.resident_products`` are parked by `write`. The registry's titles and features stay in memory.

    Parameters
    ----------
    settings
        All of them.
    registry
        The products and creatives.
    bank
        Their features.
    """

    def __init__(self, settings: OnlineSettings, registry: Registry, bank: FeatureBank) -> None:
        self._registry = registry
        self.schema = AttributeSchema(settings.attributes)
        title_dim, image_dim = feature_dims(settings)
        self.learner = PreferenceLearner(
            self.schema.cardinalities, title_dim, image_dim, settings.model, bank, settings.seed
        )
        self.grouping = Grouping(
            settings.groups,
            self.schema,
            settings.model.d_model,
            lambda weights: Encoder(self.learner.new_model(), weights, bank, settings.groups.space),
            ProductNeighbours(registry, bank, settings.model.form).nearest,
            settings.seed,
        )
        self.counts = Counts(settings.counts.half_life_s * 1000, settings.limits.arms)
        self.expectations = Expectations()
        self._regrouping = Regrouping(
            settings.groups, registry, self.learner, self.grouping, self.counts, self.expectations
        )
        self._calibration = PreferenceCalibration()
        self._detection = ShiftDetection(settings.shift)
        self._metrics = PrequentialMetrics()
        self._category_metrics = CategoryMetrics()
        self._residency = Residency(settings.limits.resident_products)

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""
        for part in (*self._parts(), self._residency):
            part.restore(txn)
        for product_id in self._residency.product_ids:
            self._take_over(product_id, txn)

    def write(self, changes: ChangeSet) -> None:
        """Write what has changed since the last call, and park products beyond the limit.

        ``changes`` must be committed before anything else is asked of the core: it then is where parked products are.
        """
        for part in self._parts():
            part.write(changes)
        for product_id in self._residency.park():
            for product_part in self._product_parts():
                product_part.park(product_id)
        self._residency.write(changes)

    def _parts(self) -> tuple[Part, ...]:
        return (self.learner, *self._product_parts(), self._calibration, self._metrics, self._category_metrics)

    def _product_parts(self) -> tuple[ProductPart, ...]:
        return (self.grouping, self.expectations, self.counts, self._detection)

    def bring_in(self, product_ids: Iterable[str], txn: ReadTransaction | None, now_ms: int, batch_number: int) -> None:
        """Make products resident that a micro-batch is about to observe, count or learn.

        One that returns to find that its encoder version is gone is regrouped under the newest at once.

        Parameters
        ----------
        product_ids
            The products; each may be named often.
        txn
            The state as of the last commit. None: there is no state, so that what is not in memory is new.
        now_ms, batch_number
            Event time, and the number of the micro-batch.
        """
        missing = self._residency.touch(product_ids, batch_number)
        if txn is None:
            return
        for product_id in missing:
            self._take_over(product_id, txn)
            if not self.grouping.has_encoder(product_id):
                self._regrouping.refresh(product_id, now_ms)

    def forget_users(self, product_id: str, users: ForgottenUsers, now_ms: int) -> set[int]:
        """Take users out of a product's sample of them; return the keys of those who were there.

        A product that is left with too few users to be grouped is not grouped any more.
        """
        found = self.grouping.forget(product_id, self._registry.products[product_id].number, users)
        for group_id in self.grouping.dissolve_if_too_small(product_id, now_ms):
            self.counts.hand_over(product_id, group_id, UNGROUPED, now_ms)
        return found

    def _take_over(self, product_id: str, txn: ReadTransaction) -> None:
        for part in self._product_parts():
            part.bring_in(product_id, txn)

    def count(self, shown: Iterable[ImpressionRecord], clicked: Iterable[ImpressionRecord], now_ms: int) -> None:
        """Count impressions, and clicks whose impression was counted before or now."""
        self.counts.count_impressions(shown, now_ms)
        self.counts.count_clicks(
            ((record, self.grouping.current_group(record.product_id, record.group_id)) for record in clicked), now_ms
        )

    def take_back(
        self,
        clicks: Iterable[ImpressionRecord],
        impressions: Iterable[ImpressionRecord],
        now_ms: int,
        label_window_ms: int,
    ) -> None:
        """Take clicks that were retracted, and impressions with their clicks, back from counts and evidence.

        The model takes them back in `learn`.

        Parameters
        ----------
        clicks, impressions
            What was counted before.
        now_ms
            The watermark.
        label_window_ms
            How long after an impression its label is due.
        """
        for record in clicks:
            taken = self._taken_back(record, label_window_ms)
            self.counts.take_back_click(taken, now_ms)
            if record.retracted_late:
                self._detection.take_back(taken, impression=False, click=True)
        for record in impressions:
            taken = self._taken_back(record, label_window_ms)
            self._detection.take_back(taken, impression=True, click=record.click_counts)
            if record.click_counts:
                self.counts.take_back_click(taken, now_ms)
            self.counts.take_back_impression(taken, now_ms)

    def _taken_back(self, record: ImpressionRecord, label_window_ms: int) -> TakenBack:
        group_id = self.grouping.current_group(record.product_id, record.group_id)
        return TakenBack(record, group_id, record.shown_at_ms + label_window_ms)

    def learn(
        self,
        labelled: list[ImpressionRecord],
        corrected: list[ImpressionRecord],
        now_ms: int,
        *,
        uncorrected: Sequence[ImpressionRecord] = (),
        forgotten: Sequence[ImpressionRecord] = (),
        before_ms: int = 0,
    ) -> list[Shift]:
        """Predict and learn labelled impressions; return the shifts that they complete.

        Parameters
        ----------
        labelled
            Impressions that are labelled now.
        corrected, uncorrected
            Those that were learnt as no click and are clicked after all, and the other way round.
        now_ms, before_ms
            The watermark after and before this micro-batch.
        forgotten
            Those whose label is taken back and leaves nothing behind.
        """
        unlearnt = self._forget([record for record in forgotten if record.labelled])
        if not labelled and not corrected and not uncorrected:
            if unlearnt is not None:
                self.learner.learn_many(unlearnt.take(slice(0)), unlearnt)
            return []
        # A label is taken back, then the other one is given: a signed pair of the same row.
        again = [*corrected, *uncorrected]
        records = [*labelled, *again, *again]
        n_new, n_again = len(labelled), len(again)
        late = [True] * len(corrected) + [False] * len(uncorrected)
        clicks = np.array(
            [record.click_counts for record in labelled] + [not click for click in late] + late, np.float32
        )
        weights = np.array([1] * n_new + [-1] * n_again + [1] * n_again, np.float32)
        given = LabelledRows(self._rows(records), clicks, weights)
        creatives_of, categories = self._registry.creative_numbers, self._registry.categories
        p_click, preference = self.learner.predict_with_preference(given.rows, creatives_of)
        if labelled:
            self._measure(given.rows.take(slice(n_new)), clicks[:n_new], p_click[:n_new], now_ms)
        shifts = self._watch(records, n_new, given, p_click, preference, before_ms)
        self.learner.search(given, p_click, preference, creatives_of, categories)
        self.learner.learn_many(given, unlearnt)
        if shifts:
            changed_categories = self._changed_categories(shifts)
            changed = self._changed(shifts, changed_categories)
            self.learner.relearn(changed, categories)
            for number in changed:
                self.expectations.restart(self._registry.product_ids[number], categories[number])
            for category in changed_categories:
                self._calibration.restart(category)
        return shifts

    def _forget(self, records: list[ImpressionRecord]) -> LabelledRows | None:
        """Remove labelled impressions from replay; return what takes their labels back."""
        if not records:
            return None
        unlearnt, learnt = unlearnt_rows(self._rows(records), records)
        self.learner.forget(learnt)
        return unlearnt

    def _changed(self, shifts: list[Shift], categories: list[str]) -> list[int]:
        """Return the products that are learnt anew, by number: of a category whose tastes have changed all of them."""
        named = {self._registry.products[shift.product_id].number for shift in shifts}
        return sorted(named | {n for n, category in self._registry.categories.items() if category in categories})

    def _changed_categories(self, shifts: list[Shift]) -> list[str]:
        """Return the categories whose tastes have changed."""
        found = {self._registry.products[shift.product_id].category for shift in shifts if shift.scope == "category"}
        return sorted(category for category in found if category is not None)

    def _measure(
        self, rows: Rows, clicks: npt.NDArray[np.float32], p_click: npt.NDArray[np.float32], now_ms: int
    ) -> None:
        """Measure predictions, over all products and by category."""
        self._metrics.update_many(clicks, p_click, now_ms)
        by_category: dict[str, list[int]] = {}
        for number in np.unique(rows.products).tolist():
            by_category.setdefault(self._registry.categories[number] or "", []).append(number)
        for category, numbers in by_category.items():
            chosen = np.isin(rows.products, numbers)
            self._category_metrics.update_many(category, clicks[chosen], p_click[chosen])

    def _rows(self, records: list[ImpressionRecord]) -> Rows:
        products, creatives = self._registry.products, self._registry.creatives
        n_fields = len(self.schema.names)
        return Rows(
            np.fromiter((products[record.product_id].number for record in records), np.int64, len(records)),
            np.fromiter(
                (creatives[record.product_id, record.creative_id].number for record in records),
                np.int64,
                len(records),
            ),
            np.frombuffer(b"".join(record.attributes for record in records), np.uint8).reshape(-1, n_fields),
        )

    def _watch(
        self,
        records: list[ImpressionRecord],
        n_new: int,
        given: LabelledRows,
        p_click: npt.NDArray[np.float32],
        preference: npt.NDArray[np.float32],
        before_ms: int,
    ) -> list[Shift]:
        """See how far expectations and preferences are followed; return the shifts of tastes that this completes.

        The first ``n_new`` records are labelled now, those behind them are corrections.
        """
        observed = []
        numbers = np.unique(given.rows.products)
        # Slopes are as of before this micro-batch, for all of its products.
        category_of = {number: self._registry.categories[number] for number in numbers.tolist()}
        slopes = {category: self._calibration.slope(category) for category in set(category_of.values())}
        for number, category in category_of.items():
            index = np.flatnonzero(given.rows.products == number)
            product_id = self._registry.product_ids[number]
            group_ids = np.array([self.grouping.current_group(product_id, records[row].group_id) for row in index])
            of_product = given.take(index)
            self.expectations.observe_many(product_id, category, group_ids, of_product, p_click[index])
            groups = self.grouping.groups_of(product_id)
            if groups is None or not groups.distinct:
                # Tastes that have not been established cannot be seen to change.
                self._detection.restart(product_id)
                continue
            own = self._detection.own_preferences(
                product_id, category, of_product.rows.creatives, preference[index], of_product.weights
            )
            scores = indifference_scores(of_product.clicks, p_click[index], own, slopes[category])
            self._calibration.observe_many(of_product, p_click[index], own, category)
            cells: CellCounts = {}
            for row, group_id in zip(index.tolist(), group_ids.tolist(), strict=True):
                if row < n_new:
                    key = (group_id, records[row].creative_id)
                    seen = cells.get(key, (0, 0))
                    cells[key] = (seen[0] + 1, seen[1] + records[row].click_counts)
            observed.append(Observed(product_id, category, scores, of_product.weights, cells))
        return self._detection.observe_many(observed, before_ms)

    def regroup(self, now_ms: int, batch_number: int) -> None:
        """Adopt a new encoder version if one is due, and move some products to the newest."""
        self._regrouping.run(now_ms, batch_number)

    def table(self, product_id: str, *, live: bool) -> tuple[Floats, Floats, list[str]]:
        """Return impressions and clicks of a product's present groups, (G, C), and the creatives' ids."""
        return self._regrouping.table(product_id, live=live)
