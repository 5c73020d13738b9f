"""Benchmark of changing tastes: how soon they are found, how soon groups are true again, and what else is disturbed.

Every world is learnt up to the change once. From there three runs go on over the same users, products and
creatives: one in which nothing changes, one in which the segments of two categories swap their tastes, and one in
which another attribute decides them. How soon a change is found depends on some dozens of clicks, so that it is
measured in further, shorter runs from the change on, which see other impressions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.core_run import CoreRun
from benchmarks.learn import predict
from benchmarks.measured import Measured, over_runs, seeds_of
from benchmarks.worlds import BenchWorld, Ints, bench_world
from online.settings import OnlineSettings
from simulator.settings import ShiftKind, SimulatorSettings
from state.store import Store

MICRO_BATCH_ROWS: Final = 1_024
N_CATEGORIES: Final = 2
"""Categories whose tastes change."""

TRUE_NMI: Final = 0.8
"""Agreement with the true segments from which groups count as true again."""

SOON: Final = 1_500
"""Impressions of a category within which a change is to be found."""

NMI_EVERY_BATCHES: Final = 10
N_USERS: Final = 1_000
"""Users whose groups are compared with their segments."""

KINDS: Final[tuple[ShiftKind, ...]] = ("swap", "driver")


@dataclass(frozen=True)
class ShiftRun:
    """One world of the benchmark: impressions up to the change, and from it on.

    Of ``n_redraws`` shorter runs each sees up to ``n_redrawn`` impressions.
    """

    world: SimulatorSettings
    n_before: int
    n_after: int
    n_held_out: int
    n_redraws: int
    n_redrawn: int


RUN: Final = ShiftRun(bench_world(mean_ctr=0.06), 400_000, 350_000, 100_000, 8, 40_000)
QUICK_RUN: Final = ShiftRun(RUN.world, 120_000, 30_000, 30_000, 1, 30_000)


def bench_shift(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    run: ShiftRun | None = None,
    online: OnlineSettings | None = None,
) -> Measured:
    """Change the tastes of two categories and watch.

    Metrics, with ``swap_`` and ``driver_`` in front: ``impressions_to_detect``, of the category, up to the first shift
    that names one of its products (a category not found counts with all of its impressions in the run), the median
    over the changed categories and all runs, with ``_first`` and ``_last`` the medians of the category found soonest
    and latest; ``found_share`` of the categories in the long run, and ``soon_share`` found within 1,500, in all
    runs; ``impressions_to_nmi`` of the category until its groups agree with the
    new segments by 0.8 and ``nmi_share`` of the categories where they did; ``nmi`` of the changed categories at the
    end and ``others_nmi`` of the unchanged; ``others_auroc_loss``, the AUROC of held-out impressions of unchanged
    categories less than in the run without a change. ``false_alarms_per_million``: alarms by million impressions of
    categories in which nothing changed, in all runs (one alarm may name several products of a category);
    ``nmi_before`` of all categories when the change comes.

    Parameters
    ----------
    quick
        A shorter run, with one seed unless others are named.
    seeds
        Seeds of the worlds; default: the reporting seeds.
    run, online
        Another world and other settings; the world's seed is replaced by those of ``seeds``.
    """
    online = OnlineSettings() if online is None else online
    chosen = run or (QUICK_RUN if quick else RUN)
    return over_runs({"": chosen}, seeds_of(seeds, quick=quick), lambda run, seed: _shift(run, seed, online))


@dataclass
class _Watched:
    """What was seen of one run from the change on; categories by name."""

    impressions: dict[str, int]
    shifts: list[tuple[str, int]]
    nmi: dict[str, list[tuple[int, float]]]
    auroc_others: float

    def first_shift(self, category: str) -> int | None:
        return next((after for name, after in self.shifts if name == category), None)

    def first_true(self, category: str) -> int | None:
        """Return after how many impressions the groups agree with the segments for good (two times on end)."""
        points = self.nmi[category]
        for position, (after, nmi) in enumerate(points):
            if nmi >= TRUE_NMI and points[min(position + 1, len(points) - 1)][1] >= TRUE_NMI:
                return after
        return None


def _shift(run: ShiftRun, seed: int, online: OnlineSettings) -> dict[str, float]:
    import torch

    torch.set_num_threads(online.torch_threads)
    world = BenchWorld(run.world.model_copy(update={"seed": seed}), online)
    changed = world.world.draw_categories(N_CATEGORIES, np.random.default_rng([seed, 3]))
    course = CoreRun(world, online, micro_batch_rows=MICRO_BATCH_ROWS)
    n_false, n_exposed = 0, run.n_before
    for _, _, shifts in course.work_off(world.draw(run.n_before, np.random.default_rng([seed, 6]))):
        n_false += len({world.category(shift.product_id) for shift in shifts})
    figures = {"nmi_before": float(np.mean(list(_nmi(course, world).values())))}
    with tempfile.TemporaryDirectory(prefix="osmf-bench-") as folder, Store(Path(folder), sync=False) as store:
        course.save(store)
        control = _watch(run, seed, course.branch(world, store), world, changed)
        runs, redrawn = {}, {}
        for kind in KINDS:
            after = world.shifted(changed, kind)
            runs[kind] = _watch(run, seed, course.branch(after, store), after, changed)
            redrawn[kind] = [
                _detect(run, [seed, 14, draw], partial(course.branch, after, store), after, changed)
                for draw in range(run.n_redraws)
            ]
    n_false += len(set(control.shifts))
    n_exposed += sum(control.impressions.values())
    for kind, watched in runs.items():
        figures |= {f"{kind}_{name}": value for name, value in _figures(watched, changed, redrawn[kind]).items()}
        figures[f"{kind}_others_auroc_loss"] = control.auroc_others - watched.auroc_others
        n_false += sum(category not in changed for category, _ in set(watched.shifts))
        n_exposed += sum(count for category, count in watched.impressions.items() if category not in changed)
    return figures | {"false_alarms_per_million": 1e6 * n_false / n_exposed}


def _figures(watched: _Watched, changed: Sequence[str], redrawn: list[list[int]]) -> dict[str, float]:
    found = [watched.first_shift(category) for category in changed]
    true = [watched.first_true(category) for category in changed]
    seen = [watched.impressions[category] for category in changed]
    in_long_run = [s if f is None else f for f, s in zip(found, seen, strict=True)]
    detected = np.array([in_long_run, *redrawn])  # (runs, categories)
    by_category = np.median(detected, axis=0)
    at_end = {category: points[-1][1] for category, points in watched.nmi.items()}
    return {
        "impressions_to_detect": float(np.median(detected)),
        "impressions_to_detect_first": float(by_category.min()),
        "impressions_to_detect_last": float(by_category.max()),
        "found_share": float(np.mean([f is not None for f in found])),
        "soon_share": float((detected <= SOON).mean()),
        "impressions_to_nmi": float(np.median([s if t is None else t for t, s in zip(true, seen, strict=True)])),
        "nmi_share": float(np.mean([t is not None for t in true])),
        "nmi": float(np.mean([at_end[category] for category in changed])),
        "others_nmi": float(np.mean([nmi for category, nmi in at_end.items() if category not in changed])),
    }


def _detect(
    run: ShiftRun, seeds: Sequence[int], branch: Callable[[], CoreRun], world: BenchWorld, changed: Sequence[str]
) -> list[int]:
    """Return after how many of its impressions each changed category was found; all of them if it was not."""
    categories = np.array(world.world.product_categories)
    seen, found = dict.fromkeys(changed, 0), dict[str, int]()
    for batch, _, shifts in branch().work_off(world.draw(run.n_redrawn, np.random.default_rng(seeds))):
        for category in changed:
            seen[category] += int((categories[batch.products] == category).sum())
        for category in {world.category(shift.product_id) for shift in shifts} & set(changed):
            found.setdefault(category, seen[category])
        if len(found) == len(changed):
            break
    return [found.get(category, seen[category]) for category in changed]


def _watch(run: ShiftRun, seed: int, course: CoreRun, world: BenchWorld, changed: Sequence[str]) -> _Watched:
    from sklearn.metrics import roc_auc_score

    categories = np.array(world.world.product_categories)
    watched = _Watched(dict.fromkeys(categories.tolist(), 0), [], {}, 0.0)
    impressions = world.draw(run.n_after, np.random.default_rng([seed, 7]))
    for position, (batch, _, shifts) in enumerate(course.work_off(impressions)):
        for category, count in zip(*np.unique(categories[batch.products], return_counts=True), strict=True):
            watched.impressions[str(category)] += int(count)
        for shift in shifts:
            category = world.category(shift.product_id)
            watched.shifts.append((category, watched.impressions[category]))
        if position % NMI_EVERY_BATCHES == NMI_EVERY_BATCHES - 1:
            for category, nmi in _nmi(course, world).items():
                watched.nmi.setdefault(category, []).append((watched.impressions[category], nmi))
    held_out = world.draw(run.n_held_out, np.random.default_rng([seed, 8]))
    held_out = held_out.take(~np.isin(categories[held_out.products], changed))
    watched.auroc_others = float(
        roc_auc_score(held_out.clicks, predict(course.core.learner, world.rows(held_out).rows))
    )
    return watched


def _nmi(course: CoreRun, world: BenchWorld) -> dict[str, float]:
    """Return how far the present groups agree with the true segments, the mean over each category's products."""
    from sklearn.metrics import normalized_mutual_info_score

    users: Ints = np.arange(min(N_USERS, world.world.n_users))
    by_category: dict[str, list[float]] = {}
    for product, category in enumerate(world.world.product_categories):
        nmi = normalized_mutual_info_score(world.segments(product)[users], course.groups(product, users))
        by_category.setdefault(category, []).append(float(nmi))
    return {category: float(np.mean(values)) for category, values in by_category.items()}
