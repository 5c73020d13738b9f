from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import msgspec
import numpy as np
import pytest
from PIL import Image

from generator.procedural import ProceduralRenderer
from generator.prompt import Prompt
from generator.renderer import Rendering
from simulator.decider import (
    BadDecision,
    Decision,
    DecisionService,
    DecisionServiceDown,
    Request,
    UniformDecider,
)
from simulator.session import ConsumerStalled, NotRegistered, Progress, Session
from simulator.settings import CatalogueSettings, ShiftSettings, SimulatorSettings, TrafficSettings, WorldSettings
from simulator.sink import ListSink
from simulator.stage import Stage, StyleBook, set_stage
from simulator.truth import Truth, read_truth
from simulator.world import style_of
from streams.events import Click, Creative, Impression, Product
from streams.settings import TopicSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TOPICS = TopicSettings()
URL = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def settings(cache_dir: Path) -> SimulatorSettings:
    return SimulatorSettings(
        cache_dir=cache_dir,
        catalogue=CatalogueSettings(source="drawn", n_products=6, creative_side_px=64, max_creatives=7),
        world=WorldSettings(n_users=1_500),
        traffic=TrafficSettings(n_impressions=3_000),
        batch_size=256,
        n_truth_users=50,
    )


@pytest.fixture(scope="module")
def stage(settings: SimulatorSettings) -> Stage:
    return set_stage(settings, ProceduralRenderer())


class Clock:
    """A wall clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-4
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Announcements:
    """A tail of creatives that hands out one list after another."""

    def __init__(self, *polls: list[Creative]) -> None:
        self._polls = list(polls)

    def poll(self, timeout_ms: int) -> list[Creative]:
        return self._polls.pop(0) if self._polls else []


def uniform(stage: Stage) -> UniformDecider:
    ids = {p.product_id: [c.creative_id for c in cs] for p, cs in zip(stage.products, stage.creatives, strict=True)}
    return UniformDecider(ids, np.random.default_rng(0))


def session(settings: SimulatorSettings, stage: Stage, sink: ListSink, out: Path, **more: object) -> Session:
    clock = Clock()
    decider = more.pop("decider", None) or uniform(stage)
    return Session(
        settings.model_copy(update={"out_dir": out}),
        TOPICS,
        stage,
        sink,
        decider,  # type: ignore[arg-type]
        clock=clock,
        sleep=clock.sleep,
        **more,  # type: ignore[arg-type]
    )


def test_a_run_announces_shows_shifts_and_writes_the_truth(
    settings: SimulatorSettings, stage: Stage, tmp_path: Path
) -> None:
    sink = ListSink()
    truth = session(settings, stage, sink, tmp_path).run()
    assert truth.completed
    assert read_truth(tmp_path / "truth.json") == truth
    n_creatives = sum(map(len, stage.creatives))
    assert [type(e) for e in sink.events[: 6 + n_creatives]].count(Product) == 6
    assert sum(isinstance(e, Creative) for e in sink.events) == n_creatives
    n_impressions = sum(isinstance(e, Impression) for e in sink.events)
    assert n_impressions == truth.n_impressions + truth.duplicates["impressions"]
    assert truth.n_impressions == 3_000 + 26 * 6
    assert len(sink.raw) == sum(truth.spoiled.values()) == 84
    assert truth.produced["clicks"] == (
        sum(isinstance(e, Click) for e in sink.events) + truth.spoiled_by_topic["clicks"]
    )
    assert sink.n_flushes >= 2
    assert truth.shifted_after_impressions == 1_500
    assert len(truth.shifted_categories) == 2
    assert truth.shifted_at_ms is not None
    shown = sorted(
        e.shown_at_ms for e in {e.impression_id: e for e in sink.events if isinstance(e, Impression)}.values()
    )
    assert shown[1_499] <= truth.shifted_at_ms <= shown[1_500]


def test_creatives_are_sent_when_the_broker_has_all_products(
    settings: SimulatorSettings, stage: Stage, tmp_path: Path
) -> None:
    class Order(ListSink):
        def flush(self) -> None:
            super().flush()
            acknowledged.append([type(event) for event in self.events])

    acknowledged: list[list[type]] = []
    session(settings, stage, Order(), tmp_path).run()
    assert acknowledged[0] == [Product] * 6
    assert acknowledged[1] == [Product] * 6 + [Creative] * sum(map(len, stage.creatives))


def test_the_truth_tells_who_likes_what(settings: SimulatorSettings, stage: Stage, tmp_path: Path) -> None:
    truth = session(settings, stage, ListSink(), tmp_path).run()
    for product in truth.products:
        assert product.shifted == (product.category in truth.shifted_categories)
        assert (product.at_start == product.at_end) != product.shifted
        for segment, best in enumerate(product.at_start.best_creatives):
            ctrs = {c: by_segment[segment] for c, by_segment in product.at_start.ctr_by_segment.items()}
            assert max(ctrs, key=ctrs.__getitem__) == best
        for user in truth.users:
            value = user.attributes[product.at_start.driver]
            assert product.at_start.segment_of_value[value] == user.segments_at_start[product.category]
    assert len(truth.users) == 50
    assert set(truth.policies) == {"at_start", "before_shift", "after_shift", "at_end"}
    start = truth.policies["at_start"]
    assert start.uniform_ctr < start.best_for_all_ctr < start.best_per_segment_ctr


def test_progress_ends_where_the_truth_does(settings: SimulatorSettings, stage: Stage, tmp_path: Path) -> None:
    truth = session(settings, stage, ListSink(), tmp_path).run()
    progress = msgspec.json.decode((tmp_path / "progress.json").read_bytes(), type=Progress)
    assert progress.phase == "done"
    assert progress.produced == truth.produced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["progress.json", "truth.json"]


def test_two_runs_of_a_seed_are_the_same(settings: SimulatorSettings, stage: Stage, tmp_path: Path) -> None:
    sinks = [ListSink(), ListSink()]
    truths = [session(settings, stage, sink, tmp_path).run() for sink in sinks]
    assert sinks[0].events == sinks[1].events
    assert truths[0] == truths[1]


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (ShiftSettings(n_categories=0), []),
        (ShiftSettings(categories=("lamps",)), ["lamps"]),
        (ShiftSettings(n_categories=1, kind="driver", at=0.1), None),
    ],
)
def test_shifts_are_those_of_the_settings(
    settings: SimulatorSettings, stage: Stage, tmp_path: Path, shift: ShiftSettings, expected: list[str] | None
) -> None:
    traffic = TrafficSettings(n_impressions=300)
    changed = settings.model_copy(update={"shift": shift, "traffic": traffic})
    truth = session(changed, stage, ListSink(), tmp_path).run()
    if expected is None:
        (product,) = [p for p in truth.products if p.shifted]
        assert product.at_start.driver != product.at_end.driver
        assert truth.shifted_after_impressions == 30
    else:
        assert truth.shifted_categories == expected
        assert (truth.shifted_at_ms is None) == (not expected)


def test_a_stopped_run_still_tells_the_truth(settings: SimulatorSettings, stage: Stage, tmp_path: Path) -> None:
    sink = ListSink()
    running = session(settings, stage, sink, tmp_path, should_stop=lambda: len(sink.events) > 800)
    truth = running.run()
    assert not truth.completed
    assert 0 < truth.n_impressions < 3_000
    assert running.traffic.n_on_their_way == 0
    assert msgspec.json.decode((tmp_path / "progress.json").read_bytes())["phase"] == "stopped"


class OneCreative:
    """Decides always on one creative of a product."""

    def __init__(self, product_id: str, creative_id: str) -> None:
        self.product_id, self.creative_id = product_id, creative_id

    def decide(self, requests: Sequence[Request]) -> list[Decision]:
        return [
            Decision(self.creative_id if r.product_id == self.product_id else f"{r.product_id}-c00") for r in requests
        ]


def generated(stage: Stage, prompt: str | None) -> Creative:
    return Creative(
        creative_id="new", product_id=stage.products[0].product_id, created_at_ms=1, prompt=prompt, origin="generated"
    )


def ctr_of_new(truth: Truth) -> float:
    n_impressions, n_clicks = truth.by_creative["new"]
    return n_clicks / n_impressions


def test_generated_creatives_are_liked_by_their_prompt(
    settings: SimulatorSettings, stage: Stage, tmp_path: Path
) -> None:
    one = settings.model_copy(update={"shift": ShiftSettings(n_categories=0)})
    product = stage.products[0].product_id
    ctrs = stage.world.segment_ctrs(0, np.stack([c.style for c in stage.creatives[0]])).mean(axis=0)
    expected = {}
    for name, place in (("liked", int(ctrs.argmax())), ("disliked", int(ctrs.argmin()))):
        tail = Announcements([], [generated(stage, stage.creatives[0][place].prompt.text)])
        truth = session(one, stage, ListSink(), tmp_path, decider=OneCreative(product, "new"), tail=tail).run()
        assert truth.n_creatives_learned == 1
        assert truth.n_creatives_without_style == 0
        assert "new" in truth.products[0].at_end.ctr_by_segment
        expected[name] = ctr_of_new(truth)
    assert expected["liked"] > expected["disliked"]


def test_a_creative_that_is_never_announced_is_neutral_and_counted(
    settings: SimulatorSettings, stage: Stage, tmp_path: Path
) -> None:
    decider = OneCreative(stage.products[0].product_id, "new")
    truth = session(settings, stage, ListSink(), tmp_path, decider=decider, tail=Announcements()).run()
    assert truth.n_creatives_learned == 0
    assert truth.n_creatives_without_style == 1


def test_the_style_book_grows_and_reads_any_prompt(stage: Stage) -> None:
    book = StyleBook(stage)
    product = stage.products[1].product_id
    prompt = Prompt("x", "pine forest", "cool", "golden hour", "confetti", "close-up")
    for number in range(400):
        book.learn(Creative(creative_id=f"n{number}", product_id=product, created_at_ms=1, prompt=prompt.text))
    book.learn(Creative(creative_id="n0", product_id=product, created_at_ms=1, prompt="something else entirely"))
    book.learn(Creative(creative_id="by people", product_id=product, created_at_ms=1))
    book.learn(Creative(creative_id="elsewhere", product_id="of another shop", created_at_ms=1, prompt=prompt.text))
    np.testing.assert_array_equal(book.styles(["n0", "n399"]), np.stack([style_of(prompt)] * 2))
    np.testing.assert_array_equal(book.styles(["by people"]), np.zeros((1, 8)))
    assert "elsewhere" not in book
    assert book.n_learned == 401
    assert book.n_without_style == 1
    for ids, creatives in zip(book.ids_by_product()[2:], stage.creatives[2:], strict=True):
        assert ids == [creative.creative_id for creative in creatives]


def test_the_second_staging_renders_nothing(settings: SimulatorSettings, stage: Stage) -> None:
    class NoRenderer(ProceduralRenderer):
        def render(self, cutout: Image.Image, prompt: str, *, seed: int, size_px: int = 512) -> Rendering:
            raise AssertionError("rendered again")

    again = set_stage(settings, NoRenderer())
    assert [c.image_sha256 for cs in again.creatives for c in cs] == [
        c.image_sha256 for cs in stage.creatives for c in cs
    ]
    assert all(c.image_path.is_file() for cs in again.creatives for c in cs)
    for creatives in again.creatives:
        assert 6 <= len(creatives) <= 7
        assert len({c.prompt.scene for c in creatives}) == len(creatives)


def service(handler: Callable[[httpx.Request], httpx.Response], clock: Clock) -> DecisionService:
    client = httpx.Client(base_url=URL, transport=httpx.MockTransport(handler))
    return DecisionService(URL, timeout_s=1, max_wait_s=5, client=client, sleep=clock.sleep, clock=clock)


def shop(stage: Stage, n_processed: Callable[[], int]) -> Callable[[httpx.Request], httpx.Response]:
    chance = uniform(stage)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/products":
            known = [{"product_id": cs[0].product_id, "n_creatives": len(cs)} for cs in stage.creatives]
            return httpx.Response(200, json={"products": known})
        if request.url.path == "/v1/lag":
            return httpx.Response(200, json={"n_impressions_processed": n_processed()})
        asked = msgspec.convert(msgspec.json.decode(request.content)["requests"], list[Request])
        return httpx.Response(200, content=msgspec.json.encode({"decisions": chance.decide(asked)}))

    return answer


def test_a_run_with_the_service_stays_within_its_lead(
    settings: SimulatorSettings, stage: Stage, tmp_path: Path
) -> None:
    leads: list[int] = []
    sink, earlier = ListSink(), 10_000  # the state holds impressions of an earlier run

    def n_processed() -> int:
        n_sent = sum(isinstance(e, Impression) for e in sink.events)
        done[0] = min(n_sent, done[0] + 100)
        leads.append(n_sent - done[0])
        return earlier + done[0]

    done = [0]
    clock = Clock()
    decider = service(shop(stage, n_processed), clock)
    held = settings.model_copy(update={"max_ahead": 700})
    truth = session(held, stage, sink, tmp_path, decider=decider, service=decider).run()
    assert truth.completed
    assert len(leads) > 10
    assert max(leads) <= 700


def test_a_consumer_that_stands_still_ends_the_run(settings: SimulatorSettings, stage: Stage, tmp_path: Path) -> None:
    decider = service(shop(stage, lambda: 0), Clock())
    held = settings.model_copy(update={"max_ahead": 700})
    with pytest.raises(ConsumerStalled, match=r"has processed none for 12\d s"):
        session(held, stage, ListSink(), tmp_path, decider=decider, service=decider).run()


def test_products_that_are_never_registered_end_the_run(
    settings: SimulatorSettings, stage: Stage, tmp_path: Path
) -> None:
    decider = service(lambda request: httpx.Response(200, json={"products": []}), Clock())
    with pytest.raises(NotRegistered, match="does not know 6 of the announced products"):
        session(settings, stage, ListSink(), tmp_path, decider=decider, service=decider).run()


REQUESTS = [Request("u", "p", {"age": "18-20"})]
GOOD = {"decisions": [{"creative_id": "c", "p_shown": 0.5, "arm": "a", "experiment": "e"}]}


def test_the_service_is_asked_again_after_a_fault() -> None:
    answers: list[httpx.Response | Exception] = [
        httpx.ConnectError("refused"),
        httpx.Response(503, text="starting"),
        httpx.Response(200, json=GOOD),
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        assert msgspec.json.decode(request.content) == {
            "requests": [{"user_id": "u", "product_id": "p", "attributes": {"age": "18-20"}}]
        }
        result = answers.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    clock = Clock()
    assert service(answer, clock).decide(REQUESTS) == [Decision("c", 0.5, "a", "e")]
    assert clock.now == pytest.approx(0.3, abs=0.01)  # pauses of 0.1 s and 0.2 s


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (httpx.Response(500, text="broken"), DecisionServiceDown, "no good answer for .* status 500 broken"),
        (httpx.Response(422, text="what?"), BadDecision, "status 422 what"),
        (httpx.Response(200, json={"decisions": []}), BadDecision, "0 decisions for 1 requests"),
        (httpx.Response(200, json={"decisions": [{}]}), BadDecision, "missing required field"),
        (httpx.Response(200, text="<html>"), BadDecision, "malformed"),
    ],
)
def test_bad_answers_are_told_apart(answer: httpx.Response, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        service(lambda request: answer, Clock()).decide(REQUESTS)


def test_uniform_shows_all_creatives_alike() -> None:
    decider = UniformDecider({"p": ["a", "b", "c", "d"]}, np.random.default_rng(0))
    shown = [d.creative_id for d in decider.decide(REQUESTS * 8_000)]
    for creative in "abcd":
        assert shown.count(creative) == pytest.approx(2_000, abs=150)
    assert decider.decide(REQUESTS)[0].p_shown == 0.25
