"""Measured: what a benchmark found, and how several seeds become a mean with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

REPORTING_SEEDS: Final = (11, 12, 13, 14, 15)
"""Seeds of the worlds that results are reported on. Worlds 101 to 103 were used for tuning and are never reported."""


@dataclass(frozen=True)
class Measured:
    """What a benchmark measured: flat metrics, everything nested, and the seeds it used."""

    metrics: dict[str, float | int]
    detail: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


class NoSeedsError(ValueError):
    """A benchmark was given no seed."""

    def __init__(self) -> None:
        super().__init__("seeds is empty; allowed is one or more numbers of 0 and above. Nothing was measured.")


def check_seeds(seeds: Sequence[int], quick: bool) -> tuple[int, ...]:
    """Return the seeds that are used: all of them, or only the first for a quick run.

    Raises
    ------
    NoSeedsError
        There is none.
    """
    if not seeds:
        raise NoSeedsError
    return tuple(seeds[:1] if quick else seeds)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of independent values and its 95% interval by Student's t: (mean, low, high).

    One value has no interval: all three are that value.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, 0.975)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def over_seeds(runs: Mapping[int, Mapping[str, float]], seeds: Mapping[str, int] | None = None) -> Measured:
    """Return the mean of each metric over the worlds' seeds, with ``x_low`` and ``x_high`` from two seeds on.

    A metric that could not be measured in some worlds is averaged over the others; ``detail["by_seed"]`` holds
    every world's own. ``seeds`` are what is the same in all worlds.
    """
    names = dict.fromkeys(name for run in runs.values() for name in run)
    metrics: dict[str, float | int] = {}
    for name in names:
        values = [run[name] for run in runs.values() if name in run]
        mean, low, high = t_interval(values)
        metrics[name] = mean
        if len(values) > 1:
            metrics |= {f"{name}_low": low, f"{name}_high": high}
    by_seed = {str(seed): dict(run) for seed, run in runs.items()}
    worlds = {f"world_{place}": seed for place, seed in enumerate(runs, 1)}
    return Measured(metrics, {"by_seed": by_seed}, {**worlds, **(seeds or {})})
