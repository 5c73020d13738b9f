"""Shrinkage in SQL: the empirical Bayes of `online.ctr.shrink`, for the tables of many products at once.

Counts are pulled from cell (a group's count of a creative) to creative to product. The formulas, and their reasons,
are those of `online.ctr`; here sums over a product's or a creative's cells are windows, so that an engine that is
spread over machines sends every product to one of them, once.
"""

from __future__ import annotations

import math
from typing import Final

import ibis
import ibis.expr.types as ir

from offline.posterior import erfcx
from online.ctr import MAX_CTR, MAX_STRENGTH, MIN_STRENGTH, PRIOR_SPREAD, PRODUCT_PRIOR

_NO_COUNT: Final = 1e-12
_FAR: Final = 30.0
"""Deviations from zero beyond which a normal is not cut off by it."""

_PRODUCT: Final = ("product_id",)
_CREATIVE: Final = ("product_id", "creative_id")


def shrink(cells: ir.Table) -> ir.Table:
    """Return cells with the Beta posterior of their CTR: the columns ``ctr``, ``ctr_alpha`` and ``ctr_beta``.

    Parameters
    ----------
    cells
        One row for each cell: ``product_id``, ``group_id``, ``creative_id``, the counts ``n`` and ``x`` (clicks, at
        most ``n``), and ``n_groups``, how many groups the product has. Other columns are kept; a cell without a
        row has no counts.
    """
    given = cells.columns
    # A creative's first cell stands for it where creatives are summed up.
    leads = ibis.row_number().over(group_by=_CREATIVE, order_by="group_id") == 0
    table = cells.mutate(
        leads=leads,
        pooled=(_sum(cells.x, _PRODUCT) + PRODUCT_PRIOR[0]) / (_sum(cells.n, _PRODUCT) + sum(PRODUCT_PRIOR)),
        **_sums(cells.n, cells.x, _CREATIVE),
    )
    table = table.mutate(**_cell_scatter(table))
    table = table.mutate(
        **{name: _sum(ibis.ifelse(table.leads, table[name], 0.0), _PRODUCT) for name in _MOMENTS},
    )
    table = _moment_spread(table, "cell_pull")
    table = table.mutate(cell_pull=ibis.ifelse(table.n_groups == 1, 1.0 / MAX_STRENGTH, table.cell_pull))
    # What a cell's counts are worth to its creative, where cells scatter around it.
    weight = 1.0 / (1.0 + table.n * table.cell_pull)
    table = table.mutate(creative_n=_sum(table.n * weight, _CREATIVE), creative_x=_sum(table.x * weight, _CREATIVE))
    table = table.mutate(
        **_sums(
            ibis.ifelse(table.leads, table.creative_n, 0.0), ibis.ifelse(table.leads, table.creative_x, 0.0), _PRODUCT
        )
    )
    table = _moment_spread(table.mutate(**_creative_scatter(table)), "creative_pull")
    weight_up = ibis.ifelse(table.leads, 1.0 / (1.0 + table.creative_n * table.creative_pull), 0.0)
    table = table.mutate(
        product_n=_sum(table.creative_n * weight_up, _PRODUCT) + sum(PRODUCT_PRIOR),
        product_x=_sum(table.creative_x * weight_up, _PRODUCT) + PRODUCT_PRIOR[0],
    )
    table = table.mutate(product_ctr=table.product_x / table.product_n)
    product_variance = table.product_ctr * (1.0 - table.product_ctr) / (table.product_n + 1.0)
    table = table.mutate(product_variance=product_variance)
    table = _posterior(table, "creative", ("creative_n", "creative_x", "creative_pull"), "product")
    table = _posterior(table, "cell", ("n", "x", "cell_pull"), "creative")
    ctr = ibis.least(table.cell_ctr, MAX_CTR)
    strength = ibis.greatest(ctr * (1.0 - ctr) / table.cell_variance - 1.0, 1e-3)
    table = table.mutate(ctr=ctr, strength=strength)
    return table.select(
        *given, "ctr", ctr_alpha=table.ctr * table.strength, ctr_beta=(1.0 - table.ctr) * table.strength
    )


_MOMENTS: Final = ("excess", "leverage", "n_noise", "freedom")
"""What a spread is estimated from; see `online.ctr`."""


def _sum(value: ir.NumericValue, over: tuple[str, ...]) -> ir.NumericValue:
    return value.sum().over(group_by=over)


def _sums(n: ir.NumericValue, x: ir.NumericValue, over: tuple[str, ...]) -> dict[str, ir.NumericValue]:
    """Return the sums of counts that their scatter is made of."""
    return {
        "sum_n": _sum(n, over),
        "sum_x": _sum(x, over),
        "sum_n_squared": _sum(n * n, over),
        "sum_ratio": _sum(x * x / ibis.greatest(n, _NO_COUNT), over),
        "n_seen": _sum(ibis.ifelse(n > 0.0, 1.0, 0.0), over),
    }


def _cell_scatter(table: ir.Table) -> dict[str, ir.Value]:
    """Return each creative's part in the moments of how far cells are spread around their creatives."""
    n = table.sum_n
    mean = table.sum_x / ibis.greatest(n, _NO_COUNT)
    noise = mean * (1.0 - mean) * n / ibis.greatest(n - 1.0, 1.0)
    freedom = ibis.greatest(table.n_seen - 1.0, 0.0)
    n_noise = n - table.sum_n_squared / ibis.greatest(n, _NO_COUNT)
    excess = table.sum_ratio - mean * mean * n - freedom * noise
    return dict(zip(_MOMENTS, (excess, n_noise * noise, n_noise, freedom), strict=True))


def _creative_scatter(table: ir.Table) -> dict[str, ir.Value]:
    """Return each product's moments of how far creatives are spread around it; counts are those that count for it."""
    total = ibis.greatest(table.sum_n, _NO_COUNT)
    mean = table.sum_x / total
    noise = mean * (1.0 - mean) * total / ibis.greatest(total - 1.0, 1.0)
    freedom = ibis.greatest(table.n_seen - 1.0, 0.0)
    n_noise = total - table.sum_n_squared / total
    excess = table.sum_ratio - mean * mean * total - freedom * noise
    return dict(zip(_MOMENTS, (excess, n_noise * noise, n_noise, freedom), strict=True))


def _moment_spread(table: ir.Table, name: str) -> ir.Table:
    """Add the mean of a spread that is not negative, seen through its moment estimate and a weak prior."""
    table = table.mutate(prior=PRIOR_SPREAD**2 * table.pooled / (1.0 - table.pooled))
    informed = (table.leverage > 0.0) & (table.freedom > 0.0)
    freedom = ibis.ifelse(informed, table.freedom, 1.0)
    root = freedom / ibis.ifelse(informed, table.n_noise, 1.0) + table.prior
    table = table.mutate(
        precision=1.0 / (table.prior * table.prior),
        seen=ibis.ifelse(informed, freedom / (2.0 * root * root), 0.0),
        estimate=table.excess / ibis.ifelse(informed, table.leverage, 1.0),
    )
    total = table.precision + table.seen
    mean = (table.prior * table.precision + table.estimate * table.seen) / total
    table = table.mutate(mean=mean, deviation=1.0 / total.sqrt())
    z = ibis.least(table.mean / table.deviation, _FAR)
    spread = table.mean + table.deviation * math.sqrt(2.0 / math.pi) / erfcx(z / -math.sqrt(2.0))
    return table.mutate(ibis.least(ibis.greatest(spread, 1.0 / MAX_STRENGTH), 1.0 / MIN_STRENGTH).name(name))


def _posterior(table: ir.Table, level: str, counts: tuple[str, str, str], parent: str) -> ir.Table:
    """Add a level's CTR and variance, given its counts, its pull, and the posterior of the level above."""
    n, x, pull = (table[name] for name in counts)
    to_parent = 1.0 / (1.0 + n * pull)
    table = table.mutate((to_parent * (table[f"{parent}_ctr"] + x * pull)).name(f"{level}_ctr"), to_parent=to_parent)
    ctr, n, pull = table[f"{level}_ctr"], table[counts[0]], table[counts[2]]
    within = ctr * (1.0 - ctr) * pull / (1.0 + (n + 1.0) * pull)
    variance = within + table.to_parent * table.to_parent * table[f"{parent}_variance"]
    return table.mutate(variance.name(f"{level}_variance"))
