"""Migration: a state of an older layout becomes one of this program's, in one transaction.

Each step leads from one layout to the next. A layout from which no step leads is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import lmdb

from state.environment import LAYOUT_KEY, check_data, damage, refused_writes
from state.errors import StateForeignError, StateLayoutError
from state.files import DATA_FILE, WriterLock, system_errors
from state.shards import shard_folders
from state.store import LAYOUT_VERSION, Table

NEW_TABLES: Final[Mapping[int, Sequence[str]]] = {
    4: ("reviews",),
    5: ("ledger", "ledger_index", "forgettings", "live_restarts"),
    6: ("files",),
}
"""The tables that the layout after a layout has beside that one's. Fields that records have got since have defaults."""


def migrate_state(path: Path) -> dict[int, int]:
    """Bring all shards of a state to this program's layout; return the layout that each had.

    One that has it already is left as it is. Killed at any moment, a shard has its old layout or the new one, whole.

    Raises
    ------
    state.errors.StateMissingError
        There is no state.
    StateLayoutError
        From a shard's layout no step leads to this one. Shards before it have been brought there.
    StateLockedError
        A process has the state open for writing.
    StateDamagedError, StateForeignError, StateDiskError
        The state cannot be used, or not be written.
    """
    return {number: _migrate(folder) for number, folder in shard_folders(path).items()}


def _migrate(path: Path) -> int:
    with system_errors(path), WriterLock(path):
        check_data(path, every=True)
        with (
            damage(path),
            refused_writes(path),
            lmdb.open(str(path), max_dbs=2 * len(Table), map_size=_map_bytes(path)) as environment,
        ):
            return _migrate_environment(path, environment)


def _map_bytes(path: Path) -> int:
    """Return a map that holds the file and what a few new tables need."""
    return (path / DATA_FILE).stat().st_size + (16 << 20)


def _migrate_environment(path: Path, environment: lmdb.Environment) -> int:
    with environment.begin(write=True) as txn:
        try:
            meta = environment.open_db(Table.META.encode(), txn=txn, create=False)
        except (lmdb.NotFoundError, lmdb.IncompatibleError) as error:
            raise StateForeignError(path, "holds an LMDB environment of another program") from error
        found = bytes(txn.get(LAYOUT_KEY, db=meta) or b"").decode(errors="replace")
        known = {str(version): version for version in (*NEW_TABLES, LAYOUT_VERSION)}
        if found not in known:
            raise StateLayoutError(path, found, LAYOUT_VERSION)
        for version in range(known[found], LAYOUT_VERSION):
            for name in NEW_TABLES[version]:
                environment.open_db(name.encode(), txn=txn)
        txn.put(LAYOUT_KEY, str(LAYOUT_VERSION).encode(), db=meta)
        return known[found]
