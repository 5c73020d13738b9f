"""Look-alikes: groups of other products whose members differ from their product's other users as a group's do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from generator.word_posterior import Floats
from state.records import ProductGroups

_MIN_SIMILARITY: Final = 0.2


def find_look_alikes(
    group_id: int, own: ProductGroups, others: Sequence[ProductGroups], n_most: int
) -> list[tuple[str, int, float]]:
    """Return the groups of other products most like one of ours: (product id, group id, cosine similarity).

    A group stands for its centroid (the first row of its group feature, Eq. 6) less the mean centroid of its
    product: what sets its members apart from the product's other users. Only groups of the same encoder
    version can be compared, and only those of at least 0.2 are returned.
    """
    target = _directions(own).get(group_id)
    if target is None:
        return []
    found: list[tuple[str, int, float]] = []
    for groups in others:
        if groups.product_id == own.product_id or groups.encoder_version != own.encoder_version:
            continue
        for other_id, direction in _directions(groups).items():
            if len(direction) == len(target) and (similarity := float(direction @ target)) >= _MIN_SIMILARITY:
                found.append((groups.product_id, other_id, min(similarity, 1.0)))
    return sorted(found, key=lambda item: (-item[2], item[0], item[1]))[:n_most]


def _directions(groups: ProductGroups) -> dict[int, Floats]:
    """Return each group's centroid less the product's mean, at length 1; a product of one group has none."""
    if len(groups.groups) < 2:
        return {}
    features = [np.frombuffer(group.feature, np.float32).reshape(11, -1) for group in groups.groups]
    centroids = np.stack([feature[0] for feature in features]).astype(np.float64)  # (G, D)
    shares = np.array([max(group.share, 1e-6) for group in groups.groups])
    centred = centroids - shares @ centroids / shares.sum()
    lengths = np.linalg.norm(centred, axis=1)
    return {
        group.group_id: centred[row] / lengths[row] for row, group in enumerate(groups.groups) if lengths[row] > 1e-9
    }
