"""Run summary: the figures of a demo, for machines."""

from __future__ import annotations

import numpy as np

from generator.storage import local_path
from osmf import report_model as page
from osmf.figures import Figures
from osmf.run_records import Findings, RunRecords
from osmf.settings import Settings
from simulator.truth import Truth


def summary_figures(
    settings: Settings, truth: Truth, records: RunRecords, report: page.Report, findings: Findings
) -> Figures:
    """Return the run's figures for machines."""
    arms = {} if report.experiment is None else {arm.name: arm for arm in report.experiment.arms}
    true_shifts = [shift for shift in report.shifts if shift.is_true]
    generated = [c for product in report.products for c in product.creatives if c.origin == "generated"]
    pictures = [local_path(c.picture.uri) for c in generated if c.picture is not None and c.picture.uri]
    n_openable = sum(picture is not None and picture.is_file() for picture in pictures)
    waits = [
        records.creative_seconds[creative_id] - records.shift_seconds[shift.event_id]
        for shift in report.shifts
        for creative_id in shift.creative_ids
        if creative_id in records.creative_seconds
    ]
    groups = {product.product_id: len(product.groups) for product in report.products}
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
        "shifted_groups": sum(groups[shift.product_id] for shift in report.shifts),
        "shifted_groups_with_creatives": sum(len(shift.group_ids) for shift in report.shifts),
        "creatives_emitted": len(generated),
        "creatives_that_open": n_openable,
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
