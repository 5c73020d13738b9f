"""The run log: one JSON line for the outcome of every step of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

import msgspec

Outcome = Literal["built", "skipped", "passed", "refused", "promoted", "rolled-back", "failed"]
Step = Literal["rebuild", "pretrain", "grm", "tuples", "group-dpo", "gate", "promote", "rollback"]

STEPS: Final[tuple[Step, ...]] = ("rebuild", "pretrain", "grm", "tuples", "group-dpo", "gate", "promote")
"""The chain, in its order."""

RUN_LOG: Final = "runs.jsonl"


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one step of a run, and why where nothing was built.

    ``artifact`` is the name of what was built, such as ``gaip/v000001``. ``figures`` are numbers by name, units in
    the name. Lines of logs from before there were other steps name none, and are of ``rebuild``.
    """

    run_id: str
    step: Step = "rebuild"
    started_at_ms: int
    finished_at_ms: int
    outcome: Outcome
    reason: str | None = None
    artifact: str | None = None
    snapshot_id: str | None = None
    figures: dict[str, float] = {}


class CorruptRunLogError(RuntimeError):
    """A line of the run log, other than an unfinished last one, is not a run."""

    def __init__(self, path: Path, line: int, trouble: str) -> None:
        super().__init__(
            f"line {line} of {path} is not a run ({trouble}); allowed is one JSON object a line, as a run writes it. "
            "No run was read: remove that line."
        )


class RunLog:
    """The log at ``path``, appended to by each step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: RunRecord) -> None:
        """Add a record, in one write, and wait until it is on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = msgspec.json.encode(record) + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a writer was killed within its line
                line = b"\n" + line
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> list[RunRecord]:
        """Return all records, oldest first; a line that a killed writer left unfinished is passed over.

        Raises
        ------
        CorruptRunLogError
            If a whole line is not a run.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        decoder = msgspec.json.Decoder(RunRecord)
        runs = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                runs.append(decoder.decode(line))
            except msgspec.DecodeError as error:
                if not line.endswith(b"}"):
                    continue
                raise CorruptRunLogError(self.path, number, str(error)) from error
        return runs
