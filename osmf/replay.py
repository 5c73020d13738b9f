"""Replay: a recorded click log through the broker and the online process, as in production.

The log's messages are sent to the topics, stamped with their own times, and `online.worker.run_online`
works them off into a state. Counts are complete when it ends. Training waits for an impression's
click by the log's own clock, which stops with its last event: the impressions of the last label
window stay unlabelled (``n_unlabelled``), and no time is made up for them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from online.metrics import read_metrics
from online.pipeline import BatchSummary
from online.settings import OnlineSettings
from online.worker import run_online
from osmf.event_files import EventFiles
from osmf.figures import Figures, commit, device
from osmf.log_entry import KINDS, LogEntry
from osmf.replay_obd import open_bandit_entries, open_bandit_files, open_bandit_settings
from state.errors import StateMissingError
from state.reading import StateReader, StateView, open_view
from state.settings import StateSettings
from state.store import Store
from streams.broker import LocalBroker, create_topics
from streams.codec import EventDecoder
from streams.events import Correction, DeadLetter, UserForgotten
from streams.producer import EventProducer
from streams.settings import FieldMapSettings, StreamSettings
from streams.tail import Tail

FLUSH_EVERY: Final = 20_000
"""Messages that are on their way to the broker at most."""

OWN_IDLE_S: Final = 60.0
"""How long a broker of our own may be silent before the replay is given up, seconds."""

SHARED_IDLE_S: Final = 5.0
"""How long a given broker must have nothing new before the replay ends, seconds."""

DEAD_LETTER_WAIT_S: Final = 10.0

REPLAY_MARK: Final = "made-by-replay"
"""A file in the state's folder that says that the state's log is gone, so that it may be replaced."""

_STATE_FILES: Final = ("data.mdb", "lock.mdb", "writer.lock", REPLAY_MARK)

Progress = Callable[[str, int], None]
"""Told what is going on ("sent" or "consumed") and how many messages that is so far."""


class StateInUseError(RuntimeError):
    """The state at the replay's path was built from another log."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"state at {path} was built from another log than this replay's new broker holds: nothing was sent. "
            "Give an empty folder as state.path (OSMF_STATE__PATH), or the broker of that state as "
            "streams.bootstrap_servers."
        )
        self.path = path


class ReplayIncompleteError(RuntimeError):
    """The online process did not get everything that was sent."""

    def __init__(self, n_sent: int, n_consumed: int) -> None:
        super().__init__(
            f"{n_sent:,} messages were sent and {n_consumed:,} consumed before the broker fell silent: the counts are "
            "incomplete. Look at the broker's log and replay again."
        )


@dataclass(frozen=True)
class _Totals:
    """What a state has counted."""

    n_impressions: int = 0
    n_clicks: int = 0
    n_consumed: int = 0
    n_dead_letters: int = 0
    n_duplicates: int = 0

    @classmethod
    def of(cls, view: StateView) -> _Totals:
        cells, offsets = view.cells(), view.offsets().values()
        return cls(
            sum(cell.n_impressions for cell in cells),
            sum(cell.n_clicks for cell in cells),
            sum(offset.n_consumed for offset in offsets),
            sum(offset.n_dead_letters for offset in offsets),
            sum(offset.n_duplicates for offset in offsets),
        )


def replay(
    entries: Iterable[LogEntry],
    streams: StreamSettings,
    online: OnlineSettings,
    state: StateSettings,
    *,
    command: str,
    own_broker: bool,
    on_progress: Progress = lambda *_: None,
) -> Figures:
    """Play a log through the broker into a state, and return what was counted and learnt.

    Parameters
    ----------
    entries
        The log, in time order (`osmf.event_files.EventFiles.entries`, `osmf.replay_obd.open_bandit_entries`).
    streams, online, state
        The settings.
    command
        The command's name, for the figures.
    own_broker
        Whether to start a broker for this replay, in memory; it ends with it. Then a state that an
        earlier replay left at the path is replaced. Otherwise the brokers of ``streams`` are used,
        and a state that is there continues.
    on_progress
        Told how far it is.

    Raises
    ------
    StateInUseError
        ``own_broker``, and the state at the path is another log's.
    ReplayIncompleteError
        ``own_broker``, and not everything arrived.
    """
    started_s = time.monotonic()
    if own_broker:
        _make_way(state.path)
    with _broker(streams, own_broker, state.path) as used:
        before = _read_totals(state)
        with Tail(used, used.topics.dead_letters, DeadLetter) as dead_letters:
            earlier = {letter.event_id for letter in _dead_letters(dead_letters, before.n_dead_letters)}
            ready_s = time.monotonic()
            n_sent, first_ms, last_ms = _send(entries, used, on_progress)
            sent_s = time.monotonic()
            _consume(used, online, state, n_sent, own_broker, on_progress)
            consumed_s = time.monotonic()
            after = _read_totals(state)
            letters = {
                letter.event_id: letter
                for letter in _dead_letters(dead_letters, after.n_dead_letters - before.n_dead_letters)
                if letter.event_id not in earlier
            }
    with StateReader(state.path) as reader, reader.view() as view:
        metrics, detail = _learnt(view)
    n_consumed = after.n_consumed - before.n_consumed
    online_s = consumed_s - sent_s
    return Figures(
        command=command,
        commit=commit(),
        seeds={"online": online.seed},
        device=device(),
        seconds=time.monotonic() - started_s,
        metrics={
            "impressions": after.n_impressions - before.n_impressions,
            "clicks": after.n_clicks - before.n_clicks,
            "produced": n_sent,
            "consumed": n_consumed,
            "dead_letters": after.n_dead_letters - before.n_dead_letters,
            "duplicates": after.n_duplicates - before.n_duplicates,
            **metrics,
            "send_s": sent_s - ready_s,
            "online_s": online_s,
            "rate_events_s": n_consumed / max(online_s, 1e-9),
        },
        detail={
            "state": str(state.path),
            "broker": "a broker of the replay's own, in memory" if own_broker else streams.bootstrap_servers,
            "log_first_ms": first_ms,
            "log_last_ms": last_ms,
            "encoders": online.encoders.model_dump(),
            "dead_letters_by_reason": dict(sorted(Counter(letter.reason for letter in letters.values()).items())),
            "dead_letter_examples": [
                {"reason": letter.reason, "detail": letter.detail, "topic": letter.topic, "offset": letter.offset}
                for letter in list(letters.values())[:10]
            ],
            **detail,
        },
    )


def replay_files(
    files: EventFiles,
    streams: StreamSettings,
    online: OnlineSettings,
    state: StateSettings,
    *,
    own_broker: bool,
    on_progress: Progress = lambda *_: None,
) -> Figures:
    """Play a log from files; see `replay`.

    Without a file of creatives there are no pictures, and creatives are told apart by their ids.

    Raises
    ------
    osmf.event_rows.EventFileError
        A file cannot be read; nothing was sent.
    """
    files.check(streams.fields)
    if files.creatives is None:
        online = online.model_copy(update={"encoders": online.encoders.model_copy(update={"image": "hashed"})})
    return replay(
        files.entries(streams.fields),
        streams,
        online,
        state,
        command="replay",
        own_broker=own_broker,
        on_progress=on_progress,
    )


def replay_open_bandit(
    streams: StreamSettings,
    online: OnlineSettings,
    state: StateSettings,
    *,
    own_broker: bool,
    on_progress: Progress = lambda *_: None,
) -> Figures:
    """Play the Open Bandit Dataset; see `replay` and `osmf.replay_obd`.

    The dataset's attributes take the place of those of ``online``, and encoders are used that need
    no pictures. Its events have our field names, so ``streams.fields`` is not applied.

    Raises
    ------
    osmf.replay_obd.OpenBanditMissingError
        The package with the dataset is not installed.
    """
    files = open_bandit_files()
    return replay(
        open_bandit_entries(files),
        streams.model_copy(update={"fields": FieldMapSettings()}),
        open_bandit_settings(online, files),
        state,
        command="replay obd",
        own_broker=own_broker,
        on_progress=on_progress,
    )


@contextmanager
def _broker(streams: StreamSettings, own: bool, folder: Path) -> Iterator[StreamSettings]:
    topics = dict.fromkeys(streams.topics.model_dump().values(), streams.n_partitions)
    if not own:
        servers = streams.bootstrap_servers
        create_topics(servers, topics, client_options=streams.client_options)
        yield streams
        return
    with LocalBroker(topics, log_path=folder.with_name(f"{folder.name}-broker.log")) as broker:
        yield streams.model_copy(update={"bootstrap_servers": broker.bootstrap_servers, "client_options": {}})


def _make_way(path: Path) -> None:
    """Remove the state of an earlier replay, whose broker is gone; leave any other alone."""
    if any(path.glob("partition-*/data.mdb")):
        raise StateInUseError(path)
    with Store(path) if (path / "data.mdb").exists() else _nothing() as store:
        if store is not None and not (path / REPLAY_MARK).exists():
            with open_view(store) as view:
                if view.offsets():
                    raise StateInUseError(path)
        path.mkdir(parents=True, exist_ok=True)
        for name in _STATE_FILES:
            (path / name).unlink(missing_ok=True)
        (path / REPLAY_MARK).touch()


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _read_totals(state: StateSettings) -> _Totals:
    try:
        with StateReader(state.path) as reader, reader.view() as view:
            return _Totals.of(view)
    except StateMissingError:
        return _Totals()


def _send(
    entries: Iterable[LogEntry], streams: StreamSettings, on_progress: Progress
) -> tuple[int, int | None, int | None]:
    """Send the log; return how many messages it has, and its first and last times."""
    topics: dict[str, str] = {kind: getattr(streams.topics, kind) for kind in KINDS}
    corrections = EventDecoder(Correction, streams.fields.corrections)
    n_sent, first_ms, last_ms = 0, None, None
    with EventProducer(streams, client_id="osmf-replay") as producer:
        for entry in entries:
            # A message without a time is stamped by the client with the present: 0 would be taken for none.
            stamp_ms = max(entry.timestamp_ms, 1)
            everywhere = entry.kind == "corrections" and isinstance(corrections.decode(entry.payload)[0], UserForgotten)
            producer.send_bytes(
                topics[entry.kind], entry.key, entry.payload, timestamp_ms=stamp_ms, everywhere=everywhere
            )
            n_before = n_sent
            n_sent += len(producer.partitions(topics[entry.kind])) if everywhere else 1
            first_ms, last_ms = first_ms or stamp_ms, stamp_ms
            if n_sent // FLUSH_EVERY > n_before // FLUSH_EVERY:
                producer.flush()
                on_progress("sent", n_sent)
        producer.flush()
    on_progress("sent", n_sent)
    return n_sent, first_ms, last_ms


def _consume(
    streams: StreamSettings,
    online: OnlineSettings,
    state: StateSettings,
    n_sent: int,
    own_broker: bool,
    on_progress: Progress,
) -> None:
    n_consumed = 0

    def count(summary: BatchSummary) -> None:
        nonlocal n_consumed
        n_consumed += summary.n_messages
        on_progress("consumed", n_consumed)

    # A broker of our own holds this log and nothing else; a given one may hold more, and may get more.
    run_online(
        streams,
        online,
        state,
        clock_s=time.monotonic,
        stop=lambda: own_broker and n_consumed >= n_sent,
        on_batch=count,
        until_idle_s=OWN_IDLE_S if own_broker else SHARED_IDLE_S,
    )
    if own_broker and n_consumed != n_sent:
        raise ReplayIncompleteError(n_sent, n_consumed)


def _dead_letters(tail: Tail[DeadLetter], n_wanted: int) -> list[DeadLetter]:
    """Return the dead letters that have come; wait a while for as many as the state counts."""
    found: list[DeadLetter] = []
    deadline_s = time.monotonic() + (DEAD_LETTER_WAIT_S if n_wanted else 0.0)
    while True:
        more = tail.poll(500)
        found += more
        if not more and (len(found) >= n_wanted or time.monotonic() >= deadline_s):
            break
    return found


def _learnt(view: StateView) -> tuple[dict[str, float | int], dict[str, Any]]:
    """Return metrics and details of what a state holds."""
    products = view.products()
    grouped = [groups for product in products if (groups := view.groups(product.product_id)) is not None]
    points = read_metrics(view)
    n_labelled = points[-1].n_labelled if points else 0
    metrics: dict[str, float | int] = {
        "products": len(products),
        "creatives": len(view.creatives()),
        "products_with_groups": sum(len(groups.groups) > 1 for groups in grouped),
        "groups": sum(len(groups.groups) for groups in grouped),
        "shifts": len(view.shifts()),
        "n_labelled": n_labelled,
        "n_unlabelled": sum(cell.n_impressions for cell in view.cells()) - n_labelled,
        "n_waiting_clicks": view.n_waiting_clicks(),
    }
    if points:
        metrics |= {"auroc": points[-1].auroc, "log_loss": points[-1].log_loss}
    arms: dict[str, dict[str, dict[str, int]]] = {}
    for (experiment, arm, _), record in view.arms().items():
        counts = arms.setdefault(experiment, {}).setdefault(arm, {"impressions": 0, "clicks": 0})
        counts["impressions"] += record.n_impressions
        counts["clicks"] += record.n_clicks
    return metrics, {"arms": arms}
