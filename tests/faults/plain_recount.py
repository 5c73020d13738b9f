"""A plain recount: what a log's counts are, event by event, in a few lines that share nothing with the pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from streams.events import Click, ClickRetracted, Event, Impression, UserForgotten


@dataclass
class Counted:
    """An impression that counts."""

    impression: Impression
    clicked: bool = False
    retracted: bool = False

    @property
    def click_counts(self) -> bool:
        return self.clicked and not self.retracted


@dataclass
class PlainRecount:
    """Counts a log in its order.

    Clicks come within ``attribution_ms`` of their impression, or long after it; ids come again soon, or never.
    """

    attribution_ms: int
    shown: dict[str, Counted] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    _waiting: dict[str, tuple[int, bool]] = field(default_factory=dict)  # when clicked, and whether retracted

    def add_many(self, events: Iterable[Event]) -> None:
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        match event:
            case Impression():
                if event.impression_id not in self.shown:
                    self.shown[event.impression_id] = Counted(event)
                    at_ms, retracted = self._waiting.pop(event.impression_id, (None, False))
                    if at_ms is not None:
                        self._credit(event.impression_id, at_ms)
                        self.shown[event.impression_id].retracted = retracted
            case Click():
                if event.impression_id in self.shown:
                    self._credit(event.impression_id, event.clicked_at_ms)
                else:
                    self._waiting.setdefault(event.impression_id, (event.clicked_at_ms, False))
            case ClickRetracted():
                counted = self.shown.get(event.impression_id)
                if counted is not None:
                    counted.retracted |= counted.clicked
                elif event.impression_id in self._waiting:
                    self._waiting[event.impression_id] = (self._waiting[event.impression_id][0], True)
            case UserForgotten():
                for name in [n for n, c in self.shown.items() if c.impression.user_id == event.user_id]:
                    del self.shown[name]
                    self.forgotten.add(name)
            case _:
                pass

    def _credit(self, impression_id: str, clicked_at_ms: int) -> None:
        counted = self.shown[impression_id]
        counted.clicked |= clicked_at_ms - counted.impression.shown_at_ms <= self.attribution_ms

    def by_creative(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return impressions and clicks by (product, creative)."""
        n_shown = Counter((c.impression.product_id, c.impression.creative_id) for c in self.shown.values())
        n_clicked = Counter(
            (c.impression.product_id, c.impression.creative_id) for c in self.shown.values() if c.click_counts
        )
        return {name: (n, n_clicked[name]) for name, n in n_shown.items()}

    def by_arm(self) -> dict[str, tuple[int, int]]:
        """Return impressions and clicks by arm."""
        n_shown = Counter(c.impression.arm for c in self.shown.values() if c.impression.arm)
        n_clicked = Counter(c.impression.arm for c in self.shown.values() if c.impression.arm and c.click_counts)
        return {arm: (n, n_clicked[arm]) for arm, n in n_shown.items()}
