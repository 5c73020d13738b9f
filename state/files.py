"""Files of a state: who writes it, and how another data file takes the place of the present one.

In a state's folder lie ``data.mdb`` (everything), ``lock.mdb`` (LMDB's table of readers) and ``writer.lock``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from state.errors import StateDiskError, StateForeignError, StateLockedError, StatePermissionError
from state.ownership import Process

DATA_FILE: Final = "data.mdb"
LOCK_FILE: Final = "lock.mdb"
NEXT_FILE: Final = "data.mdb.next"
"""A data file in the making; what a killed process left there is written over."""

_LOCK_BYTES: Final = 64 << 10


class WriterLock:
    """The right to write a state; it dies with its process, so a killed writer leaves nothing to clean up.

    Parameters
    ----------
    path
        Folder of the state; made when it is missing.
    shared
        Whether others that share it may have it too; whose commits count is then told by the state's epoch.
        ``former`` is the process that had it last, if that is known.

    Raises
    ------
    StateLockedError
        Another process has it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        with system_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._file = (path / "writer.lock").open("a+b")
            self._file.seek(0)
            try:
                self.former: Process | None = msgspec.json.decode(self._file.read(), type=Process)
            except msgspec.DecodeError:  # nobody yet, or one that is about to write itself down
                self.former = None
            try:
                fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise StateLockedError(path, str(self.former or "another process")) from None
            self._file.truncate(0)
            self._file.write(msgspec.json.encode(Process.this()))
            self._file.flush()

    def release(self) -> None:
        """Give the right back; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turn what the system refuses into the state's own errors; ``path`` is the state's folder."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise StateForeignError(path, f"is no folder ({error.strerror})") from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StatePermissionError(path, str(error)) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise disk_error(path, str(error)) from error
        raise


def disk_error(path: Path, reason: str) -> StateDiskError:
    """Return the error for a write to ``path`` that the disk refused, with what is free there."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return StateDiskError(path, reason, shutil.disk_usage(there).free)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Hold off a replacement of the data file while the state at ``path`` is opened for reading.

    Otherwise a reader could get the lock file of one data file with the other data file.
    """
    with system_errors(path), _locked_folder(path, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked_folder(path: Path, how: int) -> Iterator[None]:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, how)
        yield
    finally:
        os.close(folder)


def reserve_lock_file(path: Path) -> None:
    """Give LMDB's lock file its room on the disk: it is written through a map, where a full disk is a SIGBUS.

    One that LMDB has begun is left alone: to close a file drops the locks that this process has on it.
    """
    lock = path / LOCK_FILE
    if sys.platform != "linux" or (lock.exists() and lock.stat().st_size):
        return
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.posix_fallocate(file, 0, _LOCK_BYTES)
    except OSError:
        lock.unlink()
        raise
    finally:
        os.close(file)


def replace_data(path: Path, aside: Path | None, *, sync: bool = True) -> None:
    """Let ``NEXT_FILE`` take the place of the data file in ``path``, whose `WriterLock` the caller holds.

    At every moment the folder holds the old state or the new one, each whole. Whoever has the old one open goes on
    reading it.

    Parameters
    ----------
    path
        Folder of the state.
    aside
        Folder, on the same disk, that keeps the present data file; None: there is none.
    sync
        Whether to wait for the disk.
    """
    if sync:
        sync_file(path / NEXT_FILE)
    with _locked_folder(path, fcntl.LOCK_EX):
        if aside is not None:
            aside.mkdir()
            os.link(path / DATA_FILE, aside / DATA_FILE)
            if sync:
                sync_file(aside)
        os.replace(path / NEXT_FILE, path / DATA_FILE)
        # LMDB's lock file numbers the commits of the old data file.
        (path / LOCK_FILE).unlink(missing_ok=True)
        if sync:
            sync_file(path)


def sync_file(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
