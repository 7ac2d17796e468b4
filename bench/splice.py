"""The least that a relay on uvloop can do: ``python -P bench/splice.py HOST:PORT PORT``.

Each caller's connection gets one of its own to the upstream, and bytes go to and fro as they are:
no HTTP, no keys, no choice, no log. What is measured of it is the event loop and the kernel, the
share of a relay's cost that no care for its Python can take away.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop


class End(asyncio.Protocol):
    """One of the two ends; what it hears, it tells the other."""

    __slots__ = ("_early", "other", "transport")

    def __init__(self, other: End | None = None) -> None:
        self.other = other
        self.transport: asyncio.Transport | None = None
        self._early: list[bytes] = []  # heard before the other was there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.other is not None:
            self.other.joined(self)

    def joined(self, other: End) -> None:
        assert other.transport is not None
        self.other = other
        for data in self._early:
            other.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self._early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class Caller(End):
    """The end that somebody connected to; it makes the other one."""

    __slots__ = ("_task", "_upstream")

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._upstream = (host, port)
        self._task: asyncio.Task[object] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        connecting = loop.create_connection(lambda: End(self), *self._upstream)
        self._task = loop.create_task(connecting)


async def serve(upstream: str, port: int) -> None:
    host, _, number = upstream.rpartition(":")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Caller(host, int(number)), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2])))
