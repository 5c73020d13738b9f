"""Priors of new creatives: what the GRM says of one, and how many impressions that is worth to the bandit.

Suppose the log-CTRs of a product's creatives in a group are spread normally, with a standard deviation of ``spread``,
and that the GRM's score correlates with them by r. Of two creatives it then names the better one with probability

    accuracy = 1/2 + arcsin(r) / pi,    so    r = sin(pi (accuracy - 1/2)).

Accuracy was measured on held-out pairs; its lower 95% bound (Wilson) counts, so that few pairs promise little and a GRM
that may be guessing promises nothing. After the GRM has spoken, the variance of a log-CTR is spread^2 (1 - r^2). Then

- a creative that beats a typical one with (calibrated) probability p has a log-CTR higher by
  spread sqrt(2 (1 - r^2)) Phi^-1(p): `Prior.relative_ctr` is e to that;
- a Beta distribution of mean m and relative variance v is worth (1 - m) / (m v) - 1 impressions. With v = spread^2
  before and v = spread^2 (1 - r^2) after, the GRM has added (1 - m) / (m spread^2) r^2 / (1 - r^2):
  `Prior.n_impressions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

from generator.wilson import wilson_interval

_NORMAL: Final = NormalDist()

MAX_DEVIATIONS: Final = 2.0
"""How far from its mean a GRM's word is believed, in standard deviations of what one of its accuracy says."""

MAX_CORRELATION: Final = 0.99


@dataclass(frozen=True)
class Prior:
    """What is believed of a new creative: its CTR relative to the group's others, worth so many impressions."""

    relative_ctr: float
    n_impressions: float


def correlation(accuracy: float, n_pairs: int) -> float:
    """Return how a GRM's score correlates with the log-CTR at least, in [0, 1), by what was measured of it.

    Parameters
    ----------
    accuracy
        Share of held-out pairs whose winner it named.
    n_pairs
        How many pairs those were.
    """
    if n_pairs <= 0:
        return 0.0
    low, _ = wilson_interval(accuracy, n_pairs)
    return min(math.sin(math.pi * (low - 0.5)), MAX_CORRELATION) if low > 0.5 else 0.0


def grm_prior(log_odds: float, r: float, *, ctr: float, spread: float) -> Prior | None:
    """Return what a GRM's word on a creative is worth; None where it is worth nothing.

    Parameters
    ----------
    log_odds
        That it is clicked more than a typical one of the group's creatives.
    r
        The GRM's `correlation`.
    ctr
        CTR of the group's creatives.
    spread
        Standard deviation of the creatives' log-CTRs.
    """
    if r <= 0.0 or not 0.0 < ctr < 1.0:
        return None
    p = min(max(1.0 / (1.0 + math.exp(-max(min(log_odds, 40.0), -40.0))), 1e-9), 1.0 - 1e-9)
    most = MAX_DEVIATIONS * r * spread * math.sqrt(2.0)
    lift = min(max(spread * math.sqrt(2.0 * (1.0 - r**2)) * _NORMAL.inv_cdf(p), -most), most)
    mean = min(ctr * math.exp(lift), 0.99)
    return Prior(math.exp(lift), (1.0 - mean) / (mean * spread**2) * r**2 / (1.0 - r**2))
