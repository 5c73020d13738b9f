"""Who watches a run: told of its steps, of their progress, and of what came of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from offline.runs import RunRecord, Step

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Watches a run of the chain; it must not fail, and must not hold the run up."""

    def on_run(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Hear that a run begins, or goes on, with these settings."""
        ...

    def on_step(self, step: Step) -> None:
        """Hear that a step begins."""
        ...

    def on_progress(self, step: Step, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Hear how much of a step is done, and what was measured by then."""
        ...

    def on_record(self, record: RunRecord) -> None:
        """Hear what came of a step."""
        ...

    def on_end(self) -> None:
        """Hear that no more steps come."""
        ...


class LogWatcher:
    """Writes what comes of steps into the log; the trainers write their own progress."""

    def on_run(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Log the run's name."""
        log.info("run %s", run_id)

    def on_step(self, step: Step) -> None:
        """Log the step."""
        log.info("%s begins", step)

    def on_progress(self, step: Step, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Leave it to the trainers."""

    def on_record(self, record: RunRecord) -> None:
        """Log what came of it."""
        level = logging.WARNING if record.outcome in ("failed", "refused") else logging.INFO
        said = " ".join(part for part in (record.outcome, record.artifact, record.reason) if part)
        log.log(level, "%s: %s", record.step, said)

    def on_end(self) -> None:
        """Nothing is left to say."""


class Watchers:
    """Several watchers, told one after the other."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def on_run(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_run(run_id, parameters)

    def on_step(self, step: Step) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_step(step)

    def on_progress(self, step: Step, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_progress(step, done, total, figures)

    def on_record(self, record: RunRecord) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_record(record)

    def on_end(self) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_end()
