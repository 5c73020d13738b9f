"""Surroundings: what is known around a shift, read from one commit of the online state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from generator.prompt import Prompt, PromptNotUnderstood
from generator.proposal import LookAlike, Shown, find_look_alikes
from generator.settings import GeneratorSettings
from state.reading import StateView
from state.records import CreativeRecord, ProductRecord
from streams.events import DeadLetterReason, GroupsShifted

_MAX_GROUP_ID = 2**32 - 1
_MAX_COUNT = 2**53  # a float holds it exactly


class UnusableShift(ValueError):
    """A shift that decodes but cannot be worked off."""

    def __init__(self, reason: DeadLetterReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Surroundings:
    """The shifted product, its creatives, and similar groups of other products by the group they are like."""

    product: ProductRecord
    creatives: list[CreativeRecord]
    look_alikes: dict[int, list[LookAlike]]


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
    event: GroupsShifted, view: StateView, published: Iterable[CreativeRecord], settings: GeneratorSettings
) -> Surroundings:
    """Read what is known of a shifted product.

    Parameters
    ----------
    event
        The shift.
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
    product = products.get(event.product_id)
    if product is None:
        raise UnusableShift("unknown_product", f"no product {event.product_id!r} has been registered")
    creatives = {record.creative_id: record for record in published}
    creatives.update((record.creative_id, record) for record in view.creatives(event.product_id))
    # Should this shift have been worked off before our state was lost, its creatives must not change the outcome.
    others = [creatives[creative_id] for creative_id in sorted(creatives)]
    others = [record for record in others if record.caused_by != event.event_id]
    return Surroundings(product, others, _borrow(event, view, products, settings))


def _borrow(
    event: GroupsShifted, view: StateView, products: dict[str, ProductRecord], settings: GeneratorSettings
) -> dict[int, list[LookAlike]]:
    groups = view.groups(event.product_id)
    if groups is None or not settings.n_look_alikes:
        return {}
    category = products[event.product_id].category
    others = sorted(
        (record for record in products.values() if record.product_id != event.product_id),
        key=lambda record: (record.category != category, record.number),
    )[: settings.max_compared_products]
    compared = [found for record in others if (found := view.groups(record.product_id)) is not None]
    shown: dict[str, dict[int, list[Shown]]] = {}
    borrowed: dict[int, list[LookAlike]] = {}
    for group in event.groups:
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
