"""Pairs: two creatives of one product in CTR order within one group, as sure as the counts allow."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from online.significance import p_better


class PairFloorError(ValueError):
    """A floor on a pair's probability that allows no order, or no pair."""

    def __init__(self, floor: float) -> None:
        super().__init__(
            f"the floor of P(CTR_w > CTR_l) is {floor!r}; allowed is 0.5 to below 1: lower, and a loser could win. "
            "No pair was made."
        )


class DuplicateRowError(ValueError):
    """Two rows of one creative in one group."""

    def __init__(self, product_id: str, group_id: int, creative_id: str) -> None:
        super().__init__(
            f"creative {creative_id!r} has two rows in group {group_id} of product {product_id!r}; allowed is one. "
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
            _field("ctr_w", pa.float64(), "The winner's empirical-Bayes CTR in the group."),
            _field("ctr_l", pa.float64(), "The loser's."),
            _field("prompt_w", pa.string(), "What the winner was drawn from, where it was.", nullable=True),
            _field("prompt_l", pa.string(), "What the loser was drawn from, where it was.", nullable=True),
            _field("image_uri_w", pa.string(), "Where the winner's image lies.", nullable=True),
            _field("image_uri_l", pa.string(), "Where the loser's image lies.", nullable=True),
        ]
    )


def make_pairs(rows: pa.Table, *, floor: float) -> pa.Table:
    """Return all pairs of creatives of GAIP rows, by product and group, whose order is sure enough.

    The winner is the creative with the higher posterior mean; the weight is the probability that its CTR is
    really higher. Pairs below ``floor`` and ties are dropped, so a pair is never there in both orders.

    Parameters
    ----------
    rows
        GAIP rows (`offline.snapshot.gaip_schema`), in any order.
    floor
        Smallest weight, from 0.5 to below 1.

    Returns
    -------
    A table of `pairs_schema`, sorted by product, group, winner and loser, with the metadata of ``rows``.

    Raises
    ------
    PairFloorError
        If ``floor`` is out of range.
    DuplicateRowError
        If a creative has two rows in one group.
    """
    if not 0.5 <= floor < 1.0:
        raise PairFloorError(floor)
    order = pc.sort_indices(
        rows, sort_keys=[("product_id", "ascending"), ("group_id", "ascending"), ("creative_id", "ascending")]
    )
    rows = rows.drop_columns(["group_feature"]).take(order)
    # Dictionary codes stand for the ids: the same product and group lie side by side now.
    product = _codes(rows["product_id"])
    group = rows["group_id"].to_numpy()
    same = (product[1:] == product[:-1]) & (group[1:] == group[:-1])
    twice = np.flatnonzero(same & (np.diff(_codes(rows["creative_id"])) == 0))
    if twice.size:
        row = rows.slice(int(twice[0]), 1).to_pylist()[0]
        raise DuplicateRowError(row["product_id"], row["group_id"], row["creative_id"])
    first, second = _pairs_within(same, rows.num_rows)
    ctr = rows["ctr"].to_numpy()
    first_wins = ctr[first] > ctr[second]
    winner, loser = np.where(first_wins, first, second), np.where(first_wins, second, first)
    alpha, beta = rows["ctr_alpha"].to_numpy(), rows["ctr_beta"].to_numpy()
    weight = p_better(alpha[winner], beta[winner], alpha[loser], beta[loser])
    kept = (weight >= floor) & (ctr[winner] != ctr[loser])
    winner, loser, weight = winner[kept], loser[kept], weight[kept]
    by_winner = np.lexsort((loser, winner))
    winner, loser, weight = winner[by_winner], loser[by_winner], weight[by_winner]
    won, lost = rows.take(pa.array(winner)), rows.take(pa.array(loser))
    schema = pairs_schema()
    columns = {
        "snapshot_id": won["snapshot_id"],
        "product_id": won["product_id"],
        "group_id": won["group_id"],
        "creative_w": won["creative_id"],
        "creative_l": lost["creative_id"],
        "weight": pa.chunked_array([pa.array(weight, pa.float64())]),
        **{
            f"{name}_{side}": source[name]
            for name in ("ctr", "prompt", "image_uri")
            for side, source in (("w", won), ("l", lost))
        },
    }
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    return table.replace_schema_metadata(rows.schema.metadata)


def _pairs_within(same_as_next: NDArray[np.bool_], n_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index pairs (i, j), i < j, of rows in one run of equal keys."""
    if n_rows == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(~same_as_next) + 1]).astype(np.int64)
    sizes = np.diff(np.append(starts, n_rows))
    ends = np.repeat(starts + sizes, sizes)  # (n_rows,) one past the last row of each row's run
    index = np.arange(n_rows, dtype=np.int64)
    n_partners = ends - index - 1
    first = np.repeat(index, n_partners)
    since = np.arange(first.size, dtype=np.int64) - np.repeat(np.cumsum(n_partners) - n_partners, n_partners)
    return first, first + 1 + since


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.combine_chunks().dictionary_encode().indices, dtype=np.int64)


def _field(name: str, kind: pa.DataType, description: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})
