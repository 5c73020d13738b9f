from __future__ import annotations

import io
import logging
import shutil
import zipfile
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from PIL import Image

from simulator import furniture
from simulator.catalogue import load_catalogue
from simulator.drawn import DRAWN_SIDE_PX, drawn_products
from simulator.furniture import CHOSEN, CUTOUT_SIDE_PX, CatalogueUnavailable, enlarge_cutout, read_archive
from simulator.settings import CatalogueSettings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def no_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)


@pytest.fixture(scope="module")
def drawn_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    load_catalogue(CatalogueSettings(source="drawn", n_products=48), folder)
    return folder


def _archive(path: Path, pieces: list[tuple[str, str]], licence: str | None, creator: str = "Renée") -> None:
    lines = ["# a comment", *([f"license={licence}"] if licence else [])]
    with zipfile.ZipFile(path, "w") as files:
        for number, (piece_id, name) in enumerate(pieces, start=1):
            picture = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
            picture.paste((200, 30, 30, 255), (20, 10, 60, 110))
            data = io.BytesIO()
            picture.save(data, "PNG")
            files.writestr(f"icons/{number}.png", data.getvalue())
            lines += [f"id#{number}={piece_id}", f"name#{number}={name}", f"icon#{number}=/icons/{number}.png"]
            lines += [f"creator#{number}={creator}"]
        files.writestr("PluginFurnitureCatalog.properties", "\n".join(lines).encode("latin-1"))


@pytest.mark.parametrize(
    "products", [[(c, t) for _, c, t in CHOSEN], [(p.category, p.title) for p in drawn_products()]]
)
def test_every_list_is_spread_evenly_over_six_categories(products: list[tuple[str, str]]) -> None:
    assert len(products) == 48
    assert len({title for _, title in products}) == 48
    for n in (6, 12, 24, 48):
        counts: dict[str, int] = {}
        for category, _ in products[:n]:
            counts[category] = counts.get(category, 0) + 1
        assert set(counts.values()) == {n // 6}


def test_the_piece_ids_are_distinct() -> None:
    assert len({piece for piece, _, _ in CHOSEN}) == len(CHOSEN)


def test_without_apt_the_simulator_draws_and_says_so(
    tmp_path: Path, no_apt: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        products = load_catalogue(CatalogueSettings(source="auto"), tmp_path)
    assert "there is no apt-get on this machine" in caplog.text
    assert len(products) == 24
    assert len({product.product_id for product in products}) == 24
    for product in products:
        with Image.open(product.cutout_path) as cutout:
            assert cutout.mode == "RGBA"
            assert max(cutout.size) == DRAWN_SIDE_PX
            alpha = np.asarray(cutout.getchannel("A"))
        assert 0.1 < (alpha > 128).mean() < 1.0


def test_only_the_real_catalogue_is_wanted_and_cannot_be_had(tmp_path: Path, no_apt: None) -> None:
    with pytest.raises(CatalogueUnavailable, match="there is no apt-get"):
        load_catalogue(CatalogueSettings(source="debian"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_names_the_command_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("apt-get", "dpkg-deb"):
        (tools / tool).write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    cache = tmp_path / "cache"
    with pytest.raises(CatalogueUnavailable, match=r"update` ended with 100: E: Unable to locate package"):
        load_catalogue(CatalogueSettings(source="debian"), cache)
    assert list(cache.iterdir()) == []


def test_the_package_is_fetched_once_and_only_pictures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "package"
    source.mkdir()
    pieces = [(piece_id, f"piece {i}") for i, (piece_id, _, _) in enumerate(CHOSEN)]
    _archive(source / "a.sh3f", [*pieces[:24], ("Scopia#bed1", "Bed")], "Public domain")
    _archive(source / "b.sh3f", pieces[24:], None)
    calls: list[list[str]] = []

    def run(command: list[str], work_dir: Path, timeout_s: float) -> None:
        calls.append(command)
        if command[0] == "apt-get":
            (work_dir / f"{furniture.PACKAGE}_1.8-1_all.deb").write_bytes(b"deb")
        else:
            shutil.copytree(source, work_dir / "unpacked" / "usr/share/sweethome3d/furniture")

    monkeypatch.setattr(furniture, "_run", run)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    settings = CatalogueSettings(source="auto", n_products=30)
    products = load_catalogue(settings, tmp_path / "cache")
    assert len(calls) == 2
    assert [p.title for p in products] == [title for _, _, title in CHOSEN[:30]]
    assert (products[0].licence, products[0].author) == ("CC0-1.0", "Renée")
    assert products[29].licence == "CC-BY-3.0"
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert sorted({p.suffix for p in files}) == [".json", ".png"]
    assert len(files) == 49
    assert load_catalogue(settings, tmp_path / "cache") == products
    assert len(calls) == 2


def test_archives_yield_chosen_pieces_only(tmp_path: Path) -> None:
    _archive(tmp_path / "a.sh3f", [("Scopia#bed1", "Bed"), ("Blend Swap CC-0#iphone", "Caf\\u00e9 phone")], "x")
    (piece,) = read_archive(tmp_path / "a.sh3f")
    assert (piece.piece_id, piece.name, piece.creator, piece.licence) == (
        "Blend Swap CC-0#iphone",
        "Café phone",
        "Renée",
        "CC-BY-3.0",
    )


def test_enlarging_crops_and_keeps_the_colour_at_the_edges() -> None:
    picture = Image.new("RGBA", (128, 128), (0, 255, 0, 0))  # green lies under the transparent ground
    picture.paste((200, 30, 30, 255), (20, 10, 60, 110))
    enlarged = enlarge_cutout(picture)
    assert enlarged.size == (round(CUTOUT_SIDE_PX * 0.4), CUTOUT_SIDE_PX)
    pixels = np.asarray(enlarged)
    assert pixels[..., 3].min() == 255
    assert np.abs(pixels[..., :3].astype(int) - (200, 30, 30)).max() <= 1


def test_a_cache_that_lost_a_picture_is_made_again(drawn_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(drawn_cache, cache)
    settings = CatalogueSettings(source="drawn", n_products=2)
    lost = load_catalogue(settings, cache)[1].cutout_path
    lost.unlink()
    assert load_catalogue(settings, cache)[1].cutout_path == lost
    assert lost.is_file()


def test_the_list_is_readable_json(drawn_cache: Path) -> None:
    (path,) = drawn_cache.rglob("catalogue.json")
    assert len(msgspec.json.decode(path.read_bytes())) == 48
