"""Corrections: clicks that were retracted, and users that are to be forgotten.

What was added for them is looked up in the ledger, and goes the way back: out of counts, evidence and model in
`online.core`, and, of a user, out of every table of the state here. An event counts as before a correction if it came
before it in the log, in whatever micro-batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from online.core import OnlineCore
from online.forgetting import ForgottenUsers
from online.ledger import Ledger, Life, Starts, offsets_by_topic
from online.settings import LedgerSettings
from state.records import (
    ForgettingRecord,
    ImpressionRecord,
    OutboxRecord,
    WaitingClickRecord,
    encode_record,
    place_key,
    timer_key,
)
from state.store import ChangeSet, ReadTransaction, Table
from streams.codec import encode
from streams.events import Click, ClickRetracted, DeadLetter, Impression, UserForgotten
from streams.join import Joined
from streams.merge import Message
from streams.received import Received, Refused
from streams.settings import StreamSettings

_IMPRESSION = msgspec.msgpack.Decoder(ImpressionRecord)
_WAITING = msgspec.msgpack.Decoder(WaitingClickRecord)
_OUTBOX = msgspec.msgpack.Decoder(OutboxRecord)
_LETTER = msgspec.json.Decoder(DeadLetter)

REMOVED = "removed: it was of a user who has been forgotten"
"""Detail of a dead letter that waited in the outbox when its user was forgotten."""


@dataclass
class ReceivedBatch:
    """A micro-batch's events.

    ``clicks`` are clicks and their retractions, in log order; ``forgettings`` name the users who are to be forgotten.
    """

    impressions: list[Received] = field(default_factory=list)
    clicks: list[Received] = field(default_factory=list)
    forgettings: list[Received] = field(default_factory=list)

    def add(self, received: Received) -> None:
        """Add an event."""
        match received.event:
            case Impression():
                self.impressions.append(received)
            case UserForgotten():
                self.forgettings.append(received)
            case _:
                self.clicks.append(received)


@dataclass
class LookedUp:
    """What a micro-batch's corrections are about.

    ``forgotten`` impressions are taken back, those of ``forgotten_ids`` were known to the join. ``archived`` are
    impressions whose click can be retracted, by id.
    """

    forgotten: list[ImpressionRecord] = field(default_factory=list)
    forgotten_ids: set[str] = field(default_factory=set)
    archived: dict[str, ImpressionRecord] = field(default_factory=dict)


class Corrections:
    """The ledger, and what a micro-batch's corrections take back.

    Parameters
    ----------
    streams, settings
        The topics and the join's windows; the ledger.
    core
        Where users are sampled.
    """

    def __init__(self, streams: StreamSettings, settings: LedgerSettings, core: OnlineCore) -> None:
        self._streams = streams
        self._core = core
        self.ledger = Ledger(settings)

    def refusal(self, received: Received) -> Refused | None:
        """Return a correction as one that cannot be used, where the ledger is off."""
        if self.ledger.is_on:
            return None
        return received.refuse(
            "ledger_off",
            "online.ledger.retention_s is 0: who added what is not kept, so nothing can be taken back",
        )

    def look_up(
        self,
        batch: ReceivedBatch,
        messages: list[Message],
        offsets: Mapping[tuple[str, int], int],
        txn: ReadTransaction,
        changes: ChangeSet,
        joined: Joined,
        now_ms: int,
        batch_number: int,
    ) -> LookedUp:
        """Look up what a batch's corrections are about, and forget its users in the state and in the batch itself.

        Parameters
        ----------
        batch, messages, offsets
            The batch's events, its messages, and where each partition stood before it. The events of users who are
            forgotten later in the batch are taken out of ``batch``: they are used, without effect.
        txn, changes, joined
            The state before the batch, what it changes, and what is known of it so far.
        now_ms, batch_number
            The watermark before the batch, and its number.
        """
        found = LookedUp()
        wanted = {each.event.impression_id for each in batch.clicks if isinstance(each.event, ClickRetracted)}
        if not wanted and not batch.forgettings:
            return found
        last = {_user_id(each): each for each in batch.forgettings}
        hashes = {self.ledger.user_hash(user_id): user_id for user_id in last}
        lives = self.ledger.lives(txn, hashes, wanted)
        of_users = [life for life in lives if life.user_hash in hashes]
        for life in lives:
            # Whatever the join does not know any more has been labelled.
            life.record.labelled = True
            if life.user_hash not in hashes:
                found.archived[life.impression_id] = life.record
        if not batch.forgettings:
            return found
        found.forgotten = self._forget_impressions(of_users, txn, changes, found.forgotten_ids)
        dropped = _drop_impressions(batch, last, joined)
        user_of = {life.impression_id: hashes[life.user_hash] for life in of_users} | dropped
        _drop_clicks(batch, {name: last[user_id].order for name, user_id in user_of.items()}, joined)
        self._forget_waiting(user_of, txn, changes, joined)
        acted = set(user_of.values())
        acted |= self._redact_outbox({**user_of, **{user_id: user_id for user_id in last}}, txn, changes)
        acted |= self._forget_samples(last, found.forgotten, txn, now_ms, batch_number)
        starts = self.ledger.starts(txn)
        self.ledger.erase(of_users, txn)
        for received in batch.forgettings:
            acts = received is last[_user_id(received)] and _user_id(received) in acted
            joined.use(received.message, duplicate=not acts)
            if acts:
                self._note(received, starts, self._ends(received, messages, offsets), changes)
        numbers = self.ledger.numbers
        numbers.n_users_forgotten += len(acted)
        numbers.n_impressions_taken_back += len(found.forgotten)
        numbers.n_clicks_taken_back += sum(record.click_counts for record in found.forgotten)
        return found

    def _forget_impressions(
        self, lives: Iterable[Life], txn: ReadTransaction, changes: ChangeSet, known: set[str]
    ) -> list[ImpressionRecord]:
        """Remove users' impressions from the join; return them as they were counted and learnt."""
        lives = list(lives)
        open_ones = txn.get_many(Table.IMPRESSIONS, [life.impression_id.encode() for life in lives])
        records, astray = [], set()
        for life in lives:
            key = life.impression_id.encode()
            record = _IMPRESSION.decode(open_ones[key]) if key in open_ones else None
            # An id that has been used again is another impression's.
            if record is None or (record.shown_at_ms, record.counted_ms) != (
                life.record.shown_at_ms,
                life.record.counted_ms,
            ):
                records.append(life.record)
                continue
            records.append(record)
            known.add(life.impression_id)
            changes.delete(Table.IMPRESSIONS, key)
            windows = self._streams.join
            window_s = windows.attribution_window_s if record.labelled else windows.label_window_s
            timer = timer_key(record.shown_at_ms + window_s * 1000, life.impression_id)
            changes.delete(Table.TIMERS, timer)
            if txn.get(Table.TIMERS, timer) is None:
                astray.add(key)
        if astray:
            # Timers that were set with other windows.
            for timer in txn.keys(Table.TIMERS):
                if timer[8:] in astray:
                    changes.delete(Table.TIMERS, timer)
        return records

    def _forget_waiting(
        self, impression_ids: Iterable[str], txn: ReadTransaction, changes: ChangeSet, joined: Joined
    ) -> None:
        """Remove clicks that wait for impressions that are forgotten."""
        keys = [impression_id.encode() for impression_id in impression_ids]
        for key, value in txn.get_many(Table.WAITING_CLICKS, keys).items():
            click = _WAITING.decode(value)
            until_ms = click.clicked_at_ms + self._streams.join.click_wait_s * 1000
            changes.delete(Table.WAITING_CLICKS, key)
            changes.delete(Table.TIMERS, timer_key(until_ms, key.decode()))
            joined.use(click, duplicate=True)

    def _redact_outbox(self, user_of: Mapping[str, str], txn: ReadTransaction, changes: ChangeSet) -> set[str]:
        """Empty dead letters of users' events that the broker has not acknowledged; return the users that were in them.

        ``user_of`` has the user of each id that may be in them.
        """
        found: set[str] = set()
        for key, value in txn.scan(Table.OUTBOX):
            message = _OUTBOX.decode(value)
            if message.topic != self._streams.topics.dead_letters:
                continue
            letter = _LETTER.decode(message.payload)
            named = {user_of[name] for name in user_of if _names(letter, name)} if letter.payload else set()
            if named:
                emptied = msgspec.structs.replace(letter, detail=REMOVED, payload=b"")
                record = msgspec.structs.replace(message, payload=encode(emptied))
                changes.put(Table.OUTBOX, key, encode_record(record))
                found |= named
        return found

    def _forget_samples(
        self,
        user_ids: Iterable[str],
        records: list[ImpressionRecord],
        txn: ReadTransaction,
        now_ms: int,
        batch_number: int,
    ) -> set[str]:
        """Take users out of the samples of all products; return those who were in any."""
        key_of = {user_id: zlib.crc32(user_id.encode()) for user_id in user_ids}
        keys = np.array(sorted(set(key_of.values())), np.uint32)
        users = ForgottenUsers(keys, sorted({record.attributes for record in records}))
        product_ids = {record.product_id for record in records} | set(self._core.grouping.products_with(users))
        resident = set(self._core.grouping.product_ids())
        for key, value in txn.scan(Table.CLUSTERINGS):
            if key.decode() not in resident and users.may_be_in(value):
                product_ids.add(key.decode())
        self._core.bring_in(sorted(product_ids), txn, now_ms, batch_number)
        found: set[int] = set()
        for product_id in sorted(product_ids):
            found |= self._core.forget_users(product_id, users, now_ms)
        return {user_id for user_id, key in key_of.items() if key in found}

    def _ends(self, received: Received, messages: list[Message], offsets: Mapping[tuple[str, int], int]) -> Starts:
        """Return where the partitions stood when a correction's turn came."""
        ends = dict(offsets)
        for message in messages[: received.order]:
            ends[message.topic, message.partition] = message.offset + 1
        topics = self._streams.topics
        return offsets_by_topic(ends, {topics.impressions, topics.clicks, topics.corrections})

    def _note(self, received: Received, starts: Starts, ends: Starts, changes: ChangeSet) -> None:
        at = received.message
        record = encode_record(ForgettingRecord(starts, ends))
        changes.put(Table.FORGETTINGS, place_key(at.topic, at.partition, at.offset, received.row), record)

    def enter(
        self,
        fresh: Iterable[Received],
        records: Mapping[str, ImpressionRecord],
        offsets: Mapping[tuple[str, int], int],
        changes: ChangeSet,
        joined: Joined,
        now_ms: int,
    ) -> None:
        """Enter what a batch counted into the ledger, and let what is too old go.

        Parameters
        ----------
        fresh, records
            The batch's new impressions, as events and as records.
        offsets
            Where each partition stood before it.
        changes, joined
            What the join has written and found.
        now_ms
            The watermark.
        """
        self.ledger.numbers.n_clicks_retracted += len(joined.retracted)
        impressions = []
        for received in fresh:
            event = received.event
            assert isinstance(event, Impression)
            encoded = changes.get(Table.IMPRESSIONS, event.impression_id.encode())
            if encoded is None:
                encoded = encode_record(records[event.impression_id])
            impressions.append((event.user_id, event.impression_id, encoded))
        starts = offsets_by_topic(offsets, {self._streams.topics.impressions})
        self.ledger.append(impressions, joined.click_entries, joined.retraction_entries, starts, now_ms)
        self.ledger.expire(now_ms)


def _user_id(received: Received) -> str:
    assert isinstance(received.event, UserForgotten)
    return received.event.user_id


def _drop_impressions(batch: ReceivedBatch, last: Mapping[str, Received], joined: Joined) -> dict[str, str]:
    """Take out impressions whose user is forgotten later in the batch; return the users, by the impression's id."""
    kept, dropped = [], {}
    for received in batch.impressions:
        event = received.event
        assert isinstance(event, Impression)
        forgetting = last.get(event.user_id)
        if forgetting is not None and received.order < forgetting.order:
            dropped[event.impression_id] = event.user_id
            joined.use(received.message, duplicate=True)
        else:
            kept.append(received)
    batch.impressions = kept
    return dropped


def _drop_clicks(batch: ReceivedBatch, forgotten_before: Mapping[str, int], joined: Joined) -> None:
    """Take out clicks and retractions of impressions that are forgotten later in the batch."""
    kept = []
    for received in batch.clicks:
        event = received.event
        assert isinstance(event, Click | ClickRetracted)
        if received.order < forgotten_before.get(event.impression_id, -1):
            joined.use(received.message, duplicate=True)
        else:
            kept.append(received)
    batch.clicks = kept


def _names(letter: DeadLetter, name: str) -> bool:
    """Return whether a dead letter names a user or an impression; where its bytes are no JSON, whether it may."""
    if name in letter.detail:
        return True
    try:
        return msgspec.json.encode(name) in msgspec.json.encode(msgspec.json.decode(letter.payload))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return name.encode() in letter.payload
