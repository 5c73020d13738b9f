"""Surroundings: what is known around a shift, read from one commit of the online state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from generator.comparison import Feature
from generator.look_alikes import find_look_alikes
from generator.occasion import Occasion
from generator.prompt import Prompt, PromptNotUnderstood
from generator.settings import GeneratorSettings
from generator.word_posterior import LookAlike, Shown
from state.reading import StateView
from state.records import N_FEATURE_POINTS, Cell, CreativeRecord, ProductGroups, ProductRecord
from streams.events import DeadLetterReason, GroupsShifted

_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS

_MAX_GROUP_ID = 2**32 - 1
_MAX_COUNT = 2**53  # a float holds it exactly


class UnusableShift(ValueError):
    """A shift that decodes but cannot be worked off."""

    def __init__(self, reason: DeadLetterReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Surroundings:
    """The shifted product, its creatives, similar groups of other products by the group they are like, and features.

    ``features`` are (11, D), Eq. 6, of the groups that the product has now. ``impressions_per_day`` are the product's,
    or of one that has had none those of the average product.
    """

    product: ProductRecord
    creatives: list[CreativeRecord]
    look_alikes: dict[int, list[LookAlike]]
    features: dict[int, Feature]
    impressions_per_day: float


def check_numbers(event: GroupsShifted) -> None:
    """Refuse a shift whose numbers cannot be: the schema gives types, not ranges."""
    ids = [group.group_id for group in event.groups]
    wrong = [f"group_id {group_id}" for group_id in ids if not 0 <= group_id <= _MAX_GROUP_ID]
    if len(set(ids)) != len(ids):
        wrong.append("a group twice")
    for group in event.groups:
        for creative in group.creatives:
            if not 0 <= creative.n_clicks <= creative.n_impressions <= _MAX_COUNT:
                wrong.append(f"{creative.n_clicks} clicks of {creative.n_impressions} impressions")
    if wrong:
        raise UnusableShift("invalid_field", f"the shift has {', '.join(wrong[:3])}; nothing was made for it")


def look_around(
    occasion: Occasion, view: StateView, published: Iterable[CreativeRecord], settings: GeneratorSettings
) -> Surroundings:
    """Read what is known of a shifted product.

    Parameters
    ----------
    occasion
        Why creatives may be made.
    view
        The online state.
    published
        What the generator has published for the product: the online process may not have registered it yet.
    settings
        How many look-alikes to borrow from, and where to search them.

    Raises
    ------
    UnusableShift
        The product is not registered.
    """
    products = {record.product_id: record for record in view.products()}
    product = products.get(occasion.product_id)
    if product is None:
        raise UnusableShift("unknown_product", f"no product {occasion.product_id!r} has been registered")
    creatives = {record.creative_id: record for record in published}
    creatives.update((record.creative_id, record) for record in view.creatives(occasion.product_id))
    # Should this shift have been worked off before our state was lost, its creatives must not change the outcome.
    others = [creatives[creative_id] for creative_id in sorted(creatives)]
    others = [record for record in others if record.caused_by != occasion.event_id]
    groups = view.groups(occasion.product_id)
    return Surroundings(
        product,
        others,
        {} if groups is None else _borrow(occasion, groups, view, products, settings),
        {} if groups is None else {group.group_id: _feature(group.feature) for group in groups.groups},
        _impressions_per_day(occasion.product_id, view),
    )


def _impressions_per_day(product_id: str, view: StateView) -> float:
    own = _rate(view.cells(product_id), view.creatives(product_id))
    return own if own is not None else (_rate(view.cells(), view.creatives()) or 0.0)


def _rate(cells: list[Cell], creatives: list[CreativeRecord]) -> float | None:
    """Return the impressions of a product a day, on average over the products and over their life."""
    n_impressions = sum(cell.n_impressions for cell in cells)
    if not n_impressions:
        return None
    shown = {(cell.product_id, cell.creative_id) for cell in cells}
    since_ms = min(
        # States of before have 0 where a creative came before the first impression.
        (
            each.registered_at_ms or each.created_at_ms
            for each in creatives
            if (each.product_id, each.creative_id) in shown
        ),
        default=0,
    )
    days = max(max(cell.updated_at_ms for cell in cells) - since_ms, _HOUR_MS) / _DAY_MS
    return n_impressions / days / len({cell.product_id for cell in cells})


def _feature(packed: bytes) -> Feature:
    return np.frombuffer(packed, np.float32).reshape(N_FEATURE_POINTS, -1)


def _borrow(
    occasion: Occasion,
    groups: ProductGroups,
    view: StateView,
    products: dict[str, ProductRecord],
    settings: GeneratorSettings,
) -> dict[int, list[LookAlike]]:
    if not settings.n_look_alikes:
        return {}
    category = products[occasion.product_id].category
    others = sorted(
        (record for record in products.values() if record.product_id != occasion.product_id),
        key=lambda record: (record.category != category, record.number),
    )[: settings.max_compared_products]
    compared = [found for record in others if (found := view.groups(record.product_id)) is not None]
    shown: dict[str, dict[int, list[Shown]]] = {}
    borrowed: dict[int, list[LookAlike]] = {}
    for group in occasion.groups:
        borrowed[group.group_id] = []
        for product_id, group_id, similarity in find_look_alikes(
            group.group_id, groups, compared, settings.n_look_alikes
        ):
            if product_id not in shown:
                shown[product_id] = _shown_by_group(view, product_id)
            if cells := shown[product_id].get(group_id):
                borrowed[group.group_id].append(LookAlike(similarity, cells))
    return borrowed


def _shown_by_group(view: StateView, product_id: str) -> dict[int, list[Shown]]:
    prompts = {record.creative_id: read_prompt(record.prompt) for record in view.creatives(product_id)}
    shown: dict[int, list[Shown]] = {}
    for cell in view.cells(product_id):
        row = Shown(prompts.get(cell.creative_id), cell.live_impressions, cell.live_clicks)
        shown.setdefault(cell.group_id, []).append(row)
    return shown


def read_prompt(text: str | None) -> Prompt | None:
    """Return a creative's prompt; None where it has none that can be read."""
    try:
        return None if text is None else Prompt.parse(text)
    except PromptNotUnderstood:
        return None
