"""The codec: good events survive, wrong ones are named exactly, and nothing that arrives makes it raise."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.codec import (
    ARROW_STREAM_MARK,
    EventDecoder,
    FieldMapError,
    Undecodable,
    encode,
    event_key,
    event_time_ms,
    event_topics,
    json_schemas,
    topic_decoders,
)
from streams.events import (
    Click,
    ClickRetracted,
    Correction,
    Creative,
    CreativeReviewed,
    DeadLetter,
    DeadLetterReason,
    Event,
    GroupsShifted,
    Impression,
    Product,
    ProfileEntry,
    ShiftedGroup,
    UserForgotten,
)
from streams.settings import FieldMapSettings, TopicSettings

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"

IMPRESSION = Impression(
    impression_id="i1",
    user_id="u1",
    product_id="p1",
    creative_id="c1",
    shown_at_ms=1_748_822_400_000,
    attributes={"age": "18-20", "color": "größe"},
    experiment="groups",
    arm="all",
    p_shown=0.25,
)
CLICK = Click(impression_id="i1", product_id="p1", clicked_at_ms=1_748_822_401_000)
PRODUCT = Product(product_id="p1", title="An oak chair", updated_at_ms=5, category="chairs", image_uri="file:///a.png")
CREATIVE = Creative(
    creative_id="c1",
    product_id="p1",
    created_at_ms=6,
    image_uri="file:///b.png",
    image_sha256="0a" * 32,
    prompt="a chair",
    origin="generated",
    group_id=3,
    caused_by="shift-1",
)
SHIFT = GroupsShifted(
    event_id="shift-1",
    product_id="p1",
    detected_at_ms=7,
    encoder_version=2,
    statistic=50.5,
    threshold=40.0,
    n_impressions_since_change=300,
    groups=[
        ShiftedGroup(
            group_id=1,
            share=0.5,
            profile=[ProfileEntry(attribute="age", value="18-20", share=0.5, lift=2.0)],
            creatives=[],
        )
    ],
)
REVIEWED = CreativeReviewed(
    creative_id="c1", product_id="p1", verdict="rejected", reviewed_by="ann", reviewed_at_ms=8, reason="dark"
)
DEAD_LETTER = DeadLetter(
    event_id="t-0-1-0", reason="bad_json", detail="d", topic="t", partition=0, offset=1, payload=b"\x00\xff"
)
EVENTS: list[Event] = [IMPRESSION, CLICK, PRODUCT, CREATIVE, REVIEWED, SHIFT, DEAD_LETTER]
BY_NAME: dict[str, Event] = {type(event).__name__: event for event in EVENTS}


def raw_of(event: Event) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(encode(event))
    return raw


def only(decoded: list[Event | Undecodable]) -> Event | Undecodable:
    assert len(decoded) == 1
    return decoded[0]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_round_trips(event: Event) -> None:
    assert EventDecoder(type(event)).decode(encode(event)) == [event]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_unknown_fields_are_ignored_and_defaults_fill_in(event: Event) -> None:
    raw = raw_of(event)
    required = {f.name for f in msgspec.structs.fields(event) if f.required}
    fewest = {name: value for name, value in raw.items() if name in required}
    decoded = only(EventDecoder(type(event)).decode(json.dumps({**fewest, "brand_new": [1, {"a": None}]}).encode()))
    assert isinstance(decoded, type(event))
    for name in required:
        assert getattr(decoded, name) == getattr(event, name)
    assert decoded.schema_version == 1


LONG = "x" * 201
WRONG: list[tuple[str, dict[str, Any] | None, DeadLetterReason, str]] = [
    # (event, what is changed (None drops the field), the reason, what the detail must say)
    *(
        (name, {field.name: None}, "missing_field", field.name)
        for name, event in BY_NAME.items()
        for field in msgspec.structs.fields(event)
        if field.required
    ),
    *((name, {"schema_version": 2}, "unknown_version", "schema_version") for name in BY_NAME),
    *((name, {"schema_version": "1"}, "unknown_version", "schema_version") for name in BY_NAME),
    ("Impression", {"schema_version": 1.5}, "unknown_version", "schema_version"),
    ("Impression", {"impression_id": ""}, "invalid_field", "impression_id"),
    ("Impression", {"impression_id": LONG}, "invalid_field", "impression_id"),
    ("Impression", {"impression_id": "a\x00b"}, "invalid_field", "impression_id"),
    ("Impression", {"impression_id": "line\nbreak"}, "invalid_field", "impression_id"),
    ("Impression", {"impression_id": "trailing\n"}, "invalid_field", "impression_id"),
    ("Impression", {"impression_id": 12}, "invalid_field", "impression_id"),
    ("Impression", {"user_id": ["u"]}, "invalid_field", "user_id"),
    ("Impression", {"product_id": {"id": "p"}}, "invalid_field", "product_id"),
    ("Impression", {"creative_id": True}, "invalid_field", "creative_id"),
    ("Impression", {"shown_at_ms": -1}, "invalid_field", "shown_at_ms"),
    ("Impression", {"shown_at_ms": 253_402_300_800_000}, "invalid_field", "shown_at_ms"),
    ("Impression", {"shown_at_ms": 10**30}, "invalid_field", "shown_at_ms"),
    ("Impression", {"shown_at_ms": 1.5}, "invalid_field", "shown_at_ms"),
    ("Impression", {"shown_at_ms": "now"}, "invalid_field", "shown_at_ms"),
    ("Impression", {"attributes": ["age"]}, "invalid_field", "attributes"),
    ("Impression", {"attributes": {"age": 18}}, "invalid_field", "attributes"),
    ("Impression", {"p_shown": 0.0}, "invalid_field", "p_shown"),
    ("Impression", {"p_shown": 1.01}, "invalid_field", "p_shown"),
    ("Impression", {"p_shown": -0.5}, "invalid_field", "p_shown"),
    ("Impression", {"experiment": ""}, "invalid_field", "experiment"),
    ("Click", {"clicked_at_ms": -1}, "invalid_field", "clicked_at_ms"),
    ("Click", {"impression_id": "\x1f"}, "invalid_field", "impression_id"),
    ("Product", {"title": ""}, "invalid_field", "title"),
    ("Product", {"title": "t" * 2001}, "invalid_field", "title"),
    ("Product", {"category": "a\tb"}, "invalid_field", "category"),
    ("Creative", {"origin": "painted"}, "invalid_field", "origin"),
    ("Creative", {"image_sha256": "0A" * 32}, "invalid_field", "image_sha256"),
    ("Creative", {"image_sha256": "0a" * 31}, "invalid_field", "image_sha256"),
    ("Creative", {"group_id": -1}, "invalid_field", "group_id"),
    ("Creative", {"group_id": 2**32}, "invalid_field", "group_id"),
    ("Creative", {"group_id": 10**30}, "invalid_field", "group_id"),
    # Ids are joined to keys of the state, which hold 511 bytes: 200 is for each, in UTF-8.
    ("Impression", {"impression_id": "é" * 101}, "invalid_field", "impression_id"),
    ("Impression", {"arm": "日" * 67}, "invalid_field", "arm"),
    ("Click", {"impression_id": "🛋" * 51}, "invalid_field", "impression_id"),
    ("Product", {"product_id": "日" * 67}, "invalid_field", "product_id"),
    ("Creative", {"creative_id": "日" * 67}, "invalid_field", "creative_id"),
]


@pytest.mark.parametrize(("name", "changed", "reason", "said"), WRONG)
def test_a_wrong_event_is_named(name: str, changed: dict[str, Any], reason: DeadLetterReason, said: str) -> None:
    raw = {**raw_of(BY_NAME[name]), **changed}
    if reason == "missing_field":
        raw = {key: value for key, value in raw.items() if key not in changed}
    payload = json.dumps(raw).encode()
    found = only(EventDecoder(type(BY_NAME[name])).decode(payload))
    assert isinstance(found, Undecodable)
    assert (found.reason, found.payload) == (reason, payload)
    assert said in found.detail
    if reason == "missing_field":
        required = sorted(field.name for field in msgspec.structs.fields(BY_NAME[name]) if field.required)
        assert found.detail.endswith(f"; {name} needs {', '.join(required)}")


@pytest.mark.parametrize("text", ["é" * 100, "日" * 66, "x" * 200])
def test_ids_of_200_bytes_are_fine(text: str) -> None:
    impression = msgspec.structs.replace(IMPRESSION, impression_id=text, product_id=text, creative_id=text)
    assert EventDecoder(Impression).decode(encode(impression)) == [impression]


@pytest.mark.parametrize(
    ("payload", "reason", "said"),
    [
        (None, "bad_json", "empty"),
        (b"", "bad_json", "empty"),
        (b"nonsense", "bad_json", "byte 4"),
        (b'{"impression_id": "i1"', "bad_json", "truncated"),
        (b'{"impression_id": "\xff"}', "bad_json", "utf-8"),
        (b'{"impression_id": "\\ud800 and so on"}', "bad_json", "surrogate"),
        (encode(IMPRESSION) + b' {"b": 1}', "bad_json", "trailing"),
        (b'{"a":' * 100_000, "bad_json", ""),
        (b'{"p_shown": NaN}', "bad_json", "byte"),
        (b"\x00\x00\x00\x00\x01", "bad_json", ""),
        (b"[]", "invalid_field", "object"),
        (b"3", "invalid_field", "object"),
        (b"null", "invalid_field", "object"),
        (b"{}", "missing_field", "impression_id"),
        (ARROW_STREAM_MARK, "bad_arrow", ""),
        (ARROW_STREAM_MARK + b"\x10\x00\x00\x00garbage", "bad_arrow", ""),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_bytes_that_are_no_event(payload: bytes | None, reason: str, said: str, mapped: bool) -> None:
    decoder = EventDecoder(Impression, {"user_id": "user.id"} if mapped else None)
    found = only(decoder.decode(payload))
    assert isinstance(found, Undecodable)
    assert found.reason == reason
    assert said.lower() in found.detail.lower()
    assert len(found.detail) <= 400
    assert found.payload == (payload or b"")


# --- Field maps


def test_a_field_map_reads_a_platforms_own_names() -> None:
    decoder = EventDecoder(
        Impression,
        {"creative_id": "ad.image.id", "user_id": "uid", "attributes": "user.traits", "shown_at_ms": "ts"},
    )
    theirs = {
        "impression_id": "i1",
        "product_id": "p1",
        "uid": "u9",
        "ts": 12,
        "ad": {"image": {"id": "c9"}},
        "user": {"traits": {"age": "18-20"}},
    }
    assert decoder.decode(json.dumps(theirs).encode()) == [
        Impression(
            impression_id="i1",
            user_id="u9",
            product_id="p1",
            creative_id="c9",
            shown_at_ms=12,
            attributes={"age": "18-20"},
        )
    ]


@pytest.mark.parametrize(
    "ad", [None, {}, {"image": None}, {"image": "c9"}, {"image": {"id": None}}, {"image": [{"id": "c9"}]}, "c9"]
)
def test_a_path_that_leads_nowhere_is_a_missing_field_whatever_our_own_name_holds(ad: object) -> None:
    decoder = EventDecoder(Impression, {"creative_id": "ad.image.id"})
    found = only(decoder.decode(json.dumps({**raw_of(IMPRESSION), "ad": ad}).encode()))
    assert isinstance(found, Undecodable)
    assert found.reason == "missing_field"
    assert "creative_id" in found.detail


def test_a_wrong_value_behind_a_path_is_refused_with_the_message_as_it_came() -> None:
    payload = json.dumps({**raw_of(CLICK), "when": {"ms": "soon"}}).encode()
    found = only(EventDecoder(Click, {"clicked_at_ms": "when.ms"}).decode(payload))
    assert isinstance(found, Undecodable)
    assert (found.reason, found.payload) == ("invalid_field", payload)
    assert "clicked_at_ms" in found.detail


def test_a_field_map_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(FieldMapError, match=r"field map of Click names clicked_at, .*allowed are clicked_at_ms, "):
        EventDecoder(Click, {"clicked_at": "ts"})
    with pytest.raises(FieldMapError, match="of Product names price"):
        topic_decoders(TopicSettings(), FieldMapSettings(products={"price": "p"}))


RETRACTED = ClickRetracted(impression_id="i1", product_id="p1", retracted_at_ms=8, reason="fraud")
USER_FORGOTTEN = UserForgotten(user_id="u1", forgotten_at_ms=9)


@pytest.mark.parametrize("event", [RETRACTED, USER_FORGOTTEN])
def test_two_kinds_of_event_on_a_topic_are_told_apart_by_their_type(event: Correction) -> None:
    assert only(EventDecoder(Correction).decode(encode(event))) == event
    raw = raw_of(event)
    renamed = {
        ("kind" if name == "type" else "who" if name == "user_id" else name): value for name, value in raw.items()
    }
    fields = {"type": "kind", "user_id": "who"}
    assert only(EventDecoder(Correction, fields).decode(json.dumps(renamed).encode())) == event
    table = pa.Table.from_pylist([{name: value for name, value in raw.items() if value is not None}])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert only(EventDecoder(Correction).decode(sink.getvalue().to_pybytes())) == event


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": None}, "invalid_field"),
        ({"type": "Click"}, "invalid_field"),
        ({"schema_version": 2}, "unknown_version"),
        ({"retracted_at_ms": -1}, "invalid_field"),
    ],
)
def test_a_correction_of_no_known_kind_is_refused(change: dict[str, object], reason: str) -> None:
    found = only(EventDecoder(Correction).decode(json.dumps({**raw_of(RETRACTED), **change}).encode()))
    assert isinstance(found, Undecodable)
    assert found.reason == reason


def test_a_correction_without_a_type_names_what_is_needed() -> None:
    found = only(EventDecoder(Correction).decode(b'{"impression_id": "i1"}'))
    assert isinstance(found, Undecodable)
    assert found.reason == "missing_field"
    assert "`type`; ClickRetracted or UserForgotten needs type" in found.detail
    with pytest.raises(FieldMapError, match="of ClickRetracted or UserForgotten names user"):
        topic_decoders(TopicSettings(), FieldMapSettings(corrections={"user": "u"}))


# --- Arrow


def arrow(rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> bytes:
    table = pa.Table.from_pylist(rows, schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    data: bytes = sink.getvalue().to_pybytes()
    return data


FLAT = {"impression_id": "i", "user_id": "u", "product_id": "p", "creative_id": "c", "shown_at_ms": 5}


def test_an_arrow_batch_is_one_event_a_row() -> None:
    rows = [
        {**FLAT, "impression_id": f"i{n}", "attributes": {"age": "18-20" if n % 2 else None, "color": "red"}}
        for n in range(5)
    ]
    found = EventDecoder(Impression).decode(arrow(rows))
    assert found == [
        Impression(
            **{**FLAT, "impression_id": f"i{n}"},  # type: ignore[arg-type]
            attributes={"age": "18-20", "color": "red"} if n % 2 else {"color": "red"},
        )
        for n in range(5)
    ]


def test_arrow_maps_and_nulls_are_attributes_and_absent_fields() -> None:
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("impression_id", "user_id", "product_id", "creative_id", "arm")),
            ("shown_at_ms", pa.int64()),
            ("attributes", pa.map_(pa.string(), pa.string())),
            ("p_shown", pa.float64()),
        ]
    )
    rows = [
        {**FLAT, "attributes": [("age", "18-20"), ("color", None)], "arm": "all", "p_shown": 0.5},
        {**FLAT, "attributes": None, "arm": None, "p_shown": None},
    ]
    plain: Any = FLAT
    assert EventDecoder(Impression).decode(arrow(rows, schema)) == [
        Impression(**plain, attributes={"age": "18-20"}, arm="all", p_shown=0.5),
        Impression(**plain),
    ]


def test_a_bad_row_of_an_arrow_batch_spares_the_others() -> None:
    rows = [{**FLAT, "shown_at_ms": at_ms} for at_ms in (1, -1, 3, None)]
    good, negative, also_good, missing = EventDecoder(Impression).decode(arrow(rows))
    assert isinstance(good, Impression)
    assert isinstance(also_good, Impression)
    assert isinstance(negative, Undecodable)
    assert (negative.reason, "shown_at_ms" in negative.detail) == ("invalid_field", True)
    assert json.loads(negative.payload)["shown_at_ms"] == -1  # the row alone, not the whole batch
    assert isinstance(missing, Undecodable)
    assert (missing.reason, "shown_at_ms" in missing.detail) == ("missing_field", True)


def test_a_field_map_renames_arrow_columns_too() -> None:
    rows = [{**{k: v for k, v in FLAT.items() if k != "user_id"}, "user": {"id": "u7"}}]
    found = only(EventDecoder(Impression, {"user_id": "user.id"}).decode(arrow(rows)))
    assert isinstance(found, Impression)
    assert found.user_id == "u7"


def test_an_arrow_stream_without_rows_is_refused() -> None:
    schema = pa.schema([("impression_id", pa.string())])
    found = only(EventDecoder(Impression).decode(arrow([], schema)))
    assert isinstance(found, Undecodable)
    assert (found.reason, found.detail) == ("bad_arrow", "a stream without rows")


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param(pa.array([["age"]], pa.list_(pa.string())), id="list of strings"),
        pytest.param(pa.array([[1, 2]], pa.list_(pa.int64())), id="list of ints"),
        pytest.param(pa.array([["ab", "cd"]], pa.list_(pa.string())), id="list of pairs by accident"),
        pytest.param(pa.array([[(1, "x")]], pa.map_(pa.int64(), pa.string())), id="map with number keys"),
        pytest.param(pa.array([[(b"\xff", "x")]], pa.map_(pa.binary(), pa.string())), id="map with byte keys"),
        pytest.param(
            pa.array([[({"a": 1}, "x")]], pa.map_(pa.struct([("a", pa.int64())]), pa.string())),
            id="map with struct keys",
        ),
        pytest.param(pa.array([10**30], pa.decimal128(38, 0)), id="decimal"),
        pytest.param(pa.array([b"\xff\xfe"], pa.binary()), id="binary"),
        pytest.param(pa.array([2**63 - 1], pa.timestamp("s")), id="a time that Python cannot hold"),
        pytest.param(pa.array([2**63 - 1], pa.duration("s")), id="a duration that Python cannot hold"),
        pytest.param(pa.array([float("nan")], pa.float64()), id="not a number"),
    ],
)
@pytest.mark.parametrize("also_bad", [False, True])
def test_arrow_columns_of_strange_types_do_not_raise(attributes: pa.Array, also_bad: bool) -> None:
    columns = {name: pa.array([value]) for name, value in FLAT.items()}
    if also_bad:
        columns["user_id"] = pa.array([1])
    table = pa.table({**columns, "attributes": attributes})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found = only(EventDecoder(Impression).decode(sink.getvalue().to_pybytes()))
    assert isinstance(found, Undecodable)
    assert found.reason in ("bad_arrow", "invalid_field")
    assert found.payload


# --- Mutations

REASONS = set(get_args(DeadLetterReason))
JSON_VALUES: list[object] = [
    None,
    True,
    -1,
    0,
    10**30,
    -(10**30),
    1e308,
    0.1,
    "",
    "x" * 300,
    "\x00",
    "日" * 200,
    [],
    {},
    [[[]]],
    {"a": {"b": None}},
    "2026-01-01T00:00:00Z",
    253_402_300_799_999,
]


def flip_bytes(rng: random.Random, payload: bytes) -> bytes:
    changed = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def truncate(rng: random.Random, payload: bytes) -> bytes:
    return payload[: rng.randrange(len(payload))]


def splice(rng: random.Random, payload: bytes) -> bytes:
    a, b = sorted(rng.randrange(len(payload) + 1) for _ in range(2))
    return payload[:b] + payload[a:]


def swap_value(rng: random.Random, payload: bytes) -> bytes:
    raw = json.loads(payload)
    raw[rng.choice(list(raw))] = rng.choice(JSON_VALUES)
    return json.dumps(raw).encode()


def drop_field(rng: random.Random, payload: bytes) -> bytes:
    raw = json.loads(payload)
    del raw[rng.choice(list(raw))]
    return json.dumps(raw).encode()


def exchange_values(rng: random.Random, payload: bytes) -> bytes:
    raw = json.loads(payload)
    a, b = rng.choices(list(raw), k=2)
    raw[a], raw[b] = raw[b], raw[a]
    return json.dumps(raw).encode()


def write_in(rng: random.Random, payload: bytes) -> bytes:
    """Put text that JSON's own writers would not make in place of a value."""
    raw = json.loads(payload)
    name = rng.choice(list(raw))
    raw[name] = "@@"
    text = rng.choice(
        [
            b"NaN",
            b"-Infinity",
            b'"\\ud800"',
            b'"\\udc00\\ud800"',
            b'"\xed\xa0\x80"',
            b'"\xff"',
            b"1" * 5_000,
            b"1e999",
            b"-0",
            b"[" * 2_000 + b"]" * 2_000,
            b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
            b"0x10",
            b"'single'",
        ]
    )
    return json.dumps(raw).encode().replace(b'"@@"', text)


def repeat_field(rng: random.Random, payload: bytes) -> bytes:
    raw = json.loads(payload)
    name = rng.choice(list(raw))
    return payload[:-1] + b"," + json.dumps({name: rng.choice(JSON_VALUES)}).encode()[1:]


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    flip_bytes,
    truncate,
    splice,
    swap_value,
    drop_field,
    exchange_values,
    write_in,
    repeat_field,
]


def test_10_000_mutations_of_good_events_never_raise() -> None:
    rng = random.Random(20)
    payloads = [encode(event) for event in EVENTS[:4]]
    maps = [{}, {"product_id": "product_id", "schema_version": "meta.version"}]
    decoders = [[EventDecoder(type(event), fields) for event in EVENTS[:4]] for fields in maps]
    outcomes: Counter[str] = Counter()
    for n in range(10_000):
        which = n % 4
        mutated = MUTATIONS[n // 4 % len(MUTATIONS)](rng, payloads[which])
        for found in decoders[n // 32 % 2][which].decode(mutated):
            if isinstance(found, Undecodable):
                assert found.reason in REASONS
                assert found.detail
                assert len(found.detail) <= 400
                assert found.payload == mutated
                outcomes[found.reason] += 1
            else:
                # What was accepted can be written again, and read back the same.
                assert EventDecoder(type(found)).decode(encode(found)) == [found]
                assert event_time_ms(found) >= 0
                assert len(event_key(found).encode()) <= 200
                msgspec.msgpack.encode(found)  # the state's numbers have 64 bits
                outcomes["accepted"] += 1
    assert sum(outcomes.values()) == 10_000
    for outcome in ("bad_json", "missing_field", "invalid_field", "unknown_version", "accepted"):
        assert outcomes[outcome] > 100, outcomes


def test_mutations_of_an_arrow_batch_never_raise() -> None:
    rng = random.Random(21)
    good = arrow([{**FLAT, "impression_id": f"i{n}", "attributes": {"age": "x"}} for n in range(4)])
    decoder = EventDecoder(Impression)
    outcomes: Counter[str] = Counter()
    for n in range(2_000):
        mutated = ARROW_STREAM_MARK + (flip_bytes, truncate, splice)[n % 3](rng, good[4:])
        for found in decoder.decode(mutated):
            outcomes[found.reason if isinstance(found, Undecodable) else "accepted"] += 1
    assert outcomes["bad_arrow"] > 100
    assert outcomes["accepted"] > 100


@given(st.binary(max_size=200))
def test_no_bytes_make_a_decoder_raise(payload: bytes) -> None:
    for event in EVENTS:
        for found in EventDecoder(type(event)).decode(payload):
            assert isinstance(found, Undecodable)


# --- Topics and schemas


def test_every_topic_has_a_type_and_inputs_a_decoder() -> None:
    topics = TopicSettings()
    topic_of = event_topics(topics)
    assert set(topic_of) == set(get_args(Event))
    assert set(topic_of.values()) == set(topics.model_dump().values())
    decoders = topic_decoders(topics, FieldMapSettings())
    assert set(decoders) == set(topics.inputs)
    for event_type, topic in topic_of.items():
        if topic in decoders:
            assert event_type in (get_args(decoders[topic].event_type) or (decoders[topic].event_type,))


@pytest.mark.parametrize(
    ("event", "time_ms", "key"),
    [
        (IMPRESSION, 1_748_822_400_000, "p1"),
        (CLICK, 1_748_822_401_000, "p1"),
        (RETRACTED, 8, "p1"),
        (USER_FORGOTTEN, 9, "u1"),
        (PRODUCT, 5, "p1"),
        (CREATIVE, 6, "p1"),
        (SHIFT, 7, "p1"),
        (REVIEWED, 8, "p1"),
        (DEAD_LETTER, 0, "t-0-1-0"),
    ],
)
def test_a_message_is_stamped_with_event_time_and_keyed_by_product(event: Event, time_ms: int, key: str) -> None:
    assert (event_time_ms(event), event_key(event)) == (time_ms, key)


def test_the_json_schemas_in_docs_are_those_of_the_code() -> None:
    again = "regenerate them: osmf schemas --out docs/schemas"
    schemas = json_schemas()
    assert sorted(path.name for path in SCHEMAS.glob("*.json")) == sorted(schemas), again
    for name, schema in schemas.items():
        assert json.loads((SCHEMAS / name).read_text()) == schema, f"docs/schemas/{name} is out of date; {again}"
