"""Progress of Group-DPO, to be watched: lines in the log, and a file of JSON lines."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)


class _Line(msgspec.Struct):
    """The one field that every line has."""

    step: int


class DpoProgress(TrainerCallback):
    """Writes what is measured, now and then: a line to the log, and a JSON object to a file, which `tail -f` shows.

    A run that goes on from a checkpoint first takes back the lines that came after it.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training starts from."""
        if not state.is_world_process_zero:
            return
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        # What was killed while it wrote has left a line without its end.
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = [line for line in whole if msgspec.json.decode(line, type=_Line).step <= state.global_step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(b"".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what was measured."""
        if not logs or not state.is_world_process_zero:
            return
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode({"step": state.global_step, "n_steps": state.max_steps, **logs}) + b"\n")
        if "loss" in logs:
            log.info(
                "step %d of %d: loss %.4f, winners preferred %.1f%%, margin %.3f, learning rate %.2e",
                state.global_step,
                state.max_steps,
                float(logs["loss"]),
                100 * float(logs["rewards/accuracies"]),
                float(logs["rewards/margins"]),
                float(logs["learning_rate"]),
            )
