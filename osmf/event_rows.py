"""Event rows: the rows of a Parquet or JSON lines file, block by block."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, cast

import msgspec

BLOCK_ROWS: Final = 8_192

_PARQUET_MARK: Final = b"PAR1"
_GZIP_MARK: Final = b"\x1f\x8b"
_CHECKED_ROWS: Final = 100


class EventFileError(ValueError):
    """An event file cannot be read; nothing was sent."""


class EventFileMissingError(EventFileError):
    """There is no file at a path."""

    def __init__(self, kind: str, path: Path) -> None:
        super().__init__(
            f"no file {path} (--{kind}): nothing was sent. Give the path of a Parquet or JSON lines file, "
            "optionally compressed by gzip."
        )


class EventFileFormatError(EventFileError):
    """A file is neither Parquet nor JSON lines."""

    def __init__(self, kind: str, path: Path, found: str) -> None:
        super().__init__(
            f"{path} (--{kind}) {found}; allowed are Parquet and JSON lines (one object a line, optionally "
            "compressed by gzip). Nothing was sent."
        )


class EventColumnError(EventFileError):
    """A file lacks columns without which none of its rows can be used."""

    def __init__(self, kind: str, path: Path, missing: list[str], found: list[str]) -> None:
        hint = "Rename the columns" if kind == "users" else f"Rename the columns, or map them in streams.fields.{kind}"
        super().__init__(
            f"{path} (--{kind}) has no {', '.join(missing)}, without which none of its rows can be used; it has "
            f"{', '.join(found) or 'no columns'}. Nothing was sent. {hint}."
        )


class Row(NamedTuple):
    """A row: its fields (None where it is no object), and its bytes (None in Parquet, which has none)."""

    fields: dict[str, Any] | None
    raw: bytes | None


def read_blocks(kind: str, path: Path) -> Iterator[list[Row]]:
    """Yield the rows of a Parquet or JSON lines file, in blocks of at most `BLOCK_ROWS`.

    Fields that are null are left out. Parquet's timestamps and maps become milliseconds and objects.

    Parameters
    ----------
    kind
        What the file holds, as the command line calls it.

    Raises
    ------
    EventFileError
        There is no such file, or it is of another format.
    """
    if _is_parquet(kind, path):
        yield from _parquet_blocks(kind, path)
    else:
        yield from _json_blocks(path)


def check_columns(kind: str, path: Path, required: Iterable[str]) -> None:
    """Check that a file has columns: by its schema (Parquet), or in one of its first rows (JSON lines).

    An empty file is fine.

    Raises
    ------
    EventFileError
        There is no such file, it is of another format, or it lacks a column.
    """
    if _is_parquet(kind, path):
        with _open_parquet(kind, path) as file:
            found = list(file.schema_arrow.names)
    else:
        rows = next(_json_blocks(path), [])[:_CHECKED_ROWS]
        if not rows:
            return
        found = list(dict.fromkeys(name for row in rows for name in row.fields or ()))
        if not any(row.fields is not None for row in rows):
            raise EventFileFormatError(kind, path, f"has no JSON object in its first {len(rows)} lines")
    missing = [name for name in required if name not in found]
    if missing:
        raise EventColumnError(kind, path, missing, found)


def _is_parquet(kind: str, path: Path) -> bool:
    if not path.is_file():
        raise EventFileMissingError(kind, path)
    with path.open("rb") as file:
        parquet = file.read(len(_PARQUET_MARK)) == _PARQUET_MARK
    if not parquet and path.suffix in {".parquet", ".pq"}:
        raise EventFileFormatError(kind, path, "is called Parquet and is not")
    return parquet


@contextmanager
def _open_parquet(kind: str, path: Path) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise EventFileFormatError(kind, path, f"is no readable Parquet ({error})") from error
    with file:
        yield file


def _parquet_blocks(kind: str, path: Path) -> Iterator[list[Row]]:
    with _open_parquet(kind, path) as file:
        for batch in file.iter_batches(batch_size=BLOCK_ROWS):
            columns = {
                name: _plain_values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
            yield [
                Row({name: value for name, value in zip(columns, row, strict=True) if value is not None}, None)
                for row in zip(*columns.values(), strict=True)
            ]


def _plain_values(column: Any) -> list[Any]:
    """Return a column's values as JSON has them."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ms", column.type.tz), safe=False).cast(pa.int64())
    elif pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[Any] = column.to_pylist()
    if pa.types.is_map(column.type):
        values = [None if pairs is None else dict(pairs) for pairs in values]
    if pa.types.is_map(column.type) or pa.types.is_struct(column.type):
        values = [None if value is None else _without_nulls(value) for value in values]
    return values


def _without_nulls(value: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): inner for name, inner in value.items() if inner is not None}


def _json_blocks(path: Path) -> Iterator[list[Row]]:
    with path.open("rb") as file:
        zipped = file.read(len(_GZIP_MARK)) == _GZIP_MARK
    block: list[Row] = []
    with cast(IO[bytes], gzip.open(path, "rb")) if zipped else path.open("rb") as lines:
        for line in lines:
            raw = line.strip()
            if not raw:
                continue
            block.append(Row(_json_object(raw), raw))
            if len(block) == BLOCK_ROWS:
                yield block
                block = []
    if block:
        yield block


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return _without_nulls(found) if isinstance(found, dict) else None
