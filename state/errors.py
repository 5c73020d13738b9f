"""Errors of the state: what is wrong with a folder, what was kept, and what to do."""

from __future__ import annotations

from pathlib import Path


class StateError(RuntimeError):
    """The state cannot be used as it is."""


class StateMissingError(StateError):
    """There is no state at a path that is to be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"no state at {path}: nothing has been committed there yet. "
            "Start `osmf online` first, or set state.path (OSMF_STATE__PATH) to the folder that it writes."
        )
        self.path = path


class StateForeignError(StateError):
    """What lies at the path was not written by this program."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(
            f"{path} is no state, it {found}: it is left untouched. "
            "Set state.path (OSMF_STATE__PATH) to the folder of a state, or to one that is not there yet."
        )
        self.path = path


class StateLayoutError(StateError):
    """The state was written with another layout version."""

    def __init__(self, path: Path, found: str, known: int, *, migrates_from: int | None = None) -> None:
        number = int(found) if found.isascii() and found.isdigit() else 0
        if number > known:
            advice = "A newer program wrote it: install that one."
        elif migrates_from is not None and number >= migrates_from:
            advice = (
                "`osmf state migrate` brings it to this program's layout, with all processes of the state stopped; "
                "take a backup with the program that wrote it first."
            )
        elif number > 0:
            advice = (
                "Older layouts are not continued. Use the program version that wrote it, or start with an empty "
                "state.path: what the topics still hold is then learnt anew."
            )
        else:
            advice = "No program version writes that one: restore a backup, or start with an empty state.path."
        super().__init__(
            f"state at {path} has layout version {found!r}, this program reads {known}: it is left untouched. {advice}"
        )
        self.path = path
        self.found = found


class StateLockedError(StateError):
    """Another process writes this state."""

    def __init__(self, path: Path, writer: str) -> None:
        super().__init__(
            f"state at {path} is being written by {writer}: a state has one writer, so nothing was opened. "
            "Stop that process first, or set another state.path."
        )
        self.path = path


class StateFencedError(StateError):
    """Another process has taken this shared state over."""

    def __init__(self, path: Path, epoch: int, owner: str, owner_epoch: int) -> None:
        super().__init__(
            f"state at {path} was taken over by {owner} (epoch {owner_epoch}, ours was {epoch}): this commit was "
            "refused whole, offsets included, and what it held is worked off by the new owner. Nothing is lost; this "
            "process goes on with the shards that it is given."
        )
        self.path = path


class StatePermissionError(StateError):
    """Files of the state may not be read or written by this user."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"state at {path} cannot be opened ({reason}): nothing was changed. Its folder and files must be readable "
            "and writable for this user, for readers too, who enter themselves in lock.mdb. Give them to the user "
            "that runs all processes, or set another state.path."
        )
        self.path = path


class StateDamagedError(StateError):
    """The data file is truncated or has a page that is none."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"state at {path} is damaged: {reason}. Nothing was changed. Restore a backup with "
            "`osmf restore DIR --force`, which keeps the damaged state aside, or start with an empty state.path: what "
            "the topics still hold is then learnt anew."
        )
        self.path = path


class StateDiskError(StateError):
    """The disk did not take what was to be written."""

    def __init__(self, path: Path, reason: str, n_bytes_free: int) -> None:
        self.path = path
        self.reason = f"{reason}; {n_bytes_free / 2**20:,.1f} MiB are free on its disk"
        super().__init__(
            f"state at {path} could not be written ({self.reason}): what was to be written was dropped whole, offsets "
            "included, and all earlier commits were kept. Make room on that disk, or lift the limit on file sizes, and "
            "start again: it continues from the last commit."
        )


class StateMapError(StateError):
    """The memory map has no room in the address space."""

    def __init__(self, path: Path, n_bytes: int, reason: str) -> None:
        super().__init__(
            f"state at {path} needs a memory map of {n_bytes / 2**20:,.0f} MiB, which the system refused ({reason}): "
            "nothing was committed, offsets included, and everything before was kept. Lift the limit on the address "
            "space (`ulimit -v`), or lower state.map_size_mib if the state is far smaller, and start again."
        )
        self.path = path
