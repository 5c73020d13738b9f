"""Join: impressions and their clicks, by id, in event time.

An impression is kept until its attribution window has passed. At the end of the (shorter) label
window it becomes a labelled impression; a click that comes later corrects that label. A click ahead
of its impression waits. Everything that is kept lies in the state, and every decision depends only
on the log, so that a replay repeats it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from state.records import (
    ImpressionRecord,
    WaitingClickRecord,
    encode_record,
    split_timer_key,
    timer_key,
)
from state.store import ChangeSet, ReadTransaction, Table
from streams.codec import ARROW_STREAM_MARK, Undecodable, encode
from streams.events import Click, DeadLetterReason, Event, Impression
from streams.merge import Message
from streams.settings import JoinSettings

_IMPRESSION = msgspec.msgpack.Decoder(ImpressionRecord)
_WAITING = msgspec.msgpack.Decoder(WaitingClickRecord)

_LABEL, _EXPIRE, _WAIT = b"L", b"E", b"W"


class Refused(msgspec.Struct, frozen=True):
    """An event that cannot be used, with its place in the log."""

    topic: str
    partition: int
    offset: int
    row: int
    reason: DeadLetterReason
    detail: str
    payload: bytes


class Received(msgspec.Struct, frozen=True):
    """An event with its place in the log; ``row`` counts the events of one message."""

    event: Impression | Click
    message: Message
    row: int

    def refuse(self, reason: DeadLetterReason, detail: str) -> Refused:
        """Return this event as one that cannot be used."""
        at = self.message
        return Refused(at.topic, at.partition, at.offset, self.row, reason, detail, payload_of(self.event, at))


def payload_of(event: Event, message: Message) -> bytes:
    """Return the bytes that an event has in a dead letter: its message's, or of a batch of many events its own."""
    value = message.value or b""
    return encode(event) if value.startswith(ARROW_STREAM_MARK) else value


@dataclass
class Tally:
    """Events of one partition that a batch has consumed, used, refused or recognised as duplicates."""

    n_consumed: int = 0
    n_used: int = 0
    n_duplicates: int = 0
    n_dead_letters: int = 0


@dataclass
class Joined:
    """What one micro-batch's join gave.

    ``clicked`` are impressions whose click arrived in this batch (counted now); ``labelled`` are
    those whose label window closed (trained now); ``corrected`` were labelled as no click and are
    clicked after all (the label is taken back and given anew). ``n_closed_early`` impressions had to go before their
    attribution window had passed, for there were too many.
    """

    clicked: list[ImpressionRecord] = field(default_factory=list)
    labelled: list[ImpressionRecord] = field(default_factory=list)
    corrected: list[ImpressionRecord] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    tallies: dict[tuple[str, int], Tally] = field(default_factory=dict)
    n_closed_early: int = 0

    def tally(self, topic: str, partition: int) -> Tally:
        """Return the tally of a partition."""
        return self.tallies.setdefault((topic, partition), Tally())

    def refuse(self, refused: Refused) -> None:
        """Record an event that cannot be used."""
        self.refused.append(refused)
        self.tally(refused.topic, refused.partition).n_dead_letters += 1


def new_impressions(txn: ReadTransaction, received: Iterable[Received], joined: Joined) -> list[Received]:
    """Return the impressions that are not known yet; the others are counted as duplicates."""
    candidates = list(received)
    known = txn.get_many(
        Table.IMPRESSIONS,
        [item.event.impression_id.encode() for item in candidates],
    )
    fresh: list[Received] = []
    seen: set[str] = set()
    for item in candidates:
        impression_id = item.event.impression_id
        tally = joined.tally(item.message.topic, item.message.partition)
        tally.n_used += 1
        if impression_id in seen or impression_id.encode() in known:
            tally.n_duplicates += 1
            continue
        seen.add(impression_id)
        fresh.append(item)
    return fresh


class Join:
    """Joins one micro-batch at a time.

    Parameters
    ----------
    settings
        The windows.
    watermark_ms
        The watermark to continue from: no event older than it is waited for.
    """

    def __init__(self, settings: JoinSettings, watermark_ms: int = 0) -> None:
        self._settings = settings
        self.watermark_ms = watermark_ms
        self._n_waiting = 0

    def run(
        self,
        txn: ReadTransaction,
        changes: ChangeSet,
        impressions: dict[str, ImpressionRecord],
        clicks: list[Received],
        newest_event_ms: int,
        joined: Joined,
    ) -> Joined:
        """Join a batch and write what changed to ``changes``.

        Parameters
        ----------
        txn
            The state before this batch.
        impressions
            The batch's new impressions, by id.
        clicks
            The batch's clicks, in log order.
        newest_event_ms
            The newest event time of the batch; the watermark stays ``allowed_lateness_s`` behind it.
        joined
            What is known of the batch so far; added to and returned.
        """
        self._n_waiting = txn.count(Table.WAITING_CLICKS)
        touched = _Touched(txn, impressions)
        touched.load([click.event.impression_id for click in clicks])
        self._open(changes, impressions)
        self._resolve_waiting(txn, changes, touched, impressions, joined)
        for click in clicks:
            self._click(txn, changes, touched, click, joined)
        # A step back of the newest event (a clock that jumped) never moves the watermark back.
        self.watermark_ms = max(self.watermark_ms, newest_event_ms - self._settings.allowed_lateness_s * 1000)
        self._fire(txn, changes, touched, joined)
        n_pending = txn.count(Table.IMPRESSIONS) + len(impressions) - touched.n_dropped
        if n_pending > self._settings.max_pending_impressions:
            self._close_early(txn, changes, touched, joined, n_pending - self._settings.max_pending_impressions)
        touched.write(changes)
        return joined

    def _open(self, changes: ChangeSet, impressions: dict[str, ImpressionRecord]) -> None:
        for impression_id, record in impressions.items():
            due_ms = record.shown_at_ms + self._settings.label_window_s * 1000
            changes.put(Table.TIMERS, timer_key(due_ms, impression_id), _LABEL)

    def _resolve_waiting(
        self,
        txn: ReadTransaction,
        changes: ChangeSet,
        touched: _Touched,
        impressions: dict[str, ImpressionRecord],
        joined: Joined,
    ) -> None:
        if not impressions or not txn.count(Table.WAITING_CLICKS):
            return
        waiting = txn.get_many(Table.WAITING_CLICKS, [impression_id.encode() for impression_id in impressions])
        for key, value in waiting.items():
            click = _WAITING.decode(value)
            self._n_waiting -= 1
            changes.delete(Table.WAITING_CLICKS, key)
            changes.delete(Table.TIMERS, timer_key(self._gives_up_ms(click.clicked_at_ms), key.decode()))
            self._attribute(touched, key.decode(), click, joined)

    def _gives_up_ms(self, clicked_at_ms: int) -> int:
        return clicked_at_ms + self._settings.click_wait_s * 1000

    def _click(
        self, txn: ReadTransaction, changes: ChangeSet, touched: _Touched, click: Received, joined: Joined
    ) -> None:
        event, at = click.event, click.message
        assert isinstance(event, Click)
        arrived = WaitingClickRecord(
            event.clicked_at_ms, at.topic, at.partition, at.offset, click.row, payload_of(event, at)
        )
        if touched.get(event.impression_id) is not None:
            self._attribute(touched, event.impression_id, arrived, joined)
            return
        key = event.impression_id.encode()
        if changes.has(Table.WAITING_CLICKS, key) or txn.get(Table.WAITING_CLICKS, key) is not None:
            tally = joined.tally(at.topic, at.partition)
            tally.n_used += 1
            tally.n_duplicates += 1
            return
        if self._n_waiting >= self._settings.max_waiting_clicks:
            joined.refuse(
                click.refuse(
                    "over_limit",
                    f"its impression {event.impression_id!r} has not come, and streams.join.max_waiting_clicks = "
                    f"{self._settings.max_waiting_clicks} clicks wait for theirs already",
                )
            )
            return
        self._n_waiting += 1
        changes.put(Table.WAITING_CLICKS, key, encode_record(arrived))
        changes.put(Table.TIMERS, timer_key(self._gives_up_ms(event.clicked_at_ms), event.impression_id), _WAIT)

    def _attribute(self, touched: _Touched, impression_id: str, click: WaitingClickRecord, joined: Joined) -> None:
        """Give a click to its impression, unless it came too late or there was one before."""
        record = touched.get(impression_id)
        assert record is not None
        delay_s = (click.clicked_at_ms - record.shown_at_ms) / 1000
        if delay_s > self._settings.attribution_window_s:
            joined.refuse(
                _refused(
                    click,
                    f"the click came {delay_s:.0f} s after impression {impression_id!r}; it is credited up to "
                    f"streams.join.attribution_window_s = {self._settings.attribution_window_s} s after it",
                )
            )
            return
        tally = joined.tally(click.topic, click.partition)
        tally.n_used += 1
        if record.clicked:
            tally.n_duplicates += 1
            return
        self._credit(touched, impression_id, joined)

    def _credit(self, touched: _Touched, impression_id: str, joined: Joined) -> None:
        record = touched.get(impression_id)
        assert record is not None
        record.clicked = True
        touched.mark(impression_id)
        joined.clicked.append(record)
        if record.labelled:
            joined.corrected.append(record)

    def _fire(self, txn: ReadTransaction, changes: ChangeSet, touched: _Touched, joined: Joined) -> None:
        end = timer_key(self.watermark_ms, "")
        due: list[tuple[bytes, bytes]] = []
        for key, kind in txn.scan(Table.TIMERS):
            if key >= end or len(due) >= self._settings.max_timers_per_batch:
                break
            if not changes.has(Table.TIMERS, key):
                due.append((key, kind))
        # Timers that this batch set and that are already due (late events) fire with the others.
        due += [(key, kind) for key, kind in changes.of(Table.TIMERS) if kind is not None and key < end]
        due.sort()
        touched.load([split_timer_key(key)[1] for key, kind in due if kind != _WAIT])
        for key, kind in due:
            changes.delete(Table.TIMERS, key)
            _, impression_id = split_timer_key(key)
            if kind == _WAIT:
                self._give_up(txn, changes, impression_id, joined)
                continue
            record = touched.get(impression_id)
            if record is None:
                continue
            expires_ms = record.shown_at_ms + self._settings.attribution_window_s * 1000
            if kind == _LABEL:
                record.labelled = True
                touched.mark(impression_id)
                joined.labelled.append(record)
                if expires_ms >= self.watermark_ms:
                    changes.put(Table.TIMERS, timer_key(expires_ms, impression_id), _EXPIRE)
                    continue
            touched.drop(impression_id)

    def _close_early(
        self, txn: ReadTransaction, changes: ChangeSet, touched: _Touched, joined: Joined, n_surplus: int
    ) -> None:
        """Close the oldest impressions before their time, those that are labelled first."""
        n_most = min(n_surplus, self._settings.max_timers_per_batch)
        found: list[bytes] = []
        for wanted in (_EXPIRE, _LABEL):
            stored = (
                key for key, kind in txn.scan(Table.TIMERS) if kind == wanted and not changes.has(Table.TIMERS, key)
            )
            found += islice(stored, n_most - len(found))
            new = sorted(key for key, kind in changes.of(Table.TIMERS) if kind == wanted)
            found += new[: n_most - len(found)]
        touched.load([split_timer_key(key)[1] for key in found])
        for key in found:
            changes.delete(Table.TIMERS, key)
            impression_id = split_timer_key(key)[1]
            record = touched.get(impression_id)
            if record is None:
                continue
            if not record.labelled:
                record.labelled = True
                joined.labelled.append(record)
            touched.drop(impression_id)
            joined.n_closed_early += 1

    def _give_up(self, txn: ReadTransaction, changes: ChangeSet, impression_id: str, joined: Joined) -> None:
        key = impression_id.encode()
        pending = (
            changes.get(Table.WAITING_CLICKS, key)
            if changes.has(Table.WAITING_CLICKS, key)
            else (txn.get(Table.WAITING_CLICKS, key))
        )
        if pending is None:
            return
        record = _WAITING.decode(pending)
        self._n_waiting -= 1
        changes.delete(Table.WAITING_CLICKS, key)
        joined.refuse(
            _refused(
                record,
                f"no impression {impression_id!r} within streams.join.click_wait_s = {self._settings.click_wait_s} s",
            )
        )


def _refused(click: WaitingClickRecord, detail: str) -> Refused:
    at = (click.topic, click.partition, click.offset, click.row)
    return Refused(*at, "unknown_impression", detail, click.payload)


class _Touched:
    """The impressions that a batch looks at: loaded in bulk, written once."""

    def __init__(self, txn: ReadTransaction, new: dict[str, ImpressionRecord]) -> None:
        self._txn = txn
        self._records: dict[str, ImpressionRecord] = dict(new)
        self._dirty: dict[str, None] = dict.fromkeys(new)
        self._dropped: set[str] = set()

    def load(self, impression_ids: Iterable[str]) -> None:
        wanted = [
            impression_id.encode()
            for impression_id in impression_ids
            if impression_id not in self._records and impression_id not in self._dropped
        ]
        for key, value in self._txn.get_many(Table.IMPRESSIONS, wanted).items():
            self._records[key.decode()] = _IMPRESSION.decode(value)

    @property
    def n_dropped(self) -> int:
        return len(self._dropped)

    def get(self, impression_id: str) -> ImpressionRecord | None:
        return self._records.get(impression_id)

    def mark(self, impression_id: str) -> None:
        self._dirty[impression_id] = None

    def drop(self, impression_id: str) -> None:
        del self._records[impression_id]
        self._dirty.pop(impression_id, None)
        self._dropped.add(impression_id)

    def write(self, changes: ChangeSet) -> None:
        for impression_id in self._dirty:
            changes.put(Table.IMPRESSIONS, impression_id.encode(), encode_record(self._records[impression_id]))
        for impression_id in self._dropped:
            changes.delete(Table.IMPRESSIONS, impression_id.encode())


def undecodable(message: Message, row: int, failure: Undecodable) -> Refused:
    """Return a message that could not be decoded as one that cannot be used."""
    return Refused(
        message.topic, message.partition, message.offset, row, failure.reason, failure.detail, failure.payload
    )
