"""Runs in MLflow: settings, losses by step, figures, and where the models lie."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from offline.runs import RunRecord, Step
from offline.settings import OfflineSettings

DATABASE_FILE: Final = "mlflow.db"

_RUN_TAG: Final = "osmf.run_id"
_N_PARAMETERS: Final = 100
"""Parameters that MLflow takes at once."""

log = logging.getLogger(__name__)


def tracking_url(settings: OfflineSettings) -> str:
    """Return where MLflow keeps runs: the server that is set, or a SQLite file beside the artifacts."""
    return settings.tracking.url or f"sqlite:///{(settings.dataset_dir / DATABASE_FILE).resolve()}"


class MlflowWatcher:
    """Writes a run of the chain to MLflow, from its first training on; a run that goes on goes on there too.

    A server that is away costs a warning and this run's further entries, never the run. MLflow's own usage statistics
    are switched off: nothing is sent but to the server that is set.

    Parameters
    ----------
    settings
        Where, and under which experiment.
    """

    def __init__(self, settings: OfflineSettings) -> None:
        self._settings = settings
        self._client: Any = None
        self._mlflow_run: str = ""
        self._run_id: str = ""
        self._parameters: Mapping[str, Any] = {}
        self._records: list[RunRecord] = []
        self._is_open = False

    def on_run(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Keep what the run is called and made with until something is trained."""
        self._run_id, self._parameters, self._records, self._is_open = run_id, parameters, [], False

    def on_step(self, step: Step) -> None:
        """Begin the run, or find it, and say which step it is at."""
        if step != "rebuild" and not self._is_open:
            self._is_open = True
            self._try(self._open)
        if self._client is not None:
            self._try(lambda: self._client.set_tag(self._mlflow_run, "step", step))

    def on_progress(self, step: Step, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Add what was measured."""
        if self._client is not None and figures:
            self._try(lambda: self._log(step, figures, done))

    def on_record(self, record: RunRecord) -> None:
        """Add the figures of a step, and where its artifact lies."""
        self._records.append(record)
        if self._client is not None:
            self._try(lambda: self._write(record))

    def on_end(self) -> None:
        """Close the run; one that was interrupted stays open until it has gone on."""
        if self._client is not None and self._records:
            status = "FAILED" if self._records[-1].outcome == "failed" else "FINISHED"
            self._try(lambda: self._client.set_terminated(self._mlflow_run, status))
        self._client = None

    def _open(self) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=tracking_url(self._settings))
        name = self._settings.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        experiment_id = client.create_experiment(name) if experiment is None else experiment.experiment_id
        known = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{self._run_id}'", max_results=1)
        if known:
            self._mlflow_run = known[0].info.run_id
            client.update_run(self._mlflow_run, status="RUNNING")
        else:
            tags = {_RUN_TAG: self._run_id}
            self._mlflow_run = client.create_run(experiment_id, run_name=self._run_id, tags=tags).info.run_id
            flat = [Param(key, value) for key, value in _flat(self._parameters)]
            for first in range(0, len(flat), _N_PARAMETERS):
                client.log_batch(self._mlflow_run, params=flat[first : first + _N_PARAMETERS])
        self._client = client
        for record in self._records:
            self._write(record)

    def _write(self, record: RunRecord) -> None:
        self._log(record.step, record.figures, 0)
        tags = {"outcome": record.outcome, "reason": record.reason}
        if record.artifact is not None:
            tags["artifact"] = str((self._settings.dataset_dir / record.artifact).resolve())
        for name, value in tags.items():
            if value is not None:
                self._client.set_tag(self._mlflow_run, f"{record.step}.{name}", value)

    def _log(self, step: Step, figures: Mapping[str, float], done: int) -> None:
        from mlflow.entities import Metric

        now_ms = time.time_ns() // 1_000_000
        metrics = [Metric(f"{step}/{name}", float(value), now_ms, done) for name, value in figures.items()]
        self._client.log_batch(self._mlflow_run, metrics=metrics)

    def _try(self, write: Callable[[], None]) -> None:
        """Write to MLflow; give it up for this run where that fails."""
        _set_environment(self._settings)
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            write()
        except (MlflowException, SQLAlchemyError, OSError) as error:
            self._client = None
            said = str(error).splitlines()
            log.warning(
                "MLflow at %s cannot be written to (%s): the run goes on without it; its own log has the same figures",
                tracking_url(self._settings),
                said[0] if said else type(error).__name__,
            )


def _set_environment(settings: OfflineSettings) -> None:
    """Set what MLflow reads from the environment alone, some of it when it is imported."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    # By default it would ask a server that is away for minutes, and at every metric.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(settings.tracking.timeout_s))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as MLflow's parameters, the deepest by dotted names."""
    found: list[tuple[str, str]] = []
    for name, value in parameters.items():
        key = f"{prefix}{name}"
        found += _flat(value, f"{key}.") if isinstance(value, Mapping) else [(key, str(value))]
    return found
