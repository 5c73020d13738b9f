"""Event files: anyone's impressions, clicks, products and users, as one log in time order.

Files are Parquet or JSON lines with the fields of ``docs/schemas/``, or with a platform's own names
where ``streams.fields`` maps them. Every row becomes one message. A row that is no event is sent as
it stands, so that the online process dead-letters it with its reason.

Files need not be sorted. They are sorted here, on disk, and users lie on disk too, so that memory
is bounded by a block of rows and the catalogue (products and creatives), never by the log.
"""

from __future__ import annotations

import itertools
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Final, get_args

import msgspec

from osmf.event_rows import EventFileError, Row, check_columns, read_blocks
from osmf.log_entry import EVENT_TYPES, Kind, LogEntry, merge_by_time, sort_by_time
from streams.codec import EventDecoder
from streams.events import Creative, Event, Impression, Product
from streams.settings import FieldMapSettings

TIME_FIELDS: Final[dict[Kind, tuple[str, ...]]] = {
    "products": ("updated_at_ms",),
    "creatives": ("created_at_ms",),
    "impressions": ("shown_at_ms",),
    "clicks": ("clicked_at_ms",),
    "corrections": ("retracted_at_ms", "forgotten_at_ms"),
}
"""Fields that a message is stamped with, the first that a row has."""

_FIRST_MS: Final = 1
_LAST_MS: Final = 253_402_300_799_999
_LOOKUP_USERS: Final = 500


class UserRowError(EventFileError):
    """A row of the users file does not name its user."""

    def __init__(self, path: Path, row: int, found: object) -> None:
        super().__init__(
            f"row {row} of {path} (--users) has the user_id {found!r}; allowed is a string of at least one character. "
            "Nothing was sent."
        )


@dataclass(frozen=True)
class EventFiles:
    """The files of one click log.

    Parameters
    ----------
    impressions, clicks, products
        Rows of the events' schemas. Times are milliseconds since the epoch, or Parquet timestamps.
    creatives
        The creatives. Without it, the (product, creative) pairs that impressions name are registered
        at their first impression, without pictures.
    users
        ``user_id``, and either one column ``attributes`` (a struct, a map or an object) or a column
        for each attribute. They are given to impressions that carry no attributes. Values become
        strings; true and false become "yes" and "no". A user who is there twice has the last row's.
    corrections
        Retracted clicks and forgotten users; each row says its ``type``.
    """

    impressions: Path
    clicks: Path
    products: Path
    creatives: Path | None = None
    users: Path | None = None
    corrections: Path | None = None

    def check(self, fields: FieldMapSettings) -> None:
        """Look at every file's format and columns.

        Raises
        ------
        EventFileError
            A file is missing, is neither Parquet nor JSON lines, or lacks a column that every event needs.
        """
        for kind, path in self._paths().items():
            names = FieldPaths(getattr(fields, kind))
            check_columns(kind, path, [names.column(name) for name in _required_fields(EVENT_TYPES[kind])])
        if self.users is not None:
            check_columns("users", self.users, ["user_id"])

    def entries(self, fields: FieldMapSettings, *, folder: Path | None = None) -> Iterator[LogEntry]:
        """Yield every row as a message, in time order.

        The first mention of a product or creative is stamped no later than the first impression: a
        catalogue's times are often those of its export. A row without a time keeps the place that it
        has in its file.

        Parameters
        ----------
        fields
            The platform's own field names.
        folder
            Where temporary files go, of about the size of the log (default: the system's folder).

        Raises
        ------
        EventFileError
            As for `check`, or a user has no id. Nothing has been yielded then.
        """
        self.check(fields)
        with tempfile.TemporaryDirectory(prefix="osmf-replay-", dir=folder) as work:
            users = None if self.users is None else UserAttributes(Path(work) / "users.sqlite", self.users)
            try:
                yield from self._merged(fields, Path(work), users)
            finally:
                if users is not None:
                    users.close()

    def _paths(self) -> dict[Kind, Path]:
        paths: dict[Kind, Path] = {
            "products": self.products,
            "impressions": self.impressions,
            "clicks": self.clicks,
        }
        if self.creatives is not None:
            paths["creatives"] = self.creatives
        if self.corrections is not None:
            paths["corrections"] = self.corrections
        return paths

    def _merged(self, fields: FieldMapSettings, work: Path, users: UserAttributes | None) -> Iterator[LogEntry]:
        shown = self._sorted("impressions", fields, work, users)
        first = next(shown, None)
        first_ms = _LAST_MS if first is None else first.timestamp_ms
        product_ids: set[str] = set()
        logs = [
            self._catalogue("products", fields, work, first_ms, lambda event: product_ids.add(event.product_id)),
            itertools.chain([] if first is None else [first], shown),
            self._sorted("clicks", fields, work, None),
        ]
        if self.corrections is not None:
            logs.append(self._sorted("corrections", fields, work, None))
        if self.creatives is not None:
            logs.append(self._catalogue("creatives", fields, work, first_ms, lambda _: None))
            yield from merge_by_time(*logs)
        else:
            yield from _with_creatives(merge_by_time(*logs), fields, product_ids)

    def _sorted(
        self, kind: Kind, fields: FieldMapSettings, work: Path, users: UserAttributes | None
    ) -> Iterator[LogEntry]:
        rows = _entries(kind, self._paths()[kind], FieldPaths(getattr(fields, kind)), users)
        return sort_by_time(rows, kind, work)

    def _catalogue(
        self, kind: Kind, fields: FieldMapSettings, work: Path, first_ms: int, found: Callable[[Any], None]
    ) -> Iterator[LogEntry]:
        """Yield products or creatives; each is known before the first impression."""
        decoder = EventDecoder(EVENT_TYPES[kind], getattr(fields, kind))

        def stamped() -> Iterator[LogEntry]:
            known: set[tuple[str, str]] = set()
            for entry in self._sorted(kind, fields, work, None):
                event = decoder.decode(entry.payload)[0]
                if isinstance(event, Product | Creative):
                    name = (event.product_id, event.creative_id if isinstance(event, Creative) else "")
                    found(event)
                    is_new = name not in known
                    known.add(name)
                    yield entry._replace(timestamp_ms=min(entry.timestamp_ms, first_ms)) if is_new else entry
                else:
                    yield entry

        return sort_by_time(stamped(), kind, work)


class FieldPaths:
    """Where a platform's rows hold our fields."""

    def __init__(self, mapped: Mapping[str, str]) -> None:
        self._paths = {ours: theirs.split(".") for ours, theirs in mapped.items()}

    def column(self, name: str) -> str:
        """Return the column that holds a field, or the object with it."""
        return self._paths.get(name, [name])[0]

    def get(self, row: Mapping[str, Any], name: str) -> Any:
        """Return a field of a row, None where there is none."""
        value: Any = row
        for step in self._paths.get(name, [name]):
            value = value.get(step) if isinstance(value, Mapping) else None
        return value

    def put(self, row: dict[str, Any], name: str, value: object) -> None:
        """Set a field of a row."""
        *steps, last = self._paths.get(name, [name])
        for step in steps:
            inner = row.get(step)
            row[step] = dict(inner) if isinstance(inner, Mapping) else {}
            row = row[step]
        row[last] = value


class UserAttributes:
    """The users' attributes, in a database on disk, so that any number of users fits.

    Parameters
    ----------
    database
        Path of the database; made anew.
    users
        The users file.
    """

    def __init__(self, database: Path, users: Path) -> None:
        self._connection = sqlite3.connect(database, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode = OFF")
            self._connection.execute("PRAGMA synchronous = OFF")
            self._connection.execute("CREATE TABLE users (user_id TEXT PRIMARY KEY, attributes BLOB) WITHOUT ROWID")
            n_before = 0
            for block in read_blocks("users", users):
                found = [_user(users, n_before + position, row) for position, row in enumerate(block, 1)]
                self._connection.execute("BEGIN")
                self._connection.executemany("INSERT OR REPLACE INTO users VALUES (?, ?)", found)
                self._connection.execute("COMMIT")
                n_before += len(block)
        except BaseException:
            self.close()
            raise

    def look_up(self, user_ids: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the attributes of those users that are known."""
        wanted = list(dict.fromkeys(user_ids))
        found: dict[str, dict[str, str]] = {}
        for start in range(0, len(wanted), _LOOKUP_USERS):
            part = wanted[start : start + _LOOKUP_USERS]
            query = f"SELECT user_id, attributes FROM users WHERE user_id IN ({','.join('?' * len(part))})"
            for user_id, attributes in self._connection.execute(query, part):
                found[user_id] = msgspec.json.decode(attributes)
        return found

    def close(self) -> None:
        """Close the database."""
        self._connection.close()


def _user(path: Path, number: int, row: Row) -> tuple[str, bytes]:
    if row.fields is None:
        raise UserRowError(path, number, (row.raw or b"")[:60])
    user_id = row.fields.get("user_id")
    if not isinstance(user_id, str) or not user_id:
        raise UserRowError(path, number, user_id)
    attributes = row.fields.get("attributes")
    if not isinstance(attributes, Mapping):
        attributes = {name: value for name, value in row.fields.items() if name != "user_id"}
    words = {name: _word(value) for name, value in attributes.items() if value is not None}
    return user_id, msgspec.json.encode(words)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _required_fields(event_type: type[Event] | UnionType) -> list[str]:
    """Return the fields without which no row can be used; of a union of events the one that tells them apart."""
    if isinstance(event_type, UnionType):
        return sorted({str(struct.__struct_config__.tag_field) for struct in get_args(event_type)})
    return [
        field.name
        for field in msgspec.structs.fields(event_type)
        if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
    ]


def _entries(kind: Kind, path: Path, names: FieldPaths, users: UserAttributes | None) -> Iterator[LogEntry]:
    """Yield a file's rows as messages, in the file's order."""
    last_ms = _FIRST_MS
    for block in read_blocks(kind, path):
        for row in block if users is None else _with_attributes(block, names, users):
            fields = row.fields or {}
            times = [names.get(fields, name) for name in TIME_FIELDS[kind]]
            time_ms = next((value for value in times if value is not None), None)
            key = names.get(fields, "product_id") or (names.get(fields, "user_id") if kind == "corrections" else None)
            if isinstance(time_ms, int) and not isinstance(time_ms, bool) and 0 <= time_ms <= _LAST_MS:
                last_ms = max(time_ms, _FIRST_MS)
            payload = row.raw if row.raw is not None else msgspec.json.encode(row.fields, enc_hook=str)
            yield LogEntry(last_ms, kind, key if isinstance(key, str) else "", payload)


def _with_attributes(block: list[Row], names: FieldPaths, users: UserAttributes) -> Iterator[Row]:
    """Give the users' attributes to impressions that carry none."""
    user_ids = [
        None if row.fields is None or names.get(row.fields, "attributes") else names.get(row.fields, "user_id")
        for row in block
    ]
    known = users.look_up(user_id for user_id in user_ids if isinstance(user_id, str))
    for row, user_id in zip(block, user_ids, strict=True):
        attributes = known.get(user_id) if isinstance(user_id, str) else None
        if row.fields is None or not attributes:
            yield row
            continue
        fields = dict(row.fields)
        names.put(fields, "attributes", attributes)
        yield Row(fields, None)


def _with_creatives(entries: Iterable[LogEntry], fields: FieldMapSettings, product_ids: set[str]) -> Iterator[LogEntry]:
    """Register the creatives of known products at their first impression."""
    decoder = EventDecoder(Impression, fields.impressions)
    names = FieldPaths(fields.creatives)
    known: set[tuple[str, str]] = set()
    for entry in entries:
        event = decoder.decode(entry.payload)[0] if entry.kind == "impressions" else None
        if isinstance(event, Impression) and event.product_id in product_ids:
            pair = (event.product_id, event.creative_id)
            if pair not in known:
                known.add(pair)
                row: dict[str, Any] = {}
                names.put(row, "product_id", event.product_id)
                names.put(row, "creative_id", event.creative_id)
                names.put(row, "created_at_ms", event.shown_at_ms)
                payload = msgspec.json.encode(row)
                yield LogEntry(entry.timestamp_ms, "creatives", event.product_id, payload)
        yield entry
