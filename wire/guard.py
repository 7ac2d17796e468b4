"""What stands before every route: request ids, who may speak, how much may be sent."""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from operations.errors import (
    Forbidden,
    HiveError,
    Hop,
    InvalidRequest,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from wire import errors
from wire.addresses import hostname, is_loopback
from wire.log import REQUEST_ID
from wire.proof import refused_signature
from wire.trust import Trust

MAX_BODY_BYTES = 64 * 1024 * 1024
STRANGERS_BODY_BYTES = 16 * 1024
DRAIN_S = 10.0  # how long the rest of a refused body is read, so that the caller sees the answer

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """ASGI middleware, the outermost.

    - gives each request an id (the caller's ``x-request-id`` if it is a sane one) and returns it
    - on a daemon that only listens on loopback: takes requests only under a loopback ``Host``, so
      that no web page can drive it (DNS rebinding); an open one asks everybody for a key
    - takes none from a foreign ``Origin``
    - finds out who calls and whether they may (:mod:`wire.trust`)
    - takes bodies only as ``application/json`` and only up to ``max_body`` bytes
    """

    def __init__(
        self, app: ASGIApp, *, hop: Hop, trust: Trust, max_body: int = MAX_BODY_BYTES
    ) -> None:
        self._app = app
        self._hop = hop
        self._trust = trust
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req-{uuid.uuid4().hex}"
        scope[errors.REQUEST_ID] = request_id
        REQUEST_ID.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        limit = STRANGERS_BODY_BYTES
        try:
            if not self._trust.listens_openly:
                check_host(headers)
            check_origin(headers)
            caller, digest = self._trust.admit(scope, headers)
            limit = STRANGERS_BODY_BYTES if caller.kind == "stranger" else self._max_body
            check_body(headers, limit)
        except HiveError as error:
            if isinstance(error, Unauthorized | Forbidden):
                self._trust.tell(scope, error)
            if isinstance(error, TooLarge) and "expect" not in headers:
                await _drain(receive, 4 * limit)
            response = errors.answer(error, self._hop, request_id)
            response.headers["connection"] = "close"
            await response(scope, receive, send_with_id)
            return

        received = 0
        hashed = None if digest is None else hashlib.sha256()

        async def receive_checked() -> Message:
            nonlocal received
            message = await receive()
            body = message.get("body", b"")
            received += len(body)
            if received > limit:
                if message.get("more_body"):
                    await _drain(receive, 4 * limit)
                raise too_large(limit)
            if hashed is not None and message["type"] == "http.request":
                hashed.update(body)
                if not message.get("more_body") and hashed.hexdigest() != digest:
                    raise refused_signature("bad_signature")
            return message

        await self._app(scope, receive_checked, send_with_id)


def check_host(headers: Headers) -> None:
    """:raises Forbidden: the ``Host`` is not a name of this machine's loopback"""
    host = hostname(f"//{headers.get('host', '')}")
    if not is_loopback(host):
        raise Forbidden(
            "This daemon listens on loopback only and answers only to 'localhost' and 127.0.0.1. "
            "Use one of these as the host.",
            code="host_not_allowed",
        )


def check_origin(headers: Headers) -> None:
    """:raises Forbidden: the request comes from a web page of another origin"""
    origin = headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower():
        raise Forbidden(
            "Requests from web pages of another origin are not taken. Call from a program, "
            "without an Origin header.",
            code="origin_not_allowed",
        )


def check_body(headers: Headers, max_body: int) -> None:
    """:raises TooLarge: a declared length over the limit
    :raises UnsupportedMediaType: a body that is not declared as JSON
    """
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) <= 20):
        raise InvalidRequest("The Content-Length is not a number.")
    if int(length) > max_body:
        raise too_large(max_body)
    if int(length) or "transfer-encoding" in headers:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMediaType(
                "A body is taken only as JSON. Send 'Content-Type: application/json'."
            )


def too_large(max_body: int) -> TooLarge:
    return TooLarge(
        f"The body is larger than {max_body} bytes. Send less, or start the daemon with a larger "
        "--max-body."
    )


async def _drain(receive: Receive, limit: int) -> None:
    """Read and drop the rest of a body, bounded in bytes and time."""
    dropped = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while dropped < limit:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                dropped += len(message.get("body", b""))
    except TimeoutError:
        return
