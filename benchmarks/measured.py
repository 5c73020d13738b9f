"""Measured: what a benchmark found, as numbers with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

REPORTING_SEEDS: Final = (11, 12, 13, 14, 15)
"""Worlds whose figures are reported. Worlds from 101 on are used for tuning and are never among them."""

QUICK_SEEDS: Final = (11,)


@dataclass(frozen=True)
class Measured:
    """Figures of a benchmark; ``metrics`` are flat, ``seeds`` names those that were run."""

    metrics: dict[str, float | int]
    seeds: dict[str, int] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


Run = TypeVar("Run")


def seeds_of(seeds: Sequence[int] | None, *, quick: bool) -> Sequence[int]:
    """Return the named seeds, or those of a quick or a whole benchmark where none are named."""
    return seeds or (QUICK_SEEDS if quick else REPORTING_SEEDS)


def over_runs(
    runs: Mapping[str, Run], seeds: Sequence[int], measure: Callable[[Run, int], Mapping[str, float]]
) -> Measured:
    """Measure every run with every seed; the figures carry the name of their run in front."""
    figures: dict[int, dict[str, float]] = {}
    for seed in seeds:
        figures[seed] = {}
        for prefix, run in runs.items():
            figures[seed] |= {prefix + name: value for name, value in measure(run, seed).items()}
    return over_seeds(figures)


def over_seeds(runs: Mapping[int, Mapping[str, float]]) -> Measured:
    """Return the mean of every figure over seeds, with its 95% t-interval from two seeds on."""
    metrics: dict[str, float | int] = {}
    for name in next(iter(runs.values())):
        values = [float(run[name]) for run in runs.values()]
        mean = math.fsum(values) / len(values)
        metrics[name] = mean
        if len(values) > 1:
            half = _half_width(values, mean)
            metrics |= {f"{name}_low": mean - half, f"{name}_high": mean + half}
    return Measured(
        metrics,
        {f"world_{position}": seed for position, seed in enumerate(runs)},
        {"by_seed": {str(seed): dict(run) for seed, run in runs.items()}},
    )


def _half_width(values: Sequence[float], mean: float) -> float:
    from scipy.special import stdtrit

    n = len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
