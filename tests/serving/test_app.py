"""The HTTP API: what it answers, and what it refuses with which status."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.app import MAX_REQUESTS, build_app
from serving.decisions import DecisionService
from serving.settings import ServingSettings
from state.reading import StateReader


@pytest.fixture
def client(service: DecisionService, settings: ServingSettings) -> Iterator[TestClient]:
    with TestClient(build_app(service, settings)) as opened:
        yield opened


def body(*products: str) -> dict[str, Any]:
    return {
        "requests": [
            {"user_id": f"u{n}", "product_id": product, "attributes": {"age": "old"}}
            for n, product in enumerate(products)
        ]
    }


def test_decisions_come_in_the_order_of_the_requests(client: TestClient) -> None:
    answer = client.post("/v1/decide", json=body("split", "fresh"))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    split, fresh = answer.json()["decisions"]
    assert set(split) == {"creative_id", "p_shown", "arm", "experiment", "group_id"}
    assert split["arm"] in ("group", "all")
    assert split["experiment"] == "groups"
    assert fresh == {
        "creative_id": fresh["creative_id"],
        "p_shown": 0.25,
        "arm": None,
        "experiment": None,
        "group_id": None,
    }
    assert client.post("/v1/decide", json={"requests": []}).json() == {"decisions": []}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated"),
        (b"nonsense", "malformed"),
        (b"[]", "Expected `object`"),
        (b"{}", "requests"),
        (b'{"requests": {}}', "requests"),
        (b'{"requests": [{"user_id": "u"}]}', "product_id"),
        (b'{"requests": [{"user_id": 1, "product_id": "split"}]}', "user_id"),
        (b'{"requests": [{"user_id": "u", "product_id": "split", "attributes": {"age": 3}}]}', "attributes"),
        (b'{"requests": [{"user_id": "\xff", "product_id": "split"}]}', "utf-8"),
        (b'{"requests": [{"user_id": "\\ud800 and so on", "product_id": "split"}]}', "surrogate"),
        (b"[" * 100_000, ""),
        (b'{"a":' * 100_000, ""),
    ],
)
def test_a_body_that_is_no_decide_call_is_a_400(client: TestClient, content: bytes, said: str) -> None:
    answer = client.post("/v1/decide", content=content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.startswith("the body is no decide call: ")
    assert error.endswith("; nothing was decided")
    assert said.lower() in error.lower()  # its words differ between versions of msgspec


@pytest.mark.parametrize("product", ["unheard of", "bare"])
def test_a_product_that_cannot_be_served_is_a_404_for_the_whole_call(client: TestClient, product: str) -> None:
    answer = client.post("/v1/decide", json=body("split", product))
    assert answer.status_code == 404
    assert f"product '{product}' is unknown or has no registered creative" in answer.json()["error"]


def test_too_many_requests_are_a_413(client: TestClient) -> None:
    most = client.post("/v1/decide", json=body(*["split"] * MAX_REQUESTS))
    assert (most.status_code, len(most.json()["decisions"])) == (200, MAX_REQUESTS)
    answer = client.post("/v1/decide", json=body(*["split"] * (MAX_REQUESTS + 1)))
    assert answer.status_code == 413
    assert (
        answer.json()["error"]
        == f"{MAX_REQUESTS + 1} requests in one call; at most {MAX_REQUESTS}; nothing was decided"
    )


def test_products_and_lag(client: TestClient) -> None:
    assert client.get("/v1/products").json() == {
        "products": [{"product_id": product, "n_creatives": 4} for product in ("fresh", "same", "split")]
    }
    assert client.get("/v1/lag").json() == {"n_impressions_processed": 5_000}
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/decide", 405), ("POST", "/v1/lag", 405), ("GET", "/v2", 404)]
)
def test_other_calls(client: TestClient, method: str, path: str, status: int) -> None:
    assert client.request(method, path).status_code == status


def test_the_policy_is_read_in_the_background_and_a_failure_is_survived(
    state: Any, reader: StateReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ServingSettings(refresh_ms=10, warm_up_impressions=1_000)
    service = DecisionService(reader, state.online, settings, impressions_topic=state.streams.topics.impressions)
    calls = 0
    refresh = service.refresh

    def sometimes() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("the disk is away")
        refresh()

    monkeypatch.setattr(service, "refresh", sometimes)
    with TestClient(build_app(service, settings)) as client:
        deadline = time.monotonic() + 10
        while not client.get("/v1/products").json()["products"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert client.post("/v1/decide", json=body("split")).status_code == 200
    assert calls >= 2
    assert "the policy could not be refreshed" in caplog.text
