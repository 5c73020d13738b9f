from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from generator.mllm import GroupMllm
from generator.mllm_presets import build_mllm
from generator.settings import MllmSettings, TinyMllmSettings
from offline.pretrain import Pictures, PretrainReport, last_checkpoint, pretrain, read_prompts, task_weights
from offline.pretrain_source import GroupSource, ProductSource
from offline.settings import PretrainSettings
from offline.teacher import GrammarTeacher

SMALL = MllmSettings(
    group_hidden_size=32,
    max_new_tokens=48,
    tiny=TinyMllmSettings(
        hidden_size=64, n_layers=2, n_heads=4, vision_hidden_size=16, n_vision_layers=1, image_px=32, patch_px=16
    ),
)
SHORT = PretrainSettings(n_rows=48, batch_rows=8, checkpoint_steps=2, log_steps=1, n_evaluated=2, learning_rate=5e-3)
TYPICAL = ({"age": "18-20", "target_group": "student"}, {"age": "over 70", "target_group": "pensioner"})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
    torch.set_rng_state(state)


@pytest.fixture
def sources(tmp_path: Path) -> list[ProductSource]:
    """Return one product of two groups, whose features differ as much as anything can."""
    picture = tmp_path / "chair.png"
    Image.new("RGBA", (50, 40), (200, 0, 0, 120)).save(picture)
    rng = np.random.default_rng(0)
    groups = [
        GroupSource(number, rng.normal(size=(11, 128)).astype(np.float32), typical, [], [])
        for number, typical in enumerate(TYPICAL)
    ]
    return [ProductSource("p1", "Oak chair", None, str(picture), [], TYPICAL[0], groups)]


class Kill(TrainerCallback):
    """Kills a run after a step, as a signal would: between two checkpoints."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def run(
    sources: list[ProductSource], settings: PretrainSettings, folder: Path, **options: Any
) -> tuple[GroupMllm, PretrainReport]:
    mllm = build_mllm(SMALL, seed=0, corpus=["Oak chair"])
    teacher = GrammarTeacher(temperature=0.01, seed=0)
    return mllm, pretrain(mllm, sources, teacher, settings, SMALL, folder=folder, seed=0, **options)


def test_a_killed_run_ends_where_it_would_have(sources: list[ProductSource], tmp_path: Path) -> None:
    whole, report = run(sources, SHORT, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(sources, SHORT, tmp_path / "killed", callbacks=[Kill()])
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["checkpoint-2"]
    half = tmp_path / "killed" / "checkpoint-4"  # as a kill while it is written leaves one
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-2"
    again, report_again = run(sources, SHORT, tmp_path / "killed")
    assert report.n_steps == report_again.n_steps == 6
    assert report_again.last_loss == pytest.approx(report.last_loss, abs=1e-6)
    for name, weights in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weights, rtol=0, atol=1e-7)


def test_training_prints_nothing_on_standard_output(
    sources: list[ProductSource], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(sources, SHORT.model_copy(update={"n_rows": 16}), tmp_path / "out")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_training_prompts_are_well_formed_and_the_groups_own(
    sources: list[ProductSource], tmp_path: Path
) -> None:
    settings = SHORT.model_copy(
        update={
            "n_rows": 960,
            "learning_rate": 2e-3,
            "checkpoint_steps": 1_000,
            "n_prompts": 1,
            "group_analysis": 0.0,
            "product_comprehension": 0.0,
            "behavioural_prediction": 0.0,
        }
    )
    mllm, report = run(sources, settings, tmp_path / "out")
    assert report.last_loss < report.first_loss / 4
    greedy = SMALL.model_copy(update={"temperature": 0.0})
    pictures = Pictures(64)
    prompts = read_prompts(mllm, sources, greedy, n_groups=8, seed=0, pictures=pictures)
    assert (prompts.n_prompts, prompts.p_well_formed) == (2, 1)
    assert prompts.specificity_nats > 2
    twins = [replace(sources[0], groups=[sources[0].groups[0], replace(sources[0].groups[0], group_id=9)])]
    assert read_prompts(mllm, twins, greedy, n_groups=8, seed=0, pictures=pictures).specificity_nats == 0


def test_prompts_of_an_untrained_model_are_not_well_formed(sources: list[ProductSource]) -> None:
    mllm = build_mllm(SMALL, seed=0)
    report = read_prompts(mllm, sources, SMALL, n_groups=8, seed=0, pictures=Pictures(64))
    assert (report.n_prompts, report.p_well_formed, report.specificity_nats) == (2, 0, 0)


def test_at_most_so_many_groups_are_read_but_one_product_at_least(sources: list[ProductSource]) -> None:
    mllm = build_mllm(SMALL, seed=0)
    many = [replace(sources[0], product_id=f"p{number}") for number in range(3)]
    counted = [
        read_prompts(mllm, many, SMALL, n_groups=n_groups, seed=0, pictures=Pictures(64)).n_prompts
        for n_groups in (1, 4, 5, 6)
    ]
    assert counted == [2, 4, 4, 6]


def test_pictures_are_rgb_on_white_and_small(tmp_path: Path) -> None:
    Image.new("RGBA", (1_000, 500), (0, 0, 0, 0)).save(tmp_path / "empty.png")
    pictures = Pictures(64)
    picture = pictures.get(str(tmp_path / "empty.png"))
    assert (picture.mode, picture.size) == ("RGB", (64, 32))
    assert picture.getpixel((5, 5)) == (255, 255, 255)
    assert pictures.get(str(tmp_path / "empty.png")) is picture


def test_each_tasks_weight_is_its_own_setting() -> None:
    settings = PretrainSettings(
        group_analysis=1, behavioural_prediction=2, product_comprehension=3, prompt_generation=4
    )
    assert {task.value.replace(" ", "_"): weight for task, weight in task_weights(settings).items()} == {
        "group_analysis": 1,
        "behavioural_prediction": 2,
        "product_comprehension": 3,
        "prompt_generation": 4,
    }
