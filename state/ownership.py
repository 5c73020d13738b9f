"""Ownership: which process may commit to a shared state, and how a frozen one is got out of the way.

Processes that share the partitions of a topic may all have a shard's state open for writing: one that was frozen does
not know that its partition is another's by now. So the state holds its owner with an epoch, which every opening
raises, and a commit first looks, inside its own transaction, whether the epoch is still its own.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec
import psutil

log = logging.getLogger(__name__)

OWNER_KEY: Final = b"owner"
"""Key, in the meta table, of the owner. It alone tells of processes; all else in a state follows from the log."""

TAKEOVER_WAIT_S: Final = 3.0
"""How long the new owner waits for a commit that the former owner has begun, before it looks whether that one is
frozen, seconds."""


class Owner(msgspec.Struct, frozen=True, array_like=True):
    """The process that opened a shared state last; ``started_at_s`` tells it from a later one with its number."""

    epoch: int
    host: str
    pid: int
    started_at_s: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


_OWNER = msgspec.msgpack.Decoder(Owner)


def read_owner(value: bytes | memoryview | None) -> Owner | None:
    """Return the owner that a state holds; None: it has never been shared."""
    return None if value is None else _OWNER.decode(value)


def next_owner(former: Owner | None) -> Owner:
    """Return this process as the owner after another."""
    epoch = 1 if former is None else former.epoch + 1
    return Owner(epoch, socket.gethostname(), os.getpid(), psutil.Process().create_time())


@contextmanager
def unblocked_by(former: Owner | None) -> Iterator[None]:
    """Wait for the right to write no longer than a frozen former owner makes necessary.

    A process that was frozen in the middle of a commit holds LMDB's lock, and would hold it until it wakes. It has lost
    its shard and its commit is not to happen, so it is killed; LMDB then takes the lock back. One that runs is waited
    for, and one on another host has no part in this file.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(TAKEOVER_WAIT_S):
            if former is not None and _is_frozen(former):
                log.warning("%s is frozen within a commit and has lost its shard: it is killed", former)
                psutil.Process(former.pid).kill()

    watcher = threading.Thread(target=watch, name="take-over", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _is_frozen(owner: Owner) -> bool:
    if owner.host != socket.gethostname() or owner.pid == os.getpid():
        return False
    try:
        process = psutil.Process(owner.pid)
        is_it = abs(process.create_time() - owner.started_at_s) < 1.0
        return is_it and process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False
