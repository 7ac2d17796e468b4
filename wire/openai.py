"""The OpenAI routes as both daemons mount them: find the model's name, lend an upstream, relay."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.errors import Hop, InvalidRequest
from operations.hosts import Task
from operations.names import resolve
from operations.operations import MAX_TOKENS
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
TASKS: dict[str, Task] = {"/v1/embeddings": "embed", "/v1/rerank": "rerank"}
"""What a worker must have been started for; all other routes generate."""


Count = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class Routing(msgspec.Struct):
    """The only fields of a body that are read on the way; none but ``model`` is ever changed, and
    that only where the engine knows the model by another name (:func:`wire.relay.renamed`).

    The numbers have the bounds of the OpenAI reference, so that all engines refuse alike:
    llama.cpp takes a negative temperature or a million logprobs without a word.
    """

    model: Annotated[str, Meta(min_length=1, max_length=1024)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


_ROUTING = msgspec.json.Decoder(Routing)


class Backend(Protocol):
    """What a daemon must be able to do for the OpenAI routes."""

    def upstream(
        self, model: str, task: Task, failed: frozenset[str] = frozenset()
    ) -> AbstractAsyncContextManager[Upstream]:
        """Who answers for this model; raises :class:`HiveError` when entered and nobody can.

        :param failed: names of upstreams that have just failed; see :data:`wire.relay.Lease`
        """

    def served_models(self) -> list[dict[str, Any]]:
        """OpenAI model objects of what can be asked now."""


def openai_routes(backend: Backend, *, hop: Hop, metrics: Metrics) -> list[Route]:
    """Every route that an engine may serve, and the list of models."""

    async def relay(request: Request) -> Response:
        body = await request.body()
        model = routed_model(body)
        observe = metrics.request_observer(request.url.path)
        task = TASKS.get(request.url.path, "generate")
        lease = partial(backend.upstream, model, task)
        return Relay(request, body, lease, hop=hop, observe=observe)

    async def models(request: Request) -> Response:
        return reply({"object": "list", "data": backend.served_models()})

    async def model(request: Request) -> Response:
        served = {model["id"]: model for model in backend.served_models()}
        return reply(served[resolve(request.path_params["model"], [(i, i) for i in served])])

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
        reason, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`") or ("model" if "`model`" in reason else None)
        what = f"field '{field}'" if field else "the body"
        raise InvalidRequest(f"In this request, {what} is wrong: {reason}.", param=field) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}.", code="invalid_json") from None
    return model
