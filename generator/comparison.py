"""Comparisons: two pictures of a product of which one group clicks one more."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float64]
Feature = npt.NDArray[np.float32]
"""A group's feature (11, D), Eq. 6."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A creative's picture: a key that is its alone, and what gives its encoded bytes."""

    key: str
    read: Callable[[], bytes]

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """Return a picture that is not on disk; its key is its content's."""
        encoded = BytesIO()
        image.convert("RGB").save(encoded, "PNG", compress_level=1)
        payload = encoded.getvalue()
        return cls(hashlib.sha256(payload).hexdigest(), lambda: payload)

    def open(self) -> Image.Image:
        """Return the picture, RGB."""
        with Image.open(BytesIO(self.read())) as opened:
            return opened.convert("RGB")


@dataclass(frozen=True, eq=False, slots=True)
class Comparison:
    """Two pictures of one product, to be compared by one group, whose feature is (11, D) (Eq. 6)."""

    product_id: str
    title: str
    group_feature: Feature
    first: Picture
    second: Picture

    def swapped(self) -> Comparison:
        """Return the same two, the other way round."""
        return Comparison(self.product_id, self.title, self.group_feature, self.second, self.first)
