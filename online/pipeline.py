"""The pipeline: one micro-batch from messages to one change set.

Decode, register, join, assign to groups, count, predict, learn, detect, regroup; everything that
changes, consumer offsets included, ends in one `ChangeSet`. It does no I/O of its own but reading
the state; the loop in `online.worker` commits. The same messages in the same batches give the same
state, bit by bit.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from online.core import OnlineCore
from online.corrections import Corrections, ReceivedBatch
from online.ctr import shrink
from online.encoders import UnreadableImageError
from online.features import FeatureBank
from online.head import HEAD_KEY, read_head
from online.ranking import ndcg_at
from online.registry import Registry, RegistryFullError, UnknownProductError
from online.settings import OnlineSettings
from online.shift import Shift
from state.reading import StateView
from state.records import (
    ImpressionRecord,
    OffsetRecord,
    OutboxRecord,
    ShiftRecord,
    encode_record,
    number_key,
    partition_key,
)
from state.store import ChangeSet, ReadTransaction, Store, Table
from streams.codec import EventDecoder, Undecodable, encode, event_key, event_time_ms, topic_decoders
from streams.events import (
    Click,
    ClickRetracted,
    Creative,
    CreativeCtr,
    DeadLetter,
    Event,
    GroupsShifted,
    Impression,
    Product,
    ProfileEntry,
    ShiftedGroup,
    UserForgotten,
)
from streams.join import Join, Joined, new_impressions
from streams.merge import Message
from streams.received import Received, Refused, payload_of, undecodable
from streams.settings import StreamSettings


@dataclass(frozen=True)
class BatchSummary:
    """What one micro-batch did, for whoever watches."""

    n_messages: int
    n_impressions: int
    n_labelled: int
    n_dead_letters: int
    shifts: list[Shift]


class Pipeline:
    """Everything that the stream has learnt, and how one more batch changes it.

    Parameters
    ----------
    streams, online
        The settings.
    registry
        Products and creatives, with the encoders.
    bank
        The features that the registry fills.
    """

    def __init__(self, streams: StreamSettings, online: OnlineSettings, registry: Registry, bank: FeatureBank) -> None:
        self._streams = streams
        self._online = online
        self._registry = registry
        self._decoders: dict[str, EventDecoder] = topic_decoders(streams.topics, streams.fields)
        self._core = OnlineCore(online, registry, bank)
        self._corrections = Corrections(streams, online.ledger, self._core)
        self._head = read_head(None)
        self._join = Join(streams.join)
        self._offsets: dict[tuple[str, int], OffsetRecord] = {}

    def restore(self, store: Store) -> None:
        """Continue from the state."""
        with store.read() as txn:
            self._head = read_head(txn.get(Table.META, HEAD_KEY))
            self._join = Join(self._streams.join, self._head.watermark_ms)
            self._registry.restore(txn)
            self._core.restore(txn)
            self._corrections.ledger.restore(txn)
            self._offsets = StateView({0: txn}).offsets()

    def next_offsets(self) -> dict[tuple[str, int], int]:
        """Return where each partition continues."""
        return {partition: record.next_offset for partition, record in self._offsets.items()}

    def run(self, messages: list[Message], txn: ReadTransaction) -> tuple[ChangeSet, BatchSummary]:
        """Work off one micro-batch; return everything that it changes.

        Parameters
        ----------
        messages
            The batch, in merged order.
        txn
            The state as of the last commit. The changes of every batch before must be in it.
        """
        changes = ChangeSet()
        joined = Joined()
        batch = self._receive(messages, changes, joined)
        offsets, before_ms = self.next_offsets(), self._join.watermark_ms
        looked_up = self._corrections.look_up(
            batch, messages, offsets, txn, changes, joined, before_ms, self._head.n_batches
        )
        fresh = new_impressions(txn, batch.impressions, joined, looked_up.forgotten_ids)
        self._bring_in((item.event.product_id for item in fresh if isinstance(item.event, Impression)), txn)
        records = self._group(fresh)
        # A correction may come at any time after what it corrects: it moves no watermark.
        seen = (item.event for item in (*fresh, *batch.clicks) if isinstance(item.event, Impression | Click))
        self._head.newest_event_ms = max(self._head.newest_event_ms, max(map(event_time_ms, seen), default=0))
        self._join.run(
            txn,
            changes,
            records,
            batch.clicks,
            self._head.newest_event_ms,
            joined,
            archived=looked_up.archived,
            forgotten=looked_up.forgotten_ids,
        )
        touched = (*joined.clicked, *joined.labelled, *joined.corrected, *joined.retracted)
        self._bring_in((each.product_id for each in touched), txn)
        now_ms = self._join.watermark_ms
        self._core.count(records.values(), joined.clicked, now_ms)
        label_window_ms = self._streams.join.label_window_s * 1000
        self._core.take_back(joined.retracted, looked_up.forgotten, now_ms, label_window_ms)
        self._corrections.enter(fresh, records, offsets, changes, joined, now_ms)
        shifts = self._core.learn(
            joined.labelled,
            joined.corrected,
            now_ms,
            uncorrected=joined.uncorrected,
            forgotten=looked_up.forgotten,
            before_ms=before_ms,
        )
        if self._head.newest_event_ms:
            self._core.regroup(now_ms, self._head.n_batches)
        outbox: list[tuple[str, DeadLetter | GroupsShifted]] = []
        outbox += [self._dead_letter(refused) for refused in joined.refused]
        outbox += [self._shifted(shift, now_ms, changes) for shift in shifts]
        self._write(messages, changes, joined, outbox)
        return changes, BatchSummary(len(messages), len(records), len(joined.labelled), len(joined.refused), shifts)

    def _receive(self, messages: list[Message], changes: ChangeSet, joined: Joined) -> ReceivedBatch:
        batch = ReceivedBatch()
        for order, message in enumerate(messages):
            events = self._decoders[message.topic].decode(message.value)
            joined.tally(message.topic, message.partition).n_consumed += len(events)
            for row, event in enumerate(events):
                if isinstance(event, Undecodable):
                    joined.refuse(undecodable(message, row, event))
                elif isinstance(event, Impression | Click | ClickRetracted | UserForgotten):
                    received = Received(event, message, row, order)
                    if (refused := self._refusal(received)) is not None:
                        joined.refuse(refused)
                    else:
                        batch.add(received)
                else:
                    self._register(event, message, row, changes, joined)
        return batch

    def _ahead(self, received: Received) -> Refused | None:
        """Refuse an event that is dated far ahead of its message: believed, it would close every window before it."""
        stamped_ms, dated_ms = received.message.timestamp_ms, event_time_ms(received.event)
        ahead_s = (dated_ms - stamped_ms) / 1000
        if not stamped_ms or ahead_s <= self._streams.max_ahead_s:
            return None
        return received.refuse(
            "time_ahead",
            f"it is dated {dated_ms}, {ahead_s:.0f} s ahead of its message ({stamped_ms}); allowed is up to "
            f"streams.max_ahead_s = {self._streams.max_ahead_s} s",
        )

    def _refusal(self, received: Received) -> Refused | None:
        event = received.event
        if isinstance(event, ClickRetracted | UserForgotten):
            return self._corrections.refusal(received)
        if (ahead := self._ahead(received)) is not None or isinstance(event, Click):
            return ahead
        if event.product_id not in self._registry.products:
            return received.refuse("unknown_product", f"no product {event.product_id!r} has been registered")
        if (event.product_id, event.creative_id) not in self._registry.creatives:
            return received.refuse(
                "unknown_creative", f"product {event.product_id!r} has no registered creative {event.creative_id!r}"
            )
        return None

    def _register(self, event: Event, message: Message, row: int, changes: ChangeSet, joined: Joined) -> None:
        tally = joined.tally(message.topic, message.partition)
        at = (message.topic, message.partition, message.offset, row)
        payload = payload_of(event, message)
        try:
            if isinstance(event, Product):
                new = self._registry.put_product(event, changes)
            else:
                assert isinstance(event, Creative)
                # Before the first impression no event time has begun; the broker's time of the message stands in.
                now_ms = max(self._head.newest_event_ms, message.timestamp_ms)
                new = self._registry.put_creative(event, now_ms, changes)
        except UnknownProductError as error:
            joined.refuse(Refused(*at, "unknown_product", str(error), payload))
            return
        except UnreadableImageError as error:
            joined.refuse(Refused(*at, "unreadable_image", str(error), payload))
            return
        except RegistryFullError as error:
            joined.refuse(Refused(*at, "over_limit", str(error), payload))
            return
        tally.n_used += 1
        tally.n_duplicates += not new

    def _bring_in(self, product_ids: Iterable[str], txn: ReadTransaction) -> None:
        """Make the products that this batch works on resident."""
        self._core.bring_in(product_ids, txn, self._join.watermark_ms, self._head.n_batches)

    def _group(self, fresh: list[Received]) -> dict[str, ImpressionRecord]:
        """Assign every new impression to its user's group."""
        events = [item.event for item in fresh if isinstance(item.event, Impression)]
        if not events:
            return {}
        attributes = self._core.schema.encode_many([event.attributes for event in events])
        user_keys = np.fromiter((zlib.crc32(event.user_id.encode()) for event in events), np.uint32, len(events))
        product_numbers = np.fromiter(
            (self._registry.products[event.product_id].number for event in events), np.int64, len(events)
        )
        group_ids = self._core.grouping.observe_many(
            [event.product_id for event in events],
            product_numbers,
            attributes,
            user_keys,
            self._head.newest_event_ms,
            self._head.n_batches,
        )
        n_buckets = self._online.counts.user_buckets
        return {
            event.impression_id: ImpressionRecord(
                event.product_id,
                event.creative_id,
                attributes[row].tobytes(),
                int(group_ids[row]),
                event.shown_at_ms,
                int(user_keys[row]) % n_buckets,
                event.experiment,
                event.arm,
                False,
                False,
            )
            for row, event in enumerate(events)
        }

    def _dead_letter(self, refused: Refused) -> tuple[str, DeadLetter]:
        event_id = f"{refused.topic}-{refused.partition}-{refused.offset}-{refused.row}"
        self._head.refused[refused.reason] = self._head.refused.get(refused.reason, 0) + 1
        payload, detail, n_most = refused.payload, refused.detail, self._streams.dead_letter_kib << 10
        if len(payload) > n_most:
            detail += f"; of its {len(payload):,} bytes the first {n_most:,} are here (streams.dead_letter_kib)"
        return self._streams.topics.dead_letters, DeadLetter(
            event_id=event_id,
            reason=refused.reason,
            detail=detail,
            topic=refused.topic,
            partition=refused.partition,
            offset=refused.offset,
            payload=payload[:n_most],
        )

    def _shifted(self, shift: Shift, now_ms: int, changes: ChangeSet) -> tuple[str, GroupsShifted]:
        product = self._registry.products[shift.product_id]
        groups = self._core.grouping.groups_of(shift.product_id)
        assert groups is not None
        before = [
            (group_id, creative_id, cell.n_impressions, cell.n_clicks)
            for (group_id, creative_id), cell in sorted(self._core.counts.cells_of(shift.product_id).items())
        ]
        shown, clicked, _ = self._core.table(shift.product_id, live=True)
        self._core.counts.restart_live(shift.product_id, shift.cells, now_ms, shift.evidence_from_ms)
        impressions, clicks, creative_ids = self._core.table(shift.product_id, live=True)
        shrunk = shrink(impressions, clicks)
        # What was counted before includes what is since; the rest of a decayed count can be below zero by a little.
        shown = np.maximum(shown - impressions, 0)
        ctr_before = shrink(shown, np.clip(clicked - clicks, 0, shown)).ctr
        displacements = self._core.grouping.displacements(shift.product_id)
        digest = hashlib.sha256(f"{shift.product_id}|{self._head.n_batches}|{self._online.seed}".encode()).hexdigest()
        event = GroupsShifted(
            event_id=f"shift-{digest[:24]}",
            product_id=shift.product_id,
            category=product.category,
            scope=shift.scope,
            detected_at_ms=now_ms,
            encoder_version=groups.encoder_version,
            statistic=shift.statistic,
            threshold=self._online.shift.threshold(shift.scope),
            n_impressions_since_change=shift.n_impressions,
            groups=[
                ShiftedGroup(
                    group_id=group.group_id,
                    share=group.share,
                    profile=[
                        ProfileEntry(attribute=t.attribute, value=t.value, share=t.share, lift=t.lift)
                        for t in group.profile
                    ],
                    creatives=[
                        CreativeCtr(
                            creative_id=creative_id,
                            n_impressions=int(impressions[row, column]),
                            n_clicks=int(clicks[row, column]),
                            ctr=float(shrunk.ctr[row, column]),
                            ctr_low=float(shrunk.ctr_low[row, column]),
                            ctr_high=float(shrunk.ctr_high[row, column]),
                            ctr_before=float(ctr_before[row, column]),
                        )
                        for column, creative_id in enumerate(creative_ids)
                    ],
                    ranking_agreement=ndcg_at(shrunk.ctr[row], ctr_before[row]),
                    centroid_displacement=displacements[row],
                )
                for row, group in enumerate(groups.groups)
            ],
        )
        record = ShiftRecord(
            event.event_id,
            event.product_id,
            event.category,
            now_ms,
            shift.statistic,
            event.threshold,
            shift.n_impressions,
            before,
        )
        changes.put(Table.SHIFTS, event.event_id.encode(), encode_record(record))
        return self._streams.topics.groups_shifted, event

    def _write(
        self,
        messages: list[Message],
        changes: ChangeSet,
        joined: Joined,
        outbox: list[tuple[str, DeadLetter | GroupsShifted]],
    ) -> None:
        self._core.write(changes)
        self._corrections.ledger.write(changes)
        for topic, event in outbox:
            self._head.n_outbox += 1
            record = OutboxRecord(topic, event_key(event), event_time_ms(event), encode(event))
            changes.put(Table.OUTBOX, number_key(self._head.n_outbox), encode_record(record))
        self._head.n_batches += 1
        self._head.watermark_ms = self._join.watermark_ms
        self._head.n_closed_early += joined.n_closed_early
        self._head.n_left_out_of_arms += self._core.counts.take_left_out()
        changes.put(Table.META, HEAD_KEY, encode_record(self._head))
        consumed: dict[tuple[str, int], list[Message]] = defaultdict(list)
        for message in messages:
            consumed[message.topic, message.partition].append(message)
        for partition in sorted(consumed.keys() | joined.tallies.keys()):
            taken, tally = consumed.get(partition, []), joined.tally(*partition)
            old = self._offsets.get(partition, OffsetRecord(0, 0, 0, 0, 0, 0))
            offset = OffsetRecord(
                taken[-1].offset + 1 if taken else old.next_offset,
                old.n_consumed + tally.n_consumed,
                old.n_used + tally.n_used,
                old.n_duplicates + tally.n_duplicates,
                old.n_dead_letters + tally.n_dead_letters,
                max([old.last_event_ms, *(message.timestamp_ms for message in taken)]),
                old.n_expired + sum(message.n_expired_before for message in taken),
            )
            self._offsets[partition] = offset
            changes.put(Table.OFFSETS, partition_key(*partition), encode_record(offset))
