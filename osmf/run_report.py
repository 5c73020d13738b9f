"""Run report: the report and the summary of a demo, from its state, its truth and what was watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np

from offline.runs import RunRecord
from online.metrics import MetricPoint
from online.significance import RatioInterval
from osmf import report_model as page
from osmf.figures import Figures, commit, device
from osmf.findings import (
    Agreement,
    ArmCounts,
    CellCounts,
    agreements,
    arm_interval,
    arm_ratio,
    arm_tables,
    cell_counts,
    counts_before,
    group_difference,
    shrunk_intervals,
    subtract,
    subtract_arms,
)
from osmf.settings import Settings
from simulator.truth import PolicyTruth, Truth
from state.reading import StateView
from state.records import CreativeRecord, GroupRecord, ShiftRecord

N_STREAM_POINTS = 240
N_SHOWCASE = 3
ARM_TITLES = {"group": "best creative for the user's group", "all": "best creative for all"}


@dataclass(frozen=True, kw_only=True)
class StreamSample:
    """The stream at one moment of the run; ``arms`` holds each arm's impressions and clicks so far."""

    seconds: float
    rate_events_s: float
    lag: int
    metrics: MetricPoint | None
    n_groups: int
    n_consumed: int
    arms: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """What was watched of a run, in seconds since its start."""

    command: str
    started_at_ms: int
    seconds: float
    samples: Sequence[StreamSample]
    arms_at_shift: ArmCounts | None
    shifted_seconds: float | None
    shift_seconds: Mapping[str, float]
    creative_seconds: Mapping[str, float]
    dead_letters: Mapping[str, int]
    runs: Sequence[RunRecord]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The figures behind the report."""

    agreements: Mapping[str, Agreement]
    differences: Mapping[str, tuple[float, float]]
    ratio: RatioInterval | None
    ratio_after: RatioInterval | None
    shifts: Sequence[ShiftRecord]
    n_grouped: int
    n_distinct: int
    n_consumed: int
    n_used: int
    n_duplicates: int
    n_dead_letters: int
    rate_events_s: float
    max_lag: int


def build_report(
    settings: Settings, view: StateView, truth: Truth, records: RunRecords
) -> tuple[page.Report, Findings]:
    """Build the report of a run, and the figures behind it.

    Parameters
    ----------
    settings
        The settings of the run.
    view
        The state at its end.
    truth, records
        The simulator's truth, and what was watched.
    """
    found = agreements(view, settings.online, truth)
    shifts = view.shifts()
    products, differences, n_distinct = _products(settings, view, truth, records, found, shifts)
    experiment, ratio, ratio_after = _experiment(settings, view.arms(), records)
    topics = settings.streams.topics
    offsets = {key: record for key, record in view.offsets().items() if key[0] in (topics.impressions, topics.clicks)}
    points = [sample.metrics for sample in records.samples if sample.metrics is not None]
    moving = [sample for sample in records.samples if sample.rate_events_s > 0]
    findings = Findings(
        agreements=found,
        differences=differences,
        ratio=ratio,
        ratio_after=ratio_after,
        shifts=shifts,
        n_grouped=sum(len(product.groups) > 1 for product in products),
        n_distinct=n_distinct,
        n_consumed=sum(record.n_consumed for record in offsets.values()),
        n_used=sum(record.n_used for record in offsets.values()),
        n_duplicates=sum(record.n_duplicates for record in offsets.values()),
        n_dead_letters=sum(record.n_dead_letters for record in view.offsets().values()),
        rate_events_s=float(np.median([sample.rate_events_s for sample in moving])) if moving else 0.0,
        max_lag=max((sample.lag for sample in records.samples), default=0),
    )
    header = page.RunHeader(
        title="OSMF demo",
        command=f"osmf {records.command}",
        commit=commit(),
        started_at_ms=records.started_at_ms,
        seconds=records.seconds,
        event_start_ms=truth.started_at_ms,
        event_end_ms=truth.ended_at_ms,
        n_products=len(products),
        n_impressions=sum(cell.n_impressions for cell in view.cells()),
        n_clicks=sum(cell.n_clicks for cell in view.cells()),
        n_consumed=findings.n_consumed,
        n_produced=truth.produced["impressions"] + truth.produced["clicks"],
        n_spoiled=sum(truth.spoiled.values()),
        dead_letters=dict(records.dead_letters),
        rate_events_s=findings.rate_events_s,
        seeds={"world": settings.simulator.seed, "model": settings.online.seed},
        device=device(),
    )
    report = page.Report(
        header=header,
        stream=_stream(records.samples),
        moments=()
        if records.shifted_seconds is None
        else (page.Moment(seconds=records.shifted_seconds, label="tastes change"),),
        products=products,
        shifts=tuple(_shift(shift, view, truth, records, products) for shift in shifts),
        experiment=experiment,
        truth=page.Truth(
            mean_nmi=float(np.mean([each.nmi for each in found.values()])) if found else 0.0,
            policy_values=_policy_values(truth.policies),
            changed_categories=tuple(truth.shifted_categories),
        ),
        snapshots=tuple(_snapshot(run, settings, records.started_at_ms) for run in records.runs),
        n_products_with_groups=findings.n_grouped,
        showcase=_showcase(products, shifts),
        notes=_notes(settings, points),
    )
    return report, findings


def _products(
    settings: Settings,
    view: StateView,
    truth: Truth,
    records: RunRecords,
    found: Mapping[str, Agreement],
    shifts: Sequence[ShiftRecord],
) -> tuple[tuple[page.Product, ...], dict[str, tuple[float, float]], int]:
    rng = np.random.default_rng(settings.simulator.seed)
    first_shift: dict[str, ShiftRecord] = {}
    for shift in shifts:
        first_shift.setdefault(shift.product_id, shift)
    products, differences, n_distinct = [], {}, 0
    for product in view.products():
        grouping = view.groups(product.product_id)
        groups = [] if grouping is None else grouping.groups
        n_distinct += grouping is not None and grouping.distinct
        counts = cell_counts(view.cells(product.product_id))
        creatives = view.creatives(product.product_id)
        creative_ids = [creative.creative_id for creative in creatives]
        # Before the first grouping there is one group, number 0, of everybody.
        group_ids = [group.group_id for group in groups] or [0]
        difference = group_difference(counts, group_ids, creative_ids, rng)
        if difference is not None:
            differences[product.product_id] = difference
        agreement = found.get(product.product_id)
        products.append(
            page.Product(
                product_id=product.product_id,
                title=product.title,
                category=product.category,
                picture=_picture(product.image_uri),
                groups=tuple(_group(group, agreement) for group in groups) or (page.Group(group_id=0, share=1.0),),
                creatives=tuple(_creative(creative, records) for creative in creatives),
                cells=_cells(counts, group_ids, creative_ids, first_shift.get(product.product_id)),
                nmi=None if agreement is None else min(max(agreement.nmi, 0.0), 1.0),
                difference=None
                if difference is None
                else page.GroupDifference(ndcg_at_5=difference[0], ndcg_at_5_null=difference[1]),
            )
        )
    return tuple(products), differences, n_distinct


def _picture(uri: str | None) -> page.Picture | None:
    return None if uri is None else page.Picture(uri=uri)


def _group(group: GroupRecord, agreement: Agreement | None) -> page.Group:
    segments = {} if agreement is None else agreement.segments.get(group.group_id, {})
    return page.Group(
        group_id=group.group_id,
        share=group.share,
        profile=tuple(
            page.Trait(attribute=trait.attribute, value=trait.value, share=trait.share, lift=trait.lift)
            for trait in group.profile
        ),
        n_members=group.n_members,
        truth=tuple(page.SegmentShare(segment=word, share=share) for word, share in segments.items()),
    )


def _creative(creative: CreativeRecord, records: RunRecords) -> page.Creative:
    return page.Creative(
        creative_id=creative.creative_id,
        picture=_picture(creative.image_uri),
        prompt=creative.prompt,
        origin="generated" if creative.origin == "generated" else "catalogue",
        group_id=creative.group_id,
        created_s=records.creative_seconds.get(creative.creative_id),
    )


def _cells(
    counts: CellCounts, group_ids: Sequence[int], creative_ids: Sequence[str], shift: ShiftRecord | None
) -> tuple[page.Cell, ...]:
    before = {} if shift is None else counts_before(shift)
    after = {} if shift is None else subtract(counts, before)
    intervals = [shrunk_intervals(part, group_ids, creative_ids) for part in (counts, before, after)]
    cells = []
    for group in group_ids:
        for creative in creative_ids:
            key = (group, creative)
            if not counts.get(key, (0, 0))[0]:
                continue
            cells.append(
                page.Cell(
                    group_id=group,
                    creative_id=creative,
                    all=_counts(counts.get(key, (0, 0)), intervals[0][key]),
                    before=None if shift is None else _counts(before.get(key, (0, 0)), intervals[1][key]),
                    after=None if shift is None else _counts(after.get(key, (0, 0)), intervals[2][key]),
                )
            )
    return tuple(cells)


def _counts(seen: tuple[int, int], interval: tuple[float, float, float]) -> page.Counts:
    return page.Counts(seen[0], seen[1], page.Estimate(*interval) if seen[0] else None)


def _shift(
    shift: ShiftRecord, view: StateView, truth: Truth, records: RunRecords, products: Sequence[page.Product]
) -> page.Shift:
    title = next(product.title for product in products if product.product_id == shift.product_id)
    made = [creative for creative in view.creatives(shift.product_id) if creative.caused_by == shift.event_id]
    return page.Shift(
        event_id=shift.event_id,
        product_id=shift.product_id,
        product_title=title,
        category=shift.category,
        detected_s=records.shift_seconds.get(shift.event_id, records.seconds),
        detected_at_ms=shift.detected_at_ms,
        statistic=shift.statistic,
        threshold=shift.threshold,
        n_impressions_since_change=shift.n_impressions_since_change,
        is_true=is_true_shift(shift, truth),
        group_ids=tuple(sorted({creative.group_id for creative in made if creative.group_id is not None})),
        creative_ids=tuple(creative.creative_id for creative in made),
    )


def is_true_shift(shift: ShiftRecord, truth: Truth) -> bool:
    """Return whether a published shift is of a category whose tastes had changed by then."""
    return (
        truth.shifted_at_ms is not None
        and shift.category in truth.shifted_categories
        and shift.detected_at_ms >= truth.shifted_at_ms
    )


def _experiment(
    settings: Settings, arms: ArmCounts, records: RunRecords
) -> tuple[page.Experiment | None, RatioInterval | None, RatioInterval | None]:
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


def thin(samples: Sequence[StreamSample], n_most: int) -> list[StreamSample]:
    """Return at most ``n_most`` of the samples, evenly spaced, the last one among them."""
    step = max(1, -(-len(samples) // n_most))
    return list(samples[::-1][::step][::-1])


def _stream(samples: Sequence[StreamSample]) -> tuple[page.StreamPoint, ...]:
    return tuple(
        page.StreamPoint(
            seconds=sample.seconds,
            events_s=sample.rate_events_s,
            lag=sample.lag,
            auroc=None if sample.metrics is None else sample.metrics.recent_auroc,
            log_loss=None if sample.metrics is None else sample.metrics.log_loss,
            n_groups=sample.n_groups,
        )
        for sample in thin(samples, N_STREAM_POINTS)
    )


def _policy_values(policies: Mapping[str, PolicyTruth]) -> tuple[page.PolicyValues, ...]:
    phases: tuple[tuple[str, page.Phase], ...] = (("before_shift", "before"), ("after_shift", "after"))
    return tuple(
        page.PolicyValues(
            phase=phase,
            uniform=policies[name].uniform_ctr,
            best_for_all=policies[name].best_for_all_ctr,
            best_per_segment=policies[name].best_per_segment_ctr,
        )
        for name, phase in phases
        if name in policies
    )


def _snapshot(run: RunRecord, settings: Settings, started_at_ms: int) -> page.Snapshot:
    return page.Snapshot(
        snapshot_id=run.snapshot_id or run.run_id,
        seconds=max(0.0, (run.started_at_ms - started_at_ms) / 1000),
        n_rows=int(run.figures["n_rows"]),
        n_pairs=int(run.figures["n_pairs"]),
        path=str(settings.offline.dataset_dir / (run.artifact or "")),
    )


def _showcase(products: Sequence[page.Product], shifts: Sequence[ShiftRecord]) -> tuple[str, ...]:
    """Choose products to show first: shifted ones, then those whose groups agree best, each of another category."""
    shifted = {shift.product_id for shift in shifts}
    order = sorted(products, key=lambda product: (product.product_id not in shifted, -(product.nmi or 0.0)))
    chosen: list[page.Product] = []
    for product in order:
        if len(product.groups) > 1 and product.category not in {other.category for other in chosen}:
            chosen.append(product)
    return tuple(product.product_id for product in chosen[:N_SHOWCASE])


def _notes(settings: Settings, points: Sequence[MetricPoint]) -> tuple[str, ...]:
    last = f" At the end it was {points[-1].auroc:.3f} over the whole run." if points else ""
    return (
        f"Both arms show {settings.serving.explore_share:.0%} of their impressions uniformly; the rest is matched to "
        "the chance of being the best. Impressions count for the experiment once a product has warmed up: "
        "before that everything is shown uniformly, in no arm.",
        f"Users are split between the arms by a hash. Intervals of arms and of their ratio come from "
        f"{settings.online.counts.user_buckets} buckets of users, so that a user's impressions are not taken for "
        "independent; the bands of the curves over time are binomial.",
        "AUROC is prequential: every impression is predicted before it is learnt, and the curve shows about the last "
        f"20,000 impressions.{last}",
        "Agreement compares the groups of a sample of the simulator's users with the segments that drive their "
        "clicks; a simulator is needed for it, and a platform has none.",
    )


def local_path(uri: str) -> Path:
    """Return the path of a local picture's URI."""
    return Path(unquote(urlparse(uri).path)) if uri.startswith("file:") else Path(uri)


def summary_figures(
    settings: Settings, truth: Truth, records: RunRecords, report: page.Report, findings: Findings
) -> Figures:
    """Return the run's figures for machines."""
    arms = {} if report.experiment is None else {arm.name: arm for arm in report.experiment.arms}
    true_shifts = [shift for shift in report.shifts if shift.is_true]
    generated = [c for product in report.products for c in product.creatives if c.origin == "generated"]
    openable = [c for c in generated if c.picture is not None and c.picture.uri and local_path(c.picture.uri).is_file()]
    waits = [
        records.creative_seconds[creative_id] - records.shift_seconds[shift.event_id]
        for shift in report.shifts
        for creative_id in shift.creative_ids
        if creative_id in records.creative_seconds
    ]
    metrics: dict[str, float | int] = {
        "produced": report.header.n_produced or 0,
        "consumed": findings.n_consumed,
        "used": findings.n_used,
        "duplicates": findings.n_duplicates,
        "spoiled": report.header.n_spoiled or 0,
        "dead_letters": findings.n_dead_letters,
        "impressions": report.header.n_impressions,
        "clicks": report.header.n_clicks,
        "true_impressions": truth.n_impressions,
        "true_clicks": truth.n_clicks,
        "products": len(report.products),
        "products_with_groups": findings.n_grouped,
        "products_with_distinct_groups": findings.n_distinct,
        "shifts_true": len(true_shifts),
        "shifts_false": len(report.shifts) - len(true_shifts),
        "shifted_products": sum(product.shifted for product in truth.products),
        "shifted_categories_found": len({shift.category for shift in true_shifts}),
        "creatives_emitted": len(generated),
        "creatives_that_open": len(openable),
        "n_snapshots": len(records.runs),
        "rate_events_s": findings.rate_events_s,
        "max_lag": findings.max_lag,
    }
    if waits:
        metrics["creative_wait_p95_s"] = float(np.percentile(waits, 95))
    for name, arm in arms.items():
        if arm.all.ctr is not None:
            metrics |= {
                f"arm_{name}_ctr": arm.all.ctr.value,
                f"arm_{name}_ctr_low": arm.all.ctr.low,
                f"arm_{name}_ctr_high": arm.all.ctr.high,
                f"arm_{name}_impressions": arm.all.n_impressions,
            }
    for name, ratio in (("arm_ratio", findings.ratio), ("arm_ratio_after_shift", findings.ratio_after)):
        if ratio is not None:
            metrics |= {name: ratio.ratio, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    if findings.agreements:
        metrics["nmi"] = float(np.mean([each.nmi for each in findings.agreements.values()]))
        metrics["ari_batch"] = float(np.mean([each.ari_batch for each in findings.agreements.values()]))
    if findings.differences:
        metrics["ndcg_between_groups"] = float(np.mean([each[0] for each in findings.differences.values()]))
        metrics["ndcg_null_split"] = float(np.mean([each[1] for each in findings.differences.values()]))
    last = next((sample.metrics for sample in reversed(records.samples) if sample.metrics is not None), None)
    if last is not None:
        metrics |= {"auroc": last.auroc, "auroc_recent": last.recent_auroc, "log_loss": last.log_loss}
    for name, values in truth.policies.items():
        metrics[f"true_{name}_uniform_ctr"] = values.uniform_ctr
        metrics[f"true_{name}_best_for_all_ctr"] = values.best_for_all_ctr
        metrics[f"true_{name}_best_per_segment_ctr"] = values.best_per_segment_ctr
    return Figures(
        command=records.command,
        commit=report.header.commit,
        seeds=dict(report.header.seeds),
        device=report.header.device,
        seconds=records.seconds,
        metrics=metrics,
        detail={
            "dead_letters_by_reason": dict(records.dead_letters),
            "spoiled_by_reason": dict(truth.spoiled),
            "shifted_categories": list(truth.shifted_categories),
            "nmi_by_product": {key: value.nmi for key, value in findings.agreements.items()},
            "shifts": [
                {"product_id": shift.product_id, "category": shift.category, "true": bool(shift.is_true)}
                for shift in report.shifts
            ],
        },
    )
