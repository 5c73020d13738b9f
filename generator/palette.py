"""Palettes and lights: what the slot words ``palette`` and ``light`` mean in colour and in shadow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
"""An array of float32; colours are RGB in display space (sRGB), 0 to 1."""


def rgb(code: str) -> Floats:
    """Return the colour of a hex code such as ``"f2c14e"``, shape (3,)."""
    return np.frombuffer(bytes.fromhex(code), dtype=np.uint8).astype(np.float32) / 255.0


@dataclass(frozen=True, eq=False)
class Palette:
    """A family of colours.

    ``ramp`` has five colours from dark to light, shape (5, 3). ``accents`` are for props and lights,
    shape (3, 3). ``hold`` is how far colours are pulled to the ramp: 0 keeps a scene's own, 1 leaves only the ramp's.
    ``key`` scales the brightness of the whole picture (neon is a night palette, pastel a day one).
    """

    ramp: Floats
    accents: Floats
    hold: float
    key: float

    def at(self, tone: float) -> Floats:
        """Return the ramp's colour at ``tone``, from 0 (dark) to 1 (light), shape (3,)."""
        place = min(max(tone, 0.0), 1.0) * (len(self.ramp) - 1)
        low = min(int(place), len(self.ramp) - 2)
        part = np.float32(place - low)
        colour: Floats = self.ramp[low] * (1 - part) + self.ramp[low + 1] * part
        return colour

    def tint(self, code: str, own: float = 0.6) -> Floats:
        """Return a natural colour drawn to the palette; ``own`` is the share of the colour's own hue that stays."""
        colour = rgb(code)
        tone = float(colour @ LUMINANCE)
        toward = self.at(tone)
        # Opposite hues mix to grey, so a colour keeps the less of its own the more it opposes the palette's.
        own_chroma, ramp_chroma = colour - tone, toward - float(toward @ LUMINANCE)
        length = float(np.linalg.norm(own_chroma) * np.linalg.norm(ramp_chroma))
        agreement = float(own_chroma @ ramp_chroma) / length if length > 1e-4 else 0.0
        keep = np.float32(own * (1.15 - self.hold * 0.55) * (0.68 + 0.32 * agreement) if self.hold < 1 else 0.0)
        tinted: Floats = colour * keep + toward * (1 - keep)
        return tinted

    def table(self) -> Floats:
        """Return the ramp as a look-up table over 256 tones, shape (256, 3)."""
        places = np.linspace(0, 1, len(self.ramp))
        tones = np.linspace(0, 1, 256)
        channels = [np.interp(tones, places, self.ramp[:, c]) for c in range(3)]
        return np.stack(channels, axis=1).astype(np.float32)


LUMINANCE: Final[Floats] = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
"""Weights of red, green and blue in the luminance (ITU-R BT.709), applied to display values."""


def _palette(ramp: str, accents: str, hold: float, key: float = 1.0) -> Palette:
    return Palette(
        ramp=np.stack([rgb(code) for code in ramp.split()]),
        accents=np.stack([rgb(code) for code in accents.split()]),
        hold=hold,
        key=key,
    )


PALETTES: Final[dict[str, Palette]] = {
    "warm": _palette("2a120e 843c22 d07f45 f3bf84 fff1da", "d8452b f4b942 8e2a36", 0.30),
    "cool": _palette("0b1829 1f456c 5590ba a6cfe6 eef7fc", "1c6dbb 5fc6d6 2b3f8c", 0.34),
    "pastel": _palette("75678c b09ac0 e3bccd f8ddd8 fff9f4", "f29db4 8fd3c8 f8cf8a", 0.42, 1.08),
    "neon": _palette("080516 2c1272 8e25c4 f24fbb d9fbff", "ff2b8f 19efe2 8a4dff", 0.58, 0.88),
    "monochrome": _palette("101214 3e4246 84888c c6c9cc f6f7f8", "26282b d9dbdd 8b8f93", 1.0),
    "earthy": _palette("211810 58432c 98784f cdb388 f4ead8", "a5522b 77803f 4d3423", 0.34),
    "jewel": _palette("070f22 10384f 1b7a70 79c3a6 f4e6c4", "a8125a d8a331 3c2a91", 0.40, 0.95),
    "fresh": _palette("12341f 2f7f49 74c266 c3e79d fcffea", "f79a1f 29b4cc f45d6b", 0.20, 1.05),
}
"""Palette by slot word."""


@dataclass(frozen=True)
class Light:
    """How a picture is lit.

    Parameters
    ----------
    colour:
        The key light's colour, by which the picture is multiplied.
    exposure, contrast:
        Brightness and steepness of the final curve; 1 changes nothing.
    falloff:
        Kind of light field: ``even``, ``sun``, ``spot``, ``side`` or ``back``.
    shadow_length:
        Height of the cast shadow over the product's height; negative falls towards the viewer.
    shadow_slant:
        Sideways throw of the shadow's far end over the product's height, away from the light.
    shadow_blur:
        Softness of the shadow, as a share of the picture's width.
    p_shadow:
        Opacity of the cast shadow.
    """

    colour: tuple[float, float, float]
    exposure: float
    contrast: float
    falloff: str
    shadow_length: float
    shadow_slant: float
    shadow_blur: float
    p_shadow: float


LIGHTS: Final[dict[str, Light]] = {
    "soft daylight": Light((1.0, 1.0, 1.0), 1.05, 0.98, "even", 0.20, 0.10, 0.020, 0.38),
    "golden hour": Light((1.08, 0.96, 0.80), 1.00, 1.04, "sun", 0.22, 0.75, 0.014, 0.46),
    "studio spotlight": Light((1.02, 1.0, 0.97), 1.00, 1.06, "spot", 0.14, 0.04, 0.012, 0.62),
    "dramatic side light": Light((1.03, 0.99, 0.95), 0.94, 1.16, "side", 0.18, 0.95, 0.009, 0.66),
    "dreamy backlight": Light((1.03, 0.99, 0.96), 1.06, 0.90, "back", -0.30, 0.05, 0.022, 0.40),
}
"""Light by slot word."""
