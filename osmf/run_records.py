"""Run records: what was watched of a demo, and the findings behind its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offline.runs import RunRecord
from online.metrics import MetricPoint
from online.significance import RatioInterval
from osmf.findings import Agreement, ArmCounts
from state.records import ShiftRecord

N_STREAM_POINTS = 240
"""Points of a curve over the run, at most."""


@dataclass(frozen=True, kw_only=True)
class StreamSample:
    """The stream at one moment of the run; ``arms`` holds each arm's impressions and clicks so far."""

    seconds: float
    rate_events_s: float
    lag: int
    metrics: MetricPoint | None
    n_groups: int
    n_consumed: int
    arms: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """What was watched of a run, in seconds since its start."""

    command: str
    started_at_ms: int
    seconds: float
    samples: Sequence[StreamSample]
    arms_at_shift: ArmCounts | None
    shifted_seconds: float | None
    shift_seconds: Mapping[str, float]
    creative_seconds: Mapping[str, float]
    dead_letters: Mapping[str, int]
    runs: Sequence[RunRecord]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The figures behind the report."""

    agreements: Mapping[str, Agreement]
    differences: Mapping[str, tuple[float, float]]
    ratio: RatioInterval | None
    ratio_after: RatioInterval | None
    shifts: Sequence[ShiftRecord]
    n_grouped: int
    n_distinct: int
    n_consumed: int
    n_used: int
    n_duplicates: int
    n_dead_letters: int
    rate_events_s: float
    max_lag: int


def thin(samples: Sequence[StreamSample], n_most: int) -> list[StreamSample]:
    """Return at most ``n_most`` of the samples, evenly spaced, the last one among them."""
    step = max(1, -(-len(samples) // n_most))
    return list(samples[::-1][::step][::-1])
