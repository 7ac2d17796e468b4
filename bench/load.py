"""The load: callers that keep connections, read streams and count, for little CPU a token.

One event loop serves them all; callbacks of :mod:`httptools` do the reading, so that the caller's
share of a core stays small beside that of what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from bench.upstream import STAMP, STAMP_BYTES, Orders, chat

CONNECT_S = 30.0
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Target:
    """What is asked: a base URL, and the key that is sent along."""

    url: str
    key: str | None = None

    def request(self, orders: Orders, *, stream: bool, padding: int = 0) -> bytes:
        """A chat request as bytes, with the head that the OpenAI client for Python sends."""
        body = chat(orders, stream=stream, padding=padding)
        head = [
            f"POST {PATH} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc}",
            "Accept-Encoding: identity",
            "Connection: keep-alive",
            "Accept: application/json",
            "Content-Type: application/json",
            "User-Agent: OpenAI/Python 2.8.0",
            "X-Stainless-Lang: python",
            "X-Stainless-Package-Version: 2.8.0",
            "X-Stainless-Runtime: CPython",
            f"Authorization: Bearer {self.key or 'none'}",
            f"Content-Length: {len(body)}",
        ]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@dataclass
class Heard:
    """What all callers of one measurement have heard together.

    ``delays_ns`` are those of tokens that came while ``sampling``.
    """

    tokens: int = 0
    answers: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    delays_ns: list[int] = field(default_factory=list)
    sampling: bool = False

    def error(self, what: str) -> None:
        self.errors[what] = self.errors.get(what, 0) + 1


class Caller(asyncio.Protocol):
    """One keep-alive connection, one request at a time.

    ``on_token`` and ``on_answer`` are called for each; an answer other than 200, and a connection
    that the other side ends, are counted as errors and end the caller.
    """

    __slots__ = (
        "_parser",
        "_rest",
        "_streaming",
        "_transport",
        "_waiting",
        "connected",
        "first_ns",
        "heard",
        "on_answer",
        "on_end",
        "over",
    )

    def __init__(self, heard: Heard) -> None:
        self.heard = heard
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._streaming = False
        self._waiting = False
        self.over = False
        self.first_ns = 0
        """When the first token of the present answer came."""
        self.on_answer: Callable[[], None] = _nothing
        self.on_end: Callable[[], None] = _nothing
        self._transport: asyncio.Transport

    def send(self, request: bytes, *, stream: bool) -> None:
        self._streaming = stream
        self._waiting = True
        self._rest = b""
        self.first_ns = 0
        self._transport.write(request)

    def hang_up(self) -> None:
        """Close the connection at once, whatever comes."""
        self._waiting = False
        self.over = True
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP answer: {type(error).__name__}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting:
            self._fail(f"connection lost: {type(exc).__name__ if exc else 'closed'}")
        self._ended()

    # httptools calls these.

    def on_headers_complete(self) -> None:
        if (status := self._parser.get_status_code()) != 200:
            self._fail(f"status {status}")

    def on_body(self, data: bytes) -> None:
        if not self._streaming:
            return
        now = time.monotonic_ns()
        text = self._rest + data if self._rest else data
        stamps = STAMP.findall(text)
        # What may be the beginning of a stamp that the next read completes.
        self._rest = b"" if text.endswith(b"\n") else _cut_stamp(text)
        if not stamps:
            return
        if not self.first_ns:
            self.first_ns = now
        self.heard.tokens += len(stamps)
        if self.heard.sampling:
            self.heard.delays_ns.extend([now - int(stamp) for stamp in stamps])

    def on_message_complete(self) -> None:
        if not self._waiting:
            return
        self._waiting = False
        self.heard.answers += 1
        if not self._parser.should_keep_alive():
            self._transport.close()
        self.on_answer()

    def _fail(self, what: str) -> None:
        if not self.over:
            self.heard.error(what)
            self.hang_up()

    def _ended(self) -> None:
        self.over = True
        self.on_end()


def _cut_stamp(text: bytes) -> bytes:
    at = text.rfind(b"@")
    tail = text[at:] if at >= 0 else b""
    begun = tail == b"@" or (len(tail) < STAMP_BYTES and tail[1:].isdigit())
    return tail if begun else b""


def _nothing() -> None:
    pass


async def connect(target: Target, heard: Heard) -> Caller:
    """:raises OSError: nothing listens there, or it does not accept within 30 s (TimeoutError)"""
    parts = urlsplit(target.url)
    assert parts.hostname
    assert parts.port
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_S):
        _, caller = await loop.create_connection(lambda: Caller(heard), parts.hostname, parts.port)
    return caller


@contextlib.asynccontextmanager
async def callers(
    target: Target, heard: Heard, count: int, *, at_once: int = 64
) -> AsyncIterator[list[Caller]]:
    """So many connections for the life of the block; those that fail are counted in ``heard``."""
    made: list[Caller] = []
    try:
        for begin in range(0, count, at_once):
            wanted = min(at_once, count - begin)
            for result in await asyncio.gather(
                *(connect(target, heard) for _ in range(wanted)), return_exceptions=True
            ):
                if isinstance(result, OSError):
                    heard.error(f"not connected: {type(result).__name__}")
                elif isinstance(result, BaseException):
                    raise result
                else:
                    made.append(result)
        yield made
    finally:
        for caller in made:
            caller.hang_up()


async def first_token(caller: Caller, request: bytes, *, within_s: float) -> int | None:
    """Stream one answer to its end; ns from the request to its first token, None if it failed."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    caller.on_answer = caller.on_end = lambda: None if done.done() else done.set_result(None)
    began = time.monotonic_ns()
    caller.send(request, stream=True)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await done
    return caller.first_ns - began if caller.first_ns else None


@contextlib.contextmanager
def closed_loop(made: Sequence[Caller], request: bytes) -> Iterator[None]:
    """Within the block each caller sends again as soon as it is answered."""
    running = True

    def again(caller: Caller) -> None:
        if running and not caller.over:
            caller.send(request, stream=False)

    for caller in made:
        caller.on_answer = functools.partial(again, caller)
        caller.send(request, stream=False)
    yield
    running = False
