from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from generator.group_llava import GroupFeatureMismatch
from generator.mllm import GroupMllm
from offline.dpo_trainer import GroupDpoTrainer, GroupPreferenceCollator, StockCollatorRefused
from offline.group_dpo import PROGRESS_FILE, GroupDpoReport, NoTuplesError, align, make_trainer
from offline.pretrain import Pictures, prompt_input
from offline.pretrain_source import ProductSource
from offline.settings import GroupDpoSettings
from tests.offline import dpo_world
from tests.offline.dpo_world import SHORT

# PEFT 0.21 still asks transformers 5.24 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
    torch.set_rng_state(state)


@pytest.fixture
def sources(tmp_path: Path) -> list[ProductSource]:
    return dpo_world.products(tmp_path)


def changed(**changes: Any) -> GroupDpoSettings:
    return SHORT.model_copy(update=changes)


def trainer_of(sources: list[ProductSource], folder: Path, **changes: Any) -> tuple[GroupMllm, GroupDpoTrainer]:
    mllm = dpo_world.mllm()
    return mllm, make_trainer(mllm, dpo_world.tuples(sources), changed(**changes), folder=folder, seed=0)


def run(
    sources: list[ProductSource], folder: Path, *, callbacks: Any = (), **changes: Any
) -> tuple[GroupMllm, GroupDpoReport]:
    mllm = dpo_world.mllm()
    tuples = dpo_world.tuples(sources)
    return mllm, align(mllm, tuples, changed(**changes), folder=folder, seed=0, callbacks=callbacks)


def first_batch(trainer: GroupDpoTrainer, n: int = 4) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = trainer.data_collator([trainer.train_dataset[row] for row in range(n)])
    return batch


def test_any_other_collator_is_refused(sources: list[ProductSource], tmp_path: Path) -> None:
    mllm, trainer = trainer_of(sources, tmp_path / "out")
    for collator in (None, DataCollatorForVisionPreference(mllm.processor)):
        with pytest.raises(StockCollatorRefused, match="drops group_features"):
            GroupDpoTrainer(
                model=mllm.model,
                args=trainer.args,
                data_collator=collator,
                train_dataset=trainer.train_dataset,
                processing_class=mllm.processor,
            )


def test_without_their_features_groups_raise_in_training(
    sources: list[ProductSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = trainer_of(sources, tmp_path / "out")
    with_group = GroupPreferenceCollator.__call__

    def as_stock(self: GroupPreferenceCollator, rows: Any) -> dict[str, Any]:
        return {name: value for name, value in with_group(self, rows).items() if name != "group_features"}

    monkeypatch.setattr(GroupPreferenceCollator, "__call__", as_stock)
    with pytest.raises(GroupFeatureMismatch):
        trainer.train()


def test_the_group_reaches_the_collator_and_both_halves_of_the_batch(
    sources: list[ProductSource], tmp_path: Path
) -> None:
    mllm, trainer = trainer_of(sources, tmp_path / "out")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["group_features"].shape == (8, 11, 128)
    torch.testing.assert_close(batch["group_features"][:4], batch["group_features"][4:])
    assert batch["pixel_values"].shape[0] == 8
    known = torch.stack([torch.from_numpy(group.feature) for group in sources[0].groups])
    ordered = first_batch(trainer)
    torch.testing.assert_close(ordered["group_features"], known.repeat(4, 1, 1))
    rows = [trainer.train_dataset[row] for row in range(4)]
    for half, column in ((0, "chosen"), (1, "rejected")):
        for number, row in enumerate(rows):
            place = half * 4 + number
            answered = ordered["input_ids"][place][ordered["completion_mask"][place] == 1]
            assert mllm.tokenizer.decode(answered) == mllm.answer_text(row[column])


def test_with_the_adapter_off_it_is_the_reference(sources: list[ProductSource], tmp_path: Path) -> None:
    reference = dpo_world.mllm()
    _, trainer = trainer_of(sources, tmp_path / "out")
    trainer.train()
    inputs = [prompt_input(product, group.feature, Pictures(64)) for product in sources for group in product.groups]
    batch = reference.collate(inputs)
    model = trainer.model.eval()
    with torch.no_grad():
        expected = reference.model.eval()(**batch).logits
        trained = model(**batch).logits
        with model.disable_adapter():
            off = model(**batch).logits
    assert (trained - expected).abs().max() > 0.01
    torch.testing.assert_close(off, expected, rtol=0, atol=0)
    projector = trainer.model.base_model.model.model.group_projector
    moved = projector.modules_to_save["default"].linear_1.weight - projector.original_module.linear_1.weight
    assert moved.abs().max() > 0  # the projector learns, and only as a copy


def test_lora_is_in_the_language_model_alone(sources: list[ProductSource], tmp_path: Path) -> None:
    _, trainer = trainer_of(sources, tmp_path / "out")
    adapted = [name for name, _ in trainer.model.named_parameters() if "lora_" in name]
    assert len(adapted) == 2 * 2 * 2  # A and B, of two projections, in two layers
    assert all(".language_model." in name for name in adapted)
    learnt = {name for name, weights in trainer.model.named_parameters() if weights.requires_grad}
    assert {name for name in learnt if "lora_" not in name and "group_projector.modules_to_save" not in name} == set()
    by_plain_names = get_peft_model(dpo_world.mllm().model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert any("vision_tower" in name and "lora_" in name for name, _ in by_plain_names.named_parameters())


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_with_equal_weights_the_loss_is_trls(sources: list[ProductSource], tmp_path: Path, sft_weight: float) -> None:
    _, trainer = trainer_of(sources, tmp_path / "out", sft_weight=sft_weight)
    trainer.train()  # before it the policy is the reference, and every loss of Eq. 9 log 2
    batch = first_batch(trainer, n=1)  # of one tuple: TRL's second term is a mean over the batch's tokens
    ours = trainer.compute_loss(trainer.model, batch)
    stock = {name: value for name, value in batch.items() if name not in ("weights", "groups")}
    theirs = DPOTrainer._compute_loss(trainer, trainer.model, stock, False)
    torch.testing.assert_close(ours, theirs)
    assert abs(ours.item() - 0.6931) > 0.001


def test_held_out_products_are_measured_on_and_not_learnt_from(sources: list[ProductSource], tmp_path: Path) -> None:
    mllm, report = run(sources, tmp_path / "out", n_epochs=6, held_out_share=0.5)
    assert (report.n_tuples, report.n_held_out, report.n_steps) == (8, 8, 12)
    assert report.first_loss == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are one
    assert report.last_loss < 0.69
    assert report.accuracy == 1
    assert report.margin is not None
    assert report.margin > 0
    # What was aligned is in the weights: it is saved and loaded like any other.
    asked = [prompt_input(sources[0], group.feature, Pictures(64)) for group in sources[0].groups]
    answers = [dpo_world.prompt(scene) for scene in dpo_world.TASTES]
    aligned = mllm.log_probs(asked, answers)
    mllm.save(tmp_path / "saved")
    assert GroupMllm.load(tmp_path / "saved").log_probs(asked, answers) == pytest.approx(aligned, abs=1e-3)
    assert abs(aligned - dpo_world.mllm().log_probs(asked, answers)).max() > 0.1
    with pytest.raises(NoTuplesError):
        align(dpo_world.mllm(), [], SHORT, folder=tmp_path / "none", seed=0)


def test_without_the_group_token_opposite_tastes_cannot_be_learnt(sources: list[ProductSource], tmp_path: Path) -> None:
    mllm, report = run(sources, tmp_path / "out", n_epochs=6, held_out_share=0.5, with_group=False)
    assert report.accuracy == 0.5  # whatever is right of one group is wrong of the other
    assert report.margin == pytest.approx(0, abs=1e-4)
    projector = dpo_world.mllm().model.model.group_projector.state_dict()
    for name, weights in mllm.model.model.group_projector.state_dict().items():
        torch.testing.assert_close(weights, projector[name], rtol=0, atol=0)


def test_what_is_sure_counts_more(sources: list[ProductSource], tmp_path: Path) -> None:
    _, alike = trainer_of(sources, tmp_path / "out")
    _, sure = trainer_of(sources, tmp_path / "out", confidence_weights=True)
    assert set(alike.train_dataset["weight"]) == {1.0}
    weights = torch.tensor(sure.train_dataset["weight"])
    assert weights.mean().item() == pytest.approx(1)
    assert weights[-1] / weights[0] == pytest.approx(0.8 / 0.2)
    batch = first_batch(sure)
    batch["weights"] = torch.tensor([4.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(
        sure.compute_loss(sure.model, batch), sure.compute_loss(sure.model, first_batch(sure, n=1)) / 0.4
    )


def test_the_sft_term_holds_up_the_winners(sources: list[ProductSource], tmp_path: Path) -> None:
    winner = dpo_world.prompt(dpo_world.TASTES[0])
    asked = [prompt_input(sources[0], sources[0].groups[0].feature, Pictures(64))]
    found = []
    for sft_weight in (0.0, 1.0):
        mllm, _ = run(sources, tmp_path / str(sft_weight), sft_weight=sft_weight)
        found.append(mllm.log_probs(asked, [winner]).item() - dpo_world.mllm().log_probs(asked, [winner]).item())
    assert found[1] > found[0] + 1


class Kill(TrainerCallback):
    """Kills a run after a step, as a signal would: between two checkpoints."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("robust_step", [0.0, 0.5])
def test_a_killed_run_ends_where_it_would_have(
    sources: list[ProductSource], tmp_path: Path, robust_step: float
) -> None:
    options = {"robust_step": robust_step, "n_epochs": 1.5}
    whole, report = run(sources, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(sources, tmp_path / "killed", callbacks=[Kill()], **options)
    # A checkpoint that was being written when the kill came.
    (tmp_path / "killed" / "checkpoint-3").mkdir()
    (tmp_path / "killed" / "checkpoint-3" / "adapter_config.json").write_text("{")
    again, report_again = run(sources, tmp_path / "killed", **options)
    assert report.n_steps == report_again.n_steps == 6
    assert report_again.last_loss == pytest.approx(report.last_loss, abs=1e-6)
    for name, weights in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weights, rtol=0, atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "killed" / PROGRESS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_progress_can_be_watched_and_standard_output_is_left_alone(
    sources: list[ProductSource], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run(sources, tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert "step 4 of 4: loss" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "out" / PROGRESS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"loss", "rewards/accuracies", "rewards/margins", "learning_rate"} <= lines[0].keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("robust_step", [0.0, 0.5])
def test_two_processes_lose_what_one_does_with_the_doubled_batch(tmp_path: Path, robust_step: float) -> None:
    found = {}
    for n_processes in (1, 2):
        folder = tmp_path / str(n_processes)
        folder.mkdir()
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"),
            *("-m", "tests.offline.dpo_worker", str(folder), str(4 // n_processes), str(robust_step)),
        ]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[n_processes] = json.loads((folder / "result.json").read_text())
    assert [found[n]["world_size"] for n in (1, 2)] == [1, 2]
    assert [found[n]["n_processes"] for n in (1, 2)] == [1, 2]
    assert len(found[1]["losses"]) == 4
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], abs=5e-5)
    assert found[1]["losses"][-1] < found[1]["losses"][0] - 0.01
