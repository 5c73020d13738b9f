"""The contract of renderers, held by every one of them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from generator.composition import LAYOUTS, EmptyCutout, place
from generator.prompt import VOCABULARY, Prompt, PromptNotUnderstood
from generator.renderer import Renderer, RenderRequest, UnusableSize

SIZE_PX = 64


def prompt(**slots: str) -> str:
    """Return a prompt's text, with some slots changed."""
    words = {slot: words[0] for slot, words in VOCABULARY.items()}
    return Prompt(**{"caption": "red flask", **words, **slots}).text


def pixels(image: Image.Image) -> np.ndarray:
    """Return a picture's levels, ready for differences."""
    return np.asarray(image).astype(np.int16)


def test_it_keeps_the_protocol(renderer: Renderer) -> None:
    assert isinstance(renderer, Renderer)
    assert renderer.name in {"procedural", "diffusion"}


def test_the_same_request_gives_the_same_picture(renderer: Renderer, flask: Image.Image) -> None:
    first = renderer.render(flask, prompt(), seed=5, size_px=SIZE_PX)
    again = renderer.render(flask, prompt(), seed=5, size_px=SIZE_PX)
    assert (first.image.mode, first.image.size) == ("RGB", (SIZE_PX, SIZE_PX))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.provenance == again.provenance


@pytest.mark.parametrize("other", [{"seed": 6}, {"prompt": prompt(scene="sunlit beach")}])
def test_seed_and_prompt_change_the_ground(renderer: Renderer, flask: Image.Image, other: dict[str, object]) -> None:
    base = {"cutout": flask, "prompt": prompt(), "seed": 5}
    one, two = renderer.render_many([RenderRequest(**base), RenderRequest(**base | other)], size_px=SIZE_PX)
    assert np.abs(pixels(one.image) - pixels(two.image)).mean() > 0.5


def test_a_picture_does_not_depend_on_what_else_is_asked_for(renderer: Renderer, flask: Image.Image) -> None:
    requests = [
        RenderRequest(flask, prompt(scene=scene, composition=composition), seed)
        for seed, (scene, composition) in enumerate(
            zip(VOCABULARY["scene"][:5], [*VOCABULARY["composition"], "centred"], strict=True)
        )
    ]
    alone = [renderer.render(r.cutout, r.prompt, seed=r.seed, size_px=SIZE_PX) for r in requests]
    together = renderer.render_many(requests, size_px=SIZE_PX)
    reversed_ = renderer.render_many(requests[::-1], size_px=SIZE_PX)[::-1]
    for one, other, third in zip(alone, together, reversed_, strict=True):
        assert one.provenance == other.provenance == third.provenance
        # Within rounding: a batch is added up in another order.
        assert np.abs(pixels(one.image) - pixels(other.image)).max() <= 1
        assert np.abs(pixels(one.image) - pixels(third.image)).max() <= 1


def test_nothing_asked_for_is_nothing_drawn(renderer: Renderer) -> None:
    assert renderer.render_many([], size_px=SIZE_PX) == []


@pytest.mark.parametrize("composition", VOCABULARY["composition"])
@pytest.mark.parametrize("shape", [(40, 200), (220, 30), (90, 90)])
def test_product_pixels_are_kept_and_never_cropped(
    renderer: Renderer, composition: str, shape: tuple[int, int]
) -> None:
    source = Image.new("RGBA", (shape[0] + 6, shape[1] + 6), (0, 0, 0, 0))
    noise = np.random.default_rng(1).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    source.paste(Image.fromarray(noise), (3, 3))
    expected = place(source, LAYOUTS[composition], 2 * SIZE_PX)
    rendering = renderer.render(source, prompt(composition=composition), seed=2, size_px=2 * SIZE_PX)
    box = rendering.product_box
    assert box == expected.box
    assert (rendering.product_pixels == expected.pixels).all()
    shown = np.asarray(rendering.image)[box.top : box.bottom, box.left : box.right]
    opaque = rendering.product_pixels[..., 3] == 255
    assert opaque.mean() > 0.7
    assert (shown[opaque] == rendering.product_pixels[..., :3][opaque]).all()


def test_opaque_pictures_are_used_as_they_are_and_recorded(renderer: Renderer, flask: Image.Image) -> None:
    rendering = renderer.render(Image.new("RGB", (50, 40), (10, 200, 30)), prompt(), seed=0, size_px=SIZE_PX)
    assert not rendering.provenance.had_alpha
    assert renderer.render(flask, prompt(), seed=0, size_px=SIZE_PX).provenance.had_alpha
    box = rendering.product_box
    middle = ((box.left + box.right) // 2, (box.top + box.bottom) // 2)
    assert rendering.image.getpixel(middle) == (10, 200, 30)


@pytest.mark.parametrize(("seed", "size_px"), [(-1, SIZE_PX), (0, 8), (0, 10_000)])
def test_unusable_numbers_are_refused(renderer: Renderer, flask: Image.Image, seed: int, size_px: int) -> None:
    with pytest.raises(UnusableSize, match="Nothing was rendered"):
        renderer.render(flask, prompt(), seed=seed, size_px=size_px)


def test_an_empty_cutout_and_an_empty_prompt_are_refused(renderer: Renderer, flask: Image.Image) -> None:
    with pytest.raises(EmptyCutout, match="no pixel"):
        renderer.render(Image.new("RGBA", (9, 9), (1, 2, 3, 0)), prompt(), seed=0, size_px=SIZE_PX)
    with pytest.raises(PromptNotUnderstood):
        renderer.render_many([RenderRequest(flask, prompt(), 0), RenderRequest(flask, "  ", 0)], size_px=SIZE_PX)


def test_provenance_tells_how_to_make_it_again(renderer: Renderer, flask: Image.Image) -> None:
    text = prompt(scene="desert dunes")
    provenance = renderer.render(flask, text, seed=9, size_px=SIZE_PX).provenance
    assert (provenance.renderer, provenance.version) == (renderer.name, renderer.version)
    assert (provenance.prompt, provenance.seed, provenance.size_px) == (text, 9, SIZE_PX)
    term = {"procedural": "compositeSynthetic", "diffusion": "compositeWithTrainedAlgorithmicMedia"}[renderer.name]
    assert provenance.digital_source_type.rpartition("/")[2] == term
    assert len(provenance.prompt_sha256) == len(provenance.cutout_sha256) == 64
