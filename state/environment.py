"""Environment: what LMDB and the system say of a data file, as the state's own errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import lmdb

from state.errors import StateDamagedError
from state.files import DATA_FILE, disk_error
from state.pages import PageError, check_pages

LAYOUT_KEY: Final = b"layout_version"
"""Key, in the meta table, of the layout's version."""

# LMDB takes a write that the disk took in part for an input/output error.
_REFUSALS = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


def check_data(path: Path, *, every: bool) -> None:
    """Look whether the data file in ``path`` is whole (`state.pages.check_pages`).

    Raises
    ------
    StateDamagedError
        It is not.
    """
    try:
        check_pages(path / DATA_FILE, every=every)
    except PageError as error:
        raise StateDamagedError(path, str(error)) from error


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn what LMDB finds wrong with its file into `StateDamagedError`."""
    try:
        yield
    except (
        lmdb.CorruptedError,
        lmdb.PageNotFoundError,
        lmdb.InvalidError,
        lmdb.VersionMismatchError,
        lmdb.PanicError,
    ) as error:
        raise StateDamagedError(path, str(error)) from error


@contextmanager
def refused_writes(path: Path) -> Iterator[None]:
    """Turn a write that the system refused into `StateDiskError`."""
    try:
        yield
    except lmdb.Error as error:
        if str(error).endswith(_REFUSALS):
            raise disk_error(path, str(error)) from error
        raise
