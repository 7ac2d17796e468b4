"""Every route of a queen on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from operations.hosts import Ready
from queen.dispatcher import dispatcher_routes
from queen.registry import gathered
from wire.errors import handlers
from wire.guard import Guard
from wire.jobs_api import event_stream, job_routes
from wire.openai import model_routes
from wire.reply import reply
from wire.trust_api import caller_of, parsed, trust_routes

if TYPE_CHECKING:
    from queen.queen import Queen


def build(queen: Queen) -> ASGIApp:
    """The application of a started queen."""

    async def health(request: Request) -> Response:
        known = caller_of(request).kind != "stranger"
        return reply(await queen.health() if known else {"ok": True})

    async def info(request: Request) -> Response:
        return reply(queen.info)

    async def hives(request: Request) -> Response:
        return reply({"hives": queen.registry.hives(), "unheard": queen.registry.unheard()})

    async def capabilities(request: Request) -> Response:
        return reply({"devices": gathered(queen.registry.hives(), "devices")})

    async def heartbeats(request: Request) -> Response:
        return event_stream(queen.heartbeats())

    async def ready(request: Request) -> Response:
        hello = parsed(Ready, await request.body(), "ready")
        return reply(queen.welcome(hello, caller_of(request)))

    async def shutdown(request: Request) -> Response:
        queen.shut_down()
        return reply({"status": "stopping"})

    metrics = queen.metrics.route()

    async def scrape(request: Request) -> Response:
        await queen.house.count()
        scraped: Response = await metrics.endpoint(request)
        return scraped

    app = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/v1/info", info, methods=["GET"]),
            Route("/v1/capabilities", capabilities, methods=["GET"]),
            Route("/v1/heartbeats/stream", heartbeats, methods=["GET"]),
            Route("/v1/hives", hives, methods=["GET"]),
            Route("/v1/hive/ready", ready, methods=["POST"]),
            Route("/v1/shutdown", shutdown, methods=["POST"]),
            Route(metrics.path, scrape, methods=["GET"]),
            *trust_routes(queen.trust, lambda: None),
            *job_routes(queen.jobs, queen.direct.job_stream),
            *model_routes(queen.served_models),
            *queen.task_routes,
            *dispatcher_routes(queen.house, queen.targets, queen.settings.max_queue),
        ],
        exception_handlers=handlers("queen", queen.trust.tell),
    )
    app.router.redirect_slashes = False
    return Guard(app, hop="queen", gate=queen.gate)
