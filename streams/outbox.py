"""Outbox: outbound messages, committed with the state that caused them and sent afterwards."""

from __future__ import annotations

import logging

import msgspec

from state.records import OutboxRecord
from state.store import ChangeSet, Store, Table
from streams.producer import EventProducer, SendError

log = logging.getLogger(__name__)

_OUTBOX = msgspec.msgpack.Decoder(OutboxRecord)


class Outbox:
    """Outbound messages: in the state until the broker has them."""

    def __init__(self, store: Store, producer: EventProducer) -> None:
        self._store = store
        self._producer = producer
        self._sent: list[bytes] = []

    def send(self) -> None:
        """Send what the state holds; what the broker does not take stays for the next time."""
        with self._store.read() as txn:
            waiting = [(key, _OUTBOX.decode(value)) for key, value in txn.scan(Table.OUTBOX) if key not in self._sent]
        if not waiting:
            return
        try:
            for _, message in waiting:
                self._producer.send_bytes(
                    message.topic, message.key, message.payload, timestamp_ms=message.timestamp_ms or None
                )
            self._producer.flush()
        except SendError as error:
            log.warning("%d outbound messages wait: %s", len(waiting), error)
            return
        self._sent += [key for key, _ in waiting]

    def clear(self, changes: ChangeSet) -> None:
        """Remove what has been acknowledged, as part of ``changes``."""
        for key in self._sent:
            changes.delete(Table.OUTBOX, key)
        self._sent.clear()
