"""Benchmark of learning: the preference model in one pass over a simulated log, beside what is possible.

Creatives are shown uniformly, so that every model sees the same impressions. Figures: AUROC of the
prequential predictions over the second half of the stream, of the true CTRs of segments (the
ceiling of anything that sees attributes and images), of a smoothed CTR per creative and of River's
logistic regression on attribute-by-creative crosses; and rows per second. Worlds 101 to 104 were
used for tuning and are no reporting seeds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measured import Measured, over_seeds
from generator.procedural import ProceduralRenderer
from online.attributes import AttributeSchema
from online.encoders import feature_dims, load_encoders
from online.features import FeatureBank
from online.learner import PreferenceLearner
from online.rows import LabelledRows, Rows
from online.settings import OnlineSettings
from simulator.decider import UniformDecider
from simulator.session import Session
from simulator.settings import ShiftSettings, SimulatorSettings, TrafficSettings
from simulator.sink import ListSink
from simulator.stage import Stage, set_stage
from simulator.truth import Truth
from streams.codec import Undecodable, topic_decoders
from streams.events import Click, Impression
from streams.settings import FieldMapSettings, TopicSettings

REPORTING_SEEDS = (11, 12, 13, 14, 15)
QUICK_SEEDS = (11,)
N_IMPRESSIONS = 400_000
N_QUICK_IMPRESSIONS = 60_000
MICRO_BATCH_ROWS = 4_096
Floats = npt.NDArray[np.float64]


def bench_learn(*, quick: bool, seeds: Sequence[int] | None = None) -> Measured:
    """Measure one pass over the worlds of ``seeds``; ``quick`` takes one world and fewer impressions."""
    n_impressions = N_QUICK_IMPRESSIONS if quick else N_IMPRESSIONS
    chosen = seeds or (QUICK_SEEDS if quick else REPORTING_SEEDS)
    return over_seeds({seed: _one_world(seed, n_impressions) for seed in chosen})


def simulate_log(seed: int, n_impressions: int) -> tuple[Stage, Truth, list[Impression], set[str]]:
    """Return a world's stage and truth, its good impressions in order, and the ids of those that were clicked."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SimulatorSettings(
            seed=seed,
            decider="uniform",
            out_dir=Path(folder),
            cache_dir=Path("~/.cache/osmf").expanduser(),
            traffic=TrafficSettings(
                n_impressions=n_impressions, p_duplicate=0, n_spoiled_per_reason=0, impressions_per_hour=50_000
            ),
            shift=ShiftSettings(n_categories=0),
        )
        stage = set_stage(settings, ProceduralRenderer())
        sink, topics = ListSink(), TopicSettings()
        creatives = {
            product.product_id: [creative.creative_id for creative in of_product]
            for product, of_product in zip(stage.products, stage.creatives, strict=True)
        }
        decider = UniformDecider(creatives, np.random.default_rng([seed, 4]))
        truth = Session(settings, topics, stage, sink, decider).run()
    decoders = topic_decoders(topics, FieldMapSettings())
    events = list(sink.events)
    for topic, _, payload in sink.raw:
        events += [event for event in decoders[topic].decode(payload) if not isinstance(event, Undecodable)]
    impressions = [event for event in events if isinstance(event, Impression)]
    return stage, truth, impressions, {event.impression_id for event in events if isinstance(event, Click)}


def _one_world(seed: int, n_impressions: int) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    stage, truth, impressions, clicked = simulate_log(seed, n_impressions)
    settings = OnlineSettings(seed=seed)
    schema = AttributeSchema(settings.attributes)
    bank = FeatureBank(*feature_dims(settings.encoders))
    products, creatives = _fill(bank, stage, settings)
    clicks = np.array([impression.impression_id in clicked for impression in impressions], np.float32)
    rows = Rows(
        np.array([products[impression.product_id] for impression in impressions]),
        np.array([creatives[impression.creative_id] for impression in impressions]),
        schema.encode_many([impression.attributes for impression in impressions]),
    )
    learner = PreferenceLearner(
        schema.cardinalities, *feature_dims(settings.encoders), settings.model, bank, settings.seed
    )
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
        "auroc_ceiling": _ceiling(impressions, truth),
        "auroc_creative_ctr": _creative_ctr(rows.creatives, clicks),
        "auroc_logistic": _logistic(impressions, clicks),
    }
    figures = {name: float(roc_auc_score(clicks[half:], score[half:])) for name, score in scores.items()}
    figures["auroc_share"] = (figures["auroc"] - 0.5) / (figures["auroc_ceiling"] - 0.5)
    return figures | {"rows_s": len(rows) / seconds, "ctr": float(clicks.mean())}


def _fill(bank: FeatureBank, stage: Stage, settings: OnlineSettings) -> tuple[dict[str, int], dict[str, int]]:
    text, image = load_encoders(settings.encoders)
    products: dict[str, int] = {}
    creatives: dict[str, int] = {}
    for product, of_product in zip(stage.products, stage.creatives, strict=True):
        products[product.product_id] = number = len(products)
        bank.put_title(number, text.encode(f"{product.category}: {product.title}").tobytes())
        for creative in of_product:
            creatives[creative.creative_id] = number = len(creatives)
            bank.put_image(number, image.encode(creative.image_path.read_bytes(), creative.creative_id).tobytes())
    return products, creatives


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
