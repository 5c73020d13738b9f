"""Figures of an inspection: all that a state holds, for machines."""

from __future__ import annotations

from typing import Any

from osmf.figures import Figures, commit, device
from osmf.inspection import CellReading, Inspection, ProductReading
from osmf.ledger_figures import ledger_metrics
from state.records import GroupRecord


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


def limited(inspection: Inspection) -> dict[str, int]:
    """Return what limits have left out, and outbound messages that wait: nothing of it in the usual course."""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(inspection.head.refused.items()))
    return {
        f"dead letters ({reasons})": sum(inspection.head.refused.values()),
        "impressions were closed before their attribution window had passed": inspection.head.n_closed_early,
        "events were not counted for their arm": inspection.head.n_left_out_of_arms,
        "events expired before they were read": sum(offset.n_expired for offset in inspection.offsets.values()),
        "outbound messages wait for the broker": inspection.n_outbox,
    }


def profile_words(group: GroupRecord) -> str:
    """Return who is in a group: the traits that set it apart, with their share and lift."""
    if not group.profile:
        return "no attribute sets it apart"
    return ", ".join(
        f"{trait.attribute} {trait.value} ({trait.share:.0%}, ×{trait.lift:.1f})" for trait in group.profile
    )
