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


def arm_of(experiment: str, user_id: str) -> Arm:
    """Return a user's arm: half of the users each, the same at every call."""
    # A checksum such as CRC-32 is linear: the arms of two experiments would be tied to each other.
    digest = hashlib.blake2b(f"{experiment}|{user_id}".encode(), digest_size=1).digest()
    return ARMS[digest[0] & 1]
