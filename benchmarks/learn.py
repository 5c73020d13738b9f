"""How well and how fast the preference model learns a simulated world in one pass, beside its ceiling and baselines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.measured import REPORTING_SEEDS, Measured, check_seeds, over_seeds
from benchmarks.simulated import SimulatedRows, simulate_rows, simulator_settings
from online.encoders import feature_dims
from online.learner import PreferenceLearner
from online.rows import LabelledRows
from online.settings import OnlineSettings
from simulator.settings import SimulatorSettings
from streams.settings import StreamSettings

Floats = npt.NDArray[np.float64]

N_IMPRESSIONS: Final = 600_000
N_QUICK_IMPRESSIONS: Final = 60_000
LOGISTIC_ROWS: Final = {True: 20_000, False: N_IMPRESSIONS}
"""Rows of River's logistic regression, in a quick run and in a full one."""

FM_ROWS: Final = {True: 0, False: 60_000}
"""Rows of River's factorization machine, which takes over a millisecond for each."""

PRIOR_IMPRESSIONS: Final = 100
"""Impressions at the mean CTR with which a creative's own CTR is smoothed."""


class _OnlineModel(Protocol):
    def predict_proba_one(self, x: dict[str, float]) -> dict[bool, float]: ...

    def learn_one(self, x: dict[str, float], y: bool) -> None: ...


def bench_learn(
    quick: bool,
    seeds: Sequence[int] = REPORTING_SEEDS,
    *,
    simulator: SimulatorSettings | None = None,
    online: OnlineSettings | None = None,
    logistic_rows: int | None = None,
    fm_rows: int | None = None,
) -> Measured:
    """Learn simulated worlds in one pass, every row predicted before it is learnt.

    Metrics: ``auroc`` over all rows of the pass, ``auroc_last_quarter``; ``auroc_ceiling`` of the true CTRs by
    segment and ``auroc_share`` = (auroc - 0.5) / (auroc_ceiling - 0.5); ``auroc_creative_ctr`` of a smoothed CTR per
    creative; ``auroc_logistic`` and ``auroc_fm`` of River's models, over the first rows only, with the model's own
    ``auroc_at_logistic_rows`` and ``auroc_at_fm_rows`` over the same rows beside them; ``rows_s`` of predicting and
    learning. The preference model and the smoothed CTR learn in micro-batches; River's models learn each row before
    they see the next, which helps them.

    Parameters
    ----------
    quick
        A small world, the first seed only, and no factorization machine.
    seeds
        Seeds of the worlds; 101 to 103 were used for tuning.
    simulator, online
        Other worlds and models; ``simulator.seed`` is replaced by each of the seeds.
    logistic_rows, fm_rows
        Other sizes of the parts that River's models get; 0 leaves one out.
    """
    online = OnlineSettings() if online is None else online
    used = check_seeds(seeds, quick)
    if simulator is None:
        simulator = simulator_settings(N_QUICK_IMPRESSIONS if quick else N_IMPRESSIONS, quick=quick)
    n_logistic = LOGISTIC_ROWS[quick] if logistic_rows is None else logistic_rows
    n_fm = FM_ROWS[quick] if fm_rows is None else fm_rows
    runs = {}
    for seed in used:
        world = simulate_rows(simulator.model_copy(update={"seed": seed}), online)
        runs[seed] = _learn_world(world, online, n_logistic, n_fm, seed)
    return over_seeds(runs, {"model": online.seed})


def _learn_world(
    world: SimulatedRows, online: OnlineSettings, n_logistic: int, n_fm: int, seed: int
) -> dict[str, float]:
    predicted, seconds = _learn(world, online)
    last = slice(len(world) * 3 // 4, None)
    ceiling = auroc(world.clicks, world.true_ctr)
    found = {
        "auroc": auroc(world.clicks, predicted),
        "auroc_last_quarter": auroc(world.clicks[last], predicted[last]),
        "auroc_ceiling": ceiling,
    }
    found["auroc_share"] = (found["auroc"] - 0.5) / (ceiling - 0.5)
    found["auroc_creative_ctr"] = auroc(world.clicks, creative_ctrs(world, StreamSettings().batch_events))
    for name, n_rows in (("logistic", n_logistic), ("fm", n_fm)):
        part = slice(0, min(n_rows, len(world)))
        if part.stop:
            crossed = name == "logistic"
            model = _logistic() if crossed else _factorization_machine(seed)
            scores = _learn_by_river(model, world, part.stop, crossed=crossed)
            found[f"auroc_{name}"] = auroc(world.clicks[part], scores)
            found[f"auroc_at_{name}_rows"] = auroc(world.clicks[part], predicted[part])
            found[f"{name}_rows"] = part.stop
    return {**found, "rows": len(world), "rows_s": len(world) / seconds}


def auroc(clicks: npt.NDArray[np.float32], scores: npt.ArrayLike) -> float:
    """Return the exact AUROC; ties count half. Both labels must occur."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(clicks, scores))


def _batches(n_rows: int, n_batch: int) -> Iterator[slice]:
    return (slice(start, min(start + n_batch, n_rows)) for start in range(0, n_rows, n_batch))


def _learn(world: SimulatedRows, online: OnlineSettings) -> tuple[Floats, float]:
    """Return the prequential predictions of the preference model, (n,), and the seconds that the pass took."""
    import torch

    torch.set_num_threads(online.torch_threads)
    learner = PreferenceLearner(
        world.schema.cardinalities, *feature_dims(online.encoders), online.model, world.bank, online.seed
    )
    predicted = np.zeros(len(world))
    started_s = time.perf_counter()
    for batch in _batches(len(world), StreamSettings().batch_events):
        rows, clicks = world.rows.take(batch), world.clicks[batch]
        predicted[batch] = learner.predict_many(rows)
        learner.learn_many(LabelledRows(rows, clicks, np.ones(len(rows), np.float32)))
    return predicted, time.perf_counter() - started_s


def creative_ctrs(world: SimulatedRows, n_batch: int) -> Floats:
    """Return each row's smoothed CTR of its creative, as of the micro-batches before it, (n,)."""
    n_creatives = int(world.rows.creatives.max()) + 1
    impressions, clicks = np.zeros(n_creatives), np.zeros(n_creatives)
    predicted = np.zeros(len(world))
    for batch in _batches(len(world), n_batch):
        mean = clicks.sum() / max(impressions.sum(), 1.0)
        creatives = world.rows.creatives[batch]
        smoothed = (clicks + PRIOR_IMPRESSIONS * mean) / (impressions + PRIOR_IMPRESSIONS)
        predicted[batch] = smoothed[creatives]
        impressions += np.bincount(creatives, minlength=n_creatives)
        clicks += np.bincount(creatives, weights=world.clicks[batch], minlength=n_creatives)
    return predicted


def one_hot(creative: int, codes: Sequence[int], *, crossed: bool) -> dict[str, float]:
    """Return a row for River: the creative and each attribute's value, and (crossed) every pair of the two."""
    row = {f"c{creative}": 1.0}
    for field, code in enumerate(codes):
        row[f"a{field}={code}"] = 1.0
        if crossed:
            row[f"a{field}={code}&c{creative}"] = 1.0
    return row


def _learn_by_river(model: _OnlineModel, world: SimulatedRows, n_rows: int, *, crossed: bool) -> Floats:
    """Return a River model's prequential predictions of the first rows, (n_rows,)."""
    predicted = np.zeros(n_rows)
    creatives, codes, clicks = world.rows.creatives.tolist(), world.rows.attributes, world.clicks.astype(bool).tolist()
    for row in range(n_rows):
        features = one_hot(creatives[row], codes[row].tolist(), crossed=crossed)
        predicted[row] = model.predict_proba_one(features).get(True, 0.0)
        model.learn_one(features, clicks[row])
    return predicted


def _logistic() -> _OnlineModel:
    from river.linear_model import LogisticRegression
    from river.optim import AdaGrad

    model: _OnlineModel = LogisticRegression(optimizer=AdaGrad(0.05))  # type: ignore[no-untyped-call]
    return model


def _factorization_machine(seed: int) -> _OnlineModel:
    from river.facto import FMClassifier

    # The product of two one-hot features is what a factorization machine makes itself, so it gets no crossed ones.
    model: _OnlineModel = FMClassifier(n_factors=8, seed=seed)  # type: ignore[no-untyped-call]
    return model
