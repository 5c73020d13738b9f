"""Traffic: requests in event time, the impressions and clicks that follow, and the order in which they arrive.

Nothing here looks at a clock or a network. Event time advances with the requests, chance comes from the generator
that is passed in, and what has arrived by now is handed back as a list of messages to send.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from simulator.attributes import ATTRIBUTES
from simulator.spoil import SPOIL_REASONS, spoil, spoil_plan
from streams.events import Click, Impression

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from simulator.decider import Decision
    from simulator.settings import TrafficSettings
    from simulator.sink import EventSink
    from simulator.world import World
    from streams.settings import TopicSettings

    ClickChance = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]], NDArray[np.float64]]

_HOUR_MS: Final = 3_600_000


class Raw(msgspec.Struct, frozen=True):
    """A message that is no event: which topic's name in the settings, key and bytes."""

    topic: str
    key: str
    payload: bytes


Outgoing = Impression | Click | Raw
"""What the traffic sends."""


@dataclass(frozen=True)
class Requests:
    """Users who look at products, in the order of event time; all arrays have shape (B,)."""

    user_index: NDArray[np.int64]
    product_index: NDArray[np.int64]
    shown_at_ms: NDArray[np.int64]

    def __len__(self) -> int:
        """Return how many requests there are."""
        return len(self.user_index)


@dataclass
class TrafficCounts:
    """What was sent and what is true about it.

    ``produced`` counts all messages by topic: events, their duplicates and spoiled ones. ``by_creative`` and
    ``by_arm`` hold impressions and clicks.
    """

    n_impressions: int = 0
    n_clicks: int = 0
    n_late_clicks: int = 0
    produced: dict[str, int] = field(default_factory=lambda: {"impressions": 0, "clicks": 0})
    duplicates: dict[str, int] = field(default_factory=lambda: {"impressions": 0, "clicks": 0})
    spoiled: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPOIL_REASONS, 0))
    spoiled_by_topic: dict[str, int] = field(default_factory=lambda: {"impressions": 0, "clicks": 0})
    by_creative: dict[str, list[int]] = field(default_factory=dict)
    by_arm: dict[str, list[int]] = field(default_factory=dict)

    @property
    def n_spoiled(self) -> int:
        """Number of spoiled messages, of all kinds."""
        return sum(self.spoiled.values())


def user_attributes(world: World, p_missing: float, rng: np.random.Generator) -> list[dict[str, str]]:
    """Return what is known of every user: attribute values in words, without the ones that are missing.

    A value that is not known of a user is missing from all of the user's impressions.
    """
    known = rng.random(world.codes.shape) >= p_missing  # (U, 20)
    columns = list(ATTRIBUTES.items())
    return [
        {name: values[code] for (name, values), code, k in zip(columns, codes, is_known, strict=True) if k}
        for codes, is_known in zip(world.codes.tolist(), known.tolist(), strict=True)
    ]


class Traffic:
    """The stream of requests, impressions and clicks of one run.

    Parameters
    ----------
    product_ids
        Products by index.
    attributes
        What is known of every user, by index (:func:`user_attributes`).
    rng
        All chance of the run.
    run_id
        Prefix of the impression ids.
    """

    def __init__(
        self,
        settings: TrafficSettings,
        product_ids: Sequence[str],
        attributes: Sequence[dict[str, str]],
        rng: np.random.Generator,
        *,
        run_id: str = "sim",
    ) -> None:
        self.settings = settings
        self.counts = TrafficCounts()
        self.now_ms = float(settings.start_ms)
        self._product_ids = list(product_ids)
        self._attributes = attributes
        self._user_ids = [user_id(index) for index in range(len(attributes))]
        self._rng = rng
        self._run_id = run_id
        self._plan = spoil_plan(settings.n_impressions, settings.n_spoiled_per_reason, settings.spoil_until)
        # Messages on their way: (arrival in ms, number of the message, the message). The number settles ties.
        self._on_their_way: list[tuple[float, int, Outgoing]] = []
        self._n_messages = 0

    @property
    def n_on_their_way(self) -> int:
        """Number of messages that have not arrived yet."""
        return len(self._on_their_way)

    def draw(self, n_requests: int) -> Requests:
        """Draw the next requests and advance event time: a Poisson stream, users and products uniform."""
        gaps = self._rng.exponential(_HOUR_MS / self.settings.impressions_per_hour, n_requests)
        times = self.now_ms + np.cumsum(gaps)
        self.now_ms = float(times[-1])
        return Requests(
            self._rng.integers(len(self._attributes), size=n_requests),
            self._rng.integers(len(self._product_ids), size=n_requests),
            times.astype(np.int64),
        )

    def draw_closing(self) -> list[Requests]:
        """Draw the closing stretch: rounds far apart, each with one request for every product.

        They carry event time past the windows of all that came before, on every partition.
        """
        rounds = []
        n_rounds = int(np.ceil(self.settings.closing_hours * _HOUR_MS / (self.settings.closing_step_s * 1000)))
        for _ in range(n_rounds):
            self.now_ms += self.settings.closing_step_s * 1000
            n_products = len(self._product_ids)
            rounds.append(
                Requests(
                    self._rng.integers(len(self._attributes), size=n_products),
                    np.arange(n_products),
                    np.full(n_products, int(self.now_ms)),
                )
            )
        return rounds

    def attributes_of(self, user_index: int) -> dict[str, str]:
        """Return what is known of a user."""
        return self._attributes[user_index]

    def show(
        self, requests: Requests, decisions: Sequence[Decision], styles: NDArray[np.float64], p_click: ClickChance
    ) -> list[Outgoing]:
        """Show what was decided, draw the clicks, and return what has arrived by the last request.

        Parameters
        ----------
        decisions
            What is shown, one for each request.
        styles
            The shown creatives' styles, shape (B, 8).
        p_click
            The chance of a click from users, products and styles, as it is now.
        """
        n = len(requests)
        rng, settings = self._rng, self.settings
        chances = p_click(requests.user_index, requests.product_index, styles)
        clicked = (rng.random(n) < chances).tolist()
        delays_ms, is_late = self._click_delays_ms(n)
        arrivals = requests.shown_at_ms + self._way_ms(n)
        click_ways = self._way_ms(n)
        again = rng.random((2, n)) < settings.p_duplicate
        again_after = rng.exponential(10_000.0, (2, n))
        users, products = requests.user_index.tolist(), requests.product_index.tolist()
        for i, (shown_at_ms, arrival, decision) in enumerate(
            zip(requests.shown_at_ms.tolist(), arrivals.tolist(), decisions, strict=True)
        ):
            impression = Impression(
                impression_id=f"{self._run_id}-{self.counts.n_impressions:09d}",
                user_id=self._user_ids[users[i]],
                product_id=self._product_ids[products[i]],
                creative_id=decision.creative_id,
                shown_at_ms=shown_at_ms,
                attributes=self._attributes[users[i]],
                experiment=decision.experiment,
                arm=decision.arm,
                p_shown=decision.p_shown,
            )
            self._post(arrival, impression)
            if again[0, i]:
                self.counts.duplicates["impressions"] += 1
                self._post(arrival + again_after[0, i], impression)
            of_creative = self.counts.by_creative.setdefault(decision.creative_id, [0, 0])
            of_arm = self.counts.by_arm.setdefault(decision.arm or "none", [0, 0])
            of_creative[0] += 1
            of_arm[0] += 1
            if clicked[i]:
                of_creative[1] += 1
                of_arm[1] += 1
                self.counts.n_clicks += 1
                self.counts.n_late_clicks += bool(is_late[i])
                click = Click(
                    impression_id=impression.impression_id,
                    product_id=impression.product_id,
                    clicked_at_ms=shown_at_ms + int(delays_ms[i]),
                )
                click_arrival = click.clicked_at_ms + click_ways[i]
                self._post(click_arrival, click)
                if again[1, i]:
                    self.counts.duplicates["clicks"] += 1
                    self._post(click_arrival + again_after[1, i], click)
            self._spoil_after(impression, arrival)
            self.counts.n_impressions += 1
        return self._arrived_by(self.now_ms)

    def finish(self) -> list[Outgoing]:
        """Return everything that is still on its way, in the order of arrival."""
        return self._arrived_by(np.inf)

    def _click_delays_ms(self, n: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        settings = self.settings
        delays = self._rng.exponential(settings.click_delay_s, n)
        # A usual click comes before late ones do: the tail beyond is folded back.
        delays = np.where(
            delays < settings.late_click_after_s, delays, settings.late_click_after_s * self._rng.random(n)
        )
        is_late = self._rng.random(n) < settings.p_late_click
        late = self._rng.uniform(settings.late_click_after_s, settings.late_click_until_s, n)
        return np.maximum(1.0, 1000.0 * np.where(is_late, late, delays)), is_late

    def _way_ms(self, n: int) -> NDArray[np.float64]:
        """Return how long messages are on their way; some are held up, so that they arrive out of order."""
        settings = self.settings
        way = self._rng.exponential(settings.transport_delay_s, n)
        held_up = self._rng.random(n) < settings.p_out_of_order
        return 1000.0 * (way + np.where(held_up, self._rng.random(n) * settings.out_of_order_s, 0.0))

    def _spoil_after(self, impression: Impression, arrival: float) -> None:
        for reason in self._plan.get(self.counts.n_impressions, ()):
            spoiled_id = f"{self._run_id}-spoiled-{self.counts.n_spoiled:06d}"
            topic, key, payload = spoil(reason, impression, spoiled_id, self._rng)
            self.counts.spoiled[reason] += 1
            self.counts.spoiled_by_topic[topic] += 1
            self._post(arrival, Raw(topic, key, payload))

    def _post(self, arrival_ms: float, message: Outgoing) -> None:
        heapq.heappush(self._on_their_way, (arrival_ms, self._n_messages, message))
        self._n_messages += 1

    def _arrived_by(self, now_ms: float) -> list[Outgoing]:
        waiting, arrived = self._on_their_way, []
        while waiting and waiting[0][0] <= now_ms:
            arrived.append(heapq.heappop(waiting)[2])
        return arrived

    def send(self, messages: Sequence[Outgoing], sink: EventSink, topics: TopicSettings) -> None:
        """Send messages and count them as produced."""
        raw_topics = {"impressions": topics.impressions, "clicks": topics.clicks}
        n_clicks = 0
        for message in messages:
            if isinstance(message, Raw):
                n_clicks += message.topic == "clicks"
                sink.send_bytes(raw_topics[message.topic], message.key, message.payload)
            else:
                n_clicks += isinstance(message, Click)
                sink.send(message)
        self.counts.produced["clicks"] += n_clicks
        self.counts.produced["impressions"] += len(messages) - n_clicks


def user_id(index: int) -> str:
    """Return the id of the user at ``index``."""
    return f"u{index:06d}"
