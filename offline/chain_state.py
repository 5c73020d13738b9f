"""Where the chain is: the run that is not finished, and what was trained from last, in a file replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from state.files import sync_file

STATE_FILE: Final = "chain.json"


class ChainStateUnreadable(RuntimeError):
    """The file is damaged."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path} cannot be read: {why}. Nothing was run: remove it, and the next run begins anew with the newest "
            "dataset; artifacts and the champion are as they were."
        )


class UnfinishedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run between its dataset and its end; ``all_steps`` says that it takes every step, needed or not."""

    run_id: str
    dataset: str
    all_steps: bool
    n_failures: int = 0


class TrainedFrom(msgspec.Struct, frozen=True, kw_only=True):
    """The dataset that the last finished run trained from, with the impressions counted by then."""

    run_id: str
    dataset: str
    n_impressions: int


class ChainState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds."""

    unfinished: UnfinishedRun | None = None
    trained: TrainedFrom | None = None

    @classmethod
    def read(cls, folder: Path) -> ChainState:
        """Read the file; before the first run it is empty.

        Raises
        ------
        ChainStateUnreadable
            If it is damaged.
        """
        path = folder / STATE_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()
        except msgspec.DecodeError as error:
            raise ChainStateUnreadable(path, str(error)) from error

    def write(self, folder: Path) -> None:
        """Put this in the file's place, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{STATE_FILE}"
        draft.write_bytes(msgspec.json.encode(self))
        sync_file(draft)
        os.replace(draft, folder / STATE_FILE)
        sync_file(folder)
