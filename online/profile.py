"""Profiles: who is in a group, in words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.limits import N_TRAITS
from state.records import ProfileTrait

MIN_SHARE = 0.05
MIN_STRENGTH = 2.0
"""Standard errors by which a trait's share is above that of all of the product's users."""


def group_profile(
    members: npt.NDArray[np.uint8], everyone: npt.NDArray[np.uint8], schema: AttributeSchema
) -> list[ProfileTrait]:
    """Return the traits that set a group apart from all of the product's users, the strongest first.

    Parameters
    ----------
    members, everyone
        Attribute codes of the group's users (m, N) and of the product's (n, N).

    Notes
    -----
    A trait's strength is its share's excess in standard errors of a sample as small as the group,
    so that a rare value with a large lift by chance does not lead.
    """
    if not len(members):
        return []
    cardinalities = np.array(schema.cardinalities)
    starts = np.cumsum(cardinalities) - cardinalities
    # The codes of all attributes are numbered through, so that one count tells all shares.
    share, base = (
        np.bincount((codes + starts).ravel(), minlength=int(cardinalities.sum())) / len(codes)
        for codes in (members, everyone)
    )
    error = np.sqrt(base * (1 - base) / len(members))
    strength = (share - base) / np.maximum(error, 1e-9)
    found: list[tuple[float, ProfileTrait]] = []
    for number in np.flatnonzero((share >= MIN_SHARE) & (strength > MIN_STRENGTH)).tolist():
        position = int(np.searchsorted(starts, number, side="right")) - 1
        word = schema.word(position, number - int(starts[position]))
        if word is not None:
            trait = ProfileTrait(
                schema.names[position], word, float(share[number]), float(share[number] / base[number])
            )
            found.append((float(strength[number]), trait))
    found.sort(key=lambda item: -item[0])
    return [trait for _, trait in found[:N_TRAITS]]
