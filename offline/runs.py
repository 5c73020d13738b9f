"""The run log: one JSON line for every run of an offline job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

Outcome = Literal["built", "skipped", "failed"]


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run: when it was, what came of it, and why where nothing was built.

    ``artifact`` is the artifact's name, such as ``gaip/v000001``; ``n_new_impressions`` counts those since the
    artifact before, where the run got as far as counting them.
    """

    run_id: str
    job: str
    started_at_ms: int
    finished_at_ms: int
    outcome: Outcome
    reason: str | None = None
    artifact: str | None = None
    snapshot_id: str | None = None
    n_new_impressions: int | None = None
    n_products: int = 0
    n_rows: int = 0
    n_pairs: int = 0


class CorruptRunLogError(RuntimeError):
    """A line of the run log, other than an unfinished last one, is not a run."""

    def __init__(self, path: Path, line: int, trouble: str) -> None:
        super().__init__(
            f"line {line} of {path} is not a run ({trouble}); allowed is one JSON object a line, as the job writes it. "
            "No run was read: remove that line."
        )


class RunLog:
    """The log at ``path``, appended to by each run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: RunRecord) -> None:
        """Add a run, in one write, and wait until it is on disk."""
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
        """Return all runs, oldest first; a line that a killed writer left unfinished is passed over.

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
