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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from generator.champion_models import ChampionWatch
from generator.delivery import FileOutbox
from generator.inventory import Inventory
from generator.likeness import ImageFeatures
from generator.occasion import occasion_of_request, occasion_of_shift
from generator.refresh import Refresher
from generator.refreshed import HandledOccasion
from generator.renderer import Renderer
from generator.review import UnusableReview, accepted_creative, judge
from generator.settings import GeneratorSettings
from generator.storage import ImageStore, ImageTampered, ImageUnreadable, read_metadata
from generator.surroundings import UnusableShift, check_numbers, look_around
from generator.watch import find_requests
from state.reading import StateReader
from state.records import OffsetRecord, OutboxRecord, encode_record, number_key, partition_key
from state.store import ChangeSet, Store, Table
from streams import codec
from streams.codec import EventDecoder, Undecodable, event_key, event_time_ms
from streams.events import Creative, CreativeRequested, CreativeReviewed, DeadLetter, GroupsShifted
from streams.merge import Message
from streams.settings import StreamSettings

log = logging.getLogger(__name__)

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


class GeneratorWorker:
    """Turns messages (shifts, requests, people's verdicts) into change sets.

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
    champion
        Says which models are in use; it is asked before every shift.

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
        champion: ChampionWatch,
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
            streams.topics.creatives_requested: EventDecoder(CreativeRequested),
        }
        self._champion = champion
        self._refresher = Refresher(settings, renderer, images, features)

    def latest_shifts(self, messages: Iterable[Message]) -> dict[str, GroupsShifted]:
        """Return each product's latest usable shift among some messages."""
        latest: dict[str, GroupsShifted] = {}
        for message in messages:
            if message.topic != self._topics.groups_shifted:
                continue
            for event in self._decoders[message.topic].decode(message.value):
                if isinstance(event, GroupsShifted) and _is_usable(event):
                    before = latest.setdefault(event.product_id, event)
                    latest[event.product_id] = max(before, event, key=_age)
        return latest

    def handle(self, message: Message, latest: Mapping[str, GroupsShifted] | None = None) -> Handled:
        """Work off one message; nothing has changed yet when this returns.

        Parameters
        ----------
        message
            A shift, a request or a verdict.
        latest
            The latest shifts of products among the messages that wait, or were read with this one: an older one is not
            worked off beside it.
        """
        handled = Handled(ChangeSet())
        head = self._head()
        events = self._decoders[message.topic].decode(message.value)
        n_duplicates = 0
        for row, event in enumerate(events):
            try:
                if isinstance(event, Undecodable):
                    raise UnusableShift(event.reason, event.detail)
                if isinstance(event, CreativeReviewed):
                    n_duplicates += not self._review(event, handled, head)
                    continue
                assert isinstance(event, (GroupsShifted, CreativeRequested))
                if self._is_handled(event.event_id, handled.changes):
                    n_duplicates += 1
                    continue
                if isinstance(event, CreativeRequested):
                    self._refresh(event, handled, head)
                    continue
                check_numbers(event)
                if (later := (latest or {}).get(event.product_id, event)) is not event and _age(later) > _age(event):
                    self._supersede(event, later, handled)
                else:
                    self._refresh(event, handled, head)
            except (UnusableShift, UnusableReview) as error:
                payload = event.payload if isinstance(event, Undecodable) else message.value or b""
                handled.dead_letters.append(_dead_letter(message, row, error, payload))
                log.warning("%s: dead-lettered: %s: %s", _place(message, row), error.reason, error)
        for creative in handled.creatives:
            self._put_out(self._topics.creatives, creative, head, handled.changes)
        for letter in handled.dead_letters:
            self._put_out(self._topics.dead_letters, letter, head, handled.changes)
        handled.changes.put(Table.META, _HEAD_KEY, encode_record(head))
        self._count(message, len(events), n_duplicates, handled)
        return handled

    def watch(self) -> ChangeSet:
        """Return what is to be committed so that all is asked for that the online state asks for by itself."""
        changes = ChangeSet()
        with self._online.view() as view:
            found = find_requests(view, self._settings.watch, lambda event_id: self._is_handled(event_id, changes))
        if found:
            head = self._head()
            for request in found:
                log.info(
                    "%s: %s of product %s: %s", request.event_id, request.cause, request.product_id, request.reason
                )
                self._put_out(self._topics.creatives_requested, request, head, changes)
            changes.put(Table.META, _HEAD_KEY, encode_record(head))
        return changes

    def _head(self) -> Head:
        with self._own.read() as txn:
            found = txn.get(Table.META, _HEAD_KEY)
        return Head() if found is None else msgspec.msgpack.decode(found, type=Head)

    @staticmethod
    def _put_out(topic: str, event: Creative | DeadLetter | CreativeRequested, head: Head, changes: ChangeSet) -> None:
        head.n_outbox += 1
        record = OutboxRecord(topic, event_key(event), event_time_ms(event), codec.encode(event))
        changes.put(Table.OUTBOX, number_key(head.n_outbox), encode_record(record))

    def _is_handled(self, event_id: str, changes: ChangeSet) -> bool:
        key = _shift_key(event_id)
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

    def _supersede(self, event: GroupsShifted, later: GroupsShifted, handled: Handled) -> None:
        record = HandledOccasion(
            event.event_id, event.product_id, event.detected_at_ms, [], superseded_by=later.event_id
        )
        handled.changes.put(Table.SHIFTS, _shift_key(event.event_id), encode_record(record))
        log.info("shift %s: %s of the same product is later and waits too", event.event_id, later.event_id)

    def _refresh(self, event: GroupsShifted | CreativeRequested, handled: Handled, head: Head) -> None:
        models = self._champion.current()
        with self._online.view() as view:
            if isinstance(event, GroupsShifted):
                groups = view.groups(event.product_id)
                occasion = occasion_of_shift(event, None if groups is None else groups.borrowed_from)
            else:
                occasion = occasion_of_request(event, view)
            made = self._inventory.made(event.product_id, handled.changes)
            around = look_around(occasion, view, made, self._settings)
        n_drawn = self._inventory.n_drawn(occasion.product_id, occasion.at_ms, handled.changes)
        refreshed = self._refresher.refresh(
            occasion,
            around,
            lambda uri: FileOutbox.read(uri, handled.changes),
            models,
            spent=n_drawn * self._settings.refresh.cost_per_image,
        )
        if refreshed.n_drawn:
            self._inventory.draw(occasion.product_id, occasion.at_ms, refreshed.n_drawn, handled.changes)
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


def _is_usable(event: GroupsShifted) -> bool:
    try:
        check_numbers(event)
    except UnusableShift:
        return False
    return True


def _age(event: GroupsShifted) -> tuple[int, str]:
    return event.detected_at_ms, event.event_id


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
