"""Join: impressions and their clicks, by id, in event time.

An impression is kept until its attribution window has passed. At the end of the (shorter) label
window it becomes a labelled impression; a click that comes later corrects that label. A click ahead
of its impression waits. Everything that is kept lies in the state, and every decision depends only
on the log, so that a replay repeats it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from state.records import (
    ClickEntry,
    ImpressionRecord,
    RetractionEntry,
    WaitingClickRecord,
    encode_record,
    split_timer_key,
    timer_key,
)
from state.store import ChangeSet, ReadTransaction, Table
from streams.events import Click, ClickRetracted, Impression, UserForgotten
from streams.merge import Message
from streams.received import Received, Refused, payload_of
from streams.settings import JoinSettings
from streams.touched import TouchedImpressions

_WAITING = msgspec.msgpack.Decoder(WaitingClickRecord)

_LABEL, _EXPIRE, _WAIT = b"L", b"E", b"W"


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
    clicked after all (the label is taken back and given anew). ``retracted`` are those whose click was
    retracted (taken back now); ``uncorrected`` those of them that were labelled as a click before.
    ``click_entries`` and ``retraction_entries`` are the same clicks and retractions for the ledger, but
    for those of the batch's own impressions.
    ``n_closed_early`` impressions had to go before their attribution window had passed, for there were too many.
    """

    clicked: list[ImpressionRecord] = field(default_factory=list)
    labelled: list[ImpressionRecord] = field(default_factory=list)
    corrected: list[ImpressionRecord] = field(default_factory=list)
    retracted: list[ImpressionRecord] = field(default_factory=list)
    uncorrected: list[ImpressionRecord] = field(default_factory=list)
    click_entries: list[tuple[str, ClickEntry]] = field(default_factory=list)
    retraction_entries: list[tuple[str, RetractionEntry]] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    tallies: dict[tuple[str, int], Tally] = field(default_factory=dict)
    n_closed_early: int = 0

    def tally(self, topic: str, partition: int) -> Tally:
        """Return the tally of a partition."""
        return self.tallies.setdefault((topic, partition), Tally())

    def use(self, at: Message | WaitingClickRecord, *, duplicate: bool = False) -> None:
        """Record an event as used; a duplicate is one without effect."""
        tally = self.tally(at.topic, at.partition)
        tally.n_used += 1
        tally.n_duplicates += duplicate

    def refuse(self, refused: Refused) -> None:
        """Record an event that cannot be used."""
        self.refused.append(refused)
        self.tally(refused.topic, refused.partition).n_dead_letters += 1


def new_impressions(
    txn: ReadTransaction, received: Iterable[Received], joined: Joined, forgotten: Collection[str] = ()
) -> list[Received]:
    """Return the impressions that are not known yet, or forgotten; the others are counted as duplicates."""
    candidates = list(received)
    known = txn.get_many(
        Table.IMPRESSIONS,
        [item.event.impression_id.encode() for item in candidates if isinstance(item.event, Impression)],
    )
    fresh: list[Received] = []
    seen: set[str] = set()
    for item in candidates:
        assert isinstance(item.event, Impression)
        impression_id = item.event.impression_id
        is_known = impression_id.encode() in known and impression_id not in forgotten
        duplicate = is_known or impression_id in seen
        joined.use(item.message, duplicate=duplicate)
        if not duplicate:
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
        *,
        archived: Mapping[str, ImpressionRecord] | None = None,
        forgotten: Collection[str] = (),
    ) -> Joined:
        """Join a batch and write what changed to ``changes``.

        Parameters
        ----------
        txn
            The state before this batch.
        impressions
            The batch's new impressions, by id.
        clicks
            The batch's clicks and their retractions, in log order.
        newest_event_ms
            The newest event time of the batch; the watermark stays ``allowed_lateness_s`` behind it.
        joined
            What is known of the batch so far; added to and returned.
        archived
            Impressions whose click may no longer come, but can be retracted, by id.
        forgotten
            Ids of impressions that the state before this batch knows, and this batch has forgotten.
        """
        self._n_waiting = txn.count(Table.WAITING_CLICKS)
        touched = TouchedImpressions(txn, impressions, forgotten)
        touched.load([click.event.impression_id for click in clicks if not isinstance(click.event, UserForgotten)])
        # A step back of the newest event (a clock that jumped) never moves the watermark back.
        self.watermark_ms = max(self.watermark_ms, newest_event_ms - self._settings.allowed_lateness_s * 1000)
        self._open(changes, impressions)
        self._resolve_waiting(txn, changes, touched, impressions, joined)
        for click in clicks:
            if isinstance(click.event, ClickRetracted):
                self._retract(txn, changes, touched, archived or {}, click, joined)
            else:
                self._click(txn, changes, touched, click, joined)
        self._fire(txn, changes, touched, joined)
        n_pending = txn.count(Table.IMPRESSIONS) + len(impressions) - touched.n_dropped
        if n_pending > self._settings.max_pending_impressions:
            self._close_early(txn, changes, touched, joined, n_pending - self._settings.max_pending_impressions)
        touched.write(changes)
        return joined

    def _open(self, changes: ChangeSet, impressions: dict[str, ImpressionRecord]) -> None:
        for impression_id, record in impressions.items():
            record.counted_ms = self.watermark_ms
            due_ms = record.shown_at_ms + self._settings.label_window_s * 1000
            changes.put(Table.TIMERS, timer_key(due_ms, impression_id), _LABEL)

    def _resolve_waiting(
        self,
        txn: ReadTransaction,
        changes: ChangeSet,
        touched: TouchedImpressions,
        impressions: dict[str, ImpressionRecord],
        joined: Joined,
    ) -> None:
        if not impressions or not txn.count(Table.WAITING_CLICKS):
            return
        waiting = txn.get_many(Table.WAITING_CLICKS, [impression_id.encode() for impression_id in impressions])
        for key, value in waiting.items():
            click = _WAITING.decode(value)
            self._end_wait(changes, key.decode(), click)
            self._attribute(touched, key.decode(), click, joined)

    def _end_wait(self, changes: ChangeSet, impression_id: str, click: WaitingClickRecord) -> None:
        self._n_waiting -= 1
        changes.delete(Table.WAITING_CLICKS, impression_id.encode())
        changes.delete(Table.TIMERS, self._wait_timer(click.clicked_at_ms, impression_id))

    def _wait_timer(self, clicked_at_ms: int, impression_id: str) -> bytes:
        return timer_key(clicked_at_ms + self._settings.click_wait_s * 1000, impression_id)

    def _click(
        self, txn: ReadTransaction, changes: ChangeSet, touched: TouchedImpressions, click: Received, joined: Joined
    ) -> None:
        event, at = click.event, click.message
        assert isinstance(event, Click)
        arrived = WaitingClickRecord(
            event.clicked_at_ms, at.topic, at.partition, at.offset, click.row, payload_of(event, at)
        )
        if touched.get(event.impression_id) is not None:
            self._attribute(touched, event.impression_id, arrived, joined)
            return
        if _waiting(txn, changes, event.impression_id) is not None:
            joined.use(at, duplicate=True)
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
        changes.put(Table.WAITING_CLICKS, event.impression_id.encode(), encode_record(arrived))
        changes.put(Table.TIMERS, self._wait_timer(event.clicked_at_ms, event.impression_id), _WAIT)

    def _retract(
        self,
        txn: ReadTransaction,
        changes: ChangeSet,
        touched: TouchedImpressions,
        archived: Mapping[str, ImpressionRecord],
        retraction: Received,
        joined: Joined,
    ) -> None:
        event, at = retraction.event, retraction.message
        assert isinstance(event, ClickRetracted)
        impression_id = event.impression_id
        record = touched.get(impression_id) or archived.get(impression_id)
        waiting = None if record is not None else _waiting(txn, changes, impression_id)
        if record is None and waiting is None:
            detail = f"nothing is known of impression {impression_id!r}, or no longer (online.ledger.retention_s)"
            joined.refuse(retraction.refuse("unknown_impression", detail))
        elif record is None:
            assert waiting is not None
            joined.use(at, duplicate=waiting.retracted)
            kept = msgspec.structs.replace(waiting, retracted=True)
            changes.put(Table.WAITING_CLICKS, impression_id.encode(), encode_record(kept))
        elif not record.clicked:
            detail = f"no click on impression {impression_id!r} has been counted"
            joined.refuse(retraction.refuse("unknown_click", detail))
        else:
            joined.use(at, duplicate=record.retracted)
            self._discredit(touched, impression_id, record, joined)

    def _discredit(
        self, touched: TouchedImpressions, impression_id: str, record: ImpressionRecord, joined: Joined
    ) -> None:
        """Take the click of an impression back; a second time nothing happens."""
        if record.retracted:
            return
        record.retracted, record.retracted_late = True, record.labelled
        joined.retracted.append(record)
        if record.labelled:
            joined.uncorrected.append(record)
        if touched.get(impression_id) is record:
            touched.mark(impression_id)
        if not touched.is_new(impression_id):
            joined.retraction_entries.append((impression_id, RetractionEntry(record.labelled)))

    def _attribute(
        self, touched: TouchedImpressions, impression_id: str, click: WaitingClickRecord, joined: Joined
    ) -> None:
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
        joined.use(click, duplicate=record.clicked)
        if not record.clicked:
            self._credit(touched, impression_id, joined)
            if click.retracted:
                self._discredit(touched, impression_id, record, joined)

    def _credit(self, touched: TouchedImpressions, impression_id: str, joined: Joined) -> None:
        record = touched.get(impression_id)
        assert record is not None
        record.clicked, record.clicked_ms, record.clicked_late = True, self.watermark_ms, record.labelled
        touched.mark(impression_id)
        joined.clicked.append(record)
        if not touched.is_new(impression_id):
            joined.click_entries.append((impression_id, ClickEntry(record.clicked_ms, record.clicked_late)))
        if record.labelled:
            joined.corrected.append(record)

    def _fire(self, txn: ReadTransaction, changes: ChangeSet, touched: TouchedImpressions, joined: Joined) -> None:
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
        self, txn: ReadTransaction, changes: ChangeSet, touched: TouchedImpressions, joined: Joined, n_surplus: int
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
        record = _waiting(txn, changes, impression_id)
        if record is None:
            return
        self._n_waiting -= 1
        changes.delete(Table.WAITING_CLICKS, impression_id.encode())
        joined.refuse(
            _refused(
                record,
                f"no impression {impression_id!r} within streams.join.click_wait_s = {self._settings.click_wait_s} s",
            )
        )


def _waiting(txn: ReadTransaction, changes: ChangeSet, impression_id: str) -> WaitingClickRecord | None:
    """Return the click that waits for an impression."""
    key = impression_id.encode()
    value = (
        changes.get(Table.WAITING_CLICKS, key)
        if changes.has(Table.WAITING_CLICKS, key)
        else txn.get(Table.WAITING_CLICKS, key)
    )
    return None if value is None else _WAITING.decode(value)


def _refused(click: WaitingClickRecord, detail: str) -> Refused:
    at = (click.topic, click.partition, click.offset, click.row)
    return Refused(*at, "unknown_impression", detail, click.payload)
