"""The truth of a run: what a report needs to judge what was learned, written beside the run."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from simulator.stage import Stage, StyleBook
    from simulator.world import World


class PolicyTruth(msgspec.Struct, frozen=True, kw_only=True):
    """True expected CTR of three policies over the creatives known at the time."""

    uniform_ctr: float
    best_for_all_ctr: float
    best_per_segment_ctr: float


class TasteTruth(msgspec.Struct, frozen=True, kw_only=True):
    """Who likes what of a product: the driver, its values' segments, and each creative's true CTR by segment."""

    driver: str
    segment_of_value: dict[str, int]
    ctr_by_segment: dict[str, list[float]]
    best_creatives: list[str]


class ProductTruth(msgspec.Struct, frozen=True, kw_only=True):
    """A product's true tastes, at the start and at the end of the run; the same unless its category shifted."""

    product_id: str
    title: str
    category: str
    shifted: bool
    at_start: TasteTruth
    at_end: TasteTruth


class UserTruth(msgspec.Struct, frozen=True, kw_only=True):
    """A user: all attribute values, those that the events carry, and the segment in every category."""

    user_id: str
    attributes: dict[str, str]
    known_attributes: dict[str, str]
    segments_at_start: dict[str, int]
    segments_at_end: dict[str, int]


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """The truth of a run. Counts are of messages; ``by_creative`` and ``by_arm`` hold impressions and clicks."""

    run_id: str
    seed: int
    completed: bool
    started_at_ms: int
    ended_at_ms: int
    shifted_at_ms: int | None
    shifted_after_impressions: int | None
    shifted_categories: list[str]
    shift_kind: str
    n_impressions: int
    n_clicks: int
    n_late_clicks: int
    produced: dict[str, int]
    duplicates: dict[str, int]
    spoiled: dict[str, int]
    spoiled_by_topic: dict[str, int]
    by_creative: dict[str, list[int]]
    by_arm: dict[str, list[int]]
    n_creatives_learned: int
    n_creatives_without_style: int
    policies: dict[str, PolicyTruth]
    products: list[ProductTruth]
    users: list[UserTruth]


def policy_truth(world: World, book: StyleBook) -> PolicyTruth:
    """Return the true policy values of a world over the known creatives."""
    values = world.policy_values(book.styles_by_product())
    return PolicyTruth(
        uniform_ctr=values.uniform,
        best_for_all_ctr=values.best_for_all,
        best_per_segment_ctr=values.best_per_segment,
    )


def taste_truths(world: World, book: StyleBook) -> list[TasteTruth]:
    """Return every product's true tastes over its known creatives, by product index."""
    truths = []
    for product, (ids, styles) in enumerate(zip(book.ids_by_product(), book.styles_by_product(), strict=True)):
        driver = world.categories[world.product_categories[product]].driver
        ctrs = world.segment_ctrs(product, styles)  # (S, n_creatives)
        truths.append(
            TasteTruth(
                driver=driver.attribute,
                segment_of_value=driver.segment_of_value(),
                ctr_by_segment=dict(zip(ids, ctrs.T.tolist(), strict=True)),
                best_creatives=[ids[best] for best in ctrs.argmax(axis=1)],
            )
        )
    return truths


def product_truths(
    stage: Stage, at_start: list[TasteTruth], at_end: list[TasteTruth], shifted: tuple[str, ...]
) -> list[ProductTruth]:
    """Join the tastes at both ends of a run, by product index."""
    return [
        ProductTruth(
            product_id=product.product_id,
            title=product.title,
            category=product.category,
            shifted=product.category in shifted,
            at_start=start,
            at_end=end,
        )
        for product, start, end in zip(stage.products, at_start, at_end, strict=True)
    ]


def user_truths(
    start: World, end: World, users: NDArray[np.int64], user_ids: list[str], known: list[dict[str, str]]
) -> list[UserTruth]:
    """Return the truth of some users, given by index, with their ids and what the events say of them."""
    before = {category: start.segments(category) for category in start.categories}
    after = {category: end.segments(category) for category in end.categories}
    return [
        UserTruth(
            user_id=user_id,
            attributes=start.attribute_values(index),
            known_attributes=known_attributes,
            segments_at_start={category: int(of_user[index]) for category, of_user in before.items()},
            segments_at_end={category: int(of_user[index]) for category, of_user in after.items()},
        )
        for index, user_id, known_attributes in zip(users.tolist(), user_ids, known, strict=True)
    ]


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON in one step: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as scratch:
        scratch.write(msgspec.json.format(msgspec.json.encode(value), indent=1))
    os.chmod(scratch.name, 0o644)
    os.replace(scratch.name, path)


def read_truth(path: Path) -> Truth:
    """Read a ``truth.json``."""
    return msgspec.json.decode(path.read_bytes(), type=Truth)
