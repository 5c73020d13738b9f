"""Lessons in seeing: what the projector behind frozen eyes is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from generator.comparison import Picture
from generator.eyes import Eyes
from generator.mllm import GroupMllm
from generator.mllm_presets import build_mllm
from generator.procedural import ProceduralRenderer
from generator.prompt import Prompt
from generator.settings import MllmSettings
from offline.seeing import Lesson, teach
from offline.settings import RewardSettings

SCENES = ("misty mountains", "city street at night", "flower meadow")
PALETTES = ("warm", "cool")


def lessons_of(shape: str, n: int, seed: int) -> list[Lesson]:
    """Draw a product of some shape in all scenes and palettes."""
    cutout = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    draw = ImageDraw.Draw(cutout)
    (draw.ellipse if shape == "ball" else draw.rectangle)((10, 10, 50, 50), fill=(120, 90, 60, 255))
    rng, renderer = np.random.default_rng(seed), ProceduralRenderer()
    lessons = []
    for number in range(n):
        scene, palette = SCENES[number % 3], PALETTES[int(rng.integers(2))]
        prompt = Prompt("the product", scene, palette, "soft daylight", "no props", "centred").text
        image = renderer.render(cutout, prompt, seed=int(rng.integers(2**31)), size_px=64).image
        lessons.append(Lesson(Picture.of(image), prompt))
    return lessons


@pytest.fixture(scope="module")
def taught() -> GroupMllm:
    mllm = build_mllm(MllmSettings(), seed=0)
    teach(mllm, lessons_of("box", 36, 0), RewardSettings(), seed=0)
    return mllm


def tokens_of(mllm: GroupMllm, lessons: Sequence[Lesson]) -> torch.Tensor:
    seen = Eyes(mllm).see([lesson.picture for lesson in lessons])
    tokens: torch.Tensor = mllm.model.model.multi_modal_projector(seen)[:, 0]
    return tokens.detach()


def test_pictures_of_another_product_that_show_the_same_are_nearest(taught: GroupMllm) -> None:
    learnt, other = lessons_of("box", 36, 0), lessons_of("ball", 12, 1)
    nearest = torch.cdist(tokens_of(taught, other), tokens_of(taught, learnt)).argmin(dim=1)
    right = [
        [first == second for first, second in zip(lesson.words[:2], learnt[place].words[:2], strict=True)]
        for lesson, place in zip(other, nearest.tolist(), strict=True)
    ]
    assert np.mean(right) >= 0.9


def test_words_lie_equally_far_apart(taught: GroupMllm) -> None:
    lessons = lessons_of("box", 36, 0)
    tokens, words = tokens_of(taught, lessons), [tuple(lesson.words[:2]) for lesson in lessons]
    centres = {
        each: tokens[[place for place, found in enumerate(words) if found == each]].mean(dim=0) for each in set(words)
    }
    by_scene = [
        float(torch.dist(centres[first, "warm"], centres[second, "warm"])) for first, second in pairwise(SCENES)
    ]
    by_palette = [float(torch.dist(centres[scene, "warm"], centres[scene, "cool"])) for scene in SCENES]
    assert max(*by_scene, *by_palette) < 2 * min(*by_scene, *by_palette)


def test_nothing_but_the_projector_is_fitted(taught: GroupMllm) -> None:
    before = build_mllm(MllmSettings(), seed=0).model.state_dict()
    changed = {name for name, value in taught.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)


def test_without_lessons_nothing_is_taught() -> None:
    mllm = build_mllm(MllmSettings(), seed=0)
    before = {name: value.clone() for name, value in mllm.model.state_dict().items()}
    teach(mllm, [], RewardSettings(), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in mllm.model.state_dict().items())
