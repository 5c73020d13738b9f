"""Forgettings: which events of a log forgotten users' events take out of a recount."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from state.records import ForgettingRecord
from streams.events import Click, ClickRetracted, Event, Impression, UserForgotten


class Place(NamedTuple):
    """Where an event stands: in a partition of a topic, or ("", 0) and its number in a log from files."""

    topic: str
    partition: int
    offset: int


class Forgettings:
    """Users who were forgotten, and the impressions that were forgotten with them.

    Forgettings have to be added first, then impressions asked for, then clicks and their retractions.
    """

    def __init__(self) -> None:
        self._of_user: dict[str, list[ForgettingRecord]] = {}
        self._of_impression: dict[str, list[ForgettingRecord]] = {}

    def add(self, event: UserForgotten, record: ForgettingRecord) -> None:
        """Add a forgotten user, with what the event took back."""
        self._of_user.setdefault(event.user_id, []).append(record)

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._of_user)

    def covers(self, event: Event, at: Place) -> bool:
        """Return whether an event was taken back."""
        match event:
            case Impression():
                found = [record for record in self._of_user.get(event.user_id, []) if _is_between(record, at)]
                if found:
                    self._of_impression.setdefault(event.impression_id, []).extend(found)
                return bool(found)
            case Click() | ClickRetracted():
                return any(_is_before(record.ends, at) for record in self._of_impression.get(event.impression_id, []))
            case _:
                return False


def _is_between(record: ForgettingRecord, at: Place) -> bool:
    return not _is_before(record.starts, at) and _is_before(record.ends, at)


def _is_before(offsets: Mapping[str, Mapping[int, int]], at: Place) -> bool:
    return at.offset < offsets.get(at.topic, {}).get(at.partition, 0)
