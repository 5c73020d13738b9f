"""A run of the online core on a simulated world: impressions in, labelled at once, in micro-batches."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from benchmarks.worlds import START_MS, BenchWorld, Impressions, Ints
from online.core import OnlineCore
from online.ctr import shrink
from online.settings import OnlineSettings
from online.shift import Shift
from state.records import ImpressionRecord
from state.store import ChangeSet, Store

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

    def save(self, store: Store) -> None:
        """Write everything that the core has learnt to an empty store."""
        changes = ChangeSet()
        self.core.write(changes)
        store.commit(changes)

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
        group_ids = core.grouping.observe_many(
            product_ids,
            batch.products,
            self._world.codes[batch.users],
            self._user_keys[batch.users],
            self._now_ms,
            self._n_batches,
        )
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
        shifts = core.learn(records, [], self._now_ms)
        core.regroup(self._now_ms, self._n_batches)
        self._n_batches += 1
        return group_ids, shifts

    def best_creatives(self, product: int) -> tuple[int, dict[int, int]]:
        """Return a product's best creative for all, and for each group where groups differ: places among its creatives.

        Best is by shrunk live CTR, as served.
        """
        product_id = self._world.registry.product_ids[product]
        creative_ids = [self._world.creative_ids[number] for number in self._world.creative_numbers[product]]
        groups = self.core.grouping.groups_of(product_id)
        total = np.zeros((2, 1, len(creative_ids)))
        for (_, creative_id), cell in self.core.counts.cells_of(product_id).items():
            total[:, 0, creative_ids.index(creative_id)] += cell.live_impressions, cell.live_clicks
        for_all = int(shrink(*total).ctr[0].argmax())
        if groups is None or not groups.distinct:
            return for_all, {}
        impressions, clicks, shown_ids = self.core.table(product_id, live=True)
        best = shrink(impressions, clicks).ctr.argmax(axis=1)
        return for_all, {
            group.group_id: creative_ids.index(shown_ids[column])
            for group, column in zip(groups.groups, best.tolist(), strict=True)
        }

    def version(self, product: int) -> int:
        """Return the encoder version that a product's groups are of; 0 before it has any."""
        groups = self.core.grouping.groups_of(self._world.registry.product_ids[product])
        return 0 if groups is None else groups.encoder_version

    def groups(self, product: int, users: Ints) -> Ints:
        """Return the present groups of users for a product, (n,)."""
        return self.core.grouping.assign_many(
            self._world.registry.product_ids[product], product, self._world.codes[users]
        )
