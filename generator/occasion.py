"""Occasions: why a product may get new creatives now, and what its groups click."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from state.reading import StateView
from state.records import Cell, GroupRecord
from streams.events import CreativeCtr, CreativeRequested, GroupsShifted, ProfileEntry, RequestCause, ShiftedGroup

Cause = Literal["shift"] | RequestCause

_PULL_IMPRESSIONS = 100.0
"""Impressions for which a group's CTR counts in that of each of its creatives."""


@dataclass(frozen=True)
class Occasion:
    """A reason to make creatives: the event that gives it, and the product's groups with what they click.

    ``borrowed_from`` is the product that has lent the groups, until there are users enough of the product's own.
    ``wanted`` is the group that it is about, None all of them. A person's request is not weighed against its cost.
    """

    event_id: str
    product_id: str
    at_ms: int
    cause: Cause
    groups: list[ShiftedGroup]
    borrowed_from: str | None = None
    wanted: int | None = None

    @property
    def is_ordered(self) -> bool:
        """Whether a person has asked for it."""
        return self.cause == "person"


def occasion_of_shift(event: GroupsShifted, borrowed_from: str | None = None) -> Occasion:
    """Return a shift as an occasion: counts are those since the change."""
    return Occasion(event.event_id, event.product_id, event.detected_at_ms, "shift", event.groups, borrowed_from)


def occasion_of_request(event: CreativeRequested, view: StateView) -> Occasion:
    """Return a request as an occasion: the groups are those of now, and counts the live ones."""
    groups = view.groups(event.product_id)
    cells = cells_by_group(view, event.product_id)
    found = [] if groups is None else [_group(group, cells.get(group.group_id, [])) for group in groups.groups]
    return Occasion(
        event.event_id,
        event.product_id,
        event.requested_at_ms,
        event.cause,
        found,
        None if groups is None else groups.borrowed_from,
        event.group_id,
    )


def cells_by_group(view: StateView, product_id: str) -> dict[int, list[Cell]]:
    """Return a product's counts by the number of the group."""
    cells: dict[int, list[Cell]] = {}
    for cell in view.cells(product_id):
        cells.setdefault(cell.group_id, []).append(cell)
    return cells


def _group(group: GroupRecord, cells: list[Cell]) -> ShiftedGroup:
    counts = [(cell.creative_id, int(cell.live_impressions), int(cell.live_clicks)) for cell in cells]
    n_all = sum(n for _, n, _ in counts)
    group_ctr = (sum(clicks for _, _, clicks in counts) + 1.0) / (n_all + 20.0)
    creatives = []
    for creative_id, n, n_clicked in counts:
        ctr = (n_clicked + _PULL_IMPRESSIONS * group_ctr) / (n + _PULL_IMPRESSIONS)
        margin = 1.96 * (ctr * (1.0 - ctr) / (n + _PULL_IMPRESSIONS)) ** 0.5
        creatives.append(
            CreativeCtr(
                creative_id=creative_id,
                n_impressions=n,
                n_clicks=min(n_clicked, n),
                ctr=ctr,
                ctr_low=max(ctr - margin, 0.0),
                ctr_high=min(ctr + margin, 1.0),
            )
        )
    profile = [
        ProfileEntry(attribute=trait.attribute, value=trait.value, share=trait.share, lift=trait.lift)
        for trait in group.profile
    ]
    return ShiftedGroup(group_id=group.group_id, share=group.share, profile=profile, creatives=creatives)
