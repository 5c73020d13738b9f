"""Run report: the report of a demo, from its state, its truth and what was watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from offline.runs import RunRecord
from online.metrics import MetricPoint
from osmf import report_model as page
from osmf.figures import commit, device
from osmf.findings import (
    Agreement,
    CellCounts,
    agreements,
    cell_counts,
    counts_before,
    group_difference,
    shrunk_intervals,
    subtract,
)
from osmf.run_experiment import build_experiment
from osmf.run_records import N_STREAM_POINTS, Findings, RunRecords, StreamSample, thin
from osmf.settings import Settings
from simulator.truth import PolicyTruth, Truth
from state.reading import StateView
from state.records import CreativeRecord, GroupRecord, ShiftRecord

N_SHOWCASE = 3


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
    experiment, ratio, ratio_after = build_experiment(settings, view.arms(), records)
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
