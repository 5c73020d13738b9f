"""The HTTP API: decisions in batches, and what can be served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.decisions import Decision, DecisionRequest, DecisionService, UnservableProductError
from serving.settings import ServingSettings

log = logging.getLogger(__name__)

MAX_REQUESTS = 10_000


class DecideBody(msgspec.Struct, frozen=True):
    """Body of a decide call."""

    requests: list[DecisionRequest]


class DecideAnswer(msgspec.Struct, frozen=True):
    """Answer to a decide call, in the order of its requests."""

    decisions: list[Decision]


def _json(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def build_app(service: DecisionService, settings: ServingSettings) -> Starlette:
    """Build the API over a decision service; the policy is refreshed in the background while it runs."""
    decoder = msgspec.json.Decoder(DecideBody)

    async def health(_: Request) -> Response:
        return _json({"status": "ok"})

    async def products(_: Request) -> Response:
        found = service.n_creatives()
        return _json({"products": [{"product_id": key, "n_creatives": count} for key, count in sorted(found.items())]})

    async def lag(_: Request) -> Response:
        return _json({"n_impressions_processed": service.n_impressions})

    async def decide(request: Request) -> Response:
        try:
            body = decoder.decode(await request.body())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _json({"error": f"the body is no decide call: {error}; nothing was decided"}, 400)
        if len(body.requests) > MAX_REQUESTS:
            return _json(
                {"error": f"{len(body.requests)} requests in one call; at most {MAX_REQUESTS}; nothing was decided"},
                413,
            )
        try:
            return _json(DecideAnswer(service.decide_many(body.requests)))
        except UnservableProductError as error:
            return _json({"error": str(error)}, 404)

    async def refresh_often() -> None:
        while True:
            try:
                await asyncio.to_thread(service.refresh)
            except Exception:
                log.exception("the policy could not be refreshed; decisions go on with the last one")
            await asyncio.sleep(settings.refresh_ms / 1000)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(refresh_often())
        yield
        task.cancel()

    return Starlette(
        routes=[
            Route("/healthz", health),
            Route("/v1/products", products),
            Route("/v1/lag", lag),
            Route("/v1/decide", decide, methods=["POST"]),
        ],
        lifespan=lifespan,
    )


def run_api(
    service: DecisionService, settings: ServingSettings, on_listening: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until SIGINT or SIGTERM; ``on_listening`` is told the address."""
    import socket

    import uvicorn

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    host, port = listener.getsockname()
    on_listening(f"http://{host}:{port}")
    server = uvicorn.Server(uvicorn.Config(build_app(service, settings), log_level="warning", lifespan="on"))
    server.run(sockets=[listener])
