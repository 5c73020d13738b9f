"""Pre-training of the G-MLLM on the four tasks (section 3.3): a Trainer of transformers with our rows.

The Trainer's own machinery does the rest: schedule, checkpoints from which a killed run goes on, bf16, and several
processes under `torchrun`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from generator.instructions import Task
from generator.mllm import Floats, GroupMllm, MllmInput
from generator.prompt import is_well_formed
from generator.prompt_writer import on_white, picture_side_px, prompt_request
from generator.settings import MllmSettings
from generator.storage import open_image
from offline.data_parallel import DataParallel, whole_weights
from offline.pretrain_rows import PretrainRow, make_rows
from offline.pretrain_source import GroupSource, ProductSource
from offline.settings import PretrainSettings
from offline.teacher import EndpointTeacher, GrammarTeacher, PromptTeacher

log = logging.getLogger(__name__)


class Pictures:
    """Pictures by URI, opened once and kept small; transparency becomes white.

    Parameters
    ----------
    side_px
        Longest side at which they are kept.
    """

    def __init__(self, side_px: int) -> None:
        self._side_px = side_px
        self._kept: dict[str, Image.Image] = {}

    @classmethod
    def of(cls, mllm: GroupMllm) -> Pictures:
        """Return a store of pictures as large as a model can make use of."""
        return cls(picture_side_px(mllm))

    def get(self, uri: str) -> Image.Image:
        """Return a picture, RGB.

        Raises
        ------
        generator.storage.ImageUnreadable
            If it cannot be read.
        """
        if uri not in self._kept:
            self._kept[uri] = on_white(open_image(uri), self._side_px)
        return self._kept[uri]

    def input_of(self, row: PretrainRow) -> MllmInput:
        """Return a row as the model reads it."""
        images = () if row.picture_uri is None else (self.get(row.picture_uri),)
        return MllmInput(row.instruction, images, row.group_feature)


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What the prompts that a G-MLLM writes are like.

    ``p_well_formed`` is the share of prompts of ours. ``specificity_nats`` says how much likelier a prompt is for the
    group that it was written for than for the product's other groups, in log-probability on average over those that
    are well formed: 0 where groups make no difference, or no prompt can be read.
    """

    n_prompts: int
    p_well_formed: float
    specificity_nats: float


@dataclass(frozen=True, slots=True)
class PretrainReport:
    """What pre-training came to: rows, steps, the loss at first and at last, and the prompts afterwards."""

    n_rows: int
    n_steps: int
    n_processes: int
    first_loss: float
    last_loss: float
    n_seconds: float
    prompts: PromptReport


def teacher_of(settings: PretrainSettings, *, seed: int, client: httpx.Client) -> PromptTeacher:
    """Return the teacher that the settings name."""
    if settings.teacher.url is None:
        return GrammarTeacher(temperature=settings.teacher.temperature, seed=seed)
    return EndpointTeacher(settings.teacher, client)


def task_weights(settings: PretrainSettings) -> dict[Task, float]:
    """Return how often each task comes."""
    return {
        Task.GROUP_ANALYSIS: settings.group_analysis,
        Task.BEHAVIOURAL_PREDICTION: settings.behavioural_prediction,
        Task.PRODUCT_COMPREHENSION: settings.product_comprehension,
        Task.PROMPT_GENERATION: settings.prompt_generation,
    }


def pretrain(
    mllm: GroupMllm,
    sources: Sequence[ProductSource],
    teacher: PromptTeacher,
    settings: PretrainSettings,
    generation: MllmSettings,
    *,
    folder: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> PretrainReport:
    """Train a G-MLLM on the four tasks, in place.

    A run that was killed goes on from its last checkpoint in ``folder`` and ends where it would have.

    Parameters
    ----------
    mllm
        The model; all of it is trained, but for a tower that is frozen by design.
    sources
        What the stream knows.
    teacher
        Who writes the prompts.
    settings, generation
        How it is trained, and how prompts are generated for the report.
    folder
        Where checkpoints go.
    seed
        Seed of the rows, their order and the report's draws.
    callbacks
        Told of every step, such as a progress bar.
    """
    trainer = make_trainer(mllm, sources, teacher, settings, folder=folder, seed=seed, callbacks=callbacks)
    resumed = last_checkpoint(folder)
    if resumed is not None:
        log.info("pre-training goes on from %s", resumed)
    result = trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    learnt: Any = trainer.train_dataset
    _put_together(trainer, mllm)
    pictures = Pictures.of(mllm)
    prompts = DataParallel(on_gpu=not trainer.args.use_cpu).by_first(  # which has all of the weights
        lambda: read_prompts(mllm, sources, generation, n_groups=settings.n_evaluated, seed=seed, pictures=pictures)
    )
    log.info(
        "pre-trained: of %d prompts %.1f%% are well formed, and %.2f nats likelier for their own group",
        prompts.n_prompts,
        100 * prompts.p_well_formed,
        prompts.specificity_nats,
    )
    return PretrainReport(
        n_rows=len(learnt),
        n_steps=int(trainer.state.global_step),
        n_processes=int(trainer.accelerator.num_processes),
        first_loss=losses[0],
        last_loss=losses[-1],
        n_seconds=float(result.metrics["train_runtime"]),
        prompts=prompts,
    )


def make_trainer(
    mllm: GroupMllm,
    sources: Sequence[ProductSource],
    teacher: PromptTeacher,
    settings: PretrainSettings,
    *,
    folder: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Return the trainer that `pretrain` runs, for a model that has learnt nothing of groups yet."""
    features = [group.feature for product in sources for group in product.groups]
    if len(features) > 1:
        mllm.model.model.group_projector.fit_scale(torch.from_numpy(np.stack(features)))
    arguments = _arguments(mllm, settings, folder, seed)
    trainer = Trainer(
        model=mllm.model,
        args=arguments,
        # By one process: an endpoint is asked once, and would answer another one otherwise.
        train_dataset=DataParallel(on_gpu=not arguments.use_cpu).by_first(
            lambda: make_rows(
                sources,
                teacher,
                n_rows=settings.n_rows,
                n_prompts=settings.n_prompts,
                task_weights=task_weights(settings),
                p_without_group=settings.p_without_group,
                seed=seed,
            )
        ),
        data_collator=_collator(mllm, Pictures.of(mllm)),
        callbacks=[LogProgress(), *callbacks],
    )
    for of_library in (PrinterCallback, ProgressCallback):  # they write to standard output, which belongs to figures
        trainer.remove_callback(of_library)
    return trainer


def _put_together(trainer: Trainer, mllm: GroupMllm) -> None:
    """Give the first process's model all of the weights where they were spread over several."""
    if not trainer.is_fsdp_enabled:
        return
    assert trainer.model is not None
    weights = whole_weights(trainer.model)
    if trainer.is_world_process_zero():
        whole = type(mllm.model)(mllm.model.config)
        whole.generation_config = mllm.model.generation_config
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
        torch.nn.Module.to(whole, mllm.device)
        mllm.model = whole


def last_checkpoint(folder: Path) -> Path | None:
    """Return a Trainer's newest checkpoint that is whole; None without any.

    The Trainer's state is the last file that it writes of one, so a run that was killed over it left none.
    """
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def prompt_input(
    product: ProductSource, group_feature: Floats | None, pictures: Pictures, *, wording: int = 0
) -> MllmInput:
    """Return what asks the G-MLLM for a prompt for a group of a product; without a feature, for all of its users."""
    picture = None if product.picture_uri is None else pictures.get(product.picture_uri)
    return prompt_request(product.title, picture, group_feature, wording=wording)


def sample_products(sources: Sequence[ProductSource], *, n_groups: int, seed: int) -> list[ProductSource]:
    """Return some products that have ``n_groups`` groups at most together, one product at least."""
    chosen: list[ProductSource] = []
    for row in np.random.default_rng([seed, 2]).permutation(len(sources)):
        if chosen and sum(len(product.groups) for product in chosen) + len(sources[row].groups) > n_groups:
            break
        chosen.append(sources[row])
    return chosen


def read_prompts(
    mllm: GroupMllm,
    sources: Sequence[ProductSource],
    generation: MllmSettings,
    *,
    n_groups: int,
    seed: int,
    pictures: Pictures,
    with_group: bool = True,
) -> PromptReport:
    """Generate a prompt for each of some groups, whole products at a time, and read what comes.

    Without the group token the prompts are for all shoppers, and none can be a group's own.
    """
    chosen = sample_products(sources, n_groups=n_groups, seed=seed)
    asked = [(product, group) for product in chosen for group in product.groups]
    answers = mllm.generate(
        [prompt_input(product, group.feature if with_group else None, pictures) for product, group in asked],
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=seed,
    )
    texts = [of_group[0] for of_group in answers]
    well_formed = [is_well_formed(text) for text in texts]
    written = [(*who, text) for who, text, fine in zip(asked, texts, well_formed, strict=True) if fine]
    specificity = _specificity(mllm, written, pictures) if with_group else 0.0
    return PromptReport(len(texts), float(np.mean(well_formed)), specificity)


def _specificity(
    mllm: GroupMllm, written: Sequence[tuple[ProductSource, GroupSource, str]], pictures: Pictures
) -> float:
    """Return by how much a prompt's log-probability is higher for its own group than for another one, on average."""
    own, others, answers = [], [], []
    for product, group, text in written:
        for other in product.groups:
            if other is not group:
                own.append(prompt_input(product, group.feature, pictures))
                others.append(prompt_input(product, other.feature, pictures))
                answers.append(text)
    if not answers:
        return 0.0
    return float((mllm.log_probs(own, answers) - mllm.log_probs(others, answers)).mean())


class LogProgress(TrainerCallback):
    """Writes a line of progress to the log now and then."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the step, the loss and the learning rate."""
        if logs and "loss" in logs:
            log.info(
                "step %d of %d: loss %.4f, learning rate %.2e",
                state.global_step,
                state.max_steps,
                float(logs["loss"]),
                float(logs["learning_rate"]),
            )


def _arguments(mllm: GroupMllm, settings: PretrainSettings, folder: Path, seed: int) -> TrainingArguments:
    on_cuda = mllm.device.type == "cuda"
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.n_epochs,
        per_device_train_batch_size=settings.batch_rows,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient,
        logging_steps=settings.log_steps,
        logging_first_step=True,
        save_steps=settings.checkpoint_steps,
        save_total_limit=1,
        remove_unused_columns=False,  # the rows are no columns, and the collator reads all of them
        gradient_accumulation_steps=settings.n_accumulated,
        activation_checkpointing=settings.activation_checkpointing,
        ddp_find_unused_parameters=True,  # a batch may have no picture, or no group
        bf16=on_cuda,
        dataloader_pin_memory=on_cuda,
        use_cpu=not on_cuda,
        report_to=[],
        disable_tqdm=True,
    )


def _collator(mllm: GroupMllm, pictures: Pictures) -> Callable[[Sequence[PretrainRow]], dict[str, Any]]:
    def collate(rows: Sequence[PretrainRow]) -> dict[str, Any]:
        return dict(mllm.collate([pictures.input_of(row) for row in rows], [row.answer for row in rows]))

    return collate
