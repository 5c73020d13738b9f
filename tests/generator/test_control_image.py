from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw

from generator.composition import LAYOUTS, full_mask, place
from generator.control_image import canny, edge_image, edges, masked_image, repainted_mask


def square_on_nothing() -> Image.Image:
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 10, 89, 89), fill=(120, 120, 120, 255))
    draw.rectangle((40, 40, 59, 59), fill=(250, 250, 250, 255))
    return image


def test_a_step_is_one_line_at_its_place() -> None:
    tone = np.zeros((20, 30), np.float32)
    tone[:, 12:] = 1
    found = canny(tone)
    assert (found.sum(axis=1) == 1).all()
    assert set(np.argwhere(found)[:, 1]) <= {11, 12}


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_an_even_picture_has_no_edges(level: float) -> None:
    assert not canny(np.full((16, 16), level, np.float32)).any()


def test_faint_steps_are_no_edges_unless_they_touch_a_clear_one() -> None:
    faint = np.zeros((40, 40), np.float32)
    faint[:, 20:] = 0.15
    assert not canny(faint).any()
    fading = np.zeros((40, 40), np.float32)
    fading[:, 20:] = np.linspace(0.6, 0.14, 40)[:, None]
    assert canny(fading)[:38].any(axis=1).all()


def test_outline_and_inner_edges_of_a_product_are_found_once() -> None:
    placement = place(square_on_nothing(), LAYOUTS["centred"], 200)
    found = edges(placement, 200)
    box = placement.box
    middle = (box.top + box.bottom) // 2
    columns = np.flatnonzero(found[middle])  # left side, inner square twice, right side
    assert len(columns) == 4
    assert abs(columns[0] - box.left) <= 1
    assert abs(columns[3] - box.right) <= 1
    assert not found[: box.top - 2].any()
    assert not found[:, : box.left - 2].any()


def test_the_edge_image_is_white_on_black() -> None:
    placement = place(square_on_nothing(), LAYOUTS["centred"], 64)
    image = edge_image(placement, 64)
    assert image.shape == (3, 64, 64)
    assert set(np.unique(image)) == {0.0, 1.0}


def test_the_masked_image_is_minus_one_where_it_is_painted() -> None:
    placement = place(square_on_nothing(), LAYOUTS["centred"], 64)
    repainted = repainted_mask(full_mask(placement, 64), 1)
    image = masked_image(np.full((3, 64, 64), 0.25, np.float32), repainted)
    assert (image[:, repainted] == -1).all()
    assert (image[:, ~repainted] == 0.25).all()


@given(arrays.arrays(np.uint8, (16, 24)), st.sampled_from([1, 2, 4, 8]))
def test_a_kept_cell_is_wholly_the_products(alpha: np.ndarray, cell_px: int) -> None:
    repainted = repainted_mask(alpha, cell_px)
    assert repainted.shape == alpha.shape
    assert repainted[alpha < 128].all()
    for top in range(0, 16, cell_px):
        for left in range(0, 24, cell_px):
            cell = np.s_[top : top + cell_px, left : left + cell_px]
            assert repainted[cell].all() == (alpha[cell] < 128).any()
            assert repainted[cell].any() == repainted[cell].all()
