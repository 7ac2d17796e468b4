"""A proxy before a daemon that, on command, refuses, loses answers and cuts streams."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

RETRY_AFTER_S = 1
_HOP_BY_HOP = {"transfer-encoding", "connection", "content-length", "host"}


class Flaky:
    """:ivar url: where it listens

    :ivar refuse: so many requests are answered 503, with ``Retry-After``, and not passed on
    :ivar lose: so many are passed on and done, and their answers are lost with the connection
    :ivar seen: methods and paths, of all that came
    """

    def __init__(self, upstream: str, http: aiohttp.ClientSession) -> None:
        self._upstream = upstream
        self._http = http
        self._requests: dict[web.StreamResponse, web.Request] = {}
        self.url = ""
        self.refuse = 0
        self.lose = 0
        self.seen: list[str] = []

    @property
    def streams(self) -> int:
        return len(self._requests)

    def cut(self) -> None:
        """Break off every answer that is still streaming."""
        for request in self._requests.values():
            _abort(request)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(f"{request.method} {request.path}")
        if self.refuse:
            self.refuse -= 1
            return web.json_response(
                {"error": {"message": "Not now.", "type": "unavailable_error"}},
                status=503,
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        async with self._http.request(
            request.method,
            self._upstream + request.raw_path,
            data=await request.read(),
            headers={k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP},
        ) as answer:
            if answer.content_type == "text/event-stream":
                return await self._stream(request, answer)
            body = await answer.read()
        if self.lose:
            self.lose -= 1
            _abort(request)
        headers = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
        return web.Response(body=body, status=answer.status, headers=headers)

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        passed = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await passed.prepare(request)
        self._requests[passed] = request
        try:
            async for chunk in answer.content.iter_any():
                await passed.write(chunk)
        finally:
            del self._requests[passed]
        return passed


@contextlib.asynccontextmanager
async def flaky(upstream: str) -> AsyncIterator[Flaky]:
    """In front of the daemon at this URL."""
    async with aiohttp.ClientSession() as http:
        proxy = Flaky(upstream, http)
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", proxy.serve)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        proxy.url = f"http://127.0.0.1:{port}"
        try:
            yield proxy
        finally:
            proxy.cut()
            await runner.cleanup()


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
