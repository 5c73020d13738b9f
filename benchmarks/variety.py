"""Benchmark of variety: how far apart a product's creatives are when only their prompts differ.

Distances are cosine distances (0 to 2) of what pictures show: the average over the grid of EfficientNet-Lite0's last
layer.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.measured import Measured
from generator.procedural import ProceduralRenderer
from generator.renderer import Renderer
from online.encoders import IMAGE_TOKENS, EfficientNetEncoder, ImageEncoder
from simulator.creatives import draw_prompts
from simulator.settings import SimulatorSettings
from simulator.stage import set_stage

N_PROMPTS: Final = 20
N_PRODUCTS: Final = 12
N_QUICK_PRODUCTS: Final = 1
SIZE_PX: Final = 512

Floats = npt.NDArray[np.float64]


def bench_variety(simulator: SimulatorSettings, *, quick: bool) -> Measured:
    """Compare the pictures of 20 prompts with the catalogue's own creatives of the same product.

    Metrics: ``prompt_distance`` and ``catalogue_distance``, the median distance between two pictures of a product,
    as the mean over products; ``prompt_above_share``, the share of the products in which the former is greater.
    """
    settings = simulator.model_copy(update={"cache_dir": simulator.cache_dir.expanduser()})
    renderer, encoder = ProceduralRenderer(), EfficientNetEncoder(tokens=True)
    stage = set_stage(settings, renderer)
    wanted = min(N_QUICK_PRODUCTS if quick else N_PRODUCTS, len(stage.products))
    chosen = np.linspace(0, len(stage.products) - 1, wanted).astype(int)
    of_prompts, of_catalogue, titles = [], [], []
    for number in chosen:
        product, creatives = stage.products[number], stage.creatives[number]
        with Image.open(product.cutout_path) as opened:
            cutout = opened.convert("RGBA")
        pictures = (creative.image_path.read_bytes() for creative in creatives)
        of_catalogue.append(median_distance(pictures, encoder))
        of_prompts.append(median_distance(_draw(renderer, cutout, product.title, int(number)), encoder))
        titles.append(product.title)
    return Measured(
        {
            "prompt_distance": float(np.mean(of_prompts)),
            "catalogue_distance": float(np.mean(of_catalogue)),
            "prompt_above_share": float(np.mean(np.array(of_prompts) > np.array(of_catalogue))),
            "variety_products": len(titles),
        },
        detail={
            "variety": {
                title: {"prompts": prompts, "catalogue": catalogue}
                for title, prompts, catalogue in zip(titles, of_prompts, of_catalogue, strict=True)
            }
        },
    )


def _draw(renderer: Renderer, cutout: Image.Image, title: str, number: int) -> Iterable[bytes]:
    """Render the pictures of a product's prompts one by one, as PNG files."""
    for seed, prompt in enumerate(draw_prompts(title, N_PROMPTS, np.random.default_rng(number))):
        file = io.BytesIO()
        renderer.render(cutout, prompt.text, seed=seed, size_px=SIZE_PX).image.save(file, "PNG", compress_level=1)
        yield file.getvalue()


def median_distance(pictures: Iterable[bytes], encoder: ImageEncoder) -> float:
    """Return the median cosine distance between two pictures, given as files, of which ``encoder`` keeps all tokens."""
    grids = np.stack([encoder.encode(picture, f"picture {i}") for i, picture in enumerate(pictures)])  # (N, T * D)
    features = grids.reshape(len(grids), IMAGE_TOKENS, -1).mean(axis=1)  # (N, D)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances: Floats = 1.0 - np.asarray(unit @ unit.T, np.float64)
    return float(np.median(distances[np.triu_indices(len(unit), 1)]))
