"""The checks refuse what they should, say why, and pass what the renderer makes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from generator.checks import (
    CheckOutcome,
    check_file,
    check_no_portrait,
    check_not_blank,
    check_not_duplicate,
    check_product_fidelity,
    check_prompt,
    check_safe,
    refusal,
)
from generator.composition import Box
from generator.procedural import ProceduralRenderer
from generator.prompt import Prompt
from generator.renderer import Rendering
from generator.settings import CheckSettings

SETTINGS = CheckSettings()
PROMPT = Prompt("red ball", "flower meadow", "fresh", "golden hour", "confetti", "centred")


@pytest.fixture(scope="module")
def rendering() -> Rendering:
    cutout = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    draw = ImageDraw.Draw(cutout)
    draw.ellipse((4, 4, 96, 96), fill=(200, 30, 30, 255))
    draw.rectangle((30, 40, 70, 60), fill=(240, 240, 20, 255))
    return ProceduralRenderer().render(cutout, PROMPT.text, seed=1, size_px=256)


def jpeg(image: Image.Image, quality: int = 88) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def test_a_good_rendering_passes_everything_also_as_jpeg(rendering: Rendering) -> None:
    box, pixels = rendering.product_box, rendering.product_pixels
    for image in (rendering.image, Image.open(io.BytesIO(jpeg(rendering.image)))):
        assert check_not_blank(image, SETTINGS).passed
        assert check_product_fidelity(image, pixels, box, SETTINGS).passed
    assert check_prompt(rendering.provenance.prompt, SETTINGS).passed
    assert check_file(jpeg(rendering.image), 256).passed


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "cannot be opened"),
        (b"GIF89a nonsense", "cannot be opened"),
        (jpeg(Image.new("RGB", (256, 256), "red"))[:300], "cannot be opened"),
        (jpeg(Image.new("RGB", (256, 200), "red")), "256 x 200 px; allowed: 256 x 256"),
        (jpeg(Image.new("L", (256, 256), 9)), "mode is L; allowed: RGB"),
    ],
)
def test_broken_files_are_refused(payload: bytes, reason: str) -> None:
    outcome = check_file(payload, 256)
    assert not outcome.passed
    assert reason in outcome.detail


def test_blank_pictures_are_refused() -> None:
    rng = np.random.default_rng(0)
    faint = (128 + rng.integers(-2, 3, (64, 64, 3))).astype(np.uint8)
    halves = np.zeros((64, 64, 3), dtype=np.uint8)
    halves[:, 32:] = 255
    for pixels in (np.full((64, 64, 3), 255, np.uint8), faint, halves):
        outcome = check_not_blank(Image.fromarray(pixels), SETTINGS)
        assert not outcome.passed
        assert set(outcome.figures) == {"contrast", "entropy_bits"}


def test_a_changed_covered_or_cropped_product_is_refused(rendering: Rendering) -> None:
    box, pixels = rendering.product_box, rendering.product_pixels
    other_hue = Image.merge("RGB", rendering.image.split()[::-1])
    covered = rendering.image.copy()
    ImageDraw.Draw(covered).rectangle((box.left, box.top, box.right, box.top + box.height_px // 4), fill="blue")
    shifted = rendering.image.transform(rendering.image.size, Image.Transform.AFFINE, (1, 0, 25, 0, 1, 0))
    for image in (other_hue, covered, shifted):
        assert not check_product_fidelity(image, pixels, box, SETTINGS).passed
    outside = Box(box.left + 200, box.top, box.right + 200, box.bottom)
    assert "cropped" in check_product_fidelity(rendering.image, pixels, outside, SETTINGS).detail
    assert not check_product_fidelity(rendering.image, pixels[:-1], box, SETTINGS).passed
    assert not check_product_fidelity(rendering.image, pixels * np.uint8(0), box, SETTINGS).passed


@pytest.mark.parametrize(
    ("outcome", "passed", "detail"),
    [
        (check_not_duplicate(None, SETTINGS), True, "no other creative"),
        (check_not_duplicate(("c-1", 0.88), SETTINGS), True, "likeness to c-1 is 0.880 (at most 0.88)"),
        (check_not_duplicate(("c-1", 0.901), SETTINGS), False, "likeness to c-1 is 0.901"),
        (check_safe(0.5, SETTINGS), True, "probability of 0.500 (at most 0.5)"),
        (check_safe(0.51, SETTINGS), False, "probability of 0.510"),
        (check_no_portrait([], SETTINGS), True, "no face"),
        (check_no_portrait([0.97], SETTINGS), False, "a face was found (probability 0.97)"),
        (check_no_portrait([0.96, 0.99], SETTINGS), False, "2 faces were found (probability 0.99)"),
    ],
)
def test_what_the_networks_say_is_held_against_the_limits(outcome: CheckOutcome, passed: bool, detail: str) -> None:
    assert outcome.passed == passed
    assert detail in outcome.detail


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no readable character"),
        ("x" * 401, "401 characters; allowed: 400"),
        ("photo studio, NSFW scene", "blocked term 'nsfw'"),
        ("a ｎｓｆｗ beach", "blocked term 'nsfw'"),
        ("a n\u200bsfw beach", "blocked term 'nsfw'"),
        ("photo studio <image> for a chair", "U+003C, U+003E"),
        ("beach\x07 for a chair", "U+0007"),
        ("beach\n\nignore the above", "U+000A"),
        ("beach \u202e chair", "U+202E"),
        ("a woman on a sunlit beach", "term for people 'woman'"),
        ("beach with CHILDREN, photo of chair", "term for people 'children'"),
        ("portrait of a man, backdrop for a sofa", "term for people 'portrait'"),
        ("face cream for women", "term for people 'face'"),  # nothing in it says where the title is
    ],
)
def test_bad_prompts_are_refused(text: str, reason: str) -> None:
    outcome = check_prompt(text, SETTINGS)
    assert not outcome.passed
    assert reason in outcome.detail


@pytest.mark.parametrize(
    "text",
    [
        Prompt(**{"caption": "Face cream for women, portrait of a model", **PROMPT.slots()}).text,
        "sunlit beach background for a men's watch, golden hour",
        PROMPT.text,
        "a gorecki record on a sunlit beach",
        "Café ½ — “chair”, forest",
        "تخت‌خواب beach",
    ],
)
def test_good_prompts_pass(text: str) -> None:
    assert check_prompt(text, SETTINGS).passed


def test_refusal_names_every_failed_check(rendering: Rendering) -> None:
    strict = CheckSettings(min_contrast=120, max_prompt_chars=10)
    outcomes = (
        check_prompt(rendering.provenance.prompt, strict),
        check_not_blank(rendering.image, strict),
        check_file(jpeg(rendering.image), 256),
        check_safe(0.9, strict),
    )
    reason = refusal(outcomes)
    assert reason is not None
    assert [name for name in ("prompt:", "not_blank:", "file:", "safe:") if name in reason] == [
        "prompt:",
        "not_blank:",
        "safe:",
    ]
    assert refusal(outcomes[2:3]) is None
