"""Artifacts: whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.artifact import (
    MANIFEST,
    ArtifactNameError,
    ArtifactStore,
    CorruptArtifactError,
    UnknownFileError,
)

ROOT = Path(__file__).resolve().parents[2]


def write(store, kind="gaip", content=b"rows", **figures):
    with store.write(kind, created_at_ms=1_000) as draft:
        draft.file("rows.bin").write_bytes(content)
        draft.file("pairs.bin").write_bytes(b"")
        draft.made_from = {"offsets": {"clicks/0": 9}}
        draft.figures = figures
    return draft.finished


def test_round_trip(tmp_path):
    store = ArtifactStore(tmp_path)
    written = write(store, n_rows=3.0)
    found = store.latest("gaip")
    assert found == written
    assert found.name == "gaip/v000001"
    assert found.manifest.version == 1
    assert found.manifest.created_at_ms == 1_000
    assert found.manifest.made_from == {"offsets": {"clicks/0": 9}}
    assert found.manifest.figures == {"n_rows": 3.0}
    assert sorted(found.manifest.files) == ["pairs.bin", "rows.bin"]
    assert found.file("rows.bin").read_bytes() == b"rows"
    found.verify()


def test_manifest_is_readable_json(tmp_path):
    path = write(ArtifactStore(tmp_path)).path
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["files"]["rows.bin"]["n_bytes"] == 4
    assert sorted(entry.name for entry in path.iterdir()) == [MANIFEST, "pairs.bin", "rows.bin"]


def test_versions_count_up_per_kind(tmp_path):
    store = ArtifactStore(tmp_path)
    assert store.latest("gaip") is None
    for _ in range(3):
        write(store)
    write(store, kind="model")
    assert (store.versions("gaip"), store.versions("model"), store.versions("other")) == ([1, 2, 3], [1], [])
    assert store.get("gaip", 2).manifest.version == 2
    assert store.get("gaip", 4) is None


def test_versions_sort_by_number_past_six_digits(tmp_path):
    store = ArtifactStore(tmp_path)
    (tmp_path / "gaip" / "v999999").mkdir(parents=True)
    write(store)
    write(store)
    assert store.versions("gaip") == [1_000_000, 1_000_001]
    assert store.latest("gaip").name == "gaip/v1000001"


def test_a_directory_without_a_manifest_is_invisible_and_its_number_spent(tmp_path):
    store = ArtifactStore(tmp_path)
    write(store)
    half = tmp_path / "gaip" / "v000002"
    half.mkdir()
    (half / "rows.bin").write_bytes(b"half")
    assert store.latest("gaip").manifest.version == 1
    assert store.get("gaip", 2) is None
    assert write(store).manifest.version == 3


def test_nothing_is_visible_before_the_end(tmp_path):
    store = ArtifactStore(tmp_path)
    with store.write("gaip", created_at_ms=1) as draft:
        draft.file("rows.bin").write_bytes(b"rows")
        assert store.latest("gaip") is None
        assert draft.finished is None
    assert store.latest("gaip") == draft.finished


class DiskFullError(Exception):
    pass


def test_an_error_leaves_nothing(tmp_path):
    store = ArtifactStore(tmp_path)

    def write_half() -> None:
        with store.write("gaip", created_at_ms=1) as draft:
            draft.file("rows.bin").write_bytes(b"rows")
            raise DiskFullError

    with pytest.raises(DiskFullError):
        write_half()
    assert list((tmp_path / "gaip").iterdir()) == []
    assert store.latest("gaip") is None


@pytest.mark.parametrize("moment", ["in the block", "before the manifest's rename"])
def test_a_killed_writer_leaves_nothing_readable(tmp_path, moment):
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from state.artifact import ArtifactStore
        root, moment = Path(sys.argv[1]), sys.argv[2]
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        with ArtifactStore(root).write("gaip", created_at_ms=1) as draft:
            draft.file("rows.bin").write_bytes(b"rows")
            if moment == "in the block":
                die()
            Path.replace = die
        """
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), moment], cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -9, killed.stderr
    store = ArtifactStore(tmp_path)
    assert (tmp_path / "gaip" / "v000001" / "rows.bin").exists()
    assert store.versions("gaip") == []
    assert store.latest("gaip") is None
    assert write(store).manifest.version == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"rowz"), "SHA-256"),
        (lambda path: path.write_bytes(b"row"), "has 3 bytes where the manifest says 4"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_damaged_content_is_refused(tmp_path, damage, message):
    artifact = write(ArtifactStore(tmp_path))
    damage(artifact.path / "rows.bin")
    with pytest.raises(CorruptArtifactError, match=message):
        artifact.file("rows.bin")
    with pytest.raises(CorruptArtifactError, match=r"rows\.bin"):
        artifact.verify()
    assert artifact.file("pairs.bin").read_bytes() == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not a manifest"),
        (lambda text: "", "not a manifest"),
        (
            lambda text: text.replace('"format_version": 1', '"format_version": 2, "new": 0'),
            "format_version is 2, this program reads 1",
        ),
        (lambda text: text.replace('"version": 1,', '"version": 7,'), "says gaip version 7"),
        (lambda text: text.replace('"kind": "gaip"', '"kind": "model"'), "says model version 1"),
        (lambda text: text.replace('"figures"', '"fingers"'), "not a manifest"),
    ],
)
def test_a_damaged_manifest_is_refused_and_not_passed_over(tmp_path, change, message):
    store = ArtifactStore(tmp_path)
    path = write(store).path / MANIFEST
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(CorruptArtifactError, match=message):
        store.latest("gaip")


def test_a_file_that_is_not_in_the_manifest_is_unknown(tmp_path):
    artifact = write(ArtifactStore(tmp_path))
    (artifact.path / "late.bin").write_bytes(b"")
    with pytest.raises(UnknownFileError, match=r"'late.bin'; it has pairs.bin, rows.bin"):
        artifact.file("late.bin")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "manifest.json", ".hidden", "/etc/x", ".."])
def test_names_that_leave_the_artifact_are_refused(tmp_path, name):
    store = ArtifactStore(tmp_path)
    with pytest.raises(ArtifactNameError), store.write("gaip", created_at_ms=1) as draft:
        draft.file(name)


@pytest.mark.parametrize("kind", ["", "../x", "A", "a/b", "a b"])
def test_kinds_that_are_no_names_are_refused(tmp_path, kind):
    with pytest.raises(ArtifactNameError), ArtifactStore(tmp_path).write(kind, created_at_ms=1):
        pytest.fail("the block must not run")


def test_prune_keeps_the_newest_and_clears_what_was_left_behind(tmp_path):
    store = ArtifactStore(tmp_path)
    write(store)
    (tmp_path / "gaip" / "v000002").mkdir()  # a killed writer's
    for _ in range(3):
        write(store)  # 3, 4, 5
    (tmp_path / "gaip" / "v000006").mkdir()  # a writer's at work
    assert store.prune("gaip", 2) == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "gaip").iterdir()) == ["v000004", "v000005", "v000006"]
    assert store.prune("gaip", 2) == []
    assert store.prune("nothing", 2) == []


def test_writers_at_the_same_time_get_numbers_of_their_own(tmp_path):
    store = ArtifactStore(tmp_path)
    barrier = threading.Barrier(4)

    def write_five():
        barrier.wait()
        for _ in range(5):
            write(store)

    threads = [threading.Thread(target=write_five) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.versions("gaip") == list(range(1, 21))


@given(content=st.binary(min_size=1, max_size=200), place=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_any_flipped_bit_is_found(tmp_path_factory, content, place, bit):
    artifact = write(ArtifactStore(tmp_path_factory.mktemp("artifacts")), content=content)
    path = artifact.path / "rows.bin"
    flipped = bytearray(content)
    flipped[place % len(content)] ^= 1 << bit
    path.write_bytes(flipped)
    with pytest.raises(CorruptArtifactError):
        artifact.file("rows.bin")


def test_files_are_synced_before_the_manifest(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.readlink(f"/proc/self/fd/{descriptor}")), sync(descriptor))
    )
    path = write(ArtifactStore(tmp_path)).path
    names = [Path(name).name for name in synced]
    assert names.index("rows.bin") < names.index(f".{MANIFEST}")
    assert synced[-1] == str(path.parent)
