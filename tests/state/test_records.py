"""Keys and records: what goes in comes out, and keys lie in the order that scans rely on."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.records import (
    SEPARATOR,
    Cell,
    GroupRecord,
    OffsetRecord,
    ProductGroups,
    ProfileTrait,
    WaitingClickRecord,
    arm_key,
    cell_key,
    creative_key,
    decode_cell,
    encode_cell,
    encode_record,
    number_key,
    partition_key,
    split_arm_key,
    split_number_key,
    split_partition_key,
    split_timer_key,
    timer_key,
)

# What the event schemas admit as an id: no control characters, which leaves NUL to the keys.
ids = st.text(st.characters(min_codepoint=0x20, exclude_categories=["Cs"]), min_size=1, max_size=40)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
counts = st.integers(0, 2**63)
weights = st.floats(0, 1e15)


@given(ids, u32, ids, counts, counts, weights, weights, counts)
def test_a_cell_round_trips_through_its_key_and_value(
    product_id: str, group_id: int, creative_id: str, n: int, x: int, live_n: float, live_x: float, at_ms: int
) -> None:
    cell = Cell(product_id, group_id, creative_id, n, x, live_n, live_x, at_ms)
    value = encode_cell(cell)
    assert len(value) == 40
    assert decode_cell(cell_key(product_id, group_id, creative_id), value) == cell


@pytest.mark.parametrize("live", [0.1 + 0.2, 1e-300, math.nextafter(1.0, 2.0), 123456.789])
def test_live_counts_keep_every_bit(live: float) -> None:
    cell = Cell("p", 1, "c", 3, 2, live, live / 3, 5)
    found = decode_cell(cell_key("p", 1, "c"), encode_cell(cell))
    assert (found.live_impressions.hex(), found.live_clicks.hex()) == (live.hex(), (live / 3).hex())


@given(ids, u32)
def test_a_partition_key_round_trips(topic: str, partition: int) -> None:
    assert split_partition_key(partition_key(topic, partition)) == (topic, partition)


@given(u64, ids)
def test_a_timer_key_round_trips(at_ms: int, impression_id: str) -> None:
    assert split_timer_key(timer_key(at_ms, impression_id)) == (at_ms, impression_id)


@given(u64)
def test_a_number_key_round_trips(number: int) -> None:
    assert split_number_key(number_key(number)) == number


@given(ids, ids, u32)
def test_an_arm_key_round_trips(experiment: str, arm: str, bucket: int) -> None:
    assert split_arm_key(arm_key(experiment, arm, bucket)) == (experiment, arm, bucket)


@given(u64, ids, u64, ids)
def test_timers_lie_in_the_order_in_which_they_fire(a_ms: int, a: str, b_ms: int, b: str) -> None:
    if a_ms != b_ms:
        assert (timer_key(a_ms, a) < timer_key(b_ms, b)) == (a_ms < b_ms)
    # Everything due before a time lies below the bare key of that time, whatever the id.
    assert (timer_key(a_ms, a) < timer_key(b_ms, "")) == (a_ms < b_ms)


@given(u64, u64)
def test_number_keys_lie_in_numeric_order(a: int, b: int) -> None:
    assert (number_key(a) < number_key(b)) == (a < b)


@given(ids, ids, u32, ids)
def test_a_scan_by_product_finds_its_own_keys_only(product: str, other: str, group: int, creative: str) -> None:
    prefix = product.encode() + SEPARATOR
    assert cell_key(product, group, creative).startswith(prefix)
    assert creative_key(product, creative).startswith(prefix)
    assert cell_key(other, group, creative).startswith(prefix) == (other == product)
    assert creative_key(other, creative).startswith(prefix) == (other == product)


@given(st.tuples(ids, u32, ids), st.tuples(ids, u32, ids))
def test_different_cells_have_different_keys(a: tuple[str, int, str], b: tuple[str, int, str]) -> None:
    assert (cell_key(*a) == cell_key(*b)) == (a == b)
    assert (arm_key(a[0], a[2], a[1]) == arm_key(b[0], b[2], b[1])) == (a == b)


@pytest.mark.parametrize(
    "record",
    [
        OffsetRecord(7, 6, 5, 4, 1, 1_700_000_000_000),
        WaitingClickRecord(1, "osmf.clicks", 3, 9, 0, b"\x00\xff{"),
        ProductGroups(
            "p",
            2,
            [GroupRecord(1, 0.25, 4, b"\x00" * 8, [ProfileTrait("age", "18-20", 0.5, 2.0)], 3)],
            5,
            {2: 0.5, 3: -0.25},
            None,
            False,
            11,
            [],
            {1: 4},
            "q",
        ),
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_round_trip(record: msgspec.Struct) -> None:
    assert msgspec.msgpack.decode(encode_record(record), type=type(record)) == record
