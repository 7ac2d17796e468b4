"""One caller's connection, from its first byte to its last.

========== ============================================ =====================================
state      meaning                                      what bytes that come are
========== ============================================ =====================================
head       between requests, or within a request's head more of the head
ours       an inference request's body is read          collected until it is whole
theirs     another request's body is read               handed on to the ASGI server at once
answering  the request is whole; its answer is not, or  kept until the answer has ended, and
           waits for a caller that takes no more        the caller takes bytes again
dropping   it was refused                               dropped
taken      another protocol has the connection          not ours
========== ============================================ =====================================

HTTP/1.1 as RFC 9112 has it; what is not well-formed is refused (:mod:`wire.http1`), for who
disagrees with another server about where a request ends can be made to smuggle one in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal, Protocol, cast

import msgspec
from msgspec.structs import replace
from starlette.types import Scope
from uvicorn.config import Config
from uvicorn.server import ServerState

from operations.errors import HiveError, Hop, InvalidRequest, RequestTimeout
from wire import errors
from wire.answering import Answering
from wire.door.answer import PROCESSING, Answer
from wire.door.asgi import Asgi, Lent
from wire.door.body import SMALL_BYTES, Body, Incoming, digest_of
from wire.gate import Admitted, Gate, request_id_of, too_large
from wire.http1.body import Chunked
from wire.http1.head import Malformed, RequestHead, request_head
from wire.http1.outbox import Outbox
from wire.http1.template import Template
from wire.keys import STRANGER, Caller
from wire.trust import target_of

IDLE_S: Final = 75.0  # between requests
HEAD_S: Final = 15.0  # from a head's first byte to its last
BODY_S: Final = 30.0  # for a body, and again one second of it for each KiB that has come
STALLED_S: Final = 300.0  # a caller that takes nothing for so long is gone
DROPPED_S: Final = 5.0  # what a refused caller still sends is read, so that it sees the refusal
DROPPED_TLS_S: Final = 0.5
LOOK_S: Final = 0.05
NEVER: Final = math.inf
AHEAD_BYTES: Final = 64 * 1024  # of pipelined requests that are kept while one is answered
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
TCP_CLOSE: Final = 7  # tcp_info's state of a connection that was reset (linux/tcp_states.h)

State = Literal["head", "ours", "theirs", "answering", "dropping", "taken"]


log = logging.getLogger(__name__)


class Request(msgspec.Struct):
    """An inference request that was let in, whole.

    :param target: path and query as they came, but for a grant
    :param headers: but for ``content-length``
    :param request_id: fit for a header, as :func:`wire.gate.request_id_of` gives them
    :param address: from which it came; empty where a queen passes it on
    :param known: what the next one on its connection need not be asked again
    """

    method: str
    path: str
    target: str
    headers: Mapping[str, str]
    body: Body
    request_id: str
    caller: Caller
    address: str = ""
    known: Known | None = None

    def forget(self) -> None:
        """It is not sent again: a long answer need not hold it."""
        self.headers, self.body, self.known = {}, b"", None


Serve = Callable[[Request, Answering], Awaitable[None] | None]
"""Serves one request. What it returns runs in a task, which is cancelled when the caller goes;
who returns None answers from callbacks, and hears of that by ``on_gone``."""

Streams = Callable[[str], Serve | None]
"""Who serves a GET of a path; None leaves it to the ASGI application."""

Take = Callable[[Request, asyncio.Transport, bytes], object]
"""Takes a connection over, and sets its protocol. Gets the bytes that came already."""


class Elsewhere(Protocol):
    """Where a process has those requests served that it does not serve itself."""

    def wants(self, head: RequestHead) -> bool:
        """Whether it serves this request."""

    def take(self, transport: asyncio.Transport, data: bytes) -> None:
        """Has the connection from now on. :param data: what has come, from that head on"""


class Front(Protocol):
    """What makes doors."""

    def door(self) -> Door:
        """One for a connection that came another way than by the daemon's own socket."""

    async def listen(self, listener: socket.socket) -> asyncio.AbstractServer:
        """Answer at one more socket, too, until the server is closed."""


class Known(msgspec.Struct):
    """A request that was let in by its head alone, as the next one with this head will be.

    :param asked: all of it but the body and what is its own
    :param most: bytes of a body that it may have for all this to hold
    :param openings: by the line that it went last: what its head begins with there
    :param forwarded: what upstreams are told of its headers, once one was
    """

    template: Template
    head: RequestHead
    asked: Request
    serve: Serve
    admitted: Admitted
    most: int
    openings: Mapping[object, bytes] = {}
    forwarded: Mapping[str, str] | None = None

    def another(self) -> Request:
        """One more such request, whose body is to come."""
        asked = self.asked
        return replace(asked, request_id=request_id_of(asked.headers), known=self)


@dataclass(frozen=True)
class Doorway:
    """What all doors of a daemon have in common.

    :param serve: by path: who serves a POST; all else is the ASGI application's
    :param streams: who serves a GET, a long one as a rule
    :param quick: who serves another request that the ASGI application could serve as well
    :param take: by what ``Upgrade`` offers: who takes the connection over
    :param elsewhere: takes the connections whose requests are not served in this process
    :param opened: told when the daemon listens
    :param refused: told path and status of each inference request that was not let in
    """

    gate: Gate
    hop: Hop
    serve: Mapping[str, Serve]
    take: Mapping[bytes, tuple[str, Take]] = field(default_factory=dict)
    streams: Streams = lambda path: None
    quick: Callable[[RequestHead], Serve | None] = lambda head: None
    elsewhere: Elsewhere | None = None
    opened: Callable[[Front], None] = lambda front: None
    refused: Callable[[str, int], None] = lambda path, status: None
    outbox: Outbox = field(default_factory=Outbox)

    def server(self, method: str, path: str) -> Serve | None:
        """Who serves a request; None: the ASGI application."""
        if method == "POST":
            return self.serve.get(path)
        return self.streams(path) if method == "GET" else None


NO_REQUEST: Final = Request("", "", "", {}, b"", "", STRANGER)


class Door(asyncio.Protocol):
    """Made by the ASGI server for each connection, in place of its own protocol."""

    __slots__ = (
        "_admitted",
        "_answer",
        "_app_state",
        "_asgi",
        "_asgi_busy",
        "_buffer",
        "_chunks",
        "_client_address",
        "_closing",
        "_config",
        "_deadline",
        "_ended",
        "_head",
        "_incoming",
        "_left",
        "_loop",
        "_paused",
        "_request",
        "_request_id",
        "_searched",
        "_server",
        "_server_address",
        "_server_of",
        "_stalled",
        "_state",
        "_task",
        "_timer",
        "_transport",
        "_wakes_at",
        "_way",
        "_whole",
    )

    def __init__(
        self,
        way: Doorway,
        *,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._way = way
        self._config = config
        self._server = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._asgi: Asgi | None = None
        self._asgi_busy = False
        self._state: State = "head"
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer in which no head ends
        self._closing = False  # when this answer has ended
        self._ended = False  # the caller sends no more
        self._paused = False  # the connection takes no more bytes for now
        self._left: int | None = 0  # bytes of the body that have not come; None: it is chunked
        self._chunks = Chunked()
        self._incoming = Incoming()
        self._whole = False  # the present body has come to its end
        self._head: RequestHead
        self._server_of: Serve
        self._request = NO_REQUEST
        self._request_id = ""  # of the present request, once that is known
        self._admitted: Admitted
        self._answer: Answer | None = None
        self._task: asyncio.Task[None] | None = None
        self._deadline = NEVER  # of the state
        self._stalled = NEVER  # until then the caller must take bytes again
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = NEVER  # when that goes off

    # -- the connection ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._server_address = (transport.get_extra_info("sockname") or ())[:2]
        self._client_address = (transport.get_extra_info("peername") or ())[:2]
        self._server.connections.add(self)  # type: ignore[arg-type]  # it has what they are asked
        if not self._client_address:  # he has gone already
            self._transport.abort()
            return
        self._within(IDLE_S)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._deadline = self._stalled = NEVER
        self._buffer.clear()
        self._incoming = Incoming()
        if self._timer is not None:
            self._timer.cancel()
        asgi, self._asgi = self._asgi, None
        if asgi is not None:
            asgi.connection_lost(error)
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.lost()
        self._request = NO_REQUEST  # it holds the body, and nobody need look for a cycle
        if self._task is not None:
            self._task.cancel()

    def shutdown(self) -> None:
        """The server stops: what is being answered may end."""
        self._closing = True
        if self._state == "head" or self._held_up:
            self._close()
        elif self._asgi_busy and self._asgi is not None:
            self._asgi.shutdown()
        elif self._answer is not None:
            self._answer.keep_alive = False

    def pause_writing(self) -> None:
        self._paused = True
        self._must_take()
        if self._asgi_busy and self._asgi is not None:
            self._asgi.pause_writing()
        elif self._answer is not None:
            self._answer.flow(False)
        elif self._state == "head" and not self._searched:
            self._state, self._deadline = "answering", NEVER  # the last answer is not taken yet

    def resume_writing(self) -> None:
        self._paused = False
        self._stalled = NEVER
        if self._transport.is_closing():
            self._must_take()
        if self._asgi is not None:
            self._asgi.resume_writing()
        if self._answer is not None:
            self._answer.flow(True)
        if self._held_up:
            self._next()

    @property
    def _held_up(self) -> bool:
        """Whether the next request only waits for the caller to take the last answer."""
        return self._state == "answering" and self._answer is None and not self._asgi_busy

    def _close(self) -> None:
        """Close when what was written has been taken, or when it is plain that nobody takes it."""
        if not self._transport.is_closing():
            self._closing = True
            self._deadline = NEVER
            self._way.outbox.flush()
            self._must_take()
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        match self._state:
            case "dropping" | "taken":
                pass
            case "ours" | "theirs":
                self._advance(data)
            case "answering":
                self._buffer += data
                if len(self._buffer) > AHEAD_BYTES:
                    self._transport.pause_reading()
            case _:
                if self._buffer or not self._begin_again(data):
                    self._buffer += data
                    self._advance()

    def eof_received(self) -> bool:
        """The caller sends no more. He may have gone, or still read: only writing tells."""
        if self._ended:
            return True
        self._ended = True
        plain = self._transport.get_extra_info("ssl_object") is None
        unread = self._state == "head" and self._buffer and not self._searched
        if not plain or not (self._state == "answering" or unread):
            self._close()
            return False
        if self._answer is not None:
            if not self._buffer:
                self._answer.keep_alive = False
            self._answer.probe()
        elif self._asgi is not None and not self._asgi.answering and self._head.minor:
            self._transport.write(PROCESSING)  # as Answer.probe: it may take long
        self._look()
        return True

    def _look(self) -> None:
        """After the caller's end: was what we wrote since then answered by a reset?"""
        if self._state == "taken" or self._transport.is_closing():
            return
        sock = self._transport.get_extra_info("socket")
        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
            self._transport.abort()
        else:
            self._loop.call_later(LOOK_S, self._look)

    # -- reading requests --------------------------------------------------------------------

    def _advance(self, body: bytes = b"") -> None:
        """Do with the bytes that have come what can be done.

        :param body: more of the body that is read; the buffer is empty then
        """
        try:
            if body:
                self._read_body(body)
            while self._buffer and self._step():
                pass
        except Malformed as error:
            self._refuse(_not_http(error), error.status)
        if self._ended and self._within_request:
            self._close()  # the rest of it never comes

    def _begin_again(self, data: bytes) -> bool:
        """Begin a request with the head of the one before, as those who keep a connection send
        most. False: it is none, or not let in; nothing was done, and the long way is to be gone.
        """
        known = self._request.known
        if known is None or (found := known.template.match(data)) is None:
            return False
        length, begin = found
        admitted = known.admitted
        if length > known.most or not self._way.gate.trust.admits_again(admitted.caller):
            return False
        self._request = known.another()
        self._request_id = self._request.request_id
        self._head, self._server_of, self._admitted = known.head, known.serve, admitted
        if length != len(data) - begin or length > SMALL_BYTES:
            self._left = length
            self._buffer += data[begin:]
            self._begin_body()
            self._advance()
            return True
        try:
            self._have_answered(data[begin:])
        except HiveError as error:
            self._refuse(error)
        return True

    @property
    def _within_request(self) -> bool:
        """Whether a request has begun to come, and all of it that is here has been looked at."""
        return (
            (self._state == "head" and bool(self._searched))
            or (self._state == "ours" and not self._whole)
            or self._state == "theirs"
        )

    def _step(self) -> bool:
        """One step; False when more bytes, or the end of an answer, have to come first."""
        match self._state:
            case "head":
                return self._read_head()
            case "ours" | "theirs":
                data = bytes(self._buffer)
                self._buffer.clear()
                self._read_body(data)
                return False
            case _:
                return False

    def _read_body(self, data: bytes) -> None:
        """Take in more of a body; what is not of it any more goes to the buffer."""
        if self._state == "theirs":
            self._pass_on(data)
        elif self._whole:
            self._buffer += data
        else:
            self._collect(data)

    def _read_head(self) -> bool:
        found = request_head(self._buffer, 0, self._searched)
        if found is None:
            if not self._searched:
                self._within(HEAD_S)
            self._searched = len(self._buffer)
            return False
        self._head, begin = found
        if self._way.elsewhere is not None and self._way.elsewhere.wants(self._head):
            self._leave(self._way.elsewhere)
            return False
        self._searched = 0
        self._left = self._head.length
        if self._head.chunked:
            self._chunks = Chunked()
        serve = self._way.server(self._head.method, self._head.path) or self._way.quick(self._head)
        if serve is not None:
            self._server_of = serve
            raw = bytes(self._buffer[:begin])
            del self._buffer[:begin]
            self._begin_ours(raw)
        elif self._head.upgrade in self._way.take:
            del self._buffer[:begin]
            self._hand_over()
        else:
            raw = bytes(self._buffer[:begin])
            del self._buffer[:begin]
            self._begin_theirs(raw)
        return True

    def _begin_ours(self, raw: bytes) -> None:
        if not self._let_in():
            return
        self._request.known = self._known(raw)
        self._begin_body()

    def _begin_body(self) -> None:
        self._state = "ours"
        self._incoming = Incoming(self._left)
        self._whole = False
        if self._left is None or self._left > len(self._buffer):
            self._within(BODY_S)
        if self._head.expect_continue and not self._buffer:
            self._way.outbox.flush()
            self._transport.write(CONTINUE)
        if self._left == 0:
            self._collect(b"")

    def _let_in(self) -> bool:
        """Ask the gate; a refusal is the answer, and the end of the connection."""
        head = self._head
        headers = {_text(name): value.decode("latin-1") for name, value in head.values.items()}
        request_id = request_id_of(headers)
        scope: Scope = {
            "method": head.method,
            "path": head.path,
            "raw_path": head.path.encode("latin-1"),
            "query_string": head.query,
            "server": self._server_address,
            "client": self._client_address,
        }
        address = str(self._client_address[0]) if self._client_address else ""
        self._request_id = request_id
        self._request = Request(
            head.method, head.path, "", headers, b"", request_id, STRANGER, address
        )
        try:
            self._admitted = self._way.gate.admit(scope, headers)
        except HiveError as error:
            if head.path in self._way.serve:
                self._way.refused(head.path, error.status)
            self._refuse(error)
            return False
        headers.pop("content-length", None)
        self._request.caller = self._admitted.caller
        self._request.target = target_of(scope)
        return True

    def _known(self, raw: bytes) -> Known | None:
        """What holds for the next request with this head, too."""
        head, admitted = self._head, self._admitted
        usual = head.method == "POST" and head.length and not head.expect_continue
        template = Template.of(raw) if usual and admitted.lasting else None
        if template is None:
            return None
        usually = self._way.server(head.method, head.path) is not None
        most = admitted.max_body if usually else SMALL_BYTES  # what is quick is so with small ones
        return Known(template, head, copy(self._request), self._server_of, admitted, most)

    def _collect(self, data: bytes) -> None:
        """More of the body of an inference request."""
        incoming = self._incoming
        before = incoming.size
        if self._left is not None:
            end = min(len(data), self._left)
            self._left -= end
            incoming.add(data if end == len(data) else data[:end])
            self._whole = self._left == 0
        else:
            pieces: list[bytes] = []
            end = self._chunks.feed(data, 0, pieces)
            self._whole = self._chunks.ended
            for piece in pieces:
                incoming.add(piece)
        if self._whole:
            self._buffer += data[end:]
            incoming.end()
        if incoming.size > self._admitted.max_body:
            self._refuse(too_large(self._admitted.max_body))
            return
        self._later((incoming.size - before) / 1024)
        self._work()

    def _work(self) -> None:
        """Work through what has come of a large body, a part in each turn of the event loop, so
        that others have theirs; then read on, or answer."""
        if self._transport.is_closing():
            return
        try:
            if self._state == "ours" and self._incoming.work():
                self._transport.pause_reading()
                self._loop.call_soon(self._work)
                return
            self._transport.resume_reading()
            if self._state == "ours" and self._whole:
                self._answer_it()
        except HiveError as error:
            self._transport.resume_reading()
            self._refuse(error)

    def _begin_theirs(self, raw: bytes) -> None:
        self._way.outbox.flush()
        if self._asgi is None:
            lent = Lent(self._transport, self._close)
            self._asgi = Asgi(self._config, self._server, self._app_state, lent, self._asgi_done)
        self._state, self._asgi_busy = "theirs", True
        self._within(BODY_S if self._left != 0 else NEVER)
        if self._paused:
            self._asgi.pause_writing()
        self._asgi.data_received(raw)
        self._after_their_body()

    def _pass_on(self, data: bytes) -> None:
        """More of the body of a request to the ASGI application."""
        assert self._asgi is not None
        if self._left is not None:
            end = min(len(data), self._left)
            self._left -= end
        else:
            end = self._chunks.feed(data)
            end = end if self._chunks.ended else len(data)
        self._buffer += data[end:]
        self._later(end / 1024)
        self._asgi.data_received(data if end == len(data) else data[:end])
        self._after_their_body()

    def _after_their_body(self) -> None:
        whole = self._left == 0 if self._left is not None else self._chunks.ended
        if whole and self._state == "theirs":
            self._within(NEVER)
            self._state = "answering"
            if not self._asgi_busy:
                self._next()

    def _asgi_done(self) -> None:
        self._asgi_busy = False
        if self._state == "answering":
            self._next()

    def _hand_over(self) -> None:
        """The connection becomes another protocol's, if the gate lets its caller in."""
        path, take = self._way.take[self._head.upgrade or b""]
        if self._head.path != path or self._head.method != "GET" or self._left != 0:
            self._refuse(InvalidRequest(f"That upgrade belongs to GET {path}."))
            return
        if not self._let_in():
            return
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._state = "taken"
        self._within(NEVER)
        self._way.outbox.flush()
        self._server.connections.discard(self)
        try:
            take(self._request, self._transport, rest)
        except HiveError as error:
            self._refuse(error)

    def _leave(self, elsewhere: Elsewhere) -> None:
        """The connection is served elsewhere from this request on."""
        data = bytes(self._buffer)
        self._buffer.clear()
        self._state = "taken"
        self._within(NEVER)
        self._way.outbox.flush()
        self._server.connections.discard(self)
        elsewhere.take(self._transport, data)

    # -- answering ---------------------------------------------------------------------------

    def _answer_it(self) -> None:
        """The request is whole. :raises HiveError: its body is refused"""
        body = self._incoming.whole()
        self._incoming = Incoming()
        digest = self._admitted.digest
        if digest is not None and digest_of(body) != digest:
            raise self._admitted.other_body()
        self._have_answered(body)

    def _have_answered(self, body: Body) -> None:
        request, head = self._request, self._head
        del self._head  # 2 KB that a long answer needs no more
        request.body = body
        self._deadline = NEVER
        self._state = "answering"
        last = self._closing or (self._ended and not self._buffer)
        answer = self._answer = Answer(
            self._transport,
            self._answered,
            head.keep_alive and not last,
            outbox=self._way.outbox,
            request_id=request.request_id,
            http10=not head.minor,
            writable=not self._paused,
        )
        serving = self._server_of(request, answer)
        if serving is not None:
            self._task = self._loop.create_task(self._serve(serving, request, answer))
            self._server.tasks.add(self._task)
            self._task.add_done_callback(self._server.tasks.discard)

    async def _serve(self, serving: Awaitable[None], request: Request, answer: Answer) -> None:
        try:
            await serving
        except HiveError as error:
            self._fail(answer, error)
        except Exception:  # the caller is told, and the connection goes on
            log.exception("serving %s broke", request.path)
            self._fail(answer, HiveError(errors.BROKEN))
        finally:
            answer.abort()

    def _fail(self, answer: Answer, error: HiveError) -> None:
        if not answer.started:
            self._say(answer, error, error.status)

    def _say(self, answer: Answer, error: HiveError, status: int) -> None:
        body = errors.envelope(error, self._way.hop, self._request_id)
        answer.whole(status, error_headers(error), body)

    def _answered(self, keep_alive: bool) -> None:
        """The answer has ended."""
        self._answer = self._task = None
        self._request.body = b""
        if keep_alive and not self._closing:
            self._next()
        elif self._state != "dropping":
            self._close()

    def _next(self) -> None:
        """Ready for the next request, as soon as the caller takes bytes."""
        self._request_id = ""
        if self._closing or (self._ended and not self._buffer) or self._transport.is_closing():
            self._close()
            return
        if self._paused:
            return
        self._state = "head"
        self._within(IDLE_S)
        self._transport.resume_reading()
        if self._buffer:
            self._loop.call_soon(self._advance)

    def _refuse(self, error: HiveError, status: int | None = None) -> None:
        """Answer with an error, and take no more of what this caller sends."""
        if self._transport.is_closing():
            return
        if self._state == "theirs" and not self._taken_back():
            self._close()
            return
        self._state = "dropping"
        self._buffer.clear()
        self._incoming = Incoming()
        self._within(DROPPED_S)
        outbox = self._way.outbox
        self._request_id = self._request_id or request_id_of({})
        answer = Answer(
            self._transport,
            lambda keep: None,
            False,
            outbox=outbox,
            request_id=self._request_id,
        )
        self._say(answer, error, status or error.status)
        outbox.flush()
        if self._ended:
            self._close()
        elif self._transport.can_write_eof():
            self._transport.write_eof()
        else:  # TLS has no half-close: it ends when he has had time to read
            self._within(DROPPED_TLS_S)

    def _taken_back(self) -> bool:
        """Have a request that the ASGI application serves answered here, if it can be still."""
        asgi = self._asgi
        if asgi is None or asgi.answering:
            return False
        self._asgi, self._asgi_busy = None, False
        self._transport.resume_reading()
        asgi.connection_lost(ConnectionAbortedError())
        return True

    # -- the time ----------------------------------------------------------------------------

    def _within(self, seconds: float) -> None:
        """From now on, this is how long the next thing may take."""
        self._deadline = self._loop.time() + seconds
        if self._deadline < self._wakes_at:
            self._wake_at(self._deadline)

    def _later(self, seconds: float) -> None:
        """Give so much more time, but for what comes next never more than a body has at first."""
        if self._deadline < NEVER:
            self._deadline = min(self._deadline + seconds, self._loop.time() + BODY_S)

    def _must_take(self) -> None:
        """From now on, this is how long the caller may take nothing."""
        self._stalled = self._loop.time() + STALLED_S
        if self._stalled < self._wakes_at:
            self._wake_at(self._stalled)

    def _wake_at(self, due: float) -> None:
        """Have the timer go off then, which is no later than a deadline; one that has moved away
        leaves it as it is."""
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = due
        self._timer = self._loop.call_at(due, self._late)

    def _late(self) -> None:
        self._timer, self._wakes_at = None, NEVER
        due, now = min(self._deadline, self._stalled), self._loop.time()
        if now < due:
            if due < NEVER:
                self._wake_at(due)
        elif now >= self._stalled:
            self._transport.abort()
        elif self._state in ("ours", "theirs") or (self._state == "head" and self._searched):
            self._refuse(
                RequestTimeout("The request did not come in time. Send it faster, or anew.")
            )
        elif self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._way.outbox.flush()
            self._transport.close()


@lru_cache(maxsize=256)
def _text(name: bytes) -> str:
    return name.decode("latin-1")


def error_headers(error: HiveError) -> list[tuple[bytes, bytes]]:
    """The headers of a refusal."""
    headers = [(b"content-type", b"application/json")]
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % math.ceil(error.retry_after)))
    return headers


def _not_http(error: Malformed) -> HiveError:
    return InvalidRequest(
        f"This request is not taken as it stands. {error.message.rstrip('.')}.",
        code="malformed_request",
    )
