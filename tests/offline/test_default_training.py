from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generator.mllm import GroupMllm
from generator.mllm_presets import build_mllm
from generator.prompt import VOCABULARY, Prompt, is_well_formed
from generator.settings import MllmSettings
from offline.group_dpo import align
from offline.pretrain import Pictures, pretrain, prompt_input, read_prompts
from offline.pretrain_source import Attributes, GroupSource, ProductSource
from offline.settings import GroupDpoSettings, PretrainSettings
from offline.teacher import GrammarTeacher
from offline.tuples import PreferenceTuple, rank_pairs
from streams.attributes import TABLE_4

# PEFT 0.21 still asks transformers 5.24 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

DEFAULTS = MllmSettings()
N_GROUPS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
    torch.set_rng_state(state)


def user(rng: np.random.Generator) -> Attributes:
    return {name: values[int(rng.integers(len(values)))] for name, values in TABLE_4.items()}


def products(folder: Path, rng: np.random.Generator) -> list[ProductSource]:
    """Return products whose groups have nothing in common."""
    found = []
    for number in range(16):
        picture = folder / f"{number}.png"
        Image.new("RGB", (64, 48), tuple(rng.integers(256, size=3).tolist())).save(picture)
        groups = [
            GroupSource(group_id, rng.normal(size=(11, 128)).astype(np.float32), user(rng), [], [user(rng)])
            for group_id in range(N_GROUPS)
        ]
        found.append(ProductSource(f"p{number}", f"Oak chair {number}", "seating", str(picture), [], user(rng), groups))
    return found


def tuples(mllm: GroupMllm, sources: list[ProductSource], rng: np.random.Generator) -> list[PreferenceTuple]:
    """Return what groups with tastes of their own prefer among the prompts that a model writes."""
    pictures, found = Pictures.of(mllm), []
    for product in sources:
        written = mllm.generate(
            [prompt_input(product, group.feature, pictures) for group in product.groups],
            max_new_tokens=DEFAULTS.max_new_tokens,
            n_samples=8,
            temperature=DEFAULTS.temperature,
            top_p=DEFAULTS.top_p,
            seed=0,
        )
        texts = [
            text for text in dict.fromkeys(text for of_group in written for text in of_group) if is_well_formed(text)
        ]
        for group in product.groups:
            taste = {word: rng.normal() for words in VOCABULARY.values() for word in words}
            scores = np.array([sum(taste[word] for word in Prompt.parse(text).slots().values()) for text in texts])
            for winner, loser, p_win in rank_pairs(scores, n_pairs=8, min_win_probability=0.6):
                found.append(
                    PreferenceTuple(
                        product.product_id,
                        group.group_id,
                        product.title,
                        product.picture_uri,
                        0,
                        group.feature,
                        texts[winner],
                        texts[loser],
                        p_win,
                    )
                )
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prompts_are_well_formed_by_the_default_settings_before_and_after_group_dpo(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sources = products(tmp_path, rng)
    mllm = build_mllm(DEFAULTS, seed=0, corpus=[product.title for product in sources])
    settings = PretrainSettings()
    pretrain(
        mllm, sources, GrammarTeacher(temperature=1, seed=0), settings, DEFAULTS, folder=tmp_path / "pretrain", seed=0
    )

    def well_formed() -> float:
        pictures = Pictures.of(mllm)
        shares = [
            read_prompts(mllm, sources, DEFAULTS, n_groups=48, seed=seed, pictures=pictures).p_well_formed
            for seed in range(5)
        ]
        return float(np.mean(shares))

    before = well_formed()
    align(mllm, tuples(mllm, sources, rng), GroupDpoSettings().of_preset("tiny"), folder=tmp_path / "align", seed=0)
    after = well_formed()
    assert before >= 0.99
    assert after >= 0.98
