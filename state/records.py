"""Record layouts: what the tables hold, and how keys are made.

Records are msgpack of typed structs. Arrays are little-endian float32 bytes with their shape in the
docstring. Keys join ids with NUL, which no id may contain, so that a prefix scan finds one product.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

SEPARATOR = b"\x00"


class OffsetRecord(msgspec.Struct, frozen=True, array_like=True):
    """What has been consumed of one partition.

    ``n_used`` includes ``n_duplicates`` (recognised and without effect). Every consumed event is
    used, dead-lettered or (a click ahead of its impression) waiting. ``n_expired`` messages were never consumed: the
    broker had dropped them, and the settings said to go on.
    """

    next_offset: int
    n_consumed: int
    n_used: int
    n_duplicates: int
    n_dead_letters: int
    last_event_ms: int
    n_expired: int = 0


class ProductRecord(msgspec.Struct, frozen=True, array_like=True):
    """A registered product; ``title_features`` is float32 (D_title,).

    ``number`` counts the registrations: rows of the learner name products by it.
    """

    number: int
    product_id: str
    title: str
    category: str | None
    image_uri: str | None
    updated_at_ms: int
    title_features: bytes


class CreativeRecord(msgspec.Struct, frozen=True, array_like=True):
    """A registered creative; ``image_features`` is float32 (D_image,), ``number`` as for products.

    ``prior_impressions`` is what a reward model's word on it is worth in the group that it was made for, and
    ``prior_relative_ctr`` that word: its CTR relative to the group's other creatives.
    """

    number: int
    creative_id: str
    product_id: str
    image_uri: str | None
    image_sha256: str | None
    prompt: str | None
    origin: str
    group_id: int | None
    caused_by: str | None
    created_at_ms: int
    registered_at_ms: int
    image_features: bytes
    prior_relative_ctr: float = 1.0
    prior_impressions: float = 0.0


class ImpressionRecord(msgspec.Struct, array_like=True):
    """An impression whose click may still come; ``attributes`` is uint8 (N,), the value codes.

    ``counted_ms`` and ``clicked_ms`` are the watermarks at which it and its click were counted. ``clicked_late`` and
    ``retracted_late``: after it was labelled, so that a label had to be corrected.
    """

    product_id: str
    creative_id: str
    attributes: bytes
    group_id: int
    shown_at_ms: int
    user_bucket: int
    experiment: str | None
    arm: str | None
    clicked: bool
    labelled: bool
    counted_ms: int = 0
    clicked_ms: int = 0
    clicked_late: bool = False
    retracted: bool = False
    retracted_late: bool = False

    @property
    def click_counts(self) -> bool:
        """Whether there is a click that has not been retracted."""
        return self.clicked and not self.retracted


class WaitingClickRecord(msgspec.Struct, frozen=True, array_like=True):
    """A click that came before its impression, with its place in the log for a dead letter.

    One that is ``retracted`` is credited all the same when its impression comes, and taken back at once.
    """

    clicked_at_ms: int
    topic: str
    partition: int
    offset: int
    row: int
    payload: bytes
    retracted: bool = False


class LedgerBlock(msgspec.Struct, array_like=True):
    """Some entries of the ledger, oldest first: of each its kind, the impression's id, and what there is to know.

    ``details`` are an `ImpressionRecord` of an impression, `ClickEntry` of a click that came in a later micro-batch,
    and `RetractionEntry` of its retraction. ``starts`` is where the partitions of impressions stood before the first
    entry, ``oldest_ms`` its watermark.
    """

    oldest_ms: int
    starts: dict[str, dict[int, int]]
    kinds: bytes
    impression_ids: list[str]
    details: list[bytes]


class ClickEntry(msgspec.Struct, frozen=True, array_like=True):
    """A click: at which watermark it was counted, and whether the impression had been labelled."""

    clicked_ms: int
    late: bool


class RetractionEntry(msgspec.Struct, frozen=True, array_like=True):
    """A click's retraction: whether the impression had been labelled."""

    late: bool


class LedgerRecord(msgspec.Struct, array_like=True):
    """The ledger's numbers.

    ``n_expired`` and ``n_dropped`` are entries that were removed after ``online.ledger.retention_s`` and beyond
    ``online.ledger.max_entries``, ``n_forgotten`` those of forgotten users. ``key_mark`` tells hash keys apart.
    """

    key_mark: bytes = b""
    n_blocks: int = 0
    open_block: int | None = None
    n_entries: int = 0
    n_expired: int = 0
    n_dropped: int = 0
    n_forgotten: int = 0
    n_users_forgotten: int = 0
    n_impressions_taken_back: int = 0
    n_clicks_taken_back: int = 0
    n_clicks_retracted: int = 0


class ForgettingRecord(msgspec.Struct, frozen=True, array_like=True):
    """Which events a `UserForgotten` took back: those from ``starts`` to before ``ends``, by topic and partition.

    It is kept under the event's place in the log, for a recount; of the user it holds nothing.
    """

    starts: dict[str, dict[int, int]]
    ends: dict[str, dict[int, int]]


class LiveRestartRecord(msgspec.Struct, frozen=True, array_like=True):
    """When a product's live counts last began anew, and since when what they began with had been counted.

    Both are watermarks: they began with the impressions labelled from ``evidence_from_ms`` on.
    """

    at_ms: int
    evidence_from_ms: int


class Cell(msgspec.Struct, frozen=True):
    """Counts of one creative in one group of one product.

    ``n_*`` are for life and exact; ``live_*`` decay with event time (half-life in the settings).
    """

    product_id: str
    group_id: int
    creative_id: str
    n_impressions: int
    n_clicks: int
    live_impressions: float
    live_clicks: float
    updated_at_ms: int


class ProfileTrait(msgspec.Struct, frozen=True, array_like=True):
    """A value more common in the group than among the product's users."""

    attribute: str
    value: str
    share: float
    lift: float


N_FEATURE_POINTS: Final = 11
"""Points of a group feature: the centroid and ten members (Eq. 6)."""


class GroupRecord(msgspec.Struct, frozen=True, array_like=True):
    """One group of a product's users; ``feature`` is float32 (11, D): Eq. 6, the centroid first.

    ``radius`` is the root mean square distance of its members from the centroid, as of the same regrouping.
    """

    group_id: int
    share: float
    n_members: int
    feature: bytes
    profile: list[ProfileTrait]
    born_at_ms: int
    radius: float = 0.0


class LineageRecord(msgspec.Struct, frozen=True, array_like=True):
    """What became of a group at a regrouping: birth, death or merge (into ``successor_id``)."""

    at_ms: int
    kind: str
    group_id: int
    successor_id: int | None


class ProductGroups(msgspec.Struct, frozen=True, array_like=True):
    """The groups of one product, as of one encoder version.

    ``p_value`` is that of the likelihood-ratio test that the groups' creative preferences differ;
    None while there is too little to test. ``silhouettes`` has one entry for each K tried.
    ``successors`` maps a retired group to the one that took over its counts (0: that from before the first grouping,
    which takes over those of groups that died long ago). ``borrowed_from`` is the product whose groups these are until
    there are enough of its own users; None from then on.
    """

    product_id: str
    encoder_version: int
    groups: list[GroupRecord]
    next_group_id: int
    silhouettes: dict[int, float]
    p_value: float | None
    distinct: bool
    refreshed_at_ms: int
    lineage: list[LineageRecord]
    successors: dict[int, int]
    borrowed_from: str | None = None


class ExpectationRecord(msgspec.Struct, frozen=True, array_like=True):
    """Which creatives the preference model expects each group of a product to prefer.

    ``log_relative`` float32 (G, C): logarithm of the group's CTR over all users', for ``group_ids`` and ``creatives``
    (registration numbers, in order). ``n_impressions`` are those that the product had had when the model was asked.
    """

    group_ids: list[int]
    creatives: list[int]
    log_relative: bytes
    n_impressions: int = 0


class SlopeRecord(msgspec.Struct, frozen=True, array_like=True):
    """Sums of the calibration slope of what is expected: how far the clicks follow it, and how far they could."""

    score: float
    information: float


class ClusteringRecord(msgspec.Struct, frozen=True, array_like=True):
    """The moving part of a product's grouping.

    ``centroids`` is float32 (sum of K over K_min..K_max, D), ``masses`` float32 over the same rows,
    ``reservoir`` uint8 (n, N): attribute codes of sampled users, ``labels`` uint8 (n_k, n): the
    reservoir's cluster for each K at the last refresh; of those drawn since, when they were drawn.
    The first ``n_lent`` users of the reservoir are those of the product that the groups are borrowed from.
    """

    encoder_version: int
    k: int
    group_ids: list[int]
    centroids: bytes
    masses: bytes
    n_seen: int
    reservoir: bytes
    user_keys: bytes
    labels: bytes
    n_since_refresh: int
    n_lent: int = 0


class CategoryMetricsRecord(msgspec.Struct, frozen=True, array_like=True):
    """Sums over the predictions of a category; ``histogram`` uint32 (2, n_bins) of them: not clicked, clicked."""

    n_labelled: int
    n_clicks: int
    n_expected: float
    log_loss_sum: float
    histogram: bytes


class ArmRecord(msgspec.Struct, frozen=True, array_like=True):
    """Counts of one arm in one bucket of users and one phase of the experiment."""

    n_impressions: int
    n_clicks: int


class ShiftRecord(msgspec.Struct, frozen=True, array_like=True):
    """A published shift, as the report shows it."""

    event_id: str
    product_id: str
    category: str | None
    detected_at_ms: int
    statistic: float
    threshold: float
    n_impressions_since_change: int
    cells_before: list[tuple[int, str, int, int]]


class OutboxRecord(msgspec.Struct, frozen=True, array_like=True):
    """An outbound message, kept until the broker has acknowledged it."""

    topic: str
    key: str
    timestamp_ms: int
    payload: bytes


class FileRecord(msgspec.Struct, frozen=True, array_like=True):
    """A file that is to lie at ``uri``, kept until it does."""

    uri: str
    payload: bytes


_CELL = struct.Struct("<QQddQ")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


def encode_record(record: msgspec.Struct) -> bytes:
    """Return the bytes of a record."""
    return _ENCODER.encode(record)


_ENCODER = msgspec.msgpack.Encoder()


def encode_cell(cell: Cell) -> bytes:
    """Return the counts of a cell as 40 fixed bytes."""
    return _CELL.pack(cell.n_impressions, cell.n_clicks, cell.live_impressions, cell.live_clicks, cell.updated_at_ms)


def decode_cell(key: bytes, value: bytes) -> Cell:
    """Return the cell of a key and its 40 bytes."""
    product_id, rest = key.split(SEPARATOR, 1)
    group_id = _U32.unpack(rest[:4])[0]
    return Cell(product_id.decode(), group_id, rest[4:].decode(), *_CELL.unpack(value))


def cell_key(product_id: str, group_id: int, creative_id: str) -> bytes:
    """Return the key of a (product, group, creative) cell; cells of a product lie together."""
    return product_id.encode() + SEPARATOR + _U32.pack(group_id) + creative_id.encode()


def creative_key(product_id: str, creative_id: str) -> bytes:
    """Return the key of a creative; creatives of a product lie together."""
    return product_id.encode() + SEPARATOR + creative_id.encode()


def scope_key(product_id: str, category: str | None) -> bytes:
    """Return the key of what the products of a category share; one without category shares it with no other."""
    return (
        b"product" + SEPARATOR + product_id.encode()
        if category is None
        else b"category" + SEPARATOR + category.encode()
    )


def partition_key(topic: str, partition: int) -> bytes:
    """Return the key of a partition's offset record."""
    return topic.encode() + SEPARATOR + _U32.pack(partition)


def split_partition_key(key: bytes) -> tuple[str, int]:
    """Return (topic, partition) of a partition's key."""
    topic, rest = key.split(SEPARATOR, 1)
    return topic.decode(), _U32.unpack(rest)[0]


def place_key(topic: str, partition: int, offset: int, row: int) -> bytes:
    """Return the key of an event's place in the log."""
    return partition_key(topic, partition) + _U64.pack(offset) + _U32.pack(row)


def split_place_key(key: bytes) -> tuple[str, int, int, int]:
    """Return (topic, partition, offset, row) of a key made by `place_key`."""
    topic, rest = key.split(SEPARATOR, 1)
    return topic.decode(), *struct.unpack(">IQI", rest)


def timer_key(at_ms: int, impression_id: str) -> bytes:
    """Return the key of a timer; timers lie in the order in which they fire."""
    return _U64.pack(at_ms) + impression_id.encode()


def split_timer_key(key: bytes) -> tuple[int, str]:
    """Return (time in ms, impression id) of a timer's key."""
    return _U64.unpack(key[:8])[0], key[8:].decode()


SPACE_KEY = b"space"
"""Key, among the encoders, of what users are clustered by."""


def number_key(number: int) -> bytes:
    """Return a key that sorts by number (encoder versions, replay blocks, outbox entries)."""
    return _U64.pack(number)


def split_number_key(key: bytes) -> int:
    """Return the number of a key made by `number_key`."""
    return int(_U64.unpack(key)[0])


def arm_key(experiment: str, arm: str, user_bucket: int) -> bytes:
    """Return the key of an arm's counts in one bucket of users."""
    return experiment.encode() + SEPARATOR + arm.encode() + SEPARATOR + _U32.pack(user_bucket)


def split_arm_key(key: bytes) -> tuple[str, str, int]:
    """Return (experiment, arm, user bucket) of an arm's key."""
    experiment, arm, rest = key.split(SEPARATOR, 2)
    return experiment.decode(), arm.decode(), _U32.unpack(rest)[0]
