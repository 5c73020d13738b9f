"""Neighbours: of a new product, the nearest that has groups.

Products are near each other by the title and the pictures: features of the frozen encoders, each standardised over
what is registered, the pictures' averaged over the product's creatives. Half of the similarity is the titles' cosine,
half the pictures'. Products of the same category come first, since what splits their users is usually the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from online.clustering import Floats
from online.encoders import IMAGE_TOKENS, TITLE_TOKENS
from online.features import FeatureBank
from online.registry import Registry
from online.settings import ModelForm

Ints = npt.NDArray[np.int64]

MIN_SIMILARITY = 0.25
"""Similarity from which a product of another category, or of none, lends its groups.

In three catalogues of 48 products of six categories (worlds 101 to 103), with and without the category in the title,
the nearest product of another category lay at 0.1 in the middle and at 0.27 at most. Of 214 products whose nearest of
all lay above 0.25, it was of the same category for all but one.
"""

N_MOST = 1_024
"""Products of a kind, at most, that are looked at; of more, some are left out at even distances."""


class ProductNeighbours:
    """Finds the nearest products.

    Parameters
    ----------
    registry
        Products and creatives.
    bank
        Their features.
    form
        Of the preference model: of the paper's form the features are those of tokens, which are averaged here.
    """

    def __init__(self, registry: Registry, bank: FeatureBank, form: ModelForm) -> None:
        self._registry = registry
        self._bank = bank
        self._n_tokens = (TITLE_TOKENS, IMAGE_TOKENS) if form == "paper" else (1, 1)

    def nearest(self, product_ids: Sequence[str], grouped: Sequence[str]) -> list[str | None]:
        """Return the nearest product of each among others, (n,); None where none is near enough.

        Parameters
        ----------
        product_ids
            Registered products with a creative.
        grouped
            The products that may be found, with a creative each.
        """
        if not grouped:
            return [None] * len(product_ids)
        products = self._registry.products
        by_category: dict[str | None, list[int]] = {}
        for number, category in sorted((products[each].number, products[each].category) for each in grouped):
            by_category.setdefault(category, []).append(number)
        everywhere = sorted(products[each].number for each in grouped)
        constants = self._constants()
        found: list[str | None] = [None] * len(product_ids)
        for category in dict.fromkeys(products[each].category for each in product_ids):
            rows = [row for row, each in enumerate(product_ids) if products[each].category == category]
            alike = [] if category is None else by_category.get(category, [])
            numbers = _thinned(alike or everywhere)
            asked = np.array([products[product_ids[row]].number for row in rows])
            similarity, place = _most_similar(self._features(asked, constants), self._features(numbers, constants))
            for row, score, position in zip(rows, similarity, place, strict=True):
                if alike or score >= MIN_SIMILARITY:
                    found[row] = self._registry.product_ids[int(numbers[position])]
        return found

    def _constants(self) -> list[tuple[Floats, Floats]]:
        """Return mean and scale of every feature of titles and of pictures, over what is registered."""
        constants = []
        for raw in self._raw(_thinned(sorted(self._registry.creative_numbers))):
            deviation = raw.std(axis=0)
            scale = 1 / np.where(deviation > MIN_DEVIATION, deviation, 1)
            constants.append((raw.mean(axis=0), np.asarray(scale, np.float32)))
        return constants

    def _features(self, numbers: Ints, constants: list[tuple[Floats, Floats]]) -> Floats:
        """Return the features of products, (n, D), of unit length: titles and pictures of equal length beside."""
        parts = []
        for raw, (mean, scale) in zip(self._raw(numbers), constants, strict=True):
            standard = (raw - mean) * scale
            length = np.linalg.norm(standard, axis=1, keepdims=True)
            parts.append(standard / np.maximum(length, 1e-6) / np.sqrt(2))
        return np.ascontiguousarray(np.concatenate(parts, axis=1), np.float32)

    def _raw(self, numbers: Ints) -> tuple[Floats, Floats]:
        """Return the features of products' titles, (n, D_title), and the means of their creatives', (n, D_image)."""
        creatives = [self._registry.creative_numbers[number] for number in numbers.tolist()]
        sizes = torch.tensor([len(each) for each in creatives])
        images = _pooled(self._bank.images(np.concatenate(creatives)), self._n_tokens[1])
        owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        sums = torch.zeros(len(sizes), images.shape[1]).index_add_(0, owners, images)
        titles = _pooled(self._bank.titles(numbers), self._n_tokens[0])
        return titles.numpy(), (sums / sizes.unsqueeze(-1)).numpy()


def _pooled(features: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Return the means over the tokens of features, (n, n_tokens * width) to (n, width)."""
    return features if n_tokens == 1 else features.reshape(len(features), n_tokens, -1).mean(dim=1)


MIN_DEVIATION = 1e-4


def _thinned(numbers: list[int]) -> Ints:
    return np.array(numbers[:: -(-len(numbers) // N_MOST)], np.int64)


def _most_similar(asked: Floats, known: Floats) -> tuple[Floats, Ints]:
    """Return the similarity of each row's most similar among known ones, and its place there, both (n,)."""
    import faiss

    index = faiss.IndexFlatIP(known.shape[1])
    index.add(known)
    similarity, place = index.search(asked, 1)
    return similarity[:, 0], place[:, 0]
