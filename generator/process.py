"""The generator process: messages are polled, worked off, committed and delivered, until it is told to stop."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from generator.certificate import load_identity
from generator.champion import ChampionPointer
from generator.champion_models import ChampionWatch, load_models
from generator.delivery import Delivery
from generator.likeness import ImageFeatures
from generator.manifest import ManifestSigner
from generator.renderer_choice import choose_renderer
from generator.settings import GeneratorSettings
from generator.storage import ImageStore
from generator.worker import GeneratorWorker
from state.errors import StateMissingError
from state.reading import StateReader, open_view
from state.settings import StateSettings
from state.store import Store
from streams.consumer import BatchConsumer
from streams.events import Creative, GroupsShifted
from streams.merge import Message
from streams.outbox import Outbox
from streams.producer import EventProducer
from streams.settings import StreamSettings

log = logging.getLogger(__name__)

POLL_S = 0.5
STATE_WAIT_S = 0.2
"""How long to wait before looking again for a state that is not there yet, seconds."""


class MessageSource(Protocol):
    """Where messages come from; :class:`streams.consumer.BatchConsumer` is one."""

    def poll(self, timeout_s: float) -> list[Message]:
        """Return the next messages, none when nothing came in time."""
        ...

    def report(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Tell the broker how far we have come."""
        ...


def work(
    worker: GeneratorWorker,
    source: MessageSource,
    own: Store,
    delivery: Delivery,
    *,
    watch_s: float,
    clock_s: Callable[[], float],
    stop: Callable[[], bool],
    until_idle_s: float | None = None,
    on_emitted: Callable[[Creative], None] = lambda _: None,
) -> None:
    """Work off messages until told to stop: handle, commit, write, send; see `run_generator`."""
    queue: deque[Message] = deque()
    latest: dict[str, GroupsShifted] = {}
    last_s = watched_s = clock_s()

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
            # Only now, so that a product that shifts on and on gets its turn with every filling of the queue.
            queue += source.poll(POLL_S)
            latest = worker.latest_shifts(queue)
            if not queue and is_idle():
                break
            if not queue and clock_s() - watched_s >= watch_s:
                own.commit(worker.watch())
                watched_s = clock_s()
            continue
        message = queue.popleft()
        handled = worker.handle(message, latest)
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
    """Consume shifts, requests and verdicts and publish creatives until told to stop.

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
        The broker has no topic of shifts, of requests or of verdicts.
    generator.weights.WeightsMissing
        A package that a check needs is not there.
    generator.certificate.CertificateRefused, generator.manifest.ManifestRefused
        The certificate cannot be used.
    state.errors.StateLockedError
        Another generator uses the same ``generator.state_path``.
    generator.renderer.RendererUnavailable
        The renderer that the settings name cannot be had.
    """
    streams = streams.model_copy(
        update={"consumer_group": generator.consumer_group, "batch_events": generator.queue_messages}
    )
    renderer = choose_renderer(generator)  # before anything is opened: weights may be missing
    identity = load_identity(generator.signing, now_ms=now_ms)
    images = ImageStore.of(generator, None if identity is None else ManifestSigner(identity))
    topics = [
        streams.topics.groups_shifted,
        streams.topics.creatives_requested,
        streams.topics.creatives_reviewed,
    ]
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
            champion = ChampionWatch(
                ChampionPointer(generator.models_dir), partial(load_models, generator.models_dir, generator.mllm)
            )
            worker = GeneratorWorker(streams, generator, online, own, renderer, images, features, champion)
            work(
                worker,
                consumer,
                own,
                delivery,
                watch_s=generator.watch.interval_s,
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
