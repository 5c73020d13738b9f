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


def test_a_picture_is_looked_at_once(monkeypatch):
    made = tower()
    alone = torch.cat([made.look(each[None]) for each in PIXELS])
    looked = []
    look = made.look
    monkeypatch.setattr(made, "look", lambda pixels: looked.append(len(pixels)) or look(pixels))
    found = made(PIXELS[[0, 1, 0]]).last_hidden_state
    assert torch.equal(found, alone[[0, 1, 0]])
    assert torch.equal(made(PIXELS[1:]).last_hidden_state, alone[1:])  # whoever else is in the batch
    assert looked == [1, 1]
    monkeypatch.setattr("generator.frozen_tower.N_REMEMBERED", 1)
    made(torch.zeros(1, 3, 224, 224))
    made(PIXELS[:1])  # has been forgotten, as that which was seen longest ago
    assert looked == [1, 1, 1, 1]


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
