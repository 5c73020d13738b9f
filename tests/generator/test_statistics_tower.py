"""The vision tower of the preset `tiny`: statistics of early channels."""

from __future__ import annotations

import torch

from generator.group_llava import GroupLlavaForConditionalGeneration
from generator.mllm_presets import build_mllm
from generator.settings import MllmSettings
from generator.statistics_tower import StatisticsTower, StatisticsTowerConfig

PIXELS = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def tower():
    made = StatisticsTower(StatisticsTowerConfig())
    made.load_package_weights()
    return made


def test_one_token_for_a_picture():
    tokens = tower()(PIXELS).last_hidden_state
    assert tokens.shape == (2, 1, StatisticsTowerConfig().hidden_size)
    assert torch.isfinite(tokens).all()
    assert not torch.equal(tokens[0], tokens[1])


def test_quarters_are_told_apart():
    left = torch.zeros(1, 3, 224, 224)
    left[..., :112] = 2.0
    found = tower()(torch.cat([left, left.flip(3)])).last_hidden_state
    assert (found[0] - found[1]).abs().max() > 0.5


def test_nothing_of_it_learns():
    made = tower().train()
    before = made(PIXELS).last_hidden_state
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert torch.equal(made(PIXELS).last_hidden_state, before)  # no batch norm has moved


def test_it_is_kept_with_the_model(tmp_path):
    mllm = build_mllm(MllmSettings(), seed=0)
    mllm.model.save_pretrained(tmp_path)
    loaded = GroupLlavaForConditionalGeneration.from_pretrained(tmp_path, local_files_only=True)
    expected = mllm.model.model.vision_tower(PIXELS).last_hidden_state
    assert torch.equal(loaded.model.vision_tower(PIXELS).last_hidden_state, expected)
