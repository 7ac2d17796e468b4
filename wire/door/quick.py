"""Routes of the ASGI application that are asked thousands of times a second, served without it.

The very functions that the application has, given the same requests: between the door and them
there is no second parser, no middleware and no chain of handlers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final

from starlette.requests import Request as AsgiRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Scope

from operations.errors import Forbidden, HiveError, Unauthorized
from wire.answering import Answering
from wire.door.body import SMALL_BYTES
from wire.door.door import Request, Serve
from wire.errors import REQUEST_ID
from wire.http1.head import RequestHead
from wire.log import REQUEST_ID as LOGGED_ID
from wire.trust import CALLER

Endpoint = Callable[[AsgiRequest], Awaitable[Response]]

_LENGTH: Final = b"content-length"  # the answer's own


class Quick:
    """POST routes that read a small body whole, and answer in one piece."""

    def __init__(
        self, routes: Iterable[Route], refused: Callable[[Scope, HiveError], None]
    ) -> None:
        """:param refused: as in :func:`wire.errors.handlers`"""
        self._refused = refused
        posts = [route for route in routes if "POST" in (route.methods or ())]
        self._exact = {
            route.path: partial(self._serve, route.endpoint, {})
            for route in posts
            if not route.param_convertors
        }
        self._patterns = [
            (route.path_regex, route.endpoint) for route in posts if route.param_convertors
        ]

    def __call__(self, head: RequestHead) -> Serve | None:
        """Who serves a request; None: the ASGI application, which decodes paths and chunks."""
        path = head.path
        if head.method != "POST" or head.length is None or head.length > SMALL_BYTES or "%" in path:
            return None
        if (exact := self._exact.get(path)) is not None:
            return exact
        for pattern, endpoint in self._patterns:
            if (found := pattern.match(path)) is not None:
                return partial(self._serve, endpoint, found.groupdict())
        return None

    async def _serve(
        self, endpoint: Endpoint, params: dict[str, Any], asked: Request, answer: Answering
    ) -> None:
        LOGGED_ID.set(asked.request_id)
        path, _, query = asked.target.partition("?")
        scope: Scope = {
            "type": "http",
            "method": asked.method,
            "path": path,
            "query_string": query.encode("latin-1"),
            "headers": [
                (name.encode("latin-1"), value.encode("latin-1"))
                for name, value in asked.headers.items()
            ],
            "client": (asked.address, 0),
            "path_params": params,
            CALLER: asked.caller,
            REQUEST_ID: asked.request_id,
        }
        try:
            response = await endpoint(_Whole(scope, asked.body))
        except (Unauthorized, Forbidden) as error:
            self._refused(scope, error)
            raise
        headers = [header for header in response.raw_headers if header[0] != _LENGTH]
        answer.whole(response.status_code, headers, bytes(response.body))


class _Whole(AsgiRequest):
    """A request whose body has come."""

    def __init__(self, scope: Scope, whole: object) -> None:
        super().__init__(scope, _never)
        assert isinstance(whole, bytes)
        self._whole = whole

    async def body(self) -> bytes:
        return self._whole


async def _never() -> Message:
    """Nothing more comes: who hangs up has his request's task cancelled."""
    never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await never
