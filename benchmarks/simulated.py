"""Simulated logs in memory: the simulator's world as messages for the pipeline, or as rows for the learner."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from online.attributes import AttributeSchema
from online.encoders import feature_dims
from online.features import FeatureBank
from online.registry import Registry, read_image
from online.rows import Rows
from online.settings import OnlineSettings
from online.worker import LazyEncoders
from simulator.decider import UniformDecider
from simulator.session import Session
from simulator.settings import CatalogueSettings, SimulatorSettings, TrafficSettings
from simulator.stage import Stage, set_stage
from simulator.traffic import user_attributes
from simulator.truth import Truth
from state.store import ChangeSet
from streams.codec import encode, event_time_ms, topic_types
from streams.events import Event, Product
from streams.merge import Message
from streams.settings import StreamSettings

QUICK_PRODUCTS = 12
"""Products of a quick run's world."""


def simulator_settings(n_impressions: int, *, quick: bool) -> SimulatorSettings:
    """Return the world that benchmarks run in: tastes do not change, and a quick run has half of the products."""
    settings = SimulatorSettings(decider="uniform", traffic=TrafficSettings(n_impressions=n_impressions))
    catalogue = CatalogueSettings(n_products=QUICK_PRODUCTS) if quick else settings.catalogue
    return settings.model_copy(
        update={"catalogue": catalogue, "shift": settings.shift.model_copy(update={"n_categories": 0})}
    )


@dataclass(frozen=True)
class SimulatedLog:
    """A run of the simulator: its messages in the order of sending, and the truth about them."""

    messages: list[Message]
    truth: Truth


class MessageSink:
    """Keeps what is sent as the messages that a broker with one partition a topic would hand out."""

    def __init__(self, streams: StreamSettings) -> None:
        self.messages: list[Message] = []
        self._topics = {event_type: topic for topic, event_type in topic_types(streams.topics).items()}
        self._next_offsets: dict[str, int] = {}

    def send(self, event: Event) -> None:
        """Keep an event."""
        self._keep(self._topics[type(event)], encode(event), event_time_ms(event))

    def send_bytes(self, topic: str, key: str, payload: bytes) -> None:
        """Keep bytes as they are."""
        last_ms = self.messages[-1].timestamp_ms if self.messages else 0
        self._keep(topic, payload, last_ms)

    def flush(self) -> None:
        """Do nothing: everything is kept at once."""

    def _keep(self, topic: str, payload: bytes, timestamp_ms: int) -> None:
        offset = self._next_offsets.get(topic, 0)
        self._next_offsets[topic] = offset + 1
        self.messages.append(Message(topic, 0, offset, timestamp_ms, payload))


def new_stage(settings: SimulatorSettings) -> Stage:
    """Set the stage of a world; its pictures are drawn the first time and then found in the simulator's cache."""
    from generator.procedural import ProceduralRenderer

    return set_stage(settings, ProceduralRenderer())


def simulate_log(settings: SimulatorSettings, streams: StreamSettings) -> SimulatedLog:
    """Run the simulator with every creative shown by chance, and keep what it sends."""
    stage = new_stage(settings)
    ids = {
        product.product_id: [creative.creative_id for creative in creatives]
        for product, creatives in zip(stage.products, stage.creatives, strict=True)
    }
    sink = MessageSink(streams)
    decider = UniformDecider(ids, np.random.default_rng([settings.seed, 4]))
    with tempfile.TemporaryDirectory(prefix="osmf-bench-") as folder:
        truth = Session(
            settings.model_copy(update={"out_dir": Path(folder)}), streams.topics, stage, sink, decider
        ).run()
    return SimulatedLog(sink.messages, truth)


@dataclass(frozen=True)
class SimulatedRows:
    """Impressions of a world as the learner takes them, whose labels are complete and on time.

    ``clicks`` is (n,). ``true_ctr`` (n,) is the CTR of the shown creative in the user's true segment: the best
    prediction of whoever knows the segments, but not each user's own taste.
    """

    rows: Rows
    clicks: npt.NDArray[np.float32]
    true_ctr: npt.NDArray[np.float64]
    bank: FeatureBank
    schema: AttributeSchema

    def __len__(self) -> int:
        return len(self.rows)


def simulate_rows(settings: SimulatorSettings, online: OnlineSettings) -> SimulatedRows:
    """Draw impressions of a world: users, products and creatives by chance, features from the online encoders."""
    stage = new_stage(settings)
    bank, registry = register(stage, settings.traffic.start_ms, online)
    rng = np.random.default_rng([settings.seed, 5])
    schema = AttributeSchema(online.attributes)
    codes = schema.encode_many(user_attributes(stage.world, settings.traffic.p_missing_attribute, rng))  # (U, N)
    n = settings.traffic.n_impressions
    users = rng.integers(stage.world.n_users, size=n)
    products = rng.integers(len(stage.products), size=n)
    draws = rng.random((2, n))
    n_creatives = np.array([len(creatives) for creatives in stage.creatives])
    choices = (draws[0] * n_creatives[products]).astype(np.int64)
    styles = [np.stack([creative.style for creative in creatives]) for creatives in stage.creatives]
    style = np.zeros((n, styles[0].shape[1]))
    true_ctr = np.zeros(n)
    product_numbers, creative_numbers = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for place, (product, creatives) in enumerate(zip(stage.products, stage.creatives, strict=True)):
        of_product = np.flatnonzero(products == place)
        chosen = choices[of_product]
        style[of_product] = styles[place][chosen]
        segments = stage.world.segments(product.category)[users[of_product]]
        true_ctr[of_product] = stage.world.segment_ctrs(place, styles[place])[segments, chosen]
        product_numbers[of_product] = registry.products[product.product_id].number
        numbers = [registry.creatives[product.product_id, creative.creative_id].number for creative in creatives]
        creative_numbers[of_product] = np.array(numbers)[chosen]
    clicks = (draws[1] < stage.world.p_click(users, products, style)).astype(np.float32)
    return SimulatedRows(Rows(product_numbers, creative_numbers, codes[users]), clicks, true_ctr, bank, schema)


def register(stage: Stage, at_ms: int, online: OnlineSettings) -> tuple[FeatureBank, Registry]:
    """Register a stage's products and creatives as the pipeline would, and return their features."""
    encoders = LazyEncoders(online.encoders)
    bank = FeatureBank(*feature_dims(online.encoders))
    registry = Registry(encoders.text, encoders.image, read_image, bank)
    changes = ChangeSet()
    for product, creatives in zip(stage.products, stage.creatives, strict=True):
        event = Product(
            product_id=product.product_id, title=product.title, updated_at_ms=at_ms, category=product.category
        )
        registry.put_product(event, changes)
        for creative in creatives:
            registry.put_creative(creative.event(at_ms), at_ms, changes)
    return bank, registry


def is_registration(message: Message, streams: StreamSettings) -> bool:
    """Tell whether a message announces a product or a creative."""
    return message.topic in (streams.topics.products, streams.topics.creatives)
