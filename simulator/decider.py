"""Deciders: who chooses the creatives that are shown, the decision service over HTTP or plain chance."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import httpx
import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0

T = TypeVar("T")


class Request(msgspec.Struct, frozen=True):
    """A user who looks at a product, with what is known of the user."""

    user_id: str
    product_id: str
    attributes: dict[str, str]


class Decision(msgspec.Struct, frozen=True):
    """What is shown for a request, with which chance, and by which arm of which experiment."""

    creative_id: str
    p_shown: float | None = None
    arm: str | None = None
    experiment: str | None = None


class Decider(Protocol):
    """Chooses the creatives that are shown."""

    def decide(self, requests: Sequence[Request]) -> list[Decision]:
        """Return one decision for each request."""
        ...


class UniformDecider:
    """Shows every creative of a product with the same chance.

    Parameters
    ----------
    creatives
        Product id to the ids of its creatives.
    """

    def __init__(self, creatives: Mapping[str, Sequence[str]], rng: np.random.Generator) -> None:
        self._decisions = {
            product: [Decision(c, 1.0 / len(ids), "uniform", None) for c in ids] for product, ids in creatives.items()
        }
        self._rng = rng

    def decide(self, requests: Sequence[Request]) -> list[Decision]:
        """Return one decision for each request."""
        draws = self._rng.random(len(requests)).tolist()
        decisions = []
        for request, draw in zip(requests, draws, strict=True):
            choices = self._decisions[request.product_id]
            decisions.append(choices[int(draw * len(choices))])
        return decisions


class DecisionServiceDown(RuntimeError):
    """The decision service did not answer for too long."""

    def __init__(self, url: str, waited_s: float, last: str) -> None:
        super().__init__(
            f"the decision service at {url} gave no good answer for {waited_s:.0f} s (last: {last}). The simulation "
            'stops here; start the service (`osmf serve`), or set simulator.decider = "uniform".'
        )


class BadDecision(RuntimeError):
    """The decision service answered something else than it was asked for."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"the decision service at {url} answered wrongly: {why}. Nothing was shown for this batch.")


class _Decisions(msgspec.Struct):
    decisions: list[Decision]


class _KnownProduct(msgspec.Struct):
    product_id: str
    n_creatives: int


class _KnownProducts(msgspec.Struct):
    products: list[_KnownProduct]


class _Lag(msgspec.Struct):
    n_impressions_processed: int


class DecisionService:
    """The decision service over HTTP; a call that cannot connect, or gets a 5xx, is tried again with growing pauses.

    Parameters
    ----------
    base_url
        Address of the service.
    timeout_s
        Longest wait for one answer.
    max_wait_s
        Longest time without a good answer before :class:`DecisionServiceDown`.
    client, sleep, clock
        Replaced in tests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        max_wait_s: float,
        client: httpx.Client | None = None,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_url = base_url
        self._client = client or httpx.Client(base_url=base_url, timeout=timeout_s, trust_env=False)
        self._max_wait_s = max_wait_s
        self._sleep = sleep
        self._clock = clock
        self._encoder = msgspec.json.Encoder()

    def decide(self, requests: Sequence[Request]) -> list[Decision]:
        """Return one decision for each request.

        Raises
        ------
        DecisionServiceDown
            When there is no good answer for ``max_wait_s``.
        BadDecision
            When the answer is not of the agreed form, or refuses the request.
        """
        body = self._encoder.encode({"requests": requests})
        decisions = self._ask("POST", "/v1/decide", _Decisions, body).decisions
        if len(decisions) != len(requests):
            raise BadDecision(self.base_url, f"{len(decisions)} decisions for {len(requests)} requests")
        return decisions

    def n_creatives(self) -> dict[str, int]:
        """Return how many creatives the service knows of each product."""
        known = self._ask("GET", "/v1/products", _KnownProducts)
        return {product.product_id: product.n_creatives for product in known.products}

    def n_impressions_processed(self) -> int:
        """Return how many impressions the consumer has processed."""
        return self._ask("GET", "/v1/lag", _Lag).n_impressions_processed

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, method: str, path: str, answer_type: type[T], body: bytes | None = None) -> T:
        started, pause = self._clock(), _FIRST_PAUSE_S
        headers = {"content-type": "application/json"} if body is not None else None
        while True:
            try:
                response = self._client.request(method, path, content=body, headers=headers)
            except httpx.TransportError as error:
                last = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    try:
                        return msgspec.json.decode(response.content, type=answer_type)
                    except msgspec.DecodeError as error:
                        raise BadDecision(self.base_url, f"{method} {path}: {error}") from error
                last = f"{method} {path}: status {response.status_code} {response.text[:200]}"
                if not response.is_server_error:
                    raise BadDecision(self.base_url, last)
            waited = self._clock() - started
            if waited >= self._max_wait_s:
                raise DecisionServiceDown(self.base_url, waited, last)
            self._sleep(pause)
            pause = min(_LONGEST_PAUSE_S, 2 * pause)
