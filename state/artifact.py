"""Artifacts: versioned directories that are whole or not there.

A version is a directory ``ROOT/KIND/v000001``. Its ``manifest.json`` names every file with its SHA-256 and
is written last, by an atomic rename. A directory without one is a writer at work or one that was killed, and no
reader sees it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from state.files import sync_file

MANIFEST = "manifest.json"

FORMAT_VERSION = 1
"""Version of the manifest's layout; another one is refused."""

_KIND = re.compile(r"[a-z][a-z0-9-]{0,62}")
_VERSION = re.compile(r"v(\d{6,})")


class ArtifactError(RuntimeError):
    """An artifact cannot be written or used as it is."""


class CorruptArtifactError(ArtifactError):
    """What lies on disk is not what the manifest says."""

    def __init__(self, path: Path, trouble: str) -> None:
        super().__init__(
            f"{path} is corrupt: {trouble}. Nothing was read from it. "
            "Restore the file, or remove the artifact's directory to go back to the version before it."
        )
        self.path = path


class UnknownFileError(ArtifactError):
    """A file that the artifact does not have."""

    def __init__(self, path: Path, name: str, known: list[str]) -> None:
        super().__init__(f"{path} has no file {name!r}; it has {', '.join(sorted(known)) or 'none'}. Nothing was read.")


class ArtifactNameError(ValueError):
    """A kind of artifact, or a file in one, with a name that is not allowed."""

    def __init__(self, what: str, name: str, allowed: str) -> None:
        super().__init__(f"{what} is {name!r}; allowed is {allowed}. Nothing was written.")


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of an artifact: its size and the hash of its content."""

    n_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an artifact is: its files, what it was made from, and figures about it.

    ``made_from`` names the sources, such as the offsets that a snapshot includes; ``figures`` are numbers
    worth reading without opening a file.
    """

    format_version: int
    kind: str
    version: int
    created_at_ms: int
    made_from: dict[str, Any]
    figures: dict[str, float]
    files: dict[str, FileEntry]


class _FormatVersion(msgspec.Struct):
    """The one field that every version of the manifest has."""

    format_version: int


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """Kind and version, as ``gaip/v000001``."""
        return f"{self.manifest.kind}/{self.path.name}"

    def file(self, name: str) -> Path:
        """Return the path of one file, after its content was checked against the manifest.

        Raises
        ------
        UnknownFileError
            If the artifact has no such file.
        CorruptArtifactError
            If the file is missing, or its size or hash is another.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise UnknownFileError(self.path, name, list(self.manifest.files))
        path = self.path / name
        try:
            n_bytes = path.stat().st_size
        except FileNotFoundError:
            raise CorruptArtifactError(path, "the manifest names it, but it is missing") from None
        if n_bytes != entry.n_bytes:
            raise CorruptArtifactError(path, f"it has {n_bytes} bytes where the manifest says {entry.n_bytes}")
        found = _sha256(path)
        if found != entry.sha256:
            raise CorruptArtifactError(path, f"its SHA-256 is {found} where the manifest says {entry.sha256}")
        return path

    def verify(self) -> None:
        """Check every file; raise `CorruptArtifactError` at the first that is not as the manifest says."""
        for name in self.manifest.files:
            self.file(name)


class ArtifactDraft:
    """An artifact being written: put files into ``path``, and say what they were made from."""

    def __init__(self, path: Path, kind: str, version: int) -> None:
        self.path = path
        self.kind = kind
        self.version = version
        self.made_from: dict[str, Any] = {}
        self.figures: dict[str, float] = {}
        self.finished: Artifact | None = None

    def file(self, name: str) -> Path:
        """Return where to write the file ``name``."""
        if not name or name == MANIFEST or Path(name).name != name or name.startswith("."):
            raise ArtifactNameError("a file's name", name, f"a plain file name, not {MANIFEST} and not hidden")
        return self.path / name


class ArtifactStore:
    """All artifacts under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def write(self, kind: str, *, created_at_ms: int) -> Iterator[ArtifactDraft]:
        """Write the next version of ``kind``; it exists for readers once the block has ended without an error.

        The version's number is claimed by making its directory, so that two writers never share one. After an
        error the directory is removed. After the block, ``draft.finished`` is the artifact.
        """
        draft = self._claim(kind)
        try:
            yield draft
            draft.finished = _finish(draft, created_at_ms)
        except BaseException:
            shutil.rmtree(draft.path, ignore_errors=True)
            raise

    def versions(self, kind: str) -> list[int]:
        """Return the numbers of the complete versions, oldest first."""
        return [number for number, path in self._directories(kind) if (path / MANIFEST).is_file()]

    def get(self, kind: str, version: int) -> Artifact | None:
        """Return one version, or None where it does not exist or is not complete."""
        path = self._path(kind, version)
        try:
            content = (path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Artifact(path, _read_manifest(path, content, kind, version))

    def named(self, name: str) -> Artifact | None:
        """Return the artifact of a name such as ``gaip/v000001``, or None where it does not exist or is not complete.

        Raises
        ------
        ArtifactNameError
            If it is no such name.
        """
        kind, _, version = name.partition("/")
        match = _VERSION.fullmatch(version)
        if match is None or not _KIND.fullmatch(kind):
            raise ArtifactNameError("an artifact's name", name, "a kind and a version, such as gaip/v000001")
        return self.get(kind, int(match[1]))

    def latest(self, kind: str, fits: Callable[[Artifact], bool] = lambda _: True) -> Artifact | None:
        """Return the newest complete version that ``fits``, or None where there is none.

        Raises
        ------
        CorruptArtifactError
            If its manifest cannot be read: an older version is never passed off as the newest.
        """
        for version in reversed(self.versions(kind)):
            found = self.get(kind, version)
            if found is not None and fits(found):  # None: it was pruned in between
                return found
        return None

    def prune(self, kind: str, keep: int, *, in_use: Collection[str] = ()) -> list[int]:
        """Remove all but the newest ``keep`` complete versions, and what killed writers left before those.

        Artifacts whose names are ``in_use`` stay. A manifest goes first, so that no reader meets half an artifact.
        Returns the numbers removed.
        """
        kept = self.versions(kind)[-keep:]
        if not kept:
            return []
        removed = []
        for number, path in self._directories(kind):
            if number < kept[0] and f"{kind}/{path.name}" not in in_use:
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(number)
        return removed

    def _claim(self, kind: str) -> ArtifactDraft:
        if not _KIND.fullmatch(kind):
            raise ArtifactNameError("an artifact's kind", kind, "lower-case letters, digits and hyphens")
        (self.root / kind).mkdir(parents=True, exist_ok=True)
        while True:
            version = max((number for number, _ in self._directories(kind)), default=0) + 1
            path = self._path(kind, version)
            try:
                path.mkdir()
            except FileExistsError:  # another writer was quicker
                continue
            return ArtifactDraft(path, kind, version)

    def _path(self, kind: str, version: int) -> Path:
        return self.root / kind / f"v{version:06d}"

    def _directories(self, kind: str) -> list[tuple[int, Path]]:
        try:
            entries = list((self.root / kind).iterdir())
        except FileNotFoundError:
            return []
        matches = [(_VERSION.fullmatch(entry.name), entry) for entry in entries]
        return sorted((int(match[1]), entry) for match, entry in matches if match is not None)


def _finish(draft: ArtifactDraft, created_at_ms: int) -> Artifact:
    """Hash and sync the files, then make the artifact visible by its manifest."""
    files = {}
    for path in sorted(draft.path.iterdir()):
        sync_file(path)
        files[path.name] = FileEntry(n_bytes=path.stat().st_size, sha256=_sha256(path))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        kind=draft.kind,
        version=draft.version,
        created_at_ms=created_at_ms,
        made_from=draft.made_from,
        figures=draft.figures,
        files=files,
    )
    unnamed = draft.path / f".{MANIFEST}"
    unnamed.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    sync_file(unnamed)
    sync_file(draft.path)
    unnamed.replace(draft.path / MANIFEST)
    sync_file(draft.path)
    sync_file(draft.path.parent)
    return Artifact(draft.path, manifest)


def _read_manifest(path: Path, content: bytes, kind: str, version: int) -> Manifest:
    manifest_path = path / MANIFEST
    try:
        # Alone first: another version may have other fields.
        found = msgspec.json.decode(content, type=_FormatVersion).format_version
        if found != FORMAT_VERSION:
            raise CorruptArtifactError(
                manifest_path, f"its format_version is {found}, this program reads {FORMAT_VERSION}"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptArtifactError(manifest_path, f"it is not a manifest ({error})") from error
    if (manifest.kind, manifest.version) != (kind, version):
        raise CorruptArtifactError(
            manifest_path, f"it says {manifest.kind} version {manifest.version} where {kind} version {version} lies"
        )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
