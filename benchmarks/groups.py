"""How true the groups are after one pass over a simulated log, and whether equal users are left as one group."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.evaluate import evaluate_groups
from benchmarks.log import simulate_log, simulator_settings, work_off
from benchmarks.measured import QUICK_SEEDS, REPORTING_SEEDS, Measured, over_seeds
from online.settings import OnlineSettings
from online.worker import build_pipeline
from simulator.settings import SimulatorSettings
from simulator.truth import Truth, write_json
from state.reading import StateView, open_view
from state.store import Store
from streams.settings import StreamSettings

N_IMPRESSIONS: Final = 600_000
N_QUICK_IMPRESSIONS: Final = 100_000


def bench_group(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    simulator: SimulatorSettings | None = None,
    online: OnlineSettings | None = None,
    flat_world: bool | None = None,
) -> Measured:
    """Group the users of simulated worlds in one pass of the whole pipeline.

    Metrics: ``nmi`` of the groups with the true segments and ``ari_batch`` with Algorithm 1 run in batch on the same
    embeddings, means over the grouped products; those of `osmf eval groups`; and ``k1_share``,
    the share of the products whose users count as one group in a world whose segments do not differ (no group, one
    group, or groups whose preferences the test does not tell apart). A metric without grouped products is left out.

    Parameters
    ----------
    quick
        A shorter log of a smaller world, one seed unless others are named, and no world without differences.
    seeds
        Seeds of the worlds; default: the reporting seeds.
    simulator, online
        Other logs and models; ``simulator.seed`` is replaced by each of the seeds.
    flat_world
        Whether the world without differences is run too; default: only if not quick.
    """
    online = OnlineSettings() if online is None else online
    if simulator is None:
        simulator = simulator_settings(N_QUICK_IMPRESSIONS if quick else N_IMPRESSIONS, quick=quick)
    with_flat = not quick if flat_world is None else flat_world
    runs = {}
    for seed in seeds or (QUICK_SEEDS if quick else REPORTING_SEEDS):
        world = simulator.model_copy(update={"seed": seed})
        runs[seed] = _group(world, online, quick=quick)
        if with_flat:
            flat = world.world.model_copy(update={"taste_strength": 0.0})
            runs[seed]["k1_share"] = _k1_share(world.model_copy(update={"world": flat}), online)
    return over_seeds(runs)


def _group(simulator: SimulatorSettings, online: OnlineSettings, *, quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="osmf-bench-") as name:
        folder = Path(name)
        with Store(folder / "state", sync=False) as store:
            write_json(folder / "truth.json", _run(simulator, online, store))
        return evaluate_groups(folder / "state", folder / "truth.json", online, quick=quick).metrics


def _k1_share(simulator: SimulatorSettings, online: OnlineSettings) -> float:
    with tempfile.TemporaryDirectory(prefix="osmf-bench-") as folder, Store(Path(folder), sync=False) as store:
        _run(simulator, online, store)
        with open_view(store) as view:
            return k1_share(view)


def k1_share(view: StateView) -> float:
    """Return the share of the products whose users count as one group."""
    groupings = [view.groups(product.product_id) for product in view.products()]
    n_one = sum(grouping is None or len(grouping.groups) < 2 or not grouping.distinct for grouping in groupings)
    return n_one / len(groupings)


def _run(simulator: SimulatorSettings, online: OnlineSettings, store: Store) -> Truth:
    import torch

    torch.set_num_threads(online.torch_threads)
    streams = StreamSettings()
    log = simulate_log(simulator, streams)
    work_off(build_pipeline(streams, online), log.messages, streams, store)
    return log.truth
