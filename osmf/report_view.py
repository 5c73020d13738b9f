"""Report view: what the page writes where, worked out from the report's model.

Pure: which creatives lead in a group, which cells differ from the product's mean, which words the
headline uses. :mod:`osmf.report` puts the result into the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from osmf.charts import interval_bar, share_bar
from osmf.report_model import Cell, Counts, Creative, Estimate, Experiment, Group, Phase, Product, Report
from osmf.report_words import (
    GroupWords,
    change,
    compact,
    count,
    group_letter,
    group_words,
    interval,
    percent,
)

N_BEST = 3
N_BEST_OF_PHASE = 2
N_SHOWCASE = 3
N_MADE = 3
"""New creatives of a group on the contact sheet."""


@dataclass(frozen=True, slots=True)
class HeadlineView:
    """One of the figures that matter: the number, what it is, and what to know about it."""

    value: str
    caption: str
    detail: str
    tone: str


@dataclass(frozen=True, slots=True)
class RankedView:
    """A creative among the best of a group in one phase."""

    creative: Creative
    ctr: str
    interval: str
    n_impressions: str
    bar: str
    is_new: bool


@dataclass(frozen=True, slots=True)
class BestView:
    """The best creatives of a group in one phase; ``title`` is empty when there is only one phase."""

    title: str
    creatives: tuple[RankedView, ...]


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group as the page shows it."""

    group: Group
    letter: str
    colour: int
    share: str
    words: GroupWords
    composition: str | None
    best: tuple[BestView, ...]


@dataclass(frozen=True, slots=True)
class CellView:
    """A cell of a product's table; ``heat`` is -3 to 3, 0 where the interval holds the product's mean."""

    lines: tuple[tuple[str, str, str, str], ...]
    bar: str
    heat: int
    leads: bool


@dataclass(frozen=True, slots=True)
class CreativeRowView:
    """A creative with its cells, one for each group."""

    creative: Creative
    cells: tuple[CellView | None, ...]
    made_for: str


@dataclass(frozen=True, slots=True)
class ProductView:
    """A product as the page shows it."""

    product: Product
    groups: tuple[GroupView, ...]
    rows: tuple[CreativeRowView, ...]
    made: tuple[tuple[RankedView | Creative, ...], ...]
    made_for_earlier: tuple[Creative, ...]
    mean_ctr: str
    n_impressions: int
    has_phases: bool
    n_shifts: int
    n_made: int


def headline(report: Report) -> tuple[HeadlineView, ...]:
    """Return the figures that matter: the arms, the shifts, the agreement with the truth (or what there is)."""
    figures: list[HeadlineView] = []
    if report.experiment is not None:
        figures.append(_arms_headline(report.experiment))
    else:
        header = report.header
        ctr = header.n_clicks / header.n_impressions if header.n_impressions else 0.0
        detail = f"{count(header.n_clicks)} clicks on {count(header.n_impressions)} impressions"
        figures.append(HeadlineView(percent(ctr), "click-through rate over all impressions", detail, "plain"))
    figures.append(_shifts_headline(report))
    n_products = report.header.n_products
    n_grouped = n_products_with_groups(report)
    if report.truth is not None:
        detail = f"0 is chance, 1 the very same groups; {n_grouped} of {n_products} products have groups of their own"
        caption = "agreement of the groups with the true segments (mean NMI)"
        figures.append(HeadlineView(f"{report.truth.mean_nmi:.2f}", caption, detail, "plain"))
    else:
        n_groups = sum(len(product.groups) for product in report.products if len(product.groups) > 1)
        detail = f"{count(n_groups)} groups in all; the others' users click alike, as far as the data tell"
        caption = f"of {count(n_products)} products have groups of their own"
        figures.append(HeadlineView(count(n_grouped), caption, detail, "plain"))
    return tuple(figures)


def n_products_with_groups(report: Report) -> int:
    """Return how many products have two groups or more."""
    if report.n_products_with_groups is not None:
        return report.n_products_with_groups
    return sum(len(product.groups) > 1 for product in report.products)


def choose_showcase(report: Report) -> tuple[str, ...]:
    """Return the products for the top of the page: the named ones, or three that show most.

    A product shows much when it shifted, has new creatives in its groups, and many impressions;
    different categories come first.
    """
    known = {product.product_id for product in report.products}
    if report.showcase:
        return tuple(product_id for product_id in report.showcase if product_id in known)
    shifted = {shift.product_id for shift in report.shifts if shift.is_true is not False}

    def merit(product: Product) -> tuple[int, int, int]:
        n_made = sum(creative.origin == "generated" for creative in product.creatives)
        return (product.product_id in shifted) + (n_made > 0), min(len(product.groups), 4), _n_impressions(product)

    candidates = sorted((p for p in report.products if p.groups and p.creatives), key=merit, reverse=True)
    chosen: list[Product] = []
    for only_new_categories in (True, False):
        for product in candidates:
            is_new = all(product.category != other.category for other in chosen)
            if len(chosen) < N_SHOWCASE and product not in chosen and (is_new or not only_new_categories):
                chosen.append(product)
    return tuple(product.product_id for product in chosen)


def product_view(product: Product, n_shifts: int = 0) -> ProductView:
    """Return a product with its groups' best creatives, its table and its new creatives."""
    cells = {(cell.group_id, cell.creative_id): cell for cell in product.cells}
    has_phases = any(cell.before is not None and cell.after is not None for cell in product.cells)
    n_impressions = _n_impressions(product)
    n_clicks = sum(cell.all.n_clicks for cell in product.cells)
    mean = n_clicks / n_impressions if n_impressions else None
    scale = _scale(product.cells, mean)
    groups = tuple(_group_view(product, k, cells, has_phases, mean, scale) for k in range(len(product.groups)))
    letters = {view.group.group_id: view.letter for view in groups}
    leaders = {
        group.group_id: _ranked_ids(product, group.group_id, cells, _last_phase(has_phases))[:1]
        for group in product.groups
    }
    rows = tuple(
        CreativeRowView(
            creative,
            tuple(
                _cell_view(
                    cells.get((group.group_id, creative.creative_id)),
                    k,
                    has_phases,
                    mean,
                    scale,
                    leads=creative.creative_id in leaders[group.group_id],
                )
                for k, group in enumerate(product.groups)
            ),
            "" if creative.group_id is None else letters.get(creative.group_id, "an earlier group"),
        )
        for creative in sorted(product.creatives, key=lambda c: (c.origin == "generated", c.created_s or 0.0))
    )
    made = [creative for creative in product.creatives if creative.origin == "generated"]
    return ProductView(
        product=product,
        groups=groups,
        rows=rows,
        made=tuple(_made_for(product, view, made, cells, has_phases, mean, scale) for view in groups),
        made_for_earlier=tuple(c for c in made if c.group_id not in letters),
        mean_ctr="" if mean is None else percent(mean),
        n_impressions=n_impressions,
        has_phases=has_phases,
        n_shifts=n_shifts,
        n_made=len(made),
    )


def counts_of(cell: Cell, phase: Phase) -> Counts | None:
    """Return a cell's counts in a phase."""
    return {"all": cell.all, "before": cell.before, "after": cell.after}[phase]


def _arms_headline(experiment: Experiment) -> HeadlineView:
    ratio = experiment.ratio
    treatment, baseline = experiment.arm(experiment.treatment), experiment.arm(experiment.baseline)
    if ratio.low > 1:
        tone, verdict = "good", "more clicks per impression"
    elif ratio.high < 1:
        tone, verdict = "bad", "fewer clicks per impression"
    else:
        tone, verdict = "plain", "clicks per impression: no clear difference"
    detail = (
        f"95% interval {change(ratio.low)} to {change(ratio.high)}; "
        f"{count(treatment.all.n_impressions)} against {count(baseline.all.n_impressions)} impressions"
    )
    caption = f"{verdict}, {treatment.title.lower()} against {baseline.title.lower()}"
    return HeadlineView(change(ratio.value), caption, detail, tone)


def _shifts_headline(report: Report) -> HeadlineView:
    shifts, truth = report.shifts, report.truth
    if truth is None or any(shift.is_true is None for shift in shifts):
        n_products = len({shift.product_id for shift in shifts})
        caption = "shift of tastes detected" if len(shifts) == 1 else "shifts of tastes detected"
        detail = f"in {n_products} product{'' if n_products == 1 else 's'}; whether they are real is not known here"
        return HeadlineView(
            str(len(shifts)), caption, detail if shifts else "no product crossed the threshold", "plain"
        )
    n_true = sum(shift.is_true is True for shift in shifts)
    n_false = len(shifts) - n_true
    found = {shift.category for shift in shifts if shift.is_true}
    n_found = sum(category in found for category in truth.changed_categories)
    caption = f"shift{'' if n_true == 1 else 's'} of tastes found, {n_false} false alarm{'' if n_false == 1 else 's'}"
    detail = f"{n_found} of {len(truth.changed_categories)} changed categories"
    if truth.changed_categories:
        detail += f" ({', '.join(truth.changed_categories)})"
    tone = "bad" if n_false or n_found < len(truth.changed_categories) else "good" if n_true else "plain"
    return HeadlineView(str(n_true), caption, detail, tone)


def _group_view(
    product: Product,
    k: int,
    cells: Mapping[tuple[int, str], Cell],
    has_phases: bool,
    mean: float | None,
    scale: float,
) -> GroupView:
    group = product.groups[k]
    phases: tuple[tuple[str, Phase], ...] = (
        (("Before the shift", "before"), ("After the shift", "after")) if has_phases else (("", "all"),)
    )
    n_best = N_BEST_OF_PHASE if has_phases else N_BEST
    creatives = {creative.creative_id: creative for creative in product.creatives}
    best = tuple(
        BestView(
            title,
            tuple(
                _ranked_view(creatives[creative_id], cells[group.group_id, creative_id], phase, k, mean, scale)
                for creative_id in _ranked_ids(product, group.group_id, cells, phase)[:n_best]
            ),
        )
        for title, phase in phases
    )
    letter = group_letter(k)
    composition = None
    if group.truth:
        parts = sorted(((part.segment, part.share) for part in group.truth), key=lambda part: -part[1])
        composition = share_bar(f"True segments in group {letter}", parts)
    return GroupView(group, letter, k, f"{group.share:.0%}", group_words(group.profile), composition, best)


def _ranked_ids(product: Product, group_id: int, cells: Mapping[tuple[int, str], Cell], phase: Phase) -> list[str]:
    """Return a group's creatives by CTR in a phase, the best first; those without an estimate are left out."""
    found: list[tuple[float, str]] = []
    for creative in product.creatives:
        cell = cells.get((group_id, creative.creative_id))
        counts = None if cell is None else counts_of(cell, phase)
        if counts is not None and counts.ctr is not None:
            found.append((-counts.ctr.value, creative.creative_id))
    return [creative_id for _, creative_id in sorted(found)]


def _ranked_view(
    creative: Creative, cell: Cell, phase: Phase, colour: int, mean: float | None, scale: float
) -> RankedView:
    counts = counts_of(cell, phase)
    if counts is None or counts.ctr is None:
        raise ValueError(f"creative {creative.creative_id!r} has no CTR in phase {phase!r}: it cannot be ranked there")
    return RankedView(
        creative=creative,
        ctr=percent(counts.ctr.value),
        interval=interval(counts.ctr),
        n_impressions=compact(counts.n_impressions),
        bar=interval_bar([("", counts.ctr)], scale=scale, reference=mean, colour=colour),
        is_new=creative.origin == "generated",
    )


def _made_for(
    product: Product,
    view: GroupView,
    made: Sequence[Creative],
    cells: Mapping[tuple[int, str], Cell],
    has_phases: bool,
    mean: float | None,
    scale: float,
) -> tuple[RankedView | Creative, ...]:
    """Return the creatives made for a group, those with an estimate first, the best of them leading."""
    group_id, phase = view.group.group_id, _last_phase(has_phases)
    mine = {creative.creative_id: creative for creative in made if creative.group_id == group_id}
    ranked = [creative_id for creative_id in _ranked_ids(product, group_id, cells, phase) if creative_id in mine]
    shown: list[RankedView | Creative] = [
        _ranked_view(mine[creative_id], cells[group_id, creative_id], phase, view.colour, mean, scale)
        for creative_id in ranked
    ]
    shown += [creative for creative_id, creative in mine.items() if creative_id not in ranked]
    return tuple(shown[:N_MADE])


def _cell_view(
    cell: Cell | None, colour: int, has_phases: bool, mean: float | None, scale: float, *, leads: bool
) -> CellView | None:
    if cell is None:
        return None
    phases: tuple[tuple[str, Phase], ...] = (("before", "before"), ("after", "after")) if has_phases else (("", "all"),)
    lines: list[tuple[str, str, str, str]] = []
    estimates: list[tuple[str, Estimate]] = []
    for name, phase in phases:
        counts = counts_of(cell, phase)
        if counts is None or counts.n_impressions == 0:
            continue
        if counts.ctr is None:
            lines.append((name, "–", "", count(counts.n_impressions)))
        else:
            lines.append((name, percent(counts.ctr.value), interval(counts.ctr), count(counts.n_impressions)))
            estimates.append((name, counts.ctr))
    if not lines:
        return None
    bar = interval_bar(estimates, scale=scale, reference=mean, colour=colour) if estimates else ""
    return CellView(tuple(lines), bar, heat(estimates[-1][1] if estimates else None, mean), leads)


def heat(ctr: Estimate | None, mean: float | None) -> int:
    """Return how far a CTR is from the product's mean: 0 when its interval holds the mean, up to 3 either way."""
    if ctr is None or not mean or ctr.low <= mean <= ctr.high:
        return 0
    ratio = ctr.value / mean
    size = 1 if 0.8 < ratio < 1.25 else 2 if 0.5 < ratio < 2 else 3
    return size if ratio > 1 else -size


def _last_phase(has_phases: bool) -> Phase:
    return "after" if has_phases else "all"


def _n_impressions(product: Product) -> int:
    return sum(cell.all.n_impressions for cell in product.cells)


def _scale(cells: Sequence[Cell], mean: float | None) -> float:
    """Return the CTR at the right end of a product's bars: its highest interval, unless that dwarfs the values."""
    estimates = [c.ctr for cell in cells for c in (cell.all, cell.before, cell.after) if c is not None and c.ctr]
    if not estimates:
        return 2 * mean if mean else 1.0
    return min(max(e.high for e in estimates), 1.8 * max(e.value for e in estimates)) or 1.0
