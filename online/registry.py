"""Registry: the products and creatives that are known, with the features of the frozen encoders."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from online.encoders import ImageEncoder, TextEncoder, UnreadableImageError
from online.features import FeatureBank
from state.records import CreativeRecord, ProductRecord, creative_key, encode_record
from state.store import ChangeSet, ReadTransaction, Table
from streams.events import Creative, Product

OpenImage = Callable[[str], bytes]
"""Returns the bytes at a URI; raises where there are none."""


def read_image(uri: str) -> bytes:
    """Return the bytes at a path or a URL of any file system that fsspec knows."""
    import fsspec

    with fsspec.open(uri, "rb") as file:
        data: bytes = file.read()
    return data


def titled(title: str, category: str | None) -> str:
    """Return the text that stands for a product.

    The category in front lets products of one category share what is learnt of any of them.
    """
    return title if category is None else f"{category}: {title}"


class UnknownProductError(ValueError):
    """A creative names a product that is not registered."""

    def __init__(self, creative_id: str, product_id: str) -> None:
        super().__init__(
            f"creative {creative_id!r} is of product {product_id!r}, which is not registered: "
            "send the product first, with an earlier timestamp"
        )


class RegistryFullError(ValueError):
    """There are as many products or creatives as the settings allow."""

    def __init__(self, what: str, name: str, most: float) -> None:
        super().__init__(
            f"{what} {name!r} is not registered: online.limits.{what}s = {most} are, each of which takes memory. Raise "
            "the limit and send it again; its impressions go to the dead letters until then"
        )


class Registry:
    """Registers products and creatives, and encodes them once.

    Parameters
    ----------
    text, image
        Loads the frozen encoders; called when the first title or image comes.
    open_image
        Reads an image's bytes.
    bank
        Where the features go.
    most_products, most_creatives
        How many may be registered.
    """

    def __init__(
        self,
        text: Callable[[], TextEncoder],
        image: Callable[[], ImageEncoder],
        open_image: OpenImage,
        bank: FeatureBank,
        *,
        most_products: float = math.inf,
        most_creatives: float = math.inf,
    ) -> None:
        self._most_products = most_products
        self._most_creatives = most_creatives
        self._text = text
        self._image = image
        self._open_image = open_image
        self._bank = bank
        self.products: dict[str, ProductRecord] = {}
        self.creatives: dict[tuple[str, str], CreativeRecord] = {}
        self.product_ids: dict[int, str] = {}
        self.categories: dict[int, str | None] = {}
        self.creative_numbers: dict[int, npt.NDArray[np.int64]] = {}

    def restore(self, txn: ReadTransaction) -> None:
        """Continue from the state."""
        product_decoder = msgspec.msgpack.Decoder(ProductRecord)
        for _, value in txn.scan(Table.PRODUCTS):
            self._add_product(product_decoder.decode(value))
        creative_decoder = msgspec.msgpack.Decoder(CreativeRecord)
        for _, value in txn.scan(Table.CREATIVES):
            self._add_creative(creative_decoder.decode(value))

    def _add_product(self, record: ProductRecord) -> None:
        self.products[record.product_id] = record
        self.product_ids[record.number] = record.product_id
        self.categories[record.number] = record.category
        self._bank.put_title(record.number, record.title_features)

    def _add_creative(self, record: CreativeRecord) -> None:
        self.creatives[record.product_id, record.creative_id] = record
        self._bank.put_image(record.number, record.image_features)
        product = self.products[record.product_id].number
        known = self.creative_numbers.get(product, np.zeros(0, np.int64))
        # In the order of their numbers, so that a mean over them is the same after a restart.
        self.creative_numbers[product] = np.sort(np.append(known, record.number))

    def put_product(self, event: Product, changes: ChangeSet) -> bool:
        """Register a product, or take over its new title; return whether anything changed.

        Raises
        ------
        RegistryFullError
            It is new, and there are as many as may be.
        """
        known = self.products.get(event.product_id)
        if known is None and len(self.products) >= self._most_products:
            raise RegistryFullError("product", event.product_id, self._most_products)
        fields = (event.title, event.category, event.image_uri)
        if known is not None and fields == (known.title, known.category, known.image_uri):
            return False
        if known is not None and (known.title, known.category) == (event.title, event.category):
            features = known.title_features
        else:
            features = self._text().encode(titled(event.title, event.category)).tobytes()
        number = len(self.products) if known is None else known.number
        record = ProductRecord(number, event.product_id, *fields, event.updated_at_ms, features)
        self._add_product(record)
        changes.put(Table.PRODUCTS, event.product_id.encode(), encode_record(record))
        return True

    def put_creative(self, event: Creative, now_ms: int, changes: ChangeSet) -> bool:
        """Register a creative; return whether it was new. A creative never changes: another image is another creative.

        Raises
        ------
        UnknownProductError
            Its product is not registered.
        UnreadableImageError
            Its image cannot be read, or is not the one that the event describes.
        RegistryFullError
            There are as many as may be.
        """
        if event.product_id not in self.products:
            raise UnknownProductError(event.creative_id, event.product_id)
        key = (event.product_id, event.creative_id)
        if key in self.creatives:
            return False
        if len(self.creatives) >= self._most_creatives:
            raise RegistryFullError("creative", event.creative_id, self._most_creatives)
        image = None
        if event.image_uri is not None:
            try:
                image = self._open_image(event.image_uri)
            except Exception as error:
                # A file system raises whatever its library raises (zipfile.BadZipFile, KeyError, ...).
                raise UnreadableImageError(event.image_uri, f"{type(error).__name__}: {error}") from error
            _check_sha256(event, image)
        record = CreativeRecord(
            len(self.creatives),
            event.creative_id,
            event.product_id,
            event.image_uri,
            event.image_sha256,
            event.prompt,
            event.origin,
            event.group_id,
            event.caused_by,
            event.created_at_ms,
            now_ms,
            self._image().encode(image, event.creative_id).tobytes(),
            1.0 if event.prior is None else event.prior.relative_ctr,
            0.0 if event.prior is None else event.prior.n_impressions,
        )
        self._add_creative(record)
        changes.put(Table.CREATIVES, creative_key(*key), encode_record(record))
        return True


def _check_sha256(event: Creative, image: bytes) -> None:
    import hashlib

    found = hashlib.sha256(image).hexdigest()
    if event.image_sha256 is not None and event.image_sha256 != found:
        raise UnreadableImageError(
            event.image_uri or "", f"its SHA-256 is {found}, the event says {event.image_sha256}"
        )
