"""Benchmark of groups: how true, how stable and how few they are after one pass over simulated worlds.

The whole core goes through impressions of creatives shown by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.core_run import CoreRun
from benchmarks.learn import of_form, predict
from benchmarks.measured import Measured, over_runs, seeds_of
from benchmarks.value import RUNS as VALUE_RUNS
from benchmarks.value import stream_rng, value_figures
from benchmarks.worlds import BenchWorld, Ints, bench_world
from offline.reference import BatchGroups, agreement, batch_groups
from online.clustering import Floats, choose_k
from online.ranking import mean_ndcg_between_groups, null_ndcg
from online.settings import ModelForm, OnlineSettings
from simulator.settings import SimulatorSettings

MICRO_BATCH_ROWS: Final = 1_024
N_USERS: Final = 2_000
"""Users whose groups are compared with their segments and with batch clustering."""

N_CHURN_USERS: Final = 500
"""Users whose group is looked at after every regrouping."""

N_HELD_OUT: Final = 50_000


@dataclass(frozen=True)
class GroupRun:
    """One world of the benchmark, how many impressions are learnt, and by which form of the model.

    On the way, after ``rated_per_product`` impressions a product, its choices are rated as in `benchmarks.value`.
    """

    world: SimulatorSettings
    n_impressions: int
    form: ModelForm = "shipped"
    rated_per_product: tuple[int, ...] = ()


# The paper's form takes long: the two forms are compared after fewer impressions.
RUNS: Final[Mapping[str, GroupRun]] = {
    "": GroupRun(VALUE_RUNS[""].world, 600_000, rated_per_product=VALUE_RUNS[""].impressions_per_product),
    "flat_": GroupRun(
        VALUE_RUNS["flat_"].world, 600_000, rated_per_product=VALUE_RUNS["flat_"].impressions_per_product
    ),
    "short_": GroupRun(bench_world(mean_ctr=0.06), 60_000),
    "paper_": GroupRun(bench_world(mean_ctr=0.06), 60_000, "paper"),
}
QUICK_RUNS: Final[Mapping[str, GroupRun]] = {"": GroupRun(bench_world(mean_ctr=0.06), 100_000)}


def bench_group(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    runs: Mapping[str, GroupRun] | None = None,
    online: OnlineSettings | None = None,
) -> Measured:
    """Group the users of simulated worlds in one pass.

    Metrics, those of the further runs with their prefix (``flat_``: a world whose users do not differ; ``paper_`` and
    ``short_``: the paper's form of the model, clustering e_{u|t}, and the shipped one after the same impressions):
    ``nmi`` of the groups with the true segments and ``ari_batch`` with Algorithm 1 run in batch on the same embeddings,
    means over products; ``ari_batch_same_rule`` with the same, but for the stream's rule for K, the fewest groups whose
    silhouette is as good (``online.groups.k_tolerance``): what is lost by streaming alone; ``k_near_share`` of the
    products whose K is within 1 of the number of segments; ``k1_share`` of those whose users count as one group (no
    group, one, or groups whose preferences the test does not tell apart); ``id_churn``, the share of users whose group
    has another id after a regrouping, in the second half; ``ndcg_between_groups`` of their creatives by shrunk CTR and
    ``ndcg_null_split``, the same of random halves; and the ``auroc`` on held-out impressions. ``grouping_cost_ratio``
    is the processor time spent on groups by that spent on predicting and learning, ``bytes_per_product`` what is kept
    of a product in memory and in the state, without the model.
    The first two runs are those of `benchmarks.value` gone on with, whose figures they give too, to the last digit.

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
    return over_runs(chosen, seeds_of(seeds, quick=quick), lambda run, seed: _group(run, seed, online))


def _group(run: GroupRun, seed: int, online: OnlineSettings) -> dict[str, float]:
    import torch
    from sklearn.metrics import roc_auc_score

    torch.set_num_threads(online.torch_threads)
    settings = of_form(online, run.form)
    world = BenchWorld(run.world.model_copy(update={"seed": seed}), settings)
    course = CoreRun(world, settings, micro_batch_rows=MICRO_BATCH_ROWS)
    rng = stream_rng(seed)
    figures = dict(value_figures(course, world, run.rated_per_product, rng))
    figures["id_churn"] = _churn(run, course, world, rng)
    figures["grouping_cost_ratio"] = course.grouping_s / course.learning_s
    figures["bytes_per_product"] = course.bytes_per_product()
    held_out = world.draw(N_HELD_OUT, np.random.default_rng([seed, 13]))
    predicted = predict(course.core.learner, world.rows(held_out).rows)
    figures["auroc"] = float(roc_auc_score(held_out.clicks, predicted))
    products = [_rate(course, world, product, settings) for product in range(world.n_products)]
    for name in products[0]:
        values = [product[name] for product in products if product[name] is not None]
        if values:
            figures[name] = float(np.mean(np.asarray(values, np.float64)))
    return figures


def _churn(run: GroupRun, course: CoreRun, world: BenchWorld, rng: np.random.Generator) -> float:
    """Go through the impressions left; return how many of the users change their group's id in a regrouping."""
    users: Ints = np.arange(min(N_CHURN_USERS, world.world.n_users))
    n_seen = max(run.rated_per_product, default=0) * world.n_products
    impressions = world.draw(run.n_impressions - n_seen, rng)
    before: dict[int, tuple[int, Ints]] = {}
    changed = []
    for batch, _, _ in course.work_off(impressions):
        n_seen += len(batch)
        if 2 * n_seen < run.n_impressions:
            continue
        for product in range(world.n_products):
            version = course.version(product)
            if product in before and before[product][0] == version:
                continue
            groups = course.groups(product, users)
            if product in before:
                changed.append(float((groups != before[product][1]).mean()))
            before[product] = (version, groups)
    return float(np.mean(changed)) if changed else 0.0


def _rate(course: CoreRun, world: BenchWorld, product: int, online: OnlineSettings) -> dict[str, float | None]:
    from sklearn.metrics import normalized_mutual_info_score

    product_id = world.registry.product_ids[product]
    grouping = course.core.grouping
    groups = grouping.groups_of(product_id)
    distinct = groups is not None and len(groups.groups) > 1 and groups.distinct
    if groups is None or len(groups.groups) < 2:
        return {"k1_share": 1.0, "nmi": 0.0} | _no_agreement() | _no_ndcg()
    users: Ints = np.arange(min(N_USERS, world.world.n_users))
    segments, assigned = world.segments(product)[users], course.groups(product, users)
    embedded = grouping.embed_many(product_id, product, world.codes[users])
    batch = batch_groups(embedded, k_min=online.groups.k_min, k_max=online.groups.k_max)
    same_rule = _by_rule(batch, embedded, online.groups.k_tolerance)
    return {
        "k1_share": float(not distinct),
        "nmi": float(normalized_mutual_info_score(segments, assigned)),
        "ari_batch": agreement(assigned.tolist(), batch.labels),
        "ari_batch_same_rule": agreement(assigned.tolist(), same_rule.labels),
        "k_near_share": float(abs(len(groups.groups) - len(np.unique(segments))) <= 1),
    } | _ndcg(course, product_id)


def _by_rule(batch: BatchGroups, embedded: Floats, k_tolerance: float) -> BatchGroups:
    """Return the batch groups of the fewest whose silhouette is as good."""
    k = choose_k(batch.silhouettes, None, k_tolerance, 0.0) if batch.silhouettes else batch.k
    return batch if k == batch.k else batch_groups(embedded, k_min=k, k_max=k)


def _no_agreement() -> dict[str, float | None]:
    return {"ari_batch": None, "ari_batch_same_rule": None, "k_near_share": None}


def _no_ndcg() -> dict[str, float | None]:
    return {"ndcg_between_groups": None, "ndcg_null_split": None}


def _ndcg(course: CoreRun, product_id: str) -> dict[str, float | None]:
    impressions, clicks, creative_ids = course.core.table(product_id, live=False)
    if not creative_ids:
        return _no_ndcg()
    chance = null_ndcg(impressions, clicks, np.random.default_rng(0), n_splits=5)
    return {"ndcg_between_groups": mean_ndcg_between_groups(impressions, clicks), "ndcg_null_split": chance}
