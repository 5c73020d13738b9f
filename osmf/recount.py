"""Recount: impressions and clicks of a log by (product, creative), counted plainly.

It shares only the decoder with the online process; the rest is SQL (DuckDB). An impression id
counts once, and a click once per impression, within the windows of `streams.settings.JoinSettings`.
An id that comes again after the attribution window is a new impression to the online process, and
not here: ids are meant to be unique. A retracted click does not count, and of a user who was
forgotten nothing does that came before; a log from files is read twice for that.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

from osmf.forgettings import Forgettings, Place
from osmf.log_entry import KINDS, Kind, LogEntry
from state.reading import StateView
from state.records import ForgettingRecord, WaitingClickRecord
from streams.codec import EventDecoder, Undecodable, event_time_ms, topic_decoders
from streams.events import Click, ClickRetracted, Creative, DeadLetter, Event, Impression, Product, UserForgotten
from streams.settings import StreamSettings
from streams.tail import Tail

TOPIC_IDLE_S: Final = 15.0
"""How long a topic may be silent before its recount is given up, seconds."""

_BLOCK_ROWS: Final = 20_000

_SQL: Final = """
WITH shown AS (
    SELECT impression_id, arg_min(product_id, number) AS product_id, arg_min(creative_id, number) AS creative_id,
           arg_min(shown_at_ms, number) AS shown_at_ms
    FROM impressions WHERE NOT $only_known OR (product_id, creative_id) IN (SELECT (product_id, creative_id) FROM known)
    GROUP BY impression_id
), clicked AS (
    SELECT impression_id, min(clicks.number) AS number
    FROM clicks JOIN shown USING (impression_id)
    WHERE clicked_at_ms - shown_at_ms <= $attribution_ms AND shown_at_ms - clicked_at_ms <= $click_wait_ms
    GROUP BY impression_id
), kept AS (
    -- A retraction ahead of its click is refused.
    SELECT impression_id FROM clicked
    WHERE NOT EXISTS (
        SELECT * FROM retractions
        WHERE retractions.impression_id = clicked.impression_id AND retractions.number > clicked.number
    )
)
SELECT product_id, creative_id, count(*), count(kept.impression_id)
FROM shown LEFT JOIN kept USING (impression_id)
GROUP BY ALL
"""


class TopicIncompleteError(RuntimeError):
    """A topic does not, or no longer, hold what the state has consumed."""

    def __init__(self, topic: str, partition: int, n_wanted: int, n_found: int) -> None:
        super().__init__(
            f"{topic}[{partition}] gave {n_found:,} events, the state has consumed {n_wanted:,} of it: the events "
            "cannot be recounted, and nothing was compared. Recount from event files, or from the broker that holds "
            "the whole log."
        )


class Counts(NamedTuple):
    """Impressions and clicks."""

    n_impressions: int
    n_clicks: int


class Recount:
    """Counts events with DuckDB, in a temporary database of its own.

    Parameters
    ----------
    streams
        The settings: field names, and the windows within which a click counts.
    only_known
        Whether impressions of unregistered products and creatives are left out here (for a log from
        files; from topics they are left out because they are dead letters).
    """

    def __init__(self, streams: StreamSettings, *, only_known: bool) -> None:
        import duckdb

        self._join = streams.join
        self._only_known = only_known
        # On disk, so that the size of the log does not matter.
        self._folder = tempfile.TemporaryDirectory(prefix="osmf-recount-")
        self._connection = duckdb.connect(Path(self._folder.name) / "recount.duckdb")
        self._connection.execute("CREATE TABLE known (product_id TEXT, creative_id TEXT)")
        self._connection.execute(
            "CREATE TABLE impressions "
            "(number BIGINT, impression_id TEXT, product_id TEXT, creative_id TEXT, shown_at_ms BIGINT)"
        )
        self._connection.execute("CREATE TABLE clicks (number BIGINT, impression_id TEXT, clicked_at_ms BIGINT)")
        self._connection.execute("CREATE TABLE retractions (number BIGINT, impression_id TEXT)")
        self._waiting: dict[str, list[tuple[object, ...]]] = {
            table: [] for table in ("known", "impressions", "clicks", "retractions")
        }
        self._products: set[str] = set()
        self._n_events = 0

    def add(self, event: Event) -> None:
        """Take an event in, in the order of the log."""
        self._n_events += 1
        match event:
            case Product():
                self._products.add(event.product_id)
            case Creative():
                # A creative ahead of its product is refused, and so are its impressions.
                if event.product_id in self._products:
                    self._put("known", (event.product_id, event.creative_id))
            case Impression():
                row = (self._n_events, event.impression_id, event.product_id, event.creative_id, event.shown_at_ms)
                self._put("impressions", row)
            case Click():
                self._put("clicks", (self._n_events, event.impression_id, event.clicked_at_ms))
            case ClickRetracted():
                self._put("retractions", (self._n_events, event.impression_id))
            case _:
                pass

    def _put(self, table: str, row: tuple[object, ...]) -> None:
        rows = self._waiting[table]
        rows.append(row)
        if len(rows) >= _BLOCK_ROWS:
            self._write(table)

    def _write(self, table: str) -> None:
        import pyarrow as pa

        rows = self._waiting[table]
        if rows:
            columns = [pa.array(column) for column in zip(*rows, strict=True)]
            self._connection.register("block", pa.table(columns, names=[f"c{i}" for i in range(len(columns))]))
            self._connection.execute(f"INSERT INTO {table} SELECT * FROM block")
            self._connection.unregister("block")
            rows.clear()

    def counts(self) -> dict[tuple[str, str], Counts]:
        """Return impressions and clicks by (product, creative)."""
        for table in self._waiting:
            self._write(table)
        rows = self._connection.execute(
            _SQL,
            {
                "only_known": self._only_known,
                "attribution_ms": self._join.attribution_window_s * 1000,
                "click_wait_ms": (self._join.click_wait_s + self._join.allowed_lateness_s) * 1000,
            },
        ).fetchall()
        return {(product_id, creative_id): Counts(shown, clicked) for product_id, creative_id, shown, clicked in rows}

    def close(self) -> None:
        """Remove the database."""
        self._connection.close()
        self._folder.cleanup()

    def __enter__(self) -> Recount:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def recount_entries(
    entries: Callable[[], Iterable[LogEntry]], streams: StreamSettings
) -> dict[tuple[str, str], Counts]:
    """Count the events of a log from files by (product, creative); ``entries`` gives the log, from its start each time.

    Impressions and clicks that are dated too far ahead are left out, as the online process leaves them out
    (``streams.max_ahead_s``). What the ledger no longer held when a correction came is taken back here all the same.
    """
    now_ms = time.time_ns() // 1_000_000
    names = {getattr(streams.topics, kind): kind for kind in KINDS}
    decoders: dict[Kind, EventDecoder] = {
        names[topic]: decoder for topic, decoder in topic_decoders(streams.topics, streams.fields).items()
    }

    def events(kinds: tuple[Kind, ...]) -> Iterator[tuple[Place, Event]]:
        for number, entry in enumerate(entries()):
            if entry.kind in kinds:
                for event in decoders[entry.kind].decode(entry.payload):
                    latest_ms = min(entry.timestamp_ms, now_ms) + streams.max_ahead_s * 1000
                    if isinstance(event, Undecodable):
                        continue
                    if not isinstance(event, Impression | Click) or event_time_ms(event) <= latest_ms:
                        yield Place("", 0, number), event

    forgettings = Forgettings()
    for at, event in events(("corrections",)):
        if isinstance(event, UserForgotten):
            forgettings.add(event, ForgettingRecord({}, {"": {0: at.offset}}))
    with Recount(streams, only_known=True) as recount:
        # A click may come ahead of its impression: which ones are forgotten has to be known before.
        for at, event in events(("impressions",)) if forgettings.any else ():
            forgettings.covers(event, at)
        for at, event in events(KINDS):
            if not forgettings.covers(event, at):
                recount.add(event)
        return recount.counts()


def recount_topics(
    view: StateView, waiting: Iterable[WaitingClickRecord], streams: StreamSettings
) -> dict[tuple[str, str], Counts]:
    """Count the events of a broker's topics by (product, creative), as far as a state has consumed them.

    Events that were dead-lettered, and clicks in ``waiting``, are left out by their places in the log.

    Raises
    ------
    TopicIncompleteError
        A topic does not hold what was consumed.
    """
    offsets, forgotten = view.offsets(), view.forgettings()
    left_out = _refused(streams, sum(offset.n_dead_letters for offset in offsets.values()))
    left_out |= {(click.topic, click.partition, click.offset, click.row) for click in waiting}
    decoders = topic_decoders(streams.topics, streams.fields)

    def events(topic: str) -> Iterator[tuple[Place, int, Event]]:
        for (name, partition), offset in offsets.items():
            if name != topic:
                continue
            n_events = 0
            for place, value in _messages(streams, topic, partition, offset.next_offset):
                for row, event in enumerate(decoders[topic].decode(value)):
                    n_events += 1
                    if not isinstance(event, Undecodable) and (topic, partition, place, row) not in left_out:
                        yield Place(topic, partition, place), row, event
            if n_events != offset.n_consumed:
                raise TopicIncompleteError(topic, partition, offset.n_consumed, n_events)

    forgettings, topics = Forgettings(), streams.topics
    corrections = list(events(topics.corrections))
    for at, row, event in corrections:
        record = forgotten.get((*at, row))
        if isinstance(event, UserForgotten) and record is not None:
            forgettings.add(event, record)
    with Recount(streams, only_known=False) as recount:
        for topic in (topics.impressions, topics.clicks):
            for at, _, event in events(topic):
                if not forgettings.covers(event, at):
                    recount.add(event)
        for at, _, event in corrections:
            if not forgettings.covers(event, at):
                recount.add(event)
        return recount.counts()


def _messages(streams: StreamSettings, topic: str, partition: int, end: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (offset, bytes) of a partition up to an offset, or until it stays silent."""
    from kafka import KafkaConsumer, TopicPartition

    consumer: Any = KafkaConsumer(
        bootstrap_servers=streams.bootstrap_servers.split(","),
        group_id=None,
        enable_auto_commit=False,
        **streams.client_options,
    )
    try:
        assigned = TopicPartition(topic, partition)
        consumer.assign([assigned])
        consumer.seek_to_beginning(assigned)
        deadline_s = time.monotonic() + TOPIC_IDLE_S
        while time.monotonic() < deadline_s:
            for record in consumer.poll(timeout_ms=500).get(assigned, []):
                if record.offset < end:
                    yield record.offset, record.value
                if record.offset >= end - 1:
                    return
                deadline_s = time.monotonic() + TOPIC_IDLE_S
    finally:
        consumer.close()


def _refused(streams: StreamSettings, n_wanted: int) -> set[tuple[str, int, int, int]]:
    """Return the places in the log of the dead letters: topic, partition, offset and row."""
    found: set[tuple[str, int, int, int]] = set()
    if not n_wanted:
        return found
    deadline_s = time.monotonic() + TOPIC_IDLE_S
    with Tail(streams, streams.topics.dead_letters, DeadLetter) as tail:
        while True:
            letters = tail.poll(500)
            for letter in letters:
                row = int(letter.event_id.rpartition("-")[2])
                found.add((letter.topic, letter.partition, letter.offset, row))
            if not letters and (len(found) >= n_wanted or time.monotonic() > deadline_s):
                return found
