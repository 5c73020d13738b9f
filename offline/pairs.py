"""Pairs: two creatives of one product in CTR order within one group, as sure as the counts allow."""

from __future__ import annotations

import hashlib
from typing import Literal

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from offline.posterior import Cumulants, logit_cumulants, p_above

HeldOutBy = Literal["product", "creative"]
"""What a pair is held out with: all pairs of a product, or those of two creatives that no other pair shows."""

TRAIN, HELD_OUT, MIXED = "train", "held_out", "mixed"


class PairFloorError(ValueError):
    """A floor on a pair's probability that allows no order, or no pair."""

    def __init__(self, floor: float) -> None:
        super().__init__(
            f"the floor of P(CTR_w > CTR_l) is {floor!r}; allowed is 0.5 to below 1: lower, and a loser could win. "
            "No pair was made."
        )


class HeldOutShareError(ValueError):
    """A share of held-out products or creatives that leaves nothing."""

    def __init__(self, share: float) -> None:
        super().__init__(
            f"the share that is held out is {share!r}; allowed is 0 to below 1: something has to be learnt from. "
            "No pair was made."
        )


def pairs_schema() -> pa.Schema:
    """Return the schema of pairs, each field with its description."""
    return pa.schema(
        [
            _field("snapshot_id", pa.string(), "The snapshot that the pair's rows came from."),
            _field("product_id", pa.string(), "The product of both creatives."),
            _field("group_id", pa.int32(), "The group that prefers the winner."),
            _field("creative_w", pa.string(), "The winner."),
            _field("creative_l", pa.string(), "The loser."),
            _field("weight", pa.float64(), "P(CTR_w > CTR_l) under the posteriors."),
            _field("split", pa.string(), "`train`, `held_out`, or `mixed`: one creative of each, for neither."),
            _field("ctr_w", pa.float64(), "The winner's empirical-Bayes CTR in the group."),
            _field("ctr_l", pa.float64(), "The loser's."),
            _field("prompt_w", pa.string(), "What the winner was drawn from, where it was.", nullable=True),
            _field("prompt_l", pa.string(), "What the loser was drawn from, where it was.", nullable=True),
            _field("image_uri_w", pa.string(), "Where the winner's image lies.", nullable=True),
            _field("image_uri_l", pa.string(), "Where the loser's image lies.", nullable=True),
        ]
    )


def make_pairs(rows: ir.Table, *, floor: float, held_out_share: float, held_out_by: HeldOutBy) -> ir.Table:
    """Return all pairs of creatives of GAIP rows, by product and group, whose order is sure enough.

    The winner is the creative with the higher posterior mean; the weight is the probability that its CTR is
    really higher. Pairs below ``floor`` and ties are dropped, so a pair is never there in both orders.

    What is held out depends on ids alone, by their MD5: it stays held out in every later snapshot, and for every group.

    Parameters
    ----------
    rows
        GAIP rows (`offline.rows.gaip_schema`), in any order.
    floor
        Smallest weight, from 0.5 to below 1.
    held_out_share
        Share of the products, or of the creatives, that are held out, from 0 to below 1.
    held_out_by
        With `product` no product of a held-out pair is learnt from; with `creative` no creative is.

    Returns
    -------
    Pairs, sorted by product, group, winner and loser.

    Raises
    ------
    PairFloorError, HeldOutShareError
        If ``floor`` or ``held_out_share`` is out of range.
    """
    if not 0.5 <= floor < 1.0:
        raise PairFloorError(floor)
    if not 0.0 <= held_out_share < 1.0:
        raise HeldOutShareError(held_out_share)
    group = ("product_id", "group_id")
    rows = rows.mutate(**_named("logit", logit_cumulants(rows.ctr_alpha, rows.ctr_beta)))
    described = ("creative_id", "ctr", "prompt", "image_uri", *(f"logit_{name}" for name in Cumulants._fields))
    won = rows.select("snapshot_id", *group, **{f"{name}_w": name for name in described})
    lost = rows.select(*group, **{f"{name}_l": name for name in described})
    pairs = won.join(lost, [*group, won.ctr_w > lost.ctr_l])
    pairs = pairs.mutate(weight=p_above(_cumulants(pairs, "w"), _cumulants(pairs, "l")))
    pairs = pairs.filter(pairs.weight >= floor)
    split = _split(pairs, held_out_share, held_out_by)
    pairs = pairs.mutate(split=split).rename(creative_w="creative_id_w", creative_l="creative_id_l")
    return pairs.order_by(*group, "creative_w", "creative_l").select(*pairs_schema().names)


def _split(pairs: ir.Table, share: float, by: HeldOutBy) -> ir.StringValue:
    if by == "product":
        return ibis.ifelse(_is_held_out(pairs.product_id, share), HELD_OUT, TRAIN)
    won, lost = _is_held_out(pairs.creative_id_w, share), _is_held_out(pairs.creative_id_l, share)
    return ibis.cases((won & lost, HELD_OUT), (won | lost, MIXED), else_=TRAIN)


def is_held_out(name: str, share: float) -> bool:
    """Tell whether a product or creative is held out: whether its id's MD5, as a fraction of 1, is below ``share``."""
    return hashlib.md5(name.encode(), usedforsecurity=False).hexdigest() < _bound(share)


def _is_held_out(name: ir.StringValue, share: float) -> ir.BooleanValue:
    return name.hexdigest("md5") < _bound(share)


def _bound(share: float) -> str:
    return f"{int(share * 16**8):08x}"


def _named(prefix: str, cumulants: Cumulants) -> dict[str, ir.Value]:
    return {f"{prefix}_{name}": value for name, value in cumulants._asdict().items()}


def _cumulants(pairs: ir.Table, side: str) -> Cumulants:
    return Cumulants(*(pairs[f"logit_{name}_{side}"] for name in Cumulants._fields))


def _field(name: str, kind: pa.DataType, description: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})
