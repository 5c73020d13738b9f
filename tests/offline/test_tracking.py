"""Runs in MLflow: what is kept, and that nothing depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offline.runs import RunRecord, Step
from offline.settings import OfflineSettings, TrackingSettings
from offline.tracking import MlflowWatcher, tracking_url

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def record(step: Step, **more: object) -> RunRecord:
    return RunRecord(run_id="run-1-1", step=step, started_at_ms=1, finished_at_ms=2, **{"outcome": "built", **more})


def run_of(watcher: MlflowWatcher, *, until: str = "end") -> None:
    """Tell a watcher of a run, up to some point."""
    watcher.on_run("run-1-1", {"reward": {"n_steps": 3}, "mllm": {"tiny": {"eyes": "learnt"}}})
    watcher.on_step("rebuild")
    watcher.on_record(record("rebuild", artifact="gaip/v000001", figures={"n_rows": 7}))
    if until == "rebuild":
        watcher.on_end()
        return
    watcher.on_step("grm")
    for done in (1, 2):
        watcher.on_progress("grm", done, 3, {"pairs_loss": 1.0 / done})
    if until == "kill":
        return
    watcher.on_record(record("grm", artifact="grm/v000001", figures={"accuracy": 0.75}))
    watcher.on_record(record("gate", outcome="refused", reason="it is worse"))
    watcher.on_end()


def test_a_run_is_kept_with_its_settings_losses_figures_and_models(tmp_path: Path) -> None:
    settings = OfflineSettings(dataset_dir=tmp_path)
    assert tracking_url(settings) == f"sqlite:///{tmp_path}/mlflow.db"
    run_of(MlflowWatcher(settings), until="rebuild")
    assert not (tmp_path / "mlflow.db").exists()  # where nothing is trained there is nothing to look at
    run_of(MlflowWatcher(settings), until="kill")
    run_of(MlflowWatcher(settings))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_url(settings))
    experiment = client.get_experiment_by_name("osmf")
    [run] = client.search_runs([experiment.experiment_id])  # one that was killed goes on as the same
    assert (run.info.run_name, run.info.status) == ("run-1-1", "FINISHED")
    assert run.data.params == {"reward.n_steps": "3", "mllm.tiny.eyes": "learnt"}
    assert run.data.metrics == {"rebuild/n_rows": 7, "grm/pairs_loss": 0.5, "grm/accuracy": 0.75}
    history = client.get_metric_history(run.info.run_id, "grm/pairs_loss")
    assert {(metric.step, metric.value) for metric in history} == {(1, 1.0), (2, 0.5)}
    assert run.data.tags["grm.artifact"] == str(tmp_path / "grm" / "v000001")
    assert (run.data.tags["gate.outcome"], run.data.tags["gate.reason"]) == ("refused", "it is worse")


def test_a_server_that_is_away_costs_a_warning_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    tracking = TrackingSettings(url="http://127.0.0.1:9", timeout_s=1)
    run_of(MlflowWatcher(OfflineSettings(dataset_dir=tmp_path, tracking=tracking)))
    warnings = [said.getMessage() for said in caplog.records if said.name == "offline.tracking"]
    assert len(warnings) == 1
    assert "MLflow at http://127.0.0.1:9 cannot be written to" in warnings[0]
    assert "the run goes on without it" in warnings[0]


SILENT = """
import socket, sys
from pathlib import Path
asked = []
def refuse(self, address):
    asked.append(address)
    raise OSError("no network here")
socket.socket.connect = refuse
socket.getaddrinfo = lambda host, *rest, **more: asked.append(host) or []
from offline.settings import OfflineSettings
from offline.tracking import MlflowWatcher
from tests.offline.test_tracking import run_of
import time
run_of(MlflowWatcher(OfflineSettings(dataset_dir=Path(sys.argv[1]))))
time.sleep(1.0)
print(asked)
"""


def test_mlflow_sends_nothing_home(tmp_path: Path) -> None:
    # Under pytest MLflow is silent by itself: this has to be a process that does not look like a test or like CI.
    hidden = ("PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(tmp_path)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
