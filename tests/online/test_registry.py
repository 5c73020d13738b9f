"""The registry: products and creatives are encoded once, and what cannot be shown is not registered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from online.encoders import HASHED_DIM, HashedImageEncoder, HashedTextEncoder, UnreadableImageError
from online.features import FeatureBank
from online.mismatch import FeatureWidthError
from online.registry import Registry, UnknownProductError, read_image
from state.store import ChangeSet, Store
from streams.events import Creative, Product

PICTURE = b"a picture"


class CountingText(HashedTextEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def encode(self, text: str) -> np.ndarray:
        self.texts.append(text)
        return super().encode(text)


def picture(uri: str) -> bytes:
    if uri == "nowhere":
        raise FileNotFoundError(uri)
    return PICTURE


class Bench:
    """A registry with what is around it."""

    def __init__(self, open_image: Callable[[str], bytes] = picture) -> None:
        self.text = CountingText()
        self.bank = FeatureBank(HASHED_DIM, HASHED_DIM)
        self.registry = Registry(lambda: self.text, HashedImageEncoder, open_image, self.bank)
        self.changes = ChangeSet()

    def product(self, product_id: str = "p", title: str = "oak chair", **more: str) -> bool:
        event = Product(product_id=product_id, title=title, updated_at_ms=5, **more)  # type: ignore[arg-type]
        return self.registry.put_product(event, self.changes)

    def creative(self, creative_id: str = "c", product_id: str = "p", **more: str) -> bool:
        event = Creative(creative_id=creative_id, product_id=product_id, created_at_ms=6, **more)  # type: ignore[arg-type]
        return self.registry.put_creative(event, 7, self.changes)


def test_products_are_numbered_and_encoded_once() -> None:
    bench = Bench()
    assert bench.product("p")
    assert bench.product("q", "steel lamp", category="lamps")
    assert not bench.product("p")
    assert bench.text.texts == ["oak chair", "lamps: steel lamp"]
    assert [record.number for record in bench.registry.products.values()] == [0, 1]
    assert bench.registry.product_ids == {0: "p", 1: "q"}
    assert (bench.bank.titles().numpy()[0] == HashedTextEncoder().encode("oak chair")).all()


def test_a_new_title_is_encoded_anew_under_the_same_number() -> None:
    bench = Bench()
    bench.product("p")
    bench.product("q", "steel lamp")
    assert bench.product("p", "pine chair")
    assert bench.product("p", "pine chair", image_uri="file:///new.png")  # another picture needs no encoding
    assert bench.text.texts == ["oak chair", "steel lamp", "pine chair"]
    record = bench.registry.products["p"]
    assert (record.number, record.title, record.image_uri) == (0, "pine chair", "file:///new.png")
    assert (bench.bank.titles().numpy()[0] == HashedTextEncoder().encode("pine chair")).all()
    assert bench.bank.titles().shape == (2, HASHED_DIM)


def test_a_creative_never_changes() -> None:
    bench = Bench()
    bench.product()
    assert bench.creative(prompt="a chair in a room")
    assert not bench.creative(prompt="another one")
    assert bench.registry.creatives["p", "c"].prompt == "a chair in a room"
    assert bench.registry.creatives["p", "c"].registered_at_ms == 7


def test_one_creative_id_may_belong_to_two_products() -> None:
    bench = Bench()
    bench.product("p")
    bench.product("q", "lamp")
    assert bench.creative("c", "p")
    assert bench.creative("c", "q")
    assert [record.number for record in bench.registry.creatives.values()] == [0, 1]


def test_a_creative_of_an_unknown_product_is_refused() -> None:
    bench = Bench()
    with pytest.raises(UnknownProductError, match=r"creative 'c' is of product 'p', which is not registered: send the"):
        bench.creative()
    assert bench.registry.creatives == {}
    assert len(bench.changes) == 0


def raising(error: Exception) -> Callable[[str], bytes]:
    def fail(uri: str) -> bytes:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        ValueError("Protocol not known: x"),
        ImportError("install s3fs"),
        PermissionError("no"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused(error: Exception) -> None:
    bench = Bench(raising(error))
    bench.product()
    before = len(bench.changes)
    with pytest.raises(UnreadableImageError, match=rf"image 'u' could not be read \({type(error).__name__}: "):
        bench.creative(image_uri="u")
    assert bench.registry.creatives == {}
    assert len(bench.changes) == before
    assert bench.creative("d")  # and the next one is the first
    assert bench.registry.creatives["p", "d"].number == 0


def test_an_image_is_held_against_its_sha256() -> None:
    bench = Bench()
    bench.product()
    right = hashlib.sha256(PICTURE).hexdigest()
    assert bench.creative("right", image_uri="u", image_sha256=right)
    with pytest.raises(UnreadableImageError, match=f"its SHA-256 is {right}, the event says 0000"):
        bench.creative("wrong", image_uri="u", image_sha256="0" * 64)
    assert list(bench.registry.creatives) == [("p", "right")]


def test_the_registry_goes_on_from_the_state(tmp_path: Path) -> None:
    bench = Bench()
    for number in range(70):  # more than the features' first room
        bench.product(f"p{number}", f"title {number}")
        bench.creative(f"c{number}", f"p{69 - number}" if number > 34 else f"p{number}", image_uri="u")
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        store.commit(bench.changes)
        again = Bench()
        with store.read() as txn:
            again.registry.restore(txn)
    assert again.registry.products == bench.registry.products
    assert again.registry.creatives == bench.registry.creatives
    assert again.registry.product_ids == bench.registry.product_ids
    assert (again.bank.titles() == bench.bank.titles()).all()
    assert (again.bank.images() == bench.bank.images()).all()
    assert again.bank.titles().shape == (70, HASHED_DIM)
    assert not again.product("p0", "title 0")
    assert again.text.texts == []


def test_features_of_another_encoder_are_refused(tmp_path: Path) -> None:
    bench = Bench()
    bench.product()
    narrow = Registry(lambda: bench.text, HashedImageEncoder, picture, FeatureBank(HASHED_DIM // 2, HASHED_DIM))
    with Store(tmp_path, map_size_mib=16, sync=False) as store:
        store.commit(bench.changes)
        with store.read() as txn, pytest.raises(FeatureWidthError, match=r"width 128, the encoders .* give 64"):
            narrow.restore(txn)


@pytest.mark.parametrize(
    "uri",
    [
        "file:///no/such/file.png",
        "/no/such/file.png",
        "nonsense://x",
        "",
        "/",
        "file://",
        "http://[broken",
        "zip://a.png::file:///etc/hostname",
        "simplecache::",
        "reference://x",
        "github://x",
        "dask://x",
        "memory://nothing",
        "data:nonsense",
        "::::",
        "a\x00b",
        "tar://x::file:///etc/hostname",
        "blockcache::file:///no",
        "git://x",
        "s3://bucket/key",
    ],
)
def test_no_uri_stops_the_stream(uri: str) -> None:
    bench = Bench(read_image)
    bench.product()
    with pytest.raises(UnreadableImageError, match="could not be read"):
        bench.creative(image_uri=uri)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "with space.png"
    path.write_bytes(PICTURE)
    assert read_image(str(path)) == PICTURE
    assert read_image(f"file://{path}") == PICTURE
