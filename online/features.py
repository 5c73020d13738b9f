"""Features of the registered products and creatives, as growing matrices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from online.mismatch import FeatureWidthError


class FeatureBank:
    """Frozen features by registration number: titles (P, D_title) and images (C, D_image)."""

    def __init__(self, title_dim: int, image_dim: int) -> None:
        self._titles = _Matrix(title_dim)
        self._images = _Matrix(image_dim)

    def put_title(self, number: int, features: bytes) -> None:
        """Set the features of a product's title, float32 bytes."""
        self._titles.put(number, features)

    def put_image(self, number: int, features: bytes) -> None:
        """Set the features of a creative's image, float32 bytes."""
        self._images.put(number, features)

    def titles(self, numbers: npt.NDArray[np.int64] | None = None) -> Tensor:
        """Return the title features of products, (n, D_title); of all when none are named."""
        return self._titles.select(numbers)

    def images(self, numbers: npt.NDArray[np.int64] | None = None) -> Tensor:
        """Return the image features of creatives, (n, D_image); of all when none are named."""
        return self._images.select(numbers)


class _Matrix:
    def __init__(self, dim: int) -> None:
        self.rows = torch.zeros(64, dim)
        self.n_rows = 0

    def select(self, numbers: npt.NDArray[np.int64] | None) -> Tensor:
        return self.rows[: self.n_rows] if numbers is None else self.rows[torch.from_numpy(numbers)]

    def put(self, number: int, features: bytes) -> None:
        row = np.frombuffer(features, np.float32)
        if len(row) != self.rows.shape[1]:
            raise FeatureWidthError(len(row), self.rows.shape[1])
        while number >= len(self.rows):
            self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)])
        self.n_rows = max(self.n_rows, number + 1)
        self.rows[number] = torch.from_numpy(row.copy())
