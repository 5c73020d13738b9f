"""The choice of a renderer: from the settings to the one that draws."""

from __future__ import annotations

from generator.procedural import ProceduralRenderer
from generator.renderer import Renderer
from generator.settings import GeneratorSettings


def choose_renderer(settings: GeneratorSettings) -> Renderer:
    """Make the renderer that the settings name; the diffusion renderer's weights are loaded here.

    Raises
    ------
    generator.renderer.RendererUnavailable
        diffusers is not installed, a pipeline or ControlNet is missing, unreadable or of the wrong kind, or the
        named device is not there.
    """
    if settings.renderer == "procedural":
        return ProceduralRenderer()
    from generator.diffusion import DiffusionRenderer  # brings torch and diffusers with it

    return DiffusionRenderer.load(settings.diffusion, size_px=settings.size_px)
