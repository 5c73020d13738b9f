"""The store keeps a picture once, whole, labelled, and finds a changed one."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from generator.procedural import ProceduralRenderer
from generator.settings import GeneratorSettings
from generator.storage import (
    ImageStore,
    ImageTampered,
    ImageUnreadable,
    MetadataValue,
    local_path,
    metadata_of,
    read_metadata,
)
from tests.generator.stored import put

PROMPT = 'sunlit beach for a "bag" & <b>\x00\u202e emoji 🌊, ünïcode'
METADATA: dict[str, MetadataValue] = {
    "prompt": PROMPT,
    "seed": 7,
    "renderer": "procedural",
    "version": "1",
    "product_id": "p-1",
    "group_id": None,
}


def picture(seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_put_is_content_addressed_labelled_and_idempotent(tmp_path: Path, image_format: str) -> None:
    settings = GeneratorSettings(storage_url=str(tmp_path / "a b"), image_format=image_format)
    store = ImageStore.of(settings, None)
    stored = put(store, picture(), METADATA)
    (path,) = files(tmp_path)
    payload = path.read_bytes()
    assert hashlib.sha256(payload).hexdigest() == stored.sha256 == path.stem
    assert payload == stored.payload
    assert stored.uri == path.as_uri()
    assert stored.media_type == f"image/{image_format}"
    before = path.stat().st_mtime_ns
    assert put(store, picture(), METADATA) == stored
    assert files(tmp_path) == [path]
    assert path.stat().st_mtime_ns == before
    assert read_metadata(payload) == METADATA
    assert b"digitalsourcetype/compositeSynthetic" in payload
    assert b"AI-generated" in payload
    opened = store.open(stored.uri)
    assert (opened.mode, opened.size) == ("RGB", (96, 96))
    difference = np.abs(np.asarray(opened, dtype=np.int16) - np.asarray(picture(), dtype=np.int16)).mean()
    assert difference < (4 if image_format == "jpeg" else 0.001)


def test_other_pictures_and_other_labels_are_other_files(tmp_path: Path) -> None:
    store = ImageStore(str(tmp_path))
    names = {put(store, picture(0), METADATA).sha256, put(store, picture(1), METADATA).sha256}
    names.add(put(store, picture(0), {**METADATA, "seed": 8}).sha256)
    assert len(names) == len(files(tmp_path)) == 3


def test_a_tampered_file_is_reported(tmp_path: Path) -> None:
    store = ImageStore(str(tmp_path))
    stored = put(store, picture(), METADATA)
    path = local_path(stored.uri)
    assert path is not None
    payload = bytearray(path.read_bytes())
    payload[-10] ^= 1
    path.write_bytes(payload)
    for read in (store.read, store.open, lambda uri: store.thumbnail(uri, 32)):
        with pytest.raises(ImageTampered, match="changed or damaged"):
            read(stored.uri)


def test_a_file_cut_short_is_written_again(tmp_path: Path) -> None:
    store = ImageStore(str(tmp_path))
    stored = put(store, picture(), METADATA)
    path = local_path(stored.uri)
    assert path is not None
    path.write_bytes(path.read_bytes()[:100])
    assert put(store, picture(), METADATA) == stored
    store.open(stored.uri)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        put(ImageStore(str(tmp_path)), picture(), METADATA)
    assert files(tmp_path) == []


def test_fsspec_urls_work_like_folders() -> None:
    store = ImageStore("memory://creatives-test/x")
    stored = put(store, picture(), METADATA)
    assert stored.uri == f"memory://creatives-test/x/{stored.sha256[:2]}/{stored.sha256}.jpg"
    assert put(store, picture(), METADATA) == stored
    assert store.open(stored.uri).size == (96, 96)
    assert read_metadata(store.read(stored.uri)) == METADATA


def test_plain_paths_and_missing_or_wrong_files(tmp_path: Path) -> None:
    store = ImageStore(str(tmp_path))
    plain = tmp_path / "product.png"
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(plain)
    small = Image.open(io.BytesIO(store.thumbnail(str(plain), 10)))
    assert small.size == (10, 5)
    assert small.getpixel((5, 2)) == (255, 255, 255)
    assert read_metadata(plain.read_bytes()) == {}
    with pytest.raises(ImageUnreadable):
        store.open(str(tmp_path / "none.png"))
    with pytest.raises(ImageUnreadable):
        store.open("memory://nowhere/none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageUnreadable):
        store.open((tmp_path / "text.png").as_uri())


def test_a_rendered_creative_is_small_enough_for_a_report(tmp_path: Path) -> None:
    cutout = Image.new("RGBA", (60, 60), (0, 90, 200, 255))
    rendering = ProceduralRenderer().render(cutout, "flower meadow with confetti, centred", seed=1, size_px=512)
    stored = put(ImageStore(str(tmp_path)), rendering.image, metadata_of(rendering.provenance, product_id="p-1"))
    assert len(stored.payload) <= 80_000
    assert read_metadata(ImageStore(str(tmp_path)).read(stored.uri))["seed"] == 1
    assert len(ImageStore(str(tmp_path)).thumbnail(stored.uri, 160)) < 12_000


def test_a_file_is_kept_in_the_format_that_it_has(tmp_path: Path) -> None:
    as_png = ImageStore(str(tmp_path), image_format="png").encode(picture(), METADATA)
    stored = ImageStore(str(tmp_path), image_format="jpeg").prepare(as_png, METADATA)
    assert (stored.uri[-4:], stored.media_type) == (".png", "image/png")
