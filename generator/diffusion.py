"""The diffusion renderer: Stable Diffusion paints the background, the product's pixels stay as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from generator.composition import LAYOUTS, Placement, full_mask, paste, place
from generator.control_image import Floats, Mask, edge_image, masked_image, repainted_mask
from generator.diffusion_pipeline import Pipeline, open_pipeline, tune_pipeline, weights_sha256
from generator.prompt import Prompt
from generator.renderer import Provenance, Rendering, RenderRequest, UnusableSize
from generator.settings import LATENT_PX, DiffusionSettings

MIN_SIZE_PX: Final = 64
MAX_SIZE_PX: Final = 4096
MAX_SEED: Final = 2**63 - 1

_CODE_VERSION: Final = "1"
_SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
_GROUND: Final = np.float32(0.5)  # what stands where nothing is painted yet: zero, to the VAE
_DECIDING_SETTINGS: Final = {"control", "control_scale", "n_steps", "guidance_scale", "negative_prompt"}


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A request, ready to be painted: ``picture`` and ``control`` are (3, H, W), ``repainted`` is (H, W)."""

    request: RenderRequest
    placement: Placement
    picture: Floats
    repainted: Mask
    control: Floats


class DiffusionRenderer:
    """Paints the background with Stable Diffusion and ControlNet-Inpaint (section 3.3; :class:`Renderer`).

    The product is placed as the prompt's composition says, the rest is painted from noise under the ControlNet's
    guidance, and the product is laid over it again: its opaque pixels are those of the scaled cut-out, bit for bit.
    Every picture has its own random generator, on the CPU, so that its noise depends on its seed alone.

    Parameters
    ----------
    pipeline
        The pipeline, on its device.
    settings
        How it is run.
    size_px
        Usual side of a picture: what the memory is reckoned for.
    """

    name: Final = "diffusion"

    def __init__(self, pipeline: Pipeline, settings: DiffusionSettings, *, size_px: int = 512) -> None:
        self.pipeline = pipeline
        self._settings = settings
        self._version = _version(pipeline, settings)
        self._step_px = max(LATENT_PX, pipeline.vae_scale_factor)
        # A text-to-image UNet is handed the product's latents cell by cell; an inpainting UNet sees its pixels.
        self._cell_px = pipeline.vae_scale_factor if pipeline.unet.config.in_channels == 4 else 1
        tune_pipeline(pipeline, settings, size_px)

    @classmethod
    def load(cls, settings: DiffusionSettings, *, size_px: int = 512) -> DiffusionRenderer:
        """Load the pipeline that the settings name; see :func:`generator.diffusion_pipeline.open_pipeline`."""
        return cls(open_pipeline(settings), settings, size_px=size_px)

    @property
    def version(self) -> str:
        """The code's version, the weights' digest and the digest of the settings that decide the pixels."""
        return self._version

    def render(self, cutout: Image.Image, prompt: str, *, seed: int, size_px: int = 512) -> Rendering:
        """Render one picture; see :meth:`generator.renderer.Renderer.render`.

        Sizes from 64 to 4096 that are divisible by 8 can be painted.
        """
        return self.render_many([RenderRequest(cutout, prompt, seed)], size_px=size_px)[0]

    def render_many(self, requests: Sequence[RenderRequest], *, size_px: int = 512) -> list[Rendering]:
        """Render pictures in batches; see :meth:`generator.renderer.Renderer.render_many`."""
        ready = [self._prepare(request, size_px) for request in requests]
        n = self._settings.batch_size
        return [rendering for i in range(0, len(ready), n) for rendering in self._paint(ready[i : i + n], size_px)]

    def _prepare(self, request: RenderRequest, size_px: int) -> _Prepared:
        """Do everything that can be refused, and make the pipeline's inputs."""
        if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX or size_px % self._step_px:
            raise UnusableSize("size_px", size_px, f"{MIN_SIZE_PX} to {MAX_SIZE_PX}, divisible by {self._step_px}")
        if not 0 <= request.seed <= MAX_SEED:
            raise UnusableSize("seed", request.seed, f"0 to {MAX_SEED}")
        layout = LAYOUTS[Prompt.parse(request.prompt).composition]
        placement = place(request.cutout, layout, size_px)
        ground = np.full((size_px, size_px, 3), round(float(_GROUND) * 255), dtype=np.uint8)
        picture = paste(ground, placement).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        alpha = full_mask(placement, size_px)
        if self._settings.control == "edges":
            control = edge_image(placement, size_px)
        else:
            control = masked_image(picture, repainted_mask(alpha, 1))
        return _Prepared(request, placement, picture, repainted_mask(alpha, self._cell_px), control)

    def _paint(self, ready: Sequence[_Prepared], size_px: int) -> list[Rendering]:
        settings = self._settings
        painted = self.pipeline(
            prompt=[one.request.prompt for one in ready],
            negative_prompt=[settings.negative_prompt] * len(ready),
            image=_batch([one.picture for one in ready]),  # (B, 3, H, W)
            mask_image=_batch([one.repainted[None].astype(np.float32) for one in ready]),  # (B, 1, H, W)
            control_image=_batch([one.control for one in ready]),  # (B, 3, H, W)
            height=size_px,
            width=size_px,
            strength=1.0,  # from noise alone: the neutral ground must not shine through
            num_inference_steps=settings.n_steps,
            guidance_scale=settings.guidance_scale,
            controlnet_conditioning_scale=settings.control_scale,
            generator=[torch.Generator("cpu").manual_seed(one.request.seed) for one in ready],
            output_type="np",
        )
        backgrounds = np.rint(painted.images * 255).astype(np.uint8)  # (B, H, W, 3)
        flags = painted.nsfw_content_detected or [False] * len(ready)
        return [
            self._rendering(one, background, bool(flag), size_px)
            for one, background, flag in zip(ready, backgrounds, flags, strict=True)
        ]

    def _rendering(self, one: _Prepared, background: Any, flagged: bool, size_px: int) -> Rendering:
        placement = one.placement
        provenance = Provenance.of(
            self, one.request, size_px=size_px, had_alpha=placement.had_alpha, digital_source_type=_SOURCE_TYPE
        )
        picture = Image.fromarray(paste(background, placement))
        why = "the pipeline's safety checker found the painted picture unsafe and blackened it" if flagged else None
        return Rendering(picture, provenance, placement.box, placement.pixels, why)


def _batch(arrays: Sequence[Floats]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))


def _version(pipeline: Pipeline, settings: DiffusionSettings) -> str:
    deciding = {
        **settings.model_dump(include=_DECIDING_SETTINGS),
        "scheduler": {key: repr(value) for key, value in pipeline.scheduler.config.items() if not key.startswith("_")},
        "scheduler_kind": type(pipeline.scheduler).__name__,
        "device": pipeline.device.type,  # devices round differently
    }
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    return f"{_CODE_VERSION}+weights.{weights_sha256(pipeline)[:16]}.settings.{digest[:8]}"
