"""Replay, inspect and verify over the real broker: counts of a small log, told from the files alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from online.settings import EncoderSettings, OnlineSettings
from osmf.event_files import EventFiles
from osmf.figures import Figures, figures_json
from osmf.inspect import run_inspect
from osmf.replay import REPLAY_MARK, StateInUseError, replay, replay_files
from osmf.verify import run_verify, verify_state
from state.reading import open_view
from state.records import Cell, OffsetRecord, cell_key, encode_cell, encode_record, partition_key
from state.settings import StateSettings
from state.store import ChangeSet, Store, Table
from streams.broker import LocalBroker
from streams.settings import FieldMapSettings, StreamSettings

pytestmark = pytest.mark.broker

ONLINE = OnlineSettings(encoders=EncoderSettings(text="hashed", image="hashed"))
STREAMS = StreamSettings()
NO_MAP = FieldMapSettings()
N_IMPRESSIONS = 200
GOOD = {"impression_id": "x", "user_id": "u", "product_id": "p0", "creative_id": "c0", "shown_at_ms": 1_700_000_001_000}
BAD = {
    "bad_json": '{"impression_id": ',
    "missing_field": '{"impression_id": "x1", "shown_at_ms": 1700000000500}',
    "unknown_version": json.dumps(GOOD | {"schema_version": 7}),
    "unknown_product": json.dumps(GOOD | {"product_id": "p9"}),
}


class Log(NamedTuple):
    """Rows of a log, and what they must give."""

    impressions: list[dict[str, Any]]
    clicks: list[dict[str, Any]]
    products: list[dict[str, Any]]
    users: list[dict[str, Any]]

    def expected(self) -> dict[tuple[str, str], tuple[int, int]]:
        where = {row["impression_id"]: (row["product_id"], row["creative_id"]) for row in self.impressions}
        shown, clicked = Counter(where.values()), Counter(where[row["impression_id"]] for row in self.clicks)
        return {name: (shown[name], clicked[name]) for name in shown}


def make_log() -> Log:
    rng = np.random.default_rng(5)
    impressions = [
        {
            "impression_id": f"i{n:03d}",
            "user_id": f"u{rng.integers(20)}",
            "product_id": f"p{rng.integers(2)}",
            "creative_id": f"c{rng.integers(3)}",
            "shown_at_ms": 1_700_000_000_000 + 1_000 * n,
        }
        for n in range(N_IMPRESSIONS)
    ]
    clicks = [
        {
            "impression_id": row["impression_id"],
            "product_id": row["product_id"],
            "clicked_at_ms": row["shown_at_ms"] + int(rng.integers(100, 60_000)),
        }
        for row in impressions
        if rng.random() < 0.2
    ]
    rng.shuffle(clicks)  # type: ignore[arg-type]
    products = [{"product_id": f"p{n}", "title": f"Product {n}", "updated_at_ms": 1_800_000_000_000} for n in range(2)]
    users = [{"user_id": f"u{n}", "gender": "female" if n % 2 else "male", "is_vip": bool(n % 3)} for n in range(20)]
    return Log(impressions, clicks, products, users)


def write(folder: Path, log: Log, form: str, bad: list[str]) -> EventFiles:
    folder.mkdir()
    for name, rows in log._asdict().items():
        if form == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        else:
            lines = [json.dumps(row) for row in rows]
            if name == "impressions":
                lines[10:10] = bad
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return EventFiles(**{name: folder / f"{name}.{form}" for name in ("impressions", "clicks", "products", "users")})


class Replayed(NamedTuple):
    """A replay and what it came from."""

    log: Log
    files: EventFiles
    state: Path
    figures: Figures
    n_bad: int


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def replayed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    folder = tmp_path_factory.mktemp("replay")
    bad = list(BAD.values()) if request.param == "jsonl" else []
    log = make_log()
    files = write(folder / "log", log, request.param, bad)
    figures = replay_files(files, STREAMS, ONLINE, StateSettings(path=folder / "state"), own_broker=True)
    return Replayed(log, files, folder / "state", figures, len(bad))


def creatives_of(figures: Figures) -> dict[tuple[str, str], tuple[int, int]]:
    return {
        (row["product_id"], row["creative_id"]): (row["impressions"], row["clicks"])
        for row in figures.detail["creatives"]
    }


def test_every_row_is_counted_or_dead_lettered_with_its_reason(replayed: Replayed) -> None:
    metrics = replayed.figures.metrics
    assert metrics["impressions"] == N_IMPRESSIONS
    assert metrics["clicks"] == len(replayed.log.clicks)
    assert metrics["produced"] == metrics["consumed"]
    assert metrics["consumed"] == N_IMPRESSIONS + len(replayed.log.clicks) + 2 + 6 + replayed.n_bad
    assert metrics["dead_letters"] == replayed.n_bad
    by_reason = replayed.figures.detail["dead_letters_by_reason"]
    assert by_reason == (dict.fromkeys(sorted(BAD), 1) if replayed.n_bad else {})
    # The log ends before the label window of its last half hour does, and no time is made up.
    assert metrics["n_unlabelled"] == N_IMPRESSIONS
    assert json.loads(figures_json(replayed.figures))["command"] == "replay"


def test_inspect_equals_a_count_of_the_rows(replayed: Replayed) -> None:
    figures, tables = run_inspect(replayed.state)
    assert creatives_of(figures) == replayed.log.expected()
    sums: Counter[tuple[str, str]] = Counter()
    for cell in figures.detail["cells"]:
        sums[cell["product_id"], cell["creative_id"]] += cell["impressions"]
        assert 0 <= cell["ctr_low"] <= cell["ctr"] <= cell["ctr_high"] <= 1
    assert sums == {name: shown for name, (shown, _) in replayed.log.expected().items()}
    assert [table.row_count for table in tables] == [4, 2]


def test_verify_agrees_with_the_files(replayed: Replayed) -> None:
    figures, shown, exit_code = run_verify(
        replayed.state, STREAMS, entries=lambda: replayed.files.entries(STREAMS.fields)
    )
    assert (exit_code, figures.metrics["differences"], figures.metrics["broken_invariants"]) == (0, 0, 0)
    assert figures.metrics["creatives_compared"] == 6
    assert len(shown) == 1


def plant(path: Path, changes: ChangeSet) -> None:
    with Store(path) as store:
        store.commit(changes)


def test_verify_names_planted_faults(tmp_path: Path) -> None:
    log = make_log()
    files = write(tmp_path / "log", log, "jsonl", [])
    path = tmp_path / "state"
    replay_files(files, STREAMS, ONLINE, StateSettings(path=path), own_broker=True)
    with Store(path, readonly=True) as store, open_view(store) as view:
        cell = next(cell for cell in view.cells() if cell.product_id == "p1" and cell.creative_id == "c2")
        offset = view.offsets()["osmf.clicks", 0]
    wrong = Cell("p1", cell.group_id, "c2", 3, 4, 3.0, 3.0, 0)
    changes = ChangeSet()
    changes.put(Table.CELLS, cell_key("p1", cell.group_id, "c2"), encode_cell(wrong))
    lost = OffsetRecord(offset.next_offset, offset.n_consumed, offset.n_used - 2, 0, 0, offset.last_event_ms)
    changes.put(Table.OFFSETS, partition_key("osmf.clicks", 0), encode_record(lost))
    plant(path, changes)

    found = verify_state(path, STREAMS, entries=lambda: files.entries(NO_MAP))
    assert found.exit_code == 1
    assert [(d.product_id, d.creative_id, tuple(d.state), tuple(d.events)) for d in found.differences] == [
        ("p1", "c2", (3, 4), log.expected()["p1", "c2"])
    ]
    n_clicks = len(log.clicks)
    assert found.broken[:2] == [
        f"cell (product 'p1', group {cell.group_id}, creative 'c2') has 4 clicks of 3 impressions",
        f"osmf.clicks[0] has consumed {n_clicks} events, but used {n_clicks - 2} + dead-lettered 0 + waiting 0",
    ]
    assert [sentence.split(" hold ")[0] for sentence in found.broken[2:]] == ["the cells", "the cells"]
    _, shown, exit_code = run_verify(path, STREAMS)
    assert (exit_code, len(shown)) == (1, 2)


def test_a_given_broker_is_recounted_and_its_state_continues(tmp_path: Path) -> None:
    topics = dict.fromkeys(STREAMS.topics.model_dump().values(), 2)
    log, state = make_log(), StateSettings(path=tmp_path / "state")
    with LocalBroker(topics, log_path=tmp_path / "broker.log") as broker:
        streams = STREAMS.model_copy(update={"bootstrap_servers": broker.bootstrap_servers, "n_partitions": 2})
        early = Log(log.impressions[:120], [], log.products, log.users)
        late = Log([*log.impressions[120:], log.impressions[0]], log.clicks, log.products, log.users)
        first = write(tmp_path / "first", early, "jsonl", [BAD["unknown_product"]])
        second = write(tmp_path / "second", late, "jsonl", [BAD["bad_json"]])
        one = replay_files(first, streams, ONLINE, state, own_broker=False)
        two = replay_files(second, streams, ONLINE, state, own_broker=False)
        figures, _, exit_code = run_verify(state.path, streams, from_topics=True)
    assert (one.metrics["impressions"], one.metrics["clicks"], one.metrics["dead_letters"]) == (120, 0, 1)
    assert one.detail["dead_letters_by_reason"] == {"unknown_product": 1}
    assert (two.metrics["impressions"], two.metrics["clicks"]) == (80, len(log.clicks))
    # One impression, and the products and creatives, are there for the second time.
    assert two.metrics["duplicates"] == 1 + 2 + 6
    assert two.detail["dead_letters_by_reason"] == {"bad_json": 1}
    assert (exit_code, figures.metrics["differences"], figures.metrics["creatives_compared"]) == (0, 0, 6)
    assert creatives_of(run_inspect(state.path)[0]) == log.expected()


def test_only_a_replays_own_state_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "state"
    changes = ChangeSet()
    changes.put(Table.OFFSETS, partition_key("osmf.clicks", 0), encode_record(OffsetRecord(5, 5, 5, 0, 0, 1)))
    plant(path, changes)
    before = (path / "data.mdb").read_bytes()
    with pytest.raises(StateInUseError, match="nothing was sent"):
        replay([], STREAMS, ONLINE, StateSettings(path=path), command="replay", own_broker=True)
    assert (path / "data.mdb").read_bytes() == before
    (path / REPLAY_MARK).touch()
    figures = replay([], STREAMS, ONLINE, StateSettings(path=path), command="replay", own_broker=True)
    assert (figures.metrics["produced"], figures.metrics["consumed"]) == (0, 0)
