"""Control images: what a ControlNet is shown of the product, as edges or as a picture with a hole."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from generator.composition import Bytes, Placement

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

SOLID_ALPHA: Final = 128
"""Alpha from which a pixel counts as the product's."""

_BLUR_PX: Final = 1.2
_STEEPEST: Final = 0.284  # of a unit step that is blurred so: its greatest gradient, per pixel
_WEAK, _STRONG = 0.10 * _STEEPEST, 0.20 * _STEEPEST
"""Gradients of steps in luminance of a tenth and a fifth: the latter are edges, the former where they touch one.

They are what OpenCV's thresholds of 100 and 200 mean, with which the edge ControlNets' training pictures were made.
"""


def edges(placement: Placement, size_px: int) -> Mask:
    """Find the product's edges, its outline and those within, as a mask (size_px, size_px) of thin lines.

    This is Canny's detector, which the edge ControlNets were trained with. It runs on the alpha and on the
    luminance, the latter continued outwards with the product's mean, so that the outline is found once.
    """
    box, pixels = placement.box, placement.pixels.astype(np.float32) / np.float32(255)
    alpha = pixels[..., 3]  # (h, w)
    luminance = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    mean = float((luminance * alpha).sum() / max(float(alpha.sum()), 1e-6))
    filled = mean + (luminance - np.float32(mean)) * alpha
    # A border of empty ground, or the outline of a product that fills its box would not be one.
    border = 4
    outline = canny(np.pad(alpha, border))
    inner = canny(np.pad(filled, border, constant_values=mean))
    found = np.zeros((size_px + 2 * border, size_px + 2 * border), dtype=np.bool_)
    found[box.top : box.bottom + 2 * border, box.left : box.right + 2 * border] = outline | inner
    return found[border:-border, border:-border]


def canny(tone: Floats) -> Mask:
    """Find edges in a picture (H, W) of tones 0 to 1: gradients that are locally greatest and strong enough.

    J. Canny, "A Computational Approach to Edge Detection", 1986.
    """
    smooth = ndimage.gaussian_filter(tone, _BLUR_PX)
    down, right = np.gradient(smooth)
    strength = np.hypot(down, right)
    # Along the gradient's direction, in steps of 45 degrees, an edge is no weaker than both its neighbours.
    sector = np.rint(np.arctan2(down, right) * np.float32(4 / np.pi)).astype(np.int64) % 4  # (H, W)
    padded = np.pad(strength, 1)
    height, width = tone.shape
    thin = np.zeros(tone.shape, dtype=np.bool_)
    for number, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        behind = padded[1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
        # One of two equal neighbours counts: a step between two pixels is one line.
        thin |= (sector == number) & (strength > ahead) & (strength >= behind)
    weak = thin & (strength > _WEAK)
    lines, n_lines = ndimage.label(weak, structure=np.ones((3, 3)))
    is_edge = np.zeros(n_lines + 1, dtype=np.bool_)
    is_edge[lines[weak & (strength > _STRONG)]] = True
    is_edge[0] = False
    found: Mask = is_edge[lines]
    return found


def edge_image(placement: Placement, size_px: int) -> Floats:
    """Return the control image of an edge ControlNet: white lines on black, (3, size_px, size_px), 0 to 1."""
    return np.repeat(edges(placement, size_px)[None].astype(np.float32), 3, axis=0)


def masked_image(picture: Floats, repainted: Mask) -> Floats:
    """Return the control image of ControlNet-Inpaint: the picture, and -1 where it is to be painted.

    ``picture`` is (3, H, W), 0 to 1; ``repainted`` is (H, W).
    """
    return np.where(repainted[None], np.float32(-1), picture)


def repainted_mask(alpha: Bytes, cell_px: int) -> Mask:
    """Return where the picture is painted anew, (H, W): in every cell that is not wholly the product's.

    A cell that is half ground would otherwise keep the ground's neutral grey, which shows as a halo. ``alpha`` is
    (H, W), its sides multiples of ``cell_px``; with 1 the product is kept to the pixel.
    """
    height, width = alpha.shape
    solid = (alpha >= SOLID_ALPHA).reshape(height // cell_px, cell_px, width // cell_px, cell_px)
    kept = solid.all(axis=(1, 3))  # (H / cell, W / cell)
    mask: Mask = ~np.repeat(np.repeat(kept, cell_px, axis=0), cell_px, axis=1)
    return mask
