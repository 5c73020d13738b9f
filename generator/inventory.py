"""Inventory: what the generator has made, as its own state holds it."""

from __future__ import annotations

import hashlib

import msgspec

from generator.review import ReviewRecord, ReviewStatus, unpublished_creative
from state.records import CreativeRecord, encode_record
from state.store import ChangeSet, Store, Table
from streams.events import Creative

DAY_MS = 86_400_000


class _Drawn(msgspec.Struct, frozen=True, array_like=True):
    """How many pictures of a product have been drawn on a day, counted from the Unix epoch."""

    day: int
    n_images: int


_DRAWN = msgspec.msgpack.Decoder(_Drawn)
_CREATIVE = msgspec.msgpack.Decoder(CreativeRecord)
_REVIEW = msgspec.msgpack.Decoder(ReviewRecord)


class Inventory:
    """Published creatives and those under review: the last commit with a change set over it.

    A message may hold several events, and a later one must see what an earlier one has led to.

    Parameters
    ----------
    own
        The generator's state.
    """

    def __init__(self, own: Store) -> None:
        self._own = own

    def publish(self, creative: Creative, number: int, changes: ChangeSet) -> None:
        """Add a creative that is published, the ``number``-th."""
        record = CreativeRecord(
            number,
            creative.creative_id,
            creative.product_id,
            creative.image_uri,
            creative.image_sha256,
            creative.prompt,
            creative.origin,
            creative.group_id,
            creative.caused_by,
            creative.created_at_ms,
            creative.created_at_ms,
            b"",  # features are the online process's matter
        )
        changes.put(Table.CREATIVES, _key(creative.product_id, creative.creative_id), encode_record(record))

    def review(self, review: ReviewRecord, changes: ChangeSet) -> None:
        """Add a creative that is under review, or change what is known of it."""
        changes.put(Table.REVIEWS, _key(review.product_id, review.creative_id), encode_record(review))

    def find_review(self, product_id: str, creative_id: str, changes: ChangeSet) -> ReviewRecord | None:
        """Return the review of a creative; None where there is none."""
        value = self._get(Table.REVIEWS, _key(product_id, creative_id), changes)
        return None if value is None else _REVIEW.decode(value)

    def made(self, product_id: str, changes: ChangeSet) -> list[CreativeRecord]:
        """Return a product's creatives that are not to be made again: published, waiting, or rejected by a person."""
        published = self._of_product(Table.CREATIVES, product_id, changes)
        reviews = [_REVIEW.decode(value) for value in self._of_product(Table.REVIEWS, product_id, changes)]
        return [
            *map(_CREATIVE.decode, published),
            *(unpublished_creative(review) for review in reviews if review.status in {"waiting", "rejected"}),
        ]

    def n_drawn(self, product_id: str, at_ms: int, changes: ChangeSet) -> int:
        """Return how many pictures of a product have been drawn on a day, that of ``at_ms`` or a later one."""
        drawn = self._drawn(product_id, changes)
        return drawn.n_images if drawn.day >= at_ms // DAY_MS else 0

    def draw(self, product_id: str, at_ms: int, n_images: int, changes: ChangeSet) -> None:
        """Add pictures of a product that have been drawn; what comes late counts for the latest day that there was."""
        day = max(self._drawn(product_id, changes).day, at_ms // DAY_MS)
        drawn = _Drawn(day, self.n_drawn(product_id, at_ms, changes) + n_images)
        changes.put(Table.META, _drawn_key(product_id), encode_record(drawn))

    def _drawn(self, product_id: str, changes: ChangeSet) -> _Drawn:
        value = self._get(Table.META, _drawn_key(product_id), changes)
        return _Drawn(0, 0) if value is None else _DRAWN.decode(value)

    def _get(self, table: Table, key: bytes, changes: ChangeSet) -> bytes | None:
        value = changes.get(table, key)
        if value is None:
            with self._own.read() as txn:
                value = txn.get(table, key)
        return value

    def _of_product(self, table: Table, product_id: str, changes: ChangeSet) -> list[bytes]:
        prefix = _key(product_id, "")
        with self._own.read() as txn:
            found: dict[bytes, bytes | None] = dict(txn.scan(table, prefix=prefix))
        found.update((key, value) for key, value in changes.of(table) if key.startswith(prefix))
        return [value for value in found.values() if value is not None]


def read_reviews(own: Store, status: ReviewStatus) -> list[ReviewRecord]:
    """Return the reviews of one status, oldest first."""
    with own.read() as txn:
        found = [_REVIEW.decode(value) for _, value in txn.scan(Table.REVIEWS)]
    return sorted(
        (review for review in found if review.status == status), key=lambda r: (r.created_at_ms, r.creative_id)
    )


def _drawn_key(product_id: str) -> bytes:
    return b"drawn" + hashlib.sha256(product_id.encode()).digest()


def _key(product_id: str, creative_id: str) -> bytes:
    # The product's id is hashed: two ids of 200 characters that are not ASCII can be longer than an LMDB key.
    return hashlib.sha256(product_id.encode()).digest() + creative_id.encode()
