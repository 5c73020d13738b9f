"""Relevance: which attribute decides what users prefer, found from clicks without learning it first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

N_DIRECTIONS = 8
"""Directions of image values that are looked at: those along which the shown creatives differ most."""

MIN_USERS = 20
"""Rows with a value of an attribute below which the value is left out."""


def attribute_relevance(
    residuals: Floats, values: Floats, attributes: npt.NDArray[np.uint8], cardinalities: Sequence[int]
) -> Floats:
    """Return how far each attribute's values differ in which images are clicked, in standard deviations, (N,).

    It is a score test of the interaction between the attribute and the image: 0 on average for an attribute that
    does not matter, and growing with the square root of the rows for one that does. An attribute that goes with
    the one that matters (age with child age) shows a part of it.

    Parameters
    ----------
    residuals
        Click less its predicted probability without any preference, (B,).
    values
        What the preference model sees in each row's image, less the mean of the product's images, (B, D).
    attributes
        Codes, (B, N).
    cardinalities
        Number of codes of each attribute.
    """
    scores = residuals[:, None] * (values @ _directions(values))  # (B, Q)
    scores -= scores.mean(axis=0)
    deviation = scores.std(axis=0)
    scores = scores[:, deviation > 0] / deviation[deviation > 0]
    found = np.zeros(len(cardinalities))
    for field, cardinality in enumerate(cardinalities):
        counts = np.bincount(attributes[:, field], minlength=cardinality)
        kept = counts >= MIN_USERS
        n_free = (int(kept.sum()) - 1) * scores.shape[1]
        if n_free <= 0:
            continue
        sums = np.stack(
            [np.bincount(attributes[:, field], weights=column, minlength=cardinality) for column in scores.T], axis=1
        )  # (V, Q)
        statistic = float((sums[kept] ** 2 / counts[kept, None]).sum())
        found[field] = (statistic - n_free) / np.sqrt(2 * n_free)
    return found


def _directions(values: Floats) -> Floats:
    """Return the directions along which values (B, D) differ most, scaled to unit spread, (D, Q)."""
    spread = values.T @ values / len(values)  # (D, D)
    variances, vectors = np.linalg.eigh(spread)
    chosen = np.flatnonzero(variances > 1e-9 * max(variances[-1], 1e-30))[-N_DIRECTIONS:]
    directions: Floats = vectors[:, chosen] / np.sqrt(variances[chosen])
    return directions
