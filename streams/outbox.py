"""Outbox: outbound messages, committed with the state that caused them and sent afterwards."""

from __future__ import annotations

import logging

import msgspec

from state.records import OutboxRecord
from state.store import ChangeSet, Store, Table
from streams.producer import EventProducer, SendError

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
"""Size of what is sent before its acknowledgements are awaited, bytes."""

_OUTBOX = msgspec.msgpack.Decoder(OutboxRecord)


class Outbox:
    """Outbound messages: in the state until the broker has them.

    Parameters
    ----------
    store
        The state.
    producer
        Sends them.
    most
        Messages that may wait; see `is_full`.
    """

    def __init__(self, store: Store, producer: EventProducer, most: int) -> None:
        self._store = store
        self._producer = producer
        self._most = most
        self._sent: set[bytes] = set()

    def send(self) -> None:
        """Send what the state holds, a block at a time; what the broker does not take stays for the next time."""
        try:
            while block := self._next_block():
                for message in block.values():
                    self._producer.send_bytes(
                        message.topic, message.key, message.payload, timestamp_ms=message.timestamp_ms or None
                    )
                self._producer.flush()
                self._sent.update(block)
        except SendError as error:
            log.warning("%d outbound messages wait: %s", self.n_waiting, error)

    def _next_block(self) -> dict[bytes, OutboxRecord]:
        block: dict[bytes, OutboxRecord] = {}
        n_bytes = 0
        with self._store.read() as txn:
            for key, value in txn.scan(Table.OUTBOX):
                if key not in self._sent:
                    block[key] = _OUTBOX.decode(value)
                    n_bytes += len(value)
                    if n_bytes >= BLOCK_BYTES:
                        break
        return block

    @property
    def n_waiting(self) -> int:
        """How many messages the broker has not taken yet."""
        with self._store.read() as txn:
            return txn.count(Table.OUTBOX) - len(self._sent)

    @property
    def is_full(self) -> bool:
        """Whether as many wait as may: nothing further is to be consumed until the broker takes them."""
        return self.n_waiting >= self._most

    def clear(self, changes: ChangeSet) -> None:
        """Remove what has been acknowledged, as part of ``changes``."""
        for key in self._sent:
            changes.delete(Table.OUTBOX, key)
        self._sent.clear()

    def settle(self) -> None:
        """Remove what has been acknowledged in a commit of its own: nothing of it is sent again at the next start."""
        leftover = ChangeSet()
        self.clear(leftover)
        if len(leftover):
            self._store.commit(leftover)
