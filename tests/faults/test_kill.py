"""``kill -9`` of the online process at random moments: nothing is lost and nothing is counted twice."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from streams.broker import LocalBroker
from streams.settings import StreamSettings
from tests.faults.stream import SEED, Online, content, differences, n_consumed, produce

pytestmark = [pytest.mark.broker, pytest.mark.timeout(600)]


def kill_and_compare(folder: Path, n_impressions: int, n_kills: int) -> None:
    with LocalBroker(topics={}, log_path=folder / "broker.log") as broker:
        streams = StreamSettings(bootstrap_servers=broker.bootstrap_servers, batch_events=512)
        broker.create_topics(dict.fromkeys(streams.topics.model_dump().values(), 1))
        n_events = produce(streams, folder, n_impressions)
        Online(streams, folder / "undisturbed").run_to_its_end()
        online, n_killed = Online(streams, folder / "killed"), 0
        rng = np.random.default_rng(SEED)
        for target in np.sort(rng.integers(0, int(0.95 * n_events), n_kills)):
            process = online.start()
            while n_consumed(folder / "killed") < target:
                assert process.poll() is None, "the process ended before it had consumed everything"
                time.sleep(0.001)
            # Anywhere in the next batch: in the work, in the commit, or between it and the sending.
            time.sleep(float(rng.uniform(0, 0.2)))
            process.send_signal(signal.SIGKILL)
            process.wait()
            n_killed += 1
        online.run_to_its_end()
        n_keys, different = len(content(folder / "undisturbed")), differences(folder / "undisturbed", folder / "killed")
        print(f"kills: {n_killed}, events: {n_events}, keys: {n_keys}, differences: {len(different)}")
        assert different == []


def test_five_kills_leave_no_trace(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, n_impressions=15_000, n_kills=5)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, n_impressions=60_000, n_kills=20)
