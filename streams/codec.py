"""Codec: bytes of a message to typed events, and back.

A message is one JSON object, or an Arrow IPC stream with one event a row (for volume). What can't
be decoded comes back as an `Undecodable` with its reason; nothing here raises on bad input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, get_args

import msgspec

from streams.events import (
    Click,
    ClickRetracted,
    Correction,
    Creative,
    CreativeRequested,
    CreativeReviewed,
    DeadLetter,
    DeadLetterReason,
    Event,
    GroupsShifted,
    Impression,
    Product,
    UserForgotten,
)
from streams.settings import FieldMapSettings, TopicSettings

ARROW_STREAM_MARK = b"\xff\xff\xff\xff"
"""First bytes of an Arrow IPC stream (its continuation marker); no JSON text starts so."""

MAX_DETAIL_CHARS = 400

E = TypeVar("E", bound=msgspec.Struct)

_ENCODER = msgspec.json.Encoder()


class Undecodable(msgspec.Struct, frozen=True):
    """A message, or a row of one, that is no event: the reason, and what exactly is wrong."""

    reason: DeadLetterReason
    detail: str
    payload: bytes


def encode(event: Event) -> bytes:
    """Return an event as one JSON object."""
    return _ENCODER.encode(event)


class EventDecoder:
    """Decodes the messages of one topic.

    Parameters
    ----------
    event_type
        The struct that the topic holds, or the union of them (each then says its ``type``).
    fields
        A platform's own names: our field to their path (dots reach into objects). Empty: our names.
    """

    def __init__(self, event_type: type[Event] | UnionType, fields: Mapping[str, str] | None = None) -> None:
        self.event_type = event_type
        structs: tuple[type[Event], ...] = get_args(event_type) or (event_type,)
        self._name = " or ".join(struct.__name__ for struct in structs)
        tags = {tag for struct in structs if (tag := struct.__struct_config__.tag_field) is not None}
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(event_type)
        self._paths = {ours: theirs.split(".") for ours, theirs in (fields or {}).items()}
        fields_of = [msgspec.structs.fields(struct) for struct in structs]
        known = {field.name for each in fields_of for field in each} | tags
        if unknown := sorted(set(self._paths) - known):
            raise FieldMapError(self._name, unknown, sorted(known))
        required = [{field.name for field in each if field.required} for each in fields_of]
        self._required = set.intersection(*required) | tags

    def decode(self, payload: bytes | None) -> list[Event | Undecodable]:
        """Return the events of a message: one for JSON, one a row for Arrow IPC."""
        if not payload:
            return [Undecodable("bad_json", "empty message", b"")]
        if payload.startswith(ARROW_STREAM_MARK):
            return self._decode_arrow(payload)
        try:
            if self._paths:
                return [self._convert(msgspec.json.decode(payload), payload)]
            return [self._decoder.decode(payload)]
        except msgspec.ValidationError as error:
            return [self._explain(str(error), payload)]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return [Undecodable("bad_json", str(error)[:MAX_DETAIL_CHARS], payload)]

    def _decode_arrow(self, payload: bytes) -> list[Event | Undecodable]:
        import pyarrow as pa

        try:
            with pa.ipc.open_stream(payload) as reader:
                table = reader.read_all()
            # Arrow trusts the buffers that it is given: reading the values of a damaged one can end the process.
            table.validate(full=True)
            rows = table.to_pylist()
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            return [Undecodable("bad_arrow", str(error)[:MAX_DETAIL_CHARS], payload)]
        if not rows:
            return [Undecodable("bad_arrow", "a stream without rows", payload)]
        return [self._convert(self._clean_row(row), b"") for row in rows]

    def _clean_row(self, row: dict[str, Any]) -> dict[str, Any]:
        # A null of a column is an absent field; Arrow maps arrive as lists of pairs.
        attributes = row.get("attributes")
        if isinstance(attributes, list) and all(isinstance(p, tuple) and isinstance(p[0], str) for p in attributes):
            row = {**row, "attributes": dict(attributes)}
        if isinstance(row.get("attributes"), dict):
            row["attributes"] = {name: value for name, value in row["attributes"].items() if value is not None}
        return {name: value for name, value in row.items() if value is not None}

    def _convert(self, raw: Any, payload: bytes) -> Event | Undecodable:
        if self._paths and isinstance(raw, dict):
            raw = self._rename(raw)
        try:
            event: Event = msgspec.convert(raw, self.event_type)
        except msgspec.ValidationError as error:
            return self._explain(str(error), payload or msgspec.json.encode(raw, enc_hook=str))
        return event

    def _rename(self, raw: dict[str, Any]) -> dict[str, Any]:
        renamed = dict(raw)
        for ours, path in self._paths.items():
            value: Any = raw
            for step in path:
                value = value.get(step) if isinstance(value, dict) else None
            if value is not None:
                renamed[ours] = value
            else:
                renamed.pop(ours, None)
        return renamed

    def _explain(self, message: str, payload: bytes) -> Undecodable:
        if "missing required field" in message:
            reason: DeadLetterReason = "missing_field"
        elif "$.schema_version" in message:
            reason = "unknown_version"
        else:
            reason = "invalid_field"
        if reason == "missing_field":
            message += f"; {self._name} needs {', '.join(sorted(self._required))}"
        return Undecodable(reason, message[:MAX_DETAIL_CHARS], payload)


class FieldMapError(ValueError):
    """A field map names a field that the event does not have."""

    def __init__(self, name: str, unknown: list[str], known: list[str]) -> None:
        super().__init__(
            f"the field map of {name} names {', '.join(unknown)}, which it does not have: "
            f"allowed are {', '.join(known)}. Nothing was read."
        )


def event_topics(topics: TopicSettings) -> dict[type[Event], str]:
    """Return the topic of each type of event."""
    return {
        Impression: topics.impressions,
        Click: topics.clicks,
        ClickRetracted: topics.corrections,
        UserForgotten: topics.corrections,
        Product: topics.products,
        Creative: topics.creatives,
        CreativeReviewed: topics.creatives_reviewed,
        CreativeRequested: topics.creatives_requested,
        GroupsShifted: topics.groups_shifted,
        DeadLetter: topics.dead_letters,
    }


def topic_decoders(topics: TopicSettings, fields: FieldMapSettings) -> dict[str, EventDecoder]:
    """Return the decoders of the topics that the online process reads."""
    return {
        topics.impressions: EventDecoder(Impression, fields.impressions),
        topics.clicks: EventDecoder(Click, fields.clicks),
        topics.corrections: EventDecoder(Correction, fields.corrections),
        topics.products: EventDecoder(Product, fields.products),
        topics.creatives: EventDecoder(Creative, fields.creatives),
    }


def event_time_ms(event: Event) -> int:
    """Return when an event happened, milliseconds of event time (0 for a dead letter)."""
    match event:
        case Impression():
            return event.shown_at_ms
        case Click():
            return event.clicked_at_ms
        case ClickRetracted():
            return event.retracted_at_ms
        case UserForgotten():
            return event.forgotten_at_ms
        case Product():
            return event.updated_at_ms
        case Creative():
            return event.created_at_ms
        case CreativeReviewed():
            return event.reviewed_at_ms
        case CreativeRequested():
            return event.requested_at_ms
        case GroupsShifted():
            return event.detected_at_ms
        case DeadLetter():
            return 0


def event_key(event: Event) -> str:
    """Return the key of an event's message: the product, so that all of a product lies in one partition."""
    match event:
        case DeadLetter():
            return event.event_id
        case UserForgotten():
            return event.user_id
        case _:
            return event.product_id


def json_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each event, by the name of its file."""
    schemas = {}
    for event_type in get_args(Event):
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", event_type.__name__).lower()
        schemas[f"{name}.schema.json"] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **msgspec.json.schema(event_type),
        }
    return schemas
