"""The outbox: a message leaves the state only after the broker has it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from state.records import OutboxRecord, encode_record, number_key
from state.store import ChangeSet, Store, Table
from streams.outbox import Outbox
from streams.producer import EventProducer, SendError

Sent = tuple[str, str, bytes, int | None]


class Producer:
    """Takes messages, or refuses them at the next flush."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.refuses = False

    def send_bytes(self, topic: str, key: str, payload: bytes, *, timestamp_ms: int | None = None) -> None:
        self.sent.append((topic, key, payload, timestamp_ms))

    def flush(self) -> None:
        if self.refuses:
            raise SendError("t", TimeoutError("no answer"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path, map_size_mib=16, sync=False) as opened:
        yield opened


def put(store: Store, *numbers: int) -> None:
    changes = ChangeSet()
    for number in numbers:
        record = OutboxRecord("t", f"k{number}", 1_000 * number, b"%d" % number)
        changes.put(Table.OUTBOX, number_key(number), encode_record(record))
    store.commit(changes)


def message(number: int) -> Sent:
    return ("t", f"k{number}", b"%d" % number, 1_000 * number or None)


def outbox_of(store: Store, producer: Producer) -> Outbox:
    return Outbox(store, cast(EventProducer, producer), 100)


def commit(store: Store, outbox: Outbox) -> list[bytes]:
    changes = ChangeSet()
    outbox.clear(changes)
    store.commit(changes)
    with store.read() as txn:
        return [key for key, _ in txn.scan(Table.OUTBOX)]


def test_messages_are_sent_in_order_and_once(store: Store) -> None:
    producer = Producer()
    outbox = outbox_of(store, producer)
    outbox.send()
    assert producer.sent == []
    put(store, 0, 300, 2)
    outbox.send()
    assert producer.sent == [message(0), message(2), message(300)]
    put(store, 301)
    outbox.send()  # those that were sent still lie in the state
    assert producer.sent[3:] == [message(301)]
    assert commit(store, outbox) == []
    outbox.send()
    assert len(producer.sent) == 4


def test_what_the_broker_refuses_stays_and_is_sent_again(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    producer = Producer()
    outbox = outbox_of(store, producer)
    put(store, 1, 2)
    producer.refuses = True
    with caplog.at_level(logging.WARNING):
        outbox.send()
    assert "2 outbound messages wait" in caplog.text
    assert commit(store, outbox) == [number_key(1), number_key(2)]
    producer.refuses = False
    outbox.send()
    assert producer.sent == 2 * [message(1), message(2)]
    assert commit(store, outbox) == []


def test_it_is_full_while_too_many_wait(store: Store) -> None:
    producer = Producer()
    outbox = Outbox(store, cast(EventProducer, producer), 2)
    put(store, 1)
    assert not outbox.is_full
    put(store, 2, 3)
    assert (outbox.is_full, outbox.n_waiting) == (True, 3)
    producer.refuses = True
    outbox.send()
    assert outbox.is_full
    producer.refuses = False
    outbox.send()
    assert (outbox.is_full, outbox.n_waiting) == (False, 0)
    assert commit(store, outbox) == []


def test_much_is_sent_block_by_block(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.outbox.BLOCK_BYTES", 40)
    producer = Producer()
    flushed: list[int] = []
    monkeypatch.setattr(producer, "flush", lambda: flushed.append(len(producer.sent)))
    put(store, *range(1, 10))
    outbox_of(store, producer).send()
    assert producer.sent == [message(number) for number in range(1, 10)]
    assert len(flushed) > 2


def test_a_message_that_was_sent_before_a_kill_is_sent_again(store: Store) -> None:
    producer = Producer()
    put(store, 1)
    outbox_of(store, producer).send()  # killed before its next commit
    outbox = outbox_of(store, producer)
    outbox.send()
    assert producer.sent == 2 * [message(1)]
    assert commit(store, outbox) == []
