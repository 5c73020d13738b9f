"""Profiles: who is in a group, in words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from online.attributes import N_RESERVED, AttributeSchema
from online.limits import N_TRAITS
from state.records import ProfileTrait

MIN_SHARE = 0.05


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
    found: list[tuple[float, ProfileTrait]] = []
    for position, name in enumerate(schema.names):
        n_codes = schema.cardinalities[position]
        share = np.bincount(members[:, position], minlength=n_codes) / len(members)
        base = np.bincount(everyone[:, position], minlength=n_codes) / len(everyone)
        error = np.sqrt(base * (1 - base) / len(members))
        for code in range(N_RESERVED, n_codes):
            word = schema.word(position, code)
            if word is None or share[code] < MIN_SHARE or share[code] <= base[code]:
                continue
            strength = (share[code] - base[code]) / max(float(error[code]), 1e-9)
            if strength > 2:
                trait = ProfileTrait(name, word, float(share[code]), float(share[code] / base[code]))
                found.append((float(strength), trait))
    found.sort(key=lambda item: -item[0])
    return [trait for _, trait in found[:N_TRAITS]]
