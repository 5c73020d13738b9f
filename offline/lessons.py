"""Lessons in seeing: pictures with the prompts that they were drawn from, for reward models to learn reading from."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from generator.comparison import Picture
from generator.composition import EmptyCutout
from generator.prompt import VOCABULARY, Prompt
from generator.renderer import Renderer
from generator.storage import ImageUnreadable, open_image
from offline.pairs import HeldOutBy
from offline.pretrain_source import ProductSource
from offline.reward_comparison import RewardData
from offline.seeing import Lesson

log = logging.getLogger(__name__)


def lessons_of(
    data: RewardData,
    sources: Sequence[ProductSource],
    renderer: Renderer,
    *,
    held_out_by: HeldOutBy,
    n_pictures: int,
    size_px: int,
    seed: int,
) -> list[Lesson]:
    """Return the creatives that are learnt from, and pictures drawn of the products that are; see `drawn_lessons`.

    Where creatives are held out, other pictures of their products tell nothing of them.
    """
    held_out = {pair.product_id for pair in data.held_out} if held_out_by == "product" else set()
    learnt = [product for product in sources if product.product_id not in held_out]
    return [*data.lessons, *drawn_lessons(learnt, renderer, n_pictures=n_pictures, size_px=size_px, seed=seed)]


def drawn_lessons(
    sources: Sequence[ProductSource], renderer: Renderer, *, n_pictures: int, size_px: int, seed: int
) -> list[Lesson]:
    """Draw pictures of products from prompts whose words are drawn at random.

    A product whose picture cannot be used gives no lessons.

    Parameters
    ----------
    sources
        The products; those of held-out pairs are to be left out.
    renderer
        Who draws.
    n_pictures
        How many pictures, over all products.
    size_px
        Side of a picture, pixels.
    seed
        Seed of products, prompts and pictures.
    """
    rng = np.random.default_rng(seed)
    cutouts = {}
    for product in sources:
        try:
            if product.picture_uri is not None:
                cutouts[product.product_id] = open_image(product.picture_uri)
        except ImageUnreadable as error:
            log.warning("product %r: %s: no lessons", product.product_id, error)
    usable = [product for product in sources if product.product_id in cutouts]
    lessons: list[Lesson] = []
    while usable and len(lessons) < n_pictures:
        product = usable[int(rng.integers(len(usable)))]
        words = {slot: of_slot[int(rng.integers(len(of_slot)))] for slot, of_slot in VOCABULARY.items()}
        prompt = Prompt(caption=product.title, **words).text
        try:
            image = renderer.render(
                cutouts[product.product_id], prompt, seed=int(rng.integers(2**31)), size_px=size_px
            ).image
        except EmptyCutout as error:
            log.warning("product %r: %s: no lessons", product.product_id, error)
            usable.remove(product)
            continue
        lessons.append(Lesson(Picture.of(image), prompt))
    return lessons
