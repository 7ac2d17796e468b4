"""The routes of trust, the same on queen and hive agent: the hello, and which keys are revoked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.errors import InvalidRequest, from_validation
from operations.operations import parse_json_object
from wire.keys import KEY_ID, Caller
from wire.proof import HELLO, Hello
from wire.reply import reply
from wire.revocations import MAX_REVOKED
from wire.trust import CALLER, Trust

REVOKED = "/v1/keys/revoked"

M = TypeVar("M", bound=BaseModel)


class Revoked(BaseModel):
    """``POST /v1/keys/revoked``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key_ids: list[str] = Field(max_length=MAX_REVOKED)


def caller_of(request: Request) -> Caller:
    """Who sent a request, as the guard found out."""
    caller: Caller = request.scope[CALLER]
    return caller


def parsed(cls: type[M], body: bytes, what: str) -> M:
    """:raises InvalidRequest: it is not what was asked for, and where"""
    return validated(cls, parse_json_object(body), what)


def validated(cls: type[M], payload: dict[str, Any], what: str) -> M:
    """As :func:`parsed`, of JSON that has been decoded."""
    try:
        return cls.model_validate(payload)
    except ValidationError as error:
        raise from_validation(error, what) from None
    except RecursionError:
        raise InvalidRequest(f"{what}: the JSON is nested too deeply.") from None


def trust_routes(trust: Trust, changed: Callable[[], None]) -> list[Route]:
    """:param changed: told when a key has been revoked"""

    async def hello(request: Request) -> Response:
        said = parsed(Hello, await request.body(), "hello")
        return reply(trust.greet(said, request.scope))

    async def revoked(request: Request) -> Response:
        return reply({"key_ids": trust.revocations.listed})

    async def revoke(request: Request) -> Response:
        key_ids = parsed(Revoked, await request.body(), "revoked").key_ids
        if trust.revocations.add(key_id for key_id in key_ids if KEY_ID.fullmatch(key_id)):
            changed()
        return reply({"key_ids": trust.revocations.listed})

    return [
        Route(HELLO, hello, methods=["POST"]),
        Route(REVOKED, revoked, methods=["GET"]),
        Route(REVOKED, revoke, methods=["POST"]),
    ]
