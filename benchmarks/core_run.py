"""A run of the online core on a simulated world: impressions in, labelled at once, in micro-batches."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from benchmarks.worlds import START_MS, BenchWorld, Impressions, Ints
from online.core import OnlineCore
from online.ctr import creative_spread, shrink
from online.expectation import group_ctrs
from online.settings import OnlineSettings
from online.shift import Shift
from state.records import ImpressionRecord
from state.store import ChangeSet, Store, Table

MS_PER_IMPRESSION = 3_460
"""Event time between two impressions: about 25,000 a day."""


class CoreRun:
    """The online core as it goes through a world's impressions.

    Parameters
    ----------
    world
        Where products, creatives and attributes come from.
    settings
        Those of the core.
    micro_batch_rows
        Impressions taken at once.
    """

    def __init__(self, world: BenchWorld, settings: OnlineSettings, *, micro_batch_rows: int) -> None:
        self._world = world
        self._settings = settings
        self._micro_batch_rows = micro_batch_rows
        self._n_batches = 0
        self._now_ms = START_MS
        keys = [zlib.crc32(str(user).encode()) for user in range(world.world.n_users)]
        self._user_keys = np.array(keys, np.uint32)
        self._codes = [codes.tobytes() for codes in world.codes]
        self.core = OnlineCore(settings, world.registry, world.bank)
        self.grouping_s = self.learning_s = 0.0
        """Seconds of processor time spent so far on groups, and on predicting and learning."""

    def save(self, store: Store) -> None:
        """Write everything that the core has learnt to an empty store."""
        changes = ChangeSet()
        self.core.write(changes)
        store.commit(changes)

    def bytes_per_product(self) -> float:
        """Return how much of what has been learnt belongs to products, in bytes by product; the model is apart."""
        changes = ChangeSet()
        self.core.write(changes)
        shared = {Table.LEARNER, Table.REPLAY, Table.ENCODERS, Table.META}
        size = sum(
            len(key) + len(value or b"") for table in Table if table not in shared for key, value in changes.of(table)
        )
        return size / self._world.n_products

    def branch(self, world: BenchWorld, store: Store) -> CoreRun:
        """Return another run that goes on from what was saved, in a world that may have changed."""
        other = CoreRun(world, self._settings, micro_batch_rows=self._micro_batch_rows)
        other._n_batches, other._now_ms = self._n_batches, self._now_ms
        with store.read() as txn:
            other.core.restore(txn)
        return other

    def work_off(self, impressions: Impressions) -> Iterator[tuple[Impressions, Ints, list[Shift]]]:
        """Work off impressions; yield every micro-batch, its users' groups (B,) and the shifts it completed."""
        for start in range(0, len(impressions), self._micro_batch_rows):
            batch = impressions.take(slice(start, start + self._micro_batch_rows))
            self._now_ms += MS_PER_IMPRESSION * len(batch)
            yield batch, *self._run(batch)

    def _run(self, batch: Impressions) -> tuple[Ints, list[Shift]]:
        core, registry = self.core, self._world.registry
        product_ids = [registry.product_ids[number] for number in batch.products.tolist()]
        core.bring_in(product_ids, None, self._now_ms, self._n_batches)
        started_s = time.process_time()
        group_ids = core.grouping.observe_many(
            product_ids,
            batch.products,
            self._world.codes[batch.users],
            self._user_keys[batch.users],
            self._now_ms,
            self._n_batches,
        )
        self.grouping_s += time.process_time() - started_s
        records = [
            ImpressionRecord(
                product_id,
                self._world.creative_ids[creative],
                self._codes[user],
                group_id,
                self._now_ms,
                0,
                None,
                None,
                bool(click),
                True,
            )
            for product_id, creative, user, group_id, click in zip(
                product_ids,
                batch.creatives.tolist(),
                batch.users.tolist(),
                group_ids.tolist(),
                batch.clicks.tolist(),
                strict=True,
            )
        ]
        core.count(records, [record for record in records if record.clicked], self._now_ms)
        started_s = time.process_time()
        shifts = core.learn(records, [], self._now_ms)
        learnt_s = time.process_time()
        core.regroup(self._now_ms, self._n_batches)
        self.learning_s += learnt_s - started_s
        self.grouping_s += time.process_time() - learnt_s
        self._n_batches += 1
        return group_ids, shifts

    def creative_spread(self) -> float:
        """Return how far the creatives of all products are spread, as far as the counts tell."""
        return creative_spread(self._totals(product) for product in range(self._world.n_products))

    def _totals(self, product: int) -> npt.NDArray[np.float64]:
        """Return the live impressions and clicks of a product's creatives, (2, C)."""
        product_id, numbers = self._world.registry.product_ids[product], self._world.creative_numbers[product]
        place = {self._world.creative_ids[number]: position for position, number in enumerate(numbers.tolist())}
        total = np.zeros((2, len(numbers)))
        for (_, creative_id), cell in self.core.counts.cells_of(product_id).items():
            total[:, place[creative_id]] += cell.live_impressions, cell.live_clicks
        return total

    def best_creatives(self, product: int, spread: float) -> tuple[int, dict[int, int]]:
        """Return a product's best creative for all, and for each group: places among its creatives.

        Best is by the posterior CTR that is served; ``spread`` is that of `creative_spread`.
        """
        product_id = self._world.registry.product_ids[product]
        numbers = [int(number) for number in self._world.creative_numbers[product]]
        creative_ids = [self._world.creative_ids[number] for number in numbers]
        groups = self.core.grouping.groups_of(product_id)
        for_all = shrink(*self._totals(product)[:, None], spread=spread)
        best_for_all = int(for_all.ctr[0].argmax())
        if groups is None or not groups.groups:
            return best_for_all, {}
        group_ids = [group.group_id for group in groups.groups]
        cells = self.core.counts.cells_of(product_id)
        impressions, clicks = np.zeros((2, len(group_ids), len(creative_ids)))
        for (group_id, creative_id), cell in cells.items():
            if group_id in group_ids:
                place = group_ids.index(group_id), creative_ids.index(creative_id)
                impressions[place], clicks[place] = cell.live_impressions, cell.live_clicks
        relative = self.core.expectations.relative_ctrs(
            product_id, self._world.registry.products[product_id].category, group_ids, numbers
        )
        ctrs = group_ctrs(for_all, impressions, clicks, relative, spread=spread, distinct=groups.distinct)
        best = ctrs.ctr.argmax(axis=1)
        return best_for_all, dict(zip(group_ids, best.tolist(), strict=True))

    def version(self, product: int) -> int:
        """Return the encoder version that a product's groups are of; 0 before it has any."""
        groups = self.core.grouping.groups_of(self._world.registry.product_ids[product])
        return 0 if groups is None else groups.encoder_version

    def groups(self, product: int, users: Ints) -> Ints:
        """Return the present groups of users for a product, (n,)."""
        return self.core.grouping.assign_many(
            self._world.registry.product_ids[product], product, self._world.codes[users]
        )
