"""Backups: a state's last commit in a folder of its own, whole once its manifest is there.

The data file is LMDB's own copy, taken in one read transaction while commits go on. The manifest, with the file's
SHA-256, is written last, by an atomic rename: a folder without one is a backup that was interrupted. A state of several
shards has a backup of each in a folder, and a list of them that is written last: each has offsets of its own, so that
they need not be of the same moment.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from state.errors import StateDiskError, StateError, StateLayoutError
from state.files import DATA_FILE, LOCK_FILE, NEXT_FILE, WriterLock, replace_data, sync_file, system_errors
from state.reading import open_view
from state.shards import shard_folder, shard_folders
from state.store import LAYOUT_VERSION, Store

MANIFEST: Final = "manifest.json"

SHARD_LIST: Final = "shards.json"

FORMAT_VERSION: Final = 1
"""Version of the manifest's layout; another one is refused."""

_BLOCK_BYTES: Final = 1 << 20


class BackupError(StateError):
    """A backup cannot be written or used."""


class BackupTargetError(BackupError):
    """A backup is to be written where it may not."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"no backup was written to {folder}: {reason}. Name a folder that is not there yet, or an empty one, on "
            "another disk if you can."
        )


class BackupMissingError(BackupError):
    """There is no whole backup in a folder."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"no whole backup in {folder}: {reason}. Nothing was restored. Name the folder of a backup that "
            "`osmf backup` has finished; one that was interrupted can be removed."
        )


class BackupDamagedError(BackupError):
    """What lies in a backup is not what its manifest says."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"the backup in {folder} is damaged: {reason}. Nothing was restored. Use another backup.")


class StateThereError(BackupError):
    """A backup is to be restored where there is a state."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"there is a state at {path}: nothing was restored. `--force` restores the backup in its place and keeps "
            "it aside; or name another folder with `--state`."
        )


class BackupOffset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a partition continues: the first offset that the backup does not include."""

    topic: str
    partition: int
    next_offset: int


class BackupManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a backup holds, and the hash of its data file."""

    format_version: int
    osmf_version: str
    layout_version: int
    created_at_ms: int
    offsets: list[BackupOffset]
    n_products: int
    n_creatives: int
    n_cells: int
    n_impressions: int
    n_clicks: int
    n_bytes: int
    sha256: str


class _ShardList(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shards whose backups lie in a folder."""

    format_version: int
    shards: list[int]


class _FormatVersion(msgspec.Struct):
    """The one field that every version of the manifest has."""

    format_version: int


def write_backups(path: Path, folder: Path, *, now_ms: int, osmf_version: str) -> dict[int, BackupManifest]:
    """Copy the last commit of each of a state's shards into a folder; see `write_backup`, whose arguments these are."""
    shards = shard_folders(path)
    if shards == {0: path}:
        return {0: write_backup(path, folder, now_ms=now_ms, osmf_version=osmf_version)}
    _check_target(path, folder)
    manifests = {
        number: write_backup(shard, shard_folder(folder, number), now_ms=now_ms, osmf_version=osmf_version)
        for number, shard in shards.items()
    }
    _write_json(folder, SHARD_LIST, _ShardList(format_version=FORMAT_VERSION, shards=sorted(shards)))
    return manifests


def write_backup(path: Path, folder: Path, *, now_ms: int, osmf_version: str) -> BackupManifest:
    """Copy a state's last commit into a folder, while it is being written or not.

    Until the copy is done, its writer cannot use pages again that it frees, so the state's file grows meanwhile.

    Parameters
    ----------
    path
        Folder of the state.
    folder
        Folder of the backup; missing or empty.
    now_ms
        The time of the backup.
    osmf_version
        Version of the program.

    Raises
    ------
    BackupTargetError
        ``folder`` has something in it, is no folder, lies in the state, or its disk is full. What was written of the
        backup is removed again.
    StateError
        The state cannot be read.
    """
    _check_target(path, folder)
    try:
        with Store(path, readonly=True) as store, system_errors(folder):
            return _write(store, folder, now_ms, osmf_version)
    except StateDiskError as error:
        raise BackupTargetError(folder, error.reason) from error


def _check_target(path: Path, folder: Path) -> None:
    inside, state = folder.resolve(), path.resolve()
    if inside == state or state in inside.parents:
        raise BackupTargetError(folder, f"it lies in the state at {path}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BackupTargetError(folder, "it is no empty folder")


def _write(store: Store, folder: Path, now_ms: int, osmf_version: str) -> BackupManifest:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        store.copy_to(folder / DATA_FILE)
        manifest = _describe(folder, now_ms, osmf_version)
        _write_json(folder, MANIFEST, manifest)
    except BaseException:
        for name in (DATA_FILE, LOCK_FILE, MANIFEST):
            (folder / name).unlink(missing_ok=True)
        raise
    return manifest


def _describe(folder: Path, now_ms: int, osmf_version: str) -> BackupManifest:
    """Return the manifest of a copy, read from the copy itself."""
    with Store(folder, readonly=True) as copy, open_view(copy) as view:
        cells, offsets = view.cells(), view.offsets()
        n_products, n_creatives = len(view.products()), len(view.creatives())
    (folder / LOCK_FILE).unlink()
    with (folder / DATA_FILE).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return BackupManifest(
        format_version=FORMAT_VERSION,
        osmf_version=osmf_version,
        layout_version=LAYOUT_VERSION,
        created_at_ms=now_ms,
        offsets=[
            BackupOffset(topic=topic, partition=partition, next_offset=record.next_offset)
            for (topic, partition), record in sorted(offsets.items())
        ],
        n_products=n_products,
        n_creatives=n_creatives,
        n_cells=len(cells),
        n_impressions=sum(cell.n_impressions for cell in cells),
        n_clicks=sum(cell.n_clicks for cell in cells),
        n_bytes=(folder / DATA_FILE).stat().st_size,
        sha256=sha256,
    )


def _write_json(folder: Path, name: str, content: msgspec.Struct) -> None:
    """Write a file that is there whole or not at all, after all else in its folder."""
    partial = folder / f"{name}.partial"
    try:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
        sync_file(partial)
        sync_file(folder)
        partial.rename(folder / name)
    finally:
        partial.unlink(missing_ok=True)
    sync_file(folder)
    sync_file(folder.parent)


def read_manifest(folder: Path) -> BackupManifest:
    """Return what a backup holds, by its manifest.

    Raises
    ------
    BackupMissingError
        There is no backup, or it was interrupted.
    BackupDamagedError
        The manifest cannot be read.
    StateLayoutError
        The backup is of another layout version.
    """
    with system_errors(folder):
        if not folder.is_dir():
            raise BackupMissingError(folder, "there is no such folder")
        try:
            text = (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise BackupMissingError(folder, f"it has no {MANIFEST}") from None
    try:
        version = msgspec.json.decode(text, type=_FormatVersion).format_version
        if version != FORMAT_VERSION:
            raise BackupDamagedError(folder, f"{MANIFEST} has format {version}, this program reads {FORMAT_VERSION}")
        manifest = msgspec.json.decode(text, type=BackupManifest)
    except msgspec.DecodeError as error:
        raise BackupDamagedError(folder, f"{MANIFEST} cannot be read ({error})") from error
    if manifest.layout_version != LAYOUT_VERSION:
        raise StateLayoutError(folder, str(manifest.layout_version), LAYOUT_VERSION)
    return manifest


def restore_backups(
    folder: Path, path: Path, *, now_ms: int, force: bool
) -> dict[int, tuple[BackupManifest, Path | None]]:
    """Put the backups of all shards at ``path``; see `restore_backup`, whose arguments these are.

    Every backup, and whether its shard may be replaced, is looked at before the first one is restored.
    """
    if not (folder / SHARD_LIST).exists():
        if list(folder.glob(f"*/{MANIFEST}")):
            raise BackupMissingError(folder, f"it holds backups of shards, but no {SHARD_LIST}")
        return {0: restore_backup(folder, path, now_ms=now_ms, force=force)}
    if (path / DATA_FILE).exists():
        raise StateThereError(path)
    try:
        shards = msgspec.json.decode((folder / SHARD_LIST).read_bytes(), type=_ShardList).shards
    except msgspec.DecodeError as error:
        raise BackupDamagedError(folder, f"{SHARD_LIST} cannot be read ({error})") from error
    for number in shards:
        read_manifest(shard_folder(folder, number))
        if not force and (shard_folder(path, number) / DATA_FILE).exists():
            raise StateThereError(shard_folder(path, number))
    return {
        number: restore_backup(shard_folder(folder, number), shard_folder(path, number), now_ms=now_ms, force=force)
        for number in shards
    }


def restore_backup(folder: Path, path: Path, *, now_ms: int, force: bool) -> tuple[BackupManifest, Path | None]:
    """Put a backup's state at ``path``; return its manifest, and where the former state is kept.

    The former state stays in place, whole, until the backup is copied and has proved to be what its manifest says.
    Processes that read the former state go on reading it until they are started again.

    Parameters
    ----------
    folder
        Folder of the backup.
    path
        Folder of the state; made when it is missing.
    now_ms
        The present, which names the folder in ``path`` that keeps the former state.
    force
        Whether to replace a state that is there.

    Raises
    ------
    BackupMissingError, BackupDamagedError, StateLayoutError
        The backup cannot be used.
    StateThereError
        There is a state at ``path``, and ``force`` is not set.
    StateLockedError
        A process has the state at ``path`` open for writing.
    """
    manifest = read_manifest(folder)
    with system_errors(path), WriterLock(path):
        is_there = (path / DATA_FILE).exists()
        if is_there and not force:
            raise StateThereError(path)
        try:
            _copy_checked(folder, path / NEXT_FILE, manifest)
            aside = _name_aside(path, now_ms) if is_there else None
            replace_data(path, aside)
        except BaseException:
            (path / NEXT_FILE).unlink(missing_ok=True)
            raise
    return manifest, aside


def _copy_checked(folder: Path, target: Path, manifest: BackupManifest) -> None:
    """Copy a backup's data file, and hold what was copied against the manifest."""
    sha256, n_bytes = hashlib.sha256(), 0
    try:
        source = (folder / DATA_FILE).open("rb")
    except FileNotFoundError:
        raise BackupDamagedError(folder, f"{DATA_FILE} is missing") from None
    with source, target.open("wb") as copy:
        while block := source.read(_BLOCK_BYTES):
            sha256.update(block)
            n_bytes += len(block)
            copy.write(block)
    if n_bytes != manifest.n_bytes:
        raise BackupDamagedError(folder, f"{DATA_FILE} has {n_bytes} bytes, the manifest says {manifest.n_bytes}")
    if sha256.hexdigest() != manifest.sha256:
        raise BackupDamagedError(folder, f"{DATA_FILE} has not the SHA-256 of the manifest")


def _name_aside(path: Path, now_ms: int) -> Path:
    return path / f"before-restore-{datetime.fromtimestamp(now_ms / 1000, UTC):%Y%m%dT%H%M%S.%fZ}"
