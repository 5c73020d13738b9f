"""``kill -9`` of the generator at random moments: no creative is lost or doubled, no file without event.

Shifts come replayed, duplicated and out of order, and the online state moves on all the while, so that a shift that is
worked off anew is decided otherwise than before.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec
import numpy as np
import pytest

from generator.refreshed import HandledOccasion
from generator.storage import ImageTampered, ImageUnreadable, local_path, read_bytes
from state.records import Cell, cell_key, encode_cell
from state.store import ChangeSet, Store, Table
from streams.broker import LocalBroker
from streams.codec import encode
from streams.events import Creative, GroupsShifted
from streams.producer import EventProducer
from streams.settings import StreamSettings
from streams.tail import Tail
from tests.faults.child import end
from tests.faults.generator_worker import Generator, generator_settings
from tests.generator.bench import picture, shift, write_online_state

pytestmark = [pytest.mark.broker, pytest.mark.timeout(900)]

SEED = 20_261_129
N_GROUPS = 2
PRODUCTS = ("p-1", "p-2")
QUEUE_MESSAGES = 4
"""Few, so that many shifts lead to something before a later one of their product is seen."""


def shifts(n: int) -> list[GroupsShifted]:
    return [
        shift(f"shift-{number}", PRODUCTS[number % 2], detected_at_ms=50_000 + 1_000 * number) for number in range(n)
    ]


def disturbed(events: list[GroupsShifted], rng: np.random.Generator) -> list[GroupsShifted]:
    """Return events as a broker may deliver them: out of order, some twice at once, and all of them once more."""
    late = np.arange(len(events)) + rng.uniform(0, 6, len(events))
    sent = [events[place] for place in np.argsort(late)]
    twice = [event for event in sent for _ in range(1 + int(rng.random() < 0.3))]
    again = [sent[place] for place in rng.permutation(len(sent))]
    return twice[: len(twice) // 2] + again + twice[len(twice) // 2 :]


@contextmanager
def moving(folder: Path) -> Iterator[None]:
    """Let the online state go on: clicks come, which change what is proposed."""
    ended = threading.Event()
    failed: list[BaseException] = []

    def move() -> None:
        rng = np.random.default_rng(SEED)
        try:
            with Store(folder, map_size_mib=16, sync=False) as store:
                while not ended.wait(0.02):
                    changes = ChangeSet()
                    for product_id in PRODUCTS:
                        for group_id in range(N_GROUPS):
                            for number in range(3):
                                n_clicks = int(rng.integers(0, 200))
                                key = (product_id, group_id, f"{product_id}-c{number}")
                                cell = Cell(*key, 300, n_clicks, 300.0, float(n_clicks), 0)
                                changes.put(Table.CELLS, cell_key(*key), encode_cell(cell))
                    store.commit(changes)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not failed, failed


@dataclass(frozen=True)
class Scoreboard:
    """What the kills have left."""

    n_kills: int
    n_shifts: int
    n_superseded: int
    n_creatives: int
    n_lost: int
    n_doubled: int
    n_orphans: int

    def __str__(self) -> str:
        return (
            f"kills: {self.n_kills}, shifts: {self.n_shifts} ({self.n_superseded} superseded), "
            f"creatives: {self.n_creatives}, lost: {self.n_lost}, doubled: {self.n_doubled}, orphans: {self.n_orphans}"
        )


def handled(own: Path) -> dict[str, HandledOccasion]:
    with Store(own, readonly=True) as store, store.read() as txn:
        found = [msgspec.msgpack.decode(value, type=HandledOccasion) for _, value in txn.scan(Table.SHIFTS)]
        assert not txn.count(Table.FILES)
        assert not txn.count(Table.OUTBOX)
    return {record.event_id: record for record in found}


def announced(streams: StreamSettings) -> list[Creative]:
    """Return every creative of the topic, repetitions too."""
    found: list[Creative] = []
    with Tail(streams, streams.topics.creatives, Creative) as tail:
        quiet_since_s = time.monotonic()
        while time.monotonic() - quiet_since_s < 1.0:
            if more := tail.poll(100):
                found += more
                quiet_since_s = time.monotonic()
    return found


def is_whole(creative: Creative) -> bool:
    try:
        payload = read_bytes(creative.image_uri or "")
    except (ImageUnreadable, ImageTampered):
        return False
    return hashlib.sha256(payload).hexdigest() == creative.image_sha256


def score(generator: Generator, n_kills: int, events: list[GroupsShifted]) -> Scoreboard:
    records = handled(generator.settings.state_path)
    creatives = announced(generator.streams)
    by_id = {creative.creative_id: creative for creative in creatives}
    decided = {
        candidate.creative_id
        for record in records.values()
        for group in record.groups
        for candidate in group.candidates
        if candidate.creative_id is not None
    }
    shifts_of = {event.event_id for event in events}
    worked_off = {event_id for event_id, record in records.items() if record.superseded_by is None}
    wanted = {
        (event.event_id, group.group_id) for event in events if event.event_id in worked_off for group in event.groups
    }
    last = {event.product_id: event.event_id for event in events}
    got = [(creative.caused_by, creative.group_id) for creative in by_id.values()]
    n_changed = sum(creative != by_id[creative.creative_id] for creative in creatives)
    folder = Path(generator.settings.storage_url)
    files = {path for path in folder.rglob("*") if path.is_file()}
    named = {local_path(creative.image_uri or "") for creative in by_id.values()}
    n_fileless = sum(not is_whole(creative) for creative in by_id.values())
    return Scoreboard(
        n_kills=n_kills,
        n_shifts=len(records),
        n_superseded=len(records.keys() - worked_off),
        n_creatives=len(by_id),
        n_lost=(
            len(shifts_of - records.keys())
            + len(set(last.values()) - worked_off)
            + len(wanted - set(got))
            + len(decided - by_id.keys())
        ),
        n_doubled=len(got) - len(set(got)) + n_changed + len(by_id.keys() - decided),
        n_orphans=len(files - named) + n_fileless,
    )


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def wait_for(generator: Generator, n_messages: int, process: BaseProcess) -> None:
    while generator.n_consumed() < n_messages:
        assert process.exitcode is None, generator.log.read_text()
        time.sleep(0.002)


def kill_at_random(folder: Path, n_shifts: int, n_kills: int) -> None:
    """Kill the generator again and again, each time at a random moment, and hold what is left to the account."""
    rng = np.random.default_rng(SEED)
    online = folder / "state"
    write_online_state(online, picture(folder / "cutout.png"))
    events = shifts(n_shifts)
    sent = disturbed(events, rng)
    with LocalBroker(topics={}, log_path=folder / "broker.log") as broker, moving(online):
        streams = StreamSettings(bootstrap_servers=broker.bootstrap_servers, linger_ms=20)
        broker.create_topics(dict.fromkeys(streams.topics.model_dump().values(), 1))
        with EventProducer(streams, client_id="test") as producer:
            for number, event in enumerate(sent):
                producer.send_bytes(
                    streams.topics.groups_shifted, event.product_id, encode(event), timestamp_ms=1_000 + number
                )
            producer.flush()
        generator = Generator(streams, generator_settings(folder, QUEUE_MESSAGES), online)
        process = generator.start()
        for target in np.sort(rng.integers(0, int(0.95 * len(sent)), n_kills)):
            wait_for(generator, int(target), process)
            # Anywhere in the next shift: in drawing, in the commit, in writing, or in sending.
            time.sleep(float(rng.uniform(0, 0.3)))
            kill(process)
            process = generator.start()
        wait_for(generator, len(sent), process)
        while not generator.is_delivered():  # the last kill may have come between the last commit and its delivery
            assert process.exitcode is None, generator.log.read_text()
            time.sleep(0.01)
        end(process, generator.log)
        found = score(generator, n_kills, events)
    print(found)
    assert (found.n_lost, found.n_doubled, found.n_orphans) == (0, 0, 0)
    assert (found.n_shifts, found.n_creatives) == (n_shifts, N_GROUPS * (n_shifts - found.n_superseded))
    assert 0 < found.n_superseded < n_shifts


def test_kills_of_the_generator_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, n_shifts=10, n_kills=5)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_fifty_kills_of_the_generator_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, n_shifts=100, n_kills=50)
