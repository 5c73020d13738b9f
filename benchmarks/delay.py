"""Benchmark of delayed clicks: what is lost against an oracle that knows at once whether an impression is clicked.

Two clicks in five come after the label window. Every policy learns the same impressions with the same model; they
differ only in when which label is given. Time is counted in impressions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.learn import learn_batch, new_learner, predict
from benchmarks.measured import Measured, over_runs, seeds_of
from benchmarks.worlds import BenchWorld, Impressions, Ints, bench_world
from online.learner import PreferenceLearner
from online.rows import LabelledRows
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings

Floats = npt.NDArray[np.float64]

MICRO_BATCH_ROWS: Final = 1_024
LATE_SHARE: Final = 0.4
"""Share of the clicks that come after the label window."""

PATIENCE: Final = 5.0
"""Mean delays that the policy which waits does wait; 0.7% of the clicks come later still and are lost to it."""


@dataclass(frozen=True)
class DelayRun:
    """One world of the benchmark; ``mean_delay`` of a click is in impressions."""

    world: SimulatorSettings
    n_impressions: int
    n_held_out: int
    mean_delay: int


RUN: Final = DelayRun(bench_world(mean_ctr=0.06), 400_000, 200_000, 5_000)
QUICK_RUN: Final = DelayRun(RUN.world, 60_000, 20_000, 2_000)


@dataclass(frozen=True)
class Stream:
    """Impressions of a world with the delays of their clicks, (B,), and the label window, in impressions."""

    world: BenchWorld
    rows: LabelledRows
    delays: Ints
    window: int

    def shown(self, start: int, end: int) -> Ints:
        """Return the impressions shown in [start, end)."""
        return np.arange(max(0, start), max(0, min(end, len(self.rows))))

    def due(self, at: Ints, start: int, end: int) -> Ints:
        """Return the impressions whose time ``at`` (B,) lies in [start, end), in its order."""
        found = np.flatnonzero((at >= start) & (at < end))
        return found[np.argsort(at[found], kind="stable")]


def bench_delay(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    run: DelayRun | None = None,
    online: OnlineSettings | None = None,
) -> Measured:
    """Learn clicks that come late in four ways, and in one that no stream can.

    Metrics: ``excess_log_loss_*`` on held-out impressions over that of the oracle, which gives every label at once:
    ``wait`` gives the label when hardly a click is still to come, ``plain`` at the end of the label window and never
    again, ``fnw`` says no click at once and gives the click when it comes, both weighted as the fake negatives need it
    (Ktena et al. 2019), ``retraction`` gives the label at the end of the window and, if a click comes later, takes it
    back and gives it anew, as the stream does. ``log_loss_oracle`` and ``log_loss_ceiling``, that of the true CTR by
    segment; ``late_share`` of the clicks. The mean over eight points of the last half of the impressions.

    Parameters
    ----------
    quick
        A shorter run, with one seed unless others are named.
    seeds
        Seeds of the worlds; default: the reporting seeds.
    run, online
        Another world and other settings; the world's seed is replaced by those of ``seeds``.
    """
    online = OnlineSettings() if online is None else online
    chosen = run or (QUICK_RUN if quick else RUN)
    return over_runs({"": chosen}, seeds_of(seeds, quick=quick), lambda run, seed: _delay(run, seed, online))


def _delay(run: DelayRun, seed: int, online: OnlineSettings) -> dict[str, float]:
    import torch

    torch.set_num_threads(online.torch_threads)
    world = BenchWorld(run.world.model_copy(update={"seed": seed}), online)
    rng = np.random.default_rng([seed, 10])
    rows = world.rows(world.draw(run.n_impressions, rng))
    held_out = world.draw(run.n_held_out, rng)
    delays = rng.exponential(run.mean_delay, size=run.n_impressions).astype(np.int64)
    stream = Stream(world, rows, delays, round(-math.log(LATE_SHARE) * run.mean_delay))
    losses = {name: _log_losses(policy, stream, held_out, online) for name, policy in POLICIES.items()}
    clicked = rows.clicks > 0
    return {
        **{
            f"excess_log_loss_{name}": float(np.mean(found - losses["oracle"]))
            for name, found in losses.items()
            if name != "oracle"
        },
        "log_loss_oracle": float(np.mean(losses["oracle"])),
        "log_loss_ceiling": _log_loss(held_out.clicks, world.ceiling(held_out)),
        "late_share": float((delays[clicked] > stream.window).mean()),
    }


Policy = Callable[[Stream, PreferenceLearner, int, int], list[LabelledRows]]
"""Returns the labels that are given between two times; in the first of them it is searched for what decides."""


def _given(stream: Stream, index: Ints, clicks: npt.ArrayLike, weights: npt.ArrayLike = 1.0) -> LabelledRows:
    n = len(index)
    return LabelledRows(
        stream.rows.rows.take(index),
        np.broadcast_to(np.asarray(clicks, np.float32), n).copy(),
        np.broadcast_to(np.asarray(weights, np.float32), n).copy(),
    )


def _oracle(stream: Stream, learner: PreferenceLearner, start: int, end: int) -> list[LabelledRows]:
    return [stream.rows.take(slice(start, end))]


def _after(stream: Stream, window: int, start: int, end: int) -> LabelledRows:
    """Return the labels whose window ends between two times: a click if it came within the window."""
    index = stream.shown(start - window, end - window)
    return _given(stream, index, (stream.rows.clicks[index] > 0) & (stream.delays[index] <= window))


def _wait(stream: Stream, learner: PreferenceLearner, start: int, end: int) -> list[LabelledRows]:
    return [_after(stream, round(PATIENCE * stream.window / -math.log(LATE_SHARE)), start, end)]


def _plain(stream: Stream, learner: PreferenceLearner, start: int, end: int) -> list[LabelledRows]:
    return [_after(stream, stream.window, start, end)]


def _retraction(stream: Stream, learner: PreferenceLearner, start: int, end: int) -> list[LabelledRows]:
    late = (stream.rows.clicks > 0) & (stream.delays > stream.window)
    came = stream.due(np.where(late, np.arange(len(late)) + stream.delays, -1), start, end)
    return [_after(stream, stream.window, start, end), _given(stream, came, 0, -1), _given(stream, came, 1)]


def _fnw(stream: Stream, learner: PreferenceLearner, start: int, end: int) -> list[LabelledRows]:
    clicked = stream.rows.clicks > 0
    came = stream.due(np.where(clicked, np.arange(len(clicked)) + stream.delays, -1), start, end)
    shown = stream.shown(start, end)
    p_shown, p_came = (learner.predict_many(stream.rows.rows.take(index)) for index in (shown, came))
    labels = [_given(stream, shown, 0, (1 - p_shown) * (1 + p_shown)), _given(stream, came, 1, 1 + p_came)]
    return [LabelledRows.concatenate(labels)]


POLICIES: Final[Mapping[str, Policy]] = {
    "oracle": _oracle,
    "wait": _wait,
    "plain": _plain,
    "fnw": _fnw,
    "retraction": _retraction,
}


def _log_losses(policy: Policy, stream: Stream, held_out: Impressions, online: OnlineSettings) -> Floats:
    """Return the log-loss on held-out impressions at eight points of the second half."""
    learner = new_learner(stream.world, online)
    n = len(stream.rows)
    points = {n * (9 + place) // 16 // MICRO_BATCH_ROWS for place in range(8)}
    asked = stream.world.rows(held_out).rows
    losses = []
    for number, start in enumerate(range(0, n, MICRO_BATCH_ROWS)):
        parts = policy(stream, learner, start, min(n, start + MICRO_BATCH_ROWS))
        new = [part for part in parts if len(part)]
        if new:
            learn_batch(learner, LabelledRows.concatenate(new), stream.world)
        if number + 1 in points:
            losses.append(_log_loss(held_out.clicks, predict(learner, asked)))
    return np.array(losses)


def _log_loss(clicks: npt.NDArray[np.float32], p_click: npt.ArrayLike) -> float:
    p = np.clip(np.asarray(p_click, np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(clicks > 0, np.log(p), np.log1p(-p))))
