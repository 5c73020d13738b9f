"""Spoiled events: messages that are wrong on purpose, one kind for every reason of the dead letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, get_args

import msgspec
import numpy as np

from streams.events import Click

if TYPE_CHECKING:
    from streams.events import Impression

SpoilReason = Literal[
    "bad_json",
    "unknown_version",
    "missing_field",
    "invalid_field",
    "unknown_impression",
    "unknown_product",
    "unknown_creative",
]
"""How an event is spoiled; the words are those of :data:`streams.events.DeadLetterReason`."""

SPOIL_REASONS: Final[tuple[SpoilReason, ...]] = get_args(SpoilReason)

_ENCODER: Final = msgspec.json.Encoder()


def spoil_plan(n_impressions: int, n_per_reason: int, until: float) -> dict[int, list[SpoilReason]]:
    """Return after which impression which kind of wrong event is sent, by impression number.

    The kinds take turns, spread evenly over the first ``until`` (a share) of the run.
    """
    n_all = n_per_reason * len(SPOIL_REASONS)
    plan: dict[int, list[SpoilReason]] = {}
    for place, at in enumerate(np.linspace(0, max(0, n_impressions * until - 1), n_all + 2)[1:-1]):
        plan.setdefault(int(at), []).append(SPOIL_REASONS[place % len(SPOIL_REASONS)])
    return plan


def spoil(
    reason: SpoilReason, like: Impression, spoiled_id: str, rng: np.random.Generator
) -> tuple[Literal["impressions", "clicks"], str, bytes]:
    """Return a message that is wrong in one way only: its topic's name in the settings, its key and its bytes.

    It resembles the impression ``like``, or a click on it, under an id that no other event has.
    """
    impression = msgspec.structs.replace(like, impression_id=spoiled_id)
    click = Click(impression_id=spoiled_id, product_id=like.product_id, clicked_at_ms=like.shown_at_ms + 1)
    if reason == "unknown_impression":
        return "clicks", click.product_id, _ENCODER.encode(click)
    if reason == "unknown_product":
        other = msgspec.structs.replace(impression, product_id=f"no-such-product-{spoiled_id}")
        return "impressions", other.product_id, _ENCODER.encode(other)
    if reason == "unknown_creative":
        other = msgspec.structs.replace(impression, creative_id=f"no-such-creative-{spoiled_id}")
        return "impressions", other.product_id, _ENCODER.encode(other)
    is_click = bool(rng.random() < 0.5)
    name: Literal["impressions", "clicks"] = "clicks" if is_click else "impressions"
    payload = _ENCODER.encode(click if is_click else impression)
    if reason == "bad_json":
        return name, like.product_id, payload[: int(rng.integers(1, len(payload)))]
    fields = msgspec.json.decode(payload)
    if reason == "unknown_version":
        fields["schema_version"] = 99
    elif reason == "missing_field":
        del fields["impression_id" if is_click else "user_id"]
    else:
        fields["clicked_at_ms" if is_click else "shown_at_ms"] = -1 if rng.random() < 0.5 else "yesterday"
    return name, like.product_id, _ENCODER.encode(fields)
