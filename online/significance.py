"""Comparisons of click-through rates: which is better, whether groups differ, and the ratio of two arms.

Everything here is a pure function of counts, as in `online.ctr`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaln, chdtrc, digamma, expit, logit, ndtr, stdtrit, zeta

from online.ctr import CountsShapeError, CountsTable, ProbabilityLevelError, checked_counts

_EDGEWORTH_FROM = 8.0
"""Smallest Beta parameter from which the Edgeworth series is within 5e-4 of the exact probability."""

_NODES_A_SIDE = 64
"""Quadrature nodes on each side of the mode."""

_MIN_EXPECTED = 0.5
"""Cells that expect fewer clicks (or non-clicks) than this are left out of the test of an interaction.

Of 3,000 tables without one, 3% to 5.1% were below 0.05 with this bound; up to 6.4% with a bound of 1.
"""


class BetaParameterError(ValueError):
    """A Beta distribution's parameter that is not positive and finite."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"{name} holds {value!r}; allowed are positive finite numbers. No probability was computed.")


class RatioInterval(NamedTuple):
    """The ratio of two CTRs with its interval."""

    ratio: float
    low: float
    high: float


def p_better(alpha_a: ArrayLike, beta_a: ArrayLike, alpha_b: ArrayLike, beta_b: ArrayLike) -> CountsTable:
    """Probability that a CTR with posterior Beta(a) is above one with posterior Beta(b).

    Where all four parameters are at least 8, the difference of the two logits, whose cumulants are sums
    of polygammas, is expanded by Edgeworth's series to the second order (error at most 5e-4; the plain
    normal approximation is up to 1.6e-2 off there). Elsewhere the integral of the density of b times the upper
    tail of a is taken by Gauss-Legendre quadrature on the logit scale (error at most 1e-4 for parameters from
    0.3 up; below that, which `shrink` hardly ever gives, up to 2e-2 at 0.05).

    Parameters
    ----------
    alpha_a, beta_a, alpha_b, beta_b
        Posterior parameters, of shapes that broadcast.

    Returns
    -------
    An array of the broadcast shape; ``p_better(a, b) + p_better(b, a)`` is 1 within the error.

    Raises
    ------
    BetaParameterError
        If a parameter is not positive and finite.
    """
    parameters = [np.asarray(value, dtype=np.float64) for value in (alpha_a, beta_a, alpha_b, beta_b)]
    for name, values in zip(("alpha_a", "beta_a", "alpha_b", "beta_b"), parameters, strict=True):
        wrong = ~(np.isfinite(values) & (values > 0.0))
        if wrong.any():
            raise BetaParameterError(name, float(values[wrong].flat[0]))
    spread = np.broadcast_arrays(*parameters)
    shape = spread[0].shape
    flat = np.stack([values.ravel() for values in spread])  # (4, N)
    p = np.empty(flat.shape[1])
    large = flat.min(axis=0) >= _EDGEWORTH_FROM
    if large.any():
        p[large] = _p_better_edgeworth(*flat[:, large])
    small = np.flatnonzero(~large)
    for start in range(0, small.size, 4096):  # 4096 x nodes doubles at a time
        chunk = small[start : start + 4096]
        sides = flat[:, chunk]
        # Integrate over the narrower density, where the other's tail is smooth: P(A > B) = 1 - P(B > A).
        turn = sides[:2].min(axis=0) > sides[2:].min(axis=0)
        sides = np.where(turn, sides[[2, 3, 0, 1]], sides)
        above = _p_better_quadrature(*sides)
        p[chunk] = np.where(turn, 1.0 - above, above)
    return np.clip(p, 0.0, 1.0).reshape(shape)


def _p_better_edgeworth(
    alpha_a: CountsTable, beta_a: CountsTable, alpha_b: CountsTable, beta_b: CountsTable
) -> CountsTable:
    up, down = np.stack([alpha_a, beta_b]), np.stack([beta_a, alpha_b])
    mean = (digamma(up) - digamma(down)).sum(axis=0)
    # Polygammas: psi_m(x) = (-1)^(m+1) m! zeta(m+1, x).
    variance = (zeta(2.0, up) + zeta(2.0, down)).sum(axis=0)
    third = -2.0 * (zeta(3.0, up) - zeta(3.0, down)).sum(axis=0)
    fourth = 6.0 * (zeta(4.0, up) + zeta(4.0, down)).sum(axis=0)
    deviation = np.sqrt(variance)
    skew, kurtosis = third / deviation**3, fourth / variance**2
    z = -mean / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    series = (
        skew / 6.0 * (z**2 - 1.0)
        + kurtosis / 24.0 * (z**3 - 3.0 * z)
        + skew**2 / 72.0 * (z**5 - 10.0 * z**3 + 15.0 * z)
    )
    return np.asarray(ndtr(-z) + density * series, dtype=np.float64)


def _p_better_quadrature(
    alpha_a: CountsTable, beta_a: CountsTable, alpha_b: CountsTable, beta_b: CountsTable
) -> CountsTable:
    # The logit of a Beta falls off like exp(alpha t) to the left and exp(-beta t) to the right, often on very
    # different scales: each side of the mode gets its own nodes, dense near the mode, until 1e-7 is left.
    nodes, weights = _legendre(_NODES_A_SIDE)
    mode = np.log(alpha_b / beta_b)
    spread = 8.0 / np.sqrt(1.0 / (1.0 / alpha_b + 1.0 / beta_b))
    left, right = spread + 16.0 / alpha_b, spread + 16.0 / beta_b
    at = mode[:, None] + np.concatenate(
        [-left[:, None] * nodes**2, right[:, None] * nodes**2], axis=1
    )  # (N, 2 * nodes)
    step = 2.0 * nodes * weights
    mass_of = np.concatenate([left[:, None] * step, right[:, None] * step], axis=1)
    log_density = (
        alpha_b[:, None] * -np.logaddexp(0.0, -at)
        + beta_b[:, None] * -np.logaddexp(0.0, at)
        - betaln(alpha_b, beta_b)[:, None]
    )
    # 1 - I_x(alpha, beta) = I_(1-x)(beta, alpha), and 1 - expit(t) = expit(-t) keeps its digits.
    above = betainc(beta_a[:, None], alpha_a[:, None], expit(-at))
    mass = np.exp(log_density) * mass_of
    return np.asarray((mass * above).sum(axis=1) / mass.sum(axis=1), dtype=np.float64)


@functools.cache
def _legendre(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return 0.5 * (nodes + 1.0), 0.5 * weights  # on [0, 1]


def interaction_p_value(n_impressions: ArrayLike, n_clicks: ArrayLike) -> float:
    """P-value of the hypothesis that all groups rank the creatives alike.

    A likelihood-ratio test of logistic models: group and creative main effects (a group may click more
    on everything) against the saturated model. A small value says that preferences differ by group.

    What carries no information is left out, and the degrees of freedom count what is left: cells
    without impressions, groups and creatives without a click (or with nothing but clicks), and cells that
    expect less than half a click or non-click, where the chi-square law fails. The statistic is divided by
    a Bartlett factor taken from the expected counts, without the margins' share: for small counts it is
    a little too large, so the test is conservative there. Where nothing is left to test, the answer is 1.

    Raises
    ------
    CountsShapeError
        If the two are not tables of one shape.
    ImpossibleCountError
        If a cell has more clicks than impressions, or a count is negative or not finite.
    """
    n, x = checked_counts(n_impressions, n_clicks, n_dims=2)
    n, x = n.copy(), x.copy()
    for _ in range(3):
        n, x = _informative(n, x)
        freedom = _interaction_freedom(n)
        if freedom < 1:
            return 1.0
        expected = _fit_main_effects(n, x)
        doubtful = (n > 0.0) & (np.minimum(expected, n - expected) < _MIN_EXPECTED)
        if not doubtful.any():
            break
        n[doubtful] = x[doubtful] = 0.0
    else:
        n, x = _informative(n, x)
        freedom = _interaction_freedom(n)
        if freedom < 1:
            return 1.0
        expected = _fit_main_effects(n, x)
    kept = n > 0.0
    n, x, expected = n[kept], x[kept], expected[kept]
    misses, expected_misses = n - x, n - expected
    deviance = 2.0 * float((_x_log_ratio(x, expected) + _x_log_ratio(misses, expected_misses)).sum())
    bartlett = 1.0 + float((1.0 / expected + 1.0 / expected_misses - 1.0 / n).sum()) / (6.0 * freedom)
    return float(chdtrc(freedom, max(deviance, 0.0) / bartlett))


def _x_log_ratio(x: CountsTable, expected: CountsTable) -> CountsTable:
    return np.where(x > 0.0, x * np.log(np.maximum(x, 1e-300) / np.maximum(expected, 1e-300)), 0.0)


def _informative(n: CountsTable, x: CountsTable) -> tuple[CountsTable, CountsTable]:
    """Drop groups and creatives that have no click, nothing but clicks, or a single cell; until none is left."""
    while n.size:
        keep = []
        for axis in (1, 0):
            totals, clicks = n.sum(axis=axis), x.sum(axis=axis)
            keep.append((clicks > 0.0) & (clicks < totals) & ((n > 0.0).sum(axis=axis) > 1))
        if all(kept.all() for kept in keep):
            break
        n, x = n[np.ix_(*keep)], x[np.ix_(*keep)]
    return n, x


def _interaction_freedom(n: CountsTable) -> int:
    """Degrees of freedom: cells less the rank of the main effects (nodes less connected parts)."""
    if not n.size:
        return 0
    filled = n > 0.0
    n_rows, n_columns = n.shape
    # Parts of the graph whose nodes are rows and columns and whose edges are filled cells.
    part = np.arange(n_rows)
    while True:
        column_part = np.where(filled, part[:, None], n_rows).min(axis=0)
        merged = np.where(filled, column_part[None, :], n_rows).min(axis=1)
        if np.array_equal(merged, part):
            break
        part = merged
    freedom: int = int(filled.sum()) - n_rows - n_columns + np.unique(part).size
    return freedom


def _fit_main_effects(n: CountsTable, x: CountsTable) -> CountsTable:
    """Fit the logistic model of group and creative effects by Newton steps; return its expected clicks."""
    n_rows = len(n)
    # From the margins' own rates, which are between 0 and 1 in an informative table, a few steps are enough.
    of_rows, of_columns = (logit(x.sum(axis=axis) / n.sum(axis=axis)) for axis in (1, 0))
    effects = np.concatenate([of_rows, of_columns - logit(x.sum() / n.sum())])
    information = np.zeros((effects.size, effects.size))
    rows, columns = slice(0, n_rows), slice(n_rows, None)
    expected = n * expit(effects[rows, None] + effects[None, columns])
    for _ in range(25):
        weight = np.maximum(expected * (1.0 - expected / np.maximum(n, 1e-300)), 1e-12 * n)
        residual = x - expected
        gradient = np.concatenate([residual.sum(axis=1), residual.sum(axis=0)])
        information[rows, columns] = weight
        information[columns, rows] = weight.T
        diagonal = np.concatenate([weight.sum(axis=1), weight.sum(axis=0)])
        # One direction per connected part is free (add to groups, take from creatives): a tiny ridge fixes it.
        np.fill_diagonal(information, diagonal * (1.0 + 1e-9) + 1e-12)
        step = np.linalg.solve(information, gradient)
        effects += np.clip(step, -3.0, 3.0)
        expected = n * expit(effects[rows, None] + effects[None, columns])
        if float(np.abs(gradient).max()) < 1e-8 * max(1.0, float(x.sum())):
            break
    return np.asarray(expected, dtype=np.float64)


def ratio_interval(
    n_impressions_a: ArrayLike,
    n_clicks_a: ArrayLike,
    n_impressions_b: ArrayLike,
    n_clicks_b: ArrayLike,
    *,
    level: float = 0.95,
) -> RatioInterval:
    """Ratio of arm a's CTR to arm b's, with an interval that knows that a user's impressions are alike.

    Users are what is randomised and are hashed into buckets, so the scatter between buckets holds the
    clustering by user. The delta method gives each bucket's influence on the logarithm of the ratio; their
    variance and Student's quantile give the interval. The influences of both arms are added bucket by bucket
    before squaring, so that anything that the arms share in a bucket is accounted for.

    Parameters
    ----------
    n_impressions_a, n_clicks_a, n_impressions_b, n_clicks_b
        Counts ``(n_buckets,)`` of each arm, the same buckets in both; at least two buckets.
    level
        Probability that the interval holds.

    Returns
    -------
    Ratio, low and high. An arm without clicks leaves the logarithm without a scale: the interval is then
    (0, inf), and the ratio 0, inf or, where it is unknown, nan.

    Raises
    ------
    CountsShapeError
        If the four are not vectors of one length of at least two.
    ImpossibleCountError
        If a bucket has more clicks than impressions, or a count is negative or not finite.
    """
    n_a, x_a = checked_counts(n_impressions_a, n_clicks_a, n_dims=1)
    n_b, x_b = checked_counts(n_impressions_b, n_clicks_b, n_dims=1)
    if not 0.0 < level < 1.0:
        raise ProbabilityLevelError(level)
    if n_a.shape != n_b.shape or n_a.size < 2:
        raise CountsShapeError(n_a.shape, n_b.shape, "one length of at least two buckets for both arms")
    total_x_a, total_x_b = float(x_a.sum()), float(x_b.sum())
    ctr_a = total_x_a / float(n_a.sum()) if n_a.any() else math.nan
    ctr_b = total_x_b / float(n_b.sum()) if n_b.any() else math.nan
    if not (total_x_a > 0.0 and total_x_b > 0.0):
        if math.isnan(ctr_a) or math.isnan(ctr_b) or ctr_a == ctr_b == 0.0:
            return RatioInterval(math.nan, 0.0, math.inf)
        return RatioInterval(0.0 if ctr_a == 0.0 else math.inf, 0.0, math.inf)
    influence = (x_a - ctr_a * n_a) / total_x_a - (x_b - ctr_b * n_b) / total_x_b  # (n_buckets,)
    n_buckets = influence.size
    deviation = math.sqrt(float(np.square(influence).sum()) * n_buckets / (n_buckets - 1))
    reach = float(stdtrit(n_buckets - 1, 0.5 * (1.0 + level))) * deviation
    ratio = ctr_a / ctr_b
    return RatioInterval(ratio, ratio * math.exp(-reach), ratio * math.exp(reach))
