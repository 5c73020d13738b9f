"""The chain: from a small stream to promoted models, whatever kills it on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from generator.champion import Champion, ChampionPointer, NoFormerChampion
from offline.chain import ChainRooms, read_runs, roll_back, run_chain, run_or_skip
from offline.chain_state import ChainState, ChainStateUnreadable, UnfinishedRun
from offline.run_lock import LOCK_FILE, RunUnderWay, run_lock
from offline.runs import STEPS, RunRecord, Step
from offline.settings import ChainSettings, OfflineSettings, PromptGateSettings
from offline.tuples import read_tuples
from offline.watcher import LogWatcher
from state.artifact import Artifact, ArtifactStore
from tests.offline import chain_world

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def state_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    chain_world.learn(folder / "pictures", folder / "state", 4_000)
    return folder / "state"


@pytest.fixture(scope="module")
def whole(state_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunRecord]]:
    """Return the folder and the records of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_chain(chain_world.rooms(folder, state_path))


@pytest.fixture
def again(whole: tuple[Path, list[RunRecord]], state_path: Path, tmp_path: Path) -> ChainRooms:
    """Return what the chain works on after a whole run, for a test of its own."""
    shutil.copytree(whole[0], tmp_path / "again")
    return chain_world.rooms(tmp_path / "again", state_path)


def changed(rooms: ChainRooms, **changes: Any) -> ChainRooms:
    return replace(rooms, offline=rooms.offline.model_copy(update=changes))


def test_a_run_goes_from_the_state_to_a_champion(whole: tuple[Path, list[RunRecord]]) -> None:
    folder, records = whole
    assert [record.step for record in records] == list(STEPS)
    assert [record.outcome for record in records] == ["built"] * 5 + ["passed", "promoted"], records[-1].reason
    assert read_runs(OfflineSettings(dataset_dir=folder)) == records
    assert len({record.run_id for record in records}) == 1
    store = ArtifactStore(folder)
    names = ["gaip/v000001", "base-mllm/v000001", "grm/v000001", "tuples/v000001", "mllm/v000001"]
    assert [record.artifact for record in records[:5]] == names
    made_from = {name: artifact_of(store, name).manifest.made_from for name in names}
    assert made_from["base-mllm/v000001"]["gaip"] == names[0]
    assert (made_from["grm/v000001"]["gaip"], made_from["grm/v000001"]["base-mllm"]) == (names[0], names[1])
    assert (made_from["tuples/v000001"]["mllm"], made_from["tuples/v000001"]["grm"]) == (names[1], names[2])
    assert (made_from["mllm/v000001"]["mllm"], made_from["mllm/v000001"]["tuples"]) == (names[1], names[3])
    champion = ChampionPointer(folder).read()
    assert champion is not None
    assert (champion.mllm, champion.grm) == ("mllm/v000001", "grm/v000001")
    assert champion.grm_accuracy == records[2].figures["accuracy"] > 0.5
    assert champion.n_grm_pairs == records[2].figures["n_held_out"] > 0
    assert {row.product_id for row in read_tuples(artifact_of(store, names[3]))} <= set(chain_world.PRODUCTS)
    assert not (folder / "work").exists()
    assert ChainState.read(folder).unfinished is None


def artifact_of(store: ArtifactStore, name: str) -> Artifact:
    found = store.named(name)
    assert found is not None
    return found


class Interrupt(LogWatcher):
    """Interrupts a run as a signal would: once, at its first progress of a step, or as the step begins."""

    def __init__(self, step: Step, interrupt: Callable[[], None]) -> None:
        self._step = step
        self._interrupt = interrupt
        self._n_heard = 0

    def on_step(self, step: Step) -> None:
        if step == self._step and step in ("gate", "promote"):
            self._interrupt()

    def on_progress(self, step: Step, done: int, total: int, figures: Mapping[str, float]) -> None:
        if step == self._step:
            self._n_heard += 1
            if self._n_heard == {"grm": 20, "tuples": 2, "group-dpo": 3}[step]:
                self._interrupt()


def interrupt() -> None:
    raise KeyboardInterrupt


def begin_again(rooms: ChainRooms) -> None:
    """Leave of a whole run its dataset and its pre-trained G-MLLM, and the run unfinished."""
    folder = rooms.offline.dataset_dir
    for kind in ("taught-mllm", "grm", "tuples", "mllm"):
        shutil.rmtree(folder / kind)
    (folder / "champion.json").unlink()
    (folder / "runs.jsonl").unlink()
    unfinished = UnfinishedRun(run_id="run-1-1", dataset="gaip/v000001", all_steps=False)
    ChainState(unfinished=unfinished).write(folder)


def test_a_run_that_is_interrupted_at_every_step_ends_with_the_same_artifacts(
    whole: tuple[Path, list[RunRecord]], again: ChainRooms, caplog: pytest.LogCaptureFixture
) -> None:
    begin_again(again)
    folder = again.offline.dataset_dir
    steps: tuple[Step, ...] = ("grm", "tuples", "group-dpo", "gate", "promote")
    with caplog.at_level("INFO"):
        for step in steps:
            with pytest.raises(KeyboardInterrupt):
                run_chain(again, watcher=Interrupt(step, interrupt))
        records = run_chain(again)
    for said in ("tuples of 2 products are there already", "Group-DPO goes on from"):
        assert said in caplog.text
    assert records[-1].outcome == "promoted"
    recorded = [(record.run_id, record.step) for record in read_runs(again.offline)]
    # What was built is recorded once; the gate measures again after an interruption.
    gate = ("run-1-1", "gate")
    assert recorded == [("run-1-1", step) for step in ("grm", "tuples", "group-dpo")] + [
        gate,
        gate,
        ("run-1-1", "promote"),
    ]
    for kind in ("taught-mllm", "grm", "mllm"):
        [version] = ArtifactStore(folder).versions(kind)
        weights = load_file(folder / kind / f"v{version:06}" / "model.safetensors")
        for name, expected in load_file(whole[0] / kind / "v000001" / "model.safetensors").items():
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)
    found, expected_tuples = (
        read_tuples(artifact_of(ArtifactStore(each), "tuples/v000001")) for each in (folder, whole[0])
    )
    assert [repr(row) for row in found] == [repr(row) for row in expected_tuples]


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(folder: str, state_path: str) -> None:
    """Run the chain in a process that is killed in the middle of Group-DPO."""
    run_chain(chain_world.rooms(Path(folder), Path(state_path)), watcher=Interrupt("group-dpo", kill_itself))


def test_after_sigkill_the_next_run_goes_on(again: ChainRooms) -> None:
    folder = again.offline.dataset_dir
    begin_again(again)
    program = "import sys; from tests.offline.test_chain import killed_run; killed_run(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(again.state_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [record.step for record in read_runs(again.offline)] == ["grm", "tuples"]
    assert list((folder / "work" / "run-1-1").glob("mllm-*/checkpoint-*"))
    records = run_chain(again)
    assert [(record.step, record.outcome) for record in records] == [
        ("group-dpo", "built"),
        ("gate", "passed"),
        ("promote", "promoted"),
    ]
    assert {record.run_id for record in records} == {"run-1-1"}


def test_too_little_new_is_a_reason_to_skip(again: ChainRooms) -> None:
    records = run_chain(again)
    assert [(record.step, record.outcome, record.reason) for record in records] == [
        ("rebuild", "skipped", "0 new impressions since gaip/v000001, min_new_impressions is 1000"),
        (
            "pretrain",
            "skipped",
            "0 new impressions since gaip/v000001 was trained from, chain.min_new_impressions is 1000",
        ),
    ]
    # The pre-trained G-MLLM and all the rest are there already: nothing is made twice.
    eager = changed(again, chain=ChainSettings(min_new_impressions=0, torch_threads=1))
    records = run_chain(eager)
    assert [(record.step, record.artifact) for record in records[1:4]] == [
        ("grm", "grm/v000001"),
        ("tuples", "tuples/v000001"),
        ("group-dpo", "mllm/v000001"),
    ]
    assert len(ChampionPointer(again.offline.dataset_dir).champions()) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_gate": PromptGateSettings(n_groups=4, min_distinct_kept=1, min_well_formed=1)}, "well-formed"),
    ],
)
def test_a_refused_run_says_why_and_leaves_its_artifacts(
    again: ChainRooms, changes: dict[str, Any], reason: str
) -> None:
    folder = again.offline.dataset_dir
    before = ChampionPointer(folder).read()
    rooms = changed(
        again,
        chain=ChainSettings(min_new_impressions=0, torch_threads=1),
        group_dpo=again.offline.group_dpo.model_copy(update={"beta": 0.2}),
        **changes,
    )
    record = run_chain(rooms)[-1]
    assert (record.step, record.outcome) == ("gate", "refused")
    assert record.reason is not None
    assert reason in record.reason
    assert ArtifactStore(folder).versions("mllm") == [1, 2]
    assert ChampionPointer(folder).read() == before
    assert ChainState.read(folder).unfinished is None


def test_a_failing_run_is_gone_on_with_until_it_is_given_up(again: ChainRooms) -> None:
    folder = again.offline.dataset_dir
    weights = folder / "taught-mllm" / "v000001" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    rooms = changed(
        again,
        chain=ChainSettings(min_new_impressions=0, max_failures=2, torch_threads=1),
        reward=again.offline.reward.model_copy(update={"n_steps": 13}),
    )
    first, second = run_chain(rooms), run_chain(rooms)
    assert (first[-1].step, first[-1].outcome) == ("grm", "failed")
    assert first[-1].reason is not None
    assert first[-1].reason.startswith("CorruptArtifactError: ")
    assert first[-1].run_id == second[-1].run_id
    assert ChainState.read(folder).unfinished is None
    assert not (folder / "work").exists()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    rooms = chain_world.rooms(tmp_path, tmp_path / "none")
    with run_lock(tmp_path):
        with pytest.raises(RunUnderWay, match=f"process {os.getpid()}"):
            run_chain(rooms)
        [record] = run_or_skip(rooms, clock=lambda: 7)
    assert (record.outcome, record.started_at_ms) == ("skipped", 7)
    assert record.reason is not None
    assert "another run is under way" in record.reason
    assert read_runs(rooms.offline) == [record]
    assert (tmp_path / LOCK_FILE).exists()
    [record] = run_chain(rooms)  # the lock is free again
    assert record.reason is not None
    assert "no state at" in record.reason


def test_rolling_back_uses_the_champion_before(again: ChainRooms) -> None:
    settings = again.offline
    pointer = ChampionPointer(settings.dataset_dir)
    with pytest.raises(NoFormerChampion):
        roll_back(settings)
    first = pointer.read()
    assert first is not None
    pointer.move(
        Champion(mllm="mllm/v000009", grm="grm/v000009", grm_accuracy=0.9, n_grm_pairs=1, promoted_at_ms=1, reason="")
    )
    record = roll_back(settings)
    assert (record.step, record.outcome, record.artifact) == ("rollback", "rolled-back", first.mllm)
    assert pointer.read() == first
    assert read_runs(settings)[-1] == record


def test_champions_outlive_pruning(again: ChainRooms) -> None:
    store = ArtifactStore(again.offline.dataset_dir)
    for _ in range(3):
        with store.write("mllm", created_at_ms=1):
            pass
    removed = store.prune("mllm", 1, in_use={"mllm/v000001"})
    assert removed == [2, 3]
    assert store.versions("mllm") == [1, 4]


def test_a_damaged_chain_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chain.json").write_text('{"unfinished": 3}')
    with pytest.raises(ChainStateUnreadable, match="Nothing was run"):
        run_chain(chain_world.rooms(tmp_path, tmp_path / "none"))
