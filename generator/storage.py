"""Storage of pictures: content-addressed, written whole or not at all, labelled as machine-made.

A picture's name is the SHA-256 of its file without the C2PA manifest. A manifest holds random salts, so a name that
counted it in would differ each time that a shift is worked off again; like this the same picture is kept once, a retry
changes nothing, and a changed picture is found when it is read. (A changed manifest is found by its
signature.) The label is XMP inside the file: IPTC's digital source type and AI fields for other
people's readers, and our own record (prompt, seed, renderer) as JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, Protocol
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import fsspec
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from generator.jumbf import without_manifest
from generator.renderer import Provenance
from generator.settings import GeneratorSettings

MetadataValue = str | int | float | bool | None

DEFAULT_SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeSynthetic"
"""IPTC's term for a picture that was put together, partly by a machine."""

_MEDIA_TYPES: Final = {"jpeg": "image/jpeg", "png": "image/png"}
_SUFFIXES: Final = {"jpeg": ".jpg", "png": ".png"}
_OWN_NAMESPACE: Final = "urn:osmf:creative:1.0:"
_IPTC_NAMESPACE: Final = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_NOT_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SHA256_NAME: Final = re.compile(r"^([0-9a-f]{64})\.\w+$")


class ImageTampered(RuntimeError):
    """A stored file whose bytes are not those that its name promises."""

    def __init__(self, uri: str, expected: str, found: str) -> None:
        super().__init__(
            f"{uri} has SHA-256 {found} (without its manifest), its name says {expected}: the file was changed or "
            "damaged. It is not used; restore it from a backup, or render it again from its provenance."
        )
        self.uri = uri


class ImageUnreadable(RuntimeError):
    """A file that isn't there, or that isn't a picture."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{uri} cannot be read as a picture ({reason}). It is not used.")
        self.uri = uri


@dataclass(frozen=True)
class ImageFile:
    """A picture's file, signed, and the place where it belongs."""

    uri: str
    payload: bytes
    media_type: str

    @property
    def sha256(self) -> str:
        """SHA-256 of all that is in the file, in hexadecimal; its name is that of the file without its manifest."""
        return hashlib.sha256(self.payload).hexdigest()


class FileSigner(Protocol):
    """Puts a signed manifest into a file; :class:`generator.manifest.ManifestSigner` is one."""

    def sign(self, payload: bytes, media_type: str, metadata: Mapping[str, MetadataValue]) -> bytes:
        """Return the file with a manifest that says what ``metadata`` says."""
        ...


def metadata_of(provenance: Provenance, **more: MetadataValue) -> dict[str, MetadataValue]:
    """Return a provenance as metadata for :meth:`ImageStore.prepare`, with more entries such as ``product_id``."""
    return {**asdict(provenance), **more}


def encode(
    image: Image.Image,
    metadata: Mapping[str, MetadataValue],
    *,
    image_format: Literal["jpeg", "png"],
    jpeg_quality: int,
) -> bytes:
    """Return a picture's file with its label; the same arguments give the same bytes."""
    rgb = image.convert("RGB")
    packet = _xmp(metadata)
    out = io.BytesIO()
    if image_format == "jpeg":
        rgb.save(out, "JPEG", quality=jpeg_quality, optimize=True, progressive=True, xmp=packet)
    else:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        info.add_text("Description", "AI-generated")
        for name, value in metadata.items():
            info.add_itxt(f"osmf:{name}", json.dumps(value))
        rgb.save(out, "PNG", optimize=True, pnginfo=info)
    return out.getvalue()


def read_metadata(payload: bytes) -> dict[str, MetadataValue]:
    """Return our record from a file's label; empty for a picture that we didn't write, or whose record is damaged."""
    root = _read_xmp(payload)
    text = None if root is None else root.findtext(f".//{{{_OWN_NAMESPACE}}}record")
    try:
        record = json.loads(text or "{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def read_source_type(payload: bytes) -> str | None:
    """Return IPTC's digital source type from a file's label; None where it has none."""
    root = _read_xmp(payload)
    return None if root is None else root.findtext(f".//{{{_IPTC_NAMESPACE}}}DigitalSourceType")


def _read_xmp(payload: bytes) -> ElementTree.Element | None:
    try:
        with Image.open(io.BytesIO(payload)) as image:
            packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageUnreadable("the file", str(error)) from error
    if packet is None:
        return None
    text = packet if isinstance(packet, str) else bytes(packet).decode("utf-8", errors="replace")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # never part of XMP, and the way to blow a parser up
        return None
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None


def _xmp(metadata: Mapping[str, MetadataValue]) -> bytes:
    def text(name: str, default: str = "") -> str:
        value = metadata.get(name)
        return escape(_NOT_XML.sub("", default if value is None else str(value)))

    record = escape(json.dumps(dict(metadata), sort_keys=True))
    source_type = text("digital_source_type", DEFAULT_SOURCE_TYPE)
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{_IPTC_NAMESPACE}" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        f'xmlns:osmf="{_OWN_NAMESPACE}">'
        f"<Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>"
        f"<Iptc4xmpExt:AISystemUsed>OSMF {text('renderer', 'unknown')}</Iptc4xmpExt:AISystemUsed>"
        f"<Iptc4xmpExt:AISystemVersionUsed>{text('version', 'unknown')}</Iptc4xmpExt:AISystemVersionUsed>"
        f"<Iptc4xmpExt:AIPromptInformation>{text('prompt')}</Iptc4xmpExt:AIPromptInformation>"
        "<xmp:CreatorTool>OSMF</xmp:CreatorTool>"
        '<dc:description><rdf:Alt><rdf:li xml:lang="x-default">AI-generated</rdf:li></rdf:Alt></dc:description>'
        f"<osmf:record>{record}</osmf:record>"
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def local_path(uri: str) -> Path | None:
    """Return the path of a ``file:`` URI or of a plain path, or None for a URI of another scheme."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if len(parts.scheme) <= 1 else None  # one letter: a Windows drive


def fetch_bytes(uri: str) -> bytes:
    """Read a file by URI or path, whatever is in it.

    Raises
    ------
    ImageUnreadable
        When there is no such file.
    """
    path = local_path(uri)
    try:
        if path is not None:
            payload = path.read_bytes()
        else:
            filesystem, remote = fsspec.core.url_to_fs(uri)
            payload = bytes(filesystem.cat_file(remote))
    except OSError as error:
        raise ImageUnreadable(uri, str(error)) from error
    return payload


def read_bytes(uri: str) -> bytes:
    """Read a file by URI or path; one with a content-addressed name is checked against it.

    Raises
    ------
    ImageUnreadable
        When there is no such file.
    ImageTampered
        When its bytes are not those that the name promises.
    """
    payload = fetch_bytes(uri)
    check_name(uri, payload)
    return payload


def check_name(uri: str, payload: bytes) -> None:
    """Hold a file against its content-addressed name; any other name promises nothing.

    Raises
    ------
    ImageTampered
        When its bytes are not those that the name promises.
    """
    named = _SHA256_NAME.match(uri.rsplit("/", 1)[-1])
    if named is not None:
        found = content_sha256(payload)
        if found != named[1]:
            raise ImageTampered(uri, named[1], found)


def content_sha256(payload: bytes) -> str:
    """Return the SHA-256 of a picture's file without its C2PA manifest, in hexadecimal: what its name promises."""
    return hashlib.sha256(without_manifest(payload)).hexdigest()


def open_image(uri: str) -> Image.Image:
    """Open a picture by URI or path, decoded and checked as in :func:`read_bytes`."""
    payload = read_bytes(uri)
    try:
        image = Image.open(io.BytesIO(payload))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageUnreadable(uri, str(error)) from error
    return image


def thumbnail(uri: str, size_px: int, *, jpeg_quality: int = 82) -> bytes:
    """Return a small JPEG of a picture, at most ``size_px`` on a side; transparency becomes white."""
    image = open_image(uri)
    if image.mode != "RGB":
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, (255, 255, 255))
        image.paste(rgba, mask=rgba.getchannel("A"))
    image.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=jpeg_quality, optimize=True)
    return out.getvalue()


class ImageStore:
    """Pictures under one root: a local folder or any fsspec URL.

    Files lie at ``<root>/<first two digits>/<content_sha256>.<suffix>``. What is prepared here is written by
    :func:`write_bytes`.

    Parameters
    ----------
    root:
        Local path, ``file:`` URL, or fsspec URL.
    image_format, jpeg_quality:
        How pictures are encoded.
    signer:
        Signs what belongs there; None: files are labelled in XMP only.
    """

    def __init__(
        self,
        root: str,
        *,
        image_format: Literal["jpeg", "png"] = "jpeg",
        jpeg_quality: int = 88,
        signer: FileSigner | None = None,
    ) -> None:
        self._root = root.rstrip("/") or "/"
        self._folder = local_path(self._root)
        self._image_format: Literal["jpeg", "png"] = image_format
        self._jpeg_quality = jpeg_quality
        self._signer = signer

    @classmethod
    def of(cls, settings: GeneratorSettings, signer: FileSigner | None) -> ImageStore:
        """Return the store of published pictures that the settings name."""
        return cls(
            settings.storage_url,
            image_format=settings.image_format,
            jpeg_quality=settings.jpeg_quality,
            signer=signer,
        )

    @classmethod
    def of_review(cls, settings: GeneratorSettings) -> ImageStore:
        """Return the store of pictures that are not published: nobody has signed them."""
        return cls(settings.review_url, image_format=settings.image_format, jpeg_quality=settings.jpeg_quality)

    def encode(self, image: Image.Image, metadata: Mapping[str, MetadataValue]) -> bytes:
        """Return a picture's file with its label, as :meth:`prepare` takes it."""
        return encode(image, metadata, image_format=self._image_format, jpeg_quality=self._jpeg_quality)

    def prepare(self, payload: bytes, metadata: Mapping[str, MetadataValue]) -> ImageFile:
        """Sign a picture's file and say where it belongs; nothing is written.

        A signature is salted. Where the same picture lies already, and whole, its file is returned as it is: an event
        may have named it by its hash.

        Parameters
        ----------
        payload:
            What :meth:`encode` has given.
        metadata:
            How the picture was made, for the manifest.
        """
        digest = hashlib.sha256(payload).hexdigest()
        image_format = "png" if payload.startswith(b"\x89PNG") else "jpeg"  # what waits may be older than the settings
        name = f"{digest[:2]}/{digest}{_SUFFIXES[image_format]}"
        media_type = _MEDIA_TYPES[image_format]
        uri = f"{self._root}/{name}" if self._folder is None else (self._folder / name).resolve().as_uri()
        try:
            kept = read_bytes(uri)
        except (ImageUnreadable, ImageTampered):  # not there, or cut short by a full disk
            kept = payload if self._signer is None else self._signer.sign(payload, media_type, metadata)
        return ImageFile(uri, kept, media_type)

    def open(self, uri: str) -> Image.Image:
        """Open a picture; see :func:`open_image`."""
        return open_image(uri)

    def read(self, uri: str) -> bytes:
        """Read a picture's file; see :func:`read_bytes`."""
        return read_bytes(uri)

    def thumbnail(self, uri: str, size_px: int) -> bytes:
        """Return a small JPEG of a picture; see :func:`thumbnail`."""
        return thumbnail(uri, size_px)


def write_bytes(uri: str, payload: bytes) -> None:
    """Write a file whole or not at all; one that is there with the same bytes is left as it is.

    On a local disk it is written beside its place, synced, and renamed; object stores put a whole object at once.

    Raises
    ------
    OSError
        It could not be written.
    """
    try:
        if fetch_bytes(uri) == payload:
            return
    except ImageUnreadable:
        pass
    path = local_path(uri)
    if path is not None:
        _write_atomically(path, payload)
        return
    filesystem, remote = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
    filesystem.pipe_file(remote, payload)


def _write_atomically(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all attempts, so that what a killed writer left is written over and renamed by the next.
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut before an event names the file
    finally:
        os.close(folder)
