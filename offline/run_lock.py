"""One run at a time: a lock that the operating system takes back from whoever dies with it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

LOCK_FILE: Final = "run.lock"


class RunUnderWay(RuntimeError):
    """Another process is running the chain with the same artifacts."""

    def __init__(self, path: Path, pid: str) -> None:
        super().__init__(
            f"another run is under way (process {pid or 'unknown'}, {path}); only one at a time may build artifacts. "
            "Nothing was run: wait for its end, or stop that process."
        )


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the artifacts in a folder.

    Raises
    ------
    RunUnderWay
        If another process holds it. A process that was killed holds nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunUnderWay(path, os.pread(descriptor, 32, 0).decode(errors="replace").strip()) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # which lets go of the lock; the file stays, or two could hold a lock each
