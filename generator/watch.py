"""Watch: what in the online state asks for new creatives by itself, when no taste has shifted.

Each finding becomes a `CreativeRequested` whose id depends on what was found alone, so that it is asked for once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Final

from generator.occasion import cells_by_group
from generator.settings import WatchSettings
from generator.wilson import wilson_interval
from state.reading import StateView
from state.records import ProductGroups, ProductRecord
from streams.events import CreativeRequested, RequestCause

WATCHER: Final = "osmf-generator"
"""Who asks."""


def find_requests(
    view: StateView, settings: WatchSettings, is_handled: Callable[[str], bool]
) -> list[CreativeRequested]:
    """Return what is to be asked for.

    - ``new_product``: a product whose groups are borrowed, since it has hardly any users of its own yet.
    - ``new_group``: a group that was born beside older ones, of a product whose groups differ.
    - ``fatigue``: the creative with a group's highest CTR for life is clicked less now: the 95% interval of its live
      CTR lies below that of its CTR for life. Both have to have ``settings.min_impressions``.

    Parameters
    ----------
    view
        The online state.
    settings
        What is looked for.
    is_handled
        Whether the request of an id has been worked off.
    """
    found = []
    for product in view.products():
        groups = view.groups(product.product_id)
        if product.image_uri is None or groups is None:
            continue
        for request in _of_product(product, groups, view, settings):
            if request.cause in settings.causes and not is_handled(request.event_id):
                found.append(request)
    return found


def _of_product(
    product: ProductRecord, groups: ProductGroups, view: StateView, settings: WatchSettings
) -> Iterator[CreativeRequested]:
    if groups.borrowed_from is not None:
        reason = f"a new product, with the groups of {groups.borrowed_from}"
        yield _request("new_product", product.product_id, None, "", groups.refreshed_at_ms, reason)
        return
    first_ms = min((group.born_at_ms for group in groups.groups), default=0)
    cells = cells_by_group(view, product.product_id)
    for group in groups.groups:
        if groups.distinct and group.born_at_ms > first_ms:
            reason = f"group {group.group_id} is new"
            yield _request("new_group", product.product_id, group.group_id, "", group.born_at_ms, reason)
        seen = [cell for cell in cells.get(group.group_id, []) if cell.n_impressions >= settings.min_impressions]
        best = max(seen, key=lambda cell: (cell.n_clicks / cell.n_impressions, cell.creative_id), default=None)
        if best is None or best.live_impressions < settings.min_impressions:
            continue
        _, live_high = wilson_interval(best.live_clicks / best.live_impressions, best.live_impressions)
        life_low, _ = wilson_interval(best.n_clicks / best.n_impressions, best.n_impressions)
        if live_high < life_low:
            reason = (
                f"{best.creative_id} wears out: a CTR of {best.live_clicks / best.live_impressions:.4f} now, "
                f"{best.n_clicks / best.n_impressions:.4f} for life"
            )
            yield _request("fatigue", product.product_id, group.group_id, best.creative_id, best.updated_at_ms, reason)


def _request(
    cause: RequestCause, product_id: str, group_id: int | None, creative_id: str, at_ms: int, reason: str
) -> CreativeRequested:
    digest = hashlib.sha256(f"{cause}|{product_id}|{group_id}|{creative_id}".encode()).hexdigest()
    return CreativeRequested(
        event_id=f"{cause.replace('_', '-')}-{digest[:24]}",
        product_id=product_id,
        requested_by=WATCHER,
        requested_at_ms=at_ms,
        group_id=group_id,
        cause=cause,
        reason=reason,
    )
