"""Inspection: what a state holds, read in one view."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from online.category_metrics import CategoryReading, read_category_metrics
from online.ctr import shrink
from online.displacement import read_centroid_displacements
from online.head import HEAD_KEY, Head, read_heads
from online.metrics import MetricPoint, read_metrics
from state.reading import StateReader, StateView
from state.records import Cell, GroupRecord, LedgerRecord, OffsetRecord, ProductGroups, ProductRecord


class ProductMissingError(ValueError):
    """A product that is to be looked at is not in the state."""

    def __init__(self, product_id: str, known: list[str]) -> None:
        some = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
        super().__init__(f"no product {product_id!r} in this state; it has {some or 'none'}. Nothing is shown.")


@dataclass(frozen=True)
class CellReading:
    """One (product, group, creative) with its CTR, shrunk, and the 95% interval."""

    cell: Cell
    ctr: float
    ctr_low: float
    ctr_high: float


@dataclass(frozen=True)
class CreativeReading:
    """One creative of a product, over all groups."""

    creative_id: str
    origin: str
    n_impressions: int
    n_clicks: int
    ctr: float


@dataclass(frozen=True)
class ProductReading:
    """One product with its groups, cells and creatives; ``creatives`` by impressions, the most first.

    ``displacements`` is how far each group's centroid has moved since the last regrouping, in radii.
    """

    record: ProductRecord
    groups: ProductGroups | None
    cells: list[CellReading]
    creatives: list[CreativeReading]
    displacements: list[float | None]

    @property
    def n_impressions(self) -> int:
        """Impressions over all cells."""
        return sum(reading.cell.n_impressions for reading in self.cells)

    @property
    def n_clicks(self) -> int:
        """Clicks over all cells."""
        return sum(reading.cell.n_clicks for reading in self.cells)

    @property
    def present(self) -> list[GroupRecord]:
        """The groups that the product has now."""
        return [] if self.groups is None else self.groups.groups


@dataclass(frozen=True)
class Inspection:
    """What a state held at one commit.

    ``n_resident`` products are held by the online process; of ``n_parked`` more that were shown, the state alone knows.
    ``lag`` is how many messages the log is ahead, by partition, where the broker was asked.
    """

    path: Path
    products: list[ProductReading]
    offsets: dict[tuple[str, int], OffsetRecord]
    points: list[MetricPoint]
    categories: list[CategoryReading]
    encoder_versions: list[int]
    n_creatives: int
    n_resident: int
    n_parked: int
    n_shifts: int
    n_waiting_clicks: int
    ledger: LedgerRecord
    n_pending_impressions: int
    n_outbox: int
    head: Head
    lag: dict[tuple[str, int], int] | None = None


def inspect_state(path: Path, *, product_id: str | None = None) -> Inspection:
    """Read a state, while it is being written or not.

    Parameters
    ----------
    path
        The state's folder.
    product_id
        The only product to read; None: all.

    Raises
    ------
    ProductMissingError
        There is no such product.
    state.errors.StateMissingError
        There is no state.
    """
    with StateReader(path) as state, state.view() as view:
        products = view.products()
        chosen = [product for product in products if product_id in (None, product.product_id)]
        if product_id is not None and not chosen:
            raise ProductMissingError(product_id, [product.product_id for product in products])
        return Inspection(
            path=path,
            products=[_read_product(view, product) for product in chosen],
            offsets=view.offsets(),
            points=read_metrics(view),
            categories=read_category_metrics(view),
            encoder_versions=[version for _, version in view.encoder_versions()],
            n_creatives=len(view.creatives(product_id)),
            n_resident=view.n_resident_products(),
            n_parked=view.n_parked_products(),
            n_shifts=sum(product_id in (None, shift.product_id) for shift in view.shifts()),
            n_waiting_clicks=view.n_waiting_clicks(),
            ledger=view.ledger(),
            n_pending_impressions=view.n_pending_impressions(),
            n_outbox=view.n_outbox(),
            head=read_heads(view.meta(HEAD_KEY.decode())),
        )


def _read_product(view: StateView, product: ProductRecord) -> ProductReading:
    origins = {creative.creative_id: creative.origin for creative in view.creatives(product.product_id)}
    cells, groups = view.cells(product.product_id), view.groups(product.product_id)
    displacements = [] if groups is None else read_centroid_displacements(view, groups)
    group_ids = sorted({cell.group_id for cell in cells})
    creative_ids = sorted({cell.creative_id for cell in cells} | origins.keys())
    row_of = {group_id: row for row, group_id in enumerate(group_ids)}
    column_of = {creative_id: column for column, creative_id in enumerate(creative_ids)}
    impressions = np.zeros((max(len(group_ids), 1), len(creative_ids)))  # (G, C)
    clicks = np.zeros_like(impressions)
    for cell in cells:
        at = row_of[cell.group_id], column_of[cell.creative_id]
        impressions[at], clicks[at] = cell.n_impressions, cell.n_clicks
    if not creative_ids:
        return ProductReading(product, groups, [], [], displacements)
    # A torn count is shown as it is; `osmf verify` is what names it.
    shrunk = shrink(np.maximum(impressions, clicks), clicks)
    readings = []
    for cell in cells:
        at = row_of[cell.group_id], column_of[cell.creative_id]
        readings.append(CellReading(cell, float(shrunk.ctr[at]), float(shrunk.ctr_low[at]), float(shrunk.ctr_high[at])))
    creatives = [
        CreativeReading(
            creative_id,
            origins.get(creative_id, "unknown"),
            int(impressions[:, column].sum()),
            int(clicks[:, column].sum()),
            float(shrunk.creative_ctr[column]),
        )
        for creative_id, column in column_of.items()
    ]
    creatives.sort(key=lambda creative: (-creative.n_impressions, creative.creative_id))
    return ProductReading(product, groups, readings, creatives, displacements)
