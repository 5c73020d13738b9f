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
from typer.testing import CliRunner

from generator.settings import GeneratorSettings
from offline.data_parallel import DataParallel
from offline.dataset import make_dataset
from offline.launch import ProcessOutcome
from offline.rebuild import KIND as DATASET_KIND
from offline.rebuild import SOURCES_FILE
from offline.settings import OfflineSettings, PretrainSettings, RewardSettings
from offline.snapshot import take_snapshot
from offline.source_file import write_sources
from offline.steps import BASE_KIND, MLLM_KIND, Workshop
from offline.train import NothingToTrainFrom, ShardingRefused, train_step
from offline.tuples import KIND as TUPLES_KIND
from offline.tuples import TUPLES_FILE, write_tuples
from osmf.cli import app
from osmf.settings import Settings, settings_variables
from state.artifact import ArtifactStore
from state.reading import StateReader
from tests.offline import dpo_world
from tests.offline.conftest import StateWriter

ROOT = Path(__file__).parents[2]

# PEFT 0.21 still asks transformers 5.24 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
    torch.set_rng_state(state)


def settings_of(folder: Path) -> Settings:
    """Return settings under which a step of training takes seconds."""
    offline = OfflineSettings(
        dataset_dir=folder / "offline",
        min_product_impressions=1,
        held_out_share=0,
        pretrain=PretrainSettings(n_rows=32, batch_rows=8, log_steps=1, n_evaluated=2, learning_rate=5e-3),
        # All 1,408 numbers of a group's feature are alike here: Adam's first steps along them add up.
        reward=RewardSettings(
            n_steps=4, n_lesson_steps=2, n_lesson_pictures=2, batch_pairs=4, batch_lessons=4, learning_rate=2e-5
        ),
        group_dpo=dpo_world.SHORT,
    )
    return Settings(offline=offline, generator=GeneratorSettings(mllm=dpo_world.SMALL))


def workshop(settings: Settings) -> Workshop:
    return Workshop(
        settings.offline,
        settings.generator,
        settings.offline.dataset_dir / "work",
        lambda: 1,
        lambda step, done, total, figures: None,
        DataParallel(on_gpu=False),
    )


def write_dataset(settings: Settings, folder: Path) -> None:
    """Write a dataset of two products whose two groups prefer opposite creatives."""
    pictures = folder / "pictures"
    pictures.mkdir()
    writer = StateWriter(folder / "state", pictures=pictures)
    for product_id in ("p0", "p1"):
        writer.conflict(product_id)
    writer.commit()
    with StateReader(folder / "state") as state:
        snapshot = take_snapshot(state)
    with ArtifactStore(settings.offline.dataset_dir).write(DATASET_KIND, created_at_ms=1) as draft:
        assert make_dataset(snapshot, draft.path, settings.offline).pairs.num_rows > 4
        write_sources(dpo_world.products(pictures), draft.file(SOURCES_FILE))


def write_tuples_of(settings: Settings, mllm: str, folder: Path) -> None:
    with ArtifactStore(settings.offline.dataset_dir).write(TUPLES_KIND, created_at_ms=1) as draft:
        write_tuples(dpo_world.tuples(dpo_world.products(folder / "pictures")), draft.file(TUPLES_FILE))
        draft.made_from = {"mllm": mllm}


def test_a_step_without_what_it_is_trained_from_says_what_makes_it(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    shop = workshop(settings)
    with pytest.raises(NothingToTrainFrom, match=r"'gaip', and there is none.*`osmf offline run` makes one"):
        train_step("pretrain", shop)
    write_dataset(settings, tmp_path)
    with shop.artifacts.write(BASE_KIND, created_at_ms=1) as draft:  # of another preset
        draft.made_from = {"mllm": {"preset": "smol"}}
    with pytest.raises(NothingToTrainFrom, match="'base-mllm' of the preset 'tiny', and there is none"):
        train_step("grm", shop)
    write_tuples_of(settings, "base-mllm/v000001", tmp_path)
    with pytest.raises(NothingToTrainFrom, match="'tuples' of the preset 'tiny', and there is none"):
        train_step("group-dpo", shop)


@pytest.mark.parametrize("step", ["grm", "group-dpo"])
def test_only_pretraining_spreads_the_model(step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ShardingRefused, match=f"for {step} take --accelerate-config lora-ddp"):
        train_step(step, workshop(settings_of(tmp_path)))


def test_fewer_processes_than_were_asked_for_do_not_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As `accelerate launch --cpu` starts them: one, whatever it was told.
    for name, value in {"RANK": "0", **settings_variables(settings_of(tmp_path))}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["offline", "train-process", "pretrain", "False", "2", str(tmp_path)])
    assert result.exit_code == 1
    left = json.loads((tmp_path / "0.json").read_text())
    assert left["error"].startswith("2 processes were to train together and there are 1")
    assert ProcessOutcome(**left).artifact is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--launcher", "torchrun"], "how many processes to start"),
        (["--launcher", "torchrun", "--gpus", "99"], "--gpus is 99"),
        ([], "trained from the newest artifact 'gaip'"),
    ],
)
def test_the_command_says_why_it_trains_nothing(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings_variables(settings_of(tmp_path)).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["offline", "train", "pretrain", *options])
    assert result.exit_code == 1
    assert said in result.output
    assert "Nothing was" in result.output


def train(settings: Settings, step: str, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OSMF_")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "osmf", "offline", "train", step, *options, "--json", "-"],
        cwd=ROOT,
        env=environment | settings_variables(settings),
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, json.loads(done.stdout) if done.returncode == 0 else {}


def halved(settings: Settings) -> Settings:
    """Return settings of which two processes make the same steps."""
    offline = settings.offline
    changes: dict[str, Any] = {
        "pretrain": offline.pretrain.model_copy(update={"batch_rows": offline.pretrain.batch_rows // 2}),
        "reward": offline.reward.model_copy(
            update={"batch_pairs": offline.reward.batch_pairs // 2, "batch_lessons": offline.reward.batch_lessons // 2}
        ),
        "group_dpo": offline.group_dpo.model_copy(update={"batch_tuples": offline.group_dpo.batch_tuples // 2}),
    }
    return settings.model_copy(update={"offline": offline.model_copy(update=changes)})


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_two_processes_lose_what_one_does_with_the_doubled_batch(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    write_dataset(settings, tmp_path)
    two = ("--launcher", "torchrun", "--gpus", "0", "--processes", "2")
    for step, kind in (("pretrain", BASE_KIND), ("grm", "grm"), ("group-dpo", MLLM_KIND)):
        if step == "group-dpo":
            write_tuples_of(settings, "base-mllm/v000001", tmp_path)
        found = []
        for number, (of_run, options) in enumerate(((settings, ()), (halved(settings), two)), start=1):
            done, figures = train(of_run, step, *options)
            assert done.returncode == 0, done.stderr
            assert figures["metrics"]["n_processes"] == number
            assert figures["detail"]["artifact"] == f"{kind}/v{number:06d}"
            found.append(figures["metrics"])
        for name in ("first_loss", "last_loss"):
            assert found[1][name] == pytest.approx(found[0][name], abs=5e-5)
        assert found[0]["last_loss"] != pytest.approx(found[0]["first_loss"], abs=1e-3)
        assert ArtifactStore(settings.offline.dataset_dir).versions(kind) == [1, 2]  # the first process alone writes
    # What is there already is not made again; what fails in the processes comes through.
    done, figures = train(halved(settings), "group-dpo", *two)
    assert figures["detail"]["artifact"] == "mllm/v000002"
    empty = settings_of(tmp_path / "empty")
    done, _ = train(empty, "grm", *two)
    assert done.returncode == 1
    assert "torchrun ended with exit code 1" in done.stderr
    assert "process 0, 1: grm is trained from the newest artifact 'gaip', and there is none" in done.stderr
