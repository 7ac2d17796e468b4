"""What stands before every route of the control plane."""

from __future__ import annotations

import asyncio
import hashlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from operations.errors import HiveError, Hop, TooLarge
from wire import errors
from wire.gate import Gate, request_id_of, too_large
from wire.log import REQUEST_ID
from wire.trust import CALLER

DRAIN_S = 10.0  # how long the rest of a refused body is read, so that the caller sees the answer


class Guard:
    """ASGI middleware, the outermost.

    - gives each request an id (the caller's ``x-request-id`` if it is a sane one) and returns it
    - lets in whom :class:`wire.gate.Gate` lets in
    - reads no more of a body than the gate allows
    """

    def __init__(self, app: ASGIApp, *, hop: Hop, gate: Gate) -> None:
        self._app = app
        self._hop = hop
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope[errors.REQUEST_ID] = request_id = request_id_of(headers)
        REQUEST_ID.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            admitted = self._gate.admit(scope, headers)
        except HiveError as error:
            if isinstance(error, TooLarge) and "expect" not in headers:
                await _drain(receive, 4 * self._gate.limit(scope[CALLER]))
            response = errors.answer(error, self._hop, request_id)
            response.headers["connection"] = "close"
            await response(scope, receive, send_with_id)
            return

        received = 0
        limit, digest = admitted.max_body, admitted.digest
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
                    raise admitted.other_body()
            return message

        await self._app(scope, receive_checked, send_with_id)


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
