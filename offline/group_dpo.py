"""Group-DPO (section 3.3, Eq. 9): the G-MLLM is aligned with what each group prefers, by LoRA through TRL.

The reference is the model with its adapter switched off. Under `torchrun` each process takes its share of every step.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.dpo_config import DPOConfig

from generator.group_llava import GROUP_PROJECTOR
from generator.instructions import INSTRUCTIONS, Task
from generator.mllm import GroupMllm
from offline.dpo_progress import DpoProgress
from offline.dpo_trainer import GroupDpoTrainer, GroupPreferenceCollator, RobustWeights
from offline.pairs import is_held_out
from offline.pretrain import Pictures, last_checkpoint
from offline.settings import GroupDpoSettings
from offline.tuples import PreferenceTuple

log = logging.getLogger(__name__)

LORA_TARGETS: Final = r".*language_model.*\.(q_proj|v_proj)"
"""By a pattern: the plain names would hit the vision tower too."""

PROGRESS_FILE: Final = "progress.jsonl"


class NoTuplesError(ValueError):
    """No tuple to learn from."""

    def __init__(self, n_tuples: int) -> None:
        super().__init__(
            f"of {n_tuples} preference tuples none is left to learn from; needed is at least one whose product is not "
            "held out. The model is as it was."
        )


@dataclass(frozen=True, slots=True)
class GroupDpoReport:
    """What an alignment came to.

    ``accuracy`` is the share of tuples whose winner the policy prefers more than the reference does, and
    ``margin`` by how much, in rewards; both are measured on the ``n_held_out`` tuples of held-out products, and None
    without any.
    """

    n_tuples: int
    n_held_out: int
    n_steps: int
    n_processes: int
    first_loss: float
    last_loss: float
    accuracy: float | None
    margin: float | None
    n_seconds: float


def align(
    mllm: GroupMllm,
    tuples: Sequence[PreferenceTuple],
    settings: GroupDpoSettings,
    *,
    folder: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> GroupDpoReport:
    """Align a G-MLLM with preference tuples, in place: afterwards the adapter is part of its weights.

    A run that was killed goes on from its last whole checkpoint and ends where it would have.

    Parameters
    ----------
    mllm
        The model; what it is when it comes in is the reference.
    tuples
        Winners and losers.
    settings
        How it is aligned; its learning rate is set, by `GroupDpoSettings.of_preset` if by nobody else.
    folder
        Where checkpoints and `PROGRESS_FILE` go: a folder of this run alone.
    seed
        Seed of the adapter and of the order of the tuples.
    callbacks
        Told of every step.

    Raises
    ------
    NoTuplesError
        If there is nothing to learn from.
    """
    trainer = make_trainer(mllm, tuples, settings, folder=folder, seed=seed, callbacks=callbacks)
    resumed = last_checkpoint(folder)
    if resumed is not None:
        log.info("Group-DPO goes on from %s", resumed)
    result = trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    learnt: Any = trainer.train_dataset
    held_out: Any = trainer.eval_dataset
    measured = {} if held_out is None else trainer.evaluate()
    # Merged, it is a G-MLLM like any other: it is saved, served and aligned again as such.
    adapted: Any = trainer.model
    mllm.model = adapted.merge_and_unload()
    report = GroupDpoReport(
        n_tuples=len(learnt),
        n_held_out=0 if held_out is None else len(held_out),
        n_steps=int(trainer.state.global_step),
        n_processes=int(trainer.accelerator.num_processes),
        first_loss=losses[0],
        last_loss=losses[-1],
        accuracy=measured.get("eval_rewards/accuracies"),
        margin=measured.get("eval_rewards/margins"),
        n_seconds=float(result.metrics["train_runtime"]),
    )
    log.info("aligned: %s", report)
    return report


def make_trainer(
    mllm: GroupMllm,
    tuples: Sequence[PreferenceTuple],
    settings: GroupDpoSettings,
    *,
    folder: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> GroupDpoTrainer:
    """Return the trainer that `align` runs, with the adapter on the model."""
    learnt: list[PreferenceTuple] = []
    measured: list[PreferenceTuple] = []
    for row in tuples:
        (measured if is_held_out(row.product_id, settings.held_out_share) else learnt).append(row)
    if not learnt:
        raise NoTuplesError(len(tuples))
    groups = Counter((row.product_id, row.group_id) for row in learnt)
    numbers = {group: number for number, group in enumerate(groups)}
    robust = [RobustWeights(list(groups.values()), settings.robust_step)] if settings.robust_step > 0 else []
    trainer = GroupDpoTrainer(
        model=mllm.model,
        args=_arguments(mllm, settings, folder, seed),
        data_collator=GroupPreferenceCollator(mllm, Pictures.of(mllm)),
        train_dataset=_dataset(learnt, numbers, settings),
        eval_dataset=_dataset(measured, numbers, settings) if measured else None,
        processing_class=mllm.processor,
        peft_config=lora(settings),
        callbacks=[DpoProgress(folder / PROGRESS_FILE), *robust, *callbacks],
    )
    for of_library in (PrinterCallback, ProgressCallback):  # they write to standard output, which belongs to figures
        trainer.remove_callback(of_library)
    return trainer


def lora(settings: GroupDpoSettings) -> LoraConfig:
    """Return the adapter: LoRA on the language model, and a group projector of its own where there are groups.

    The projector is a copy that is switched off with the rest, so that the model without adapter is the reference.
    """
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=LORA_TARGETS,
        modules_to_save=[GROUP_PROJECTOR] if settings.with_group else None,
        task_type="CAUSAL_LM",
    )


def _dataset(
    tuples: Sequence[PreferenceTuple], numbers: dict[tuple[str, int], int], settings: GroupDpoSettings
) -> Dataset:
    sure = np.array([2 * row.p_win - 1 for row in tuples])
    # Weights of mean 1: the learning rate means the same with them and without.
    weights = sure / sure.mean() if settings.confidence_weights and sure.any() else np.ones(len(tuples))
    return Dataset.from_list(
        [
            {
                "prompt": INSTRUCTIONS[Task.PROMPT_GENERATION][row.wording].fill(
                    title=row.title, group=settings.with_group
                ),
                "chosen": row.chosen,
                "rejected": row.rejected,
                "images": [] if row.picture_uri is None else [row.picture_uri],
                "group_feature": row.group_feature.tolist() if settings.with_group else None,
                "weight": float(weight),
                "group": numbers.get((row.product_id, row.group_id), 0),
            }
            for row, weight in zip(tuples, weights, strict=True)
        ]
    )


def _arguments(mllm: GroupMllm, settings: GroupDpoSettings, folder: Path, seed: int) -> DPOConfig:
    on_cuda = mllm.device.type == "cuda"
    assert settings.learning_rate is not None
    options: dict[str, Any] = {
        "beta": settings.beta,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, settings.sft_weight],
        "max_length": None,  # nothing is cut: a cut picture has placeholders without features
    }
    return DPOConfig(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.n_epochs,
        per_device_train_batch_size=settings.batch_tuples,
        per_device_eval_batch_size=settings.batch_tuples,
        gradient_accumulation_steps=settings.n_accumulated,
        activation_checkpointing=settings.activation_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_share,
        max_grad_norm=settings.max_gradient,
        logging_steps=settings.log_steps,
        logging_first_step=True,
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,  # the one before stays until the next is whole
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        ddp_find_unused_parameters=False,  # every row has a group, or none has and the projector is frozen
        bf16=on_cuda,
        dataloader_pin_memory=on_cuda,
        use_cpu=not on_cuda,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
