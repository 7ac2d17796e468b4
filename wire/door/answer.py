"""The answer to one request, as it is written to the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache

from wire.answering import Answering
from wire.http1.head import Header, response_bytes
from wire.http1.outbox import Outbox

PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
JOINED_BYTES = 64 * 1024  # a body up to this size is sent in one piece with its head
NO_CONTENT = 204
EVENTS = b"text/event-stream"
COMMENT = b"3\r\n:\n\n\r\n"  # a chunk with a comment, as event streams have them


def _opening_of(status: int, headers: Sequence[Header]) -> bytes:
    """What an answer's head begins with."""
    return response_bytes(status, headers)[: -len(b"\r\n")]


_opening = lru_cache(maxsize=256)(_opening_of)


class Answer(Answering):
    """Written by whoever serves the request; the door reads when it has ended.

    :param request_id: fit for a header
    :param finished: called once, when the answer has ended; told whether the connection is usable
    :param writable: whether the connection takes bytes now
    """

    __slots__ = (
        "_eventful",
        "_finished",
        "_http10",
        "_outbox",
        "_request_id",
        "_transport",
        "_writable",
        "keep_alive",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        finished: Callable[[bool], None],
        keep_alive: bool,
        *,
        outbox: Outbox,
        request_id: str,
        http10: bool = False,
        writable: bool = True,
    ) -> None:
        super().__init__()
        self._transport = transport
        self._outbox = outbox
        self._request_id = request_id
        self._finished = finished
        self.keep_alive = keep_alive
        self._http10 = http10
        self._eventful = False  # each write is some whole events
        self._writable = writable

    @property
    def writable(self) -> bool:
        return self._writable

    def head(self, status: int, headers: Sequence[Header], *, length: int | None) -> None:
        """Begin. :param length: of the body, bytes; None for one whose chunks follow"""
        if not self.gone:
            self._eventful = any(n == b"content-type" and v.startswith(EVENTS) for n, v in headers)
            self._outbox.flush()
            self._transport.write(self._head(status, headers, length))

    def _head(self, status: int, headers: Sequence[Header], length: int | None) -> bytes:
        self.started = True
        framing = b""
        if length is not None:
            if status != NO_CONTENT:  # which has no length (RFC 9110, 8.6)
                framing = b"content-length: %d\r\n" % length
        elif self._http10:
            self.keep_alive = False  # its end is the end of the connection
        else:
            self.chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        if not self.keep_alive:
            framing += b"connection: close\r\n"
        elif self._http10:
            framing += b"connection: keep-alive\r\n"
        opening_of = _opening if isinstance(headers, tuple) else _opening_of
        opening = opening_of(status, headers)
        return b"%bx-request-id: %b\r\n%b\r\n" % (opening, self._request_id.encode(), framing)

    def write(self, data: bytes) -> None:
        """More of the body."""
        if not self.gone:
            self._transport.write(data)

    def whole(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        """All of it."""
        if not self.gone:
            head = self._head(status, headers, len(body))
            if len(body) <= JOINED_BYTES:
                self._outbox.write(self._transport, head + body)
            else:
                self._outbox.flush()
                self._transport.write(head)
                self._transport.write(body)
        self.end()

    def end(self) -> None:
        """It is complete."""
        if not self.ended:
            self.ended = True
            self._finished(self.keep_alive)

    def abort(self) -> None:
        """It cannot be completed: the caller sees the connection break."""
        if not self.ended:
            self.ended = True
            self._finished(False)

    # -- for the door ------------------------------------------------------------------------

    def probe(self) -> None:
        """Write something that means nothing: one who has gone answers it with a reset."""
        if self.gone or self._http10:
            return
        if not self.started:
            self._outbox.flush()
            self._transport.write(PROCESSING)
        elif self.chunked and self._eventful and self.between():
            self._transport.write(COMMENT)

    def lost(self) -> None:
        """The caller has gone."""
        if not self.gone and not self.ended:
            self.gone = True
            self.on_gone()

    def flow(self, writable: bool) -> None:
        """The connection takes no more bytes for now, or takes them again."""
        self._writable = writable
        self.on_writable(writable)
