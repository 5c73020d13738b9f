"""The schedule: every so often, one at a time, over restarts."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from offline import schedule
from offline.chain_state import ChainState, UnfinishedRun
from offline.schedule import SCHEDULE_FILE, run_schedule
from offline.settings import OfflineSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> OfflineSettings:
    return OfflineSettings(dataset_dir=tmp_path / "offline", interval_s=0.1)


def end() -> None:
    """End the schedule of this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def count_to_three(path: str) -> None:
    with Path(path).open("a") as file:
        file.write("run\n")
    if len(Path(path).read_text().splitlines()) == 3:
        end()


def fail_once(path: str) -> None:
    if not Path(path).exists():
        Path(path).touch()
        raise MemoryError("no room")
    end()


def wait_for_overrun(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.01)
    end()


def run_and_end(path: str) -> None:
    Path(path).write_text(str(time.time()))
    end()


def no_overrun(reason: str) -> None:
    raise AssertionError(reason)


def test_it_repeats_until_sigterm_and_leaves_signals_as_they_were(tmp_path: Path, settings: OfflineSettings) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_schedule(settings, count_to_three, (str(tmp_path / "runs"),), on_overrun=lambda reason: None)
    assert (tmp_path / "runs").read_text() == "run\n" * 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("end-schedule")]


def test_a_run_that_raises_does_not_end_it(
    tmp_path: Path, settings: OfflineSettings, caplog: pytest.LogCaptureFixture
) -> None:
    run_schedule(settings, fail_once, (str(tmp_path / "failed"),), on_overrun=lambda reason: None)
    assert "the run has failed: no room" in caplog.text


def test_a_start_during_a_run_is_told(tmp_path: Path, settings: OfflineSettings) -> None:
    reasons = []

    def overran(reason: str) -> None:
        reasons.append(reason)
        (tmp_path / "overran").touch()

    run_schedule(settings, wait_for_overrun, (str(tmp_path / "overran"),), on_overrun=overran)
    assert set(reasons) == {"the run before was still going after interval_s (0.1 s)"}


@pytest.mark.parametrize(
    ("known_s", "run_at_start", "unfinished", "waits_s"),
    [
        pytest.param(None, True, False, 0.0, id="new"),
        pytest.param(None, False, False, 0.5, id="new, not at once"),
        pytest.param(-1_000.0, True, False, 0.0, id="missed while nothing ran"),
        pytest.param(0.3, True, False, 0.3, id="not due yet"),
        pytest.param(1_000.0, True, False, 0.5, id="the interval is shorter now"),
        pytest.param(0.3, True, True, 0.0, id="a run was killed"),
    ],
)
def test_when_the_first_run_of_a_process_is_due(
    settings: OfflineSettings, known_s: float | None, run_at_start: bool, unfinished: bool, waits_s: float
) -> None:
    now = schedule.datetime.now(schedule.UTC)
    known = None if known_s is None else now + schedule.timedelta(seconds=known_s)
    if unfinished:
        run = UnfinishedRun(run_id="run-1-1", dataset="gaip/v000001", all_steps=False)
        ChainState(unfinished=run).write(settings.dataset_dir)
    changed = settings.model_copy(update={"run_at_start": run_at_start, "interval_s": 0.5})
    due = schedule._first_start(changed, known)
    assert max((due - now).total_seconds(), 0.0) == pytest.approx(waits_s, abs=0.2)


def test_it_survives_a_restart(tmp_path: Path, settings: OfflineSettings) -> None:
    path = tmp_path / "ran"
    slow = settings.model_copy(update={"interval_s": 60.0})
    run_schedule(slow, run_and_end, (str(path),), on_overrun=no_overrun)
    with sqlite3.connect(slow.dataset_dir / SCHEDULE_FILE) as database:
        [(due_s,)] = database.execute("SELECT next_run_time FROM apscheduler_jobs").fetchall()
        assert float(path.read_text()) + 50 < due_s < time.time() + 60
        # Many starts fall due while nothing runs, and become one.
        database.execute("UPDATE apscheduler_jobs SET next_run_time = ?", (time.time() - 500,))
    database.close()
    path.unlink()
    run_schedule(slow, run_and_end, (str(path),), on_overrun=no_overrun)
    assert path.exists()


SLOW_RUN = """
import sys, time
from pathlib import Path
from offline.schedule import run_schedule
from offline.settings import OfflineSettings
def slow():
    print("running", flush=True)
    time.sleep(0.5)
    print("done", flush=True)
if __name__ == "__main__":
    run_schedule(OfflineSettings(dataset_dir=Path(sys.argv[1])), slow, on_overrun=print)
    print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "rest"), [(signal.SIGTERM, "done\nended\n"), (signal.SIGINT, "done\nended\n"), (signal.SIGKILL, "")]
)
def test_a_signal_during_a_run(tmp_path: Path, settings: OfflineSettings, number: int, rest: str) -> None:
    script = tmp_path / "slow_run.py"
    script.write_text(textwrap.dedent(SLOW_RUN))
    process = subprocess.Popen(
        [sys.executable, str(script), str(settings.dataset_dir)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(number)
        assert process.stdout.read() == rest
        assert process.wait(20) == (0 if rest else -number)


def test_a_signal_before_the_schedule_has_started_ends_it() -> None:
    from apscheduler.schedulers.blocking import BlockingScheduler

    class Late(BlockingScheduler):
        def start(self, *args: object, **kwargs: object) -> None:
            end()
            time.sleep(0.1)
            super().start(*args, **kwargs)

    schedule._until_signal(Late())
