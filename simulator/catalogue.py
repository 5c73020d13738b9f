"""The catalogue: products with titles, categories and cut-out pictures, fetched or drawn once and then cached."""

from __future__ import annotations

import logging
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from simulator.drawn import drawn_products
from simulator.furniture import CHOSEN, PACKAGE, CatalogueUnavailable, fetch_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulator.settings import CatalogueSettings

_LOG: Final = logging.getLogger(__name__)
PACKAGE_SOURCE: Final = f"Debian package {PACKAGE}"
_LIST_FILE: Final = "catalogue.json"
_VERSION: Final = 1  # of the cached form: a change of the pictures or of the list asks for a new one


class CatalogueProduct(msgspec.Struct, frozen=True, kw_only=True):
    """A product: what it is, its RGBA cut-out on disk, and whose work the picture is."""

    product_id: str
    title: str
    category: str
    cutout_path: Path
    licence: str
    author: str
    source: str


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    product_id: str
    title: str
    category: str
    file: str
    licence: str
    author: str
    source: str


def load_catalogue(settings: CatalogueSettings, cache_dir: Path) -> list[CatalogueProduct]:
    """Return the first ``n_products`` products, spread evenly over the categories.

    The pictures lie in ``cache_dir``; only the first call fetches or draws them. With ``source = "auto"``
    the simulator's own drawings stand in, with a warning, where the package can't be had; they are kept
    too, and removing the folder ``drawn-1`` in ``cache_dir`` makes the next call try again.

    Raises
    ------
    CatalogueUnavailable
        When ``source`` is "debian" and the package can't be had.
    """
    cache_dir = cache_dir.expanduser()
    real, drawn = cache_dir / f"debian-{_VERSION}", cache_dir / f"drawn-{_VERSION}"
    if settings.source == "drawn":
        return _load(drawn, settings) or _make_drawn(drawn, settings)
    products = _load(real, settings)
    if products is None and settings.source == "auto":
        products = _load(drawn, settings)
    if products is not None:
        return products
    try:
        return _make_real(real, settings)
    except CatalogueUnavailable as error:
        if settings.source == "debian":
            raise
        _LOG.warning("%s Its own drawings are used now.", error)
        return _make_drawn(drawn, settings)


def _load(folder: Path, settings: CatalogueSettings) -> list[CatalogueProduct] | None:
    """Return the cached products, or None where there is no whole cache."""
    try:
        entries = msgspec.json.decode((folder / _LIST_FILE).read_bytes(), type=list[_Entry])
    except FileNotFoundError:
        return None
    products = [
        CatalogueProduct(
            product_id=entry.product_id,
            title=entry.title,
            category=entry.category,
            cutout_path=folder / entry.file,
            licence=entry.licence,
            author=entry.author,
            source=entry.source,
        )
        for entry in entries[: settings.n_products]
    ]
    return products if all(product.cutout_path.is_file() for product in products) else None


def _make_real(folder: Path, settings: CatalogueSettings) -> list[CatalogueProduct]:
    with _new_folder(folder) as work:
        _LOG.info("fetching the product pictures (120 MB, once) ...")
        fetched = work.parent / f"{work.name}-package"
        fetched.mkdir()
        try:
            pieces = fetch_pieces(fetched, settings.fetch_timeout_s)
        finally:
            shutil.rmtree(fetched, ignore_errors=True)
        entries = []
        for place, (piece_id, category, title) in enumerate(CHOSEN):
            piece = pieces[piece_id]
            name = _file_name(place, title)
            piece.picture.save(work / name)
            entries.append(
                _Entry(
                    product_id=name.removesuffix(".png"),
                    title=title,
                    category=category,
                    file=name,
                    licence=piece.licence,
                    author=piece.creator,
                    source=f"{PACKAGE_SOURCE}: {piece.name} ({piece.piece_id}); enlarged",
                )
            )
        (work / _LIST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(entries)))
    return _loaded(folder, settings)


def _make_drawn(folder: Path, settings: CatalogueSettings) -> list[CatalogueProduct]:
    with _new_folder(folder) as work:
        entries = []
        for place, product in enumerate(drawn_products()):
            name = _file_name(place, product.title)
            product.draw().save(work / name)
            entries.append(
                _Entry(
                    product_id=name.removesuffix(".png"),
                    title=product.title,
                    category=product.category,
                    file=name,
                    licence="CC0-1.0",
                    author="the OSMF simulator",
                    source="drawn",
                )
            )
        (work / _LIST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(entries)))
    return _loaded(folder, settings)


def _loaded(folder: Path, settings: CatalogueSettings) -> list[CatalogueProduct]:
    products = _load(folder, settings)
    if products is None:
        raise CatalogueUnavailable(f"its pictures could not be kept in {folder}")
    return products


def _file_name(place: int, title: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in title.lower()).split()
    return f"p{place:02d}-{'-'.join(words)}.png"


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a scratch folder that becomes ``folder`` in one step at the end, and vanishes on an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        work = Path(scratch) / "new"
        work.mkdir()
        yield work
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
