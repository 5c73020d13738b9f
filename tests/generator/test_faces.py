"""Faces are found where they are, and not in what the renderer draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from generator.faces import Face, FaceDetector, _apart
from generator.procedural import ProceduralRenderer
from generator.prompt import VOCABULARY, Prompt

# Where the face is in portrait.jpg, pixels of 170 x 190.
FACE = (38, 35, 126, 150)


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    torch.set_num_threads(1)
    return FaceDetector(min_side=0.08, min_p=0.95)


def portrait() -> Image.Image:
    return Image.open(Path(__file__).with_name("portrait.jpg")).convert("RGB")


def overlap(face: Face, box: tuple[float, float, float, float]) -> float:
    width = min(face.right, box[2]) - max(face.left, box[0])
    height = min(face.bottom, box[3]) - max(face.top, box[1])
    common = max(width, 0) * max(height, 0)
    areas = (face.right - face.left) * (face.bottom - face.top) + (box[2] - box[0]) * (box[3] - box[1])
    return common / (areas - common)


def on_ground(scale: float, left: int, top: int) -> Image.Image:
    ground = Image.new("RGB", (512, 512), (120, 150, 120))
    picture = portrait()
    ground.paste(picture.resize((round(picture.width * scale), round(picture.height * scale))), (left, top))
    return ground


@pytest.mark.parametrize(("scale", "left", "top"), [(1.0, 20, 30), (2.5, 40, 20), (0.5, 400, 380), (1.2, 300, 0)])
def test_a_face_is_found_where_it_is(detector: FaceDetector, scale: float, left: int, top: int) -> None:
    (face,) = detector.find(on_ground(scale, left, top))
    box = tuple(edge * scale + shift for edge, shift in zip(FACE, (left, top, left, top), strict=True))
    assert overlap(face, box) > 0.5
    assert 0.95 <= face.p_face <= 1


def test_two_faces_are_two(detector: FaceDetector) -> None:
    both = on_ground(1.0, 20, 30)
    both.paste(portrait(), (300, 250))
    assert len(detector.find(both)) == 2


def test_faces_smaller_than_asked_for_are_left_out() -> None:
    small = on_ground(0.5, 300, 300)  # the face is a tenth of the picture
    assert len(FaceDetector(min_side=0.05, min_p=0.95).find(small)) == 1
    assert FaceDetector(min_side=0.3, min_p=0.95).find(small) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda picture: picture.rotate(180),
        lambda picture: Image.new("RGB", picture.size, (224, 172, 140)),
        lambda picture: Image.new("RGB", (40, 12), (224, 172, 140)),
    ],
)
def test_what_is_no_upright_face_is_not_found(
    detector: FaceDetector, spoil: Callable[[Image.Image], Image.Image]
) -> None:
    assert detector.find(spoil(portrait())) == []


def test_no_scene_looks_like_a_face(detector: FaceDetector) -> None:
    cutout = Image.new("RGBA", (60, 60), (200, 150, 120, 255))
    for place, scene in enumerate(VOCABULARY["scene"]):
        words = {slot: allowed[place % len(allowed)] for slot, allowed in VOCABULARY.items()}
        text = Prompt(**{"caption": "box", **words, "scene": scene}).text
        assert detector.find(ProceduralRenderer().render(cutout, text, seed=place, size_px=256).image) == [], scene


def test_of_boxes_over_each_other_the_surest_is_kept() -> None:
    import numpy as np

    boxes = np.array(
        [[0, 0, 10, 10, 0.8], [1, 1, 11, 11, 0.9], [30, 30, 40, 40, 0.7], [2, 2, 6, 6, 0.6]], dtype=np.float32
    )
    assert _apart(boxes, 0.5) == [1, 2, 3]
    assert _apart(boxes, 0.5, of_smaller=True) == [1, 2]
    assert _apart(boxes[:0], 0.5) == []
