"""The online worker: the loop around one shard, or around those that this process is given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path

from online.encoders import ImageEncoder, TextEncoder, feature_dims, load_encoders
from online.features import FeatureBank
from online.pipeline import BatchSummary, Pipeline
from online.registry import OpenImage, Registry, read_image
from online.settings import OnlineSettings
from online.shard import LoneShard, Shard, Step
from online.shared_shards import SharedShards
from state.settings import StateSettings
from state.shards import shard_folder
from state.store import Store
from streams.membership import Membership
from streams.producer import EventProducer
from streams.settings import StreamSettings


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


def build_pipeline(
    streams: StreamSettings,
    online: OnlineSettings,
    open_image: OpenImage = read_image,
    encoders: LazyEncoders | None = None,
) -> Pipeline:
    """Build a pipeline with the encoders of the settings, or with ones that are loaded already."""
    encoders = encoders or LazyEncoders(online)
    bank = FeatureBank(*feature_dims(online))
    registry = Registry(
        encoders.text,
        encoders.image,
        open_image,
        bank,
        most_products=online.limits.products,
        most_creatives=online.limits.creatives,
    )
    return Pipeline(streams, online, registry, bank)


def run_online(
    streams: StreamSettings,
    online: OnlineSettings,
    state: StateSettings,
    *,
    clock_s: Callable[[], float],
    stop: Callable[[], bool],
    on_batch: Callable[[BatchSummary], None] = lambda _: None,
    on_step: Callable[[Step], None] = lambda _: None,
    until_idle_s: float | None = None,
) -> None:
    """Consume, learn and commit until told to stop.

    Parameters
    ----------
    streams, online, state
        The settings; with ``streams.shared`` the work is shared with other processes.
    clock_s
        A monotonic clock, seconds.
    stop
        Asked between batches.
    on_batch
        Told of every committed batch.
    on_step
        Told of every point that a shard passes.
    until_idle_s
        Stop by itself when nothing has come for this long; None: go on.

    Raises
    ------
    state.errors.StateError
        The state cannot be used, or could not be written.
    streams.errors.ConsumerError
        The topics cannot be consumed from where the state stands.
    """
    import torch

    torch.set_num_threads(online.torch_threads)
    encoders = LazyEncoders(online)
    with ExitStack() as ends:

        @cache
        def producer() -> EventProducer:
            return ends.enter_context(EventProducer(streams, client_id="osmf-online"))

        def open_shard(path: Path, partition: int | None) -> Shard:
            store = Store(path, shared=streams.shared, map_size_mib=state.map_size_mib, sync=state.sync)
            pipeline = build_pipeline(streams, online, encoders=encoders)
            return Shard(store, pipeline, streams, producer, clock_s, partition=partition, on_step=on_step)

        work: LoneShard | SharedShards
        if streams.shared:
            membership = Membership(streams, streams.topics.impressions, clock_s)
            work = SharedShards(membership, lambda n: open_shard(shard_folder(state.path, n), n))
        else:
            work = LoneShard(open_shard(state.path, None))
        with closing(work):
            last_s = clock_s()
            while not stop():
                summaries = work.step()
                for summary in summaries or ():
                    on_batch(summary)
                if summaries or summaries is None:  # who has no shard yet is not idle
                    last_s = clock_s()
                elif until_idle_s is not None and clock_s() - last_s >= until_idle_s:
                    break
            work.finish()
