"""Likeness: how much a picture looks like the creatives that its product has, by the cosine of image features.

The features are a frozen encoder's *places*: the 7 x 7 grid of its last layer, not its mean. A product stands in
all of its creatives, so their means are near each other whatever is behind it (cosines of 0.75 to 0.95); place by
place they are not: scaled, compressed or trimmed copies had 0.89 to 0.99 (288 of the catalogue), creatives that
differ in one slot word 0.37 to 0.90 (4% of 96 above 0.88), those of random prompts 0.23 to 0.74.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]


class ImageFeatures(Protocol):
    """A frozen image encoder; those of :mod:`online.encoders` are such, and `osmf generator` hands one over."""

    dim: int

    def encode(self, image: bytes | None, creative_id: str) -> Vector:
        """Return the features of a picture's file, (dim,)."""
        ...


class LikenessIndex:
    """The features of one product's creatives, and which is most like another picture.

    Parameters
    ----------
    dim
        Width of the features.
    known
        Features by creative, (dim,) each.
    """

    def __init__(self, dim: int, known: Mapping[str, Vector]) -> None:
        import faiss

        self._index = faiss.IndexFlatIP(dim)
        self._creative_ids: list[str] = []
        for creative_id, features in known.items():
            self.add(creative_id, features)

    def add(self, creative_id: str, features: Vector) -> None:
        """Take a creative in, (dim,)."""
        self._index.add(_unit(features))
        self._creative_ids.append(creative_id)

    def nearest(self, features: Vector) -> tuple[str, float] | None:
        """Return the creative most like these features, (dim,), and the cosine; None where there is no creative."""
        if not self._creative_ids:
            return None
        cosines, places = self._index.search(_unit(features), 1)  # (1, 1) each
        return self._creative_ids[int(places[0, 0])], float(cosines[0, 0])

    def __len__(self) -> int:
        return len(self._creative_ids)


def _unit(features: Vector) -> Vector:
    """Return features of unit length, (1, dim); those of nothing stay zero and are like nothing."""
    return np.asarray(features / max(float(np.linalg.norm(features)), 1e-12), np.float32)[None]
