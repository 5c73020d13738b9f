"""Shards: the folders of a state that several processes share, one for each partition of the topics.

A state that is not shared lies in its folder itself. A shared one has a folder for every partition that anything has
been consumed of; each is a state of its own (`state.store.Store`), with the offsets of its own partition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from state.errors import StateForeignError, StateMissingError
from state.files import DATA_FILE

_PREFIX: Final = "partition-"


def shard_folder(path: Path, partition: int) -> Path:
    """Return the folder of a partition's shard in the state at ``path``."""
    return path / f"{_PREFIX}{partition:05d}"


def shard_folders(path: Path) -> dict[int, Path]:
    """Return the folders that a state consists of, by shard; one that is not shared is its only shard, number 0.

    Raises
    ------
    StateMissingError
        There is no state.
    StateForeignError
        There is a shared state in the folder of one that is not shared.
    """
    found = {
        int(folder.name.removeprefix(_PREFIX)): folder
        for folder in sorted(path.glob(f"{_PREFIX}[0-9]*"))
        if (folder / DATA_FILE).exists()
    }
    alone = (path / DATA_FILE).exists()
    if alone and found:
        raise StateForeignError(
            path, f"holds a state that is not shared and {len(found)} shards of a shared one (streams.shared)"
        )
    if not alone and not found:
        raise StateMissingError(path)
    return found or {0: path}
