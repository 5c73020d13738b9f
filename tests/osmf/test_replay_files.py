"""Event files: every row becomes a message, in time order, whatever the format and the names."""

from __future__ import annotations

import dataclasses
import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from osmf.event_files import EventFiles
from osmf.event_rows import (
    EventColumnError,
    EventFileError,
    EventFileFormatError,
    EventFileMissingError,
    read_blocks,
)
from osmf.log_entry import LogEntry, sort_by_time
from streams.settings import FieldMapSettings

NO_MAP = FieldMapSettings()
PRODUCT = {"product_id": "p1", "title": "A lamp", "updated_at_ms": 9_000_000}


def shown(number: int, at_ms: int = 1_000, **more: Any) -> dict[str, Any]:
    row = {"impression_id": f"i{number}", "user_id": "u1", "product_id": "p1", "creative_id": "c1"}
    return {**row, "shown_at_ms": at_ms, **more}


def clicked(number: int, at_ms: int) -> dict[str, Any]:
    return {"impression_id": f"i{number}", "product_id": "p1", "clicked_at_ms": at_ms}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def log_of(folder: Path, impressions: list[Any], clicks: list[Any] | None = None, **more: Path) -> EventFiles:
    return EventFiles(
        impressions=write(folder / "impressions.jsonl", impressions),
        clicks=write(folder / "clicks.jsonl", [clicked(1, 2_000)] if clicks is None else clicks),
        products=more.pop("products", None) or write(folder / "products.jsonl", [PRODUCT]),
        **more,
    )


def decoded(entries: list[LogEntry], kind: str) -> list[Any]:
    return [json.loads(entry.payload) for entry in entries if entry.kind == kind]


def test_the_log_is_in_time_order_and_the_catalogue_comes_first(tmp_path: Path) -> None:
    files = log_of(tmp_path, [shown(2, 5_000), shown(1, 1_000)], [clicked(2, 6_000), clicked(1, 3_000)])
    entries = list(files.entries(NO_MAP))
    assert [(entry.timestamp_ms, entry.kind) for entry in entries] == [
        (1_000, "products"),
        (1_000, "creatives"),
        (1_000, "impressions"),
        (3_000, "clicks"),
        (5_000, "impressions"),
        (6_000, "clicks"),
    ]
    assert {entry.key for entry in entries} == {"p1"}
    assert decoded(entries, "creatives") == [{"product_id": "p1", "creative_id": "c1", "created_at_ms": 1_000}]


def test_corrections_come_in_their_place(tmp_path: Path) -> None:
    corrections = write(
        tmp_path / "corrections.jsonl",
        [
            {"type": "UserForgotten", "user_id": "u", "forgotten_at_ms": 2_500},
            {"type": "ClickRetracted", "impression_id": "i1", "product_id": "p", "retracted_at_ms": 1_500},
        ],
    )
    files = log_of(tmp_path, [shown(1, 1_000), shown(2, 2_000), shown(3, 3_000)], [clicked(1, 1_100)])
    files = dataclasses.replace(files, corrections=corrections)
    entries = [entry for entry in files.entries(FieldMapSettings()) if entry.kind not in ("products", "creatives")]
    kinds = ["impressions", "clicks", "corrections", "impressions", "corrections", "impressions"]
    assert [entry.kind for entry in entries] == kinds
    assert [(entry.timestamp_ms, entry.key) for entry in entries if entry.kind == "corrections"] == [
        (1_500, "p"),
        (2_500, "u"),
    ]
    with pytest.raises(EventColumnError, match=r"--corrections\) has no type"):
        dataclasses.replace(files, corrections=files.clicks).check(FieldMapSettings())


def test_a_later_version_of_a_product_keeps_its_time(tmp_path: Path) -> None:
    products = write(
        tmp_path / "p.jsonl",
        [PRODUCT | {"updated_at_ms": 4_000, "title": "A new lamp"}, PRODUCT | {"updated_at_ms": 9}],
    )
    entries = list(log_of(tmp_path, [shown(1)], products=products).entries(NO_MAP))
    stamps = [(entry.timestamp_ms, json.loads(entry.payload)["title"]) for entry in entries if entry.kind == "products"]
    assert stamps == [(9, "A lamp"), (4_000, "A new lamp")]


def test_bad_rows_are_sent_as_they_are_in_their_place(tmp_path: Path) -> None:
    bad = ['{"impression_id": "i9", ', "[1, 2]", json.dumps({"shown_at_ms": "noon"})]
    entries = list(log_of(tmp_path, [shown(1, 1_000), *bad, shown(2, 2_000)], []).entries(NO_MAP))
    payloads = [(e.timestamp_ms, e.payload.decode()) for e in entries if e.kind == "impressions"]
    assert payloads == [
        (1_000, json.dumps(shown(1, 1_000))),
        *((1_000, row.strip()) for row in bad),
        (2_000, json.dumps(shown(2, 2_000))),
    ]
    assert len(decoded(entries, "creatives")) == 1


def test_creatives_of_unknown_products_are_not_made_up(tmp_path: Path) -> None:
    entries = list(log_of(tmp_path, [shown(1, product_id="p2"), shown(2)], []).entries(NO_MAP))
    assert [creative["product_id"] for creative in decoded(entries, "creatives")] == ["p1"]


USERS = {
    "one column": [{"user_id": "u1", "attributes": {"age": "21-24", "is_vip": "yes"}}],
    "a column each": [{"user_id": "u1", "age": "21-24", "is_vip": True, "color": None}],
    "the last row": [
        {"user_id": "u1", "age": "over 70", "is_vip": None},
        {"user_id": "u1", "age": "21-24", "is_vip": True},
    ],
}


@pytest.mark.parametrize("rows", USERS.values(), ids=USERS.keys())
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_users_attributes_go_to_impressions_without_any(tmp_path: Path, rows: list[Any], form: str) -> None:
    users = tmp_path / f"users.{form}"
    if form == "jsonl":
        write(users, rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), users)
    own = {"age": "under 18"}
    impressions = [shown(1), shown(2, attributes=own), shown(3, user_id="u2"), shown(4, attributes={})]
    entries = list(log_of(tmp_path, impressions, users=users).entries(NO_MAP))
    found = {row["impression_id"]: row.get("attributes") for row in decoded(entries, "impressions")}
    theirs = {"age": "21-24", "is_vip": "yes"}
    assert found == {"i1": theirs, "i2": own, "i3": None, "i4": theirs}


def test_parquet_and_json_lines_give_the_same_log(tmp_path: Path) -> None:
    rows = [shown(n, 1_000 * n, attributes={"age": "21-24"} if n % 2 else {"color": "red"}) for n in range(1, 40)]
    table = pa.table(
        {
            **{name: [row[name] for row in rows] for name in ("impression_id", "user_id", "product_id", "creative_id")},
            "shown_at_ms": pa.array([datetime.fromtimestamp(row["shown_at_ms"] / 1000, UTC) for row in rows]),
            "attributes": pa.array([row["attributes"] for row in rows], pa.map_(pa.string(), pa.string())),
            "arm": pa.array([None] * len(rows), pa.string()),
        }
    )
    files = log_of(tmp_path, rows)
    parquet.write_table(table, tmp_path / "impressions.parquet")
    other = EventFiles(tmp_path / "impressions.parquet", files.clicks, files.products)
    ours, theirs = list(files.entries(NO_MAP)), list(other.entries(NO_MAP))
    assert [e[:3] for e in ours] == [e[:3] for e in theirs]
    assert [json.loads(e.payload) for e in ours] == [json.loads(e.payload) for e in theirs]


def test_a_platforms_own_names_are_understood(tmp_path: Path) -> None:
    fields = FieldMapSettings(
        impressions={"shown_at_ms": "at", "user_id": "user.id", "attributes": "user.traits", "creative_id": "ad"},
        creatives={"creative_id": "ad"},
    )
    row = {"impression_id": "i1", "product_id": "p1", "ad": "c1", "at": 1_234, "user": {"id": "u1"}}
    users = write(tmp_path / "users.jsonl", [{"user_id": "u1", "age": "21-24"}])
    entries = list(log_of(tmp_path, [row], [], users=users).entries(fields))
    assert [(e.timestamp_ms, e.kind) for e in entries] == [
        (1_234, "products"),
        (1_234, "creatives"),
        (1_234, "impressions"),
    ]
    assert decoded(entries, "creatives")[0]["ad"] == "c1"
    assert decoded(entries, "impressions")[0]["user"] == {"id": "u1", "traits": {"age": "21-24"}}


def test_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "clicks.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": null, "b": 2}\n'))
    assert [row.fields for block in read_blocks("clicks", path) for row in block] == [{"a": 1}, {"b": 2}]


def missing(folder: Path) -> EventFiles:
    files = log_of(folder, [shown(1)])
    files.clicks.unlink()
    return files


def renamed(folder: Path) -> EventFiles:
    return log_of(folder, [{"id": "i1", "shown_at_ms": 1}])


def fake_parquet(folder: Path) -> EventFiles:
    files = log_of(folder, [shown(1)])
    return EventFiles(files.impressions.rename(folder / "i.parquet"), files.clicks, files.products)


def binary(folder: Path) -> EventFiles:
    files = log_of(folder, [shown(1)])
    files.clicks.write_bytes(b"\x00\x01\x02 this is no event\n")
    return files


def nameless_user(folder: Path) -> EventFiles:
    return log_of(folder, [shown(1)], users=write(folder / "u.jsonl", [{"user_id": "u1"}, {"user_id": 7}]))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (missing, EventFileMissingError, r"clicks\.jsonl \(--clicks\)"),
        (renamed, EventColumnError, "has no impression_id, user_id, product_id, creative_id.*it has id, shown_at_ms"),
        (fake_parquet, EventFileFormatError, "is called Parquet and is not"),
        (binary, EventFileFormatError, "has no JSON object in its first 1 lines"),
        (nameless_user, EventFileError, "row 2 of .*user_id 7"),
    ],
)
def test_an_unusable_file_is_refused_before_anything_is_sent(
    tmp_path: Path, build: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as refused:
        next(build(tmp_path).entries(NO_MAP))
    assert "Nothing was sent" in str(refused.value) or "nothing was sent" in str(refused.value)


@given(times=st.lists(st.integers(1, 30), max_size=60), run_rows=st.integers(1, 9))
def test_sorting_on_disk_is_a_stable_sort(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], run_rows: int
) -> None:
    entries = [LogEntry(at_ms, "clicks", f"k{n}", b"%d" % n) for n, at_ms in enumerate(times)]
    folder = tmp_path_factory.mktemp("runs")
    assert list(sort_by_time(entries, "clicks", folder, run_rows=run_rows)) == sorted(entries, key=lambda e: e[0])


def test_a_log_that_is_nearly_in_order_needs_few_runs(tmp_path: Path) -> None:
    times = [n + (3 if n % 2 else 0) for n in range(1_000)]
    entries = [LogEntry(at_ms, "clicks", "", b"") for at_ms in times]
    assert [e.timestamp_ms for e in sort_by_time(entries, "clicks", tmp_path, run_rows=10)] == sorted(times)
    assert len(list(tmp_path.iterdir())) <= 3
