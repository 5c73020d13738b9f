"""Labelled pairs: comparisons whose outcome was counted, and who may be asked about them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from generator.comparison import Comparison, Feature, Floats, Picture
from offline.dataset import Dataset
from online.registry import read_image
from state.records import N_FEATURE_POINTS


class MissingPictureError(ValueError):
    """A creative of a pair that has no picture."""

    def __init__(self, creative_id: str) -> None:
        super().__init__(
            f"creative {creative_id!r} has no image_uri; allowed are creatives with a picture: a reward model judges "
            "by what it sees. Nothing was compared."
        )


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """A comparison whose outcome was counted: ``winner_first`` is the comparison with the winner as its first.

    ``weight`` is P(CTR_w > CTR_l), ``ctr_w`` and ``ctr_l`` are the empirical-Bayes CTRs in the group.
    """

    winner_first: Comparison
    weight: float
    ctr_w: float
    ctr_l: float

    @property
    def share(self) -> float:
        """The winner's share of the clicks where both are shown as often, above 0.5."""
        return self.ctr_w / (self.ctr_w + self.ctr_l)

    @property
    def product_id(self) -> str:
        """The product of both creatives."""
        return self.winner_first.product_id

    def is_turned(self) -> bool:
        """Tell whether an evaluation shows the loser first: decided by the pictures' keys, for about a half."""
        first, second = self.winner_first.first.key, self.winner_first.second.key
        low, high = sorted((first, second))
        return (first == low) == bool(zlib.crc32(f"{low}\0{high}".encode()) & 1)


class PairScorer(Protocol):
    """Says for comparisons how likely the first picture is to win."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    def p_first_wins(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return P(CTR_1 > CTR_2 | G) for each comparison, (n,)."""
        ...


def read_pairs(dataset: Dataset, split: str) -> list[Pair]:
    """Return the pairs of one split of a dataset (`offline.pairs.TRAIN` or `HELD_OUT`), in its order.

    Pictures are not read yet. Groups and pictures that pairs share are shared objects.

    Raises
    ------
    MissingPictureError
        If a creative of a pair has no picture.
    """
    features: dict[tuple[str, int], Feature] = {}
    titles: dict[str, str] = {}
    columns = dataset.rows.select(["product_id", "group_id", "title"]).to_pylist()
    flat = np.asarray(dataset.rows["group_feature"].combine_chunks().flatten(), np.float32)
    for row, feature in zip(columns, flat.reshape(len(columns), -1), strict=True):
        titles[row["product_id"]] = row["title"]
        features.setdefault((row["product_id"], row["group_id"]), feature.reshape(N_FEATURE_POINTS, -1))
    pictures: dict[str, Picture] = {}
    pairs = []
    for row in dataset.pairs.to_pylist():
        if row["split"] != split:
            continue
        for side in ("w", "l"):
            creative_id, uri = row[f"creative_{side}"], row[f"image_uri_{side}"]
            if uri is None:
                raise MissingPictureError(creative_id)
            if creative_id not in pictures:
                pictures[creative_id] = Picture(creative_id, partial(read_image, uri))
        product_id = row["product_id"]
        comparison = Comparison(
            product_id,
            titles[product_id],
            features[product_id, row["group_id"]],
            pictures[row["creative_w"]],
            pictures[row["creative_l"]],
        )
        pairs.append(Pair(comparison, row["weight"], row["ctr_w"], row["ctr_l"]))
    return pairs
