"""The scheduled job: from a snapshot of the state to GAIP rows and pairs on disk."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from offline.runs import RunLog, RunRecord
from offline.settings import OfflineSettings
from offline.snapshot import Snapshot, take_snapshot
from state.artifact import Artifact, ArtifactStore
from state.errors import StateMissingError
from state.reading import StateReader

KIND = "gaip"
"""Kind of the artifact that the job writes."""

RUN_LOG = "runs.jsonl"

Clock = Callable[[], int]
"""Gives the time, ms since the Unix epoch."""

_log = logging.getLogger(__name__)


def wall_clock_ms() -> int:
    """Return the machine's time, ms since the Unix epoch."""
    return time.time_ns() // 1_000_000


def run_once(settings: OfflineSettings, state_path: Path, *, clock: Clock = wall_clock_ms) -> RunRecord:
    """Run the job once and record the run: rows and pairs built, skipped with a reason, or failed with one.

    It is skipped where there is no state yet, where fewer than ``min_new_impressions`` came since the last
    artifact, and where no row passes the exposure filter. A failure is recorded and returned, not raised: the
    next run stands on its own.

    Parameters
    ----------
    settings
        What to build, and where.
    state_path
        Folder of the LMDB environment; it is only read, in one transaction.
    clock
        Gives the times of the run.
    """
    started_at_ms = clock()
    run_id = f"{KIND}-{started_at_ms}-{os.getpid()}"
    try:
        done = _build(settings, state_path, started_at_ms)
    except Exception as error:
        _log.exception("run %s failed", run_id)
        done = _Done(outcome="failed", reason=f"{type(error).__name__}: {error}")
    record = RunRecord(
        run_id=run_id,
        job=KIND,
        started_at_ms=started_at_ms,
        finished_at_ms=clock(),
        **msgspec.structs.asdict(done),
    )
    RunLog(settings.dataset_dir / RUN_LOG).append(record)
    return record


def read_runs(settings: OfflineSettings) -> list[RunRecord]:
    """Return all recorded runs, oldest first."""
    return RunLog(settings.dataset_dir / RUN_LOG).read()


class _Done(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has to say for itself: the part of its record that is not its time and name."""

    outcome: str
    reason: str | None = None
    artifact: str | None = None
    snapshot_id: str | None = None
    n_new_impressions: int | None = None
    n_products: int = 0
    n_rows: int = 0
    n_pairs: int = 0


def _build(settings: OfflineSettings, state_path: Path, now_ms: int) -> _Done:
    artifacts = ArtifactStore(settings.dataset_dir)
    try:
        state = StateReader(state_path)
    except StateMissingError as error:
        return _Done(outcome="skipped", reason=str(error))
    with state:
        snapshot = take_snapshot(state)
    last = artifacts.latest(KIND)
    n_new = snapshot.n_impressions - _impressions_of(last)
    skipped = _Done(outcome="skipped", snapshot_id=snapshot.snapshot_id, n_new_impressions=n_new)
    if n_new < settings.min_new_impressions:
        since = "so far" if last is None else f"since {last.name}"
        return msgspec.structs.replace(
            skipped, reason=f"{n_new} new impressions {since}, min_new_impressions is {settings.min_new_impressions}"
        )
    try:
        done = _write(artifacts, settings, snapshot, now_ms)
    except _NothingExposed as nothing:
        return msgspec.structs.replace(skipped, reason=str(nothing))
    artifacts.prune(KIND, settings.keep_versions)
    return msgspec.structs.replace(done, n_new_impressions=n_new)


def _impressions_of(artifact: Artifact | None) -> int:
    return 0 if artifact is None else int(artifact.manifest.figures["n_impressions"])


class _NothingExposed(Exception):
    """No row passed the exposure filter."""

    def __init__(self, settings: OfflineSettings) -> None:
        super().__init__(
            "no row passed the exposure filter: no grouped product has min_product_impressions "
            f"({settings.min_product_impressions:g}) and a creative with min_cell_impressions "
            f"({settings.min_cell_impressions:g}) in a group"
        )


def _write(artifacts: ArtifactStore, settings: OfflineSettings, snapshot: Snapshot, now_ms: int) -> _Done:
    from offline.dataset import make_dataset  # Ibis is slow to import

    with artifacts.write(KIND, created_at_ms=now_ms) as draft:
        dataset = make_dataset(snapshot, draft.path, settings)
        if dataset.rows.num_rows == 0:
            raise _NothingExposed(settings)
        draft.made_from = {
            "snapshot_id": snapshot.snapshot_id,
            "offsets": dict(snapshot.offsets),
            "settings": settings.model_dump(mode="json", exclude={"dataset_dir"}),
        }
        draft.figures = {
            "n_impressions": snapshot.n_impressions,
            "n_clicks": snapshot.n_clicks,
            "n_products": dataset.n_products,
            "n_rows": dataset.rows.num_rows,
            "n_pairs": dataset.pairs.num_rows,
        }
    assert draft.finished is not None
    return _Done(
        outcome="built",
        artifact=draft.finished.name,
        snapshot_id=snapshot.snapshot_id,
        n_products=dataset.n_products,
        n_rows=dataset.rows.num_rows,
        n_pairs=dataset.pairs.num_rows,
    )


def run_schedule(
    settings: OfflineSettings,
    state_path: Path,
    *,
    clock: Clock = wall_clock_ms,
    on_run: Callable[[RunRecord], None] | None = None,
) -> None:
    """Run the job every ``interval_s`` until SIGTERM or SIGINT, then end after the run that is under way.

    There is at most one run at a time: a start that falls into a run is recorded as skipped, starts that were
    missed (the machine slept) become one. Call it in the main thread, which owns the signals.

    Parameters
    ----------
    settings, state_path, clock
        As for `run_once`.
    on_run
        Called after each run with its record, in the job's thread.
    """
    from apscheduler.events import EVENT_JOB_MAX_INSTANCES
    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.schedulers.blocking import BlockingScheduler

    def report(record: RunRecord) -> None:
        if on_run is not None:
            on_run(record)

    def job() -> None:
        report(run_once(settings, state_path, clock=clock))

    def overran(_: object) -> None:
        now_ms = clock()
        record = RunRecord(
            run_id=f"{KIND}-{now_ms}-{os.getpid()}",
            job=KIND,
            started_at_ms=now_ms,
            finished_at_ms=now_ms,
            outcome="skipped",
            reason=f"the run before was still going after interval_s ({settings.interval_s:g} s)",
        )
        RunLog(settings.dataset_dir / RUN_LOG).append(record)
        report(record)

    scheduler = BlockingScheduler(executors={"default": ThreadPoolExecutor(1)}, timezone=UTC)
    scheduler.add_listener(overran, EVENT_JOB_MAX_INSTANCES)
    start: dict[str, Any] = {"next_run_time": datetime.now(UTC)} if settings.run_at_start else {}
    scheduler.add_job(
        job,
        "interval",
        seconds=settings.interval_s,
        id=KIND,
        max_instances=1,
        coalesce=True,
        misfire_grace_time=None,  # late is better than never: the snapshot is of now in any case
        **start,
    )
    _until_signal(scheduler)


def _until_signal(scheduler: Any) -> None:
    """Run a scheduler until SIGTERM or SIGINT; return when its running job has ended."""
    from apscheduler.events import EVENT_SCHEDULER_STARTED

    ending: list[threading.Thread] = []

    started = threading.Event()
    scheduler.add_listener(lambda _: started.set(), EVENT_SCHEDULER_STARTED)

    def end() -> None:
        started.wait()  # a signal may come before the scheduler can be shut down
        if scheduler.running:
            scheduler.remove_all_jobs()
            scheduler.shutdown(wait=True)

    def on_signal(number: int, _: FrameType | None) -> None:
        # Not in the handler itself: it may have interrupted the scheduler while that held its locks.
        if not ending:
            _log.info("%s: ending after the run under way", signal.Signals(number).name)
            ending.append(threading.Thread(target=end, name="end-schedule"))
            ending[0].start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        scheduler.start()
    finally:
        started.set()
        for thread in ending:
            thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
