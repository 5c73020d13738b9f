"""The command that trains one step of the offline chain, on this process or on several that it starts."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from offline.launch import (
    Launch,
    Launcher,
    LaunchRefused,
    ProcessOutcome,
    TrainingFailed,
    WorldSizeMismatch,
    plan_launch,
    run_launch,
)
from osmf.commands.common import Json, command_settings, fail, show
from osmf.commands.offline import Preset, with_preset
from osmf.settings import settings_variables
from state.artifact import ArtifactStore

if TYPE_CHECKING:
    from osmf.figures import Figures
    from osmf.settings import Settings
    from state.artifact import Artifact

WORK_FOLDER = "work-train"


class TrainedStep(StrEnum):
    """What can be trained by itself."""

    PRETRAIN = "pretrain"
    GRM = "grm"
    GROUP_DPO = "group-dpo"


def train(
    step: Annotated[
        TrainedStep,
        typer.Argument(
            help="pretrain: the G-MLLM, from the newest dataset; grm: the reward model, from that and the newest "
            "G-MLLM; group-dpo: the aligned G-MLLM, from the newest tuples."
        ),
    ],
    preset: Annotated[Preset | None, typer.Option(help="The G-MLLM; default: generator.mllm.preset.")] = None,
    launcher: Annotated[Launcher, typer.Option(help="What starts several processes on this machine.")] = Launcher.NONE,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs, each with a process of its own; 0: on the CPU.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes on the CPU, with --gpus 0.")] = None,
    accelerate_config: Annotated[
        str | None,
        typer.Option(
            metavar="lora-ddp|fsdp2|FILE",
            help="accelerate's configuration: each GPU holds the whole model (default), or a part of it, or your own.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Train one step from the newest artifacts, on one device or on several."""
    from offline.run_lock import run_lock

    settings, started_s = with_preset(command_settings(), preset), time.monotonic()
    try:
        launch = plan_launch(
            launcher, gpus=gpus, processes=processes, accelerate_config=accelerate_config, n_gpus_here=_n_gpus()
        )
        with run_lock(settings.offline.dataset_dir):
            if launch.launcher is Launcher.NONE:
                artifact = _train(step, settings, on_gpu=launch.on_gpu, n_processes=1)
            else:
                artifact = _launch(step, settings, launch)
    except _refusals() as error:
        raise fail(error) from error
    show(_figures(step, artifact, started_s), json)


def train_process(step: TrainedStep, on_gpu: bool, world_size: int, outcomes: Path) -> None:
    """Be one of the processes that `train` starts."""
    rank = int(os.environ["RANK"])
    try:
        artifact = _train(step, command_settings(), on_gpu=on_gpu, n_processes=world_size)
    except _refusals() as error:
        ProcessOutcome(error=str(error)).write(outcomes, rank)
        raise typer.Exit(1) from error  # the process that started this one says why
    except BaseException as error:
        ProcessOutcome(error=f"{type(error).__name__}: {error}").write(outcomes, rank)
        raise
    ProcessOutcome(artifact=artifact.name).write(outcomes, rank)


def _launch(step: TrainedStep, settings: Settings, launch: Launch) -> Artifact:
    """Start the processes, wait for them, and return the artifact that the first one wrote."""
    with TemporaryDirectory(prefix="osmf-train-") as folder:
        module = ["osmf", "offline", "train-process", step.value, str(launch.on_gpu)]
        name = run_launch(
            launch,
            [*module, str(launch.n_processes), folder],
            environment=settings_variables(settings),
            outcomes=Path(folder),
        )
    artifact = ArtifactStore(settings.offline.dataset_dir).named(name)
    assert artifact is not None
    return artifact


def _train(step: TrainedStep, settings: Settings, *, on_gpu: bool, n_processes: int) -> Artifact:
    """Train in this process."""
    import torch

    from offline.chain import wall_clock_ms
    from offline.data_parallel import DataParallel
    from offline.steps import Workshop
    from offline.train import train_step

    torch.set_num_threads(max(1, settings.offline.chain.torch_threads // n_processes))
    processes = DataParallel(on_gpu=on_gpu)
    if processes.n != n_processes:
        raise WorldSizeMismatch(processes.n, n_processes)
    shop = Workshop(
        settings.offline,
        settings.generator,
        settings.offline.dataset_dir / WORK_FOLDER,
        wall_clock_ms,
        lambda step, done, total, figures: None,  # trainers log their progress
        processes,
    )
    return train_step(step.value, shop)


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors that say by themselves what is wrong: no traceback is needed."""
    from generator.frozen_tower import TowerWeightsMissing
    from generator.mllm import AttentionUnavailable
    from generator.mllm_presets import PresetUnavailable
    from offline.grm_training import NoPairsError
    from offline.group_dpo import NoTuplesError
    from offline.pretrain_rows import NothingToLearnFrom
    from offline.run_lock import RunUnderWay
    from offline.steps import SourcesMissing
    from offline.teacher import TeacherFailed
    from offline.train import NothingToTrainFrom, ShardingRefused

    return (
        LaunchRefused,
        RunUnderWay,
        TrainingFailed,
        WorldSizeMismatch,
        NothingToTrainFrom,
        ShardingRefused,
        SourcesMissing,
        NothingToLearnFrom,
        NoPairsError,
        NoTuplesError,
        TeacherFailed,
        PresetUnavailable,
        TowerWeightsMissing,
        AttentionUnavailable,
    )


def _n_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _figures(step: TrainedStep, artifact: Artifact, started_s: float) -> Figures:
    from osmf.figures import Figures, commit, device

    return Figures(
        command=f"offline train {step.value}",
        commit=commit(),
        seeds={},
        device=device(),
        seconds=time.monotonic() - started_s,
        metrics=artifact.manifest.figures,
        detail={"artifact": artifact.name, "made_from": artifact.manifest.made_from},
    )
