"""The procedural renderer: draws a prompt's scene on the CPU, with NumPy and Pillow, in a tenth of a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from PIL import Image

from generator.composition import LAYOUTS, Placement, paste, place
from generator.palette import LIGHTS, PALETTES
from generator.prompt import Prompt
from generator.renderer import Provenance, Rendering, RenderRequest, UnusableSize, prompt_sha256
from generator.scene import Painter, Stage
from generator.scene_interiors import cosy_living_room, marble_podium
from generator.scene_light import grade, ground_product, light_scene
from generator.scene_nature import desert_dunes, flower_meadow, misty_mountains, pine_forest, sunlit_beach
from generator.scene_places import bokeh_lights, city_street_at_night, modern_kitchen, photo_studio, sports_field
from generator.scene_props import DRESSERS

PAINTERS: Final[dict[str, Painter]] = {
    "misty mountains": misty_mountains,
    "sunlit beach": sunlit_beach,
    "city street at night": city_street_at_night,
    "pine forest": pine_forest,
    "modern kitchen": modern_kitchen,
    "photo studio": photo_studio,
    "sports field": sports_field,
    "desert dunes": desert_dunes,
    "cosy living room": cosy_living_room,
    "flower meadow": flower_meadow,
    "marble podium": marble_podium,
    "bokeh lights": bokeh_lights,
}
"""Painter by slot word."""

_SWAY: Final = 0.035  # the camera looks a little higher or lower, by the seed: a share of the side
MIN_SIZE_PX: Final = 64
MAX_SIZE_PX: Final = 4096

_SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeSynthetic"


class ProceduralRenderer:
    """Draws the background from the prompt's slot words and sets the product into it (:class:`Renderer`).

    The picture depends on the prompt's text, the seed, the size and the cut-out alone. The product's
    opaque pixels are those of the scaled cut-out, bit for bit.
    """

    name: Final = "procedural"
    version: Final = "2"

    def render(self, cutout: Image.Image, prompt: str, *, seed: int, size_px: int = 512) -> Rendering:
        """Render one picture; see :meth:`generator.renderer.Renderer.render`.

        Sizes from 64 to 4096 can be drawn.
        """
        return self.render_many([RenderRequest(cutout, prompt, seed)], size_px=size_px)[0]

    def render_many(self, requests: Sequence[RenderRequest], *, size_px: int = 512) -> list[Rendering]:
        """Render pictures one after another; see :meth:`generator.renderer.Renderer.render_many`."""
        ready = [(request, *self._read(request, size_px)) for request in requests]
        return [self._draw(request, read, placement, size_px) for request, read, placement in ready]

    def _read(self, request: RenderRequest, size_px: int) -> tuple[Prompt, Placement]:
        """Do everything that can be refused: check the numbers, read the prompt, place the product."""
        if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
            raise UnusableSize("size_px", size_px, f"{MIN_SIZE_PX} to {MAX_SIZE_PX}")
        if request.seed < 0:
            raise UnusableSize("seed", request.seed, "0 and more")
        read = Prompt.parse(request.prompt)
        return read, place(request.cutout, LAYOUTS[read.composition], size_px)

    def _draw(self, request: RenderRequest, read: Prompt, placement: Placement, size_px: int) -> Rendering:
        digest = prompt_sha256(request.prompt)
        rng = np.random.Generator(np.random.PCG64([request.seed, int(digest[:16], 16)]))
        layout = LAYOUTS[read.composition]
        stage = Stage(
            size_px=size_px,
            palette=PALETTES[read.palette],
            light=LIGHTS[read.light],
            layout=replace(layout, horizon_y=layout.horizon_y + float(rng.uniform(-_SWAY, _SWAY))),
            product=placement.box,
            side=-1 if rng.random() < 0.5 else 1,
            rng=rng,
        )
        backdrop = PAINTERS[read.scene](stage)
        canvas = np.ascontiguousarray(backdrop.canvas, dtype=np.float32)
        DRESSERS[read.prop](stage, canvas)
        light_scene(stage, canvas)
        ground_product(stage, canvas, placement, backdrop.gloss)
        picture = paste(grade(stage, canvas), placement)
        provenance = Provenance.of(
            self, request, size_px=size_px, had_alpha=placement.had_alpha, digital_source_type=_SOURCE_TYPE
        )
        return Rendering(Image.fromarray(picture), provenance, placement.box, placement.pixels)
