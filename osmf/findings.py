"""Findings: what a run's state says at its end, beside the simulator's truth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from online.assignment import Assigner
from online.ctr import shrink
from online.ranking import mean_ndcg_between_groups, null_ndcg
from online.settings import OnlineSettings
from online.significance import RatioInterval, ratio_interval
from simulator.truth import Truth
from state.reading import StateView
from state.records import ArmRecord, Cell, ShiftRecord

Floats = npt.NDArray[np.float64]

ArmCounts = dict[tuple[str, str, int], ArmRecord]
CellCounts = dict[tuple[int, str], tuple[int, int]]

N_SEGMENT_USERS = 2_000


@dataclass(frozen=True)
class Agreement:
    """How far one product's groups agree with the truth.

    ``nmi`` is the normalised mutual information of groups and true segments over a sample of users,
    ``ari_batch`` the adjusted Rand index of the groups and of Algorithm 1 run in batch on the same
    embeddings, ``segments`` each group's shares of the true segments in words.
    """

    nmi: float
    ari_batch: float
    segments: dict[int, dict[str, float]]


def agreements(view: StateView, online: OnlineSettings, truth: Truth) -> dict[str, Agreement]:
    """Compare the groups of every grouped product with the simulator's segments, by product."""
    from sklearn.metrics import normalized_mutual_info_score

    from offline.reference import agreement, batch_groups

    assigner = Assigner(online)
    assigner.load(view)
    users = truth.users[:N_SEGMENT_USERS]
    attributes = [user.known_attributes for user in users]
    grouped = set(assigner.product_ids())
    found = {}
    for product in truth.products:
        if product.product_id not in grouped:
            continue
        groups = assigner.assign_many([product.product_id] * len(users), attributes)
        segments = [user.segments_at_end[product.category] for user in users]
        batch = batch_groups(
            assigner.embed_many(product.product_id, attributes),
            k_min=online.groups.k_min,
            k_max=online.groups.k_max,
            max_silhouette_rows=online.groups.reservoir_users,
        )
        taste = product.at_end
        words = _segment_words(taste.driver, taste.segment_of_value)
        shares: dict[int, Counter[str]] = defaultdict(Counter)
        for group, segment in zip(groups, segments, strict=True):
            if group is not None:
                shares[group][words[segment]] += 1
        found[product.product_id] = Agreement(
            float(normalized_mutual_info_score(segments, groups)),
            agreement([-1 if group is None else group for group in groups], batch.labels),
            {
                group: {word: count / sum(counts.values()) for word, count in counts.most_common()}
                for group, counts in shares.items()
            },
        )
    return found


def _segment_words(driver: str, segment_of_value: Mapping[str, int]) -> dict[int, str]:
    values: dict[int, list[str]] = defaultdict(list)
    for value, segment in segment_of_value.items():
        values[segment].append(value)
    return {
        segment: f"{driver.replace('_', ' ')} {names[0] if len(names) == 1 else f'{names[0]} to {names[-1]}'}"
        for segment, names in values.items()
    }


def cell_counts(cells: Sequence[Cell]) -> CellCounts:
    """Return a product's impressions and clicks for life, by (group, creative)."""
    return {(cell.group_id, cell.creative_id): (cell.n_impressions, cell.n_clicks) for cell in cells}


def counts_before(shift: ShiftRecord) -> CellCounts:
    """Return a product's counts at the time of a shift, by (group, creative)."""
    return {
        (group, creative): (n_impressions, n_clicks) for group, creative, n_impressions, n_clicks in shift.cells_before
    }


def subtract(later: CellCounts, earlier: CellCounts) -> CellCounts:
    """Return what was counted between two times; a cell that was handed on in between counts from zero."""
    difference = {}
    for key, (n_impressions, n_clicks) in later.items():
        before = earlier.get(key, (0, 0))
        difference[key] = (max(n_impressions - before[0], 0), max(n_clicks - before[1], 0))
    return difference


def count_tables(counts: CellCounts, group_ids: Sequence[int], creative_ids: Sequence[str]) -> tuple[Floats, Floats]:
    """Return impressions and clicks as tables, (G, C)."""
    shape = (len(group_ids), len(creative_ids))
    impressions, clicks = np.zeros(shape), np.zeros(shape)
    for row, group in enumerate(group_ids):
        for column, creative in enumerate(creative_ids):
            impressions[row, column], clicks[row, column] = counts.get((group, creative), (0, 0))
    return impressions, clicks


def shrunk_intervals(
    counts: CellCounts, group_ids: Sequence[int], creative_ids: Sequence[str]
) -> dict[tuple[int, str], tuple[float, float, float]]:
    """Return the shrunk CTR with its 95% interval of every cell: (ctr, low, high)."""
    if not group_ids or not creative_ids:
        return {}
    shrunk = shrink(*count_tables(counts, group_ids, creative_ids))
    return {
        (group, creative): (
            float(shrunk.ctr[row, column]),
            float(shrunk.ctr_low[row, column]),
            float(shrunk.ctr_high[row, column]),
        )
        for row, group in enumerate(group_ids)
        for column, creative in enumerate(creative_ids)
    }


def group_difference(
    counts: CellCounts, group_ids: Sequence[int], creative_ids: Sequence[str], rng: np.random.Generator
) -> tuple[float, float] | None:
    """Return NDCG@5 between a product's groups, and of a random split of the same sizes; None for one group."""
    impressions, clicks = count_tables(counts, group_ids, creative_ids)
    between = mean_ndcg_between_groups(impressions, clicks)
    by_chance = null_ndcg(impressions, clicks, rng, n_splits=5)
    return None if between is None or by_chance is None else (between, by_chance)


def arm_tables(arms: ArmCounts, experiment: str, arm: str, n_buckets: int) -> tuple[Floats, Floats]:
    """Return an arm's impressions and clicks by bucket of users, (n_buckets,)."""
    impressions, clicks = np.zeros(n_buckets), np.zeros(n_buckets)
    for (name, which, bucket), record in arms.items():
        if (name, which) == (experiment, arm):
            impressions[bucket], clicks[bucket] = record.n_impressions, record.n_clicks
    return impressions, clicks


def subtract_arms(later: ArmCounts, earlier: ArmCounts) -> ArmCounts:
    """Return what the arms counted between two times."""
    none = ArmRecord(0, 0)
    return {
        key: ArmRecord(
            record.n_impressions - earlier.get(key, none).n_impressions,
            record.n_clicks - earlier.get(key, none).n_clicks,
        )
        for key, record in later.items()
    }


def arm_ratio(arms: ArmCounts, experiment: str, n_buckets: int) -> RatioInterval | None:
    """Return the group arm's CTR over the one-for-all arm's, or None before both have clicks."""
    group = arm_tables(arms, experiment, "group", n_buckets)
    everyone = arm_tables(arms, experiment, "all", n_buckets)
    if not group[1].sum() or not everyone[1].sum():
        return None
    return ratio_interval(*group, *everyone)


def arm_interval(impressions: Floats, clicks: Floats) -> tuple[float, float, float]:
    """Return an arm's CTR with its 95% interval over the buckets of users (jackknife of the ratio)."""
    total_n, total_x = float(impressions.sum()), float(clicks.sum())
    if not total_n:
        return 0.0, 0.0, 1.0
    ctr = total_x / total_n
    left_n, left_x = total_n - impressions, total_x - clicks
    left = left_x[left_n > 0] / left_n[left_n > 0]
    error = float(np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())) if len(left) > 1 else ctr
    return ctr, max(0.0, ctr - 1.96 * error), min(1.0, ctr + 1.96 * error)
