"""A rebalance in the middle of the stream: a worker joins, one is killed, one is frozen and wakes as a zombie."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from online.shard import Step
from state.errors import StateMissingError
from state.ownership import OWNER_KEY, read_owner
from state.shards import shard_folders
from state.store import Store, Table
from tests.faults.test_kill import SESSION_S, end, kill, run_to_the_end, stream, wait_for
from tests.faults.worker import Plan, Worker, consumed, differences, n_consumed

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(600)]

N_PARTITIONS = 3


def pause() -> None:
    time.sleep(0.02)


def owned_by(state: Path, pid: int) -> set[int]:
    """Return the shards whose owner is a process."""
    found: set[int] = set()
    try:
        folders = shard_folders(state)
    except StateMissingError:
        return found
    for number, folder in folders.items():
        with Store(folder, readonly=True) as store, store.read() as txn:
            owner = read_owner(txn.get(Table.META, OWNER_KEY))
            if owner is not None and owner.process.pid == pid:
                found.add(number)
    return found


def wait_until_owned(state: Path, pid: int) -> set[int]:
    while not (found := owned_by(state, pid)):
        pause()
    return found


def seconds_until_they_flow(state: Path, shards: set[int]) -> float:
    """Return after how long each of the shards has gone on."""
    before, started_s = consumed(state), time.monotonic()
    while any(consumed(state).get(number, 0) <= before.get(number, 0) for number in shards):
        pause()
    return time.monotonic() - started_s


def test_shards_move_and_a_zombie_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "moved"
    with stream(tmp_path, 15_000, N_PARTITIONS, batch_events=64) as (streams, n_events):
        slow = tmp_path / "slow"
        slow.touch()
        run_to_the_end(Worker(streams, tmp_path / "undisturbed"), n_events)
        first, second, third = (Worker(streams, state, name=name) for name in ("first", "second", "third"))
        one = first.start(Plan(slow=slow))
        wait_for(state, 500, [first], [one])
        assert owned_by(state, one.pid or 0) == set(range(N_PARTITIONS))

        two = second.start(Plan(slow=slow))
        joined_s = seconds_until_they_flow(state, wait_until_owned(state, two.pid or 0))
        orphans = owned_by(state, one.pid or 0)
        assert orphans
        kill(one)
        killed_s = seconds_until_they_flow(state, orphans)

        three = third.start(Plan(Step.WORKED, at_pass=2, signal=signal.SIGSTOP, slow=slow))
        shards = wait_until_owned(state, three.pid or 0)
        zombie = psutil.Process(three.pid)
        while zombie.status() != psutil.STATUS_STOPPED:
            pause()
        frozen_s = seconds_until_they_flow(state, shards)
        assert n_consumed(state) < n_events, "the log has ended before the zombie woke"
        three_kept = owned_by(state, three.pid or 0)
        assert three_kept == set()
        zombie.send_signal(signal.SIGCONT)
        while f"was taken over by process {two.pid} on " not in third.log.read_text():
            assert three.exitcode is None, third.log.read_text()
            pause()
        slow.unlink()
        wait_for(state, n_events, [second, third], [two, three])
        end(two, second)
        end(three, third)
        print(
            f"partitions flow again after: {joined_s:.1f} s (a worker joined), {killed_s:.1f} s (one was killed), "
            f"{frozen_s:.1f} s (one was frozen); session time-out {SESSION_S:.0f} s; "
            f"differences: {len(differences(tmp_path / 'undisturbed', state))}"
        )
    assert differences(tmp_path / "undisturbed", state) == []
    assert max(killed_s, frozen_s) <= SESSION_S + 5
