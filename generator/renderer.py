"""Renderers: the protocol that turns a cut-out, a prompt and a seed into a picture, and its provenance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

from generator.composition import Box, Bytes


def prompt_sha256(prompt: str) -> str:
    """Return the SHA-256 of a prompt's text (UTF-8), in hexadecimal."""
    return hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()


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
    """

    image: Image.Image
    provenance: Provenance
    product_box: Box
    product_pixels: Bytes


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
        """Render one picture.

        Parameters
        ----------
        cutout:
            The product, RGBA with a transparent ground; a picture without transparency is used as it is.
        prompt:
            What to draw around it, as text.
        seed:
            Decides everything that the prompt leaves open; at least 0.
        size_px:
            Side of the square picture, in pixels.

        Raises
        ------
        generator.prompt.PromptNotUnderstood
            When the prompt is empty.
        generator.composition.EmptyCutout
            When the cut-out shows nothing.
        """
        ...
