"""A bench for the worker: an online state, a broker's log, and a generator that can be killed and started again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
from PIL import Image, ImageDraw

from generator.champion import ChampionPointer
from generator.champion_models import ChampionWatch, Loader, load_models
from generator.delivery import Delivery
from generator.inventory import read_reviews
from generator.procedural import ProceduralRenderer
from generator.process import work
from generator.prompt import VOCABULARY, Prompt
from generator.refreshed import HandledOccasion
from generator.review import ReviewRecord, ReviewStatus
from generator.settings import GeneratorSettings
from generator.storage import FileSigner, ImageStore, local_path, read_bytes
from generator.worker import GeneratorWorker, Handled
from online.encoders import HashedImageEncoder
from state.reading import StateReader
from state.records import (
    Cell,
    CreativeRecord,
    GroupRecord,
    OffsetRecord,
    ProductGroups,
    ProductRecord,
    cell_key,
    creative_key,
    encode_cell,
    encode_record,
    partition_key,
)
from state.store import ChangeSet, Store, Table
from streams.codec import encode
from streams.events import (
    Creative,
    CreativeCtr,
    CreativeRequested,
    CreativeReviewed,
    DeadLetter,
    GroupsShifted,
    ProfileEntry,
    ShiftedGroup,
    Verdict,
)
from streams.merge import Message
from streams.outbox import Outbox
from streams.producer import EventProducer
from streams.settings import StreamSettings

STREAMS = StreamSettings()
SIZE_PX = 96
NOW_MS = time.time_ns() // 1_000_000
CHECKS = {"unsafe": False, "portraits": False}  # the networks have tests of their own


class Killed(BaseException):
    """The process ends here."""


class FakeProducer:
    """A broker's log of what was acknowledged; ``fail_with`` is raised by the next flush."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, bytes]] = []
        self.fail_with: BaseException | None = None
        self.acknowledged_before_failure = False
        self._unsent: list[tuple[str, str, bytes]] = []

    def send_bytes(self, topic: str, key: str, payload: bytes, *, timestamp_ms: int | None = None) -> None:
        self._unsent.append((topic, key, payload))

    def flush(self) -> None:
        error, self.fail_with = self.fail_with, None
        unsent, self._unsent = self._unsent, []
        if error is None or self.acknowledged_before_failure:
            self.log += unsent
        if error is not None:
            raise error

    def creatives(self) -> list[Creative]:
        topic = STREAMS.topics.creatives
        return [msgspec.json.decode(payload, type=Creative) for to, _, payload in self.log if to == topic]

    def dead_letters(self) -> list[DeadLetter]:
        topic = STREAMS.topics.dead_letters
        return [msgspec.json.decode(payload, type=DeadLetter) for to, _, payload in self.log if to == topic]


class FakeConsumer:
    """A partition, read from an offset on."""

    def __init__(self, payloads: list[bytes], start: int, topic: str = STREAMS.topics.groups_shifted) -> None:
        self._messages = [Message(topic, 0, i, 1_000, p) for i, p in enumerate(payloads)]
        self._next = start

    def poll(self, timeout_s: float) -> list[Message]:
        found, self._next = self._messages[self._next :], len(self._messages)
        return found

    def report(self, offsets: Mapping[tuple[str, int], int]) -> None:
        pass


def varied(number: int) -> Prompt:
    words = {slot: allowed[number * step % len(allowed)] for step, (slot, allowed) in enumerate(VOCABULARY.items(), 1)}
    return Prompt(caption="Red kettle", **words)


def shift(event_id: str = "shift-1", product_id: str = "p-1", **changed: object) -> GroupsShifted:
    ctrs = {0: (30, 2, 8), 1: (2, 30, 8)}
    event = GroupsShifted(
        event_id=event_id,
        product_id=product_id,
        detected_at_ms=50_000,
        encoder_version=1,
        statistic=50.0,
        threshold=40.0,
        n_impressions_since_change=600,
        groups=[
            ShiftedGroup(
                group_id=group_id,
                share=0.5,
                profile=[ProfileEntry(attribute="gender", value="female", share=0.8, lift=1.6)],
                creatives=[
                    CreativeCtr(
                        creative_id=f"{product_id}-c{i}", n_impressions=200, n_clicks=n, ctr=0, ctr_low=0, ctr_high=0
                    )
                    for i, n in enumerate(clicks)
                ],
            )
            for group_id, clicks in ctrs.items()
        ],
    )
    return msgspec.structs.replace(event, **changed)


def picture(path: Path) -> str:
    image = Image.new("RGBA", (80, 100), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((10, 10, 70, 95), fill=(200, 40, 40, 255), outline=(20, 20, 20, 255), width=4)
    image.save(path)
    return path.as_uri()


def write_online_state(
    folder: Path, cutout_uri: str | None, title: str = "Red kettle", borrowed_from: str | None = None
) -> None:
    """Write what the online process would have: three products with creatives, groups and cells."""
    changes = ChangeSet()
    for number, (product_id, uri) in enumerate({"p-1": cutout_uri, "p-2": cutout_uri, "bare": None}.items()):
        product = ProductRecord(number, product_id, f"{title} {number}", "kitchen", uri, 0, b"")
        changes.put(Table.PRODUCTS, product_id.encode(), encode_record(product))
        groups = []
        for group_id in range(2):
            feature = np.full((11, 4), group_id, np.float32).tobytes()
            groups.append(GroupRecord(group_id, 0.5, 50, feature, [], 0))
        record = ProductGroups(product_id, 1, groups, 2, {}, None, True, 0, [], {}, borrowed_from)
        changes.put(Table.GROUPS, product_id.encode(), encode_record(record))
        for i in range(3):
            creative_id = f"{product_id}-c{i}"
            text = varied(i).text
            creative = CreativeRecord(i, creative_id, product_id, None, None, text, "catalogue", None, None, 0, 0, b"")
            changes.put(Table.CREATIVES, creative_key(product_id, creative_id), encode_record(creative))
            for group_id in range(2):
                cell = Cell(product_id, group_id, creative_id, 300, 9, 250.0, 8.0, 0)
                changes.put(Table.CELLS, cell_key(product_id, group_id, creative_id), encode_cell(cell))
    with Store(folder, map_size_mib=16) as store:
        store.commit(changes)


def verdict(creative_id: str, word: Verdict, **changed: object) -> bytes:
    event = CreativeReviewed(
        creative_id=creative_id,
        product_id="p-1",
        verdict=word,
        reviewed_by="ann",
        reviewed_at_ms=60_000,
        reason="as I like it",
    )
    return encode(msgspec.structs.replace(event, **changed))


REVIEWS = STREAMS.topics.creatives_reviewed
REQUESTS = STREAMS.topics.creatives_requested


def request(event_id: str = "request-1", **changed: object) -> bytes:
    event = CreativeRequested(event_id=event_id, product_id="p-1", requested_by="ann", requested_at_ms=70_000)
    return encode(msgspec.structs.replace(event, **changed))


class Bench:
    """An online state, a broker's log and a generator that can be killed and started again."""

    def __init__(self, folder: Path, settings: GeneratorSettings, signer: FileSigner) -> None:
        self.signer = signer
        self.folder = folder
        self.settings = settings
        self.producer = FakeProducer()
        self.pointer = ChampionPointer(settings.models_dir)
        self.load: Loader = partial(load_models, settings.models_dir, settings.mllm)
        self.online = StateReader(folder / "state")

    def start(
        self,
        payloads: list[bytes],
        *,
        topic: str = STREAMS.topics.groups_shifted,
        until_idle_s: float = 1.0,
        commit: Callable[[Store, ChangeSet], None] = Store.commit,
    ) -> list[Creative]:
        """Run a worker over the partition until it is idle, from where the last one has committed."""
        emitted: list[Creative] = []

        class Committing(Store):
            def commit(self, changes: ChangeSet) -> None:
                if changes.of(Table.OFFSETS):
                    commit(self, changes)
                else:
                    super().commit(changes)

        now_s = iter(range(10**6))
        with Committing(self.settings.state_path, map_size_mib=16) as own:
            work(
                self.worker(own),
                FakeConsumer(payloads, self.offset(own, topic).next_offset, topic),
                own,
                self.delivery(own),
                watch_s=self.settings.watch.interval_s,
                clock_s=lambda: float(next(now_s)),
                stop=lambda: False,
                until_idle_s=until_idle_s,
                on_emitted=emitted.append,
            )
        return emitted

    def move_online_state(self, title: str, borrowed_from: str | None = None) -> None:
        """Let the online process go on, to another title or other groups."""
        self.online.close()
        write_online_state(self.folder / "state", (self.folder / "cutout.png").as_uri(), title, borrowed_from)
        self.online = StateReader(self.folder / "state")

    def delivery(self, own: Store) -> Delivery:
        return Delivery(own, Outbox(own, cast(EventProducer, self.producer), 100))

    def worker(self, own: Store) -> GeneratorWorker:
        images = ImageStore.of(self.settings, self.signer)
        champion = ChampionWatch(self.pointer, self.load)
        return GeneratorWorker(
            STREAMS, self.settings, self.online, own, ProceduralRenderer(), images, HashedImageEncoder(), champion
        )

    def handle(self, *payloads: bytes) -> list[Handled]:
        """Handle messages one after the other, each committed, without sending anything."""
        found = []
        with Store(self.settings.state_path, map_size_mib=16) as own:
            for offset, payload in enumerate(payloads):
                handled = self.worker(own).handle(Message(STREAMS.topics.groups_shifted, 0, offset, 1, payload))
                own.commit(handled.changes)
                found.append(handled)
        return found

    @staticmethod
    def offset(own: Store, topic: str) -> OffsetRecord:
        with own.read() as txn:
            value = txn.get(Table.OFFSETS, partition_key(topic, 0))
        return OffsetRecord(0, 0, 0, 0, 0, 0) if value is None else msgspec.msgpack.decode(value, type=OffsetRecord)

    def counts(self, topic: str = STREAMS.topics.groups_shifted) -> OffsetRecord:
        with Store(self.settings.state_path, map_size_mib=16) as own:
            return self.offset(own, topic)

    def reviews(self, status: ReviewStatus) -> list[ReviewRecord]:
        with Store(self.settings.state_path, map_size_mib=16) as own:
            return read_reviews(own, status)

    def record(self, event_id: str = "shift-1") -> HandledOccasion:
        with Store(self.settings.state_path, map_size_mib=16) as own, own.read() as txn:
            value = txn.get(Table.SHIFTS, hashlib.sha256(event_id.encode()).digest())
        assert value is not None
        return msgspec.msgpack.decode(value, type=HandledOccasion)

    def files(self) -> set[str]:
        return {path.stem for path in (self.folder / "creatives").rglob("*.jpg")}

    def reviewed_files(self) -> set[str]:
        return {path.stem for path in (self.folder / "review").rglob("*.jpg")}

    def assert_once(self, n: int) -> None:
        """Every creative was announced, none as two, each with its file, and no file is without one."""
        creatives = self.producer.creatives()
        by_id = {creative.creative_id: creative for creative in creatives}
        assert len(by_id) == n
        assert all(creative == by_id[creative.creative_id] for creative in creatives)
        assert {stem_of(creative.image_uri) for creative in creatives} == self.files()
        for creative in creatives:
            assert hashlib.sha256(read_bytes(creative.image_uri or "")).hexdigest() == creative.image_sha256


def stem_of(image_uri: str | None) -> str:
    path = local_path(image_uri or "")
    assert path is not None
    return path.stem


MakeBench = Callable[..., Bench]
