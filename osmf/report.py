"""Report: one self-contained HTML file on a run, that opens offline.

Styles, charts (SVG) and pictures (data URIs) are in the file; a content security policy in it lets
a browser fetch nothing. The same model gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from osmf import report_words as words
from osmf.charts import Bar, Line, Mark, Point, Row, bar_chart, dot_plot, time_chart
from osmf.figures import write_whole
from osmf.report_model import Arm, Counts, Estimate, Experiment, Picture, Report
from osmf.report_view import choose_showcase, headline, n_products_with_groups, product_view
from osmf.thumbnails import thumbnail

MAX_BYTES = 8_000_000
_LARGE_PX, _SMALL_PX = 256, 128
_SIDES_PX = ((_LARGE_PX, _SMALL_PX, 80), (224, 96, 74), (160, 80, 70), (112, 64, 62), (72, 40, 50))
"""Large side, small side and JPEG quality: the first that keeps the file within its limit is taken."""

_TEMPLATE_WORDS = {
    "clock": words.clock,
    "compact": words.compact,
    "count": words.count,
    "date_time": words.date_time,
    "duration": words.duration,
    "interval": words.interval,
    "percent": words.percent,
    "shift_verdict": words.shift_verdict,
}
_NDCG_CAPTION = (
    "How alike the groups rank the creatives: NDCG@5 of the groups (filled) "
    "and of a random split of the same sizes (hollow)"
)
_PHASES = {"all": "whole run", "before": "before the shift", "after": "after the shift"}


class ReportTooLargeError(ValueError):
    """A report that stays above its limit even with the smallest pictures."""

    def __init__(self, n_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"the report has {n_bytes:,} bytes with its smallest pictures; allowed: {max_bytes:,}. "
            "Nothing is written. Give it fewer products (Report.products), or raise max_bytes."
        )


def write_report(report: Report, path: str | Path, *, max_bytes: int = MAX_BYTES) -> int:
    """Write the report's page and return its size in bytes.

    Pictures shrink from 256 px until the file fits into ``max_bytes``. The file appears whole or not
    at all. Pictures that cannot be opened, or that are not local, show as an empty frame.

    Raises
    ------
    ReportTooLargeError
        The page does not fit even with pictures of 72 px.
    """
    content = b""
    for large_px, small_px, quality in _SIDES_PX:
        content = render_report(report, large_px=large_px, small_px=small_px, quality=quality).encode()
        if len(content) <= max_bytes:
            write_whole(Path(path), content)
            return len(content)
    raise ReportTooLargeError(len(content), max_bytes)


def render_report(report: Report, *, large_px: int = _LARGE_PX, small_px: int = _SMALL_PX, quality: int = 80) -> str:
    """Return the report's page; pictures are at most ``large_px``, in tables ``small_px``."""
    environment = Environment(
        loader=PackageLoader("osmf", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        _TEMPLATE_WORDS,
        large=_Thumbnails(large_px, quality),
        small=_Thumbnails(small_px, quality),
    )
    page = environment.get_template("report.html.j2").render(**_page(report))
    return _with_policy(page)


class _Thumbnails:
    """Thumbnails of one size, each made once."""

    def __init__(self, side_px: int, quality: int) -> None:
        self._side_px = side_px
        self._quality = quality
        self._made: dict[Picture, str | None] = {}

    def __call__(self, picture: Picture | None) -> str | None:
        if picture is None:
            return None
        if picture not in self._made:
            self._made[picture] = thumbnail(picture, self._side_px, self._quality)
        return self._made[picture]


def _page(report: Report) -> dict[str, Any]:
    """Return everything that the template names."""
    n_shifts: dict[str, int] = {}
    for shift in report.shifts:
        n_shifts[shift.product_id] = n_shifts.get(shift.product_id, 0) + 1
    views = {p.product_id: product_view(p, n_shifts.get(p.product_id, 0)) for p in report.products}
    showcase = choose_showcase(report)
    return {
        "report": report,
        "header": report.header,
        "headline": headline(report),
        "showcase": [views[product_id] for product_id in showcase],
        "products": sorted(views.values(), key=lambda view: (view.n_shifts == 0, -view.n_impressions)),
        "made": [view for view in views.values() if view.n_made],
        "max_made_groups": max((len(view.groups) for view in views.values() if view.n_made), default=0),
        "categories": sorted({p.category for p in report.products if p.category is not None}),
        "n_grouped": n_products_with_groups(report),
        "arm_charts": _arm_charts(report),
        "stream_charts": _stream_charts(report),
        "truth_charts": _truth_charts(report),
        "dead_letter_chart": _dead_letter_chart(report),
        "n_dead_letters": sum(report.header.dead_letters.values()),
        "last_stream": report.stream[-1] if report.stream else None,
        "arm_rows": _arm_rows(report.experiment),
    }


def _arm_charts(report: Report) -> list[tuple[str, Markup]]:
    """Return the arms' CTR over time and the ratio in each phase, with their captions."""
    experiment = report.experiment
    if experiment is None:
        return []
    charts: list[tuple[str, Markup]] = []
    if any(len(arm.series) > 1 for arm in experiment.arms):
        lines = [Line(arm.name, _arm_points(arm), _arm_colour(experiment, arm)) for arm in experiment.arms]
        # The first moments' intervals are as wide as the sky; the axis follows the arms once they have settled.
        settled = [p.ctr for arm in experiment.arms for p in arm.series[len(arm.series) // 5 :]]
        chart = time_chart(
            "Cumulative CTR of the arms",
            lines,
            y_format=words.percent,
            tick_format=words.percent_tick,
            moments=report.moments,
            from_zero=False,
            y_range=(min(ctr.low for ctr in settled), max(ctr.high for ctr in settled)),
            width=460,
            height=230,
        )
        charts.append(("Cumulative CTR, the band is its 95% interval", chart))
    phases = (
        ("whole run", experiment.ratio),
        ("before the shift", experiment.ratio_before),
        ("after the shift", experiment.ratio_after),
    )
    rows = [
        Row(name, [Mark(ratio.value, ratio.low, ratio.high, label=words.change(ratio.value), tooltip="ratio")])
        for name, ratio in phases
        if ratio is not None
    ]
    forest = dot_plot(
        "Ratio of the arms' CTRs",
        rows,
        x_format=lambda ratio: f"{ratio:.2f}",
        reference=1.0,
        reference_label="no difference",
        label_px=118,
    )
    treatment, baseline = experiment.arm(experiment.treatment), experiment.arm(experiment.baseline)
    charts.append((f"CTR of “{treatment.title}” over “{baseline.title}”, 95% interval", forest))
    return charts


def _arm_rows(experiment: Experiment | None) -> list[tuple[Arm, list[tuple[str, Counts]]]]:
    if experiment is None:
        return []
    return [
        (arm, [(_PHASES[name], counts) for name, counts in _arm_phases(arm) if counts is not None])
        for arm in experiment.arms
    ]


def _arm_phases(arm: Arm) -> list[tuple[str, Counts | None]]:
    return [("all", arm.all), ("before", arm.before), ("after", arm.after)]


def _arm_colour(experiment: Experiment, arm: Arm) -> int:
    """Return the arm's colour: the treatment's is the first, the baseline's the second, others follow."""
    if arm.name == experiment.treatment:
        return 0
    if arm.name == experiment.baseline:
        return 1
    others = [other.name for other in experiment.arms if other.name not in (experiment.treatment, experiment.baseline)]
    return 2 + others.index(arm.name)


def _arm_points(arm: Arm) -> list[Point]:
    return [Point(p.seconds, p.ctr.value, p.ctr.low, p.ctr.high) for p in arm.series]


def _stream_charts(report: Report) -> list[tuple[str, Markup]]:
    """Return rate, lag, AUROC, log-loss and number of groups over time; what was not measured is left out."""
    points = report.stream
    if not points:
        return []

    def share(value: float) -> str:
        return f"{value:.3f}"

    series: list[tuple[str, list[Point], Any, bool]] = [
        ("Events a second", [Point(p.seconds, p.events_s) for p in points], words.compact, True),
        ("Lag: events waiting in the broker", [Point(p.seconds, float(p.lag)) for p in points], words.compact, True),
        (
            "AUROC so far, each event scored before it is learned from",
            [Point(p.seconds, p.auroc) for p in points if p.auroc is not None],
            share,
            False,
        ),
        ("Log-loss so far", [Point(p.seconds, p.log_loss) for p in points if p.log_loss is not None], share, False),
        (
            "Groups over all products",
            [Point(p.seconds, float(p.n_groups)) for p in points if p.n_groups is not None],
            words.compact,
            True,
        ),
    ]
    return [
        (title, time_chart(title, [Line("", line, 0)], y_format=form, moments=report.moments, from_zero=from_zero))
        for title, line, form, from_zero in series
        if line
    ]


def _truth_charts(report: Report) -> list[tuple[str, Markup]]:
    """Return what only a simulator can tell: agreement per product, policies' true values; and NDCG between groups."""
    charts: list[tuple[str, Markup]] = []
    agreeing = sorted((p for p in report.products if p.nmi is not None), key=lambda p: -(p.nmi or 0.0))
    if agreeing:
        rows = [Row(p.title, [Mark(p.nmi or 0.0, tooltip="NMI", label=f"{p.nmi:.2f}")]) for p in agreeing]
        chart = dot_plot("Agreement with the true segments (NMI)", rows, x_format=_tenths, x_low=0.0, x_high=1.0)
        charts.append(
            ("Agreement of each product's groups with the true segments: NMI, 0 is chance and 1 the same", chart)
        )
    differing = [p for p in report.products if p.difference is not None]
    if differing:
        rows = []
        for product in sorted(differing, key=lambda p: p.difference.ndcg_at_5 if p.difference else 0.0):
            difference = product.difference
            if difference is None:
                continue
            rows.append(
                Row(
                    product.title,
                    [
                        Mark(difference.ndcg_at_5_null, hollow=True, colour=1, tooltip="null split"),
                        Mark(difference.ndcg_at_5, tooltip="groups", label=f"{difference.ndcg_at_5:.2f}"),
                    ],
                )
            )
        chart = dot_plot("NDCG@5 between groups", rows, x_format=lambda x: f"{x:.2f}")
        charts.append((_NDCG_CAPTION, chart))
    policies = report.truth.policy_values if report.truth is not None else ()
    if policies:
        chart = dot_plot(
            "True CTR of three policies",
            _policy_rows(report, policies),
            x_format=words.percent,
            label_px=235,
            width=480,
        )
        charts.append(
            ("True CTR of three policies over all simulated users (filled), and what the arms measured (hollow)", chart)
        )
    return charts


def _policy_rows(report: Report, policies: Sequence[Any]) -> list[Row]:
    rows: list[Row] = []
    for values in policies:
        phase = f", {_PHASES[values.phase].removesuffix(' the shift')}" if values.phase != "all" else ""
        for name, value, colour in (
            ("uniform", values.uniform, 3),
            ("best for all", values.best_for_all, 1),
            ("best per segment", values.best_per_segment, 0),
        ):
            rows.append(
                Row(f"{name}{phase}", [Mark(value, colour=colour, tooltip="true CTR", label=words.percent(value))])
            )
        if report.experiment is None:
            continue
        for arm in report.experiment.arms:
            counts = dict(_arm_phases(arm))[values.phase]
            if counts is not None and counts.ctr is not None:
                rows.append(Row(f"arm “{arm.title}”{phase}", [_arm_mark(report.experiment, arm, counts.ctr)]))
    return rows


def _arm_mark(experiment: Experiment, arm: Arm, ctr: Estimate) -> Mark:
    colour = _arm_colour(experiment, arm)
    label = words.percent(ctr.value)
    return Mark(ctr.value, ctr.low, ctr.high, colour, hollow=True, tooltip="measured CTR", label=label)


def _dead_letter_chart(report: Report) -> Markup | None:
    letters = sorted(report.header.dead_letters.items(), key=lambda item: (-item[1], item[0]))
    bars = [Bar(words.dead_letter_words(reason), float(n), words.count(n)) for reason, n in letters if n]
    return bar_chart("Dead letters by reason", bars) if bars else None


def _tenths(value: float) -> str:
    return f"{value:.1f}"


_SCRIPT = re.compile(r"<script>(.*?)</script>", flags=re.DOTALL)


def _with_policy(page: str) -> str:
    """Return the page with a content security policy that allows its own scripts, styles and pictures only."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}"
    return page.replace("@CONTENT_SECURITY_POLICY@", policy, 1)
