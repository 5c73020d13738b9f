"""``kill -9`` of online processes, at random moments and at every step: nothing is lost and nothing is counted twice.

The stream has duplicates, late clicks, reordered and wrong events. What a state holds after all kills is compared, key
by key and weights included, with that of a run that nobody disturbed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from online.shard import Step
from state.shards import shard_folders
from streams.broker import LocalBroker
from streams.settings import StreamSettings
from tests.faults.child import end
from tests.faults.stream import SEED, produce
from tests.faults.worker import Plan, Worker, content, differences, n_consumed

pytestmark = [pytest.mark.broker, pytest.mark.timeout(600)]

SESSION_S = 4.0


@contextmanager
def stream(
    folder: Path, n_impressions: int, n_partitions: int, batch_events: int = 512
) -> Iterator[tuple[StreamSettings, int]]:
    """Run a broker with a stream; give the settings and how many events there are."""
    with LocalBroker(topics={}, log_path=folder / "broker.log") as broker:
        streams = StreamSettings(
            bootstrap_servers=broker.bootstrap_servers,
            batch_events=batch_events,
            n_partitions=n_partitions,
            shared=n_partitions > 1,
            session_timeout_s=SESSION_S,
        )
        broker.create_topics(dict.fromkeys(streams.topics.model_dump().values(), n_partitions))
        yield streams, produce(streams, folder, n_impressions, n_products=6 * n_partitions)


def score(undisturbed: Path, killed: Path, n_kills: int, n_events: int, n_workers: int) -> None:
    """Print the scoreboard, and hold the states against each other."""
    different = differences(undisturbed, killed)
    print(
        f"workers: {n_workers}, keys: {len(content(undisturbed))}, "
        f"kills: {n_kills}, events: {n_consumed(killed)}, differences: {len(different)}"
    )
    assert different == []
    assert n_consumed(killed) == n_events


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def wait_for(state: Path, n_events: int, workers: list[Worker], processes: list[BaseProcess]) -> None:
    """Wait until a state includes so many events."""
    while n_consumed(state) < n_events:
        for process, worker in zip(processes, workers, strict=True):
            assert process.exitcode is None, worker.log.read_text()
        time.sleep(0.01)  # each look opens the state: more often would take a core from the workers


def run_to_the_end(worker: Worker, n_events: int) -> None:
    """Let a worker work off everything."""
    process = worker.start()
    wait_for(worker.state, n_events, [worker], [process])
    end(process, worker.log)


def kill_at_random(folder: Path, n_impressions: int, n_kills: int, n_workers: int) -> None:
    """Kill one of the workers again and again, each at a random moment, and start it anew."""
    with stream(folder, n_impressions, n_workers) as (streams, n_events):
        run_to_the_end(Worker(streams, folder / "undisturbed"), n_events)
        rng = np.random.default_rng(SEED)
        workers = [Worker(streams, folder / "killed", name=f"worker-{i}") for i in range(n_workers)]
        processes = [worker.start() for worker in workers]
        for target in np.sort(rng.integers(0, int(0.95 * n_events), n_kills)):
            wait_for(folder / "killed", int(target), workers, processes)
            # Anywhere in the next batch: in the work, in the commit, or between it and the sending.
            time.sleep(float(rng.uniform(0, 0.2)))
            victim = int(rng.integers(n_workers))
            kill(processes[victim])
            processes[victim] = workers[victim].start()
        wait_for(folder / "killed", n_events, workers, processes)
        for process, worker in zip(processes, workers, strict=True):
            end(process, worker.log)
        assert len(shard_folders(folder / "killed")) == n_workers
        score(folder / "undisturbed", folder / "killed", n_kills, n_events, n_workers)


def test_kills_at_every_step_leave_no_trace(tmp_path: Path) -> None:
    with stream(tmp_path, 8_000, 1) as (streams, n_events):
        run_to_the_end(Worker(streams, tmp_path / "undisturbed"), n_events)
        worker, n_kills = Worker(streams, tmp_path / "killed"), 0
        for at_pass in (1, 3):
            for step in Step:
                if step is Step.OPENED and at_pass > 1:
                    continue  # passed once in the life of a process
                process = worker.start(Plan(step, at_pass))
                process.join(60)
                assert process.exitcode == -signal.SIGKILL, worker.log.read_text()
                n_kills += 1
        run_to_the_end(worker, n_events)
        score(tmp_path / "undisturbed", tmp_path / "killed", n_kills, n_events, 1)


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(tmp_path: Path) -> None:
    kill_at_random(tmp_path, n_impressions=15_000, n_kills=5, n_workers=1)


def test_kills_of_two_workers_leave_no_trace(tmp_path: Path) -> None:
    kill_at_random(tmp_path, n_impressions=10_000, n_kills=3, n_workers=2)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("n_workers", [1, 2])
def test_two_hundred_kills_leave_no_trace(tmp_path: Path, n_workers: int) -> None:
    kill_at_random(tmp_path, n_impressions=281_500, n_kills=200, n_workers=n_workers)
