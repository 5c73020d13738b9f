"""Label: what a creative's file says of itself, and whether it is as it was published."""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError
from rich.table import Table

from generator.manifest import Manifest, ManifestUnreadable, read_manifest
from generator.storage import (
    ImageTampered,
    ImageUnreadable,
    MetadataValue,
    check_name,
    fetch_bytes,
    read_metadata,
    read_source_type,
)
from osmf.figures import Figures, commit, device


@dataclass(frozen=True)
class Label:
    """What a file says of itself.

    Parameters
    ----------
    uri, sha256
        The file, and its SHA-256.
    source_type
        IPTC's digital source type in its XMP; None where it has none.
    record
        Our record in its XMP: how the picture was made. Empty for other people's files.
    manifest
        Its C2PA manifest; None where it has none, or none that can be read.
    problems
        Why not to believe the file; empty if all holds.
    """

    uri: str
    sha256: str
    source_type: str | None
    record: dict[str, MetadataValue]
    manifest: Manifest | None
    problems: tuple[str, ...]


def read_label(uri: str, *, anchors: bytes, signed: bool = True) -> Label:
    """Read a file's label and verify it.

    Parameters
    ----------
    uri
        A path or an fsspec URL.
    anchors
        Certificates, PEM, whose signatures are trusted.
    signed
        Whether a file without a manifest is suspicious: it is where files are signed.

    Raises
    ------
    generator.storage.ImageUnreadable
        There is no such file, or it is no picture.
    """
    payload = fetch_bytes(uri)
    problems: list[str] = []
    try:
        check_name(uri, payload)
    except ImageTampered as error:
        problems.append(str(error))
    record, source_type = read_metadata(payload), read_source_type(payload)
    if not record or source_type is None:
        problems.append(f"{uri} does not say how it was made: its XMP label was taken out, or it never had one.")
    manifest = None
    try:
        manifest = read_manifest(payload, _media_type(uri, payload), anchors=anchors)
    except ManifestUnreadable as error:
        problems.append(f"{uri}: {error}.")
    else:
        problems += _doubts(uri, manifest, signed=signed)
    return Label(uri, hashlib.sha256(payload).hexdigest(), source_type, record, manifest, tuple(problems))


def _doubts(uri: str, manifest: Manifest | None, *, signed: bool) -> list[str]:
    if manifest is None:
        return [f"{uri} has no C2PA manifest: nobody vouches for its label."] if signed else []
    if manifest.state == "invalid":
        return [f"{uri} is not what was signed: {'; '.join(manifest.problems)}."]
    if manifest.state == "untrusted":
        return [
            f"{uri} was signed by {manifest.signer!r}, whom neither our certificate nor "
            "generator.signing.trust_anchors vouches for."
        ]
    return []


def _media_type(uri: str, payload: bytes) -> str:
    try:
        with Image.open(io.BytesIO(payload)) as image:
            media_type = image.get_format_mimetype()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageUnreadable(uri, str(error)) from error
    if media_type is None:
        raise ImageUnreadable(uri, "its format has no media type")
    return str(media_type)


def label_figures(label: Label) -> Figures:
    """Return a label as figures; ``is_genuine`` is 1 if nothing speaks against the file."""
    manifest = label.manifest
    return Figures(
        command="creative show",
        commit=commit(),
        seeds={},
        device=device(),
        seconds=time.process_time(),
        metrics={"is_genuine": int(not label.problems)},
        detail={
            "file": label.uri,
            "sha256": label.sha256,
            "digital_source_type": label.source_type,
            "record": label.record,
            "manifest": None
            if manifest is None
            else {
                "state": manifest.state,
                "signer": manifest.signer,
                "algorithm": manifest.algorithm,
                "actions": list(manifest.actions),
                "record": manifest.record,
                "problems": list(manifest.problems),
            },
            "problems": list(label.problems),
        },
    )


def label_table(label: Label) -> Table:
    """Return a label as a table for people."""
    table = Table(header_style="dim", title=label.uri, title_justify="left", title_style="bold")
    table.add_column("what it says")
    table.add_column("", overflow="fold")
    table.add_row("digital source type (IPTC)", label.source_type or "nothing")
    for name, value in label.record.items():
        table.add_row(name, "none" if value is None else str(value))
    manifest = label.manifest
    table.add_section()
    if manifest is None:
        table.add_row("C2PA manifest", "none")
    else:
        table.add_row("C2PA manifest", manifest.state)
        table.add_row("signed by", f"{manifest.signer} ({manifest.algorithm})")
        for action in manifest.actions:
            table.add_row("action", action)
        table.add_row("of product and group", f"{manifest.record.get('product_id')}, {manifest.record.get('group_id')}")
        table.add_row("prompt's SHA-256", str(manifest.record.get("prompt_sha256")))
    table.add_row("SHA-256 of the file", label.sha256)
    return table
