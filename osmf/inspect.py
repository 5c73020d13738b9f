"""Inspect: what a state holds, for people as tables and for machines as figures."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.table import Table

from online.category_metrics import CategoryReading, read_category_metrics
from online.ctr import shrink
from online.displacement import read_centroid_displacements
from online.head import HEAD_KEY, Head, read_heads
from online.metrics import MetricPoint, read_metrics
from osmf.figures import Figures, commit, device
from osmf.ledger_figures import ledger_metrics, ledger_words
from state.reading import StateReader, StateView
from state.records import Cell, GroupRecord, LedgerRecord, OffsetRecord, ProductGroups, ProductRecord
from streams.lag import read_lag
from streams.settings import StreamSettings

MOST_ROWS: Final = 40
"""Products, or creatives of a product, that the tables show."""


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


def inspection_figures(inspection: Inspection, *, seconds: float) -> Figures:
    """Return an inspection as figures; ``detail`` holds every cell, and the sums by creative."""
    products, last = inspection.products, inspection.points[-1] if inspection.points else None
    metrics: dict[str, float | int] = {
        "products": len(products),
        "products_resident": inspection.n_resident,
        "products_parked": inspection.n_parked,
        "creatives": inspection.n_creatives,
        "products_with_groups": sum(len(product.present) > 1 for product in products),
        "products_with_distinct_groups": sum(
            product.groups is not None and product.groups.distinct for product in products
        ),
        "groups": sum(len(product.present) for product in products),
        "cells": sum(len(product.cells) for product in products),
        "impressions": sum(product.n_impressions for product in products),
        "clicks": sum(product.n_clicks for product in products),
        "consumed": sum(offset.n_consumed for offset in inspection.offsets.values()),
        "used": sum(offset.n_used for offset in inspection.offsets.values()),
        "duplicates": sum(offset.n_duplicates for offset in inspection.offsets.values()),
        "dead_letters": sum(offset.n_dead_letters for offset in inspection.offsets.values()),
        "expired": sum(offset.n_expired for offset in inspection.offsets.values()),
        "waiting_clicks": inspection.n_waiting_clicks,
        **ledger_metrics(inspection.ledger),
        "pending_impressions": inspection.n_pending_impressions,
        "impressions_closed_early": inspection.head.n_closed_early,
        "events_left_out_of_arms": inspection.head.n_left_out_of_arms,
        "outbox": inspection.n_outbox,
        "shifts": inspection.n_shifts,
        "encoder_version": max(inspection.encoder_versions, default=0),
    }
    if inspection.lag is not None:
        metrics["events_behind"] = sum(inspection.lag.values())
    if last is not None:
        metrics |= {
            "n_labelled": last.n_labelled,
            "auroc": last.auroc,
            "recent_auroc": last.recent_auroc,
            "log_loss": last.log_loss,
        }
    detail: dict[str, Any] = {
        "state": str(inspection.path),
        "cells": [_cell_detail(reading) for product in products for reading in product.cells],
        "creatives": [
            {
                "product_id": product.record.product_id,
                "creative_id": creative.creative_id,
                "origin": creative.origin,
                "impressions": creative.n_impressions,
                "clicks": creative.n_clicks,
                "ctr": creative.ctr,
            }
            for product in products
            for creative in product.creatives
        ],
        "dead_letters_by_reason": dict(sorted(inspection.head.refused.items())),
        "categories": [reading._asdict() for reading in inspection.categories],
        "groups": [
            _group_detail(product, group, displacement)
            for product in products
            for group, displacement in zip(product.present, product.displacements, strict=True)
        ],
        "offsets": [
            {
                "topic": topic,
                "partition": partition,
                "next_offset": offset.next_offset,
                "consumed": offset.n_consumed,
                "used": offset.n_used,
                "duplicates": offset.n_duplicates,
                "dead_letters": offset.n_dead_letters,
                "expired": offset.n_expired,
                "last_event_ms": offset.last_event_ms,
                "behind": None if inspection.lag is None else inspection.lag.get((topic, partition)),
            }
            for (topic, partition), offset in inspection.offsets.items()
        ],
    }
    return Figures(
        command="inspect",
        commit=commit(),
        seeds={},
        device=device(),
        seconds=seconds,
        metrics=metrics,
        detail=detail,
    )


def _cell_detail(reading: CellReading) -> dict[str, Any]:
    cell = reading.cell
    return {
        "product_id": cell.product_id,
        "group_id": cell.group_id,
        "creative_id": cell.creative_id,
        "impressions": cell.n_impressions,
        "clicks": cell.n_clicks,
        "live_impressions": cell.live_impressions,
        "live_clicks": cell.live_clicks,
        "ctr": reading.ctr,
        "ctr_low": reading.ctr_low,
        "ctr_high": reading.ctr_high,
    }


def _group_detail(product: ProductReading, group: GroupRecord, displacement: float | None) -> dict[str, Any]:
    assert product.groups is not None
    return {
        "product_id": product.record.product_id,
        "group_id": group.group_id,
        "share": group.share,
        "members": group.n_members,
        "profile": profile_words(group),
        "distinct": product.groups.distinct,
        "p_value": product.groups.p_value,
        "encoder_version": product.groups.encoder_version,
        "borrowed_from": product.groups.borrowed_from,
        "born_at_ms": group.born_at_ms,
        "radius": group.radius,
        "centroid_displacement": displacement,
    }


def profile_words(group: GroupRecord) -> str:
    """Return who is in a group: the traits that set it apart, with their share and lift."""
    if not group.profile:
        return "no attribute sets it apart"
    return ", ".join(
        f"{trait.attribute} {trait.value} ({trait.share:.0%}, ×{trait.lift:.1f})" for trait in group.profile
    )


def inspection_tables(inspection: Inspection, *, product_id: str | None = None) -> list[Table]:
    """Return an inspection as tables: an overview by product, or the groups and creatives of one."""
    tables = [_stream_table(inspection)]
    if product_id is None:
        measured = [_categories_table(inspection.categories)] if inspection.categories else []
        return [*tables, *measured, _overview(inspection.products)]
    chosen = [product for product in inspection.products if product.record.product_id == product_id]
    if not chosen:
        raise ProductMissingError(product_id, [product.record.product_id for product in inspection.products])
    return [*tables, _groups_table(chosen[0]), _creatives_table(chosen[0])]


def _stream_table(inspection: Inspection) -> Table:
    words = [
        f"encoder version {max(inspection.encoder_versions, default=0)}",
        f"{inspection.n_resident:,} products resident, {inspection.n_parked:,} parked",
        f"{inspection.n_shifts:,} shifts",
        f"{inspection.n_pending_impressions:,} impressions may still be clicked",
        f"{inspection.n_waiting_clicks:,} clicks wait for their impression",
        ledger_words(inspection.ledger),
        *(f"{n:,} {what}" for what, n in _limited(inspection).items() if n),
    ]
    if inspection.points:
        last = inspection.points[-1]
        words.insert(0, f"AUROC {last.auroc:.3f} over {last.n_labelled:,} labelled impressions")
    table = _table(f"{inspection.path}", ["topic", "partition"], caption=" · ".join(words))
    columns = ["next offset", "consumed", "used", "duplicates", "dead letters"]
    has_expired, lag = any(offset.n_expired for offset in inspection.offsets.values()), inspection.lag
    for name in [*columns, *(["expired"] if has_expired else []), *(["behind"] if lag is not None else [])]:
        table.add_column(name, justify="right")
    for partition, offset in inspection.offsets.items():
        counts = [offset.next_offset, offset.n_consumed, offset.n_used, offset.n_duplicates, offset.n_dead_letters]
        counts += [offset.n_expired] if has_expired else []
        counts += [lag.get(partition, 0)] if lag is not None else []
        table.add_row(partition[0], str(partition[1]), *(f"{count:,}" for count in counts))
    return table


def _limited(inspection: Inspection) -> dict[str, int]:
    """Return what limits have left out, and outbound messages that wait: nothing of it in the usual course."""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(inspection.head.refused.items()))
    return {
        f"dead letters ({reasons})": sum(inspection.head.refused.values()),
        "impressions were closed before their attribution window had passed": inspection.head.n_closed_early,
        "events were not counted for their arm": inspection.head.n_left_out_of_arms,
        "events expired before they were read": sum(offset.n_expired for offset in inspection.offsets.values()),
        "outbound messages wait for the broker": inspection.n_outbox,
    }


def _categories_table(categories: list[CategoryReading]) -> Table:
    shown = sorted(categories, key=lambda reading: (-reading.n_labelled, reading.category))[:MOST_ROWS]
    table = _table(
        "Predictions, before they were learnt",
        ["category"],
        caption=_left_out(len(categories), len(shown), "categories"),
    )
    for name in ("labelled", "AUROC", "log-loss", "clicks per expected"):
        table.add_column(name, justify="right")
    for reading in shown:
        table.add_row(
            reading.category or "(none)",
            f"{reading.n_labelled:,}",
            f"{reading.auroc:.3f}",
            f"{reading.log_loss:.4f}",
            f"{reading.calibration:.3f}",
        )
    return table


def _overview(products: list[ProductReading]) -> Table:
    shown = sorted(products, key=lambda product: (-product.n_impressions, product.record.product_id))[:MOST_ROWS]
    table = _table("Products", ["product", "title"], caption=_left_out(len(products), len(shown), "products"))
    for name in ("creatives", "groups", "impressions", "clicks", "clicks per impression"):
        table.add_column(name, justify="right")
    for product in shown:
        table.add_row(
            product.record.product_id,
            product.record.title,
            f"{len(product.creatives):,}",
            _groups_words(product),
            f"{product.n_impressions:,}",
            f"{product.n_clicks:,}",
            _rate(product.n_clicks, product.n_impressions),
        )
    return table


def _groups_words(product: ProductReading) -> str:
    if product.groups is None:
        return "not yet"
    return f"{len(product.present)}" if product.groups.distinct else f"{len(product.present)} (alike)"


def _groups_table(product: ProductReading) -> Table:
    caption = None
    if product.groups is not None and product.groups.borrowed_from is not None:
        caption = f"The groups are those of {product.groups.borrowed_from}, until there are enough users of its own."
    elif product.groups is not None and product.groups.p_value is not None:
        verdict = "prefer different creatives" if product.groups.distinct else "are not shown to differ"
        caption = f"The groups {verdict} (p = {product.groups.p_value:.2g})."
    table = _table(f"{product.record.product_id}: {product.record.title}", ["group", "who"], caption=caption)
    for name in ("share", "impressions", "clicks", "clicks per impression"):
        table.add_column(name, justify="right")
    present = {group.group_id: group for group in product.present}
    counted = {reading.cell.group_id for reading in product.cells}
    for group_id in sorted(present.keys() | counted):
        cells = [reading.cell for reading in product.cells if reading.cell.group_id == group_id]
        n_impressions, n_clicks = sum(c.n_impressions for c in cells), sum(c.n_clicks for c in cells)
        group = present.get(group_id)
        table.add_row(
            str(group_id),
            "not grouped, or an earlier group" if group is None else profile_words(group),
            "" if group is None else f"{group.share:.0%}",
            f"{n_impressions:,}",
            f"{n_clicks:,}",
            _rate(n_clicks, n_impressions),
        )
    return table


def _creatives_table(product: ProductReading) -> Table:
    """One row a creative, one column a group: clicks/impressions, and the shrunk CTR with its interval."""
    shown = product.creatives[:MOST_ROWS]
    table = _table(
        "Creatives by group", ["creative"], caption=_left_out(len(product.creatives), len(shown), "creatives")
    )
    table.add_column("all", justify="right")
    cells = {(reading.cell.group_id, reading.cell.creative_id): reading for reading in product.cells}
    group_ids = sorted({group_id for group_id, _ in cells})
    for group_id in group_ids:
        table.add_column(f"group {group_id}", justify="right")
    for creative in shown:
        row = [creative.creative_id, f"{creative.n_clicks:,}/{creative.n_impressions:,}  {creative.ctr:.2%}"]
        for group_id in group_ids:
            reading = cells.get((group_id, creative.creative_id))
            row.append("–" if reading is None else _cell_words(reading))
        table.add_row(*row)
    return table


def _cell_words(reading: CellReading) -> str:
    counts = f"{reading.cell.n_clicks:,}/{reading.cell.n_impressions:,}"
    return f"{counts}  {reading.ctr:.2%} [dim]({100 * reading.ctr_low:.2f}–{100 * reading.ctr_high:.2f})[/dim]"


def _rate(n_clicks: int, n_impressions: int) -> str:
    return f"{n_clicks / n_impressions:.2%}" if n_impressions else "–"


def _left_out(n_all: int, n_shown: int, what: str) -> str | None:
    return f"… and {n_all - n_shown:,} more {what}; --json has them all." if n_all > n_shown else None


def _table(title: str, columns: Iterable[str], *, caption: str | None) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        caption=caption,
        caption_justify="left",
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def run_inspect(
    path: Path, *, product_id: str | None = None, lag_of: StreamSettings | None = None
) -> tuple[Figures, list[Table]]:
    """Read a state; return its figures and its tables.

    Parameters
    ----------
    path
        The state's folder.
    product_id
        The only product to read; None: all.
    lag_of
        The broker that is asked how far the log is ahead of the state; None: none is.

    Raises
    ------
    streams.errors.BrokerAwayError
        The broker does not answer.
    """
    started_s = time.monotonic()
    inspection = inspect_state(path, product_id=product_id)
    if lag_of is not None:
        next_offsets = {partition: offset.next_offset for partition, offset in inspection.offsets.items()}
        inspection = replace(inspection, lag=read_lag(lag_of, next_offsets))
    figures = inspection_figures(inspection, seconds=time.monotonic() - started_s)
    return figures, inspection_tables(inspection, product_id=product_id)
