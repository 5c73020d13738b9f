"""Rows: impressions as arrays, the form in which learners and groupings take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Rows:
    """Impressions of one batch, as arrays of equal length B.

    Parameters
    ----------
    products, creatives
        Registration numbers, (B,) int64.
    attributes
        The users' codes, (B, N) uint8.
    """

    products: npt.NDArray[np.int64]
    creatives: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.products)

    def take(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> Rows:
        """Return the rows at ``index``."""
        return Rows(self.products[index], self.creatives[index], self.attributes[index])

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, in order."""
        return Rows(
            np.concatenate([part.products for part in parts]),
            np.concatenate([part.creatives for part in parts]),
            np.concatenate([part.attributes for part in parts]),
        )


@dataclass(frozen=True)
class Audience:
    """Users of one product, and its creatives, any of which could be shown to each of them.

    Parameters
    ----------
    product
        Registration number.
    attributes
        The users' codes, (U, N) uint8.
    creatives
        Registration numbers, (C,) int64.
    """

    product: int
    attributes: npt.NDArray[np.uint8]
    creatives: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Candidates:
    """The products of some rows, with all creatives that each could have shown.

    Parameters
    ----------
    products
        The distinct products' registration numbers, (P,).
    product_index
        Each row's product among them, (B,).
    creatives, owners
        Registration numbers of all creatives of these products, product by product, and the place of each one's
        product, both (C,).
    creative_index
        Each row's creative among them, (B,).
    """

    products: npt.NDArray[np.int64]
    product_index: npt.NDArray[np.int64]
    creatives: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]
    creative_index: npt.NDArray[np.int64]

    @staticmethod
    def of(rows: Rows, creatives_of: Mapping[int, npt.NDArray[np.int64]]) -> Candidates:
        """Return the candidates of rows; ``creatives_of`` names the creatives of every product."""
        products, product_index = np.unique(rows.products, return_inverse=True)
        of_products = [creatives_of[product] for product in products.tolist()]
        creatives = np.concatenate(of_products)
        owners = np.repeat(np.arange(len(products)), [len(numbers) for numbers in of_products])
        order = np.argsort(creatives)
        creative_index = order[np.searchsorted(creatives[order], rows.creatives)]
        return Candidates(products, product_index, creatives, owners, creative_index)


@dataclass(frozen=True)
class LabelledRows:
    """Rows with what became of them.

    ``weights`` is 1 for a label that is given and -1 for one that is taken back.
    """

    rows: Rows
    clicks: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> LabelledRows:
        """Return the rows at ``index``."""
        return LabelledRows(self.rows.take(index), self.clicks[index], self.weights[index])

    @staticmethod
    def concatenate(parts: Sequence[LabelledRows]) -> LabelledRows:
        """Return the rows of all parts, in order."""
        return LabelledRows(
            Rows.concatenate([part.rows for part in parts]),
            np.concatenate([part.clicks for part in parts]),
            np.concatenate([part.weights for part in parts]),
        )
