"""Pictures in a store, as the worker puts them there."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from generator.storage import ImageFile, ImageStore, MetadataValue, write_bytes


def put(store: ImageStore, image: Image.Image | bytes, metadata: Mapping[str, MetadataValue]) -> ImageFile:
    """Encode a picture, unless it is encoded already, prepare its file and write it."""
    payload = image if isinstance(image, bytes) else store.encode(image, metadata)
    file = store.prepare(payload, metadata)
    write_bytes(file.uri, file.payload)
    return file
