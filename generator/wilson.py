"""Wilson's interval of a share, such as a CTR or an accuracy."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final

_Z_95: Final = NormalDist().inv_cdf(0.975)


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Return the 95% interval of a share that was counted in ``n`` trials, more than 0; decayed counts will do."""
    z2 = _Z_95**2 / n
    margin = _Z_95 * math.sqrt(max(share * (1 - share), 0.0) / n + z2 / (4 * n))
    return (share + z2 / 2 - margin) / (1 + z2), (share + z2 / 2 + margin) / (1 + z2)
