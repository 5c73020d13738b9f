"""Click-through rates that can be trusted at any count: shrinkage by empirical Bayes.

Everything here is a pure function of counts. A table of counts is ``(G, C)``: one row per group of a
product, one column per creative. Counts may be fractional (decayed): a weight below one makes the
real noise smaller than the count says, so intervals and tests then err on the cautious side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, erfcx

CountsTable: TypeAlias = NDArray[np.float64]

MIN_STRENGTH = 10.0
"""The weakest pooling: a prior worth this many impressions."""

MAX_STRENGTH = 1e5
"""The strongest pooling: a prior worth this many impressions."""

PRODUCT_PRIOR = (1.0, 19.0)
"""Beta prior of a product's CTR: one click in twenty impressions, the answer when nothing was seen."""

MAX_RELATIVE = 8.0
"""How far a cell's CTR can be expected from its creative's."""

MAX_CTR = 1.0 - 1e-6

PRIOR_SPREAD = 0.25
"""A CTR's standard deviation over its parent's mean, assumed until the counts tell."""

SPREAD_RANGE = (0.02, 1.0)
"""What the spread of creatives can be found to be."""


class CountsError(ValueError):
    """Counts that cannot be: a wrong shape, a negative or unknown count, more clicks than impressions."""


class CountsShapeError(CountsError):
    """Two count arrays do not have the shape that they must share."""

    def __init__(self, n_impressions: tuple[int, ...], n_clicks: tuple[int, ...], allowed: str) -> None:
        super().__init__(
            f"n_impressions has shape {n_impressions} and n_clicks {n_clicks}; allowed is {allowed}. "
            "No CTR was computed."
        )


class ImpossibleCountError(CountsError):
    """One cell's counts are impossible."""

    def __init__(self, cell: tuple[int, ...], n_impressions: float, n_clicks: float) -> None:
        place = ", ".join(str(i) for i in cell)
        super().__init__(
            f"cell ({place}) has {n_clicks:g} clicks of {n_impressions:g} impressions; "
            "allowed is 0 <= clicks <= impressions, both finite. No CTR was computed."
        )


class ProbabilityLevelError(ValueError):
    """A level of confidence outside (0, 1)."""

    def __init__(self, level: float) -> None:
        super().__init__(
            f"level is {level!r}; allowed is a number between 0 and 1, both excluded. No interval was made."
        )


class Strengths(NamedTuple):
    """How strongly each level is pulled to its parent, in impressions."""

    creative: float
    """Creatives to the product."""
    cell: float
    """Cells (a group's count of a creative) to the creative."""


@dataclass(frozen=True, slots=True)
class ShrunkCtr:
    """Posterior CTRs of a product: ``(G, C)`` by group and creative, ``(C,)`` by creative, and one for all.

    ``alpha`` and ``beta`` are the Beta posterior of each cell; ``ctr`` is its mean, ``ctr_low`` and
    ``ctr_high`` its central interval.
    """

    ctr: CountsTable
    ctr_low: CountsTable
    ctr_high: CountsTable
    alpha: CountsTable
    beta: CountsTable
    creative_ctr: NDArray[np.float64]
    product_ctr: float
    strengths: Strengths


def shrink(
    n_impressions: ArrayLike,
    n_clicks: ArrayLike,
    *,
    relative: ArrayLike | None = None,
    given_product: bool = False,
    spread: float = PRIOR_SPREAD,
    level: float = 0.95,
) -> ShrunkCtr:
    """Shrink a product's CTRs: product to creative, creative to (group, creative), by empirical Bayes.

    The model has three levels. The product's CTR has the prior ``PRODUCT_PRIOR``. A creative's CTR is
    spread around it like a Beta worth ``strengths.creative`` impressions, and a cell's CTR around the
    creative's like one worth ``strengths.cell``. Strengths come from the excess of the observed over the
    binomial variance (method of moments), tempered by a weak prior of 25% relative spread: with few data
    the answer is that prior (strong pooling), with many it is the data's. They stay between
    ``MIN_STRENGTH`` and ``MAX_STRENGTH``. With one group the cell is the creative, and its strength is
    the largest.

    The uncertainty of a parent's CTR is passed down (law of total variance) and a Beta is fitted to the
    mean and variance, so intervals are right also for cells without impressions, which get the prior.
    When nothing was seen, every CTR is 0.05, that is (clicks + 1) / (impressions + 20).

    Parameters
    ----------
    n_impressions, n_clicks
        Counts ``(G, C)``, G and C at least 1; fractional counts are allowed.
    relative
        CTRs relative to their creative's that were expected beforehand, ``(G, C)``: a cell is shrunk towards its
        creative's CTR times this. How strongly is again for the counts to say: an expectation that misleads makes the
        cells scatter, and counts little. Ratios beyond ``MAX_RELATIVE`` either way are taken as that.
    given_product
        Take the product's CTR for known. Posteriors and intervals then tell how sure the differences between its
        creatives are, by which one is chosen: how well the product does as a whole is common to them all.
    spread
        The creatives' relative spread that is assumed until the product's own counts tell; `creative_spread` finds it
        in other products.
    level
        Probability that the intervals hold.

    Raises
    ------
    CountsShapeError
        If they are not tables of one shape.
    ImpossibleCountError
        If a cell has more clicks than impressions, or a count is negative or not finite.
    """
    n, x = checked_counts(n_impressions, n_clicks, n_dims=2)
    if not 0.0 < level < 1.0:
        raise ProbabilityLevelError(level)
    ratio = _checked_relative(relative, n.shape)
    # An impression of a cell whose CTR is expected to be twice its creative's is worth two of the creative's.
    n, x = n * ratio, np.minimum(x, n * ratio)
    n_total = float(n.sum())
    pooled = (float(x.sum()) + PRODUCT_PRIOR[0]) / (n_total + sum(PRODUCT_PRIOR))

    cell_pull = 1.0 / MAX_STRENGTH if n.shape[0] == 1 else _spread_of_cells(n, x, pooled)
    # What a cell's counts are worth to its creative, where cells scatter around it.
    weight = 1.0 / (1.0 + n * cell_pull)
    creative_n, creative_x = (n * weight).sum(axis=0), (x * weight).sum(axis=0)  # (C,)
    creative_pull = _spread_of_creatives(creative_n, creative_x, pooled, spread)
    weight_up = 1.0 / (1.0 + creative_n * creative_pull)
    product_n = float((creative_n * weight_up).sum()) + sum(PRODUCT_PRIOR)
    product_ctr = (float((creative_x * weight_up).sum()) + PRODUCT_PRIOR[0]) / product_n
    product_variance = 0.0 if given_product else product_ctr * (1.0 - product_ctr) / (product_n + 1.0)

    creative_ctr, creative_variance = _posterior(creative_n, creative_x, creative_pull, product_ctr, product_variance)
    ctr, variance = _posterior(n, x, cell_pull, creative_ctr, creative_variance)  # (G, C)
    strengths = Strengths(creative=1.0 / creative_pull, cell=1.0 / cell_pull)
    return _beta_posterior(ctr * ratio, variance * ratio**2, creative_ctr, product_ctr, strengths, level)


def scale(posterior: ShrunkCtr, relative: ArrayLike, *, level: float = 0.95) -> ShrunkCtr:
    """Return the CTRs of groups of which only is known what was expected: all users' CTRs times ``relative``.

    Parameters
    ----------
    posterior
        CTRs of all users, ``(1, C)``.
    relative
        The groups' CTRs relative to them, ``(G, C)``.
    level
        Probability that the intervals hold, if the expectation does.

    Raises
    ------
    CountsShapeError
        If the shapes do not fit.
    """
    shape = np.shape(relative)
    if len(shape) != 2 or posterior.ctr.shape != (1, shape[1]):
        raise CountsShapeError(posterior.ctr.shape, shape, "(1, C) and (G, C)")
    ratio = _checked_relative(relative, (shape[0], shape[1]))
    variance = posterior.ctr * (1.0 - posterior.ctr) / (posterior.alpha + posterior.beta + 1.0)
    return _beta_posterior(
        posterior.ctr * ratio,
        variance * ratio**2,
        posterior.creative_ctr,
        posterior.product_ctr,
        posterior.strengths,
        level,
    )


def _checked_relative(relative: ArrayLike | None, shape: tuple[int, ...]) -> CountsTable:
    if relative is None:
        return np.ones(shape)
    ratio = np.asarray(relative, dtype=np.float64)
    if ratio.shape != shape:
        raise CountsShapeError(shape, ratio.shape, "(G, C), the same for counts and what was expected")
    return np.clip(np.nan_to_num(ratio, nan=1.0), 1.0 / MAX_RELATIVE, MAX_RELATIVE)


def _beta_posterior(
    ctr: CountsTable,
    variance: CountsTable,
    creative_ctr: NDArray[np.float64],
    product_ctr: float,
    strengths: Strengths,
    level: float,
) -> ShrunkCtr:
    """Return the CTRs as Beta distributions of some means and variances."""
    ctr = np.minimum(ctr, MAX_CTR)
    strength = np.maximum(ctr * (1.0 - ctr) / variance - 1.0, 1e-3)
    alpha, beta = ctr * strength, (1.0 - ctr) * strength
    tail = 0.5 * (1.0 - level)
    return ShrunkCtr(
        ctr=ctr,
        ctr_low=betaincinv(alpha, beta, tail),
        ctr_high=betaincinv(alpha, beta, 1.0 - tail),
        alpha=alpha,
        beta=beta,
        creative_ctr=creative_ctr,
        product_ctr=product_ctr,
        strengths=strengths,
    )


def _posterior(
    n: CountsTable, x: CountsTable, pull: float, parent_ctr: CountsTable | float, parent_variance: CountsTable | float
) -> tuple[CountsTable, CountsTable]:
    """Mean and variance of a level's CTR, given its counts and the posterior of the level above."""
    to_parent = 1.0 / (1.0 + n * pull)  # how much of the answer is the parent's
    ctr = to_parent * (parent_ctr + x * pull)
    within = ctr * (1.0 - ctr) * pull / (1.0 + (n + 1.0) * pull)
    return ctr, within + np.square(to_parent) * parent_variance


def _spread_of_cells(n: CountsTable, x: CountsTable, pooled: float) -> float:
    """Inverse strength of cells around their creatives, by moments over all creatives."""
    totals = n.sum(axis=0)  # (C,)
    safe = np.maximum(totals, 1e-12)
    means = x.sum(axis=0) / safe
    scatter = (x * x / np.maximum(n, 1e-12)).sum(axis=0) - means * means * totals
    noise = means * (1.0 - means) * totals / np.maximum(totals - 1.0, 1.0)
    freedom = np.maximum((n > 0.0).sum(axis=0) - 1, 0)
    leverage = totals - (n * n).sum(axis=0) / safe
    moments = _Moments(
        excess=float((scatter - freedom * noise).sum()),
        leverage=float((leverage * noise).sum()),
        n_noise=float(leverage.sum()),
        freedom=float(freedom.sum()),
    )
    return _pull(moments, PRIOR_SPREAD, pooled)


def _spread_of_creatives(n: NDArray[np.float64], x: NDArray[np.float64], pooled: float, spread: float) -> float:
    """Inverse strength of creatives around the product, by moments; counts are those that count for it."""
    return _pull(_creative_moments(n, x), spread, pooled)


def creative_spread(products: Iterable[NDArray[np.float64]]) -> float:
    """Return how far products' creatives are spread: a CTR's standard deviation over its product's mean.

    One product has too few creatives to tell; all of them together do, by the same moments and the same prior as in
    `shrink`, whose counts it makes go further. Without counts it is `PRIOR_SPREAD`.

    Parameters
    ----------
    products
        Impressions and clicks of each product's creatives, (2, C).
    """
    prior = PRIOR_SPREAD**2
    precision, weighted = 1.0 / prior**2, 1.0 / prior
    seen_any = False
    for n, x in products:
        moments = _creative_moments(n, x)
        total = float(n.sum())
        if moments.tells_nothing or not 0.0 < (ctr := float(x.sum()) / total) < 1.0:
            continue
        odds = ctr / (1.0 - ctr)
        seen = moments.precision(prior * odds) * odds**2
        precision, weighted = precision + seen, weighted + seen * moments.excess / moments.leverage / odds
        seen_any = True
    if not seen_any:
        return PRIOR_SPREAD
    low, high = SPREAD_RANGE
    return min(max(math.sqrt(_mean_above_zero(weighted / precision, precision)), low), high)


class _Moments(NamedTuple):
    """What a spread is estimated from: the scatter beyond the noise, and how much of it a spread of one would make."""

    excess: float
    leverage: float
    n_noise: float
    freedom: float

    @property
    def tells_nothing(self) -> bool:
        return self.leverage <= 0.0 or self.freedom <= 0.0

    def precision(self, pull: float) -> float:
        """Return the precision of the estimate of an inverse strength that is about ``pull``."""
        return 1.0 / (2.0 / self.freedom * (self.freedom / self.n_noise + pull) ** 2)


def _creative_moments(n: NDArray[np.float64], x: NDArray[np.float64]) -> _Moments:
    total = max(float(n.sum()), 1e-12)
    mean = float(x.sum()) / total
    scatter = float((x * x / np.maximum(n, 1e-12)).sum()) - mean * mean * total
    noise = mean * (1.0 - mean) * total / max(total - 1.0, 1.0)
    freedom = max(int((n > 0.0).sum()) - 1, 0)
    leverage = total - float((n * n).sum()) / total
    return _Moments(
        excess=scatter - freedom * noise, leverage=leverage * noise, n_noise=leverage, freedom=float(freedom)
    )


def _pull(moments: _Moments, spread: float, pooled: float) -> float:
    """Return an inverse strength, seen through its moment estimate and a weak prior."""
    prior = spread**2 * pooled / (1.0 - pooled)
    precision, mean = 1.0 / prior**2, prior
    if not moments.tells_nothing:
        seen = moments.precision(prior)
        mean = (prior * precision + moments.excess / moments.leverage * seen) / (precision + seen)
        precision += seen
    return min(max(_mean_above_zero(mean, precision), 1.0 / MAX_STRENGTH), 1.0 / MIN_STRENGTH)


def _mean_above_zero(mean: float, precision: float) -> float:
    """Return the mean of a spread that is not negative: that of a normal cut off at zero.

    The moment estimate alone is zero for half of the tables without spread and says then, wrongly, that nothing
    differs; this is what keeps intervals honest.
    """
    deviation = 1.0 / math.sqrt(precision)
    z = mean / deviation
    # The ratio of the normal density to its distribution at z, in a form that keeps its digits far out.
    tail = float(erfcx(-z / math.sqrt(2.0)))
    return mean + deviation * math.sqrt(2.0 / math.pi) / tail if tail else 0.0  # z beyond all numbers: at the cut


def checked_counts(n_impressions: ArrayLike, n_clicks: ArrayLike, *, n_dims: int) -> tuple[CountsTable, CountsTable]:
    """Return two count arrays as float64, clicks capped against rounding.

    Raises
    ------
    CountsShapeError
        If they differ in shape, are empty, or do not have ``n_dims`` dimensions.
    ImpossibleCountError
        If an entry has more clicks than impressions, or a count is negative or not finite.
    """
    n = np.asarray(n_impressions, dtype=np.float64)
    x = np.asarray(n_clicks, dtype=np.float64)
    if n.shape != x.shape or n.ndim != n_dims or n.size == 0:
        kind = "(G, C), the same for both, G and C at least 1" if n_dims > 1 else "(n_buckets,), the same for both"
        raise CountsShapeError(n.shape, x.shape, kind)
    # A decayed count may miss its bound by rounding alone.
    possible = (x >= 0.0) & (x <= n * (1.0 + 1e-9) + 1e-9) & np.isfinite(n)
    if not possible.all():
        cell = tuple(int(i) for i in np.argwhere(~possible)[0])
        raise ImpossibleCountError(cell, float(n[cell]), float(x[cell]))
    return n, np.minimum(x, n)
