"""An OpenAI-compatible server that takes bodies of any size and tells what it got.

``python -m tests.body_sink '{"models": ["sink"]}'`` prints its URL, and serves until its standard
input closes. It hashes a body as it comes and keeps its first and last bytes alone. A body whose
``model`` begins with ``slow`` is read no further than its first bytes until ``GET /go``; one of
``much`` is answered by :data:`MUCH`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from typing import Any, cast

import httptools
import uvloop

SHOWN = 200  # bytes of a body, from either end
MUCH = b'{"data":"%b","usage":{"prompt_tokens":1,"completion_tokens":7}}' % (b"much " * 6_000_000)


class Sink:
    """What all connections share."""

    def __init__(self, models: list[str]) -> None:
        self.models = models
        self.begun = 0
        self.whole = 0
        self.broken = 0
        self.stalled: set[asyncio.Transport] = set()


class Connection(asyncio.Protocol):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._target = b""
        self._reading = False
        self._began(b"")

    def _began(self, target: bytes) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self._size = 0
        self._first = b""
        self._last = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._sink.stalled.discard(self._transport)
        if self._reading:
            self._sink.broken += 1

    # httptools calls these.

    def on_url(self, url: bytes) -> None:
        self._began(url)

    def on_headers_complete(self) -> None:
        self._reading = self._parser.get_method() == b"POST"
        self._sink.begun += self._reading

    def on_body(self, data: bytes) -> None:
        if not self._size and b'"model":"slow' in data[:SHOWN]:
            self._transport.pause_reading()
            self._sink.stalled.add(self._transport)
        self._hash.update(data)
        self._size += len(data)
        self._first = (self._first + data)[:SHOWN]
        self._last = (self._last + data)[-SHOWN:]

    def on_message_complete(self) -> None:
        sink = self._sink
        if self._reading:
            self._reading = False
            sink.whole += 1
            if b'"much' in self._first:
                self._answer_much(chunked=b"much-chunked" in self._first)
                return
            self._answer(
                {
                    "sha256": self._hash.hexdigest(),
                    "size": self._size,
                    "first": self._first.decode("utf-8", "replace"),
                    "last": self._last.decode("utf-8", "replace"),
                }
            )
        elif self._target == b"/v1/models":
            self._answer({"object": "list", "data": [{"id": name} for name in sink.models]})
        else:
            if self._target == b"/go":
                for transport in sink.stalled:
                    transport.resume_reading()
                sink.stalled.clear()
            seen = {"begun": sink.begun, "whole": sink.whole, "broken": sink.broken}
            self._answer({**seen, "stalled": len(sink.stalled)})

    def _answer_much(self, *, chunked: bool) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        if not chunked:
            self._transport.write(head + b"content-length: %d\r\n\r\n" % len(MUCH) + MUCH)
            return
        self._transport.write(head + b"transfer-encoding: chunked\r\n\r\n")
        for at in range(0, len(MUCH), 100_000):
            part = MUCH[at : at + 100_000]
            self._transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        self._transport.write(b"0\r\n\r\n")

    def _answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self._transport.write(f"{head}\r\n\r\n".encode() + body)


async def serve(models: list[str]) -> None:
    loop = asyncio.get_running_loop()
    sink = Sink(models)
    server = await loop.create_server(lambda: Connection(sink), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(f"http://{host}:{port}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(json.loads(sys.argv[1])["models"]))
