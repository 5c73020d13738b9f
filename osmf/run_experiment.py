"""Run experiment: the arms of a demo side by side, over all of it and before and after tastes changed."""

from __future__ import annotations

import numpy as np

from online.significance import RatioInterval
from osmf import report_model as page
from osmf.findings import ArmCounts, arm_interval, arm_ratio, arm_tables, subtract_arms
from osmf.run_records import N_STREAM_POINTS, RunRecords, thin
from osmf.settings import Settings

ARM_TITLES = {"group": "best creative for the user's group", "all": "best creative for all"}


def build_experiment(
    settings: Settings, arms: ArmCounts, records: RunRecords
) -> tuple[page.Experiment | None, RatioInterval | None, RatioInterval | None]:
    """Return the arms for the report, and the ratio of their CTRs over all of the run and after tastes changed."""
    name, n_buckets = settings.serving.experiment, settings.online.counts.user_buckets
    ratio = arm_ratio(arms, name, n_buckets)
    if ratio is None:
        return None, None, None
    before = records.arms_at_shift
    after = None if before is None else subtract_arms(arms, before)
    ratio_before = None if before is None else arm_ratio(before, name, n_buckets)
    ratio_after = None if after is None else arm_ratio(after, name, n_buckets)
    shown = []
    for arm, title in ARM_TITLES.items():
        series = [
            page.ArmPoint(seconds=sample.seconds, ctr=_binomial(*sample.arms[arm]))
            for sample in thin(records.samples, N_STREAM_POINTS)
            if sample.arms[arm][0] >= 1_000
        ]
        shown.append(
            page.Arm(
                name=arm,
                title=title,
                all=_arm_counts(arms, name, arm, n_buckets),
                before=None if before is None else _arm_counts(before, name, arm, n_buckets),
                after=None if after is None else _arm_counts(after, name, arm, n_buckets),
                series=tuple(series),
            )
        )
    experiment = page.Experiment(
        arms=tuple(shown),
        baseline="all",
        treatment="group",
        ratio=_estimate(ratio),
        ratio_before=None if ratio_before is None else _estimate(ratio_before),
        ratio_after=None if ratio_after is None else _estimate(ratio_after),
    )
    return experiment, ratio, ratio_after


def _estimate(ratio: RatioInterval) -> page.Estimate:
    return page.Estimate(ratio.ratio, ratio.low, ratio.high)


def _arm_counts(arms: ArmCounts, experiment: str, arm: str, n_buckets: int) -> page.Counts:
    impressions, clicks = arm_tables(arms, experiment, arm, n_buckets)
    n = int(impressions.sum())
    return page.Counts(n, int(clicks.sum()), page.Estimate(*arm_interval(impressions, clicks)) if n else None)


def _binomial(n_impressions: int, n_clicks: int) -> page.Estimate:
    ctr = n_clicks / n_impressions
    error = 1.96 * float(np.sqrt(ctr * (1 - ctr) / n_impressions))
    return page.Estimate(ctr, max(ctr - error, 0.0), min(ctr + error, 1.0))
