"""The offline chain on one screen: a bar for every step, with what is measured meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from offline.runs import RunRecord, Step
from offline.watcher import LogWatcher

_FIGURES = {
    "loss": "loss",
    "lessons_loss": "loss",
    "calibration_loss": "loss",
    "pairs_loss": "loss",
    "rewards/accuracies": "winners preferred",
}
"""What is shown beside a bar, of all that is measured."""


class ChainScreen(LogWatcher):
    """Shows the steps of a run on standard error while they go on.

    Where that is no terminal, each step is a line when it is done.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[Step, TaskID] = {}

    def __enter__(self) -> ChainScreen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_run(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Show the run's name."""
        self._console.print(f"run {run_id}", highlight=False)

    def on_step(self, step: Step) -> None:
        """Begin the step's bar."""
        self._tasks[step] = self._progress.add_task(step, total=None, figures="")

    def on_progress(self, step: Step, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Move the step's bar."""
        shown = ", ".join(f"{said} {figures[name]:.3f}" for name, said in _FIGURES.items() if name in figures)
        self._progress.update(self._tasks[step], completed=done, total=total, figures=shown)

    def on_record(self, record: RunRecord) -> None:
        """Fill the step's bar, and say what came of it."""
        task = self._tasks.get(record.step)
        if task is not None:
            total = self._progress.tasks[task].total or 1
            self._progress.update(task, completed=total, total=total)
        said = " ".join(part for part in (record.outcome, record.artifact, record.reason) if part)
        self._console.print(f"{record.step}: {said}", highlight=False, soft_wrap=True)
