from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.evaluate import evaluate_groups
from benchmarks.log import SimulatedLog, simulate_log, work_off
from benchmarks.stream import arrow_batch, bench_stream, timed_parts
from online.learner import PreferenceLearner
from online.settings import OnlineSettings
from online.worker import build_pipeline
from simulator.settings import SimulatorSettings
from simulator.truth import write_json
from state.reading import open_view
from state.records import GroupRecord, ProductGroups, ProductRecord, encode_record
from state.store import ChangeSet, Store, Table
from streams.codec import EventDecoder, encode
from streams.events import Impression
from streams.join import Join
from streams.settings import StreamSettings

STREAMS = StreamSettings()
PARTS = ("decode_us", "join_us", "group_us", "learn_us", "commit_us", "other_us")


@pytest.fixture(scope="module")
def log(simulator: SimulatorSettings) -> SimulatedLog:
    return simulate_log(simulator, STREAMS)


@pytest.fixture(scope="module")
def state(log: SimulatedLog, online: OnlineSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state")
    with Store(path, sync=False) as store:
        work_off(build_pipeline(STREAMS, online), log.messages, STREAMS, store)
    return path


def test_log_is_whole_and_worked_off_to_the_end(log: SimulatedLog, state: Path) -> None:
    sent = Counter(message.topic for message in log.messages)
    assert sent[STREAMS.topics.impressions] == log.truth.produced["impressions"]
    assert sent[STREAMS.topics.clicks] == log.truth.produced["clicks"]
    with Store(state, readonly=True) as store, open_view(store) as view:
        assert {topic: record.n_consumed for (topic, _), record in view.offsets().items()} == dict(sent)
        assert sum(record.n_dead_letters for record in view.offsets().values()) == sum(log.truth.spoiled.values())
        cells = view.cells()
        assert sum(cell.n_impressions for cell in cells) == log.truth.n_impressions
        assert sum(cell.n_clicks for cell in cells) == log.truth.n_clicks


def test_stream_parts_add_up(simulator: SimulatorSettings, online: OnlineSettings) -> None:
    originals = (EventDecoder.decode, Join.run, PreferenceLearner.learn_many, Store.commit)
    measured = bench_stream(quick=True, seeds=(21,), simulator=simulator, online=online, sync=False)
    assert (EventDecoder.decode, Join.run, PreferenceLearner.learn_many, Store.commit) == originals
    metrics = measured.metrics
    assert all(math.isfinite(value) and value > 0 for value in metrics.values())
    assert sum(metrics[part] for part in PARTS) == pytest.approx(1e6 / metrics["events_s"])
    assert metrics["events"] > simulator.traffic.n_impressions
    assert metrics["arrow_speedup"] == pytest.approx(metrics["decode_json_us"] / metrics["decode_arrow_us"])
    assert measured.seeds == {"world_0": 21}


def test_parts_are_restored_after_an_error() -> None:
    original = EventDecoder.decode
    with pytest.raises(KeyError), timed_parts():
        raise KeyError(EventDecoder.decode is original)
    assert EventDecoder.decode is original


def test_both_forms_decode_to_the_same_impressions(log: SimulatedLog) -> None:
    decoder = EventDecoder(Impression)
    messages = [message for message in log.messages if message.topic == STREAMS.topics.impressions][:200]
    impressions = [e for m in messages for e in decoder.decode(m.value) if isinstance(e, Impression)]
    assert len(impressions) > 100
    assert decoder.decode(arrow_batch(impressions)) == impressions
    assert [event for i in impressions for event in decoder.decode(encode(i))] == impressions


def test_a_state_is_evaluated_with_and_without_the_truth(
    log: SimulatedLog, state: Path, online: OnlineSettings, tmp_path: Path
) -> None:
    write_json(tmp_path / "truth.json", log.truth)
    alone = evaluate_groups(state, None, online, quick=True)
    with_truth = evaluate_groups(state, tmp_path / "truth.json", online, quick=True)
    assert {"nmi", "ari_batch"} == with_truth.metrics.keys() - alone.metrics.keys()
    assert {name: with_truth.metrics[name] for name in alone.metrics} == alone.metrics
    assert 0 <= with_truth.metrics["nmi"] <= 1


def test_groups_that_were_shown_nothing_yet_are_counted_but_not_ranked(online: OnlineSettings, tmp_path: Path) -> None:
    groups = [GroupRecord(number, 0.5, 10, b"", [], 0) for number in (3, 4)]
    changes = ChangeSet()
    changes.put(Table.PRODUCTS, b"p", encode_record(ProductRecord(0, "p", "Lamp", None, None, 0, b"")))
    changes.put(Table.GROUPS, b"p", encode_record(ProductGroups("p", 1, groups, 5, {}, None, False, 0, [], {})))
    with Store(tmp_path, sync=False) as store:
        store.commit(changes)
    metrics = evaluate_groups(tmp_path, None, online, quick=True).metrics
    assert metrics == {"products": 1, "products_with_groups": 1, "products_with_distinct_groups": 0}
