"""Inspect: what a state holds, for people as tables and for machines as figures."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.table import Table

from online.category_metrics import CategoryReading
from osmf.figures import Figures
from osmf.inspection import CellReading, Inspection, ProductMissingError, ProductReading, inspect_state
from osmf.inspection_figures import inspection_figures, limited, profile_words
from osmf.ledger_figures import ledger_words
from streams.lag import read_lag
from streams.settings import StreamSettings

MOST_ROWS: Final = 40
"""Products, or creatives of a product, that the tables show."""


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
        *(f"{n:,} {what}" for what, n in limited(inspection).items() if n),
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
