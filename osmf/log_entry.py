"""Log entries: messages on their way to a topic, and their order in time."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import IO, Final, Literal, NamedTuple

from streams.events import Click, Correction, Creative, Event, Impression, Product

Kind = Literal["products", "creatives", "impressions", "clicks", "corrections"]
"""What an entry is: the field of `streams.settings.TopicSettings` that names its topic."""

KINDS: Final[tuple[Kind, ...]] = ("products", "creatives", "impressions", "clicks", "corrections")
"""In order of precedence at equal times: what is shown must be known."""

EVENT_TYPES: Final[dict[Kind, type[Event] | UnionType]] = {
    "products": Product,
    "creatives": Creative,
    "impressions": Impression,
    "clicks": Click,
    "corrections": Correction,
}

RUN_ROWS: Final = 200_000
"""Entries that are sorted in memory at a time."""

_HEADER: Final = struct.Struct("<qQII")  # time, number, bytes of the key, bytes of the payload
_RANK: Final = {kind: rank for rank, kind in enumerate(KINDS)}


class LogEntry(NamedTuple):
    """One message of a log: the time that it is stamped with, what it is, its key and its bytes."""

    timestamp_ms: int
    kind: Kind
    key: str
    payload: bytes


def merge_by_time(*logs: Iterable[LogEntry]) -> Iterator[LogEntry]:
    """Merge logs that are each in time order; at equal times in the order of `KINDS`."""
    return heapq.merge(*logs, key=lambda entry: (entry.timestamp_ms, _RANK[entry.kind]))


def sort_by_time(
    entries: Iterable[LogEntry], kind: Kind, folder: Path, *, run_rows: int = RUN_ROWS
) -> Iterator[LogEntry]:
    """Yield entries of one kind in time order; entries of equal times keep theirs.

    Blocks of ``run_rows`` are sorted in memory. A block joins a run on disk that ends before it
    starts, so a log that is nearly in order needs two or three runs, whatever its length.
    """
    runs: list[_Run] = []
    block: list[_Numbered] = []
    try:
        for number, entry in enumerate(entries):
            block.append((entry.timestamp_ms, number, entry))
            if len(block) == run_rows:
                block.sort()
                _spill(block, runs, kind, folder)
                block = []
        block.sort()
        for _, _, entry in heapq.merge(*(run.read(kind) for run in runs), block):
            yield entry
    finally:
        for run in runs:
            run.file.close()


_Numbered = tuple[int, int, LogEntry]
"""An entry behind its time and its place among the entries, by which it sorts."""


@dataclass
class _Run:
    """Sorted entries in a file."""

    file: IO[bytes]
    last_ms: int

    def read(self, kind: Kind) -> Iterator[_Numbered]:
        self.file.seek(0)
        while header := self.file.read(_HEADER.size):
            timestamp_ms, number, n_key, n_payload = _HEADER.unpack(header)
            key = self.file.read(n_key).decode()
            yield timestamp_ms, number, LogEntry(timestamp_ms, kind, key, self.file.read(n_payload))


def _spill(block: list[_Numbered], runs: list[_Run], kind: Kind, folder: Path) -> None:
    first_ms, last_ms = block[0][0], block[-1][0]
    run = next((run for run in runs if run.last_ms <= first_ms), None)
    if run is None:
        run = _Run((folder / f"{kind}-{id(runs):x}-{len(runs)}.run").open("w+b"), last_ms)
        runs.append(run)
    run.last_ms = last_ms
    for timestamp_ms, number, entry in block:
        key = entry.key.encode()
        run.file.write(_HEADER.pack(timestamp_ms, number, len(key), len(entry.payload)))
        run.file.write(key)
        run.file.write(entry.payload)
