"""The OpenAI routes as both daemons mount them: find the model's name, lend an upstream, relay."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.errors import Hop, InvalidRequest, NotFound
from wire.metrics import Metrics
from wire.relay import Relay, Upstream
from wire.reply import reply

RELAYED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
)


class Routing(msgspec.Struct):
    """The only fields of a body that are read on the way."""

    model: str


_ROUTING = msgspec.json.Decoder(Routing)


class Backend(Protocol):
    """What a daemon must be able to do for the OpenAI routes."""

    def upstream(self, model: str) -> AbstractAsyncContextManager[Upstream]:
        """Who answers for this model; raises :class:`HiveError` when entered and nobody can."""

    def served_models(self) -> list[dict[str, Any]]:
        """OpenAI model objects of what can be asked now."""


def openai_routes(backend: Backend, *, hop: Hop, metrics: Metrics) -> list[Route]:
    """Every route that an engine may serve, and the list of models."""

    async def relay(request: Request) -> Response:
        body = await request.body()
        model = routed_model(body)
        observe = metrics.request_observer(request.url.path)
        return Relay(request, body, backend.upstream(model), hop=hop, observe=observe)

    async def models(request: Request) -> Response:
        return reply({"object": "list", "data": backend.served_models()})

    async def model(request: Request) -> Response:
        wanted = request.path_params["model"]
        for served in backend.served_models():
            if served["id"].lower() == wanted.lower():
                return reply(served)
        known = ", ".join(served["id"] for served in backend.served_models()) or "none"
        raise NotFound(
            f"No model '{wanted[:256]}' is loaded. Loaded models: {known}.", code="model_not_found"
        )

    return [
        *(Route(path, relay, methods=["POST"]) for path in RELAYED),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model:path}", model, methods=["GET"]),
    ]


def routed_model(body: bytes) -> str:
    """The ``model`` of a request's body.

    :raises InvalidRequest: no UTF-8, no JSON object, or no model
    """
    try:
        body.isascii() or body.decode("utf-8")
        model = _ROUTING.decode(body).model
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not UTF-8 (byte {error.start}). Send UTF-8 JSON.", code="invalid_utf8"
        ) from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"The body must be a JSON object with the name of a model in 'model': {error}.",
            param="model",
        ) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not 0 < len(model) <= 1024:
        raise InvalidRequest("'model' must be 1 to 1024 characters.", param="model")
    return model
