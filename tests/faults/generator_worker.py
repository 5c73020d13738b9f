"""The generator worker as a child that can be killed, with an online state of the test's own that goes on meanwhile."""

from __future__ import annotations

import multiprocessing as mp
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from generator.settings import CheckSettings, GeneratorSettings, RefreshSettings, SigningSettings
from state.errors import StateMissingError
from state.reading import open_view
from state.settings import StateSettings
from state.store import Store, Table
from streams.settings import StreamSettings
from tests.faults.child import live_as_child

_FORKS = mp.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["online.worker", "generator.process", "tests.faults.generator_worker", "tests.faults.worker"]
)


def generator_settings(folder: Path, queue_messages: int) -> GeneratorSettings:
    """Return settings of small pictures, all below ``folder``; the checks' networks have tests of their own."""
    return GeneratorSettings(
        size_px=96,
        refresh=RefreshSettings(budget_per_product_day=1e6),
        queue_messages=queue_messages,
        storage_url=str(folder / "creatives"),
        review_url=str(folder / "review"),
        state_path=folder / "own",
        signing=SigningSettings(folder=folder / "signing"),
        checks=CheckSettings(unsafe=False, portraits=False),
        models_dir=folder / "models",
    )


@dataclass
class Generator:
    """``osmf generator`` without its command line.

    Parameters
    ----------
    streams, settings
        The settings.
    online
        Folder of the online state.
    """

    streams: StreamSettings
    settings: GeneratorSettings
    online: Path

    @property
    def log(self) -> Path:
        return self.settings.state_path.parent / "generator.log"

    def start(self) -> BaseProcess:
        process = _FORKS.Process(target=_work, args=(self.streams, self.settings, self.online, self.log), daemon=True)
        process.start()
        return process

    def n_consumed(self) -> int:
        """Return how many messages the generator's state includes; 0 before it is there."""
        try:
            with Store(self.settings.state_path, readonly=True) as store, open_view(store) as view:
                return sum(offset.next_offset for offset in view.offsets().values())
        except StateMissingError:
            return 0

    def is_delivered(self) -> bool:
        """Return whether every picture is written and every event sent that the state has decided on."""
        with Store(self.settings.state_path, readonly=True) as store, store.read() as txn:
            return not txn.count(Table.FILES) and not txn.count(Table.OUTBOX)


def _work(streams: StreamSettings, settings: GeneratorSettings, online: Path, log: Path) -> None:
    from generator.process import run_generator
    from online.encoders import HashedImageEncoder

    stop = live_as_child(log)
    run_generator(
        streams,
        settings,
        StateSettings(path=online, map_size_mib=16),
        HashedImageEncoder(),
        now_ms=time.time_ns() // 1_000_000,
        clock_s=time.monotonic,
        stop=stop,
    )
