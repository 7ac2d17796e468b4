"""What both daemons know of the OpenAI API: its routes, and which model a request is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.errors import InvalidRequest
from operations.hosts import Task
from operations.names import resolve
from operations.operations import MAX_TOKENS
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
    that only where the engine knows the model by another name (:func:`renamed`).

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
ROUTING_FIELDS = frozenset(Routing.__struct_fields__)


def model_routes(served_models: Callable[[], list[dict[str, Any]]]) -> list[Route]:
    """The list of models.

    :param served_models: OpenAI model objects of what can be asked now
    """

    async def models(request: Request) -> Response:
        return reply({"object": "list", "data": served_models()})

    async def model(request: Request) -> Response:
        served = {model["id"]: model for model in served_models()}
        return reply(served[resolve(request.path_params["model"], [(i, i) for i in served])])

    async def not_here(request: Request) -> Response:
        raise HTTPException(405)  # a POST does not come here: the door serves it

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model:path}", model, methods=["GET"]),
        *(Route(path, not_here, methods=["POST"]) for path in RELAYED),
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


_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def renamed(body: bytes, model: str) -> bytes:
    """A request's body with another ``model``, and every other field's bytes as they are.

    The order of the fields stays; of one that stands there twice, the last is kept.

    :raises InvalidRequest: it is no JSON object
    """
    try:
        fields = _FIELDS.decode(body)
        if msgspec.json.decode(fields.get("model", b"null")) == model:
            return body
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}.", code="invalid_json") from None
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
