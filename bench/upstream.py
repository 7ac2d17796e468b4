"""A small fast engine that says what it is told to: what every measured relay stands in front of.

A request's body carries its orders in the text of the prompt (see :class:`Orders`), because text
is what every relay passes on. Each token's text holds the time at which it was written, so that
whoever reads it can tell how long it was on its way.

``python -m bench.upstream`` prints its URL and serves until its standard input closes.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self, cast

import httptools
import uvloop

MODEL = "bench"
TOKEN_BYTES = 240
"""One event of a stream: ``data: {…}`` and the blank line, without chunk framing."""

STAMP = re.compile(rb"@(\d{19})@")
"""``time.monotonic_ns()`` of the moment at which a token was written; one clock a machine."""

STAMP_BYTES = 21

Arrival = Literal["spread", "steps"]
"""Whether each stream has a beat of its own, or all get their tokens in one step (batching)."""

_ORDERS = re.compile(rb"bench tokens=(\d+) rate=([\d.]+) arrival=(spread|steps);")
_BURST = 64  # tokens a turn of the loop where there is no rate


@dataclass(frozen=True)
class Orders:
    """What a prompt asks for.

    :param tokens: tokens of the answer, 1 at least
    :param rate: tokens a second; 0 is as fast as the reader takes them
    """

    tokens: int = 1
    rate: float = 0.0
    arrival: Arrival = "spread"

    @property
    def text(self) -> str:
        return f"bench tokens={self.tokens} rate={self.rate} arrival={self.arrival};"

    @classmethod
    def found_in(cls, body: bytes) -> Self:
        found = _ORDERS.search(body)
        if found is None:
            return cls()
        return cls(int(found[1]), float(found[2]), cast(Arrival, found[3].decode()))


def chat(orders: Orders, *, stream: bool, padding: int = 0) -> bytes:
    """The body of a chat request, as an OpenAI client writes it, with so many bytes of padding."""
    content = orders.text + " " + "x" * padding
    return json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": orders.tokens,
            "stream": stream,
        }
    ).encode()


def _event(choice: str) -> bytes:
    return (
        'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,'
        f'"model":"{MODEL}","choices":[{{"index":0,{choice}}}]}}\n\n'
    ).encode()


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _token() -> tuple[bytes, bytes]:
    """What stands before and behind a token's time, chunk framing included."""
    mark = "0" * 19
    bare = len(_event(f'"delta":{{"content":"@{mark}@"}},"finish_reason":null'))
    padded = f'"delta":{{"content":"@{mark}@{"." * (TOKEN_BYTES - bare)}"}},"finish_reason":null'
    before, _, behind = _chunk(_event(padded)).partition(mark.encode())
    return before, behind


_BEFORE, _BEHIND = _token()
_LAST = (
    _chunk(_event('"delta":{},"finish_reason":"stop"')) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _whole(document: object, status: str = "200 OK") -> bytes:
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


_CHAT = _whole(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1700000000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hive answers for the room."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15},
    }
)
_MODELS = _whole(
    {
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "created": 1700000000, "owned_by": MODEL}],
    }
)
_OTHER = _whole({"status": "ok", "model_path": MODEL, "served_model_name": MODEL})


class Steps:
    """Decode steps: everybody who joined gets a token at each, one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rate: float) -> None:
        self._loop = loop
        self._every_s = 1 / rate
        self._members: dict[Stream, None] = {}
        self._next = 0.0

    def join(self, stream: Stream) -> None:
        if not self._members:
            self._next = self._loop.time() + self._every_s
            self._loop.call_at(self._next, self._step)
        self._members[stream] = None

    def leave(self, stream: Stream) -> None:
        self._members.pop(stream, None)

    def _step(self) -> None:
        for stream in tuple(self._members):
            stream.say()
        if self._members:
            self._next += self._every_s
            self._loop.call_at(self._next, self._step)


class Stream:
    """One streamed answer; the first token is written at once."""

    __slots__ = (
        "_every_s",
        "_handle",
        "_left",
        "_loop",
        "_next",
        "_on_end",
        "_steps",
        "_transport",
        "paused",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        orders: Orders,
        upstream: Upstream,
        on_end: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._loop = upstream.loop
        self._left = orders.tokens
        self._every_s = 1 / orders.rate if orders.rate else 0.0
        self._steps = upstream.steps(orders)
        self._on_end = on_end
        self._handle: asyncio.Handle | None = None
        self._next = self._loop.time()
        self.paused = False

    def begin(self) -> None:
        self._transport.write(_STREAM_HEAD)
        if not self._every_s:
            self.pour()
        elif self._steps is not None:
            self._steps.join(self)
            self.say()
        else:
            self._beat()

    def say(self) -> None:
        """Write one token, and what ends the answer behind the last."""
        self._left -= 1
        token = b"%b%019d%b" % (_BEFORE, time.monotonic_ns(), _BEHIND)
        if self._left > 0:
            self._transport.write(token)
        else:
            self._transport.write(token + _LAST)
            self.close()
            self._on_end()

    def pour(self) -> None:
        """Write without a beat, until the reader does not keep up."""
        self._handle = None
        for _ in range(_BURST):
            if self.paused or self._left <= 0:
                return
            self.say()
        self._handle = self._loop.call_soon(self.pour)

    def resume(self) -> None:
        self.paused = False
        if not self._every_s and self._handle is None:
            self.pour()

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._steps is not None:
            self._steps.leave(self)

    def _beat(self) -> None:
        self._next += self._every_s
        self._handle = self._loop.call_at(self._next, self._beat)
        self.say()


class Upstream:
    """What the connections of one upstream share."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.streams = 0
        self._steps: dict[float, Steps] = {}

    def steps(self, orders: Orders) -> Steps | None:
        if orders.arrival == "spread" or not orders.rate:
            return None
        return self._steps.setdefault(orders.rate, Steps(self.loop, orders.rate))

    @property
    def state(self) -> bytes:
        return _whole({"streams": self.streams})


class Connection(asyncio.Protocol):
    """One keep-alive connection to the upstream, one request at a time."""

    __slots__ = ("_body", "_keep", "_parser", "_stream", "_target", "_transport", "_upstream")

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._body: list[bytes] = []
        self._keep = True
        self._stream: Stream | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.write(_whole({"error": "no HTTP request"}, "400 Bad Request"))
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream_ended()

    def pause_writing(self) -> None:
        if self._stream is not None:
            self._stream.paused = True

    def resume_writing(self) -> None:
        if self._stream is not None:
            self._stream.resume()

    # httptools calls these.

    def on_url(self, url: bytes) -> None:
        self._target = url
        self._body = []

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        self._keep = self._parser.should_keep_alive()
        if self._parser.get_method() == b"POST":
            self._answer(b"".join(self._body))
        elif self._target == b"/v1/models":
            self._transport.write(_MODELS)
        elif self._target == b"/state":
            self._transport.write(self._upstream.state)
        else:  # /health, and what routers ask their engines
            self._transport.write(_OTHER)
        if self._stream is None and not self._keep:
            self._transport.close()

    def _answer(self, body: bytes) -> None:
        if b'"stream":true' not in body and b'"stream": true' not in body:
            self._transport.write(_CHAT)
            return
        self._upstream.streams += 1
        self._stream = Stream(
            self._transport, Orders.found_in(body), self._upstream, self._stream_ended
        )
        self._stream.begin()

    def _stream_ended(self) -> None:
        self._stream = None
        self._upstream.streams -= 1
        if not self._keep:
            self._transport.close()


async def serve() -> None:
    """Serve on a free port of loopback until standard input closes."""
    loop = asyncio.get_running_loop()
    upstream = Upstream()
    server = await loop.create_server(
        lambda: Connection(upstream), "127.0.0.1", 0, backlog=4096, start_serving=True
    )
    host, port = server.sockets[0].getsockname()
    print(f"http://{host}:{port}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
