"""The one error envelope, and the exception handlers that write it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ExceptionHandler, Scope

from operations.errors import (
    BY_STATUS,
    CallerGone,
    Forbidden,
    HiveError,
    Hop,
    InvalidRequest,
    MethodNotAllowed,
    Unauthorized,
)

log = logging.getLogger(__name__)

BROKEN = "Something broke inside this daemon; its log has the details. Please report."
REQUEST_ID = "hive.request_id"  # key in the ASGI scope


def envelope(error: HiveError, hop: Hop, request_id: str) -> bytes:
    """``{"error": {...}}`` as JSON bytes."""
    return to_json({"error": error.body(hop, request_id)}, exclude_none=True)


def answer(error: HiveError, hop: Hop, request_id: str) -> Response:
    """The error as an HTTP response."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return Response(
        envelope(error, hop, request_id),
        status_code=error.status,
        media_type="application/json",
        headers=headers,
    )


def handlers(
    hop: Hop, refused: Callable[[Scope, HiveError], None]
) -> dict[type[Exception] | int, ExceptionHandler]:
    """Exception handlers for a Starlette application: every failure leaves in the envelope.

    :param refused: told of those that say no to the caller himself
    """

    def translate(request: Request, error: Exception) -> Response:
        if isinstance(error, Unauthorized | Forbidden):
            refused(request.scope, error)
        told = as_hive_error(request, error)
        response = answer(told, hop, request.scope.get(REQUEST_ID, ""))
        if isinstance(told, MethodNotAllowed):
            response.headers["allow"] = ", ".join(sorted(methods_at(request)))
        return response

    def nobody_listens(request: Request, error: Exception) -> Response:
        return Response(status_code=CallerGone.status)

    return {
        ClientDisconnect: nobody_listens,
        HiveError: translate,
        HTTPException: translate,
        Exception: translate,
    }


def methods_at(request: Request) -> set[str]:
    """The methods that a request's path takes, of all routes there (RFC 9110, 15.5.6)."""
    there = (
        route.methods or ()
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    )
    return set().union(*there)


def as_hive_error(request: Request, error: Exception) -> HiveError:
    """What a failure looks like to the caller; unexpected ones lose their details."""
    if isinstance(error, HiveError):
        return error
    if isinstance(error, HTTPException):
        cls = BY_STATUS.get(error.status_code, InvalidRequest)
        route = f"{request.method} {request.url.path[:128]}"
        what = {404: f"There is no route {route}.", 405: f"{route}: the method is not allowed."}
        text = what.get(error.status_code, f"{route}: {error.detail}.")
        return cls(f"{text} The routes are listed in the README.")
    return HiveError(BROKEN)
