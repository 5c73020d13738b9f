"""The stage: what a scene's painter is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from generator.composition import Box, Layout
from generator.palette import Floats, Light, Palette
from generator.scene_brush import blur, grid, resize


@dataclass(frozen=True, eq=False)
class Stage:
    """Everything that a painter may depend on.

    ``product`` is where the product will stand, so that a scene can put something under it.
    ``side`` is where the key light comes from: -1 left, 1 right.
    """

    size_px: int
    palette: Palette
    light: Light
    layout: Layout
    product: Box
    side: int
    rng: np.random.Generator

    @property
    def far_px(self) -> int:
        """Side of the canvas for what is far: half the picture's, for it is blurred anyway."""
        return max(16, self.size_px // 2)

    @property
    def horizon(self) -> float:
        """The horizon's height."""
        return self.layout.horizon_y

    @property
    def baseline(self) -> float:
        """Height of the product's lowest pixel, as a share of the side."""
        return self.product.bottom / self.size_px

    @property
    def focus_x(self) -> float:
        """The product's middle, as a share of the side."""
        return (self.product.left + self.product.right) / 2 / self.size_px

    def far_grid(self) -> tuple[Floats, Floats]:
        """Return y (H, 1) and x (1, W) of the far canvas."""
        return grid(self.far_px, self.far_px)

    def near_grid(self) -> tuple[Floats, Floats]:
        """Return y (H, 1) and x (1, W) of the whole picture."""
        return grid(self.size_px, self.size_px)

    def defocus(self, far: Floats, sigma: float) -> Floats:
        """Blur the far canvas as the layout's lens does and scale it up; ``sigma`` is a share of the side."""
        blurred = blur(far, sigma * self.layout.depth_blur * self.far_px)
        return np.clip(resize(blurred, self.size_px, self.size_px), 0, 1)


@dataclass(frozen=True, eq=False)
class Backdrop:
    """A painted scene: the picture without the product, (H, W, 3), and how much its floor mirrors (0 to 1)."""

    canvas: Floats
    gloss: float = 0.0


Painter = Callable[[Stage], Backdrop]
"""Paints one scene."""
