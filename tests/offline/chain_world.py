"""A small stream of products with pictures, learnt by the real pipeline, and the smallest settings of the chain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from generator.procedural import ProceduralRenderer
from generator.prompt import Prompt
from generator.settings import GeneratorSettings
from offline.chain import ChainRooms
from offline.settings import (
    ChainSettings,
    GroupDpoSettings,
    GroupGateSettings,
    OfflineSettings,
    PretrainSettings,
    PromptGateSettings,
    RewardSettings,
    TrackingSettings,
    TupleSettings,
)
from online.settings import AttributeSettings, EncoderSettings, GroupSettings, ModelSettings, OnlineSettings
from online.worker import build_pipeline
from state.store import Store
from streams.codec import encode, event_time_ms, event_topics
from streams.events import Click, Creative, Event, Impression, Product
from streams.merge import Message
from streams.settings import JoinSettings, StreamSettings
from tests.offline.dpo_world import SMALL

START_MS = 1_748_822_400_000
STREAMS = StreamSettings(join=JoinSettings(allowed_lateness_s=0, label_window_s=5))
ONLINE = OnlineSettings(
    attributes=AttributeSettings(values={"age": ("young", "old"), "shade": tuple(map(str, range(50)))}),
    encoders=EncoderSettings(text="hashed", image="hashed"),
    model=ModelSettings(d_model=128, d_field=4, d_hidden=16, learning_rate=0.01, batch_rows=64, ema_steps=8),
    groups=GroupSettings(k_max=2, reservoir_users=64, warm_up_impressions=600, adopt_every_impressions=600),
)
PRODUCTS = {"lamp": "Red lamp", "chair": "Red lamp", "table": "Red lamp"}
"""By the hash of their ids, `lamp` is held out and the others are learnt from. Their titles are the same, and so is
what their groups' features mean: two products are too few to learn that from."""
SCENES = {"young": ("city street at night", "bokeh lights"), "old": ("misty mountains", "flower meadow")}
"""What users of each age click."""


def settings(folder: Path) -> OfflineSettings:
    """Return settings under which every step takes seconds."""
    return OfflineSettings(
        dataset_dir=folder,
        min_new_impressions=1_000,
        interval_s=0.2,
        held_out_share=0.25,
        held_out_by="product",
        chain=ChainSettings(min_new_impressions=1_000, torch_threads=1),
        tracking=TrackingSettings(enabled=False),
        pretrain=PretrainSettings(
            n_rows=1_120,
            batch_rows=16,
            learning_rate=8e-3,
            n_prompts=2,
            group_analysis=0,
            behavioural_prediction=0,
            product_comprehension=0,
            p_without_group=0,
            checkpoint_steps=20,
            log_steps=5,
            n_evaluated=4,
        ),
        reward=RewardSettings(n_steps=60, n_lesson_steps=0, n_lesson_pictures=0, batch_pairs=8, calibration_share=0),
        tuples=TupleSettings(n_candidates=6, n_pairs=1, size_px=64, min_win_probability=0.5),
        group_dpo=GroupDpoSettings(n_epochs=3, batch_tuples=1, lora_rank=4, checkpoint_steps=1, log_steps=1),
        prompt_gate=PromptGateSettings(n_groups=6, min_well_formed=0.1, max_loss=1, min_group_specific=0),
        group_gate=GroupGateSettings(n_groups=4, n_prompts=4, max_loss=10),
    )


def rooms(folder: Path, state_path: Path) -> ChainRooms:
    """Return what the chain works on, with artifacts in a folder."""
    return ChainRooms(state_path, ONLINE, GeneratorSettings(mllm=SMALL), settings(folder))


def events(folder: Path, n_impressions: int, first: int) -> Iterator[Event]:
    """Yield products with pictures, and impressions that are clicked by taste."""
    folder.mkdir(exist_ok=True)
    cutout = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
    cutout.paste((200, 0, 0, 255), (10, 10, 40, 30))
    cutout.save(folder / "cutout.png")
    renderer = ProceduralRenderer()
    scenes = [scene for of_age in SCENES.values() for scene in of_age]
    for product_id, title in PRODUCTS.items():
        yield Product(
            product_id=product_id,
            title=title,
            updated_at_ms=START_MS,
            category="things",
            image_uri=(folder / "cutout.png").as_uri(),
        )
        for number, scene in enumerate(scenes):
            prompt = Prompt(title, scene, "warm", "soft daylight", "no props", "centred").text
            path = folder / f"{product_id}-{number}.png"
            renderer.render(cutout, prompt, seed=number, size_px=64).image.save(path)
            yield Creative(
                creative_id=path.stem,
                product_id=product_id,
                created_at_ms=START_MS,
                image_uri=path.as_uri(),
                prompt=prompt,
            )
    rng = np.random.default_rng(first)
    for number in range(first, first + n_impressions):
        at_ms = START_MS + 100 * number
        age, product_id = ("young", "old")[number % 2], list(PRODUCTS)[int(rng.integers(len(PRODUCTS)))]
        shown = int(rng.integers(len(scenes)))
        yield Impression(
            impression_id=f"i{number}",
            user_id=f"u{number}",
            product_id=product_id,
            creative_id=f"{product_id}-{shown}",
            shown_at_ms=at_ms,
            attributes={"age": age, "shade": str(int(rng.integers(50)))},
        )
        if rng.random() < (0.5 if scenes[shown] in SCENES[age] else 0.04):
            yield Click(impression_id=f"i{number}", product_id=product_id, clicked_at_ms=at_ms + 50)


def learn(folder: Path, state_path: Path, n_impressions: int) -> None:
    """Let the pipeline learn a stream, and leave the state."""
    topic_of = event_topics(STREAMS.topics)
    messages = [
        Message(topic_of[type(event)], 0, offset, event_time_ms(event), encode(event))
        for offset, event in enumerate(events(folder, n_impressions, 0))
    ]
    with Store(state_path, map_size_mib=64, sync=False) as store:
        pipeline = build_pipeline(STREAMS, ONLINE)
        pipeline.restore(store)
        for start in range(0, len(messages), 250):
            with store.read() as txn:
                changes, _ = pipeline.run(messages[start : start + 250], txn)
            store.commit(changes)
