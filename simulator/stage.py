"""The stage: the products, creatives and world that a run starts with, made from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from generator.prompt import Prompt, PromptNotUnderstood
from simulator.catalogue import load_catalogue
from simulator.creatives import choose_prompts, make_creatives
from simulator.world import N_STYLE_DIMS, World, style_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from generator.renderer import Renderer
    from simulator.catalogue import CatalogueProduct
    from simulator.creatives import CatalogueCreative
    from simulator.settings import SimulatorSettings
    from streams.events import Creative


@dataclass(frozen=True)
class Stage:
    """Products, their first creatives, and the calibrated world, all by product index."""

    products: list[CatalogueProduct]
    creatives: list[list[CatalogueCreative]]
    world: World


def set_stage(
    settings: SimulatorSettings, renderer: Renderer, *, on_progress: Callable[[int, int], None] | None = None
) -> Stage:
    """Load or make everything that a run starts with; the second time nothing is fetched or rendered."""
    products = load_catalogue(settings.catalogue, settings.cache_dir / "catalogue")
    world = World.create(settings.world, [product.category for product in products], settings.seed)
    rng = np.random.default_rng([settings.seed, 1])
    prompts = choose_prompts(world, [product.title for product in products], settings.catalogue, rng)
    creatives = make_creatives(
        products,
        prompts,
        renderer,
        size_px=settings.catalogue.creative_side_px,
        cache_dir=settings.cache_dir / "creatives",
        on_progress=on_progress,
    )
    world = world.calibrate([np.stack([creative.style for creative in of_product]) for of_product in creatives])
    return Stage(products, creatives, world)


class StyleBook:
    """The styles of all creatives that are known, by creative id.

    Parameters
    ----------
    stage
        The products and creatives to start with.
    """

    def __init__(self, stage: Stage) -> None:
        self._rows: dict[str, int] = {}
        self._styles = np.zeros((256, N_STYLE_DIMS))
        self._product_index = {product.product_id: i for i, product in enumerate(stage.products)}
        self._of_product: list[list[str]] = [[] for _ in stage.products]
        self.n_learned = 0
        self.n_without_style = 0
        for creatives in stage.creatives:
            for creative in creatives:
                self._add(creative.creative_id, creative.product_id, creative.style)

    def __contains__(self, creative_id: object) -> bool:
        """Tell whether a creative is known."""
        return creative_id in self._rows

    def learn(self, event: Creative) -> None:
        """Learn a creative from its event; one without a readable prompt has the neutral style, all zeros."""
        if event.creative_id in self._rows or event.product_id not in self._product_index:
            return
        style = np.zeros(N_STYLE_DIMS)
        try:
            style = style_of(Prompt.parse(event.prompt or ""))
        except PromptNotUnderstood:
            self.n_without_style += 1
        self._add(event.creative_id, event.product_id, style)
        self.n_learned += 1

    def learn_unannounced(self, creative_id: str, product_id: str) -> None:
        """Take up a creative that is shown but was never announced: it has the neutral style."""
        if creative_id not in self._rows:
            self._add(creative_id, product_id, np.zeros(N_STYLE_DIMS))
            self.n_without_style += 1

    def styles(self, creative_ids: Sequence[str]) -> NDArray[np.float64]:
        """Return the styles of known creatives, shape (B, 8)."""
        found: NDArray[np.float64] = self._styles[[self._rows[creative_id] for creative_id in creative_ids]]
        return found

    def ids_by_product(self) -> list[list[str]]:
        """Return the known creatives of every product, by product index."""
        return [list(ids) for ids in self._of_product]

    def styles_by_product(self) -> list[NDArray[np.float64]]:
        """Return the styles of every product's creatives, by product index, each of shape (n_creatives, 8)."""
        return [self.styles(ids) for ids in self._of_product]

    def _add(self, creative_id: str, product_id: str, style: NDArray[np.float64]) -> None:
        row = len(self._rows)
        if row == len(self._styles):
            self._styles = np.concatenate([self._styles, np.zeros_like(self._styles)])
        self._styles[row] = style
        self._rows[creative_id] = row
        self._of_product[self._product_index[product_id]].append(creative_id)
