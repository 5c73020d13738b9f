"""A rebalance in the middle of the stream: a worker joins, one is killed, one is frozen and wakes as a zombie."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from state.errors import StateMissingError
from state.ownership import OWNER_KEY, read_owner
from state.shards import shard_folders
from state.store import Store, Table
from tests.faults.child import end
from tests.faults.test_kill import SESSION_S, kill, run_to_the_end, stream, wait_for
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
    state, slow = tmp_path / "moved", tmp_path / "slow"
    slow.touch()
    with stream(tmp_path, 30_000, N_PARTITIONS, batch_events=64) as (streams, n_events):
        run_to_the_end(Worker(streams, tmp_path / "undisturbed"), n_events)
        of_shard = consumed(tmp_path / "undisturbed")

        def unfinished(shards: set[int]) -> set[int]:
            now = consumed(state)
            found = {number for number in shards if of_shard[number] - now.get(number, 0) > 1_000}
            assert found, f"too little is left to see it flow: {now} of {of_shard}"
            return found

        freeze = {name: tmp_path / f"freeze-{name}" for name in ("one", "two", "three")}
        workers = {
            name: Worker(streams, state, name=name, plan=Plan(slow=slow, freeze=path)) for name, path in freeze.items()
        }
        one = workers["one"].start()
        wait_for(state, 500, [workers["one"]], [one])
        assert owned_by(state, one.pid or 0) == set(range(N_PARTITIONS))

        processes = {"two": workers["two"].start()}
        joined_s = seconds_until_they_flow(state, unfinished(wait_until_owned(state, processes["two"].pid or 0)))
        orphans = unfinished(owned_by(state, one.pid or 0))
        kill(one)
        killed_s = seconds_until_they_flow(state, orphans)

        processes["three"] = workers["three"].start()
        wait_until_owned(state, processes["three"].pid or 0)
        most_left = max(of_shard, key=lambda number: of_shard[number] - consumed(state)[number])
        name, process = next(item for item in processes.items() if most_left in owned_by(state, item[1].pid or 0))
        orphans = unfinished(owned_by(state, process.pid or 0))
        zombie = psutil.Process(process.pid)
        freeze[name].touch()
        while zombie.status() != psutil.STATUS_STOPPED:
            pause()
        freeze[name].unlink()
        frozen_s = seconds_until_they_flow(state, orphans)
        assert n_consumed(state) < n_events
        zombie.resume()
        while "was taken over by process " not in workers[name].log.read_text():
            assert process.exitcode is None, workers[name].log.read_text()
            pause()
        slow.unlink()
        wait_for(state, n_events, [workers[name] for name in processes], list(processes.values()))
        for name, process in processes.items():
            end(process, workers[name].log)
        print(
            f"partitions flow again after: {joined_s:.1f} s (a worker joined), {killed_s:.1f} s (one was killed), "
            f"{frozen_s:.1f} s (one was frozen); session time-out {SESSION_S:.0f} s; "
            f"differences: {len(differences(tmp_path / 'undisturbed', state))}"
        )
    assert differences(tmp_path / "undisturbed", state) == []
    assert max(killed_s, frozen_s) <= SESSION_S + 5
