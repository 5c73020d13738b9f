"""The online worker: poll, run, commit, send; the loop around the pipeline.

The order is what makes a kill harmless. 1. A batch is polled from the offsets of the last commit.
2. The pipeline works it off in memory. 3. One LMDB transaction takes everything, offsets and
outbound messages included. 4. Outbound messages are sent, with ids that a repetition repeats.
5. Those that the broker has acknowledged leave the outbox with the next commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from online.encoders import ImageEncoder, TextEncoder, feature_dims, load_encoders
from online.features import FeatureBank
from online.pipeline import BatchSummary, Pipeline
from online.registry import OpenImage, Registry, read_image
from online.settings import OnlineSettings
from state.settings import StateSettings
from state.store import ChangeSet, Store
from streams.consumer import BatchConsumer
from streams.outbox import Outbox
from streams.producer import EventProducer
from streams.settings import StreamSettings

log = logging.getLogger(__name__)

POLL_S = 0.5


class LazyEncoders:
    """The frozen encoders, loaded when the first title or image comes."""

    def __init__(self, settings: OnlineSettings) -> None:
        self._settings = settings
        self._loaded: tuple[TextEncoder, ImageEncoder] | None = None

    def text(self) -> TextEncoder:
        """Return the encoder of titles."""
        return self._load()[0]

    def image(self) -> ImageEncoder:
        """Return the encoder of images."""
        return self._load()[1]

    def _load(self) -> tuple[TextEncoder, ImageEncoder]:
        if self._loaded is None:
            self._loaded = load_encoders(self._settings)
        return self._loaded


def build_pipeline(streams: StreamSettings, online: OnlineSettings, open_image: OpenImage = read_image) -> Pipeline:
    """Build a pipeline with the encoders of the settings."""
    encoders = LazyEncoders(online)
    bank = FeatureBank(*feature_dims(online))
    return Pipeline(streams, online, Registry(encoders.text, encoders.image, open_image, bank), bank)


def run_online(
    streams: StreamSettings,
    online: OnlineSettings,
    state: StateSettings,
    *,
    clock_s: Callable[[], float],
    stop: Callable[[], bool],
    on_batch: Callable[[BatchSummary], None] = lambda _: None,
    until_idle_s: float | None = None,
) -> None:
    """Consume, learn and commit until told to stop.

    Parameters
    ----------
    streams, online, state
        The settings.
    clock_s
        A monotonic clock, seconds.
    stop
        Asked between batches.
    on_batch
        Told of every committed batch.
    until_idle_s
        Stop by itself when nothing has come for this long; None: go on.
    """
    import torch

    torch.set_num_threads(online.torch_threads)
    with Store(state.path, map_size_mib=state.map_size_mib, sync=state.sync) as store:
        pipeline = build_pipeline(streams, online)
        pipeline.restore(store)
        with (
            EventProducer(streams, client_id="osmf-online") as producer,
            BatchConsumer(streams, streams.topics.inputs, pipeline.next_offsets(), clock_s) as consumer,
        ):
            outbox = Outbox(store, producer)
            outbox.send()
            last_s = clock_s()
            while not stop():
                messages = consumer.poll(POLL_S)
                if not messages:
                    if until_idle_s is not None and clock_s() - last_s >= until_idle_s:
                        break
                    continue
                last_s = clock_s()
                with store.read() as txn:
                    changes, summary = pipeline.run(messages, txn)
                outbox.clear(changes)
                store.commit(changes)
                outbox.send()
                consumer.report(pipeline.next_offsets())
                on_batch(summary)
            leftover = ChangeSet()
            outbox.clear(leftover)
            if len(leftover):
                store.commit(leftover)
