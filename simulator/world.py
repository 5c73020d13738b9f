"""A world with known preferences: who likes which style of creative, and how likely they click.

Every category has a *driver*: one attribute of the users, cut into two to four segments whose tastes over
creative style conflict. Which attribute it is differs by category, so a learner has to find it out for each.
All truths (best policies, their CTR) can be had exactly, by enumerating the population.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from generator.prompt import VOCABULARY
from simulator.attributes import ATTRIBUTES, draw_users, value_chances

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from generator.prompt import Prompt
    from simulator.settings import ShiftKind, WorldSettings

N_STYLE_DIMS: Final = 8
"""Length of a style vector."""

SLOT_WEIGHTS: Final[dict[str, float]] = {"scene": 1.0, "palette": 0.8, "light": 0.6, "prop": 0.25, "composition": 0.15}
"""How much each slot's word moves the style: what fills the picture weighs most."""

STYLE_SPREAD: Final = float(np.sqrt(sum(w * w for w in SLOT_WEIGHTS.values()) / N_STYLE_DIMS))
"""Standard deviation of a style along any one direction, over prompts drawn uniformly."""

_STYLE_SEED: Final = 20_250_601  # styles belong to the words, not to a run: every world sees prompts alike
_MAX_P_CLICK: Final = 0.6


@dataclass(frozen=True)
class Driver:
    """An attribute that decides tastes, and its values' split into segments.

    ``bounds`` cut the attribute's ordered values: segment 0 holds codes below ``bounds[0]``, and so on.
    """

    attribute: str
    bounds: tuple[int, ...]

    @property
    def n_segments(self) -> int:
        """Number of segments."""
        return len(self.bounds) + 1

    def segment_of_value(self) -> dict[str, int]:
        """Map each of the attribute's values to its segment."""
        values = ATTRIBUTES[self.attribute]
        return {v: int(np.searchsorted(self.bounds, code, side="right")) for code, v in enumerate(values)}


DRIVERS: Final[tuple[Driver, ...]] = (
    Driver("age", (4, 7)),
    Driver("gender", (1,)),
    Driver("purchase_power", (2, 3)),
    Driver("os_plant", (1,)),
    Driver("child_age", (1, 6)),
    Driver("promotions_sensitive_level", (3,)),
    Driver("resident_city_level", (2,)),
    Driver("education", (2, 4)),
    Driver("user_active", (1, 2)),
    Driver("has_car", (1,)),
)
"""Drivers in the order in which categories get them; a category past the last starts again at the first."""


class UnknownCategory(ValueError):
    """A category that the world does not have."""

    def __init__(self, category: str, known: Sequence[str]) -> None:
        super().__init__(
            f"category {category!r} is not of this world; allowed: {', '.join(known)}. No taste was changed."
        )
        self.category = category


class NotEnoughCategories(ValueError):
    """More categories asked for than the world has."""

    def __init__(self, asked: int, known: Sequence[str]) -> None:
        super().__init__(
            f"{asked} categories were asked to change, but the world has {len(known)} ({', '.join(known)}). "
            "No taste was changed."
        )


def _word_vectors() -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return a fixed vector for every slot word: unit length, and each slot's vectors centred on zero.

    Within a slot the vectors spread out evenly over the sphere, so that words are clearly different
    to look at and to like.
    """
    rng = np.random.default_rng(_STYLE_SEED)
    vectors: dict[str, dict[str, NDArray[np.float64]]] = {}
    for slot, words in VOCABULARY.items():
        raw = rng.normal(size=(len(words), N_STYLE_DIMS))
        raw -= raw.mean(axis=0)
        raw /= np.linalg.norm(raw, axis=1, keepdims=True)
        vectors[slot] = dict(zip(words, raw, strict=True))
    return vectors


_WORD_VECTORS: Final = _word_vectors()


def style_of(prompt: Prompt) -> NDArray[np.float64]:
    """Return a prompt's style: the weighted sum of its slot words' vectors, shape (8,)."""
    style = np.zeros(N_STYLE_DIMS)
    for slot, word in prompt.slots().items():
        style += SLOT_WEIGHTS[slot] * _WORD_VECTORS[slot][word]
    return style


def _conflicting_tastes(n_segments: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw unit tastes that conflict, shape (n_segments, 8): spread evenly in a random plane.

    Two tastes are opposite, three at 120 degrees, four opposite or orthogonal.
    """
    plane, _ = np.linalg.qr(rng.normal(size=(N_STYLE_DIMS, 2)))  # (8, 2)
    angles = 2 * np.pi * np.arange(n_segments) / n_segments
    tastes = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T  # (S, 8)
    tastes += 0.12 * rng.normal(size=tastes.shape) / np.sqrt(N_STYLE_DIMS)
    unit: NDArray[np.float64] = tastes / np.linalg.norm(tastes, axis=1, keepdims=True)
    return unit


@dataclass(frozen=True)
class CategoryTaste:
    """What a category's segments like: its driver and a unit taste per segment, shape (S, 8)."""

    driver: Driver
    tastes: NDArray[np.float64]


@dataclass(frozen=True)
class PolicyValues:
    """True expected CTR of showing creatives uniformly, the best for all, and the best of the user's segment."""

    uniform: float
    best_for_all: float
    best_per_segment: float


@dataclass(frozen=True)
class World:
    """Users, products and tastes; never changed in place, so a world of an earlier time stays usable.

    Make one with :meth:`create`. Users and products are addressed by index.
    """

    settings: WorldSettings
    product_categories: tuple[str, ...]
    codes: NDArray[np.int64]
    personas: NDArray[np.int64]
    categories: Mapping[str, CategoryTaste]
    user_offsets: NDArray[np.float64]
    personal_tastes: NDArray[np.float64]
    product_offsets: NDArray[np.float64]
    product_quirks: NDArray[np.float64]
    product_qualities: NDArray[np.float64]
    intercept: float

    @classmethod
    def create(cls, settings: WorldSettings, product_categories: Sequence[str], seed: int) -> World:
        """Draw a world: the same settings, categories and seed give the same one.

        Categories get their drivers in the order in which they first appear.
        """
        rng = np.random.default_rng(seed)
        personas, codes = draw_users(settings.n_users, rng)
        names = list(dict.fromkeys(product_categories))
        categories: dict[str, CategoryTaste] = {}
        for place, name in enumerate(names):
            driver = DRIVERS[place % len(DRIVERS)]
            categories[name] = CategoryTaste(driver, _conflicting_tastes(driver.n_segments, rng))
        n_products = len(product_categories)
        quality = {name: _unit(rng.normal(size=N_STYLE_DIMS)) for name in names}
        qualities = [_unit(quality[c] + 0.5 * _unit(rng.normal(size=N_STYLE_DIMS))) for c in product_categories]
        quirks = 0.2 * rng.normal(size=(n_products, N_STYLE_DIMS)) / np.sqrt(N_STYLE_DIMS)
        return cls(
            settings=settings,
            product_categories=tuple(product_categories),
            codes=codes,
            personas=personas,
            categories=categories,
            user_offsets=settings.user_spread * rng.normal(size=settings.n_users),
            personal_tastes=rng.normal(size=(settings.n_users, N_STYLE_DIMS)) / np.sqrt(N_STYLE_DIMS),
            product_offsets=settings.product_spread * rng.normal(size=n_products),
            product_quirks=quirks,
            product_qualities=np.array(qualities).reshape(n_products, N_STYLE_DIMS),
            intercept=float(np.log(settings.mean_ctr / (1 - settings.mean_ctr))),
        )

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.codes)

    @property
    def n_products(self) -> int:
        """Number of products."""
        return len(self.product_categories)

    def attribute_values(self, user_index: int) -> dict[str, str]:
        """Return all 20 attribute values of a user."""
        row = self.codes[user_index]
        return {name: values[row[column]] for column, (name, values) in enumerate(ATTRIBUTES.items())}

    def segments(self, category: str) -> NDArray[np.int64]:
        """Return every user's segment in a category, shape (n_users,)."""
        driver = self._taste(category).driver
        column = list(ATTRIBUTES).index(driver.attribute)
        return np.searchsorted(driver.bounds, self.codes[:, column], side="right").astype(np.int64)

    def segment_chances(self, category: str, known: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return how probable each segment of a category is, given what is known of the users, (n_users, S).

        ``known`` says which attributes are, shape (n_users, 20).
        """
        driver = self._taste(category).driver
        chances = value_chances(self.codes, known, driver.attribute)  # (U, V)
        starts = [0, *driver.bounds]
        by_segment: NDArray[np.float64] = np.add.reduceat(chances, starts, axis=1)
        return by_segment

    def true_segment(self, user_index: int, category: str) -> int:
        """Return a user's segment in a category."""
        return int(self.segments(category)[user_index])

    def p_click(
        self, user_index: NDArray[np.int64], product_index: NDArray[np.int64], style: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the chance of a click for each row.

        Parameters
        ----------
        user_index, product_index
            Who sees which product, shape (B,).
        style
            Styles of the creatives shown, shape (B, 8).
        """
        return self._p_click(self._tastes_by_product(), user_index, product_index, style)

    def frozen_tastes(self) -> ClickChances:
        """Return a fast form of :meth:`p_click` for many calls on this world."""
        return ClickChances(self)

    def _p_click(
        self,
        tables: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
        user_index: NDArray[np.int64],
        product_index: NDArray[np.int64],
        style: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        segments, category_of_product, directions = tables
        segment = segments[category_of_product[product_index], user_index]  # (B,)
        direction = directions[product_index, segment]  # (B, 8)
        direction = direction + (self.settings.personal_strength / STYLE_SPREAD) * self.personal_tastes[user_index]
        logits = self.intercept + self.user_offsets[user_index] + self.product_offsets[product_index]
        logits = logits + np.einsum("bd,bd->b", direction, style)
        chances: NDArray[np.float64] = np.minimum(1.0 / (1.0 + np.exp(-logits)), _MAX_P_CLICK)
        return chances

    def _tastes_by_product(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Return segments (C, U), category of each product (P,), and style directions (P, S_max, 8)."""
        names = list(self.categories)
        segments = np.stack([self.segments(name) for name in names])
        category_of_product = np.array([names.index(c) for c in self.product_categories], dtype=np.int64)
        n_most = max(len(t.tastes) for t in self.categories.values())
        directions = np.zeros((self.n_products, n_most, N_STYLE_DIMS))
        for product, category in enumerate(self.product_categories):
            tastes = self.categories[category].tastes
            liking = self.settings.taste_strength * (tastes + self.product_quirks[product])
            liking = liking + self.settings.quality_strength * self.product_qualities[product]
            directions[product, : len(tastes)] = liking / STYLE_SPREAD
        return segments, category_of_product, directions

    def segment_directions(self, product_index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return a product's style directions in logits, shape (S, 8), and the shares of its segments, shape (S,)."""
        category = self.product_categories[product_index]
        n_segments = self.categories[category].driver.n_segments
        directions = self._tastes_by_product()[2][product_index, :n_segments]
        return directions, np.bincount(self.segments(category), minlength=n_segments) / self.n_users

    def segment_ctrs(self, product_index: int, styles: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the true CTR of each of a product's creatives in each segment, shape (S, n_creatives).

        ``styles`` are the creatives' styles, shape (n_creatives, 8). A segment without users has CTR 0.
        """
        category = self.product_categories[product_index]
        segments = self.segments(category)
        chances = self._chances(self._tastes_by_product(), product_index, styles)
        n_segments = self.categories[category].driver.n_segments
        return np.stack(
            [
                chances[segments == s].mean(axis=0) if np.any(segments == s) else np.zeros(len(styles))
                for s in range(n_segments)
            ]
        )

    def policy_values(self, styles: Sequence[NDArray[np.float64]]) -> PolicyValues:
        """Return the true expected CTR of three policies, exactly: every user sees every product once.

        ``styles`` holds one array per product, shape (n_creatives, 8).
        """
        uniform, best_for_all, best_per_segment = [], [], []
        tables = self._tastes_by_product()
        for product, product_styles in enumerate(styles):
            chances = self._chances(tables, product, product_styles)  # (U, n_creatives)
            means = chances.mean(axis=0)
            uniform.append(means.mean())
            best_for_all.append(means.max())
            segments = self.segments(self.product_categories[product])
            total = sum(chances[segments == s].sum(axis=0).max() for s in np.unique(segments))
            best_per_segment.append(total / self.n_users)
        return PolicyValues(float(np.mean(uniform)), float(np.mean(best_for_all)), float(np.mean(best_per_segment)))

    def calibrate(self, styles: Sequence[NDArray[np.float64]]) -> World:
        """Return this world with base rates such that the uniform policy's CTR is the setting's ``mean_ctr``."""
        low, high = -12.0, 6.0
        world = self
        users = np.arange(min(self.n_users, 4_000))  # users come in random order, so these are a sample
        sample = replace(
            self,
            codes=self.codes[users],
            personas=self.personas[users],
            user_offsets=self.user_offsets[users],
            personal_tastes=self.personal_tastes[users],
        )
        for _ in range(18):
            middle = (low + high) / 2
            if replace(sample, intercept=middle).policy_values(styles).uniform < self.settings.mean_ctr:
                low = middle
            else:
                high = middle
        world = replace(self, intercept=(low + high) / 2)
        # The sample brings it close; one Newton step in the logit on the whole population finishes it.
        ctr, goal = world.policy_values(styles).uniform, self.settings.mean_ctr
        return replace(world, intercept=world.intercept + float(np.log(goal / (1 - goal)) - np.log(ctr / (1 - ctr))))

    def shift(self, categories: Sequence[str], kind: ShiftKind, seed: int = 0) -> World:
        """Return the world after the tastes in some categories changed.

        ``"swap"``: each segment takes over the next one's taste. ``"driver"``: another attribute decides, with
        new tastes; it is one that drives no category, where there is one.

        Raises
        ------
        UnknownCategory
            When a category is not of this world.
        """
        changed = dict(self.categories)
        rng = np.random.default_rng(seed)
        for name in categories:
            old = self._taste(name)
            if kind == "swap":
                changed[name] = CategoryTaste(old.driver, np.roll(old.tastes, 1, axis=0))
                continue
            used = {taste.driver.attribute for taste in changed.values()}
            free = [d for d in DRIVERS if d.attribute not in used] or [d for d in DRIVERS if d != old.driver]
            alike = [d for d in free if d.n_segments == old.driver.n_segments] or free
            driver = alike[int(rng.integers(len(alike)))]
            changed[name] = CategoryTaste(driver, _conflicting_tastes(driver.n_segments, rng))
        return replace(self, categories=changed)

    def draw_categories(self, n_categories: int, rng: np.random.Generator) -> tuple[str, ...]:
        """Draw the categories whose tastes will change, in the world's order.

        Raises
        ------
        NotEnoughCategories
            When the world has fewer.
        """
        names = list(self.categories)
        if n_categories > len(names):
            raise NotEnoughCategories(n_categories, names)
        chosen = rng.choice(len(names), size=n_categories, replace=False)
        return tuple(names[i] for i in sorted(chosen))

    def _taste(self, category: str) -> CategoryTaste:
        if category not in self.categories:
            raise UnknownCategory(category, list(self.categories))
        return self.categories[category]

    def _chances(
        self,
        tables: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
        product_index: int,
        styles: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return every user's chance to click each creative of a product, shape (n_users, n_creatives)."""
        users = np.arange(self.n_users)
        products = np.full(self.n_users, product_index)
        columns = [
            self._p_click(tables, users, products, np.broadcast_to(style, (self.n_users, N_STYLE_DIMS)))
            for style in styles
        ]
        return np.stack(columns, axis=1)


class ClickChances:
    """:meth:`World.p_click` with its tables made once, for the hot path of the traffic."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tables = world._tastes_by_product()

    def __call__(
        self, user_index: NDArray[np.int64], product_index: NDArray[np.int64], style: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the chance of a click for each row; shapes as in :meth:`World.p_click`."""
        return self._world._p_click(self._tables, user_index, product_index, style)


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = vector / np.linalg.norm(vector)
    return unit
