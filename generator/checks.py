"""Checks: what a creative must pass before it may be published.

Each check is a pure function that gives a :class:`CheckOutcome` with its reason and its figures, so
that what was refused can be reviewed. None of them looks at the clock, the disk or the network; what a trained
network says of a picture is an argument (:mod:`generator.inspection` asks it).
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
from generator.settings import CheckSettings

Mask = npt.NDArray[np.bool_]

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


def check_not_duplicate(nearest: tuple[str, float] | None, settings: CheckSettings) -> CheckOutcome:
    """Check that the picture looks like none of the product's creatives.

    ``nearest`` is the id of the one that it is most like, and the cosine of their features; None where there is none.
    """
    name = "not_duplicate"
    if nearest is None:
        return CheckOutcome(name, True, "the product has no other creative to compare with")
    creative_id, likeness = nearest
    detail = f"its likeness to {creative_id} is {likeness:.3f} (at most {settings.max_likeness:g})"
    return CheckOutcome(name, likeness <= settings.max_likeness, detail, {"likeness": likeness})


def check_safe(p_unsafe: float, settings: CheckSettings) -> CheckOutcome:
    """Check that the classifier of unsafe images does not take the picture for one."""
    detail = f"unsafe with a probability of {p_unsafe:.3f} (at most {settings.max_p_unsafe:g})"
    return CheckOutcome("safe", p_unsafe <= settings.max_p_unsafe, detail, {"p_unsafe": p_unsafe})


def check_no_portrait(p_faces: Sequence[float], settings: CheckSettings) -> CheckOutcome:
    """Check that the picture shows nobody's face (the paper's A.7), by the probabilities of the faces found in it."""
    name, figures = "no_portrait", {"n_faces": float(len(p_faces))}
    if not p_faces:
        return CheckOutcome(name, True, "no face was found", figures)
    found = f"{len(p_faces)} faces were" if len(p_faces) > 1 else "a face was"
    detail = f"{found} found (probability {max(p_faces):.2f}); allowed: none"
    return CheckOutcome(name, False, detail, figures | {"p_face": max(p_faces)})


def check_prompt(text: str, settings: CheckSettings) -> CheckOutcome:
    """Check a prompt's text: its length, blocked terms, people, and that no character in it hides or marks up.

    People may be named in the product's title, not in what is asked to be drawn around it. Terms are compared after
    Unicode compatibility folding (NFKC) and in lower case, as whole words, with white space and invisible
    characters between them ignored.
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
    for what, terms, read in (
        ("blocked term", settings.blocked_terms, text),
        ("term for people", settings.people_terms, _instructions(text, prompt)),
    ):
        folded = _folded("".join(c for c in read if unicodedata.category(c) != "Cf"))
        for term in terms:
            wanted = _folded(term)
            if wanted and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", folded):
                return CheckOutcome(name, False, f"the prompt holds the {what} {term!r}", figures)
    unclean = sorted({c for c in text if sanitise_caption(f"a{c}a") not in {f"a{c}a", "a a"}} | _control(text))
    if unclean:
        codes = ", ".join(f"U+{ord(c):04X}" for c in unclean[:8])
        return CheckOutcome(name, False, f"the prompt holds control, invisible or mark-up characters: {codes}", figures)
    return CheckOutcome(name, True, f"{len(text)} characters, caption {prompt.caption!r}", figures)


def _control(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) == "Cc"}


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _instructions(text: str, prompt: Prompt) -> str:
    """Return a prompt's text without the product's title: a face cream may be called one, nobody may be asked for."""
    if prompt.caption == sanitise_caption(text):  # no title stands out in it
        return text
    return text.replace(prompt.caption, " ", 1)


def refusal(outcomes: Sequence[CheckOutcome]) -> str | None:
    """Return why a creative is refused, one clause for each failed check, or None when all passed."""
    failed = [f"{outcome.name}: {outcome.detail}" for outcome in outcomes if not outcome.passed]
    return "; ".join(failed) or None
