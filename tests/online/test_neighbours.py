"""Neighbours: the same category first, then the nearest within the bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from online.encoders import IMAGE_TOKENS, TITLE_TOKENS
from online.features import FeatureBank
from online.neighbours import MIN_SIMILARITY, ProductNeighbours
from online.registry import Registry, titled
from online.settings import ModelForm
from state.store import ChangeSet
from streams.events import Creative, Product

Floats = npt.NDArray[np.float32]

DIM = 16


@dataclass(frozen=True)
class Shelf:
    """A product of the tests: its direction in both spaces."""

    product_id: str
    category: str | None
    title: Floats
    images: list[Floats]


class KnownText:
    """Looks titles up."""

    dim = DIM

    def __init__(self, features: dict[str, Floats]) -> None:
        self._features = features

    def encode(self, text: str) -> Floats:
        return self._features[text]


class KnownImages:
    """Looks creatives up."""

    dim = DIM

    def __init__(self, features: dict[str, Floats]) -> None:
        self._features = features

    def encode(self, image: bytes | None, creative_id: str) -> Floats:
        return self._features[creative_id]


def neighbours(shelves: Sequence[Shelf], form: ModelForm = "shipped") -> ProductNeighbours:
    titles = {titled(shelf.product_id, shelf.category): shelf.title for shelf in shelves}
    images = {f"{shelf.product_id}-{n}": image for shelf in shelves for n, image in enumerate(shelf.images)}
    bank = FeatureBank(len(shelves[0].title), len(shelves[0].images[0]))
    registry = Registry(lambda: KnownText(titles), lambda: KnownImages(images), lambda _: b"", bank)
    for shelf in shelves:
        product = Product(product_id=shelf.product_id, title=shelf.product_id, updated_at_ms=0, category=shelf.category)
        registry.put_product(product, ChangeSet())
        for number in range(len(shelf.images)):
            creative_id = f"{shelf.product_id}-{number}"
            event = Creative(creative_id=creative_id, product_id=shelf.product_id, created_at_ms=0)
            registry.put_creative(event, 0, ChangeSet())
    return ProductNeighbours(registry, bank, form)


AXES = np.random.default_rng(0).standard_normal((2, DIM))


def turned(degrees: float, noise: int) -> Floats:
    """Return a vector at an angle in a plane that all features take part in, a little beside it."""
    angle = math.radians(degrees)
    beside = 0.1 * np.random.default_rng(noise).standard_normal(DIM)
    return np.asarray(math.cos(angle) * AXES[0] + math.sin(angle) * AXES[1] + beside, np.float32)


def shelf(product_id: str, category: str | None, degrees: float, noise: int = 0) -> Shelf:
    return Shelf(product_id, category, turned(degrees, noise), [turned(degrees + step, noise) for step in (-5, 5)])


SHELVES = [
    shelf("chair", "seating", 0, 0),
    shelf("sofa", "seating", 150, 1),
    shelf("lamp", "lamps", 10, 2),
    shelf("bulb", "lamps", 170, 3),
    shelf("stool", "seating", 12, 4),
    shelf("thing", None, 8, 5),
    shelf("odd", "books", 270, 6),
    shelf("mug", None, 175, 7),
    shelf("cup", None, 250, 8),
]


@pytest.mark.parametrize(
    ("asked", "grouped", "expected"),
    [
        ("stool", ["chair", "sofa", "lamp"], "chair"),  # the nearest of its category
        ("stool", ["sofa", "lamp"], "sofa"),  # its category, though another product is nearer
        ("stool", ["lamp", "bulb"], "lamp"),  # none of its category has groups
        ("stool", ["bulb", "mug"], None),  # the others are too far
        ("thing", ["chair", "lamp", "sofa", "mug"], "lamp"),  # products without category are of none in common
        ("thing", ["sofa", "bulb"], None),
        ("odd", ["chair", "sofa", "lamp", "bulb"], None),
        ("odd", ["chair", "cup"], "cup"),
        ("chair", [], None),
    ],
)
def test_the_category_comes_first_then_what_is_near(asked: str, grouped: list[str], expected: str | None) -> None:
    found = neighbours(SHELVES)
    assert found.nearest([asked], grouped) == [expected]
    assert found.nearest([asked], grouped[::-1]) == [expected]


def test_many_are_answered_as_each_alone() -> None:
    found, grouped = neighbours(SHELVES), ["chair", "lamp", "mug"]
    asked = [each.product_id for each in SHELVES]
    assert found.nearest(asked, grouped) == [found.nearest([each], grouped)[0] for each in asked]


def test_features_count_alike_whatever_their_scale() -> None:
    """A feature a thousand times as large as the others, and as many times as uncertain, decides nothing alone."""
    rng = np.random.default_rng(0)
    scale = np.ones(DIM, np.float32)
    scale[5] = 1_000
    plain, scaled = [], []
    for number in range(24):
        title, image = rng.standard_normal((2, DIM)).astype(np.float32)
        plain.append(Shelf(f"p{number:02d}", None, title, [image]))
        scaled.append(Shelf(f"p{number:02d}", None, title * scale, [image * scale + 7]))
    ids = [each.product_id for each in plain]
    expected = neighbours(plain).nearest(ids[:8], ids[8:])
    assert neighbours(scaled).nearest(ids[:8], ids[8:]) == expected
    assert len(set(expected) - {None}) > 1


def test_a_product_is_as_near_to_itself_as_can_be_and_the_bound_is_a_cosine() -> None:
    assert 0 < MIN_SIMILARITY < 1
    found = neighbours(SHELVES)
    ids = [each.product_id for each in SHELVES]
    assert found.nearest(["thing", "mug", "cup"], ids) == ["thing", "mug", "cup"]


def test_of_tokens_the_mean_counts() -> None:
    def spread(vector: Floats, n_tokens: int) -> Floats:
        """Return tokens with a mean of ``vector``."""
        rng = np.random.default_rng(1)
        tokens = rng.standard_normal((n_tokens, DIM)).astype(np.float32)
        return np.asarray(tokens - tokens.mean(axis=0) + vector, np.float32).ravel()

    of_tokens = [
        Shelf(
            each.product_id,
            each.category,
            spread(each.title, TITLE_TOKENS),
            [spread(image, IMAGE_TOKENS) for image in each.images],
        )
        for each in SHELVES
    ]
    ids, grouped = [each.product_id for each in SHELVES], ["sofa", "lamp", "mug"]
    assert neighbours(of_tokens, "paper").nearest(ids, grouped) == neighbours(SHELVES).nearest(ids, grouped)
