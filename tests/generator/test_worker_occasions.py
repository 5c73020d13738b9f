"""What makes the worker draw: the latest shift of a product, what is worth its cost, and people's requests."""

from __future__ import annotations

import logging

import pytest

from generator.settings import RefreshSettings
from state.records import OffsetRecord
from streams.codec import encode
from tests.generator.bench import REQUESTS, MakeBench, request, shift


def later(number: int, product_id: str = "p-1") -> bytes:
    return encode(shift(f"shift-{number}", product_id, detected_at_ms=50_000 + number))


@pytest.mark.parametrize(
    ("numbers", "worked_off"),
    [([1, 2, 3], [3]), ([3, 1, 2], [3]), ([1, 3, 1, 2, 3], [3]), ([1], [1]), ([1, 1], [1])],
)
def test_of_the_shifts_that_wait_the_latest_of_a_product_is_worked_off(
    make_bench: MakeBench, numbers: list[int], worked_off: list[int]
) -> None:
    bench = make_bench()
    emitted = bench.start([*map(later, numbers), later(0, "p-2")])
    assert {c.caused_by for c in emitted if c.product_id == "p-1"} == {f"shift-{number}" for number in worked_off}
    assert len(emitted) == 4
    for number in set(numbers) - set(worked_off):
        record = bench.record(f"shift-{number}")
        assert (record.superseded_by, record.groups) == (f"shift-{max(numbers)}", [])
    assert bench.counts() == OffsetRecord(
        len(numbers) + 1, len(numbers) + 1, len(numbers) + 1, len(numbers) - len(set(numbers)), 0, 1_000
    )


def test_a_later_shift_that_cannot_be_used_supersedes_nothing(make_bench: MakeBench) -> None:
    bench = make_bench()
    broken = shift("shift-9", detected_at_ms=90_000, groups=[*shift().groups, shift().groups[0]])
    emitted = bench.start([later(1), encode(broken)])
    assert {creative.caused_by for creative in emitted} == {"shift-1"}
    assert [letter.reason for letter in bench.producer.dead_letters()] == ["invalid_field"]


def test_what_is_not_worth_its_cost_is_not_drawn_and_the_numbers_are_kept(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(refresh=RefreshSettings(value_per_click=0.0))
    with caplog.at_level(logging.INFO):
        assert bench.start([later(1)]) == []
    for group in bench.record().groups:
        assert group.decision is not None
        assert group.decision.refused == group.skipped
        assert "clicks more are expected in 7 days" in (group.skipped or "")
        assert group.decision.impressions_per_day == pytest.approx(43_200 / 2)
    assert "impressions a day" in caplog.text


def test_a_products_budget_of_a_day_is_kept(make_bench: MakeBench) -> None:
    bench = make_bench(refresh=RefreshSettings(cost_per_image=0.01, budget_per_product_day=0.03))
    payloads = [later(1), later(2), later(3), later(4, "p-2")]
    emitted = [creative for payload in payloads for creative in bench.start(payloads[: payloads.index(payload) + 1])]
    assert sum(creative.product_id == "p-1" for creative in emitted) == 3
    assert sum(creative.product_id == "p-2" for creative in emitted) == 2
    assert "0 is left of generator.refresh.budget_per_product_day" in (bench.record("shift-3").groups[0].skipped or "")
    payloads.append(encode(shift("shift-5", detected_at_ms=86_400_000)))
    assert len(bench.start(payloads)) == 2  # another day


def test_a_person_gets_what_is_asked_for_whatever_it_costs(make_bench: MakeBench) -> None:
    bench = make_bench(refresh=RefreshSettings(value_per_click=0.0, budget_per_product_day=0.0), min_share=0.9)
    (creative,) = bench.start([request(group_id=1), request(group_id=1)], topic=REQUESTS)
    assert (creative.group_id, creative.caused_by, creative.created_at_ms) == (1, "request-1", 70_000)
    record = bench.record("request-1")
    assert record.cause == "person"
    assert {group.group_id: group.skipped for group in record.groups} == {0: "only group 1 was asked for", 1: None}
    assert bench.counts(REQUESTS) == OffsetRecord(2, 2, 2, 1, 0, 1_000)
    assert len(bench.start([request(), request(), request("request-2")], topic=REQUESTS)) == 2


def test_other_requests_are_weighed(make_bench: MakeBench) -> None:
    bench = make_bench(refresh=RefreshSettings(value_per_click=0.0))
    assert bench.start([request(cause="fatigue", group_id=0)], topic=REQUESTS) == []
    assert bench.record("request-1").cause == "fatigue"


@pytest.mark.parametrize("group_id", [7, None])
def test_a_request_for_a_product_that_is_not_there_is_dead_lettered(
    make_bench: MakeBench, group_id: int | None
) -> None:
    bench = make_bench()
    bench.start([request(product_id="nobody", group_id=group_id)], topic=REQUESTS)
    assert [letter.reason for letter in bench.producer.dead_letters()] == ["unknown_product"]


def test_a_request_for_a_group_that_is_not_there_is_recorded(make_bench: MakeBench) -> None:
    bench = make_bench()
    assert bench.start([request(group_id=7)], topic=REQUESTS) == []
    assert {group.skipped for group in bench.record("request-1").groups} == {"only group 7 was asked for"}


def test_a_product_with_borrowed_groups_says_so(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.move_online_state(title="Red kettle", borrowed_from="p-2")
    emitted = bench.start([later(1)])
    assert len(emitted) == 2
    assert bench.record().borrowed_from == "p-2"
