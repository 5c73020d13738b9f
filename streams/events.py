"""Event schemas: every message that crosses a topic, as typed structs.

One struct per topic; corrections are two structs on one topic, told apart by their ``type``. Times are
event times in milliseconds since the Unix epoch (``_ms``). Unknown fields are ignored, so that
producers may add some; an unknown ``schema_version``, a missing field or a value outside its range is
refused by the decoder and ends in the dead letters.
The JSON Schemas in ``docs/schemas/`` are exported from here (``osmf schemas``).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+\Z")]
"""An identifier: 1 to 200 characters, no control characters (the state joins ids with NUL)."""

MAX_ID_BYTES = 200
"""Bytes of an identifier in UTF-8: two of them make a key of the state, which holds 511."""

GroupId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
"""A group's number within its product."""

TimeMs = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799_999)]
"""An event time: milliseconds since the Unix epoch, up to the year 9999."""

Probability = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
"""The chance with which a policy chose what it showed."""

SchemaVersion = Literal[1]


def _check_id_bytes(event: msgspec.Struct, *names: str) -> None:
    # The schema counts characters; only text that is not ASCII can have more bytes than that.
    for name in names:
        value: str | None = getattr(event, name)
        if value is not None and not value.isascii() and len(value.encode()) > MAX_ID_BYTES:
            raise IdTooLongError(name, len(value.encode()))


class IdTooLongError(ValueError):
    """An identifier has too many bytes to be a part of the state's keys."""

    def __init__(self, name: str, n_bytes: int) -> None:
        super().__init__(f"{name} has {n_bytes} bytes in UTF-8; at most {MAX_ID_BYTES} are allowed")


class Impression(msgspec.Struct, frozen=True, kw_only=True):
    """One showing of a creative of a product to a user.

    ``attributes`` are the user's, as they were known when the creative was shown (features logged
    at serving time cannot drift from those of training). Missing ones may be left out.
    ``experiment`` and ``arm`` name the A/B arm that chose the creative, ``p_shown`` the chance with
    which it did.
    """

    impression_id: Id
    user_id: Id
    product_id: Id
    creative_id: Id
    shown_at_ms: TimeMs
    attributes: dict[str, str] = {}
    experiment: Id | None = None
    arm: Id | None = None
    p_shown: Probability | None = None
    schema_version: SchemaVersion = 1

    def __post_init__(self) -> None:
        """Check what a schema cannot: the ids' bytes."""
        _check_id_bytes(self, "impression_id", "product_id", "creative_id", "experiment", "arm")


class Click(msgspec.Struct, frozen=True, kw_only=True):
    """A click on an earlier impression; at most one per impression is counted."""

    impression_id: Id
    product_id: Id
    clicked_at_ms: TimeMs
    schema_version: SchemaVersion = 1

    def __post_init__(self) -> None:
        """Check what a schema cannot: the ids' bytes."""
        _check_id_bytes(self, "impression_id", "product_id")


class ClickRetracted(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """A click that was counted is none after all, such as one found to be fraud: it is taken back everywhere."""

    impression_id: Id
    product_id: Id
    retracted_at_ms: TimeMs
    reason: str | None = None
    schema_version: SchemaVersion = 1

    def __post_init__(self) -> None:
        """Check what a schema cannot: the ids' bytes."""
        _check_id_bytes(self, "impression_id", "product_id")


class UserForgotten(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """A user is to be forgotten: all that was added for the user is taken back, and nothing of the user is kept.

    Impressions lie in the partition of their product, so that one copy belongs in every partition of the topic
    (`streams.producer.EventProducer` sends it so).
    """

    user_id: Id
    forgotten_at_ms: TimeMs
    schema_version: SchemaVersion = 1

    def __post_init__(self) -> None:
        """Check what a schema cannot: the id's bytes, since it is the key of the message."""
        _check_id_bytes(self, "user_id")


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """A product: its title, and its cut-out picture where there is one."""

    product_id: Id
    title: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    updated_at_ms: TimeMs
    category: Id | None = None
    image_uri: str | None = None
    schema_version: SchemaVersion = 1

    def __post_init__(self) -> None:
        """Check what a schema cannot: the ids' bytes."""
        _check_id_bytes(self, "product_id")


class CreativePrior(msgspec.Struct, frozen=True, kw_only=True):
    """What is believed of a creative before anybody has seen it, in the group that it was made for.

    Its CTR relative to that of the group's other creatives, worth ``n_impressions``; ``reward_model`` is who says so.
    """

    relative_ctr: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)]
    n_impressions: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
    reward_model: str


class Creative(msgspec.Struct, frozen=True, kw_only=True):
    """An image that may be shown for a product.

    ``prompt`` is what it was drawn from, ``prompt_writer`` who wrote that (a G-MLLM, or the grammar), ``group_id`` the
    group it was made for, ``caused_by`` the id of the event that asked for it and ``prior`` what is believed of it
    there; all are absent for a picture that people made.
    """

    creative_id: Id
    product_id: Id
    created_at_ms: TimeMs
    image_uri: str | None = None
    image_sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None
    prompt: str | None = None
    origin: Literal["catalogue", "generated"] = "catalogue"
    group_id: GroupId | None = None
    caused_by: Id | None = None
    prompt_writer: str | None = None
    prior: CreativePrior | None = None
    schema_version: SchemaVersion = 1

    def __post_init__(self) -> None:
        """Check what a schema cannot: the ids' bytes."""
        _check_id_bytes(self, "creative_id", "product_id")


Verdict = Literal["accepted", "rejected"]
"""What a person says of a creative that waits."""


class CreativeReviewed(msgspec.Struct, frozen=True, kw_only=True):
    """A person's verdict on a creative that waits to be shown; the first one holds.

    ``reviewed_by`` names the person, ``reason`` says why in their own words.
    """

    creative_id: Id
    product_id: Id
    verdict: Verdict
    reviewed_by: Id
    reviewed_at_ms: TimeMs
    reason: Annotated[str, msgspec.Meta(max_length=2000)] = ""
    schema_version: SchemaVersion = 1

    def __post_init__(self) -> None:
        """Check what a schema cannot: the ids' bytes."""
        _check_id_bytes(self, "creative_id", "product_id")


RequestCause = Literal["person", "fatigue", "new_product", "new_group"]
"""Why creatives are asked for: a person wants them, the best one wears out, or a product or a group is new."""


class CreativeRequested(msgspec.Struct, frozen=True, kw_only=True):
    """New creatives are asked for: for one group of a product, or for all of them.

    ``requested_by`` names the person or the process. A person's request is carried out whatever it costs.
    """

    event_id: Id
    product_id: Id
    requested_by: Id
    requested_at_ms: TimeMs
    group_id: GroupId | None = None
    cause: RequestCause = "person"
    reason: Annotated[str, msgspec.Meta(max_length=2000)] = ""
    schema_version: SchemaVersion = 1

    def __post_init__(self) -> None:
        """Check what a schema cannot: the product's id is the key of the message."""
        _check_id_bytes(self, "product_id")


class ProfileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One trait of a group: a value more common in it than among the product's users.

    ``share`` is the value's share in the group, ``lift`` that share over the product's.
    """

    attribute: str
    value: str
    share: float
    lift: float


class CreativeCtr(msgspec.Struct, frozen=True, kw_only=True):
    """A creative's CTR in a group: what was counted, and the shrunk estimate with its 95% interval.

    ``ctr_before`` is the shrunk estimate of what was counted before.
    """

    creative_id: str
    n_impressions: int
    n_clicks: int
    ctr: float
    ctr_low: float
    ctr_high: float
    ctr_before: float | None = None


class ShiftedGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A group of the shifted product: who is in it, and what it clicks since the change.

    ``ranking_agreement`` is the NDCG@5 of its ranking of the creatives before the change, by what it clicks since; 1 is
    the same ranking. ``centroid_displacement`` is how far its centroid has moved since the last regrouping, in units of
    its radius then (root mean square distance of its members): how far its users have changed, not their tastes. It is
    None where the product has one group.
    """

    group_id: int
    share: float
    profile: list[ProfileEntry]
    creatives: list[CreativeCtr]
    ranking_agreement: float = 1.0
    centroid_displacement: float | None = None


ShiftScope = Literal["product", "category"]
"""Whose impressions gave a change away: the product's own, or those of all products of its category."""


class GroupsShifted(msgspec.Struct, frozen=True, kw_only=True):
    """The tastes of a product's groups have changed.

    ``statistic``, summed over the product's own impressions or its category's (``scope``), crossed
    ``threshold``; of the product's own there were ``n_impressions_since_change`` from the estimated
    change on. ``event_id`` depends only on the input, so a replay repeats it.
    """

    event_id: Id
    product_id: Id
    detected_at_ms: TimeMs
    encoder_version: int
    statistic: float
    threshold: float
    n_impressions_since_change: int
    groups: list[ShiftedGroup]
    category: str | None = None
    scope: ShiftScope = "product"
    schema_version: SchemaVersion = 1


DeadLetterReason = Literal[
    "bad_json",
    "bad_arrow",
    "unknown_version",
    "missing_field",
    "invalid_field",
    "unknown_product",
    "unknown_creative",
    "unknown_impression",
    "unknown_click",
    "ledger_off",
    "unreadable_image",
    "time_ahead",
    "over_limit",
]
"""Why an event could not be used; ``docs/events.md`` has a line on each."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """An event that could not be used: why, where it stood, and its bytes."""

    event_id: Id
    reason: DeadLetterReason
    detail: str
    topic: str
    partition: int
    offset: int
    payload: bytes
    schema_version: SchemaVersion = 1


Correction = ClickRetracted | UserForgotten
"""What takes back an earlier event."""

Event = (
    Impression
    | Click
    | ClickRetracted
    | UserForgotten
    | Product
    | Creative
    | CreativeReviewed
    | CreativeRequested
    | GroupsShifted
    | DeadLetter
)
"""Any event of ours."""
