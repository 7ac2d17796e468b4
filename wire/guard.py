"""What stands before every route: request ids, who may speak, how much may be sent."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from operations.errors import (
    Forbidden,
    HiveError,
    Hop,
    InvalidRequest,
    TooLarge,
    UnsupportedMediaType,
)
from wire import errors
from wire.log import REQUEST_ID
from wire.serve import CannotStart

MAX_BODY_BYTES = 64 * 1024 * 1024
DRAIN_S = 10.0  # how long the rest of a refused body is read, so that the caller sees the answer

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """ASGI middleware, the outermost.

    - gives each request an id (the caller's ``x-request-id`` if it is a sane one) and returns it
    - takes requests only under a loopback ``Host`` and from no foreign ``Origin``, so that no web
      page can drive a daemon through a browser (cross-origin requests, DNS rebinding)
    - takes bodies only as ``application/json`` and only up to ``max_body`` bytes
    """

    def __init__(self, app: ASGIApp, *, hop: Hop, max_body: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._hop = hop
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

        try:
            check_host(headers)
            check_origin(headers)
            check_body(headers, self._max_body)
        except HiveError as error:
            if isinstance(error, TooLarge) and "expect" not in headers:
                await _drain(receive, 4 * self._max_body)
            response = errors.answer(error, self._hop, request_id)
            response.headers["connection"] = "close"
            await response(scope, receive, send_with_id)
            return

        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                if message.get("more_body"):
                    await _drain(receive, 4 * self._max_body)
                raise too_large(self._max_body)
            return message

        await self._app(scope, receive_counted, send_with_id)


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
    if not (length.isascii() and length.isdigit()):
        raise InvalidRequest("The Content-Length is not a number.")
    if int(length[:20]) > max_body:
        raise too_large(max_body)
    if int(length[:20]) or "transfer-encoding" in headers:
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


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host is None:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_open_host(host: str) -> None:
    """Callers and daemons cannot prove who they are yet, so nobody else may reach a daemon.

    :raises CannotStart: the host is not a loopback address
    """
    if not is_loopback(host):
        raise CannotStart(
            f"This version listens on loopback only, not on {host}: it cannot check yet who calls. "
            "Leave --host out; from other machines use an ssh tunnel."
        )


def hostname(url: str) -> str | None:
    """The host of a URL; None if it has none, or is no URL."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


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
