"""The products' first creatives: prompts on which the segments disagree, rendered once and then cached."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from generator.prompt import VOCABULARY, Prompt
from simulator.world import style_of
from streams.events import Creative

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from generator.renderer import Renderer
    from simulator.catalogue import CatalogueProduct
    from simulator.settings import CatalogueSettings
    from simulator.world import World

N_CANDIDATE_SETS: Final = 60
"""Sets of prompts drawn for a product; the one on which its segments disagree most is taken."""

_MAX_GAIN: Final = 1.9  # expected CTR of the best per segment over uniform: above it, the game would be too easy


@dataclass(frozen=True)
class CatalogueCreative:
    """A creative that a product starts with: its prompt, style, shape (8,), and rendered picture."""

    creative_id: str
    product_id: str
    prompt: Prompt
    style: NDArray[np.float64]
    image_path: Path
    image_sha256: str

    def event(self, created_at_ms: int) -> Creative:
        """Return the event that announces this creative."""
        return Creative(
            creative_id=self.creative_id,
            product_id=self.product_id,
            created_at_ms=created_at_ms,
            image_uri=self.image_path.resolve().as_uri(),
            image_sha256=self.image_sha256,
            prompt=self.prompt.text,
            origin="catalogue",
        )


def choose_prompts(
    world: World, titles: Sequence[str], settings: CatalogueSettings, rng: np.random.Generator
) -> list[list[Prompt]]:
    """Choose every product's prompts, ``min_creatives`` to ``max_creatives`` of them.

    Within a product all scenes differ, as far as there are enough. Of :data:`N_CANDIDATE_SETS` random sets the one is
    taken where knowing the segments gains most over the best creative for all, by the world's mean tastes.
    """
    chosen = []
    for product, title in enumerate(titles):
        directions, shares = world.segment_directions(product)
        n_creatives = int(rng.integers(settings.min_creatives, settings.max_creatives + 1))
        best: tuple[float, list[Prompt]] = (-np.inf, [])
        for _ in range(N_CANDIDATE_SETS):
            prompts = draw_prompts(title, n_creatives, rng)
            styles = np.stack([style_of(prompt) for prompt in prompts])
            odds = np.exp(styles @ directions.T)  # (n_creatives, S): clicks are rare, so odds are chances
            per_segment = float(odds.max(axis=0) @ shares)
            for_all = float((odds @ shares).max())
            uniform = float((odds @ shares).mean())
            n_best = len(set(odds.argmax(axis=0)))
            score = per_segment / for_all - max(0.0, per_segment / uniform - _MAX_GAIN) + 0.05 * n_best
            if score > best[0]:
                best = (score, prompts)
        chosen.append(best[1])
    return chosen


def make_creatives(
    products: Sequence[CatalogueProduct],
    prompts: Sequence[Sequence[Prompt]],
    renderer: Renderer,
    *,
    size_px: int,
    cache_dir: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[CatalogueCreative]]:
    """Render the creatives of all products, or find them in the cache.

    A picture's file is named by a hash of everything that decides its pixels, so a cached one is never stale.
    ``on_progress`` is told how many are done, and of how many.
    """
    cache_dir = cache_dir.expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    n_all, n_done = sum(map(len, prompts)), 0
    creatives: list[list[CatalogueCreative]] = []
    for product, product_prompts in zip(products, prompts, strict=True):
        cutout_bytes = product.cutout_path.read_bytes()
        of_product = []
        for place, prompt in enumerate(product_prompts):
            path = cache_dir / f"{_render_key(renderer, prompt, place, size_px, cutout_bytes)}.png"
            if not path.is_file():
                with Image.open(product.cutout_path) as cutout:
                    rendering = renderer.render(cutout.convert("RGBA"), prompt.text, seed=place, size_px=size_px)
                _save(rendering.image, path)
            of_product.append(
                CatalogueCreative(
                    creative_id=f"{product.product_id}-c{place:02d}",
                    product_id=product.product_id,
                    prompt=prompt,
                    style=style_of(prompt),
                    image_path=path,
                    image_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                )
            )
            n_done += 1
            if on_progress is not None:
                on_progress(n_done, n_all)
        creatives.append(of_product)
    return creatives


def draw_prompts(title: str, n_prompts: int, rng: np.random.Generator) -> list[Prompt]:
    """Draw prompts that differ as far as their number allows: a slot repeats no word before all were used."""
    words: dict[str, list[str]] = {}
    for slot, vocabulary in VOCABULARY.items():
        rounds = [rng.permutation(len(vocabulary)) for _ in range(-(-n_prompts // len(vocabulary)))]
        words[slot] = [vocabulary[i] for i in np.concatenate(rounds)[:n_prompts]]
    return [
        Prompt(
            caption=title,
            scene=words["scene"][i],
            palette=words["palette"][i],
            light=words["light"][i],
            prop=words["prop"][i],
            composition=words["composition"][i],
        )
        for i in range(n_prompts)
    ]


def _render_key(renderer: Renderer, prompt: Prompt, seed: int, size_px: int, cutout_bytes: bytes) -> str:
    digest = hashlib.sha256(f"{renderer.name}\0{renderer.version}\0{prompt.text}\0{seed}\0{size_px}\0".encode())
    digest.update(cutout_bytes)
    return digest.hexdigest()[:40]


def _save(image: Image.Image, path: Path) -> None:
    """Write a picture in one step: a reader never sees half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as scratch:
        try:
            image.save(scratch, format="PNG")
        except BaseException:
            os.unlink(scratch.name)
            raise
    os.chmod(scratch.name, 0o644)
    os.replace(scratch.name, path)
