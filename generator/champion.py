"""The champion: which models are in use, in a file that is replaced as a whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from state.files import sync_file

POINTER_FILE: Final = "champion.json"

FORMAT_VERSION: Final = 1


class ChampionUnreadable(RuntimeError):
    """A pointer that cannot be read."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path} cannot be read: {why}. No model is used until it is moved aside and a run of `osmf offline run` "
            "promotes one anew; the models themselves are as they were."
        )


class NoFormerChampion(RuntimeError):
    """There is nothing to go back to."""

    def __init__(self, path: Path, n_champions: int) -> None:
        has = "names no champion" if n_champions == 0 else "names its first champion"
        super().__init__(f"{path} {has}; rolling back needs one before it. The pointer is as it was.")


class Champion(msgspec.Struct, frozen=True, kw_only=True):
    """The models that are in use, by the names of their artifacts, such as ``mllm/v000003``.

    ``grm_accuracy`` is the GRM's share of held-out pairs whose winner it names, on ``n_grm_pairs`` of them.
    ``promoted_at_ms`` is the time of the promotion, ms since the Unix epoch; ``reason`` says what spoke for it.
    """

    mllm: str
    grm: str
    grm_accuracy: float
    n_grm_pairs: int
    promoted_at_ms: int
    reason: str


class _Pointer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: champions in the order of their promotion, of which the last is in use."""

    version: int = FORMAT_VERSION
    champions: list[Champion]


class ChampionPointer:
    """Says which models are in use, and moves from one champion to the next and back.

    The file holds all champions so far and is replaced by a rename: a reader sees the former or the next one. Moves of
    several processes wait for each other.

    Parameters
    ----------
    models_dir
        Folder of the models' artifacts, where the file lies.
    """

    def __init__(self, models_dir: Path) -> None:
        self.path = models_dir / POINTER_FILE

    def read(self) -> Champion | None:
        """Return the champion, or None before the first promotion.

        Raises
        ------
        ChampionUnreadable
            If the file is damaged or of another version.
        """
        champions = self.champions()
        return champions[-1] if champions else None

    def champions(self) -> list[Champion]:
        """Return all that were promoted and not rolled back, oldest first."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        try:
            pointer = msgspec.json.decode(content, type=_Pointer)
        except msgspec.DecodeError as error:
            raise ChampionUnreadable(self.path, str(error)) from error
        if pointer.version != FORMAT_VERSION:
            raise ChampionUnreadable(self.path, f"its version is {pointer.version}, known is {FORMAT_VERSION}")
        return pointer.champions

    def move(self, champion: Champion) -> None:
        """Make these models the champion."""
        with self._alone():
            self._write([*self.champions(), champion])

    def roll_back(self) -> Champion:
        """Return to the champion before, and return it.

        Raises
        ------
        NoFormerChampion
            If there is none.
        """
        with self._alone():
            champions = self.champions()
            if len(champions) < 2:
                raise NoFormerChampion(self.path, len(champions))
            self._write(champions[:-1])
        return champions[-2]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock: what was read is still so when it is written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _write(self, champions: list[Champion]) -> None:
        draft = self.path.with_suffix(".tmp")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(_Pointer(champions=champions)), indent=2) + b"\n")
        sync_file(draft)
        os.replace(draft, self.path)
        sync_file(self.path.parent)
