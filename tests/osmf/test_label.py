"""Whatever was changed in a creative's file, its label is read without a crash, and the change is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from generator.certificate import load_identity
from generator.jumbf import without_manifest
from generator.manifest import ManifestSigner
from generator.settings import SigningSettings
from generator.storage import ImageStore, ImageUnreadable, MetadataValue, local_path
from osmf.label import read_label
from tests.generator.stored import put

METADATA: dict[str, MetadataValue] = {
    "creative_id": "gen-1",
    "product_id": "p-1",
    "group_id": 3,
    "prompt": "a <b> prompt",
}


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_every_change_is_told(tmp_path: Path, image_format: str) -> None:
    identity = load_identity(SigningSettings(folder=tmp_path / "signing"), now_ms=time.time_ns() // 1_000_000)
    assert identity is not None
    store = ImageStore(str(tmp_path), image_format=image_format, signer=ManifestSigner(identity))
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    path = local_path(put(store, image, METADATA).uri)
    assert path is not None
    whole = path.read_bytes()
    assert read_label(str(path), anchors=identity.anchors).problems == ()
    n_told = 0
    for at in range(0, len(whole), 23):
        changed = bytearray(whole)
        changed[at] ^= 0x15
        path.write_bytes(changed)
        try:
            label = read_label(str(path), anchors=identity.anchors)
        except ImageUnreadable:
            n_told += 1
            continue
        n_told += bool(label.problems)
        # Some bytes of the manifest's boxes mean nothing.
        assert label.problems or without_manifest(bytes(changed)) == without_manifest(whole), at
    assert n_told > 50


@pytest.mark.parametrize("record", ['{"a": ', "[1]", "7", "null"])
def test_a_record_that_is_none_is_no_label(tmp_path: Path, record: str) -> None:
    store = ImageStore(str(tmp_path))
    payload = store.encode(Image.new("RGB", (16, 16)), {})
    path = tmp_path / "picture.jpg"
    path.write_bytes(payload.replace(b">{}<", f">{record}<".encode()))
    label = read_label(str(path), anchors=b"", signed=False)
    assert label.record == {}
    assert any("does not say how it was made" in problem for problem in label.problems)
