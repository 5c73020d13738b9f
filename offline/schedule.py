"""The schedule of the offline chain: every so often, over restarts, one run at a time."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from offline.chain_state import ChainState
from offline.settings import OfflineSettings

if TYPE_CHECKING:
    from sqlalchemy import URL

SCHEDULE_FILE: Final = "schedule.db"
JOB_ID: Final = "chain"
_TABLE: Final = "apscheduler_jobs"

log = logging.getLogger(__name__)


def run_schedule(
    settings: OfflineSettings,
    job: Callable[..., object],
    arguments: tuple[str, ...] = (),
    *,
    on_overrun: Callable[[str], object],
) -> None:
    """Run a job every ``interval_s`` until SIGTERM or SIGINT, then end after the run that is under way.

    The schedule lies in ``schedule.db`` in the folder of the artifacts and survives restarts: a start that fell due
    meanwhile is made up for at once, and however many were missed, they become one. So is a run that was killed. A
    start that falls into a run is told to ``on_overrun``. Call it in the main thread, which owns the signals.

    Parameters
    ----------
    settings
        Where the schedule lies, and how often a run starts.
    job
        What is run: a function of a module, which the schedule names. It must not raise.
    arguments
        What it is called with.
    on_overrun
        Told why a start was left out, in the scheduler's thread.
    """
    from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_MAX_INSTANCES
    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
    from apscheduler.schedulers.blocking import BlockingScheduler
    from sqlalchemy import create_engine

    def overran(_: object) -> None:
        on_overrun(f"the run before was still going after interval_s ({settings.interval_s:g} s)")

    def raised(event: Any) -> None:
        log.error("the run has failed: %s", event.exception, exc_info=event.exception)

    settings.dataset_dir.mkdir(parents=True, exist_ok=True)
    store = SQLAlchemyJobStore(engine=create_engine(_url(settings)), tablename=_TABLE)
    scheduler = BlockingScheduler(
        executors={"default": ThreadPoolExecutor(1)}, jobstores={"default": store}, timezone=UTC
    )
    scheduler.add_listener(overran, EVENT_JOB_MAX_INSTANCES)
    scheduler.add_listener(raised, EVENT_JOB_ERROR)
    scheduler.add_job(
        job,
        "interval",
        args=arguments,
        seconds=settings.interval_s,
        id=JOB_ID,
        replace_existing=True,  # by what the settings say now
        max_instances=1,
        coalesce=True,
        misfire_grace_time=None,  # late is better than never: the snapshot is of now in any case
        next_run_time=_first_start(settings, next_start(settings)),
    )
    _until_signal(scheduler)


def next_start(settings: OfflineSettings) -> datetime | None:
    """Return when the next run is due, by what a process of the schedule has left; None without any."""
    from sqlalchemy import create_engine, inspect, text

    if not (settings.dataset_dir / SCHEDULE_FILE).exists():
        return None
    engine = create_engine(_url(settings))
    try:
        # The column and not the job: that names a function, which another version of the program may not have.
        with engine.connect() as connection:
            if not inspect(connection).has_table(_TABLE):
                return None
            query = text(f"SELECT next_run_time FROM {_TABLE} WHERE id = :id")
            due_s = connection.execute(query, {"id": JOB_ID}).scalar()
    finally:
        engine.dispose()
    return None if due_s is None else datetime.fromtimestamp(due_s, UTC)


def _url(settings: OfflineSettings) -> URL:
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(settings.dataset_dir / SCHEDULE_FILE))


def _first_start(settings: OfflineSettings, known: datetime | None) -> datetime:
    """Return when the first run of this process is due."""
    now = datetime.now(UTC)
    later = now + timedelta(seconds=settings.interval_s)
    if ChainState.read(settings.dataset_dir).unfinished is not None:
        return now
    if known is None:
        return now if settings.run_at_start else later
    return min(known, later)  # a shorter interval holds from now on


def _until_signal(scheduler: Any) -> None:
    """Run a scheduler until SIGTERM or SIGINT; return when its running job has ended."""
    from apscheduler.events import EVENT_SCHEDULER_STARTED

    ending: list[threading.Thread] = []

    started = threading.Event()
    scheduler.add_listener(lambda _: started.set(), EVENT_SCHEDULER_STARTED)

    def end() -> None:
        started.wait()  # a signal may come before the scheduler can be shut down
        if scheduler.running:
            scheduler.shutdown(wait=True)

    def on_signal(number: int, _: FrameType | None) -> None:
        # Not in the handler itself: it may have interrupted the scheduler while that held its locks.
        if not ending:
            log.info("%s: ending after the run under way", signal.Signals(number).name)
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
