"""Checks: what a creative must pass before it may be published.

Each check is a pure function that gives a :class:`CheckOutcome` with its reason and its figures, so
that what was refused can be reviewed. None of them looks at the clock, the disk or the network.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from generator.composition import Box, Bytes
from generator.prompt import Prompt, PromptNotUnderstood, sanitise_caption
from generator.renderer import Rendering
from generator.settings import CheckSettings

Mask = npt.NDArray[np.bool_]

_HASH_SIDE: Final = 16
_HASH_STEP: Final = 2.0  # neighbours must differ by this many levels to count: less is compression noise
_COLOUR_SIDE: Final = 8
_FAR_LEVELS: Final = 32


@dataclass(frozen=True)
class CheckOutcome:
    """What one check found.

    ``detail`` says in a sentence what was measured and, when the check failed, what is allowed.
    ``figures`` are the numbers behind it.
    """

    name: str
    passed: bool
    detail: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fingerprint:
    """A picture's perceptual hash: two pictures that look alike have near fingerprints.

    ``bits`` is a difference hash (dHash) of the 16 x 16 luminance in two directions: for each pair of
    neighbours one bit for "clearly brighter" and one for "clearly darker", 1,024 bits. ``colours`` is the mean
    colour of an 8 x 8 grid, 192 bytes: the same scene in another palette is another creative.
    """

    bits: bytes
    colours: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return a picture's fingerprint; it survives scaling and compression, not cropping or rotation."""
    rgb = image.convert("RGB")
    side = _HASH_SIDE + 1
    small = rgb.convert("L").convert("F").resize((side, side), Image.Resampling.BOX)
    tone = np.asarray(small, dtype=np.float32)  # (17, 17)
    right = tone[:-1, 1:] - tone[:-1, :-1]
    down = tone[1:, :-1] - tone[:-1, :-1]
    steps = np.stack([right > _HASH_STEP, right < -_HASH_STEP, down > _HASH_STEP, down < -_HASH_STEP])
    colours = rgb.resize((_COLOUR_SIDE, _COLOUR_SIDE), Image.Resampling.BOX)
    return Fingerprint(np.packbits(steps).tobytes(), colours.tobytes())


def fingerprint_distance(one: Fingerprint, other: Fingerprint) -> tuple[float, float]:
    """Return the share of different bits (0 to 1) and the mean difference of colours (levels of 255)."""
    bits = np.bitwise_xor(np.frombuffer(one.bits, np.uint8), np.frombuffer(other.bits, np.uint8))
    a, b = np.frombuffer(one.colours, np.uint8).astype(np.float32), np.frombuffer(other.colours, np.uint8)
    return float(np.bitwise_count(bits).sum()) / (8 * len(bits)), float(np.abs(a - b).mean())


def check_file(payload: bytes, size_px: int) -> CheckOutcome:
    """Check that the bytes are a whole picture, RGB, ``size_px`` squared: what a browser will be given."""
    name = "file"
    try:
        with Image.open(io.BytesIO(payload)) as image:
            image.load()
            mode, size = image.mode, image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return CheckOutcome(name, False, f"the file cannot be opened as a picture: {error}", {"bytes": len(payload)})
    figures = {"bytes": float(len(payload)), "width_px": float(size[0]), "height_px": float(size[1])}
    if mode != "RGB":
        return CheckOutcome(name, False, f"the picture's mode is {mode}; allowed: RGB", figures)
    if size != (size_px, size_px):
        return CheckOutcome(
            name, False, f"the picture is {size[0]} x {size[1]} px; allowed: {size_px} x {size_px} px", figures
        )
    return CheckOutcome(name, True, f"{size[0]} x {size[1]} px, {len(payload)} bytes", figures)


def check_renderer_verdict(flagged: str | None) -> CheckOutcome:
    """Check that the renderer's own safety checker did not refuse the picture; ``flagged`` says why it did."""
    return CheckOutcome("renderer_verdict", flagged is None, flagged or "the renderer refused nothing")


def check_not_blank(image: Image.Image, settings: CheckSettings) -> CheckOutcome:
    """Check that the picture shows something: its luminance varies, and over many levels."""
    tone = np.asarray(image.convert("L"))
    contrast = float(tone.std())
    share = np.bincount(tone.ravel(), minlength=256) / tone.size
    some = share[share > 0]
    entropy = float(-(some * np.log2(some)).sum()) + 0.0
    figures = {"contrast": contrast, "entropy_bits": entropy}
    passed = contrast >= settings.min_contrast and entropy >= settings.min_entropy_bits
    detail = (
        f"contrast {contrast:.1f} (least {settings.min_contrast:g}), "
        f"entropy {entropy:.2f} bits (least {settings.min_entropy_bits:g})"
    )
    return CheckOutcome("not_blank", passed, detail, figures)


def check_product_fidelity(image: Image.Image, pixels: Bytes, box: Box, settings: CheckSettings) -> CheckOutcome:
    """Check that the product is there: the picture equals the scaled cut-out inside its box, away from the edge.

    ``pixels`` is RGBA, shape (height, width, 4), of the box's size. Only pixels whose whole 5 x 5 neighbourhood is
    opaque are compared; a product too thin to have any is compared where it is opaque at all.
    """
    name = "product_fidelity"
    if box.left < 0 or box.top < 0 or box.right > image.width or box.bottom > image.height:
        return CheckOutcome(name, False, f"the product's box {tuple(box)} leaves the picture of {image.size}: cropped")
    if pixels.shape != (box.height_px, box.width_px, 4):
        return CheckOutcome(name, False, f"the cut-out's shape {pixels.shape} is not that of its box {tuple(box)}")
    opaque = pixels[..., 3] == 255
    inside = _eroded(opaque, 2)
    if not inside.any():
        inside = opaque
    if not inside.any():
        return CheckOutcome(name, False, "the cut-out has no opaque pixel, so nothing shows the product")
    shown = np.asarray(image.convert("RGB").crop(box), dtype=np.int16)
    difference = np.abs(shown - pixels[..., :3].astype(np.int16)).mean(axis=2)[inside]
    error, off = float(difference.mean()), float((difference > _FAR_LEVELS).mean())
    passed = error <= settings.max_fidelity_error and off <= settings.max_off_share
    detail = (
        f"mean difference {error:.2f} levels (at most {settings.max_fidelity_error:g}), "
        f"{off:.1%} of the pixels far off (at most {settings.max_off_share:.1%})"
    )
    return CheckOutcome(name, passed, detail, {"error": error, "off_share": off, "n_pixels": float(inside.sum())})


def _eroded(mask: Mask, by: int) -> Mask:
    """Return the mask without the pixels that are within ``by`` of its outside or of the array's border."""
    out = np.pad(mask, by)
    height, width = mask.shape
    inside = np.ones_like(mask)
    for dy in range(2 * by + 1):
        for dx in range(2 * by + 1):
            inside &= out[dy : dy + height, dx : dx + width]
    return inside


def check_not_duplicate(
    image: Image.Image, existing: Mapping[str, Fingerprint], settings: CheckSettings
) -> CheckOutcome:
    """Check that the picture looks like none of the product's creatives, given by their ids."""
    name = "not_duplicate"
    if not existing:
        return CheckOutcome(name, True, "the product has no other creative to compare with")
    own = fingerprint(image)
    nearest, bits, colour = "", 2.0, 256.0
    for creative_id, other in existing.items():
        other_bits, other_colour = fingerprint_distance(own, other)
        # Nearest by the worse of the two, each in units of its limit.
        if max(
            other_bits / max(settings.max_duplicate_bits, 1e-9), other_colour / max(settings.max_duplicate_colour, 1e-9)
        ) < max(bits / max(settings.max_duplicate_bits, 1e-9), colour / max(settings.max_duplicate_colour, 1e-9)):
            nearest, bits, colour = creative_id, other_bits, other_colour
    passed = bits > settings.max_duplicate_bits or colour > settings.max_duplicate_colour
    detail = (
        f"nearest is {nearest}: {bits:.1%} of the hash and {colour:.1f} levels of colour apart "
        f"(a duplicate is within {settings.max_duplicate_bits:.1%} and {settings.max_duplicate_colour:g})"
    )
    return CheckOutcome(name, passed, detail, {"bits": bits, "colour": colour, "n_compared": float(len(existing))})


def check_prompt(text: str, settings: CheckSettings) -> CheckOutcome:
    """Check a prompt's text: its length, its blocked terms, and that no character in it hides or marks up.

    Terms are compared after Unicode compatibility folding (NFKC) and in lower case, as whole words, with
    white space and invisible characters between them ignored.
    """
    name = "prompt"
    figures = {"chars": float(len(text))}
    if len(text) > settings.max_prompt_chars:
        return CheckOutcome(
            name, False, f"the prompt has {len(text)} characters; allowed: {settings.max_prompt_chars}", figures
        )
    try:
        prompt = Prompt.parse(text)
    except PromptNotUnderstood as error:
        return CheckOutcome(name, False, str(error), figures)
    visible = "".join(c for c in text if unicodedata.category(c) != "Cf")
    folded = " ".join(unicodedata.normalize("NFKC", visible).casefold().split())
    for term in settings.blocked_terms:
        wanted = " ".join(unicodedata.normalize("NFKC", term).casefold().split())
        if wanted and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", folded):
            return CheckOutcome(name, False, f"the prompt holds the blocked term {term!r}", figures)
    unclean = sorted({c for c in text if sanitise_caption(f"a{c}a") not in {f"a{c}a", "a a"}} | _control(text))
    if unclean:
        codes = ", ".join(f"U+{ord(c):04X}" for c in unclean[:8])
        return CheckOutcome(name, False, f"the prompt holds control, invisible or mark-up characters: {codes}", figures)
    return CheckOutcome(name, True, f"{len(text)} characters, caption {prompt.caption!r}", figures)


def _control(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) == "Cc"}


def check_rendering(
    rendering: Rendering, existing: Mapping[str, Fingerprint], settings: CheckSettings
) -> tuple[CheckOutcome, ...]:
    """Run every check on a rendering that needs no file: prompt, the renderer's verdict, blankness, product, others."""
    return (
        check_prompt(rendering.provenance.prompt, settings),
        check_renderer_verdict(rendering.flagged),
        check_not_blank(rendering.image, settings),
        check_product_fidelity(rendering.image, rendering.product_pixels, rendering.product_box, settings),
        check_not_duplicate(rendering.image, existing, settings),
    )


def refusal(outcomes: Sequence[CheckOutcome]) -> str | None:
    """Return why a creative is refused, one clause for each failed check, or None when all passed."""
    failed = [f"{outcome.name}: {outcome.detail}" for outcome in outcomes if not outcome.passed]
    return "; ".join(failed) or None
