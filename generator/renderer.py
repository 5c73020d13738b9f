"""Renderers: the protocol that turns a cut-out, a prompt and a seed into a picture, and its provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

from generator.composition import Box, Bytes


def prompt_sha256(prompt: str) -> str:
    """Return the SHA-256 of a prompt's text (UTF-8), in hexadecimal."""
    return hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()


class UnusableSize(ValueError):
    """A picture size or a seed outside what can be drawn."""

    def __init__(self, name: str, value: int, allowed: str) -> None:
        super().__init__(f"{name} {value} cannot be used; allowed: {allowed}. Nothing was rendered.")


class RendererUnavailable(RuntimeError):
    """A renderer that cannot be had on this machine, or not with these settings."""


@dataclass(frozen=True, eq=False)
class RenderRequest:
    """One picture that is wanted.

    Parameters
    ----------
    cutout:
        The product, RGBA with a transparent ground; a picture without transparency is used as it is.
    prompt:
        What to draw around it, as text.
    seed:
        Decides everything that the prompt leaves open; at least 0.
    """

    cutout: Image.Image
    prompt: str
    seed: int


@dataclass(frozen=True)
class Provenance:
    """How a picture was made: enough to make it again.

    ``cutout_sha256`` is of the cut-out's RGBA pixels. ``had_alpha`` is false when the product came without a
    transparent ground and stands in the picture as the rectangle it was.
    ``digital_source_type`` is the IPTC term that says how far a machine made the picture.
    """

    renderer: str
    version: str
    prompt: str
    prompt_sha256: str
    seed: int
    size_px: int
    cutout_sha256: str
    had_alpha: bool
    digital_source_type: str

    @classmethod
    def of(
        cls, renderer: Renderer, request: RenderRequest, *, size_px: int, had_alpha: bool, digital_source_type: str
    ) -> Provenance:
        """Write down how a renderer answers a request."""
        rgba = request.cutout.convert("RGBA")
        return cls(
            renderer=renderer.name,
            version=renderer.version,
            prompt=request.prompt,
            prompt_sha256=prompt_sha256(request.prompt),
            seed=request.seed,
            size_px=size_px,
            cutout_sha256=hashlib.sha256(rgba.tobytes() + repr(rgba.size).encode()).hexdigest(),
            had_alpha=had_alpha,
            digital_source_type=digital_source_type,
        )


@dataclass(frozen=True, eq=False)
class Rendering:
    """A rendered creative.

    Parameters
    ----------
    image:
        The picture, RGB, ``size_px`` squared.
    provenance:
        How it was made.
    product_box:
        Where the product stands.
    product_pixels:
        The scaled cut-out as it was pasted, RGBA, shape of the box.
    flagged:
        Why the renderer's own safety checker refuses the picture; None when it found nothing, or there is none.
    """

    image: Image.Image
    provenance: Provenance
    product_box: Box
    product_pixels: Bytes
    flagged: str | None = None


@runtime_checkable
class Renderer(Protocol):
    """Draws an advertising picture around a product.

    The same arguments give the same pixels. The product's opaque pixels are kept exactly.
    """

    @property
    def name(self) -> str:
        """The renderer's name, such as ``procedural``."""
        ...

    @property
    def version(self) -> str:
        """The version of what decides the pixels: code or weights."""
        ...

    def render(self, cutout: Image.Image, prompt: str, *, seed: int, size_px: int) -> Rendering:
        """Render one picture, square, of ``size_px`` pixels a side; see :class:`RenderRequest`.

        Raises
        ------
        generator.prompt.PromptNotUnderstood
            When the prompt is empty.
        generator.composition.EmptyCutout
            When the cut-out shows nothing.
        UnusableSize
            When the size or the seed cannot be used.
        """
        ...

    def render_many(self, requests: Sequence[RenderRequest], *, size_px: int) -> list[Rendering]:
        """Render pictures in the order of their requests, together where that is quicker.

        A picture is the one that :meth:`render` gives, whatever else is asked for with it: bit for bit where
        pictures are drawn one by one, and within rounding where they share a batch on a device.

        Raises
        ------
        ValueError
            As :meth:`render`, before anything is drawn.
        """
        ...
