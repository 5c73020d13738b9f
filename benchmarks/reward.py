"""Reward models on a simulated world: the dataset and sources of a run, and the simulator's own truth as a scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from benchmarks.core_run import CoreRun
from benchmarks.worlds import BenchWorld, Ints
from generator.comparison import Comparison, Feature
from offline.dataset import Dataset
from offline.pretrain_source import ProductSource, read_sources
from offline.settings import OfflineSettings
from online.settings import OnlineSettings
from simulator.world import World

Floats = npt.NDArray[np.float64]


class GroupTruth:
    """What the groups of a run truly click: those users' chances who are in a group at the end of the run.

    Parameters
    ----------
    world
        The tastes.
    products
        Each product's number in the world, by id.
    members
        The users of each group, by product and group feature: as bytes, which is what a comparison knows of a group.
    styles
        The styles of the creatives, (8,) each, by id.
    """

    def __init__(
        self,
        world: World,
        products: Mapping[str, int],
        members: Mapping[tuple[str, bytes], Ints],
        styles: Mapping[str, Floats],
    ) -> None:
        self._p_click = world.frozen_tastes()
        self._products = products
        self._members = members
        self._styles = styles

    def ctrs(self, product_id: str, feature: Feature, styles: Floats) -> Floats:
        """Return a group's true CTR of creatives of the given styles (n, 8): the mean over its users, (n,)."""
        users = self._members[product_id, feature.tobytes()]
        n, m = len(styles), len(users)
        chances = self._p_click(
            np.tile(users, n), np.full(n * m, self._products[product_id]), np.repeat(styles, m, axis=0)
        )
        means: Floats = chances.reshape(n, m).mean(axis=1)
        return means

    def n_users(self, product_id: str, feature: Feature) -> int:
        """Return how many users a group has; a group that nobody is in any more stands for all users."""
        return len(self._members[product_id, feature.tobytes()])

    def style_of(self, creative_id: str) -> Floats:
        """Return the style of a creative of the run, (8,)."""
        return self._styles[creative_id]


class Oracle:
    """The simulator's truth as a scorer of pairs."""

    name = "oracle"

    def __init__(self, truth: GroupTruth) -> None:
        self._truth = truth
        self._known: dict[tuple[str, bytes, str], float] = {}

    def p_first_wins(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return 1 where the first picture's true CTR is higher, 0 where it is lower, (n,)."""
        found = np.empty(len(comparisons))
        for place, row in enumerate(comparisons):
            found[place] = 0.5 + 0.5 * np.sign(self._ctr(row, row.first.key) - self._ctr(row, row.second.key))
        return found

    def _ctr(self, row: Comparison, creative_id: str) -> float:
        key = row.product_id, row.group_feature.tobytes(), creative_id
        if key not in self._known:
            styles = self._truth.style_of(creative_id)[None]
            self._known[key] = float(self._truth.ctrs(row.product_id, row.group_feature, styles)[0])
        return self._known[key]


@dataclass(frozen=True)
class RewardWorld:
    """What a run in a world has learnt, as the offline jobs get it, and the truth about it."""

    dataset: Dataset
    sources: list[ProductSource]
    truth: GroupTruth


def make_reward_world(
    world: BenchWorld, course: CoreRun, online: OnlineSettings, settings: OfflineSettings
) -> RewardWorld:
    """Return the dataset and the sources of what a run has learnt, made as the offline jobs make them."""
    from offline.dataset import make_dataset
    from offline.snapshot import take_snapshot
    from state.reading import StateReader
    from state.store import Store

    with TemporaryDirectory() as folder:
        with Store(Path(folder) / "state", sync=False) as store:
            store.commit(world.registered)
            course.save(store)
        with StateReader(Path(folder) / "state") as state:
            snapshot = take_snapshot(state)
            with state.view() as view:
                sources = read_sources(view, online)
        dataset = make_dataset(snapshot, Path(folder), settings)
    numbers = {product_id: number for number, product_id in world.registry.product_ids.items()}
    users: Ints = np.arange(world.world.n_users)
    members = {}
    for product in sources:
        group_of = course.groups(numbers[product.product_id], users)
        for group in product.groups:
            inside = users[group_of == group.group_id]
            members[product.product_id, group.feature.tobytes()] = inside if len(inside) else users
    styles = dict(zip(world.creative_ids, world.styles, strict=True))
    return RewardWorld(dataset, sources, GroupTruth(world.world, numbers, members, styles))
