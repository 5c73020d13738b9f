"""Session: one run of the simulator against a broker and a decision service (``osmf simulate``)."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec
import numpy as np

from simulator.decider import Decider, Decision, DecisionService, Request, UniformDecider
from simulator.stage import Stage, StyleBook, set_stage
from simulator.traffic import Requests, Traffic, user_attributes, user_id
from simulator.truth import (
    PolicyTruth,
    ProductTruth,
    Truth,
    UserTruth,
    policy_truth,
    product_truths,
    taste_truths,
    user_truths,
    write_json,
)
from streams.events import Creative, Product

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from simulator.settings import SimulatorSettings
    from simulator.sink import EventSink
    from streams.settings import StreamSettings, TopicSettings

_LOG: Final = logging.getLogger(__name__)

Phase = Literal["announcing", "before the shift", "after the shift", "closing", "done", "stopped"]

_ANNOUNCEMENT_WAIT_S: Final = 2.0
"""How long a creative that is shown may stay unannounced, in seconds, before it counts as one without a style."""


class CreativeTail(Protocol):
    """Follows the topic of creatives; :class:`streams.tail.Tail` is one."""

    def poll(self, timeout_ms: int) -> list[Creative]:
        """Return the creatives announced since the last call, waiting at most ``timeout_ms``."""
        ...


class ConsumerStalled(RuntimeError):
    """The consumer made no progress for too long."""

    def __init__(self, n_ahead: int, waited_s: float) -> None:
        super().__init__(
            f"the simulation is {n_ahead} impressions ahead and the consumer has processed none for {waited_s:.0f} s. "
            "The simulation stops here; look at the consumer's log, or raise simulator.max_ahead "
            "or simulator.max_wait_s."
        )


class NotRegistered(RuntimeError):
    """The decision service does not know the products in time."""

    def __init__(self, missing: Sequence[str], waited_s: float) -> None:
        some = ", ".join(list(missing)[:5])
        super().__init__(
            f"after {waited_s:.0f} s the decision service does not know {len(missing)} of the announced products "
            f"with all their creatives (such as {some}). Nothing was shown; is the consumer (`osmf online`) running?"
        )


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run is: what ``progress.json`` holds."""

    phase: Phase
    n_impressions: int
    n_impressions_planned: int
    n_clicks: int
    produced: dict[str, int]
    n_spoiled: int
    n_duplicates: int
    event_time_ms: int
    impressions_per_s: float
    n_ahead: int | None
    n_creatives_learned: int
    shifted_at_ms: int | None
    shifted_categories: list[str]
    policies: dict[str, PolicyTruth]


class Session:
    """One run: announces the catalogue, shows creatives, draws clicks, changes tastes, and writes down the truth.

    Parameters
    ----------
    stage
        What the run starts with (:func:`simulator.stage.set_stage`).
    sink
        Where events go.
    decider
        Who chooses what is shown.
    tail
        Follows new creatives; None where there are none.
    service
        Asked for what is registered and how far the consumer is; None runs without waiting for anybody.
    should_stop
        Asked before every batch; true ends the run early but tidily.
    clock, sleep
        Wall clock, for pace and patience only: no event depends on them.
    """

    def __init__(
        self,
        settings: SimulatorSettings,
        topics: TopicSettings,
        stage: Stage,
        sink: EventSink,
        decider: Decider,
        *,
        tail: CreativeTail | None = None,
        service: DecisionService | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.settings = settings
        self._topics = topics
        self._stage = stage
        self._sink = sink
        self._decider = decider
        self._tail = tail
        self._service = service
        self._should_stop = should_stop
        self._clock = clock
        self._sleep = sleep
        self._start_world = self._world = stage.world
        self._chances = stage.world.frozen_tastes()
        self._book = StyleBook(stage)
        rng = np.random.default_rng([settings.seed, 2])
        known = user_attributes(stage.world, settings.traffic.p_missing_attribute, rng)
        self._product_ids = [product.product_id for product in stage.products]
        self.traffic = Traffic(settings.traffic, self._product_ids, known, rng, run_id=settings.run_id)
        self._shifted_categories: tuple[str, ...] = ()
        self._shifted_at_ms: int | None = None
        self._shifted_after: int | None = None
        self._policies: dict[str, PolicyTruth] = {}
        self._n_processed_before = 0
        self._n_processed: int | None = None
        self._started_s = self._written_s = clock()

    def run(self) -> Truth:
        """Run to the end and return the truth, which is also in ``truth.json``.

        Raises
        ------
        NotRegistered, ConsumerStalled
            When the other processes do not follow.
        simulator.decider.DecisionServiceDown, simulator.decider.BadDecision
            When the decision service fails.
        """
        at_start = taste_truths(self._world, self._book)
        self._policies["at_start"] = policy_truth(self._world, self._book)
        self._write_progress("announcing")
        self._announce()
        self._await_registration()
        self._started_s = self._clock()
        completed = self._show_all()
        if completed:
            self._write_progress("closing")
            for requests in self.traffic.draw_closing():
                self._await_worked_off()
                self._show(requests)
        self.traffic.send(self.traffic.finish(), self._sink, self._topics)
        self._sink.flush()
        self._learn_creatives()
        self._policies["at_end"] = policy_truth(self._world, self._book)
        products = product_truths(
            self._stage, at_start, taste_truths(self._world, self._book), self._shifted_categories
        )
        truth = self._truth(completed, products)
        write_json(self.settings.out_dir / "truth.json", truth)
        self._write_progress("done" if completed else "stopped")
        return truth

    def _announce(self) -> None:
        start_ms = self.settings.traffic.start_ms
        for product in self._stage.products:
            self._sink.send(
                Product(
                    product_id=product.product_id,
                    title=product.title,
                    updated_at_ms=start_ms,
                    category=product.category,
                    image_uri=product.cutout_path.resolve().as_uri(),
                )
            )
        # A creative that overtakes its product on the way would be refused.
        self._sink.flush()
        for creatives in self._stage.creatives:
            for creative in creatives:
                self._sink.send(creative.event(start_ms))
        self._sink.flush()

    def _await_registration(self) -> None:
        if self._service is None:
            return
        wanted = {p: len(c) for p, c in zip(self._product_ids, self._stage.creatives, strict=True)}
        started, fewest = self._clock(), len(wanted)
        while not self._should_stop():
            registered = self._service.n_creatives()
            missing = [product for product, n in wanted.items() if registered.get(product, 0) < n]
            if not missing:
                break
            if len(missing) < fewest:  # patience is for standstill: encoders may take long over many creatives
                started, fewest = self._clock(), len(missing)
            waited = self._clock() - started
            if waited > self.settings.max_wait_s:
                raise NotRegistered(missing, waited)
            self._sleep(0.2)
        self._n_processed_before = self._service.n_impressions_processed()

    def _show_all(self) -> bool:
        """Show all planned impressions; return whether the run got to its end."""
        n_planned = self.settings.traffic.n_impressions
        shift_after = max(1, round(self.settings.shift.at * n_planned)) if self._shifts else n_planned
        while self.traffic.counts.n_impressions < n_planned:
            if self._should_stop():
                return False
            n_shown = self.traffic.counts.n_impressions
            if self._shifts and self._shifted_at_ms is None and n_shown >= shift_after:
                self._shift_tastes()
            # A batch never straddles the shift, so its place is exact.
            end = shift_after if self._shifted_at_ms is None and n_shown < shift_after else n_planned
            self._hold_back()
            self._show(self.traffic.draw(min(self.settings.batch_size, end - n_shown)))
            if self._clock() - self._written_s >= self.settings.progress_every_s:
                self._write_progress("before the shift" if self._shifted_at_ms is None else "after the shift")
        return True

    @property
    def _shifts(self) -> bool:
        return bool(self.settings.shift.categories) or self.settings.shift.n_categories > 0

    def _shift_tastes(self) -> None:
        shift, seed = self.settings.shift, self.settings.seed
        drawn = self._world.draw_categories(shift.n_categories, np.random.default_rng([seed, 3]))
        self._shifted_categories = shift.categories or drawn
        self._policies["before_shift"] = policy_truth(self._world, self._book)
        self._world = self._world.shift(self._shifted_categories, shift.kind, seed)
        self._chances = self._world.frozen_tastes()
        self._policies["after_shift"] = policy_truth(self._world, self._book)
        self._shifted_at_ms = int(self.traffic.now_ms)
        self._shifted_after = self.traffic.counts.n_impressions
        self._write_progress("after the shift")

    def _show(self, requests: Requests) -> None:
        asked = [
            Request(user_id(user), self._product_ids[product], self.traffic.attributes_of(user))
            for user, product in zip(requests.user_index.tolist(), requests.product_index.tolist(), strict=True)
        ]
        decisions = self._decider.decide(asked)
        self._learn_creatives()
        self._await_announcements(asked, decisions)
        styles = self._book.styles([decision.creative_id for decision in decisions])
        arrived = self.traffic.show(requests, decisions, styles, self._chances)
        self.traffic.send(arrived, self._sink, self._topics)

    def _learn_creatives(self, timeout_ms: int = 0) -> None:
        if self._tail is not None:
            for creative in self._tail.poll(timeout_ms):
                self._book.learn(creative)

    def _await_announcements(self, asked: Sequence[Request], decisions: Sequence[Decision]) -> None:
        """Wait a little for creatives that are decided on before their announcement has reached this process."""
        unknown = {
            d.creative_id: r.product_id
            for r, d in zip(asked, decisions, strict=True)
            if d.creative_id not in self._book
        }
        until = self._clock() + _ANNOUNCEMENT_WAIT_S
        while unknown and self._tail is not None and self._clock() < until:
            self._learn_creatives(timeout_ms=100)
            unknown = {c: p for c, p in unknown.items() if c not in self._book}
        for creative_id, product_id in unknown.items():
            _LOG.warning(
                "creative %s of %s is shown but was never announced: its style is neutral", creative_id, product_id
            )
            self._book.learn_unannounced(creative_id, product_id)

    def _hold_back(self) -> None:
        """Wait while the run is too fast for the rate that is set, or too far ahead of the consumer."""
        if self.settings.impressions_per_s is not None:
            due = self._started_s + self.traffic.counts.n_impressions / self.settings.impressions_per_s
            if (early := due - self._clock()) > 0:
                self._sleep(early)
        if self._service is None or self._n_ahead() + self.settings.batch_size <= self.settings.max_ahead:
            return
        # What is still in the producer's buffer cannot be processed.
        self._sink.flush()
        started, last = self._clock(), self._n_processed
        while not self._should_stop():
            self._n_processed = self._service.n_impressions_processed() - self._n_processed_before
            if self._n_ahead() + self.settings.batch_size <= self.settings.max_ahead:
                return
            if self._n_processed != last:
                started, last = self._clock(), self._n_processed
            waited = self._clock() - started
            if waited > self.settings.max_wait_s:
                raise ConsumerStalled(self._n_ahead(), waited)
            if self._clock() - self._written_s >= self.settings.progress_every_s:
                self._write_progress("before the shift" if self._shifted_at_ms is None else "after the shift")
            self._sleep(0.05)

    def _await_worked_off(self) -> None:
        """Wait until the consumer has all impressions: the closing stretch leaps hours, as no real stream does."""
        if self._service is None:
            return
        self._sink.flush()
        until = self._clock() + self.settings.max_wait_s
        while self._n_ahead() > 0 and not self._should_stop() and self._clock() < until:
            self._sleep(0.1)
            self._n_processed = self._service.n_impressions_processed() - self._n_processed_before

    def _n_ahead(self) -> int:
        return self.traffic.counts.produced["impressions"] - (self._n_processed or 0)

    def _write_progress(self, phase: Phase) -> None:
        now, counts = self._clock(), self.traffic.counts
        self._written_s = now
        progress = Progress(
            phase=phase,
            n_impressions=counts.n_impressions,
            n_impressions_planned=self.settings.traffic.n_impressions,
            n_clicks=counts.n_clicks,
            produced=counts.produced,
            n_spoiled=counts.n_spoiled,
            n_duplicates=sum(counts.duplicates.values()),
            event_time_ms=int(self.traffic.now_ms),
            impressions_per_s=counts.n_impressions / max(1e-9, now - self._started_s),
            n_ahead=None if self._service is None else self._n_ahead(),
            n_creatives_learned=self._book.n_learned,
            shifted_at_ms=self._shifted_at_ms,
            shifted_categories=list(self._shifted_categories),
            policies=self._policies,
        )
        write_json(self.settings.out_dir / "progress.json", progress)

    def _truth(self, completed: bool, products: list[ProductTruth]) -> Truth:
        counts = self.traffic.counts
        return Truth(
            run_id=self.settings.run_id,
            seed=self.settings.seed,
            completed=completed,
            started_at_ms=self.settings.traffic.start_ms,
            ended_at_ms=int(self.traffic.now_ms),
            shifted_at_ms=self._shifted_at_ms,
            shifted_after_impressions=self._shifted_after,
            shifted_categories=list(self._shifted_categories),
            shift_kind=self.settings.shift.kind,
            n_impressions=counts.n_impressions,
            n_clicks=counts.n_clicks,
            n_late_clicks=counts.n_late_clicks,
            produced=counts.produced,
            duplicates=counts.duplicates,
            spoiled=counts.spoiled,
            spoiled_by_topic=counts.spoiled_by_topic,
            by_creative=counts.by_creative,
            by_arm=counts.by_arm,
            n_creatives_learned=self._book.n_learned,
            n_creatives_without_style=self._book.n_without_style,
            policies=self._policies,
            products=products,
            users=self._user_truths(),
        )

    def _user_truths(self) -> list[UserTruth]:
        n_users = min(self.settings.n_truth_users, self._start_world.n_users)
        users = np.arange(n_users)  # users come in random order
        return user_truths(
            self._start_world,
            self._world,
            users,
            [user_id(index) for index in range(n_users)],
            [self.traffic.attributes_of(index) for index in range(n_users)],
        )


def simulate(
    settings: SimulatorSettings,
    streams: StreamSettings,
    *,
    stop: threading.Event | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Truth:
    """Run a simulation over the broker of ``streams`` and return its truth.

    ``stop`` ends it early and tidily; ``on_progress`` is told how many first creatives are rendered, and of how many.

    Raises
    ------
    simulator.catalogue.CatalogueUnavailable
        When only the real catalogue is wanted and cannot be had.
    """
    from generator.procedural import ProceduralRenderer
    from streams.producer import EventProducer
    from streams.tail import Tail

    stage = set_stage(settings, ProceduralRenderer(), on_progress=on_progress)
    should_stop = stop.is_set if stop is not None else (lambda: False)
    with EventProducer(streams, client_id="osmf-simulator") as producer:
        if settings.decider == "uniform":
            ids = {
                p.product_id: [c.creative_id for c in of_product]
                for p, of_product in zip(stage.products, stage.creatives, strict=True)
            }
            decider = UniformDecider(ids, np.random.default_rng([settings.seed, 4]))
            return Session(settings, streams.topics, stage, producer, decider, should_stop=should_stop).run()
        service = DecisionService(
            settings.decision_url, timeout_s=settings.request_timeout_s, max_wait_s=settings.max_wait_s
        )
        tail = Tail(streams, streams.topics.creatives, Creative)
        try:
            return Session(
                settings, streams.topics, stage, producer, service, tail=tail, service=service, should_stop=should_stop
            ).run()
        finally:
            tail.close()
            service.close()
