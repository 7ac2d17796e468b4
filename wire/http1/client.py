"""HTTP/1.1 to one upstream as callbacks: a request out, its answer's bytes back as they came.

:class:`Pool` keeps the connections to one upstream, an engine's unix socket or another daemon's
port. :meth:`Pool.request` sends a request and tells a :class:`Sink` of the answer from within the
connection's own callbacks: no task, no queue and no copy for what passes through. What a body is
cut at is described in :mod:`wire.http1.cuts`.

An exchange ends in exactly one of :meth:`Sink.end`, :meth:`Sink.whole`, :meth:`Sink.failed` and
:meth:`Exchange.cancel`; nothing is called after it. No callback runs within
:meth:`Pool.request`. A callback may cancel its exchange, pause it, and make new requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol

from operations.errors import HiveError, Hop, Unavailable, WorkerBroke
from wire.http1.cuts import BAD_ANSWER, Body, Chunks, Plain
from wire.http1.head import Header, Malformed, ResponseHead, request_lines, response_head
from wire.http1.outbox import Outbox
from wire.http1.pieces import Pieces
from wire.http1.template import Template

CONNECT_S: Final = 5.0
IDLE_S: Final = 60.0
KEEP: Final = 256
JOINED_BYTES: Final = 64 * 1024  # a body up to this size is sent in one piece with its head
MAX_INTERIM: Final = 64  # interim answers (1xx) to one request
DRAIN_BYTES: Final = 64 * 1024  # read at a time of what a broken connection still holds
FIRST_PAUSE_S, LAST_PAUSE_S = 0.001, 0.05

log = logging.getLogger(__name__)

_HAS_BODY = frozenset(("POST", "PUT", "PATCH"))


class Unreachable(Unavailable):
    """No connection could be made, and nothing was sent."""

    code = "unreachable"
    retryable = True


class NoAnswer(WorkerBroke):
    """It may have taken the request, and ended without an answer."""

    code = "no_answer"


class Sink(Protocol):
    """Who an answer is for."""

    def head(self, status: int, headers: Sequence[Header], chunked: bool) -> None:
        """The final answer's head (status 200 to 999), names in lower case, as they came.

        ``chunked``: the data that follows is in chunks, framing included. If it is not, and there
        is no ``content-length``, the body's end is told by :meth:`end` alone.
        """

    def data(self, data: bytes) -> None:
        """More of the body, never empty: whole chunks where it is chunked, and whole events
        where it is a stream of events; see :attr:`Exchange.whole`."""

    def end(self) -> None:
        """The answer is complete."""

    def whole(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        """An answer that came in one piece, neither chunked nor events, instead of :meth:`head`,
        :meth:`data` and :meth:`end`."""

    def failed(self, error: HiveError, started: bool) -> None:
        """There is no answer, or no more of it.

        ``error`` is :class:`Unreachable` where nothing was sent, :class:`NoAnswer` where the
        connection ended before an answer's head, else what broke it. ``started``: whether
        :meth:`head` was called.
        """


Connect = Callable[[Callable[[], asyncio.Protocol]], Awaitable[None]]
"""Makes a connection that speaks the given protocol. Raises OSError."""


def unix(path: str) -> Connect:
    """Connects to a unix socket. A full backlog is waited for, as TCP does by itself."""

    async def connect(factory: Callable[[], asyncio.Protocol]) -> None:
        pause = FIRST_PAUSE_S
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            while not _connected(sock, path):
                await asyncio.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE_S)
            await asyncio.get_running_loop().create_unix_connection(factory, sock=sock)
        except BaseException:
            sock.close()
            raise

    return connect


def tcp(
    host: str, port: int, *, tls: ssl.SSLContext | None = None, fingerprint: str = ""
) -> Connect:
    """Connects to a port.

    :param tls: how to check the server's certificate; None speaks plain TCP
    :param fingerprint: SHA-256, hex, of the one certificate that is trusted, whatever it says;
        for it ``tls`` is left out
    """
    if fingerprint:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE

    async def connect(factory: Callable[[], asyncio.Protocol]) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(factory, host, port, ssl=tls)
        if fingerprint and not _shows(transport, fingerprint):
            transport.abort()
            raise ssl.SSLCertVerificationError("it shows another certificate than it has proven")

    return connect


def _connected(sock: socket.socket, path: str) -> bool:
    """False while the backlog of who listens is full."""
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


def _shows(transport: asyncio.BaseTransport, fingerprint: str) -> bool:
    shown: ssl.SSLObject = transport.get_extra_info("ssl_object")
    certificate = shown.getpeercert(binary_form=True) or b""
    return hmac.compare_digest(hashlib.sha256(certificate).hexdigest(), fingerprint.lower())


class Exchange:
    """One request and its answer."""

    __slots__ = (
        "_body",
        "_connection",
        "_method",
        "_over",
        "_paused",
        "_pieces",
        "_pool",
        "_request",
        "_retried",
        "_sink",
    )

    def __init__(
        self,
        pool: Pool,
        method: str,
        request: tuple[bytes, ...],
        pieces: Pieces | None,
        sink: Sink,
    ) -> None:
        self._pool = pool
        self._method = method
        self._request = request  # kept until something of the answer has come
        self._pieces = pieces  # of a large body, the same
        self._sink = sink
        self._body: Body | None = None
        self._connection: Connection | None = None
        self._paused = False
        self._retried = False
        self._over = False

    @property
    def whole(self) -> bool:
        """Whether the data told so far ends where one may add an event of one's own.

        False only in the middle of an event of over 1 MiB. Holds after the end, too.
        """
        return self._body is None or self._body.whole

    def flow(self, wanted: bool) -> None:
        """Read no more of the answer for now, or read on. What one read has brought is told."""
        self._paused = not wanted
        if self._connection is None:
            return
        if wanted:
            self._connection.transport.resume_reading()
        else:
            self._connection.transport.pause_reading()

    def passed(self, count: int) -> None:
        """So many bytes were taken: what is not read is not sent, so nobody need be told."""

    def cancel(self) -> None:
        """Close its connection at once, and call the sink no more. Fine to call twice."""
        if not self._over:
            self._over = True
            self._pool._give_up(self)

    def _fail(self, error: HiveError) -> None:
        if not self._over:
            self._over = True
            self._forget()
            self._sink.failed(error, self._body is not None)

    def _forget(self) -> None:
        """It will not be sent again."""
        self._request = ()
        self._pieces = None


class Connection(asyncio.Protocol):
    """One connection; carries one exchange at a time."""

    __slots__ = (
        "_body",
        "_buffer",
        "_congested",
        "_head",
        "_heard",
        "_interim",
        "_leaves_after",
        "_pool",
        "_searched",
        "_sending",
        "_sink",
        "_template",
        "_told_whole",
        "_unsent",
        "exchange",
        "idle_since",
        "lost",
        "transport",
        "used",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.exchange: Exchange | None = None
        self._sink: Sink
        self._head: ResponseHead
        self._template: Template | None = None  # of that, where it tells a length
        self._told_whole = False  # whether Sink.whole may be told of it
        self._body: Body | None = None  # while one is read
        self._buffer: bytearray | None = None  # of heads that are not whole
        self._searched = 0  # bytes of it in which no head ends
        self._heard = False  # anything since the request
        self._interim = 0  # heads since then
        self._unsent: Iterator[memoryview] | None = None  # pieces of the request's body
        self._sending: asyncio.Handle | None = None  # of the next one
        self._congested = False
        self._leaves_after = -1  # flushes of the outbox that has the request
        self.lost = False
        self.used = False  # for an exchange before this one
        self.idle_since = 0.0

    def carry(self, exchange: Exchange) -> None:
        """Send the request of ``exchange``, and tell it of the answer."""
        self.exchange = exchange
        self._sink = exchange._sink
        self._heard = False
        self._interim = 0
        exchange._connection = self
        if exchange._paused:
            self.transport.pause_reading()
        request = exchange._request
        if len(request) == 1:
            outbox = self._pool._outbox
            self._leaves_after = outbox.flushes
            outbox.write(self.transport, request[0])
        else:
            self.transport.writelines(request)
        if exchange._pieces is not None:
            self._unsent = iter(exchange._pieces)
            self._send_soon()

    def _send_soon(self) -> None:
        """Send a piece in the next turn of the event loop, for others are to have theirs; none
        while the connection takes no more."""
        if self._unsent is not None and self._sending is None and not self._congested:
            self._sending = asyncio.get_running_loop().call_soon(self._send_piece)

    def _send_piece(self) -> None:
        self._sending = None
        if self._unsent is None or self._congested or self.lost:
            return
        piece = next(self._unsent, None)
        if piece is None:
            self._unsent = None
            return
        self.transport.write(piece)
        self._send_soon()

    def drop(self) -> None:
        """Close at once; whatever it carried hears no more of it."""
        self._let_go()
        self.transport.abort()

    # -- the connection ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            # A token needs no acknowledgement of its own (tcp(7)): the next one may bring both.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)

    def pause_writing(self) -> None:
        self._congested = True

    def resume_writing(self) -> None:
        self._congested = False
        self._send_soon()

    def data_received(self, data: bytes) -> None:
        body = self._body
        if body is None:
            self._read_head(data)
            return
        try:
            passed = body.feed(data)
        except Malformed as error:
            self._refuse(error)
            return
        if passed:
            self._sink.data(passed)
        if body.ended and self._body is body:
            self._finish(body.surplus)

    def eof_received(self) -> None:
        """Nothing more will come; a request that is not sent whole need not be."""
        self.lost = True
        self._pool._unusable(self)
        self._end()
        self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._pool._unusable(self)
        if isinstance(error, ConnectionError) and self.exchange is not None:
            self._drain()
        self._end()
        self._pool._closed(self)

    def _drain(self) -> None:
        """Read what came before the connection broke.

        An engine that refuses a request by its head answers and closes while the body is being
        written. That breaks the writing, and the transport with it, over an answer not yet read.
        """
        if self.transport.get_extra_info("ssl_object") is not None:
            return  # only its own state could decrypt them
        descriptor = self.transport.get_extra_info("socket").fileno()
        try:
            while self.exchange is not None and (data := os.read(descriptor, DRAIN_BYTES)):
                self.data_received(data)
        except OSError:
            pass  # there was no more

    def _end(self) -> None:
        """No more of the answer will come: that ends it, or breaks it."""
        exchange, body = self.exchange, self._body
        if exchange is None:
            return
        if body is not None:
            rest = body.close()
            if rest:
                self._sink.data(rest)
            if rest is None:
                self._break(
                    WorkerBroke(
                        f"The {self._pool.name} ended before its answer did. "
                        "Send the request again.",
                        hop=self._pool.hop,
                    )
                )
            elif self._body is body:
                self._finish(surplus=True)
        elif self.used and not self._heard and not exchange._retried:
            # It was closed as idle while the request was under way, which is nobody's fault.
            self._let_go()
            exchange._retried = True
            self._pool._again(exchange)
        else:
            self._break(self._pool._no_answer())

    # -- the answer --------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:  # nobody asked
            self._pool._unusable(self)
            self.transport.abort()
            return
        if not self._heard:
            self._heard = True
            exchange._forget()
        raw: bytes | bytearray = data
        if self._buffer is not None:
            self._buffer += data
            raw = self._buffer
        try:
            begin = self._same_head(data, exchange._method)
            if begin is None:
                begin = self._final_head(raw, exchange._method)
                self._template = self._template_of(raw, begin)
                self._told_whole = begin is not None and _is_told_whole(self._head)
        except Malformed as error:
            self._refuse(error)
            return
        if begin is None:
            return
        self._buffer, self._searched = None, 0
        if self._told_whole and len(raw) - begin == self._head.length:
            self._tell_whole(exchange, bytes(raw[begin:]))
        else:
            self._body = exchange._body = _body_of(self._head)
            self._read_body(bytes(raw[begin:]))

    def _same_head(self, data: bytes, method: str) -> int | None:
        """Where the body begins behind the same head as that of the answer before, but for its
        length; None if that is not what has come."""
        if self._template is None or self._buffer is not None or method == "HEAD":
            return None
        found = self._template.match(data)
        if found is None:
            return None
        length, begin = found
        if length != self._head.length:
            self._head = self._head.of_length(length)
        return begin

    def _template_of(self, raw: bytes | bytearray, begin: int | None) -> Template | None:
        alone = self._interim == 1  # an interim answer's head may tell a length of its own
        if begin is None or not alone or self._head.framing != "length":
            return None
        return Template.of(bytes(raw[:begin]))

    def _final_head(self, raw: bytes | bytearray, method: str) -> int | None:
        """Read the first head that is no interim answer's. Where its body begins; None if more
        has to come."""
        begin, searched = 0, self._searched
        while (found := response_head(raw, begin, method, searched)) is not None:
            self._head, begin = found
            searched = begin
            self._interim += 1
            if self._interim > MAX_INTERIM and self._head.status < 200:
                raise Malformed(BAD_ANSWER, "It sends interim answers without end.")
            if self._head.status == 101:
                raise Malformed(BAD_ANSWER, "It switches protocols, which nobody asked for.")
            if self._head.status >= 200:
                return begin
        if raw is self._buffer:
            del self._buffer[:begin]
        else:
            self._buffer = bytearray(raw[begin:])
        self._searched = len(self._buffer)
        return None

    def _tell_whole(self, exchange: Exchange, body: bytes) -> None:
        """All of an answer has come at once, as short ones do."""
        head, sink = self._head, exchange._sink
        self._free(exchange, surplus=False)
        sink.whole(head.status, head.headers, body)

    def _read_body(self, data: bytes) -> None:
        """Tell the head, and what came of the body with it."""
        head, body = self._head, self._body
        assert body is not None
        self._sink.head(head.status, head.headers, head.framing == "chunked")
        if self._body is not body:
            return
        if body.ended:
            self._finish(surplus=bool(data))
        elif data:
            self.data_received(data)

    def _finish(self, surplus: bool) -> None:
        """The answer is complete; the connection is the pool's again before the sink hears it."""
        sink = self._sink
        assert self.exchange is not None
        self._free(self.exchange, surplus)
        sink.end()

    def _free(self, exchange: Exchange, surplus: bool) -> None:
        transport = self.transport
        usable = (
            self._head.keep_alive
            and not surplus
            and not self.lost
            and self._unsent is None  # the request may not be sent whole, or at all
            and self._pool._outbox.flushes != self._leaves_after
            and not transport.get_write_buffer_size()
        )
        exchange._over = True
        self._let_go()
        if exchange._paused and usable:
            transport.resume_reading()
        self._pool._done(self, usable)

    def _refuse(self, error: Malformed) -> None:
        pool = self._pool
        log.warning("%s: no answer of HTTP/1.1: %s", pool.name, error.message)
        self._break(
            WorkerBroke(
                f"The {pool.name} answered what is not HTTP/1.1: {error.message}",
                hop=pool.hop,
                code="bad_answer",
                retryable=False,
            )
        )

    def _break(self, error: HiveError) -> None:
        exchange = self.exchange
        assert exchange is not None
        self.drop()
        exchange._fail(error)

    def _let_go(self) -> None:
        if self.exchange is not None:
            self.exchange._connection = None
        self.exchange = self._body = self._unsent = None
        self._sink = _NOBODY
        self._buffer, self._searched = None, 0


class _Nobody:
    """Hears nothing, and holds nothing."""

    def head(self, status: int, headers: Sequence[Header], chunked: bool) -> None: ...

    def data(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def whole(self, status: int, headers: Sequence[Header], body: bytes) -> None: ...

    def failed(self, error: HiveError, started: bool) -> None: ...


_NOBODY: Final = _Nobody()


class Pool:
    """The connections to one upstream.

    :param host: what the ``Host`` header says
    :param name: how messages call the upstream (``worker w-3f9a1c``, ``hive gpu-0``)
    :param hop: who answers there
    :param limit: connections at most, 0 for any number; requests beyond it wait their turn
    :param keep: idle connections that are kept for the next request
    :param idle_s: for how long they are, seconds
    :param connect_s: that making a connection may take, seconds
    """

    def __init__(
        self,
        connect: Connect,
        *,
        host: bytes,
        name: str,
        hop: Hop,
        limit: int = 0,
        keep: int = KEEP,
        idle_s: float = IDLE_S,
        connect_s: float = CONNECT_S,
    ) -> None:
        self.name = name
        self.hop: Hop = hop
        self._connect = connect
        self._host = (b"host", host)
        self._limit = limit
        self._keep = keep
        self._idle_s = idle_s
        self._connect_s = connect_s
        self._connections: set[Connection] = set()
        self._idle: OrderedDict[Connection, None] = OrderedDict()  # the one used last at the end
        self._dialling: dict[Exchange, asyncio.Task[None]] = {}
        self._waiting: OrderedDict[Exchange, None] = OrderedDict()
        self._sweeping: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._outbox = Outbox()

    @property
    def connections(self) -> int:
        """Open, idle ones included, or being made."""
        return len(self._connections) + len(self._dialling)

    @property
    def idle(self) -> int:
        """Connections that are open and carry nothing."""
        return len(self._idle)

    @property
    def waiting(self) -> int:
        """Requests that wait for a connection under the limit."""
        return len(self._waiting)

    def request(
        self,
        method: str,
        target: bytes,
        headers: Iterable[Header],
        body: bytes | Pieces,
        sink: Sink,
    ) -> Exchange:
        """Send a request, or have it wait for a connection.

        Pieces are written one by one, as far as the connection takes them.

        :param target: path and query, percent-encoded
        :param headers: without ``host``, ``connection`` and what frames the body
        :raises ValueError: a header, the method or the target would break the request's head
        """
        return self.send(method, self.opening(method, target, headers), body, sink)

    def opening(self, method: str, target: bytes, headers: Iterable[Header]) -> bytes:
        """The lines with which the head of such a request begins, for :meth:`send`.

        Raises what :meth:`request` does.
        """
        return request_lines(method, target, (self._host, *headers))

    def send(self, method: str, opening: bytes, body: bytes | Pieces, sink: Sink) -> Exchange:
        """As :meth:`request`. :param opening: all of the head but what frames the body"""
        size = len(body) if isinstance(body, bytes) else body.size
        framing = b"content-length: %d\r\n" % size if size or method in _HAS_BODY else b""
        pieces = None
        request: tuple[bytes, ...]
        if isinstance(body, Pieces):
            request, pieces = (b"%b%b\r\n" % (opening, framing),), body
        elif size <= JOINED_BYTES:
            request = (b"%b%b\r\n%b" % (opening, framing, body),)
        else:
            request = (b"%b%b\r\n" % (opening, framing), body)
        exchange = Exchange(self, method, request, pieces, sink)
        if self._is_closed:
            asyncio.get_running_loop().call_soon(exchange._fail, self._closed_error())
        elif self._idle:
            connection, _ = self._idle.popitem()
            connection.carry(exchange)
        else:
            self._dial(exchange)
        return exchange

    def close(self) -> None:
        """Close all connections at once; what is not answered fails. Fine to call twice."""
        self._is_closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        for task in self._dialling.values():
            task.cancel()
        unanswered = [*self._dialling, *self._waiting]
        unanswered += [c.exchange for c in self._connections if c.exchange is not None]
        failed = [(exchange, self._let_go_error(exchange)) for exchange in unanswered]
        self._waiting.clear()
        for connection in [*self._connections]:
            connection.drop()
        for exchange, error in failed:
            exchange._fail(error)

    # -- for its connections and exchanges ---------------------------------------------------

    def _unusable(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def _closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._next()

    def _done(self, connection: Connection, usable: bool) -> None:
        """It has carried an exchange to its end."""
        connection.used = True
        if not usable or self._is_closed:
            connection.transport.abort()
        elif self._waiting:
            exchange, _ = self._waiting.popitem(last=False)
            connection.carry(exchange)
        elif len(self._idle) < self._keep:
            connection.idle_since = time.monotonic()
            self._idle[connection] = None
            if self._sweeping is None:
                self._sweep_in(self._idle_s)
        else:
            connection.transport.abort()

    def _again(self, exchange: Exchange) -> None:
        """Its connection had died: send it on a new one, for the other idle ones may be dead."""
        if self._is_closed:
            exchange._fail(self._closed_error())
            return
        if self._full and self._idle:
            oldest, _ = self._idle.popitem(last=False)
            oldest.drop()
        self._dial(exchange, first=True)

    def _give_up(self, exchange: Exchange) -> None:
        exchange._forget()
        self._waiting.pop(exchange, None)
        if exchange in self._dialling:
            self._dialling[exchange].cancel()
        if exchange._connection is not None:
            exchange._connection.drop()

    # -- making connections ------------------------------------------------------------------

    @property
    def _full(self) -> bool:
        return 0 < self._limit <= self.connections

    def _dial(self, exchange: Exchange, *, first: bool = False) -> None:
        """Make a connection for it; at the limit, it waits, at the queue's head if ``first``."""
        if self._full:
            self._waiting[exchange] = None
            self._waiting.move_to_end(exchange, last=not first)
            return
        task = asyncio.get_running_loop().create_task(self._connect_for(exchange))
        self._dialling[exchange] = task
        task.add_done_callback(lambda task: self._dialled(exchange))

    def _dialled(self, exchange: Exchange) -> None:
        del self._dialling[exchange]
        self._next()

    async def _connect_for(self, exchange: Exchange) -> None:
        connection = Connection(self)
        try:
            async with asyncio.timeout(self._connect_s):
                await self._connect(lambda: connection)
        except (OSError, ValueError) as error:  # a name that cannot be one is a ValueError
            exchange._fail(self._unreachable(error))
            return
        if connection.lost:
            exchange._fail(self._no_answer())
            return
        self._connections.add(connection)
        connection.carry(exchange)

    def _next(self) -> None:
        """Make the connection that the first of those who wait may have now."""
        while self._waiting and not self._full:
            exchange, _ = self._waiting.popitem(last=False)
            self._dial(exchange)

    def _sweep(self) -> None:
        """Close what has been idle for too long; look again when the next one will have been."""
        self._sweeping = None
        now = time.monotonic()
        while self._idle:
            oldest = next(iter(self._idle))
            due = oldest.idle_since + self._idle_s
            if due > now:
                self._sweep_in(due - now)
                return
            del self._idle[oldest]
            oldest.drop()

    def _sweep_in(self, seconds: float) -> None:
        self._sweeping = asyncio.get_running_loop().call_later(seconds, self._sweep)

    def _unreachable(self, error: OSError | ValueError) -> Unreachable:
        reason = getattr(error, "strerror", None) or str(error)
        if not reason:  # it is asyncio's own TimeoutError
            reason = f"no connection within {self._connect_s:g} s"
        return Unreachable(
            f"The {self.name} cannot be reached: {reason}. Send the request again.", hop=self.hop
        )

    def _no_answer(self) -> NoAnswer:
        return NoAnswer(
            f"The {self.name} took the request and ended without an answer. "
            "Send the request again.",
            hop=self.hop,
        )

    def _let_go_error(self, exchange: Exchange) -> HiveError:
        """What becomes of an exchange when the pool is closed, by how far it has come."""
        if exchange._connection is None:
            return self._closed_error()
        if exchange._body is None:
            return NoAnswer(
                f"The {self.name} is let go, and has not answered. Send the request again.",
                hop=self.hop,
            )
        return WorkerBroke(
            f"The {self.name} is let go, and its answer is not whole. Send the request again.",
            hop=self.hop,
        )

    def _closed_error(self) -> Unreachable:
        return Unreachable(f"The {self.name} is let go. Send the request again.", hop=self.hop)


def _is_of_events(head: ResponseHead) -> bool:
    return (head.get(b"content-type") or b"").lower().startswith(b"text/event-stream")


def _is_told_whole(head: ResponseHead) -> bool:
    """Whether :meth:`Sink.whole` may be told of its answer."""
    return head.framing == "length" and not _is_of_events(head)


def _body_of(head: ResponseHead) -> Body:
    # An encoding hides where an event ends.
    events = _is_of_events(head) and head.get(b"content-encoding") is None
    if head.framing == "chunked":
        return Chunks(events=events)
    length = 0 if head.framing == "none" else head.length
    return Plain(length, events=events)
