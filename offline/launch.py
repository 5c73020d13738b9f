"""Launch of training processes on this machine: one for each GPU, or some on the CPU, by torchrun or accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Final

import msgspec

LOOPBACK: Final = "127.0.0.1"

_CONFIGS: Final = files("offline") / "accelerate_configs"


class Launcher(StrEnum):
    """What starts the processes: nothing (one process), torchrun, or accelerate with a configuration."""

    NONE = "none"
    TORCHRUN = "torchrun"
    ACCELERATE = "accelerate"


class LaunchRefused(ValueError):
    """Options that do not say which processes to start, or that this machine cannot serve."""

    def __init__(self, found: str, allowed: str) -> None:
        super().__init__(f"{found}; allowed is {allowed}. Nothing was started.")


class TrainingFailed(RuntimeError):
    """Training processes that ended without a result."""

    def __init__(self, launcher: Launcher, exit_code: int, reasons: Mapping[int, str]) -> None:
        of_reason: dict[str, list[str]] = {}
        for rank, reason in reasons.items():
            of_reason.setdefault(reason, []).append(str(rank))
        said = [f"process {', '.join(ranks)}: {reason}" for reason, ranks in of_reason.items()]
        super().__init__(
            f"{launcher} ended with exit code {exit_code}, and no artifact was written. "
            + ("\n".join(said) or "No process said why; what there is stands above.")
        )
        self.exit_code = exit_code


class WorldSizeMismatch(RuntimeError):
    """A launcher that started another number of processes than it was told to."""

    def __init__(self, n_started: int, n_wanted: int) -> None:
        super().__init__(
            f"{n_wanted} processes were to train together and there are {n_started}; steps would be of another size "
            "than was asked for. Nothing was trained."
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """Which processes to start: how many, by what, whether on GPUs, and accelerate's configuration."""

    launcher: Launcher
    n_processes: int
    on_gpu: bool
    accelerate_config: Path | None = None


def plan_launch(
    launcher: Launcher,
    *,
    gpus: int | None,
    processes: int | None,
    accelerate_config: str | None,
    n_gpus_here: int,
) -> Launch:
    """Return which processes to start.

    Parameters
    ----------
    launcher
        What starts them.
    gpus
        GPUs to use; each has a process of its own. 0: train on the CPU. None is allowed without a launcher alone:
        one GPU where there is any.
    processes
        Processes on the CPU.
    accelerate_config
        Name of a configuration of ours (`config_names`), or path of another one; `lora-ddp` where there is none.
    n_gpus_here
        GPUs that this machine has.

    Raises
    ------
    LaunchRefused
        If the options do not fit together or the machine.
    """
    if gpus is not None and gpus > n_gpus_here:
        raise LaunchRefused(f"--gpus is {gpus}", f"at most {n_gpus_here}, the CUDA devices that PyTorch finds here")
    if accelerate_config is not None and launcher is not Launcher.ACCELERATE:
        raise LaunchRefused(f"--accelerate-config is {accelerate_config!r}", "none without --launcher accelerate")
    if gpus and processes not in (None, gpus):
        raise LaunchRefused(f"--processes is {processes} beside --gpus {gpus}", "none: each GPU has one process")
    if launcher is Launcher.NONE:
        if (gpus or 0) > 1 or (processes or 1) > 1:
            raise LaunchRefused(
                f"--launcher none has --gpus {gpus} and --processes {processes}",
                "one process; for more take --launcher torchrun or accelerate",
            )
        return Launch(launcher, 1, n_gpus_here > 0 if gpus is None else gpus > 0)
    if gpus is None or (gpus == 0 and processes is None):
        raise LaunchRefused(
            f"--launcher {launcher} does not know how many processes to start",
            f"--gpus N, a process for each (this machine has {n_gpus_here}), or --gpus 0 --processes N on the CPU",
        )
    if launcher is Launcher.TORCHRUN:
        return Launch(launcher, gpus or processes or 1, gpus > 0)
    if gpus == 0:
        raise LaunchRefused(
            "--launcher accelerate has no GPU",
            "--gpus from 1 on: on the CPU it starts one process, whatever it is told; --launcher torchrun does not",
        )
    return Launch(launcher, gpus, True, _config(accelerate_config or config_names()[-1]))


def config_names() -> list[str]:
    """Return the names of accelerate's configurations that come with this package."""
    return sorted(Path(entry.name).stem for entry in _CONFIGS.iterdir() if entry.name.endswith(".yaml"))


def _config(name: str) -> Path:
    if name in config_names():
        return Path(str(_CONFIGS / f"{name}.yaml"))
    if not Path(name).is_file():
        raise LaunchRefused(f"--accelerate-config is {name!r}", f"{', '.join(config_names())} or the path of a file")
    return Path(name)


def launch_command(launch: Launch, module: Sequence[str]) -> list[str]:
    """Return the command that starts the processes.

    Parameters
    ----------
    launch
        Which.
    module
        The Python module that each of them runs, and its arguments.
    """
    if launch.launcher is Launcher.ACCELERATE:
        launcher = ["accelerate.commands.launch", "--config_file", str(launch.accelerate_config)]
        launcher += ["--num_processes", str(launch.n_processes), "--num_machines", "1", "--main_process_port", "0"]
        return [sys.executable, "-m", *launcher, "--module", *module]
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", LOOPBACK, "--max-restarts", "0"]
    return [sys.executable, "-m", *launcher, "--nproc-per-node", str(launch.n_processes), "--module", *module]


class ProcessOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a training process leaves behind: the artifact that it wrote, or why there is none."""

    artifact: str | None = None
    error: str | None = None

    def write(self, folder: Path, rank: int) -> None:
        """Leave it where `run_launch` reads it."""
        (folder / f"{rank}.json").write_bytes(msgspec.json.encode(self))


def run_launch(launch: Launch, module: Sequence[str], *, environment: Mapping[str, str], outcomes: Path) -> str:
    """Start the processes, wait for them, and return the name of the artifact that the first one wrote.

    They write to this process's standard output and error.

    Parameters
    ----------
    launch, module
        See `launch_command`.
    environment
        Variables that the processes get besides ours.
    outcomes
        An empty folder, in which each process leaves its `ProcessOutcome`.

    Raises
    ------
    TrainingFailed
        If any of them failed.
    """
    # Processes on the CPU find each other by this interface's address; by default by the host name's.
    loopback = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    variables = {**loopback, **os.environ, **environment}
    done = subprocess.run(launch_command(launch, module), env=variables, check=False)
    left = {
        int(path.stem): msgspec.json.decode(path.read_bytes(), type=ProcessOutcome) for path in outcomes.glob("*.json")
    }
    first = left.get(0, ProcessOutcome())
    if done.returncode != 0 or first.artifact is None:
        reasons = {rank: outcome.error for rank, outcome in sorted(left.items()) if outcome.error is not None}
        raise TrainingFailed(launch.launcher, done.returncode, reasons)
    return first.artifact
