"""Reward models that are compared: all of them learn from the same pairs and lessons."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from generator.mllm_presets import build_mllm
from generator.procedural import ProceduralRenderer
from generator.prompt import Prompt
from offline.dataset import Dataset
from offline.lessons import drawn_lessons
from offline.pairs import HELD_OUT, TRAIN
from offline.reward_comparison import RewardData, RewardKind, compare_rewards
from offline.settings import EndpointSettings, RewardSettings
from online.encoders import HashedImageEncoder, HashedTextEncoder
from tests.offline import dpo_world
from tests.offline.test_scorers import SMALL, pairs_of_taste

SHORT = RewardSettings(n_steps=2, n_lesson_steps=1, batch_pairs=4, batch_lessons=2)


class Truth:
    """A scorer that is always right, of pairs whose first picture's key sorts as its colour says."""

    name = "oracle"

    def p_first_wins(self, comparisons):
        likes = np.random.default_rng(99).normal(size=128)
        return np.array([float(("red" in row.first.key) == (row.group_feature[0] @ likes > 0)) for row in comparisons])


def test_every_reward_model_is_trained_and_evaluated_on_the_same_pairs():
    data = RewardData(pairs_of_taste(4), pairs_of_taste(3, first_product=50), [], {})
    state = torch.random.get_rng_state()
    asked = []
    compared = compare_rewards(
        data,
        SHORT,
        EndpointSettings(),
        lambda: build_mllm(SMALL, seed=0),
        (HashedTextEncoder(), HashedImageEncoder()),
        seed=0,
        others=[Truth()],
        on_step=lambda name, stage, step, loss: asked.append((name, stage, step)),
    )
    found = compared.accuracies
    assert set(found) == {"grm", "grm_no_group", "caig", "cg4ctr", "oracle"}
    assert {accuracy.n_pairs for accuracy in found.values()} == {6}
    assert found["oracle"].accuracy == 1
    # Of two groups of opposite tastes, what knows no group is right about one.
    assert {found[name].accuracy for name in ("grm_no_group", "caig", "cg4ctr")} == {0.5}
    assert [compared.grms[kind].with_group for kind in RewardKind] == [True, False, False]
    assert {name for name, _, _ in asked} == {"grm", "grm_no_group", "caig", "cg4ctr"}
    assert torch.equal(torch.random.get_rng_state(), state)
    again = compare_rewards(
        data,
        SHORT,
        EndpointSettings(),
        lambda: pytest.fail("all models are there"),
        (HashedTextEncoder(), HashedImageEncoder()),
        seed=0,
        trained=compared.grms,
    )
    assert again.grms == compared.grms
    assert again.accuracies["grm"] == found["grm"]


def test_what_is_held_out_gives_no_lesson(tmp_path: Path):
    path = tmp_path / "picture.png"
    features = np.zeros(11 * 128, np.float32)
    rows = [
        {"product_id": product, "group_id": 0, "title": product.upper(), "group_feature": features}
        for product in ("a", "b")
    ]
    prompts = {f"{product}{n}": dpo_world.prompt("sunlit beach") if n else None for product in "ab" for n in range(2)}
    pairs = [
        {
            "product_id": product,
            "group_id": 0,
            "split": split,
            "weight": 0.9,
            "ctr_w": 0.1,
            "ctr_l": 0.05,
            "creative_w": f"{product}1",
            "creative_l": f"{product}0",
            "prompt_w": prompts[f"{product}1"],
            "prompt_l": None,
            "image_uri_w": str(path),
            "image_uri_l": str(path),
        }
        for product, split in (("a", TRAIN), ("b", HELD_OUT))
    ]
    table = pa.Table.from_pylist(
        rows,
        pa.schema(
            [
                ("product_id", pa.string()),
                ("group_id", pa.int32()),
                ("title", pa.string()),
                ("group_feature", pa.list_(pa.float32(), 11 * 128)),
            ]
        ),
    )
    data = RewardData.read(Dataset(table, pa.Table.from_pylist(pairs)))
    assert [lesson.picture.key for lesson in data.lessons] == ["a1"]  # of a0 nobody knows what it was drawn from
    assert data.captions == {"a0": "", "a1": prompts["a1"], "b0": "", "b1": prompts["b1"]}
    assert [pair.product_id for pair in data.learnt + data.held_out] == ["a", "b"]
    assert sorted(data.pictures) == ["a0", "a1", "b0", "b1"]


def test_lessons_are_drawn_from_prompts_of_all_words(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    sources = dpo_world.products(tmp_path)
    sources[1] = dataclasses.replace(sources[1], image_uri=str(tmp_path / "none.png"))
    renderer = ProceduralRenderer()
    lessons = drawn_lessons(sources, renderer, n_pictures=4, size_px=64, seed=0)
    assert [lesson.picture.open().size for lesson in lessons] == [(64, 64)] * 4
    assert len({lesson.picture.key for lesson in lessons}) == 4
    assert {Prompt.parse(lesson.prompt).caption for lesson in lessons} == {"Oak chair"}
    assert "no lessons" in caplog.text
    again = drawn_lessons(sources, renderer, n_pictures=4, size_px=64, seed=0)
    assert [lesson.picture.key for lesson in again] == [lesson.picture.key for lesson in lessons]
    assert drawn_lessons([], renderer, n_pictures=4, size_px=64, seed=0) == []
