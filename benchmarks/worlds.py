"""Simulated worlds as arrays: impressions of creatives shown by chance, for benchmarks of what learns from them.

No event is made and nothing is sent: a million labelled impressions take seconds. The features are those of the real
encoders on the rendered pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.encoders import feature_dims
from online.features import FeatureBank
from online.registry import Registry, read_image
from online.rows import LabelledRows, Rows
from online.settings import OnlineSettings
from online.worker import LazyEncoders
from simulator.attributes import ATTRIBUTES
from simulator.settings import CatalogueSettings, ShiftKind, SimulatorSettings
from simulator.stage import Stage, set_stage
from simulator.traffic import user_attributes
from simulator.world import World
from state.store import ChangeSet
from streams.events import Product

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STRONG_TASTES = 0.85
"""Strength of tastes at which what attributes and images can tell has an AUROC of about 0.69 (6% CTR)."""


def bench_world(*, mean_ctr: float, taste_strength: float = STRONG_TASTES) -> SimulatorSettings:
    """Return the world of the benchmarks: 48 products; its seed is set by each run."""
    world = SimulatorSettings(catalogue=CatalogueSettings(n_products=48))
    tastes = world.world.model_copy(update={"mean_ctr": mean_ctr, "taste_strength": taste_strength})
    return world.model_copy(update={"world": tastes})


START_MS = 1_748_822_400_000
"""When products and creatives were made; nothing depends on it."""


@dataclass(frozen=True)
class Impressions:
    """Labelled impressions, (B,): who saw which creative of which product, and whether it was clicked.

    ``creatives`` are registration numbers, those of `BenchWorld.creative_numbers`.
    """

    users: Ints
    products: Ints
    creatives: Ints
    clicks: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.users)

    def take(self, index: Ints | npt.NDArray[np.bool_] | slice) -> Impressions:
        """Return the impressions at ``index``."""
        return Impressions(self.users[index], self.products[index], self.creatives[index], self.clicks[index])


class BenchWorld:
    """A world, its products and creatives registered, and its users encoded.

    Parameters
    ----------
    simulator
        The world, with its seed.
    online
        The encoders and attributes.
    """

    def __init__(self, simulator: SimulatorSettings, online: OnlineSettings) -> None:
        from generator.procedural import ProceduralRenderer

        self.simulator = simulator
        settings = simulator.model_copy(update={"cache_dir": simulator.cache_dir.expanduser()})
        self.stage: Stage = set_stage(settings, ProceduralRenderer())
        self.world: World = self.stage.world
        self.schema = AttributeSchema(online.attributes)
        known = user_attributes(
            self.world, settings.traffic.p_missing_attribute, np.random.default_rng([settings.seed, 2])
        )
        self.codes = self.schema.encode_many(known)  # (U, N)
        self._known = np.array([[name in values for name in ATTRIBUTES] for values in known])  # (U, 20)
        self.bank = FeatureBank(*feature_dims(online))
        self.registered = ChangeSet()
        """What registering wrote: products and creatives, for a state."""
        encoders = LazyEncoders(online)
        self.registry = Registry(encoders.text, encoders.image, read_image, self.bank)
        for product in self.stage.products:
            event = Product(
                product_id=product.product_id,
                title=product.title,
                updated_at_ms=START_MS,
                category=product.category,
                image_uri=product.cutout_path.resolve().as_uri(),
            )
            self.registry.put_product(event, self.registered)
        styles: list[Floats] = []
        self.creative_ids: list[str] = []
        for creatives in self.stage.creatives:
            for creative in creatives:
                self.registry.put_creative(creative.event(START_MS), START_MS, self.registered)
                self.creative_ids.append(creative.creative_id)
                styles.append(creative.style)
        self.creative_numbers = [self.registry.creative_numbers[product] for product in range(self.n_products)]
        self.styles = np.stack(styles)  # (C, 8)

    def shifted(self, categories: Sequence[str], kind: ShiftKind) -> BenchWorld:
        """Return this world after the tastes in some categories changed; products, creatives and users are shared."""
        after = copy.copy(self)
        after.world = self.world.shift(categories, kind, self.simulator.seed)
        return after

    @property
    def n_products(self) -> int:
        """Number of products."""
        return len(self.stage.products)

    def draw(self, n_impressions: int, rng: np.random.Generator) -> Impressions:
        """Draw impressions: users, products and creatives uniform."""
        users = rng.integers(self.world.n_users, size=n_impressions)
        products = rng.integers(self.n_products, size=n_impressions)
        starts = np.array([numbers[0] for numbers in self.creative_numbers])
        sizes = np.array([len(numbers) for numbers in self.creative_numbers])
        creatives = starts[products] + (rng.random(n_impressions) * sizes[products]).astype(np.int64)
        p_click = self.world.p_click(users, products, self.styles[creatives])
        clicks = (rng.random(n_impressions) < p_click).astype(np.float32)
        return Impressions(users, products, creatives, clicks)

    def rows(self, impressions: Impressions) -> LabelledRows:
        """Return impressions as a learner takes them."""
        return LabelledRows(
            Rows(impressions.products, impressions.creatives, self.codes[impressions.users]),
            impressions.clicks,
            np.ones(len(impressions), np.float32),
        )

    def category(self, product_id: str) -> str:
        """Return a product's category."""
        return self.world.product_categories[self.registry.products[product_id].number]

    def segments(self, product: int) -> Ints:
        """Return every user's segment for a product, (U,)."""
        return self.world.segments(self.world.product_categories[product])

    def segment_ctrs(self, product: int) -> Floats:
        """Return the true CTR of each of a product's creatives in each segment, (S, C)."""
        return self.world.segment_ctrs(product, self.styles[self.creative_numbers[product]])

    def ceiling(self, impressions: Impressions) -> Floats:
        """Return the most that a model can know of each impression's click, which sees attributes and images, (B,).

        It is the true CTR of the creative in the user's segment; of a user whose driving attribute is missing, the
        mean over the segments as probable as the other attributes make them.
        """
        chances = np.zeros(len(impressions))
        by_category = {
            category: self.world.segment_chances(category, self._known) for category in self.world.categories
        }
        for product in range(self.n_products):
            of_product = impressions.products == product
            segments = by_category[self.world.product_categories[product]][impressions.users[of_product]]  # (b, S)
            column = impressions.creatives[of_product] - self.creative_numbers[product][0]
            chances[of_product] = (segments * self.segment_ctrs(product).T[column]).sum(axis=1)
        return chances
