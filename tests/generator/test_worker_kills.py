"""Whatever breaks and whenever the worker is killed, a shift's creatives are published once each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from generator.process import run_generator, work
from generator.prompt import Prompt
from generator.settings import CheckSettings, GeneratorSettings, SigningSettings
from online.encoders import HashedImageEncoder
from state.errors import StateLockedError
from state.records import (
    OffsetRecord,
)
from state.settings import StateSettings
from state.store import ChangeSet, Store
from streams.broker import LocalBroker
from streams.codec import encode
from streams.events import (
    Creative,
    DeadLetter,
)
from streams.producer import EventProducer, SendError
from streams.settings import StreamSettings
from streams.tail import Tail
from tests.generator.bench import (
    CHECKS,
    NOW_MS,
    SIZE_PX,
    STREAMS,
    FakeConsumer,
    Killed,
    MakeBench,
    picture,
    shift,
    write_online_state,
)


@pytest.mark.parametrize(
    "moment", ["before the commit", "after the commit", "before the broker has it", "after the broker has it"]
)
def test_a_kill_loses_nothing_and_doubles_nothing(make_bench: MakeBench, moment: str) -> None:
    bench = make_bench()
    payloads = [encode(shift()), encode(shift("shift-2", "p-2"))]

    def commit(store: Store, changes: ChangeSet) -> None:
        if moment == "after the commit":
            Store.commit(store, changes)
        raise Killed

    if "broker" in moment:
        bench.producer.fail_with = Killed()
        bench.producer.acknowledged_before_failure = moment == "after the broker has it"
        with pytest.raises(Killed):
            bench.start(payloads)
    else:
        with pytest.raises(Killed):
            bench.start(payloads, commit=commit)
    assert len(bench.files()) == (2 if "broker" in moment else 0)
    # Killed before the commit, it decides anew, and the online process has gone on meanwhile.
    bench.move_online_state(title="Blue kettle")
    bench.start(payloads)
    bench.assert_once(4)
    titles = {Prompt.parse(c.prompt or "").caption for c in bench.producer.creatives() if c.product_id == "p-1"}
    assert titles == {"Blue kettle 0" if moment == "before the commit" else "Red kettle 0"}
    assert bench.counts() == OffsetRecord(2, 2, 2, 0, 0, 1_000)


def test_no_event_is_sent_while_its_file_cannot_be_written(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench()

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    payloads = [encode(shift()), encode(shift("shift-2", "p-2"))]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full_disk)
        patched.setattr("generator.process.POLL_S", 0.0)
        bench.start(payloads)
    assert not bench.producer.log
    assert bench.counts().next_offset == 1  # nothing further is decided before it can be kept
    assert "2 files wait, and the events that name them" in caplog.text
    bench.start(payloads)
    bench.assert_once(4)


def test_what_the_broker_does_not_take_is_sent_later(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.producer.fail_with = SendError("osmf.creatives", TimeoutError("no answer"))
    bench.start([encode(shift())])
    bench.assert_once(2)
    assert len(bench.producer.log) == 2
    bench.start([encode(shift())])
    assert len(bench.producer.log) == 2


def test_stop_is_asked_between_shifts(make_bench: MakeBench) -> None:
    bench = make_bench()
    payloads = [encode(shift()), encode(shift("shift-2", "p-2"))]
    with Store(bench.settings.state_path, map_size_mib=16) as own:
        work(
            bench.worker(own),
            FakeConsumer(payloads, 0),
            own,
            bench.delivery(own),
            watch_s=60.0,
            clock_s=lambda: 0.0,
            stop=lambda: bool(bench.producer.log),
        )
    assert bench.counts().next_offset == 1
    bench.start(payloads)
    bench.assert_once(4)


def test_two_generators_do_not_share_a_state(make_bench: MakeBench) -> None:
    bench = make_bench()
    with Store(bench.settings.state_path, map_size_mib=16), pytest.raises(StateLockedError):
        Store(bench.settings.state_path, map_size_mib=16)


@pytest.mark.broker
def test_it_runs_over_a_broker_and_waits_for_the_online_state(tmp_path: Path) -> None:
    settings = GeneratorSettings(
        size_px=SIZE_PX,
        storage_url=str(tmp_path / "creatives"),
        review_url=str(tmp_path / "review"),
        state_path=tmp_path / "own",
        models_dir=tmp_path / "models",
        signing=SigningSettings(folder=tmp_path / "signing"),
        checks=CheckSettings(**CHECKS),
    )
    state = StateSettings(path=tmp_path / "state", map_size_mib=16)
    topics = STREAMS.topics
    names = topics.model_dump().values()
    with LocalBroker(dict.fromkeys(names, 1), log_path=tmp_path / "broker.log") as broker:
        streams = StreamSettings(bootstrap_servers=broker.bootstrap_servers, linger_ms=20)
        with EventProducer(streams, client_id="test") as producer:
            producer.send(shift())
            producer.send_bytes(topics.groups_shifted, "x", b"broken")
            producer.send(shift("shift-2", "p-2"))
            producer.send(shift())
            producer.flush()
        waited: list[object] = []

        def appear(_: float) -> None:
            waited.append(1)
            write_online_state(state.path, picture(tmp_path / "cutout.png"))

        for expected in (4, 0):
            emitted: list[Creative] = []
            run_generator(
                streams,
                settings,
                state,
                HashedImageEncoder(),
                now_ms=NOW_MS,
                clock_s=time.monotonic,
                stop=lambda: False,
                until_idle_s=0.3,
                on_emitted=emitted.append,
                sleep=appear,
            )
            assert len(emitted) == expected
        assert len(waited) == 1
        with Tail(streams, topics.creatives, Creative) as tail:
            assert len({creative.creative_id for creative in _read(tail, 4)}) == 4
        with Tail(streams, topics.dead_letters, DeadLetter) as letters:
            assert [letter.reason for letter in _read(letters, 1)] == ["bad_json"]


def _read(tail: Tail[Any], n: int) -> list[Any]:
    found: list[Any] = []
    deadline_s = time.monotonic() + 5
    while len(found) < n and time.monotonic() < deadline_s:
        found += tail.poll(100)
    return found + tail.poll(200)
