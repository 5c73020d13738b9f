"""The procedural renderer: deterministic, different between prompts, and exact on the product."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from generator.composition import LAYOUTS, MARGIN
from generator.palette import LIGHTS, PALETTES
from generator.procedural import PAINTERS, ProceduralRenderer
from generator.prompt import VOCABULARY, Prompt
from generator.scene_props import DRESSERS

BASE = {
    "caption": "toy robot",
    "scene": "photo studio",
    "palette": "cool",
    "light": "soft daylight",
    "prop": "no props",
    "composition": "centred",
}
RENDERER = ProceduralRenderer()


def cutout(width: int = 120, height: int = 160) -> Image.Image:
    """Return a product with a body, two legs and soft edges, on a transparent ground."""
    image = Image.new("RGBA", (width * 2, height * 2), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((40, 30, width * 2 - 40, height * 2 - 90), 20, fill=(200, 60, 40, 255))
    draw.rectangle((60, height * 2 - 90, 84, height * 2 - 20), fill=(40, 40, 60, 255))
    draw.rectangle((width * 2 - 84, height * 2 - 90, width * 2 - 60, height * 2 - 20), fill=(40, 40, 60, 255))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def prompt(**slots: str) -> str:
    """Return a prompt's text, with some slots changed."""
    return Prompt(**{**BASE, **slots}).text


def pixels(text: str, seed: int = 3, size_px: int = 128) -> np.ndarray:
    """Return the rendered pixels."""
    return np.asarray(RENDERER.render(cutout(), text, seed=seed, size_px=size_px).image)


def test_every_word_has_a_meaning() -> None:
    assert set(PAINTERS) == set(VOCABULARY["scene"])
    assert set(PALETTES) == set(VOCABULARY["palette"])
    assert set(LIGHTS) == set(VOCABULARY["light"])
    assert set(DRESSERS) == set(VOCABULARY["prop"])
    assert set(LAYOUTS) == set(VOCABULARY["composition"])


@pytest.mark.parametrize(("slot", "word"), [(slot, word) for slot, words in VOCABULARY.items() for word in words])
def test_every_word_renders_the_same_twice(slot: str, word: str) -> None:
    text = prompt(**{slot: word})
    first = RENDERER.render(cutout(), text, seed=5, size_px=128)
    again = RENDERER.render(cutout(), text, seed=5, size_px=128)
    assert first.image.mode == "RGB"
    assert first.image.size == (128, 128)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.provenance == again.provenance
    assert np.asarray(first.image).std() > 12


@pytest.mark.parametrize("slot", VOCABULARY)
def test_words_of_a_slot_look_different(slot: str) -> None:
    small = {}
    for word in VOCABULARY[slot]:
        image = RENDERER.render(cutout(), prompt(**{slot: word}), seed=1, size_px=192).image
        small[word] = np.asarray(image.resize((24, 24), Image.Resampling.BOX), dtype=np.int16)
    for one, other in itertools.combinations(VOCABULARY[slot], 2):
        assert np.abs(small[one] - small[other]).mean() > 10, (one, other)


def test_scenes_differ_by_many_levels() -> None:
    images = {scene: pixels(prompt(scene=scene)).astype(np.int16) for scene in VOCABULARY["scene"]}
    for one, other in itertools.combinations(images, 2):
        assert np.abs(images[one] - images[other]).mean() > 12, (one, other)


def test_seed_and_caption_change_the_picture() -> None:
    text = prompt(scene="misty mountains")
    assert (pixels(text, seed=1) != pixels(text, seed=2)).any()
    assert (pixels(text) != pixels(prompt(scene="misty mountains", caption="another"))).any()


@pytest.mark.parametrize("composition", VOCABULARY["composition"])
@pytest.mark.parametrize("shape", [(40, 200), (220, 30), (90, 90)])
def test_products_keep_their_shape_and_a_margin(composition: str, shape: tuple[int, int]) -> None:
    size_px = 160
    source = Image.new("RGBA", (shape[0] + 6, shape[1] + 6), (0, 0, 0, 0))
    noise = np.random.default_rng(1).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    source.paste(Image.fromarray(noise), (3, 3))
    rendering = RENDERER.render(source, prompt(composition=composition), seed=2, size_px=size_px)
    box = rendering.product_box
    margin = round(MARGIN * size_px)
    assert min(box.left, size_px - box.right, size_px - box.bottom) >= margin
    assert box.top >= 0
    assert abs(box.width_px / box.height_px / (shape[0] / shape[1]) - 1) < 0.2


def test_compositions_put_the_product_where_they_say() -> None:
    middles = {}
    for composition in VOCABULARY["composition"]:
        box = RENDERER.render(cutout(), prompt(composition=composition), seed=0, size_px=200).product_box
        middles[composition] = ((box.left + box.right) / 2, box.height_px)
    assert middles["left third"][0] < 80 < middles["centred"][0] < 120 < middles["right third"][0]
    assert middles["close-up"][1] > 1.2 * middles["centred"][1]


def test_the_floor_is_darker_under_the_product_than_beside_it() -> None:
    rendering = RENDERER.render(cutout(), prompt(), seed=0, size_px=256)
    tone = np.asarray(rendering.image.convert("L")).astype(float)
    box = rendering.product_box
    under = tone[box.bottom : box.bottom + 3, box.left + 10 : box.right - 10].mean()
    beside = tone[box.bottom : box.bottom + 3, : box.left - 30].mean()
    assert under < beside - 8
