"""The scheduled job, once and on its schedule."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from offline import jobs
from offline.dataset import PAIRS_FILE, ROWS_FILE
from offline.jobs import read_runs, run_once, run_schedule
from offline.settings import OfflineSettings
from state.artifact import ArtifactStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path):
    return OfflineSettings(dataset_dir=tmp_path / "offline", min_new_impressions=1_000, interval_s=0.05)


def ticks(start=5_000):
    counter = itertools.count(start)
    return lambda: next(counter)


def test_a_run_builds_rows_and_pairs(state_writer, settings):
    writer = state_writer()
    writer.conflict("p1")
    writer.offset("clicks", 0, 400)
    writer.commit()
    record = run_once(settings, writer.path, clock=ticks())
    assert record.outcome == "built"
    assert (record.started_at_ms, record.finished_at_ms) == (5_000, 5_001)
    assert (record.n_products, record.n_rows, record.n_pairs, record.n_new_impressions) == (1, 6, 6, 6_000)
    assert record.artifact == "gaip/v000001"
    artifact = ArtifactStore(settings.dataset_dir).latest("gaip")
    assert artifact.manifest.made_from["offsets"] == {"clicks/0": 400}
    assert artifact.manifest.made_from["snapshot_id"] == record.snapshot_id
    assert artifact.manifest.made_from["settings"]["min_pair_probability"] == 0.8
    rows, pairs = pq.read_table(artifact.file(ROWS_FILE)), pq.read_table(artifact.file(PAIRS_FILE))
    assert (rows.num_rows, pairs.num_rows) == (6, 6)
    assert rows.schema.field("ctr").metadata[b"description"]
    assert json.loads(rows.schema.metadata[b"osmf.offsets"]) == {"clicks/0": 400}
    best = {(row["group_id"], row["creative_w"], row["creative_l"]) for row in pairs.to_pylist()}
    assert (0, "p1-blue", "p1-red") in best
    assert (1, "p1-red", "p1-blue") in best
    assert read_runs(settings) == [record]


def test_runs_are_skipped_until_enough_is_new(state_writer, settings):
    writer = state_writer()
    outcomes = []
    for n in (100, 1_000, 1_001, 1_160, 1_170):  # impressions of each of six cells
        writer.conflict("p1", n)
        writer.commit()
        record = run_once(settings, writer.path, clock=ticks(n))
        outcomes.append((record.outcome, record.n_new_impressions, record.artifact))
    assert outcomes == [
        ("skipped", 600, None),
        ("built", 6_000, "gaip/v000001"),
        ("skipped", 6, None),
        ("skipped", 960, None),
        ("built", 1_020, "gaip/v000002"),
    ]
    reasons = [record.reason for record in read_runs(settings)]
    assert reasons[0] == "600 new impressions so far, min_new_impressions is 1000"
    assert reasons[2] == "6 new impressions since gaip/v000001, min_new_impressions is 1000"
    assert reasons[1] is reasons[4] is None


def test_without_a_state_the_run_is_skipped(tmp_path, settings):
    record = run_once(settings, tmp_path / "nothing", clock=ticks())
    assert record.outcome == "skipped"
    assert "no state at" in record.reason
    assert not (tmp_path / "nothing").exists()


def test_without_exposure_the_run_is_skipped(state_writer, settings):
    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    strict = settings.model_copy(update={"min_product_impressions": 1e6})
    record = run_once(strict, writer.path, clock=ticks())
    assert (record.outcome, record.n_rows) == ("skipped", 0)
    assert "min_product_impressions (1e+06)" in record.reason
    assert ArtifactStore(settings.dataset_dir).latest("gaip") is None


def test_a_failure_is_recorded_and_leaves_no_artifact(state_writer, settings):
    writer = state_writer()
    writer.conflict("p1")
    writer.cell("p1", 0, "stranger", 500, 10)
    writer.commit()
    record = run_once(settings, writer.path, clock=ticks())
    assert record.outcome == "failed"
    assert record.reason.startswith("UnknownCreativeError: the state counts creative 'stranger'")
    assert ArtifactStore(settings.dataset_dir).latest("gaip") is None
    assert read_runs(settings) == [record]


def test_a_run_reads_while_the_state_is_being_written(state_writer, settings):
    from state.store import Store

    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    program = (
        "import sys; from pathlib import Path; from offline.jobs import run_once; from offline.settings import *;"
        "s = OfflineSettings(dataset_dir=Path(sys.argv[2]), min_new_impressions=1);"
        "print(run_once(s, Path(sys.argv[1])).outcome)"
    )
    with Store(writer.path, map_size_mib=32, sync=False):
        done = subprocess.run(
            [sys.executable, "-c", program, str(writer.path), str(settings.dataset_dir)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.strip() == "built"


def test_old_artifacts_are_pruned(state_writer, settings):
    writer = state_writer()
    few = settings.model_copy(update={"keep_versions": 2})
    for step in range(1, 5):
        writer.conflict("p1", 1_000 * step)
        writer.commit()
        assert run_once(few, writer.path, clock=ticks()).outcome == "built"
    assert ArtifactStore(settings.dataset_dir).versions("gaip") == [3, 4]


def schedule(settings, state_path, enough, **options):
    """Run the schedule in this thread until ``enough(records)``; return the records."""
    records = []

    def on_run(record):
        records.append(record)
        if enough(records):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    run_schedule(settings, state_path, on_run=on_run, **options)
    assert signal.getsignal(signal.SIGTERM) is before
    return records


def in_turn(records):
    """Return the records without those of starts that came while a run was still going, as on a busy machine."""
    return [record for record in records if "still going" not in (record.reason or "")]


def test_the_schedule_repeats_and_ends_on_sigterm(state_writer, settings):
    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    records = schedule(settings, writer.path, lambda records: len(in_turn(records)) >= 3)
    assert [record.outcome for record in in_turn(records)[:3]] == ["built", "skipped", "skipped"]
    assert sorted(read_runs(settings), key=lambda run: run.run_id) == sorted(records, key=lambda run: run.run_id)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("end-schedule")]


def test_a_failing_run_does_not_end_the_schedule(state_writer, settings, monkeypatch):
    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    real, calls = jobs.take_snapshot, itertools.count()

    def fails_first(state):
        if next(calls) == 0:
            raise MemoryError("no room")
        return real(state)

    monkeypatch.setattr(jobs, "take_snapshot", fails_first)
    records = schedule(settings, writer.path, lambda records: any(record.outcome == "built" for record in records))
    assert [record.outcome for record in in_turn(records)[:2]] == ["failed", "built"]
    assert records[0].reason == "MemoryError: no room"


def test_a_start_during_a_run_is_recorded_as_skipped(state_writer, settings, monkeypatch):
    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    real, skipped, running, most = jobs.take_snapshot, threading.Event(), [], []

    def slow(state):
        running.append(1)
        most.append(len(running))
        assert skipped.wait(10)
        running.pop()
        return real(state)

    def enough(records):
        if any("still going" in (record.reason or "") for record in records):
            skipped.set()
        return any(record.outcome == "built" for record in records)

    monkeypatch.setattr(jobs, "take_snapshot", slow)
    records = schedule(settings, writer.path, enough)
    assert records[0].outcome == "skipped"
    assert records[0].reason == "the run before was still going after interval_s (0.05 s)"
    assert max(most) == 1


def test_without_run_at_start_the_first_run_waits(state_writer, settings):
    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    start_s = time.monotonic()
    later = settings.model_copy(update={"run_at_start": False, "interval_s": 0.3})
    schedule(later, writer.path, lambda records: True)
    assert time.monotonic() - start_s >= 0.25


SLOW_RUN = """
import sys, time
from pathlib import Path
from offline import jobs
from offline.settings import OfflineSettings
real = jobs.take_snapshot
def slow(state):
    print("running", flush=True)
    time.sleep(1.0)
    return real(state)
jobs.take_snapshot = slow
settings = OfflineSettings(dataset_dir=Path(sys.argv[2]), min_new_impressions=1, interval_s=60)
jobs.run_schedule(settings, Path(sys.argv[1]))
print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "outcomes"), [(signal.SIGTERM, ["built"]), (signal.SIGINT, ["built"]), (signal.SIGKILL, [])]
)
def test_a_signal_during_a_run(state_writer, settings, number, outcomes):
    writer = state_writer()
    writer.conflict("p1")
    writer.commit()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_RUN), str(writer.path), str(settings.dataset_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(20) == (0 if outcomes else -number)
    assert rest == ("ended\n" if outcomes else "")
    assert [record.outcome for record in read_runs(settings)] == outcomes
    assert len(ArtifactStore(settings.dataset_dir).versions("gaip")) == len(outcomes)


def test_a_signal_before_the_schedule_has_started_ends_it():
    from apscheduler.schedulers.blocking import BlockingScheduler

    class Late(BlockingScheduler):
        def start(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            super().start(*args, **kwargs)

    jobs._until_signal(Late())


def test_jobs_import_no_heavy_library():
    program = (
        "import sys, offline.jobs, offline.reference;"
        "print([name for name in ('torch', 'faiss', 'sklearn', 'apscheduler', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
