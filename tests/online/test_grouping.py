"""Grouping: which product's turn it is."""

from __future__ import annotations

import numpy as np

from online.attributes import AttributeSchema
from online.grouping import Grouping
from online.settings import AttributeSettings, GroupSettings

N_USERS = 100
PRODUCTS = ["a", "b", "c"]


class Encoder:
    """Users lie where their first attribute says."""

    def __init__(self, weights: bytes) -> None:
        del weights

    def embed_many(self, products: np.ndarray, attributes: np.ndarray) -> np.ndarray:
        return attributes[:, :2].astype(np.float32)


def test_every_product_has_its_turn_where_versions_come_faster_than_all_can_move() -> None:
    schema = AttributeSchema(AttributeSettings(values={"age": ("young", "old"), "tier": ("1", "2", "3")}))
    grouping = Grouping(
        GroupSettings(k_max=2),
        schema,
        2,
        Encoder,  # type: ignore[arg-type]
        lambda new, _: [None] * len(new),
        0,
    )
    rng = np.random.default_rng(0)
    turns: list[str] = []
    for _ in range(7):
        for number, product_id in enumerate(PRODUCTS):
            codes = np.stack([rng.integers(2, 2 + n, size=N_USERS) for n in (2, 3)], axis=1).astype(np.uint8)
            keys = np.arange(N_USERS, dtype=np.uint32)
            grouping.observe_many([product_id] * N_USERS, np.full(N_USERS, number), codes, keys, 0, len(turns))
        grouping.adopt(b"")
        turn = grouping.waiting()[0]
        grouping.refresh(turn, PRODUCTS.index(turn), 0)
        turns.append(turn)
    assert turns == ["a", "b", "c", "a", "b", "c", "a"]
