"""Head: the pipeline's small numbers, and what limits have left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

HEAD_KEY: Final = b"pipeline"
"""Key of the head among the state's small things."""


class Head(msgspec.Struct, array_like=True):
    """The pipeline's small numbers.

    ``refused`` counts dead letters by reason. ``n_closed_early`` impressions were closed before their attribution
    window had passed (``streams.join.max_pending_impressions``), and ``n_left_out_of_arms`` events were not
    counted for their arm (``online.limits.arms``).
    """

    n_batches: int = 0
    watermark_ms: int = 0
    newest_event_ms: int = 0
    n_outbox: int = 0
    refused: dict[str, int] = {}
    n_closed_early: int = 0
    n_left_out_of_arms: int = 0


def read_heads(found: Iterable[bytes]) -> Head:
    """Return the heads of a state's shards as one: sums of what they count, and the newest of their times."""
    whole = Head()
    for head in map(read_head, found):
        whole.n_batches += head.n_batches
        whole.n_outbox += head.n_outbox
        whole.n_closed_early += head.n_closed_early
        whole.n_left_out_of_arms += head.n_left_out_of_arms
        whole.watermark_ms = max(whole.watermark_ms, head.watermark_ms)
        whole.newest_event_ms = max(whole.newest_event_ms, head.newest_event_ms)
        for reason, n in head.refused.items():
            whole.refused[reason] = whole.refused.get(reason, 0) + n
    return whole


def read_head(found: bytes | None) -> Head:
    """Return the head of a state, from what lies there; a new one where nothing does."""
    return Head() if found is None else msgspec.msgpack.decode(found, type=Head)
