"""JUMBF: where JPEG and PNG files carry a C2PA manifest, and a file's bytes without it.

Taking the manifest out gives back the very file that was signed: so a signed file can be held against the
hash of what was signed, without knowing anything of signatures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_JPEG: Final = b"\xff\xd8"
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_APP11: Final = 0xEB
_SCAN: Final = 0xDA
_STANDALONE: Final = frozenset([0x01, *range(0xD0, 0xD9)])
_PNG_MANIFEST: Final = b"caBX"


def without_manifest(payload: bytes) -> bytes:
    """Return a picture's file without its C2PA manifest; one that has none, or is of another format, as it is."""
    if payload.startswith(_JPEG):
        parts = _jpeg_segments(payload)
    elif payload.startswith(_PNG):
        parts = _png_chunks(payload)
    else:
        return payload
    return b"".join(payload[start:end] for start, end, is_manifest in parts if not is_manifest)


def _jpeg_segments(payload: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether it is part of a manifest) of a JPEG's segments up to the scan, then of the rest."""
    yield 0, 2, False
    at = 2
    while at + 4 <= len(payload) and payload[at] == 0xFF and payload[at + 1] != _SCAN:
        marker = payload[at + 1]
        length = 0 if marker in _STANDALONE else int.from_bytes(payload[at + 2 : at + 4])
        end = at + 2 + length
        # Boxes in APP11 begin with JP; of what writes pictures here only C2PA puts some there.
        yield at, end, marker == _APP11 and payload[at + 4 : at + 6] == b"JP"
        at = end
    yield at, len(payload), False


def _png_chunks(payload: bytes) -> Iterator[tuple[int, int, bool]]:
    yield 0, len(_PNG), False
    at = len(_PNG)
    while at + 12 <= len(payload):
        end = at + 12 + int.from_bytes(payload[at : at + 4])
        yield at, end, payload[at + 4 : at + 8] == _PNG_MANIFEST
        at = end
    yield at, len(payload), False
