"""Limits: the most that one product may hold, by the settings that decide it."""

from __future__ import annotations

from typing import NamedTuple

from state.records import N_FEATURE_POINTS

N_TRAITS = 5
"""Traits of a group's profile, at most."""

LINEAGE_KEPT = 50
"""Lineage entries of a product that are kept, the newest."""

DEAD_GROUPS_KEPT = 5
"""Groups that were split up whose counts are kept under their own ids, the newest of a product.

Those of earlier ones are added to the counts from before the first grouping, under id 0.
"""

N_RETIRED = 200
"""Retired groups whose successors the bound has room for."""

BYTES_PER_CELL = 960
"""What a (group, creative) takes: measured, 515 bytes in the counts and 399 in a detector's evidence, at ids of 200."""

BYTES_PER_COMMON = 184
"""What the mean preference for a creative takes in a detector: measured, 173 bytes."""

BYTES_PER_TRAIT = 768
BYTES_PER_RECORD = 512
"""What a group's, an expectation's or a clustering's record takes beside its arrays."""

BYTES_PER_ENTRY = 160
"""What an entry of lineage or of the retired groups takes."""


class ProductBytes(NamedTuple):
    """The most that one product holds, in bytes: its sample of users, its groups, and its counts."""

    sample: int
    groups: int
    counts: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def most_product_bytes(
    *, n_sampled: int, n_attributes: int, d_model: int, k_min: int, k_max: int, n_creatives: int
) -> ProductBytes:
    """Return the most bytes that one product holds in memory while it is resident; in the state it takes fewer.

    Covered are the reservoir, the centroids of every K, the groups with features, profiles and lineage, the counts of
    all groups that are kept apart, the expectation, and the detector with its evidence. Two things grow further. A
    product may have more creatives than ``n_creatives``. And a retired group's successor is never forgotten, since a
    click of its users may still come: there is room for `N_RETIRED` of them, each further one takes 10 bytes in the
    state and up to 160 in memory.

    Not covered, and never parked, are the registry (titles, image features) and the searches for the attribute that
    decides: a product without a category has one of its own after a shift.

    Parameters
    ----------
    n_sampled, n_attributes
        Users in the reservoir, those that are lent to it among them, and their attributes.
    d_model
        Width of the embeddings.
    k_min, k_max
        Fewest and most groups.
    n_creatives
        Creatives of the product.
    """
    n_ks = k_max - k_min + 1
    n_centroids = sum(range(k_min, k_max + 1))
    n_groups = 1 + k_max + DEAD_GROUPS_KEPT
    return ProductBytes(
        sample=n_sampled * (n_attributes + 4 + n_ks) + BYTES_PER_RECORD * n_ks,
        groups=(
            n_centroids * 4 * (d_model + 1)
            + k_max * (N_FEATURE_POINTS * 4 * d_model + N_TRAITS * BYTES_PER_TRAIT + BYTES_PER_RECORD)
            + (LINEAGE_KEPT + N_RETIRED) * BYTES_PER_ENTRY
            + BYTES_PER_RECORD
        ),
        counts=n_creatives * (n_groups * BYTES_PER_CELL + k_max * 4 + BYTES_PER_COMMON) + BYTES_PER_RECORD,
    )
