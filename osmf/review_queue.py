"""Review queue: the creatives that wait for a person, and those that were refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from rich.table import Table

from generator.review import ReviewRecord, ReviewStatus
from osmf.figures import Figures, commit, device


def review_figures(reviews: Sequence[ReviewRecord], status: ReviewStatus) -> Figures:
    """Return reviews of one status as figures."""
    fields = ReviewRecord.__struct_fields__
    return Figures(
        command="creative queue" if status == "waiting" else "creative refused",
        commit=commit(),
        seeds={},
        device=device(),
        seconds=time.process_time(),
        metrics={f"n_{status}": len(reviews)},
        detail={"creatives": [dict(zip(fields, msgspec.to_builtins(review), strict=True)) for review in reviews]},
    )


def review_table(reviews: Sequence[ReviewRecord], status: ReviewStatus) -> Table:
    """Return reviews of one status as a table for people, oldest first."""
    title = f"{len(reviews)} creatives: {status}"
    table = Table(header_style="dim", title=title, title_justify="left", title_style="bold", show_lines=True)
    for heading in ("creative", "product, group", "prompt", "expected CTR", "picture"):
        table.add_column(heading, overflow="fold")
    if status != "waiting":
        table.add_column("reason", overflow="fold")
    for review in reviews:
        made = datetime.fromtimestamp(review.created_at_ms / 1000, UTC)
        cells = [
            f"{review.creative_id}\n{made:%Y-%m-%d %H:%M}",
            f"{review.product_id}, {review.group_id}",
            review.prompt,
            f"{review.expected_ctr:.4f}",
            review.image_uri or "nothing was drawn",
        ]
        if status != "waiting":
            cells.append(f"{review.reason} ({review.reviewed_by})" if review.reviewed_by else review.reason)
        table.add_row(*cells)
    return table
