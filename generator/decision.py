"""Decision: whether new creatives for a group are worth what they cost.

The log-CTR of a new creative is taken as normal: its mean is that of the best proposal's words, its deviation that of
what is known of them (`generator.word_posterior`). A GRM whose score correlates with log-CTRs by r, and that chooses
among n pictures, raises the mean by r times the deviation times the mean of the largest of n standard normals, and
leaves the deviation times sqrt(1 - r^2). Since serving goes on with the best there is when the new one proves worse,
what a showing gains is the *expected improvement* E[max(new - best, 0)].
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final

import msgspec

from generator.settings import RefreshSettings

_NORMAL: Final = NormalDist()


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """What was decided for a group, and the numbers that decided it.

    ``best_ctr`` is that of the group's best creative now, ``expected_ctr`` and ``deviation`` the median and the
    deviation of the log of a new one's. ``gained_clicks`` are expected within `RefreshSettings.horizon_days`;
    ``cost`` and ``budget_left`` are in the currency of the settings, the latter before this group. ``refused`` says why
    it was not worth it, None where it was.
    """

    best_ctr: float
    expected_ctr: float
    deviation: float
    impressions_per_day: float
    gained_clicks: float
    cost: float
    budget_left: float
    refused: str | None


def largest_of(n: int) -> float:
    """Return about the mean of the largest of n standard normals (Blom)."""
    return _NORMAL.inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def expected_improvement(median: float, deviation: float, best: float) -> float:
    """Return E[max(x - best, 0)] of a log-normal x with this median and deviation of the logarithm."""
    if best <= 0.0:
        return median * math.exp(deviation**2 / 2)
    if deviation <= 0.0:
        return max(median - best, 0.0)
    z = math.log(median / best) / deviation
    return max(median * math.exp(deviation**2 / 2) * _NORMAL.cdf(z + deviation) - best * _NORMAL.cdf(z), 0.0)


def decide(
    settings: RefreshSettings,
    *,
    best_ctr: float,
    expected_ctr: float,
    deviation: float,
    r: float,
    n_candidates: int,
    n_images: int,
    impressions_per_day: float,
    budget_left: float,
    is_ordered: bool,
) -> Decision:
    """Decide whether to make creatives for a group.

    Parameters
    ----------
    settings
        Costs, values and the budget.
    best_ctr
        CTR of the group's best creative; 0 where it has none.
    expected_ctr, deviation
        CTR expected of the best proposal, and the deviation of its log-odds.
    r, n_candidates
        Correlation of the GRM's scores with log-CTRs, 0 without a GRM; among how many pictures it chooses.
    n_images
        Pictures that would be drawn.
    impressions_per_day
        Of the group.
    budget_left
        What is left for the product on that day.
    is_ordered
        Whether a person has asked for it: then it is not weighed.
    """
    median = expected_ctr * math.exp(r * deviation * largest_of(n_candidates))
    rest = deviation * math.sqrt(1.0 - r**2)
    gain = expected_improvement(median, rest, best_ctr)
    n_clicks = gain * impressions_per_day * settings.horizon_days
    cost = n_images * settings.cost_per_image
    refused = None
    if is_ordered:
        pass
    elif cost > budget_left + 1e-9:
        refused = (
            f"it would cost {cost:.3g} and {max(budget_left, 0.0):.3g} is left of "
            f"generator.refresh.budget_per_product_day = {settings.budget_per_product_day:g}"
        )
    elif n_clicks * settings.value_per_click < cost:
        refused = (
            f"{n_clicks:.2f} clicks more are expected in {settings.horizon_days:g} days, worth "
            f"{n_clicks * settings.value_per_click:.3g}; it would cost {cost:.3g}"
        )
    return Decision(best_ctr, median, rest, impressions_per_day, n_clicks, cost, budget_left, refused)
