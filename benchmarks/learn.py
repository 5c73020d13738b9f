"""Benchmark of learning: the preference model after one pass over simulated worlds, beside what is possible.

Creatives are shown by chance. All models predict the same held-out impressions that none of them has seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.baselines import creative_ctrs, factorization_machine, logistic
from benchmarks.measured import Measured, over_runs, seeds_of
from benchmarks.worlds import BenchWorld, bench_world
from online.encoders import feature_dims
from online.learner import PreferenceLearner
from online.rows import LabelledRows, Rows
from online.settings import ModelForm, OnlineSettings
from simulator.settings import SimulatorSettings

MICRO_BATCH_ROWS: Final = 4_096
BATCH_EPOCHS: Final = 5
BATCH_USER_WEIGHT_DECAY: Final = 0.3
"""Found best for batch training in world 101; the stream's own does without replay more harm than good."""

TIMED_ROWS: Final = 8_192
"""Rows on which the forms of the model are timed."""

AnyRows = TypeVar("AnyRows", Rows, LabelledRows)


@dataclass(frozen=True)
class LearnRun:
    """One world of the benchmark: how many impressions are learnt, how many held out, and which models are compared."""

    world: SimulatorSettings
    n_impressions: int
    n_held_out: int
    compared: bool = False


# A taste of 0.5 is the demo's; what attributes and images can tell has an AUROC of about 0.66 there.
RUNS: Final[Mapping[str, LearnRun]] = {
    "": LearnRun(bench_world(mean_ctr=0.06), 600_000, 200_000, compared=True),
    "weak_": LearnRun(bench_world(mean_ctr=0.06, taste_strength=0.5), 600_000, 200_000),
    "sparse_": LearnRun(bench_world(mean_ctr=0.015), 1_500_000, 400_000),
}
QUICK_RUNS: Final[Mapping[str, LearnRun]] = {"": LearnRun(bench_world(mean_ctr=0.06), 100_000, 50_000, compared=True)}


def bench_learn(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    runs: Mapping[str, LearnRun] | None = None,
    online: OnlineSettings | None = None,
) -> Measured:
    """Learn simulated worlds in one pass.

    Metrics, those of the further worlds with their prefix (``weak_``: the demo's weaker tastes at 6% CTR; ``sparse_``:
    1.5% CTR, 1.5 million impressions): ``auroc`` on held-out impressions; ``auroc_ceiling``, that of the true CTR by
    segment and creative, and ``auroc_share``, the share of what it has above 0.5; ``ctr`` and ``rows_s``. In the first
    world also ``auroc_batch``, the best of five shuffled epochs of the same model (without replay, with a decay of its
    own), and the baselines' one pass: ``auroc_fm``, ``auroc_logistic`` and ``auroc_creative_ctr``; and
    ``rows_ratio_plain``, how many rows the model learns while the paper's form of it learns one.

    Parameters
    ----------
    quick
        A shorter run of the first world, with one seed unless others are named.
    seeds
        Seeds of the worlds; default: the reporting seeds.
    runs, online
        Other worlds and models; each world's seed is replaced by those of ``seeds``.
    """
    online = OnlineSettings() if online is None else online
    chosen = runs or (QUICK_RUNS if quick else RUNS)
    return over_runs(chosen, seeds_of(seeds, quick=quick), lambda run, seed: _learn(run, seed, online))


def _learn(run: LearnRun, seed: int, online: OnlineSettings) -> dict[str, float]:
    import torch
    from sklearn.metrics import roc_auc_score

    torch.set_num_threads(online.torch_threads)
    world = BenchWorld(run.world.model_copy(update={"seed": seed}), online)
    rng = np.random.default_rng([seed, 5])
    learnt = world.rows(world.draw(run.n_impressions, rng))
    held_out = world.draw(run.n_held_out, rng)
    asked = world.rows(held_out).rows
    learner = new_learner(world, online)
    started_s = time.perf_counter()
    _pass(learner, learnt, world)
    seconds = time.perf_counter() - started_s

    def auroc(scores: npt.ArrayLike) -> float:
        return float(roc_auc_score(held_out.clicks, scores))

    figures = {"auroc": auroc(predict(learner, asked)), "auroc_ceiling": auroc(world.ceiling(held_out))}
    figures["auroc_share"] = (figures["auroc"] - 0.5) / (figures["auroc_ceiling"] - 0.5)
    if run.compared:
        figures["auroc_batch"] = max(auroc(scores) for scores in _batch(world, learnt, asked, online))
        figures["auroc_fm"] = auroc(factorization_machine(learnt, asked, seed=seed))
        figures["auroc_logistic"] = auroc(logistic(learnt, asked))
        figures["auroc_creative_ctr"] = auroc(creative_ctrs(learnt, asked))
        figures["rows_ratio_plain"] = _rows_ratio(world, learnt.take(slice(TIMED_ROWS)), online)
    return figures | {"ctr": float(learnt.clicks.mean()), "rows_s": run.n_impressions / seconds}


def _rows_ratio(world: BenchWorld, rows: LabelledRows, online: OnlineSettings) -> float:
    """Return how many rows the shipped form learns while the paper's learns one; neither replays."""
    seconds = {}
    for form in ("shipped", "paper"):
        settings = of_form(online, form)
        model = settings.model.model_copy(update={"replay_ratio": 0.0, "replay_rows": 0})
        of_world = world if form == "shipped" else BenchWorld(world.simulator, settings)
        learner = new_learner(of_world, settings.model_copy(update={"model": model}))
        learner.learn_many(rows.take(slice(online.model.batch_rows)))  # what is made at the first step is not timed
        started_s = time.perf_counter()
        learner.learn_many(rows)
        seconds[form] = time.perf_counter() - started_s
    return seconds["paper"] / seconds["shipped"]


def new_learner(world: BenchWorld, online: OnlineSettings) -> PreferenceLearner:
    """Return a learner of a world that has learnt nothing."""
    return PreferenceLearner(world.schema.cardinalities, *feature_dims(online), online.model, world.bank, online.seed)


def of_form(online: OnlineSettings, form: ModelForm) -> OnlineSettings:
    """Return settings with another form of the model, and the space that it groups users in."""
    model = online.model.model_copy(update={"form": form})
    groups = online.groups.model_copy(update={"space": "embedding" if form == "paper" else online.groups.space})
    return online.model_copy(update={"model": model, "groups": groups})


def _micro_batches(rows: AnyRows) -> Iterator[AnyRows]:
    for start in range(0, len(rows), MICRO_BATCH_ROWS):
        yield rows.take(slice(start, start + MICRO_BATCH_ROWS))


def _pass(learner: PreferenceLearner, rows: LabelledRows, world: BenchWorld) -> None:
    """Predict and learn every row once, in micro-batches, as the stream does."""
    for batch in _micro_batches(rows):
        learn_batch(learner, batch, world)


def learn_batch(learner: PreferenceLearner, given: LabelledRows, world: BenchWorld) -> None:
    """Predict rows, search in them for what decides, and learn the labels that are given or taken back."""
    creatives_of, category_of = world.registry.creative_numbers, world.registry.categories
    p_click, preference = learner.predict_with_preference(given.rows, creatives_of)
    learner.search(given, p_click, preference, creatives_of, category_of)
    learner.learn_many(given)


def predict(learner: PreferenceLearner, rows: Rows) -> npt.NDArray[np.float32]:
    """Return the probability of a click, (B,), in micro-batches."""
    return np.concatenate([learner.predict_many(batch) for batch in _micro_batches(rows)])


def _batch(
    world: BenchWorld, learnt: LabelledRows, asked: Rows, online: OnlineSettings
) -> list[npt.NDArray[np.float32]]:
    """Return the predictions after each epoch of training on all rows, shuffled anew for every epoch."""
    update = {"replay_ratio": 0.0, "replay_rows": 0, "user_weight_decay": BATCH_USER_WEIGHT_DECAY}
    model = online.model.model_copy(update=update)
    learner = new_learner(world, online.model_copy(update={"model": model}))
    rng = np.random.default_rng(online.seed)
    predicted = []
    for epoch in range(BATCH_EPOCHS):
        for batch in _micro_batches(learnt.take(rng.permutation(len(learnt)))):
            if epoch:
                learner.learn_many(batch)
            else:
                learn_batch(learner, batch, world)
        predicted.append(predict(learner, asked))
    return predicted
