"""The generator worker: from a shifted group to published creatives, once each whatever happens.

The order is what makes a kill harmless. 1. A message is polled from the offset of the last commit.
2. Prompts are proposed, pictures drawn and checked, in memory. 3. One LMDB transaction takes offset, handled shift,
files and outbound events. 4. The files are written. 5. The events are sent, with ids that a repetition repeats. 6. What
has been written and acknowledged leaves the state with the next commit. Killed before 3, nothing has happened, and the
shift is worked off anew, whatever is known by then; killed after it, nothing is decided or drawn again, and 4 and 5 are
repeated with the same bytes. A person's verdict on a creative that waits is a message like a shift, and goes the same
way.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from generator.certificate import load_identity
from generator.delivery import Delivery, FileOutbox
from generator.inventory import Inventory
from generator.likeness import ImageFeatures
from generator.manifest import ManifestSigner
from generator.refresh import Refresher
from generator.renderer import Renderer
from generator.renderer_choice import choose_renderer
from generator.review import UnusableReview, accepted_creative, judge
from generator.settings import GeneratorSettings
from generator.storage import ImageStore, ImageTampered, ImageUnreadable, read_metadata
from generator.surroundings import UnusableShift, check_numbers, look_around
from state.errors import StateMissingError
from state.reading import StateReader, open_view
from state.records import OffsetRecord, OutboxRecord, encode_record, number_key, partition_key
from state.settings import StateSettings
from state.store import ChangeSet, Store, Table
from streams import codec
from streams.codec import EventDecoder, Undecodable, event_key, event_time_ms
from streams.consumer import BatchConsumer
from streams.events import Creative, CreativeReviewed, DeadLetter, GroupsShifted
from streams.merge import Message
from streams.outbox import Outbox
from streams.producer import EventProducer
from streams.settings import StreamSettings

log = logging.getLogger(__name__)

POLL_S = 0.5
STATE_WAIT_S = 0.2
"""How long to wait before looking again for a state that is not there yet, seconds."""

_HEAD_KEY = b"generator"


class Head(msgspec.Struct, array_like=True):
    """The worker's small numbers."""

    n_outbox: int = 0
    n_published: int = 0
    n_refused: int = 0


@dataclass
class Handled:
    """What one message led to: everything that changes, and what will be published."""

    changes: ChangeSet
    creatives: list[Creative] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)


class MessageSource(Protocol):
    """Where messages come from; :class:`streams.consumer.BatchConsumer` is one."""

    def poll(self, timeout_s: float) -> list[Message]:
        """Return the next messages, none when nothing came in time."""
        ...

    def report(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Tell the broker how far we have come."""
        ...


class GeneratorWorker:
    """Turns messages, shifts and people's verdicts, into change sets.

    It keeps nothing between messages but a cache of features: what it knows lies in its store.

    Parameters
    ----------
    streams, settings
        The settings.
    online
        The online state, opened for reading.
    own
        The generator's own state.
    renderer, images
        Draws pictures, and keeps them.
    features
        Tells duplicates.

    Raises
    ------
    generator.weights.WeightsMissing
        A package that a check needs is not there.
    """

    def __init__(
        self,
        streams: StreamSettings,
        settings: GeneratorSettings,
        online: StateReader,
        own: Store,
        renderer: Renderer,
        images: ImageStore,
        features: ImageFeatures,
    ) -> None:
        self._topics = streams.topics
        self._settings = settings
        self._online = online
        self._own = own
        self._inventory = Inventory(own)
        self._images = images
        self._decoders = {
            streams.topics.groups_shifted: EventDecoder(GroupsShifted),
            streams.topics.creatives_reviewed: EventDecoder(CreativeReviewed),
        }
        self._refresher = Refresher(settings, renderer, images, features)

    def handle(self, message: Message) -> Handled:
        """Work off one message; nothing has changed yet when this returns."""
        handled = Handled(ChangeSet())
        with self._own.read() as txn:
            found = txn.get(Table.META, _HEAD_KEY)
        head = Head() if found is None else msgspec.msgpack.decode(found, type=Head)
        events = self._decoders[message.topic].decode(message.value)
        n_duplicates = 0
        for row, event in enumerate(events):
            try:
                if isinstance(event, Undecodable):
                    raise UnusableShift(event.reason, event.detail)
                if isinstance(event, CreativeReviewed):
                    n_duplicates += not self._review(event, handled, head)
                    continue
                assert isinstance(event, GroupsShifted)
                if self._is_handled(event, handled.changes):
                    n_duplicates += 1
                    continue
                self._refresh(event, handled, head)
            except (UnusableShift, UnusableReview) as error:
                payload = event.payload if isinstance(event, Undecodable) else message.value or b""
                handled.dead_letters.append(_dead_letter(message, row, error, payload))
                log.warning("%s: dead-lettered: %s: %s", _place(message, row), error.reason, error)
        outbound: list[tuple[str, Creative | DeadLetter]] = []
        outbound += [(self._topics.creatives, creative) for creative in handled.creatives]
        outbound += [(self._topics.dead_letters, letter) for letter in handled.dead_letters]
        for topic, item in outbound:
            head.n_outbox += 1
            record = OutboxRecord(topic, event_key(item), event_time_ms(item), codec.encode(item))
            handled.changes.put(Table.OUTBOX, number_key(head.n_outbox), encode_record(record))
        handled.changes.put(Table.META, _HEAD_KEY, encode_record(head))
        self._count(message, len(events), n_duplicates, handled)
        return handled

    def _is_handled(self, event: GroupsShifted, changes: ChangeSet) -> bool:
        key = _shift_key(event.event_id)
        if changes.has(Table.SHIFTS, key):
            return True
        with self._own.read() as txn:
            return txn.get(Table.SHIFTS, key) is not None

    def _count(self, message: Message, n_events: int, n_duplicates: int, handled: Handled) -> None:
        key = partition_key(message.topic, message.partition)
        with self._own.read() as txn:
            found = txn.get(Table.OFFSETS, key)
        old = OffsetRecord(0, 0, 0, 0, 0, 0) if found is None else msgspec.msgpack.decode(found, type=OffsetRecord)
        n_dead = len(handled.dead_letters)
        new = OffsetRecord(
            message.offset + 1,
            old.n_consumed + n_events,
            old.n_used + n_events - n_dead,
            old.n_duplicates + n_duplicates,
            old.n_dead_letters + n_dead,
            max(old.last_event_ms, message.timestamp_ms),
            old.n_expired + message.n_expired_before,
        )
        handled.changes.put(Table.OFFSETS, key, encode_record(new))

    def _refresh(self, event: GroupsShifted, handled: Handled, head: Head) -> None:
        check_numbers(event)
        with self._online.view() as view:
            around = look_around(event, view, self._inventory.made(event.product_id, handled.changes), self._settings)
        refreshed = self._refresher.refresh(event, around, lambda uri: FileOutbox.read(uri, handled.changes))
        FileOutbox.add(refreshed.files, handled.changes)
        for creative in refreshed.creatives:
            self._publish(creative, handled, head)
        for review in refreshed.reviews:
            self._inventory.review(review, handled.changes)
            head.n_refused += review.status == "refused"
        handled.changes.put(Table.SHIFTS, _shift_key(event.event_id), encode_record(refreshed.record))

    def _review(self, event: CreativeReviewed, handled: Handled, head: Head) -> bool:
        """Carry out a verdict; return whether it is the first one on its creative."""
        review = judge(event, self._inventory.find_review(event.product_id, event.creative_id, handled.changes))
        if review is None:
            return False
        if review.status == "accepted":
            assert review.image_uri is not None, "what waits has been drawn"
            try:
                payload = FileOutbox.read(review.image_uri, handled.changes)
            except (ImageUnreadable, ImageTampered) as error:
                raise UnusableReview("unreadable_image", f"it cannot be published: {error}") from error
            file = self._images.prepare(payload, read_metadata(payload))
            FileOutbox.add([file], handled.changes)
            self._publish(accepted_creative(review, file.uri, file.sha256), handled, head)
        self._inventory.review(review, handled.changes)
        log.info("creative %s %s by %s: %s", review.creative_id, review.status, review.reviewed_by, review.reason)
        return True

    def _publish(self, creative: Creative, handled: Handled, head: Head) -> None:
        self._inventory.publish(creative, head.n_published, handled.changes)
        handled.creatives.append(creative)
        head.n_published += 1


def _place(message: Message, row: int) -> str:
    return f"{message.topic}-{message.partition}-{message.offset}-{row}"


def _dead_letter(message: Message, row: int, error: UnusableShift | UnusableReview, payload: bytes) -> DeadLetter:
    return DeadLetter(
        event_id=_place(message, row),
        reason=error.reason,
        detail=str(error),
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        payload=payload,
    )


def _shift_key(event_id: str) -> bytes:
    return hashlib.sha256(event_id.encode()).digest()  # an id of 200 characters can be longer than an LMDB key


def work(
    worker: GeneratorWorker,
    source: MessageSource,
    own: Store,
    delivery: Delivery,
    *,
    clock_s: Callable[[], float],
    stop: Callable[[], bool],
    until_idle_s: float | None = None,
    on_emitted: Callable[[Creative], None] = lambda _: None,
) -> None:
    """Work off messages until told to stop: handle, commit, write, send; see `run_generator`."""
    queue: deque[Message] = deque()
    last_s = clock_s()

    def is_idle() -> bool:
        return until_idle_s is not None and clock_s() - last_s >= until_idle_s

    while not stop():
        delivery.deliver()  # also what an earlier run, a full disk or a broker that was away has left
        if delivery.is_stuck:
            if is_idle():
                break
            time.sleep(POLL_S)
            continue
        if not queue:
            queue += source.poll(POLL_S)
            if not queue and is_idle():
                break
            continue
        message = queue.popleft()
        handled = worker.handle(message)
        delivery.clear(handled.changes)
        own.commit(handled.changes)
        delivery.deliver()
        source.report({(message.topic, message.partition): message.offset + 1})
        for creative in handled.creatives:
            on_emitted(creative)
        last_s = clock_s()
    delivery.settle()


def run_generator(
    streams: StreamSettings,
    generator: GeneratorSettings,
    state: StateSettings,
    features: ImageFeatures,
    *,
    now_ms: int,
    clock_s: Callable[[], float],
    stop: Callable[[], bool],
    until_idle_s: float | None = None,
    on_emitted: Callable[[Creative], None] = lambda _: None,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Consume shifts and verdicts and publish creatives until told to stop.

    Parameters
    ----------
    streams, generator
        The settings.
    state
        Where the online state lies; it is only read, and waited for where it is not there yet.
    features
        Tells duplicates: a frozen image encoder.
    now_ms
        The time, for a development certificate that is made, milliseconds since the Unix epoch.
    clock_s
        A monotonic clock, seconds.
    stop
        Asked between shifts.
    until_idle_s
        Stop by itself when nothing has come for this long; None: go on.
    on_emitted
        Told of every creative once it is committed and was handed to the broker.
    sleep
        Waits some seconds for the online state.

    Raises
    ------
    streams.errors.TopicsMissingError
        The broker has no topic of shifts or of verdicts.
    generator.weights.WeightsMissing
        A package that a check needs is not there.
    generator.certificate.CertificateRefused, generator.manifest.ManifestRefused
        The certificate cannot be used.
    state.errors.StateLockedError
        Another generator uses the same ``generator.state_path``.
    generator.renderer.RendererUnavailable
        The renderer that the settings name cannot be had.
    """
    streams = streams.model_copy(update={"consumer_group": generator.consumer_group})
    renderer = choose_renderer(generator)  # before anything is opened: weights may be missing
    identity = load_identity(generator.signing, now_ms=now_ms)
    images = ImageStore.of(generator, None if identity is None else ManifestSigner(identity))
    topics = [streams.topics.groups_shifted, streams.topics.creatives_reviewed]
    with (
        Store(generator.state_path, map_size_mib=state.map_size_mib, sync=state.sync) as own,
        EventProducer(streams, client_id="osmf-generator") as producer,
    ):
        delivery = Delivery(own, Outbox(own, producer, streams.outbox_events))
        delivery.deliver()
        online = _await_state(state, clock_s, stop, until_idle_s, sleep)
        if online is None:
            return
        with open_view(own) as view:
            offsets = {partition: record.next_offset for partition, record in view.offsets().items()}
        with online, BatchConsumer(streams, topics, offsets, clock_s) as consumer:
            worker = GeneratorWorker(streams, generator, online, own, renderer, images, features)
            work(
                worker,
                consumer,
                own,
                delivery,
                clock_s=clock_s,
                stop=stop,
                until_idle_s=until_idle_s,
                on_emitted=on_emitted,
            )


def _await_state(
    state: StateSettings,
    clock_s: Callable[[], float],
    stop: Callable[[], bool],
    until_idle_s: float | None,
    sleep: Callable[[float], object],
) -> StateReader | None:
    """Open the online state for reading once it is there; None when told to stop, or idle for too long."""
    started_s = clock_s()
    while not stop():
        try:
            return StateReader(state.path, map_size_mib=state.map_size_mib)
        except StateMissingError as error:
            if until_idle_s is not None and clock_s() - started_s >= until_idle_s:
                log.warning("%s", error)
                return None
        sleep(STATE_WAIT_S)
    return None
