"""Inventory: what the generator has made, as its own state holds it."""

from __future__ import annotations

import hashlib

import msgspec

from generator.review import ReviewRecord, ReviewStatus, unpublished_creative
from state.records import CreativeRecord, encode_record
from state.store import ChangeSet, Store, Table
from streams.events import Creative

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
        key = _key(product_id, creative_id)
        value = changes.get(Table.REVIEWS, key)
        if value is None:
            with self._own.read() as txn:
                value = txn.get(Table.REVIEWS, key)
        return None if value is None else _REVIEW.decode(value)

    def made(self, product_id: str, changes: ChangeSet) -> list[CreativeRecord]:
        """Return a product's creatives that are not to be made again: published, waiting, or rejected by a person."""
        published = self._of_product(Table.CREATIVES, product_id, changes)
        reviews = [_REVIEW.decode(value) for value in self._of_product(Table.REVIEWS, product_id, changes)]
        return [
            *map(_CREATIVE.decode, published),
            *(unpublished_creative(review) for review in reviews if review.status in {"waiting", "rejected"}),
        ]

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


def _key(product_id: str, creative_id: str) -> bytes:
    # The product's id is hashed: two ids of 200 characters that are not ASCII can be longer than an LMDB key.
    return hashlib.sha256(product_id.encode()).digest() + creative_id.encode()
