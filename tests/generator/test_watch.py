"""What the watch asks for, once each, and that the worker then makes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from generator.prompt import Prompt
from generator.settings import WatchSettings
from generator.storage import read_bytes, read_metadata
from generator.watch import find_requests
from state.reading import StateReader
from state.records import Cell, ProductGroups, cell_key, encode_cell, encode_record
from state.store import ChangeSet, Store, Table
from streams.events import CreativeRequested
from tests.generator.bench import REQUESTS, MakeBench, varied, write_online_state

ALL = WatchSettings(causes=("fatigue", "new_product", "new_group"), min_impressions=200)


def change_groups(folder: Path, product_id: str, **changed: Any) -> None:
    """Change a product's groups; ``born_at_ms`` gives each group's."""
    with Store(folder, map_size_mib=16) as store:
        with store.read() as txn:
            value = txn.get(Table.GROUPS, product_id.encode())
        assert value is not None
        record = msgspec.msgpack.decode(value, type=ProductGroups)
        born = changed.pop("born_at_ms", [group.born_at_ms for group in record.groups])
        groups = [msgspec.structs.replace(g, born_at_ms=at_ms) for g, at_ms in zip(record.groups, born, strict=True)]
        changes = ChangeSet()
        changed_record = msgspec.structs.replace(record, groups=groups, **changed)
        changes.put(Table.GROUPS, product_id.encode(), encode_record(changed_record))
        store.commit(changes)


def count(folder: Path, group_id: int, creative_id: str, life: tuple[int, int], live: tuple[float, float]) -> None:
    changes = ChangeSet()
    cell = Cell("p-1", group_id, creative_id, *life, *live, 9_000)
    changes.put(Table.CELLS, cell_key("p-1", group_id, creative_id), encode_cell(cell))
    with Store(folder, map_size_mib=16) as store:
        store.commit(changes)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The bench's online state: of "bare", nothing can be drawn."""
    write_online_state(tmp_path / "state", "file:///cutout.png")
    return tmp_path / "state"


def found(
    folder: Path, settings: WatchSettings = ALL, handled: frozenset[str] = frozenset()
) -> list[CreativeRequested]:
    with StateReader(folder) as reader, reader.view() as view:
        return find_requests(view, settings, lambda event_id: event_id in handled)


def test_where_nothing_is_new_nothing_is_asked_for(folder: Path) -> None:
    assert found(folder) == []


def test_a_product_with_borrowed_groups_is_asked_for_once(folder: Path) -> None:
    change_groups(folder, "p-2", borrowed_from="p-1")
    change_groups(folder, "bare", borrowed_from="p-1")
    (request,) = found(folder)
    assert (request.cause, request.product_id, request.group_id) == ("new_product", "p-2", None)
    assert "with the groups of p-1" in request.reason
    assert found(folder) == [request]
    assert found(folder, handled=frozenset({request.event_id})) == []
    assert found(folder, WatchSettings(causes=("fatigue",))) == []


@pytest.mark.parametrize(
    ("changed", "groups"),
    [
        ({"born_at_ms": [5, 5]}, []),
        ({"born_at_ms": [5, 80]}, [1]),
        ({"born_at_ms": [5, 80], "distinct": False}, []),
        ({"born_at_ms": [5, 80], "borrowed_from": "p-2"}, [None]),
    ],
)
def test_a_group_that_was_born_beside_older_ones(
    folder: Path, changed: dict[str, Any], groups: list[int | None]
) -> None:
    change_groups(folder, "p-1", **changed)
    assert [request.group_id for request in found(folder)] == groups


@pytest.mark.parametrize(
    ("life", "live", "wears_out"),
    [
        ((20_000, 2_000), (1_000.0, 40.0), True),
        ((20_000, 2_000), (1_000.0, 95.0), False),
        ((20_000, 2_000), (190.0, 1.0), False),  # too few to tell
        ((20_000, 200), (1_000.0, 0.0), False),  # another creative is the group's best
    ],
)
def test_the_best_creative_of_a_group_wears_out(
    folder: Path, life: tuple[int, int], live: tuple[float, float], wears_out: bool
) -> None:
    count(folder, 1, "p-1-c2", life, live)
    requests = found(folder)
    assert len(requests) == wears_out
    for request in requests:
        assert (request.cause, request.group_id, request.requested_at_ms) == ("fatigue", 1, 9_000)
        assert "p-1-c2 wears out: a CTR of 0.0400 now, 0.1000 for life" in request.reason


def test_the_worker_asks_and_makes_what_was_asked_for(make_bench: MakeBench) -> None:
    bench = make_bench(watch=WatchSettings(interval_s=0.5))
    bench.move_online_state("Red kettle", borrowed_from="p-2")
    bench.start([], until_idle_s=5.0)
    asked = [payload for topic, _, payload in bench.producer.log if topic == REQUESTS]
    requests = {payload: msgspec.json.decode(payload, type=CreativeRequested) for payload in asked}
    assert {request.product_id for request in requests.values()} == {"p-1", "p-2"}
    of_p_1 = next(payload for payload, request in requests.items() if request.product_id == "p-1")
    emitted = bench.start([of_p_1], topic=REQUESTS)
    assert {creative.group_id for creative in emitted} == {0, 1}
    for creative in emitted:
        metadata = read_metadata(read_bytes(creative.image_uri or ""))
        assert metadata["groups_borrowed_from"] == "p-2"
        assert Prompt.parse(creative.prompt or "") not in {varied(number) for number in range(3)}
    again = [payload for topic, _, payload in bench.producer.log if topic == REQUESTS][len(asked) :]
    assert {msgspec.json.decode(payload, type=CreativeRequested).product_id for payload in again} <= {"p-2"}
