"""Benchmark of learning: the preference model in one pass over a simulated log, beside what is possible.

Creatives are shown uniformly, so that every model sees the same impressions. Figures: AUROC of the
prequential predictions over the second half of the stream, of the true CTRs of segments (the
ceiling of anything that sees attributes and images), of a smoothed CTR per creative and of River's
logistic regression on attribute-by-creative crosses; and rows per second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.log import SimulatedLog, simulate_log, simulator_settings
from benchmarks.measured import QUICK_SEEDS, REPORTING_SEEDS, Measured, over_seeds
from online.attributes import AttributeSchema
from online.encoders import feature_dims
from online.features import FeatureBank
from online.learner import PreferenceLearner
from online.registry import Registry, read_image
from online.rows import LabelledRows, Rows
from online.settings import OnlineSettings
from online.worker import LazyEncoders
from simulator.settings import SimulatorSettings
from simulator.truth import Truth
from state.store import ChangeSet
from streams.codec import Undecodable, topic_decoders
from streams.events import Click, Creative, Event, Impression, Product
from streams.settings import StreamSettings

N_IMPRESSIONS = 400_000
N_QUICK_IMPRESSIONS = 60_000
MICRO_BATCH_ROWS = 4_096
Floats = npt.NDArray[np.float64]


def bench_learn(
    *,
    quick: bool,
    seeds: Sequence[int] | None = None,
    simulator: SimulatorSettings | None = None,
    online: OnlineSettings | None = None,
) -> Measured:
    """Learn simulated worlds in one pass.

    Parameters
    ----------
    quick
        A shorter log, and one seed unless others are named.
    seeds
        Seeds of the worlds; default: the reporting seeds.
    simulator, online
        Other logs and models; ``simulator.seed`` is replaced by each seed; nothing is sent twice or spoiled.
    """
    online = OnlineSettings() if online is None else online
    if simulator is None:
        simulator = simulator_settings(N_QUICK_IMPRESSIONS if quick else N_IMPRESSIONS, quick=False)
    traffic = simulator.traffic.model_copy(update={"p_duplicate": 0.0, "n_spoiled_per_reason": 0})
    runs = {}
    for seed in seeds or (QUICK_SEEDS if quick else REPORTING_SEEDS):
        runs[seed] = _one_world(simulator.model_copy(update={"seed": seed, "traffic": traffic}), online)
    return over_seeds(runs)


def _decoded(log: SimulatedLog, streams: StreamSettings) -> Iterator[Event]:
    decoders = topic_decoders(streams.topics, streams.fields)
    for message in log.messages:
        for event in decoders[message.topic].decode(message.value):
            assert not isinstance(event, Undecodable), event
            yield event


def _one_world(simulator: SimulatorSettings, online: OnlineSettings) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    streams = StreamSettings()
    log = simulate_log(simulator, streams)
    encoders = LazyEncoders(online.encoders)
    bank = FeatureBank(*feature_dims(online.encoders))
    registry = Registry(encoders.text, encoders.image, read_image, bank)
    impressions: list[Impression] = []
    clicked: set[str] = set()
    for event in _decoded(log, streams):
        if isinstance(event, Product):
            registry.put_product(event, ChangeSet())
        elif isinstance(event, Creative):
            registry.put_creative(event, 0, ChangeSet())
        elif isinstance(event, Impression):
            impressions.append(event)
        elif isinstance(event, Click):
            clicked.add(event.impression_id)
    schema = AttributeSchema(online.attributes)
    clicks = np.array([impression.impression_id in clicked for impression in impressions], np.float32)
    rows = Rows(
        np.array([registry.products[impression.product_id].number for impression in impressions]),
        np.array([registry.creatives[i.product_id, i.creative_id].number for i in impressions]),
        schema.encode_many([impression.attributes for impression in impressions]),
    )
    learner = PreferenceLearner(schema.cardinalities, *feature_dims(online.encoders), online.model, bank, online.seed)
    predicted: list[npt.NDArray[np.float32]] = []
    started_s = time.perf_counter()
    for start in range(0, len(rows), MICRO_BATCH_ROWS):
        batch = rows.take(slice(start, start + MICRO_BATCH_ROWS))
        labels = clicks[start : start + MICRO_BATCH_ROWS]
        predicted.append(learner.predict_many(batch))
        learner.learn_many(LabelledRows(batch, labels, np.ones(len(labels), np.float32)))
    seconds = time.perf_counter() - started_s
    half = len(rows) // 2
    scores: dict[str, npt.NDArray[np.floating[Any]]] = {
        "auroc": np.concatenate(predicted),
        "auroc_ceiling": _ceiling(impressions, log.truth),
        "auroc_creative_ctr": _creative_ctr(rows.creatives, clicks),
        "auroc_logistic": _logistic(impressions, clicks),
    }
    figures = {name: float(roc_auc_score(clicks[half:], score[half:])) for name, score in scores.items()}
    figures["auroc_share"] = (figures["auroc"] - 0.5) / (figures["auroc_ceiling"] - 0.5)
    return figures | {"rows_s": len(rows) / seconds, "ctr": float(clicks.mean())}


def _ceiling(impressions: Sequence[Impression], truth: Truth) -> Floats:
    """Return the true CTR of each impression's creative in its user's segment."""
    tastes = {product.product_id: product.at_start for product in truth.products}
    ctrs = np.zeros(len(impressions))
    for row, impression in enumerate(impressions):
        taste = tastes[impression.product_id]
        by_segment = taste.ctr_by_segment[impression.creative_id]
        segment = taste.segment_of_value.get(impression.attributes.get(taste.driver, ""))
        ctrs[row] = np.mean(by_segment) if segment is None else by_segment[segment]
    return ctrs


def _creative_ctr(creatives: npt.NDArray[np.int64], clicks: npt.NDArray[np.float32]) -> Floats:
    """Return the CTR of each impression's creative so far, smoothed by one click in twenty."""
    seen: dict[int, list[float]] = {}
    predicted = np.zeros(len(clicks))
    for row, (creative, click) in enumerate(zip(creatives.tolist(), clicks.tolist(), strict=True)):
        counts = seen.setdefault(creative, [20.0, 1.0])
        predicted[row] = counts[1] / counts[0]
        counts[0] += 1
        counts[1] += click
    return predicted


def _logistic(impressions: Sequence[Impression], clicks: npt.NDArray[np.float32]) -> Floats:
    """Return the predictions of River's logistic regression on creatives and their crosses with attributes."""
    from river import linear_model, optim

    model = linear_model.LogisticRegression(optim.AdaGrad(0.05), l2=1e-6)
    predicted = np.zeros(len(clicks))
    for row, impression in enumerate(impressions):
        creative = impression.creative_id
        features = {f"{creative}|{name}={value}": 1.0 for name, value in impression.attributes.items()}
        features[creative] = 1.0
        predicted[row] = model.predict_proba_one(features).get(True, 0.0)  # type: ignore[no-untyped-call]
        model.learn_one(features, bool(clicks[row]))
    return predicted
