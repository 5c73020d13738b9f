"""Thumbnails: small JPEGs of a run's pictures, as data URIs that a page carries in itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from osmf.report_model import Picture

BACKDROP = (246, 244, 240)
"""What shows behind a cut-out: JPEG has no transparency."""

MAX_PIXELS = 50_000_000


def thumbnail(picture: Picture | None, side_px: int, quality: int = 80) -> str | None:
    """Return a picture as a JPEG data URI, its longer side at most ``side_px``; None where there is none to open.

    Only bytes and local files are opened (a page that opens offline fetches nothing), and no picture
    of more than 50 megapixels.
    """
    source = None if picture is None else _source(picture)
    if source is None:
        return None
    try:
        with Image.open(source) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                return None
            opened.draft("RGB", (side_px, side_px))
            upright = ImageOps.exif_transpose(opened)
            upright.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
            flat = _on_backdrop(upright)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return None
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _source(picture: Picture) -> io.BytesIO | Path | None:
    if picture.data is not None:
        return io.BytesIO(picture.data)
    if picture.uri is None:
        return None
    parts = urlsplit(picture.uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        path = Path(unquote(parts.path))
    elif parts.scheme == "" and parts.netloc == "":
        path = Path(picture.uri)
    else:
        return None
    return path if path.is_file() else None


def _on_backdrop(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        cut_out = image.convert("RGBA")
        flat = Image.new("RGB", cut_out.size, BACKDROP)
        flat.paste(cut_out, mask=cut_out.getchannel("A"))
        return flat
    return image.convert("RGB")
