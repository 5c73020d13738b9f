"""Faults of the stream, over the real local broker: what is said, and that the state is in order afterwards."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from osmf.inspect import run_inspect
from osmf.verify import verify_state
from state.backup import restore_backup, write_backup
from state.errors import StateDamagedError
from state.reading import open_view
from state.store import Store, Table
from streams.broker import LocalBroker
from streams.consumer import BatchConsumer
from streams.errors import OffsetsExpiredError
from streams.events import DeadLetter
from streams.lag import read_lag
from streams.settings import StreamSettings
from streams.tail import Tail
from tests.faults.proxy import BrokerProxy
from tests.faults.running import (
    HOUR_MS,
    N_REGISTRATIONS,
    S_MS,
    Running,
    Sender,
    n_consumed,
    now_ms,
    offsets,
    own_topics,
    verified,
)
from tests.faults.stream import ROOT, online_environment

pytestmark = [pytest.mark.broker, pytest.mark.timeout(180)]

YEARS_MS = 10 * 365 * 24 * HOUR_MS
N = 60


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    with LocalBroker(log_path=tmp_path_factory.mktemp("broker") / "broker.log") as started:
        yield started


@pytest.fixture
def proxy(broker: LocalBroker) -> Iterator[BrokerProxy]:
    with BrokerProxy(broker.bootstrap_servers) as started:
        yield started


@pytest.fixture
def streams(broker: LocalBroker, proxy: BrokerProxy, request: pytest.FixtureRequest) -> StreamSettings:
    """Topics of two partitions each, behind the proxy."""
    topics = own_topics(re.sub(r"\W", "-", request.node.name))
    broker.create_topics(dict.fromkeys(topics.model_dump().values(), 2))
    return StreamSettings(bootstrap_servers=proxy.bootstrap_servers, topics=topics, batch_events=64, linger_ms=100)


@pytest.fixture
def sender(broker: LocalBroker, streams: StreamSettings) -> Iterator[Sender]:
    started = Sender(broker.bootstrap_servers, streams.topics)
    yield started
    started.close()


@pytest.fixture
def start_ms(sender: Sender) -> int:
    """When the stream starts: products and creatives are there, the events come after."""
    at_ms = now_ms() - 6 * HOUR_MS
    sender.register(at_ms)
    return at_ms + S_MS


def totals(state: Path) -> tuple[int, int]:
    with Store(state, readonly=True) as store, open_view(store) as view:
        cells = view.cells()
    return sum(cell.n_impressions for cell in cells), sum(cell.n_clicks for cell in cells)


def dead_letters(streams: StreamSettings) -> list[DeadLetter]:
    with Tail(streams, streams.topics.dead_letters, DeadLetter) as tail:
        return list(itertools.chain.from_iterable(iter(lambda: tail.poll(500), [])))


@pytest.mark.parametrize(
    ("how", "seconds"),
    [("cut", 4), ("frozen", 4), pytest.param("cut", 60, marks=pytest.mark.slow)],
)
def test_a_broker_that_is_away_is_waited_for(
    how: str,
    seconds: float,
    broker: LocalBroker,
    proxy: BrokerProxy,
    streams: StreamSettings,
    sender: Sender,
    start_ms: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if seconds < 60:
        monkeypatch.setattr("streams.consumer.SILENT_S", 1.0)
    assert broker.pid is not None
    for n in range(N):
        sender.show(n, start_ms + n)
    sender.flush()
    with Running(streams, tmp_path / "state") as running:
        running.wait_until_consumed(N_REGISTRATIONS + N)
        try:
            if how == "cut":
                proxy.cut()
                for n in range(N):
                    sender.click(n, start_ms + N + n)
                sender.flush()
            else:
                os.kill(broker.pid, signal.SIGSTOP)
            time.sleep(seconds)
            running.wait_for(lambda: "has not answered for" in caplog.text)
        finally:
            proxy.mend()
            os.kill(broker.pid, signal.SIGCONT)
        for n in range(N, 2 * N):
            sender.show(n, start_ms + 2 * N + n)
        sender.flush()
        running.wait_until_consumed(N_REGISTRATIONS + (3 if how == "cut" else 2) * N)
    assert f"the broker at {streams.bootstrap_servers} has not answered for " in caplog.text
    assert "nothing is lost, the state is as of the last commit, and reading goes on by itself" in caplog.text
    assert re.search(r"the broker at \S+ answers again, after \d+ s", caplog.text)
    assert totals(tmp_path / "state") == (2 * N, N if how == "cut" else 0)
    verified(tmp_path / "state", streams)


def test_a_process_ends_while_the_broker_is_away(
    proxy: BrokerProxy, streams: StreamSettings, sender: Sender, start_ms: int, tmp_path: Path
) -> None:
    sender.show(0, start_ms)
    sender.flush()
    with Running(streams, tmp_path / "state") as running:
        running.wait_until_consumed(N_REGISTRATIONS + 1)
        proxy.cut()
        time.sleep(1)
        stopped_s = time.monotonic()
    assert time.monotonic() - stopped_s < 10


def test_without_a_broker_a_process_says_so_and_ends(tmp_path: Path) -> None:
    done = osmf_online(StreamSettings(bootstrap_servers="127.0.0.1:9", broker_timeout_s=1), tmp_path / "state")
    assert done.returncode == 1
    assert done.stderr.startswith("osmf: no broker answers at 127.0.0.1:9 (KafkaTimeoutError: ")
    assert "nothing was consumed, and the state is as it was. Start the broker" in done.stderr
    assert "Traceback" not in done.stderr


def osmf_online(streams: StreamSettings, state: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "osmf", "online", "--until-idle-s", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=online_environment(streams, state),
        timeout=90,
    )


def test_a_clock_that_jumps_ahead_closes_no_window(
    streams: StreamSettings,
    sender: Sender,
    start_ms: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for n in range(N):
        sender.show(n, start_ms + n * S_MS)
    far_ms = start_ms + YEARS_MS
    sender.show(1_000, far_ms, stamp_ms=start_ms + N * S_MS)  # the event's own clock
    sender.show(1_001, far_ms)  # the clock of its producer
    sender.show(1_002, start_ms + N * S_MS, stamp_ms=far_ms)  # the clock of the stamp alone
    sender.click(0, far_ms, stamp_ms=start_ms + N * S_MS)
    for n in range(N):
        sender.click(n, start_ms + (N + n) * S_MS)
    for n in range(N, 2 * N):
        sender.show(n, start_ms + (N + n) * S_MS)
    sender.flush()
    with Running(streams, tmp_path / "state") as running:
        running.wait_until_consumed(N_REGISTRATIONS + 3 * N + 4)
    assert totals(tmp_path / "state") == (2 * N + 1, N)
    letters = dead_letters(streams)
    assert Counter(letter.reason for letter in letters) == {"time_ahead": 3}
    assert all("allowed is up to streams.max_ahead_s = 3600 s" in letter.detail for letter in letters)
    assert caplog.text.count("is stamped") == 2
    assert "s ahead of the clock: it is read as if it came with the one before it" in caplog.text
    figures, _ = run_inspect(tmp_path / "state")
    assert figures.detail["dead_letters_by_reason"] == {"time_ahead": 3}
    with Store(tmp_path / "state", readonly=True) as store, store.read() as txn:
        assert txn.count(Table.IMPRESSIONS) == 2 * N + 1  # every window is open
    verified(tmp_path / "state", streams)


def test_a_stamp_from_the_future_holds_up_no_partition(streams: StreamSettings, sender: Sender, start_ms: int) -> None:
    for n in range(10):
        sender.show(n, start_ms + n * S_MS, stamp_ms=start_ms + (YEARS_MS if n == 3 else n * S_MS))
        sender.click(n, start_ms + n * S_MS, stamp_ms=start_ms + n * S_MS + 1)
    sender.flush()
    with BatchConsumer(streams, [streams.topics.impressions, streams.topics.clicks], {}, time.monotonic) as consumer:
        taken = [(message.topic, message.offset) for message in consumer.poll(20)]
    assert [offset for topic, offset in taken if topic == streams.topics.impressions] == list(range(10))
    assert taken.index((streams.topics.impressions, 4)) < taken.index((streams.topics.clicks, 4))


def test_clicks_that_lag_by_an_hour_are_credited(
    streams: StreamSettings, sender: Sender, start_ms: int, tmp_path: Path
) -> None:
    # One impression a minute for three hours, so that label windows of half an hour close long before the clicks come.
    for n in range(180):
        sender.show(n, start_ms + n * 60 * S_MS)
        if n % 3 == 0:
            sender.click(n, start_ms + n * 60 * S_MS + 5 * S_MS, stamp_ms=start_ms + n * 60 * S_MS + HOUR_MS)
    sender.flush()
    with Running(streams, tmp_path / "state") as running:
        running.wait_until_consumed(N_REGISTRATIONS + 240)
    assert totals(tmp_path / "state") == (180, 60)
    assert dead_letters(streams) == []
    verified(tmp_path / "state", streams)


def test_duplicates_and_disorder_count_once(
    streams: StreamSettings, sender: Sender, start_ms: int, tmp_path: Path
) -> None:
    # Everything twice, anywhere within a minute: clicks come before their impressions as often as after.
    rng = random.Random(5)
    sends = 2 * [(kind, n, start_ms + n * S_MS) for kind in ("show", "click") for n in range(N)]
    rng.shuffle(sends)
    for place, (kind, n, at_ms) in enumerate(sends):
        stamp_ms = start_ms + place * 60 * S_MS // len(sends)
        if kind == "show":
            sender.show(n, at_ms, stamp_ms=stamp_ms)
        else:
            sender.click(n, at_ms + 1, stamp_ms=stamp_ms)
    sender.flush()
    with Running(streams, tmp_path / "state") as running:
        running.wait_until_consumed(N_REGISTRATIONS + 4 * N)
    assert totals(tmp_path / "state") == (N, N)
    duplicates = {topic: offset.n_duplicates for (topic, _), offset in offsets(tmp_path / "state").items()}
    assert (duplicates[streams.topics.impressions], duplicates[streams.topics.clicks]) == (N, N)
    verified(tmp_path / "state", streams)


def test_partitions_that_a_topic_gains_are_read_from_their_beginning(
    proxy: BrokerProxy,
    streams: StreamSettings,
    sender: Sender,
    start_ms: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    topic = streams.topics.impressions
    proxy.visible[topic] = 1
    for n in range(N):
        sender.show(n, start_ms + n, partition=0)
    sender.flush()
    streams = streams.model_copy(update={"partition_check_s": 1.0})
    with Running(streams, tmp_path / "state") as running:
        running.wait_until_consumed(N_REGISTRATIONS + N)
        for n in range(N, 2 * N):
            sender.show(n, start_ms + n, partition=1)
        sender.flush()
        proxy.visible.clear()
        running.wait_until_consumed(N_REGISTRATIONS + 2 * N)
    assert f"{topic} has gained partition 1: it is read from its beginning" in caplog.text
    assert [offsets(tmp_path / "state")[topic, partition].n_consumed for partition in (0, 1)] == [N, N]
    assert totals(tmp_path / "state") == (2 * N, 0)
    verified(tmp_path / "state", streams)


def test_expired_events_are_never_skipped_unasked(
    proxy: BrokerProxy,
    streams: StreamSettings,
    sender: Sender,
    start_ms: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state, topic = tmp_path / "state", streams.topics.impressions
    for n in range(N):
        sender.show(n, start_ms + n)
    sender.flush()
    with Running(streams, state) as running:
        running.wait_until_consumed(N_REGISTRATIONS + N)
    for n in range(N, 3 * N):
        sender.show(n, start_ms + n)
    sender.flush()
    proxy.first_offsets[topic, 0] = 2 * N

    done = osmf_online(streams, state)
    assert done.returncode == 1
    assert f"osmf: {topic}[0] starts at offset {2 * N} on the broker, the state continues at {N}" in done.stderr
    assert f"{N} events ({N} to {2 * N - 1}) have expired and were never counted" in done.stderr
    assert 'set streams.expired_offsets = "skip"' in done.stderr
    assert "Traceback" not in done.stderr
    assert n_consumed(state) == N_REGISTRATIONS + N
    assert verify_state(state, streams).missing == []

    told = streams.model_copy(update={"expired_offsets": "skip"})
    with Running(told, state) as running:
        running.wait_until_consumed(N_REGISTRATIONS + 2 * N)
    assert f"{topic}[0]: {N} events ({N} to {2 * N - 1}) have expired and are skipped" in caplog.text
    assert totals(state) == (2 * N, 0)
    assert offsets(state)[topic, 0].n_expired == N
    figures, _ = run_inspect(state)
    assert figures.metrics["expired"] == N
    found = verify_state(state, streams)
    assert found.ok
    assert found.missing == [f"{topic}[0]: {N} events had expired on the broker and were never counted"]


def test_events_that_expire_while_a_process_runs_end_it(
    proxy: BrokerProxy, streams: StreamSettings, sender: Sender, start_ms: int, tmp_path: Path
) -> None:
    sender.show(0, start_ms)
    sender.flush()
    with Running(streams, tmp_path / "state") as running:
        running.wait_until_consumed(N_REGISTRATIONS + 1)
        proxy.first_offsets[streams.topics.impressions, 0] = 3
        for n in range(1, 5):
            sender.show(n, start_ms + n)
        sender.flush()
        with pytest.raises(
            OffsetsExpiredError, match=r"starts at offset 3 on the broker, the state continues at 1: 2 "
        ):
            running.wait_until_consumed(N_REGISTRATIONS + 5)
        running.error = None
    assert n_consumed(tmp_path / "state") == N_REGISTRATIONS + 1
    assert verify_state(tmp_path / "state", streams).ok


@pytest.mark.parametrize("how", ["truncated", "scrambled"])
def test_a_damaged_state_is_refused_and_goes_on_from_its_backup(
    how: str, streams: StreamSettings, sender: Sender, start_ms: int, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    for n in range(N):
        sender.show(n, start_ms + n)
    sender.flush()
    with Running(streams, state) as running:
        running.wait_until_consumed(N_REGISTRATIONS + N)
    write_backup(state, tmp_path / "backup", now_ms=1, osmf_version="test")
    for n in range(N):
        sender.click(n, start_ms + N + n)
    sender.flush()
    with Running(streams, state) as running:
        running.wait_until_consumed(N_REGISTRATIONS + 2 * N)
    data = state / "data.mdb"
    content = data.read_bytes()
    # Of a state that is half there, and of one of which a part lies elsewhere.
    middle = len(content) // 2
    data.write_bytes(content[:middle] if how == "truncated" else content[:8_192] + content[middle:] + content[:middle])
    damaged = data.read_bytes()
    with pytest.raises(StateDamagedError, match=r"is damaged: .*\. Nothing was changed\. Restore a backup with"):
        Store(state)
    assert data.read_bytes() == damaged

    restore_backup(tmp_path / "backup", state, now_ms=2, force=True)
    assert totals(state) == (N, 0)
    with Running(streams, state) as running:
        running.wait_until_consumed(N_REGISTRATIONS + 2 * N)
    assert totals(state) == (N, N)
    verified(state, streams)


def test_huge_messages_are_read_little_by_little(
    streams: StreamSettings, sender: Sender, start_ms: int, tmp_path: Path
) -> None:
    for n in range(12):
        sender.put(streams.topics.impressions, b"{" * 700_000, start_ms + n)
    sender.show(0, start_ms + 100)
    sender.flush()
    streams = streams.model_copy(update={"batch_mib": 1, "read_ahead_mib": 1, "dead_letter_kib": 4})
    with BatchConsumer(streams, [streams.topics.impressions], {}, time.monotonic) as consumer:
        sizes = []
        while sum(sizes) < 13:
            sizes.append(len(consumer.poll(5)))
            assert consumer.n_buffered <= 3
        assert max(sizes) == 2
    with Running(streams, tmp_path / "state") as running:
        running.wait_until_consumed(N_REGISTRATIONS + 13)
    letters = dead_letters(streams)
    assert [len(letter.payload) for letter in letters] == 12 * [4_096]
    assert letters[0].detail.endswith("of its 700,000 bytes the first 4,096 are here (streams.dead_letter_kib)")
    assert totals(tmp_path / "state") == (1, 0)
    verified(tmp_path / "state", streams)


def test_a_silent_partition_lets_no_other_be_read_ahead_without_end(
    streams: StreamSettings, sender: Sender, start_ms: int
) -> None:
    n_messages, topic = 3_000, streams.topics.impressions
    for n in range(n_messages):
        sender.show(n, start_ms + n, partition=0)
    sender.flush()
    streams = streams.model_copy(update={"batch_events": 20})
    with BatchConsumer(streams, [topic], {}, time.monotonic) as consumer:
        n_taken, most = 0, 0
        while n_taken < n_messages:
            n_taken += len(consumer.poll(5))
            most = max(most, consumer.n_buffered)
            if n_taken == 1_000:
                assert consumer.lag() == {(topic, 0): 2_000, (topic, 1): 0}
    assert n_taken == n_messages
    # Two batches are read ahead, and a last poll of one more may come on top.
    assert most <= 60


def test_lag_is_said_and_can_be_asked_for(
    streams: StreamSettings, sender: Sender, start_ms: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, topic = tmp_path / "state", streams.topics.impressions
    sender.show(0, start_ms)
    sender.flush()
    with Running(streams, state) as running:
        running.wait_until_consumed(N_REGISTRATIONS + 1)
    for n in range(1, 201):
        sender.show(n, start_ms + n)
    sender.flush()
    next_offsets = {partition: offset.next_offset for partition, offset in offsets(state).items()}
    assert read_lag(streams, next_offsets)[topic, 0] == 200
    figures, tables = run_inspect(state, lag_of=streams)
    assert figures.metrics["events_behind"] == 200
    assert [column.header for column in tables[0].columns][-1] == "behind"
    behind = [each["behind"] for each in figures.detail["offsets"] if each["topic"] == topic]
    assert behind == [200]
    json.dumps(figures.detail)
    streams = streams.model_copy(update={"lag_warning_events": 50})
    with caplog.at_level(logging.WARNING), Running(streams, state) as running:
        running.wait_until_consumed(N_REGISTRATIONS + 201)
        running.wait_for(lambda: "caught up: 0 events behind the log" in caplog.text)
    assert re.search(rf"\d+ events behind the log: {re.escape(topic)}\[0\] \d+\. Nothing is lost", caplog.text)
