"""The exposure policy: with which chance each creative is shown.

Probability matching (Thompson sampling, with the chances written out): a creative is shown as often
as it is the best among draws from the posteriors, mixed with a uniform share. The chances are
computed first and then drawn from, so the logged propensity is exact.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

from state.records import CreativeRecord

Floats = npt.NDArray[np.float64]

Arm = Literal["group", "all"]

ARMS: tuple[Arm, Arm] = ("group", "all")
"""The arms: the best creative for the user's group, and the best one for all."""


def best_chances(
    alpha: Floats, beta: Floats, *, n_draws: int, explore_share: float, rng: np.random.Generator
) -> Floats:
    """Return the chance with which each creative is shown, rows summing to 1.

    Parameters
    ----------
    alpha, beta
        Beta posteriors of the CTRs, (G, C).
    n_draws
        Draws of each posterior.
    explore_share
        Share that is uniform over the creatives, in [0, 1].
    """
    n_groups, n_creatives = alpha.shape
    draws = rng.beta(alpha, beta, size=(n_draws, n_groups, n_creatives))
    best = draws.argmax(axis=2)  # (n_draws, G)
    chances = np.stack([np.bincount(best[:, group], minlength=n_creatives) for group in range(n_groups)]) / n_draws
    return np.asarray((1 - explore_share) * chances + explore_share / n_creatives)


def add_prior(
    n_impressions: Floats, n_clicks: Floats, place: tuple[int, int], creative: CreativeRecord, *, product_ctr: float
) -> None:
    """Count what is believed of a new creative as impressions and clicks of the group that it was made for, in place.

    Clicks are those of the group's other creatives, or of the product where it has seen none, times what is believed
    of its CTR relative to them. Impressions that are really had weigh as much each, so the belief fades behind them.

    Parameters
    ----------
    n_impressions, n_clicks
        Counts, (G, C).
    place
        The group's row and the creative's column.
    creative
        The creative, with its prior.
    product_ctr
        The product's CTR.
    """
    group, column = place
    n_others = float(n_impressions[group].sum() - n_impressions[group, column])
    n_others_clicked = float(n_clicks[group].sum() - n_clicks[group, column])
    ctr = (n_others_clicked + product_ctr) / (n_others + 1.0)
    n_impressions[place] += creative.prior_impressions
    n_clicks[place] += creative.prior_impressions * min(ctr * creative.prior_relative_ctr, 1.0)


def arm_of(experiment: str, user_id: str) -> Arm:
    """Return a user's arm: half of the users each, the same at every call."""
    # A checksum such as CRC-32 is linear: the arms of two experiments would be tied to each other.
    digest = hashlib.blake2b(f"{experiment}|{user_id}".encode(), digest_size=1).digest()
    return ARMS[digest[0] & 1]
