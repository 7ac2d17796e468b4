"""Every route of a hive agent on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from operations.hosts import Capabilities
from wire.errors import handlers
from wire.guard import Guard
from wire.headers import QUEEN_HEADER
from wire.jobs_api import event_stream, job_routes
from wire.openai import model_routes
from wire.reply import reply
from wire.trust_api import caller_of, trust_routes

if TYPE_CHECKING:
    from hive_agent.agent import Agent


def build(agent: Agent) -> ASGIApp:
    """The application of a started agent."""

    async def health(request: Request) -> Response:
        known = caller_of(request).kind != "stranger"
        return reply(agent.health() if known else {"ok": True})

    async def info(request: Request) -> Response:
        return reply(agent.info)

    async def capabilities(request: Request) -> Response:
        return reply(Capabilities(hive_id=agent.name, devices=agent.pulse.devices))

    async def heartbeats(request: Request) -> Response:
        return event_stream(agent.pulse.listen(request.headers.get(QUEEN_HEADER)))

    async def shutdown(request: Request) -> Response:
        agent.stop.ask("POST /v1/shutdown")
        return reply({"status": "stopping"})

    app = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/v1/info", info, methods=["GET"]),
            Route("/v1/capabilities", capabilities, methods=["GET"]),
            Route("/v1/heartbeats/stream", heartbeats, methods=["GET"]),
            Route("/v1/shutdown", shutdown, methods=["POST"]),
            agent.metrics.route(),
            *trust_routes(agent.trust, agent.pulse.changed),
            *job_routes(agent.jobs),
            *model_routes(agent.served_models),
        ],
        exception_handlers=handlers("hive", agent.trust.tell),
    )
    app.router.redirect_slashes = False
    return Guard(app, hop="hive", gate=agent.gate)
