"""Benchmark of value: what showing each group its best creative is worth, against the impressions seen.

The whole core goes through a simulated world whose creatives are shown by chance. At some counts of impressions a
product the creatives that it would show are rated by the true CTRs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.core_run import CoreRun
from benchmarks.measured import Measured, over_runs, seeds_of
from benchmarks.worlds import BenchWorld, Ints, bench_world
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings

Floats = npt.NDArray[np.float64]

MICRO_BATCH_ROWS: Final = 1_024


@dataclass(frozen=True)
class ValueRun:
    """One world of the benchmark, and at how many impressions a product its choices are rated."""

    world: SimulatorSettings
    impressions_per_product: tuple[int, ...]


RUNS: Final[Mapping[str, ValueRun]] = {
    "": ValueRun(bench_world(mean_ctr=0.06), (300, 600, 1_250, 2_500, 6_250)),
    "sparse_": ValueRun(bench_world(mean_ctr=0.015), (600, 1_250, 2_500, 6_250, 12_500)),
    "flat_": ValueRun(bench_world(mean_ctr=0.06, taste_strength=0.0), (300, 1_250, 6_250)),
}
QUICK_RUNS: Final[Mapping[str, ValueRun]] = {
    "": ValueRun(bench_world(mean_ctr=0.06), (300, 1_250)),
}


def bench_value(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    runs: Mapping[str, ValueRun] | None = None,
    online: OnlineSettings | None = None,
) -> Measured:
    """Rate what the core would show after some impressions a product.

    Metrics, those of the further worlds with their prefix (``sparse_``: 1.5% CTR, ``flat_``: no user differs), each
    with the impressions a product at its end: ``group_share``, the uplift of showing every group its best creative by
    shrunk live CTR over a uniform choice, as a share of the uplift of an oracle that knows each segment's best;
    ``all_share``, the same for the best creative for all; ``excess``, the first less the second. ``oracle_uplift`` is
    the oracle's relative uplift. Means over products are of CTRs, before the share is taken.

    Parameters
    ----------
    quick
        A shorter run of the first world, with one seed unless others are named.
    seeds
        Seeds of the worlds; default: the reporting seeds.
    runs, online
        Other worlds and settings; each world's seed is replaced by those of ``seeds``.
    """
    online = OnlineSettings() if online is None else online
    chosen = runs or (QUICK_RUNS if quick else RUNS)
    return over_runs(chosen, seeds_of(seeds, quick=quick), lambda run, seed: dict(_figures(run, seed, online)))


def _figures(run: ValueRun, seed: int, online: OnlineSettings) -> Iterator[tuple[str, float]]:
    import torch

    torch.set_num_threads(online.torch_threads)
    world = BenchWorld(run.world.model_copy(update={"seed": seed}), online)
    course = CoreRun(world, online, micro_batch_rows=MICRO_BATCH_ROWS)
    yield from value_figures(course, world, run.impressions_per_product, stream_rng(seed))


def stream_rng(seed: int) -> np.random.Generator:
    """Return what a world's impressions are drawn by: `benchmarks.groups` goes through the same."""
    return np.random.default_rng([seed, 9])


def value_figures(
    course: CoreRun, world: BenchWorld, impressions_per_product: Sequence[int], rng: np.random.Generator
) -> Iterator[tuple[str, float]]:
    """Go through impressions up to the last of some counts a product; yield the figures at each of them."""
    n_seen = 0
    for per_product in impressions_per_product:
        n_more = per_product * world.n_products - n_seen
        for _ in course.work_off(world.draw(n_more, rng)):
            pass
        n_seen += n_more
        spread = course.creative_spread()
        rated = [_rate(course, world, product, spread) for product in range(world.n_products)]
        uniform, oracle, by_group, for_all = np.mean(rated, axis=0)
        possible = oracle - uniform
        yield f"group_share_{per_product}", (by_group - uniform) / possible
        yield f"all_share_{per_product}", (for_all - uniform) / possible
        yield f"excess_{per_product}", (by_group - for_all) / possible
        if per_product == impressions_per_product[-1]:
            yield "oracle_uplift", float(oracle / uniform - 1)


def _rate(course: CoreRun, world: BenchWorld, product: int, spread: float) -> tuple[float, float, float, float]:
    """Return a product's expected CTR: uniform choice, oracle by segment, best by group, best for all."""
    ctrs = world.segment_ctrs(product)  # (S, C)
    users: Ints = np.arange(world.world.n_users)
    segments = world.segments(product)  # (U,)
    for_all, by_group = course.best_creatives(product, spread)
    chosen = np.full(len(users), for_all)
    if by_group:
        chosen = np.array([by_group.get(group, for_all) for group in course.groups(product, users).tolist()])
    return (
        float(ctrs.mean(axis=1)[segments].mean()),
        float(ctrs.max(axis=1)[segments].mean()),
        float(ctrs[segments, chosen].mean()),
        float(ctrs[segments, for_all].mean()),
    )
