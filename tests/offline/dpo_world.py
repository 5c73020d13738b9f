"""A very small G-MLLM and preference tuples, for the tests of Group-DPO and for the processes that they start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from generator.mllm import GroupMllm
from generator.mllm_presets import build_mllm
from generator.prompt import UNNAMED_CAPTION, Prompt
from generator.settings import MllmSettings, TinyMllmSettings
from offline.pretrain_source import GroupSource, ProductSource
from offline.settings import GroupDpoSettings
from offline.tuples import PreferenceTuple

SMALL = MllmSettings(
    group_hidden_size=32,
    max_new_tokens=48,
    tiny=TinyMllmSettings(
        eyes="learnt",
        hidden_size=64,
        n_layers=2,
        n_heads=4,
        vision_hidden_size=16,
        n_vision_layers=1,
        image_px=32,
        patch_px=16,
    ),
)
SHORT = GroupDpoSettings(
    n_epochs=1,
    batch_tuples=4,
    lora_rank=4,
    held_out_share=0,
    checkpoint_steps=2,
    log_steps=1,
    learning_rate=5e-3,
    sft_weight=0,
    warmup_share=0,
)
TITLES = ("Oak chair", "Red lamp")
TASTES = ("misty mountains", "sports field")
"""The scene that each group prefers."""


def mllm() -> GroupMllm:
    """Return the model, the same at each call."""
    return build_mllm(SMALL, seed=0, corpus=list(TITLES))


def prompt(scene: str, palette: str = "warm") -> str:
    """Return a prompt as the model writes it."""
    return Prompt(UNNAMED_CAPTION, scene, palette, "soft daylight", "no props", "centred").text


def products(folder: Path) -> list[ProductSource]:
    """Return two products of two groups, whose features differ as much as anything can."""
    picture = folder / "product.png"
    if not picture.exists():
        image = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
        image.paste((200, 0, 0, 255), (10, 10, 40, 30))
        image.save(picture)
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(11, 128)).astype(np.float32) for _ in TASTES]
    return [
        ProductSource(
            f"p{number}",
            title,
            None,
            str(picture),
            [],
            {},
            [GroupSource(group_id, feature, {}, [], []) for group_id, feature in enumerate(features)],
        )
        for number, title in enumerate(TITLES)
    ]


def tuples(sources: list[ProductSource], n_each: int = 4) -> list[PreferenceTuple]:
    """Return tuples of which either group prefers exactly what the other does not."""
    palettes = ("warm", "cool", "neon", "pastel")
    return [
        PreferenceTuple(
            product.product_id,
            group.group_id,
            product.title,
            product.picture_uri,
            number % 4,
            group.feature,
            prompt(TASTES[group.group_id], palettes[number % 4]),
            prompt(TASTES[1 - group.group_id], palettes[number % 4]),
            0.6 + 0.1 * (number % 4),
        )
        for number in range(n_each)
        for product in sources
        for group in product.groups
    ]
