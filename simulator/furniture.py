"""Real products: Debian's package sweethome3d-furniture, fetched once and unpacked without being installed.

The package holds catalogues of 3D models with named, licensed RGBA pictures (CC0 and CC-BY). Which of its 820
pieces are shown as products, under which title, is the table below; pictures and makers come from the package.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE: Final = "sweethome3d-furniture"

CUTOUT_SIDE_PX: Final = 384
"""Longest side of a kept cut-out, in pixels; the package's own are 128 pixels."""

CHOSEN: Final[tuple[tuple[str, str, str], ...]] = (
    ("Blend Swap CC-0#winchesterArmchair", "seating", "Chesterfield armchair in red leather"),
    ("Blend Swap CC-0#desklamp", "lamps", "Brass desk lamp with a white shade"),
    ("Blend Swap CC-0#kitchenaid", "kitchen", "Stand mixer with a glass bowl"),
    ("Blend Swap CC-0#headphones", "electronics", "Over-ear headphones"),
    ("Blend Swap CC-0#basketball", "sports and toys", "Basketball"),
    ("Blend Swap CC-0#handbag", "fashion", "Cream leather handbag"),
    ("Blend Swap CC-0#deckChair", "seating", "Striped deck chair"),
    ("Kator Legaz#pedestal-vase-lamp", "lamps", "Blue vase table lamp"),
    ("Blend Swap CC-0#coffeeBrewer", "kitchen", "Capsule coffee machine"),
    ("Blend Swap CC-BY#radio", "electronics", "Retro portable radio"),
    ("Blend Swap CC-BY#bike", "sports and toys", "BMX bike"),
    ("Blend Swap CC-0#bootie", "fashion", "Ankle boots with a heel"),
    ("Blend Swap CC-0#designChair", "seating", "White shell chair with a blue cushion"),
    ("Blend Swap CC-BY#campingLamp", "lamps", "Green camping lantern"),
    ("Blend Swap CC-BY#espressokettle", "kitchen", "Stovetop espresso maker"),
    ("Blend Swap CC-0#iphone", "electronics", "Touchscreen smartphone"),
    ("Blend Swap CC-0#teddyBear", "sports and toys", "Teddy bear"),
    ("Blend Swap CC-BY#suitcase", "fashion", "Blue travel suitcase"),
    ("Kator Legaz#chair-ottoman", "seating", "Lounge chair with a footrest"),
    ("Blend Swap CC-BY#lamp", "lamps", "Table lamp with a turned base"),
    ("Blend Swap CC-BY#kitchenScale", "kitchen", "Green kitchen scale"),
    ("Blend Swap CC-0#tableFan", "electronics", "Desk fan"),
    ("Blend Swap CC-BY#toyTrain", "sports and toys", "Wooden toy train"),
    ("Blend Swap CC-BY#sunglasses", "fashion", "Black sports sunglasses"),
    ("Blend Swap CC-0#oakChair", "seating", "Oak dining chair"),
    ("Kator Legaz#flashlight", "lamps", "Handheld torch"),
    ("Blend Swap CC-BY#largePan", "kitchen", "Stainless steel stock pot"),
    ("Blend Swap CC-BY#laptop", "electronics", "Thin silver laptop"),
    ("Blend Swap CC-BY#tableTennisBat", "sports and toys", "Table tennis bat"),
    ("Blend Swap CC-BY#backpack", "fashion", "Brown canvas backpack"),
    ("Kator Legaz#futon-couch", "seating", "Red futon couch"),
    ("Blend Swap CC-0#JapaneseLantern", "lamps", "Japanese paper lantern"),
    ("Blend Swap CC-BY#kitchenblender", "kitchen", "Glass jug blender"),
    ("Blend Swap CC-0#led_tv", "electronics", "Widescreen LED television"),
    ("Blend Swap CC-BY#rubix2", "sports and toys", "Puzzle cube"),
    ("Blend Swap CC-0#slippers", "fashion", "Slip-on sandals"),
    ("Kator Legaz#mid-century-chair", "seating", "White tufted armchair"),
    ("Kator Legaz#porch-light", "lamps", "Cast iron porch light"),
    ("Blend Swap CC-0#caffe_final", "kitchen", "Espresso cup and saucer"),
    ("Blend Swap CC-BY#mp3Station", "electronics", "Music dock with two speakers"),
    ("Blend Swap CC-0#electricGuitar", "sports and toys", "Electric guitar"),
    ("Blend Swap CC-0#briefcase", "fashion", "Black leather briefcase"),
    ("Blend Swap CC-BY#green_stool", "seating", "Green wooden stool"),
    ("Blend Swap CC-0#outdoorLamp", "lamps", "Hanging garden lantern"),
    ("Blend Swap CC-BY#coffeePress", "kitchen", "French press"),
    ("Blend Swap CC-BY#mobile", "electronics", "Mobile phone with keys"),
    ("Blend Swap CC-0#caballito", "sports and toys", "Wooden rocking horse"),
    ("Blend Swap CC-0#umbrellaFolded", "fashion", "Blue umbrella"),
)
"""Piece of the package, category, title. Any first n are spread evenly over the six categories."""


class CatalogueUnavailable(RuntimeError):
    """The package cannot be had."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the package {PACKAGE} cannot be had: {why}. Its products are not available; the simulator can draw "
            'its own (simulator.catalogue.source = "drawn").'
        )


@dataclass(frozen=True)
class Piece:
    """A piece of the package: its id, the catalogue's own name for it, who made it, the licence, and its picture."""

    piece_id: str
    name: str
    creator: str
    licence: str
    picture: Image.Image


def fetch_pieces(work_dir: Path, timeout_s: float) -> dict[str, Piece]:
    """Download and unpack the package in ``work_dir`` and return the chosen pieces by id.

    Needs ``apt-get`` and ``dpkg-deb`` but no root, and changes nothing of the system: where the package lists
    are missing, private ones are fetched into ``work_dir``.

    Raises
    ------
    CatalogueUnavailable
        When a tool is missing, the download fails, or the package lacks a chosen piece.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CatalogueUnavailable(f"there is no {tool} on this machine")
    package = _download(work_dir, timeout_s)
    unpacked = work_dir / "unpacked"
    _run(["dpkg-deb", "-x", str(package), str(unpacked)], work_dir, timeout_s)
    package.unlink()
    found: dict[str, Piece] = {}
    for archive in sorted(unpacked.glob("usr/share/sweethome3d/furniture/*.sh3f")):
        for piece in read_archive(archive):
            found[piece.piece_id] = piece
    missing = [piece_id for piece_id, _, _ in CHOSEN if piece_id not in found]
    if missing:
        raise CatalogueUnavailable(f"this version of it lacks {', '.join(missing)}")
    return found


def read_archive(archive: Path) -> Iterator[Piece]:
    """Yield the chosen pieces of one catalogue file (``.sh3f``: a zip of models, pictures and a properties file)."""
    wanted = {piece_id for piece_id, _, _ in CHOSEN}
    with zipfile.ZipFile(archive) as files:
        entries, licence = _read_properties(files.read("PluginFurnitureCatalog.properties").decode("latin-1"))
        for entry in entries:
            if entry.get("id") not in wanted:
                continue
            picture = Image.open(io.BytesIO(files.read(entry["icon"].lstrip("/"))))
            yield Piece(
                piece_id=entry["id"],
                name=entry["name"],
                creator=entry.get("creator", "unknown"),
                licence=entry.get("license", licence),
                picture=enlarge_cutout(picture.convert("RGBA")),
            )


def enlarge_cutout(picture: Image.Image) -> Image.Image:
    """Crop a cut-out to what it shows and scale it so that its longest side is :data:`CUTOUT_SIDE_PX` pixels.

    Scaling happens on premultiplied colours, so that what lies under the transparent ground does not bleed in.
    """
    cropped = picture.crop(picture.getchannel("A").point([0] * 8 + [255] * 248).getbbox())
    scale = CUTOUT_SIDE_PX / max(cropped.size)
    size = (max(1, round(cropped.width * scale)), max(1, round(cropped.height * scale)))
    return cropped.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def _read_properties(text: str) -> tuple[list[dict[str, str]], str]:
    """Return the numbered entries of a Java properties file and the licence of the whole."""
    entries: dict[int, dict[str, str]] = {}
    licence = "CC-BY-3.0"  # of the two catalogues whose file names none, by the package's copyright file
    for line in text.splitlines():
        numbered = re.match(r"(\w+)#(\d+)=(.*)", line)
        if numbered is not None:
            value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), numbered[3])
            entries.setdefault(int(numbered[2]), {})[numbered[1]] = value.strip()
        elif line.startswith("license="):
            licence = "CC0-1.0" if "public domain" in line.lower() else "CC-BY-3.0"
    return list(entries.values()), licence


def _download(work_dir: Path, timeout_s: float) -> Path:
    try:
        _run(["apt-get", "download", PACKAGE], work_dir, timeout_s)
    except CatalogueUnavailable:
        # No lists, or stale ones: private lists need no root and leave the system's alone.
        state, cache = work_dir / "apt-state", work_dir / "apt-cache"
        for folder in (state / "lists" / "partial", cache / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        private = [
            "-o",
            f"Dir::State={state}",
            "-o",
            "Dir::State::status=/var/lib/dpkg/status",
            "-o",
            f"Dir::Cache={cache}",
        ]
        _run(["apt-get", *private, "update"], work_dir, timeout_s)
        _run(["apt-get", *private, "download", PACKAGE], work_dir, timeout_s)
    packages = sorted(work_dir.glob(f"{PACKAGE}_*.deb"))
    if not packages:
        raise CatalogueUnavailable("apt-get fetched no file")
    return packages[-1]


def _run(command: list[str], work_dir: Path, timeout_s: float) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=work_dir,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CatalogueUnavailable(f"`{' '.join(command)}` took longer than {timeout_s:g} s") from error
    except OSError as error:
        raise CatalogueUnavailable(f"`{' '.join(command)}` could not be started ({error})") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise CatalogueUnavailable(f"`{' '.join(command)}` ended with {done.returncode}: {last}")
