"""Refreshing: when a product moves to a new encoder version."""

from __future__ import annotations

import numpy as np
import pytest

from online.attributes import AttributeSchema
from online.features import FeatureBank
from online.grouped_product import KEPT_VERSIONS, MIN_USERS_PER_GROUP
from online.grouping import Grouping
from online.learner import Encoder, PreferenceLearner
from online.settings import AttributeSettings, GroupSettings, ModelSettings

SCHEMA = AttributeSchema(AttributeSettings(values={"a": tuple("xyz"), "b": tuple("uv")}))
SETTINGS = GroupSettings(k_max=2, reservoir_users=64, refresh_every_impressions=500)
DIM = 8


class Stream:
    """A grouping of one product's users, whose encoder never changes but for its number."""

    def __init__(self) -> None:
        bank = FeatureBank(DIM, DIM)
        bank.put_title(0, np.ones(DIM, np.float32).tobytes())
        learner = PreferenceLearner(SCHEMA.cardinalities, DIM, DIM, ModelSettings(d_model=8, d_hidden=8), bank, 0)
        self._weights = learner.average_weights()
        self.grouping = Grouping(
            SETTINGS,
            SCHEMA,
            8,
            lambda weights: Encoder(learner.new_model(), weights, bank, SETTINGS.space),
            lambda new, _: [None] * len(new),
            0,
        )
        self._n_batches = 0

    def show(self, n_impressions: int) -> None:
        rng = np.random.default_rng(self._n_batches)
        users = rng.integers(1_000, size=n_impressions).astype(np.uint32)
        attributes = np.stack([2 + users % 3, 2 + users % 2], axis=1).astype(np.uint8)
        numbers = np.zeros(n_impressions, np.int64)
        self.grouping.observe_many(["p"] * n_impressions, numbers, attributes, users, 0, self._n_batches)
        self._n_batches += 1

    def adopt(self) -> bool:
        """Adopt a version; return whether the product is to move to it."""
        self.grouping.adopt(self._weights)
        return self.grouping.waiting() == ["p"]

    def refresh(self) -> None:
        self.grouping.refresh("p", 0, 0)


def test_a_product_is_grouped_first_as_soon_as_there_are_users_enough() -> None:
    stream = Stream()
    assert not stream.adopt()
    stream.show(MIN_USERS_PER_GROUP)
    assert not stream.adopt()
    stream.show(3 * MIN_USERS_PER_GROUP)
    assert stream.grouping.waiting() == ["p"]
    stream.refresh()
    assert stream.grouping.waiting() == []


@pytest.mark.parametrize(
    ("n_before", "n_since", "moves"),
    [(400, 132, False), (400, 134, True), (10_000, 499, False), (10_000, 500, True)],
)
def test_a_product_moves_after_enough_impressions(n_before: int, n_since: int, moves: bool) -> None:
    stream = Stream()
    stream.show(n_before)
    assert stream.adopt()
    stream.refresh()
    stream.show(n_since)
    assert stream.adopt() == moves
    assert stream.grouping.waiting({"p"}) == ["p"]
    assert stream.grouping.waiting({"q"}) == (["p"] if moves else [])


def test_a_product_is_never_far_behind() -> None:
    stream = Stream()
    stream.show(1_000)
    stream.adopt()
    stream.refresh()
    assert [stream.adopt() for _ in range(KEPT_VERSIONS)] == [False] * (KEPT_VERSIONS - 1) + [True]
