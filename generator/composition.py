"""Composition: where a product's cut-out stands in the picture, and how it is pasted there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Bytes = npt.NDArray[np.uint8]

MIN_ALPHA: Final = 8
"""Alpha below this counts as nothing: renderers leave dust of 1 to 5 around cut-outs."""


class Box(NamedTuple):
    """A rectangle in pixels: ``left`` and ``top`` inside, ``right`` and ``bottom`` outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width_px(self) -> int:
        """Width in pixels."""
        return self.right - self.left

    @property
    def height_px(self) -> int:
        """Height in pixels."""
        return self.bottom - self.top


class EmptyCutout(ValueError):
    """A cut-out in which every pixel is transparent, or that has no pixel."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(
            f"the cut-out of {size[0]} x {size[1]} px has no pixel with an alpha of at least {MIN_ALPHA}; "
            "a product needs one visible pixel. Nothing was rendered."
        )


@dataclass(frozen=True)
class Layout:
    """The rules of one composition, as shares of the picture's side.

    ``centre_x`` is where the product's middle wants to be, ``baseline_y`` where its lowest pixel stands,
    ``max_width`` and ``max_height`` bound its size, ``horizon_y`` is the eye's height in the scene behind,
    ``depth_blur`` scales the background's blur.
    """

    centre_x: float
    baseline_y: float
    max_width: float
    max_height: float
    horizon_y: float
    depth_blur: float


LAYOUTS: Final[dict[str, Layout]] = {
    "centred": Layout(0.50, 0.855, 0.60, 0.56, 0.60, 1.0),
    "left third": Layout(0.34, 0.865, 0.50, 0.52, 0.57, 0.9),
    "right third": Layout(0.66, 0.865, 0.50, 0.52, 0.57, 0.9),
    "close-up": Layout(0.50, 0.920, 0.84, 0.76, 0.66, 1.9),
}
"""Layout by slot word."""

MARGIN: Final = 0.04
"""Free share of the side at every edge; a product never comes closer."""


@dataclass(frozen=True)
class Placement:
    """A cut-out scaled and set down: its pixels, where they lie, and whether it had a transparent ground.

    ``pixels`` is RGBA, shape (height, width, 4); ``box`` its place in the picture.
    """

    pixels: Bytes
    box: Box
    had_alpha: bool


def has_alpha(picture: Image.Image) -> bool:
    """Return whether any pixel of a picture is transparent, wholly or in part."""
    return bool(picture.convert("RGBA").getchannel("A").getextrema()[0] < 255)  # type: ignore[operator]  # one band


def trim(cutout: Image.Image) -> tuple[Image.Image, bool]:
    """Cut a picture down to its visible pixels, in mode RGBA; the flag says whether any pixel was transparent.

    Raises
    ------
    EmptyCutout
        When nothing is visible.
    """
    rgba = cutout.convert("RGBA")
    alpha = rgba.getchannel("A")
    visible = alpha.point([0] * MIN_ALPHA + [255] * (256 - MIN_ALPHA))
    box = visible.getbbox()
    if box is None:
        raise EmptyCutout(rgba.size)
    return rgba.crop(box), has_alpha(rgba)


def place(cutout: Image.Image, layout: Layout, size_px: int) -> Placement:
    """Scale a cut-out to the layout's bounds (LANCZOS) and set it on the baseline, uncropped.

    A picture without transparency is used as it is, as a rectangle; ``had_alpha`` records that.
    """
    product, had_alpha = trim(cutout)
    scale = min(layout.max_width * size_px / product.width, layout.max_height * size_px / product.height)
    width = max(1, round(product.width * scale))
    height = max(1, round(product.height * scale))
    # Premultiplied while scaling, or colour hidden under transparent pixels bleeds into the edge.
    scaled = product.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    margin = round(MARGIN * size_px)
    left = min(max(round(layout.centre_x * size_px - width / 2), margin), size_px - margin - width)
    bottom = min(round(layout.baseline_y * size_px), size_px - margin)
    top = max(bottom - height, 0)
    pixels = np.asarray(scaled).copy()
    pixels[pixels[..., 3] < MIN_ALPHA] = 0
    return Placement(pixels, Box(left, top, left + width, top + height), had_alpha)


def paste(background: Bytes, placement: Placement) -> Bytes:
    """Lay the product over a background, shape (H, W, 3); opaque pixels are copied bit for bit."""
    box = placement.box
    picture = background.copy()
    under = picture[box.top : box.bottom, box.left : box.right].astype(np.float32)
    colour = placement.pixels[..., :3].astype(np.float32)
    alpha = placement.pixels[..., 3:].astype(np.float32) / 255.0
    mixed = np.rint(under + (colour - under) * alpha).astype(np.uint8)
    picture[box.top : box.bottom, box.left : box.right] = mixed
    return picture


def full_mask(placement: Placement, size_px: int) -> Bytes:
    """Return the product's alpha in the whole picture, shape (size_px, size_px)."""
    mask = np.zeros((size_px, size_px), dtype=np.uint8)
    box = placement.box
    mask[box.top : box.bottom, box.left : box.right] = placement.pixels[..., 3]
    return mask
