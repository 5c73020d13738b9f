"""Broken shifts are dead-lettered and stop nothing."""

from __future__ import annotations

from typing import cast

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from state.records import (
    OffsetRecord,
)
from state.store import Store, Table
from streams.codec import encode
from streams.merge import Message
from tests.generator.bench import STREAMS, Bench, MakeBench, shift


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"not json", "bad_json"),
        (b"", "bad_json"),
        (b"{}", "missing_field"),
        (encode(shift()).replace(b'"schema_version":1', b'"schema_version":9'), "unknown_version"),
        (encode(shift()).replace(b'"share":0.5', b'"share":"half"'), "invalid_field"),
        (encode(shift("bad", product_id="nobody")), "unknown_product"),
        (encode(shift("bad", product_id="ü" * 200)), "unknown_product"),
        (encode(shift("bad", groups=[*shift().groups, shift().groups[0]])), "invalid_field"),
        (encode(shift("bad")).replace(b'"n_clicks":30', b'"n_clicks":300'), "invalid_field"),
        (encode(shift("bad")).replace(b'"n_clicks":30', b'"n_clicks":-1'), "invalid_field"),
        (encode(shift("bad")).replace(b'"group_id":1', b'"group_id":-1'), "invalid_field"),
    ],
)
def test_a_broken_event_is_dead_lettered_and_stops_nothing(make_bench: MakeBench, payload: bytes, reason: str) -> None:
    bench = make_bench()
    bench.start([payload, encode(shift())])
    (letter,) = bench.producer.dead_letters()
    assert (letter.event_id, letter.reason, letter.payload) == ("osmf.groups-shifted-0-0-0", reason, payload)
    assert (letter.topic, letter.partition, letter.offset) == (STREAMS.topics.groups_shifted, 0, 0)
    bench.assert_once(2)
    assert bench.counts() == OffsetRecord(2, 2, 1, 0, 1, 1_000)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4))
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_events_never_crash_the_worker(make_bench: MakeBench, edits: list[tuple[int, bytes]]) -> None:
    payload = bytearray(encode(shift(product_id="bare")))
    for place, new in edits:
        at = place % len(payload)
        payload[at : at + len(new)] = new
    bench = _once(make_bench)
    with Store(bench.settings.state_path, map_size_mib=16) as own:
        handled = bench.worker(own).handle(Message(STREAMS.topics.groups_shifted, 0, 0, 1, bytes(payload)))
    count = msgspec.msgpack.decode(cast(bytes, handled.changes.of(Table.OFFSETS)[0][1]), type=OffsetRecord)
    assert count.n_consumed == count.n_used + count.n_dead_letters == 1


_benches: dict[int, Bench] = {}


def _once(make_bench: MakeBench) -> Bench:
    """Return one bench for all examples of a test: they share their fixture."""
    if id(make_bench) not in _benches:
        _benches.clear()
        _benches[id(make_bench)] = make_bench()
    return _benches[id(make_bench)]
