from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from offline.launch import (
    Launch,
    Launcher,
    LaunchRefused,
    TrainingFailed,
    config_names,
    launch_command,
    plan_launch,
    run_launch,
)

NONE, TORCHRUN, ACCELERATE = Launcher


def plan(launcher: Launcher, n_gpus_here: int = 0, **options: Any) -> Launch:
    given = {"gpus": None, "processes": None, "accelerate_config": None, **options}
    return plan_launch(launcher, n_gpus_here=n_gpus_here, **given)


@pytest.mark.parametrize(
    ("launcher", "n_gpus_here", "options", "n_processes", "on_gpu"),
    [
        (NONE, 0, {}, 1, False),
        (NONE, 2, {}, 1, True),
        (NONE, 2, {"gpus": 0}, 1, False),
        (NONE, 2, {"gpus": 1, "processes": 1}, 1, True),
        (TORCHRUN, 8, {"gpus": 8}, 8, True),
        (TORCHRUN, 8, {"gpus": 1}, 1, True),
        (TORCHRUN, 8, {"gpus": 0, "processes": 2}, 2, False),
        (TORCHRUN, 0, {"gpus": 0, "processes": 2}, 2, False),
        (ACCELERATE, 8, {"gpus": 8}, 8, True),
    ],
)
def test_each_gpu_has_a_process_and_a_cpu_as_many_as_are_asked_for(
    launcher: Launcher, n_gpus_here: int, options: dict[str, Any], n_processes: int, on_gpu: bool
) -> None:
    launch = plan(launcher, n_gpus_here, **options)
    assert (launch.launcher, launch.n_processes, launch.on_gpu) == (launcher, n_processes, on_gpu)


@pytest.mark.parametrize(
    ("launcher", "n_gpus_here", "options", "said"),
    [
        (TORCHRUN, 2, {}, r"how many processes to start; allowed is --gpus N.*this machine has 2"),
        (TORCHRUN, 0, {"gpus": 0}, "how many processes to start"),
        (ACCELERATE, 2, {}, "how many processes to start"),
        (TORCHRUN, 0, {"gpus": 8}, r"--gpus is 8; allowed is at most 0"),
        (NONE, 0, {"gpus": 1}, "at most 0"),
        (NONE, 2, {"gpus": 2}, "allowed is one process"),
        (NONE, 0, {"processes": 2}, "allowed is one process"),
        (TORCHRUN, 2, {"gpus": 2, "processes": 4}, "each GPU has one process"),
        (ACCELERATE, 2, {"gpus": 0, "processes": 2}, "on the CPU it starts one process, whatever it is told"),
        (TORCHRUN, 2, {"gpus": 2, "accelerate_config": "fsdp2"}, "none without --launcher accelerate"),
        (ACCELERATE, 2, {"gpus": 2, "accelerate_config": "fsdp3"}, "fsdp2, lora-ddp or the path of a file"),
    ],
)
def test_what_cannot_be_started_is_refused(
    launcher: Launcher, n_gpus_here: int, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(LaunchRefused, match=said) as refused:
        plan(launcher, n_gpus_here, **options)
    assert str(refused.value).endswith("Nothing was started.")


def test_torchrun_stays_on_loopback() -> None:
    command = launch_command(plan(TORCHRUN, 0, gpus=0, processes=2), ["osmf", "--version"])
    assert command[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert command[command.index("--local-addr") + 1] == "127.0.0.1"
    assert command[command.index("--nproc-per-node") + 1 :] == ["2", "--module", "osmf", "--version"]


def test_accelerate_takes_our_configuration_or_anybodys(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("distributed_type: MULTI_GPU\n")
    for given, found in ((None, "lora-ddp"), ("fsdp2", "fsdp2"), (str(tmp_path / "own.yaml"), "own")):
        command = launch_command(plan(ACCELERATE, 8, gpus=8, accelerate_config=given), ["osmf"])
        config = Path(command[command.index("--config_file") + 1])
        assert config.is_file()
        assert config.stem == found
        assert command[command.index("--num_processes") + 1] == "8"


def accelerate_variables(name: str) -> dict[str, str]:
    """Return what accelerate tells the processes that it starts by one of our configurations."""
    command = launch_command(plan(ACCELERATE, 2, gpus=2, accelerate_config=name), ["osmf"])
    args = launch_command_parser().parse_args(command[command.index("accelerate.commands.launch") + 1 :])
    args, _, _ = _validate_launch_command(args)
    assert args.use_fsdp == (name == "fsdp2")
    assert args.multi_gpu == (name == "lora-ddp")
    variables = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == "2"
    return dict(variables)


@pytest.mark.parametrize("name", config_names())
def test_our_configurations_are_understood(name: str) -> None:
    config = load_config_from_file(str(plan(ACCELERATE, 2, gpus=2, accelerate_config=name).accelerate_config))
    assert config.mixed_precision == "bf16"
    variables = accelerate_variables(name)
    assert variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert ("ACCELERATE_USE_FSDP" in variables) == (name == "fsdp2")


def test_fsdp2_shards_by_layers_and_saves_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in accelerate_variables("fsdp2").items():
        if variable.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.transformer_cls_names_to_wrap is None  # which stands for the layers that the model names
    assert plugin.cpu_ram_efficient_loading is False


PROCESS = """
import json, os, sys
rank, folder = os.environ["RANK"], sys.argv[1]
assert os.environ["WORLD_SIZE"] == "2"
failing = sys.argv[2] == rank
outcome = {"error": "no tuples"} if failing else {"artifact": "mllm/v000001"}
open(f"{folder}/{rank}.json", "w").write(json.dumps(outcome))
sys.exit(3 if failing else 0)
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("failing", [None, 1])
def test_what_a_process_says_comes_through(tmp_path: Path, failing: int | None) -> None:
    (tmp_path / "process_under_test.py").write_text(PROCESS)
    (tmp_path / "outcomes").mkdir()
    arguments = ["process_under_test", str(tmp_path / "outcomes"), str(failing)]
    launch = plan(TORCHRUN, 0, gpus=0, processes=2)
    options: Any = {"environment": {"PYTHONPATH": str(tmp_path)}, "outcomes": tmp_path / "outcomes"}
    if failing is None:
        assert run_launch(launch, arguments, **options) == "mllm/v000001"
        return
    with pytest.raises(
        TrainingFailed, match=r"exit code 1, and no artifact was written\. process 1: no tuples"
    ) as failed:
        run_launch(launch, arguments, **options)
    assert failed.value.exit_code == 1
