"""The online process as a child that can be told where to die or to freeze; forked from a server that has torch."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from online.settings import EncoderSettings, GroupSettings, OnlineSettings
from online.shard import Step
from state.errors import StateMissingError
from state.ownership import OWNER_KEY
from state.reading import open_view
from state.settings import StateSettings
from state.shards import shard_folders
from state.store import Store, Table
from streams.settings import StreamSettings
from tests.faults.child import live_as_child

ONLINE = OnlineSettings(
    encoders=EncoderSettings(text="hashed", image="hashed"),
    groups=GroupSettings(warm_up_impressions=4_000, adopt_every_impressions=3_000),
    torch_threads=1,
)
_FORKS = mp.get_context("forkserver")
_FORKS.set_forkserver_preload(["online.worker", "tests.faults.worker"])


@dataclass(frozen=True)
class Plan:
    """What a worker does beside its work: at the ``at_pass``-th passing of ``step`` it sends itself ``signal``.

    Before each batch it sleeps a little as long as the file ``slow`` is there, so that a short log lasts, and freezes
    if the file ``freeze`` is: outside a commit, within which one that has lost its shard is killed.
    """

    step: Step | None = None
    at_pass: int = 1
    signal: int = signal.SIGKILL
    slow: Path | None = None
    freeze: Path | None = None


@dataclass
class Worker:
    """``osmf online`` without its command line.

    Parameters
    ----------
    streams
        The settings of the streams.
    state
        Folder of the state.
    name
        Name of its log, beside the state.
    """

    streams: StreamSettings
    state: Path
    name: str = "worker"
    plan: Plan = field(default_factory=Plan)

    @property
    def log(self) -> Path:
        return self.state.parent / f"{self.state.name}-{self.name}.log"

    def start(self, plan: Plan | None = None) -> BaseProcess:
        process = _FORKS.Process(
            target=_work, args=(self.streams, self.state, self.log, plan or self.plan), daemon=True
        )
        process.start()
        return process


def _work(streams: StreamSettings, state: Path, log: Path, plan: Plan) -> None:
    from online.worker import run_online

    stop = live_as_child(log)
    run_online(
        streams,
        ONLINE,
        StateSettings(path=state),
        clock_s=time.monotonic,
        stop=stop,
        on_step=_follow(plan),
    )


def _follow(plan: Plan) -> Callable[[Step], None]:
    n_passed = 0

    def on_step(step: Step) -> None:
        nonlocal n_passed
        if step is Step.POLLED and plan.slow is not None and plan.slow.exists():
            time.sleep(0.1)
        if step is Step.POLLED and plan.freeze is not None and plan.freeze.exists():
            os.kill(os.getpid(), signal.SIGSTOP)
        n_passed += step is plan.step
        if step is plan.step and n_passed == plan.at_pass:
            os.kill(os.getpid(), plan.signal)

    return on_step


def content(state: Path) -> dict[tuple[int, str, bytes], bytes]:
    """Return everything that a state holds, by shard, but for the process that owns it."""
    found = {}
    for number, folder in shard_folders(state).items():
        with Store(folder, readonly=True) as store, store.read() as txn:
            for table in Table:
                for key, value in txn.scan(table):
                    if (table, key) != (Table.META, OWNER_KEY):
                        found[number, table.value, key] = value
    return found


def differences(one: Path, other: Path) -> list[tuple[int, str, bytes]]:
    """Return the keys at which two states differ."""
    expected, found = content(one), content(other)
    return [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]


def consumed(state: Path) -> dict[int, int]:
    """Return how many messages each shard of a state includes; nothing before it is there."""
    try:
        folders = shard_folders(state)
    except StateMissingError:
        return {}
    found = {}
    for number, folder in folders.items():
        with Store(folder, readonly=True) as store, open_view(store) as view:
            found[number] = sum(offset.next_offset for offset in view.offsets().values())
    return found


def n_consumed(state: Path) -> int:
    """Return how many messages a state includes."""
    return sum(consumed(state).values())
