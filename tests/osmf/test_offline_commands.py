"""`osmf offline`: the chain from the command line, on a small stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offline.run_lock import run_lock
from osmf.cli import app
from osmf.settings import Settings, settings_variables
from state.artifact import ArtifactStore
from state.settings import StateSettings
from tests.offline import chain_world

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing:FutureWarning", "ignore:The ``noload`` loader strategy is deprecated"
)


def environment(folder: Path) -> dict[str, str]:
    """Return variables that give the commands the settings of a small stream."""
    rooms = chain_world.rooms(folder / "offline", folder / "state")
    settings = Settings(state=StateSettings(path=rooms.state_path), online=rooms.online, generator=rooms.generator)
    tracking = rooms.offline.tracking.model_copy(update={"enabled": True})
    offline = rooms.offline.model_copy(update={"tracking": tracking})
    return settings_variables(settings.model_copy(update={"offline": offline}))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_steps_are_run_compared_shown_and_rolled_back(tmp_path: Path) -> None:
    chain_world.learn(tmp_path / "pictures", tmp_path / "state", 4_000)
    runner = CliRunner(env=environment(tmp_path))
    done = runner.invoke(app, ["offline", "run", "--all", "--preset", "tiny", "--json", "-"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["detail"]["outcome"] == "promoted"
    metrics = figures["metrics"]
    for name in ("grm", "grm_no_group", "caig", "cg4ctr"):
        assert metrics[f"{name}_accuracy_low"] <= metrics[f"{name}_accuracy"] <= metrics[f"{name}_accuracy_high"]
    assert metrics["grm_accuracy"] == pytest.approx(metrics["gate_accuracy"])
    assert {"group_dpo_accuracy", "group_dpo_margin", "no_group_dpo_accuracy"} <= metrics.keys()
    assert "the stream was not simulated here" in figures["detail"]["no_truth"]
    assert (tmp_path / "offline" / "mlflow.db").exists()
    # What the GRM stands on was taught once: the comparison's reward models stand on the same.
    assert ArtifactStore(tmp_path / "offline").versions("taught-mllm") == [1]
    status = runner.invoke(app, ["offline", "status", "--json", "-"])
    assert json.loads(status.stdout)["detail"]["champions"][0]["mllm"] == "mllm/v000001"
    assert "mllm/v000001" in runner.invoke(app, ["offline", "status"]).stdout
    back = runner.invoke(app, ["offline", "rollback"])
    assert back.exit_code == 1
    assert "names its first champion" in back.stderr


def test_without_a_state_it_is_skipped_and_while_another_runs_refused(tmp_path: Path) -> None:
    runner = CliRunner(env=environment(tmp_path))
    done = runner.invoke(app, ["offline", "run", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["detail"]["outcome"] == "skipped"
    with run_lock(tmp_path / "offline"):
        refused = runner.invoke(app, ["offline", "run"])
    assert refused.exit_code == 1
    assert "another run is under way" in refused.stderr
    status = runner.invoke(app, ["offline", "status"])
    assert status.exit_code == 0, status.output
    assert "no state at" in " ".join(status.stdout.split())
