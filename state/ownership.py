"""Ownership: which process may commit to a shared state, and how a frozen one is got out of the way.

Processes that share the partitions of a topic may all have a shard's state open for writing: one that was frozen does
not know that its partition is another's by now. So the state holds its owner with an epoch, which every opening
raises, and a commit first looks, inside its own transaction, whether the epoch is still its own.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec
import psutil

log = logging.getLogger(__name__)

OWNER_KEY: Final = b"owner"
"""Key, in the meta table, of the owner. It alone tells of processes; all else in a state follows from the log."""

TAKEOVER_WAIT_S: Final = 2.0
"""How long LMDB's lock may not be had before its holder, who is frozen, is taken to be in a commit, seconds."""

_TAKE_THE_LOCK: Final = "import lmdb, sys; lmdb.open(sys.argv[1], create=False).begin(write=True).abort()"


class Process(msgspec.Struct, frozen=True, array_like=True):
    """A process on a host; ``started_at_s`` tells it from a later one with its number."""

    host: str
    pid: int
    started_at_s: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def this(cls) -> Process:
        """Return the process that asks."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_frozen(self) -> bool:
        """Return whether it is a process of this host, another than this one, that is stopped."""
        if self.host != socket.gethostname() or self.pid == os.getpid():
            return False
        try:
            process = psutil.Process(self.pid)
            is_it = abs(process.create_time() - self.started_at_s) < 1.0
            return is_it and process.status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False


class Owner(msgspec.Struct, frozen=True, array_like=True):
    """The process that opened a shared state last, and how many did so up to it."""

    epoch: int
    process: Process


_OWNER = msgspec.msgpack.Decoder(Owner)


def read_owner(value: bytes | memoryview | None) -> Owner | None:
    """Return the owner that a state holds; None: it has never been shared."""
    return None if value is None else _OWNER.decode(value)


def next_owner(former: Owner | None) -> Owner:
    """Return this process as the owner after another."""
    return Owner(1 if former is None else former.epoch + 1, Process.this())


def unblock(path: Path, former: Process | None) -> None:
    """See to it that a frozen process does not keep the state at ``path`` from being written.

    One that was frozen in the middle of a commit holds LMDB's lock until it wakes. It has lost its shard, that commit
    is not to happen, and it is killed; LMDB then takes the lock back. One that was frozen at another moment is left
    alone: when it wakes, its commits are refused. Whether the lock is free a child tries, which can be given up:
    LMDB waits for it without end, and without letting another thread run.

    Parameters
    ----------
    path
        Folder of the state.
    former
        The process that opened the state last, if it is known.
    """
    if former is None or not former.is_frozen():
        return
    attempt = subprocess.Popen([sys.executable, "-c", _TAKE_THE_LOCK, str(path)])
    try:
        attempt.wait(TAKEOVER_WAIT_S)
    except subprocess.TimeoutExpired:
        if former.is_frozen():
            log.warning("%s is frozen within a commit and has lost its shard: it is killed", former)
            psutil.Process(former.pid).kill()
        attempt.wait()
