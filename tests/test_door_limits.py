"""What a door bears of callers that are slow, take nothing, leave early or say too much at once.

A door in the test's own process, at a real socket, with small buffers and short deadlines.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Literal

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as AsgiRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.cluster import until
from tests.test_door import Caller, get, post
from wire.answering import Answering
from wire.door import Answer, Doorway, Request
from wire.door import door as module
from wire.gate import Gate
from wire.http1.body import LAST_CHUNK
from wire.http1.outbox import Outbox
from wire.revocations import Revocations
from wire.serve import Server
from wire.trust import Trust

AWAITED = ("Expect: 100-continue", "Content-Length: 2")
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"
LARGE = b"x" * 900_000  # far over what the sockets and the transport hold
SOON_S = 0.2
NEVER_S = 600.0  # a deadline that must not be the one that is met
BUFFER = 16 * 1024
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream")]
EVENT = b"data: 12345\n\n"

Kind = Literal["inference", "asgi"]
KINDS: tuple[Kind, ...] = ("inference", "asgi")


class Served:
    """A door, and what those behind it have seen."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        """The paths of the requests, as they were begun."""
        self.writable: list[bool] = []
        """Whether the connection took bytes when each inference answer began."""
        self.flow: list[bool] = []
        """What the answer at ``/stream`` was told of that."""
        self.go_on = asyncio.Event()
        self.server: Server
        self.port = 0

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    async def let_go(self) -> None:
        """Wait until the door has no connection any more."""
        await until(lambda: not self.connections, "the door to let its caller go")

    def _begin(self, request: Request, answer: Answering) -> None:
        self.begun.append(request.path)
        self.writable.append(answer.writable)

    def small(self, request: Request, answer: Answering) -> None:
        self._begin(request, answer)
        answer.whole(200, JSON, b"{}")

    def large(self, request: Request, answer: Answering) -> None:
        self._begin(request, answer)
        answer.whole(200, JSON, LARGE)

    def medium(self, request: Request, answer: Answering) -> None:
        """More than the sockets hold, less than pauses the transport."""
        self._begin(request, answer)
        answer.whole(200, JSON, b"x" * 62_000)

    def stream(self, request: Request, answer: Answering) -> None:
        self._begin(request, answer)
        answer.on_writable = self.flow.append
        answer.head(200, EVENTS, length=None)
        answer.chunk(LARGE)
        answer.write(LAST_CHUNK)
        answer.end()

    async def waiting(self, request: Request, answer: Answering) -> None:
        self._begin(request, answer)
        await self.go_on.wait()
        answer.whole(200, JSON, b"{}")

    async def cut(self, request: Request, answer: Answering) -> None:
        """A stream of events, the first of them written in two halves."""
        self._begin(request, answer)
        framed = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
        whole = False
        answer.between = lambda: whole
        answer.head(200, EVENTS, length=None)
        answer.write(framed[:9])
        await self.go_on.wait()
        answer.write(framed[9:])
        whole = True
        self.go_on.clear()
        await self.go_on.wait()
        answer.chunk(EVENT)
        answer.write(LAST_CHUNK)
        answer.end()

    async def read(self, request: AsgiRequest) -> Response:
        self.begun.append(request.url.path)
        return Response(await request.body())

    async def asgi_small(self, request: AsgiRequest) -> Response:
        self.begun.append(request.url.path)
        return Response(b"{}")

    async def asgi_waiting(self, request: AsgiRequest) -> Response:
        await self.go_on.wait()
        return Response(b"{}")

    async def asgi_large(self, request: AsgiRequest) -> Response:
        """Answers at once, whether or not its request has come whole."""
        self.begun.append(request.url.path)
        return Response(LARGE)


class Guarded:
    """An ASGI application of which it is no fault that its caller leaves."""

    def __init__(self, app: Starlette) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await self._app(scope, receive, send)


@asynccontextmanager
async def listening(sock: socket.socket) -> AsyncIterator[Served]:
    served = Served()
    trust = Trust(None, Revocations(None), role="hive", id="h", instance="i", listens_openly=False)
    way = Doorway(
        Gate(trust),
        "hive",
        {
            "/small": served.small,
            "/medium": served.medium,
            "/large": served.large,
            "/stream": served.stream,
            "/waiting": served.waiting,
            "/cut": served.cut,
        },
    )
    app = Starlette(
        routes=[
            Route("/asgi/read", served.read, methods=["POST"]),
            Route("/asgi/small", served.asgi_small),
            Route("/asgi/waiting", served.asgi_waiting, methods=["POST"]),
            Route("/asgi/large", served.asgi_large, methods=["GET", "POST"]),
        ]
    )
    served.server = Server(Guarded(app), way, None)
    served.port = sock.getsockname()[1]
    serving = asyncio.create_task(served.server.serve(sockets=[sock]))
    await served.server.ready.wait()
    try:
        yield served
    finally:
        served.go_on.set()
        for connection in list(served.server.server_state.connections):
            connection._transport.abort()  # type: ignore[union-attr]  # a Door
        served.server.should_exit = True
        await serving


@contextmanager
def listener() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    with listener() as sock:
        async with listening(sock) as made:
            yield made


@pytest.fixture
def deadlines(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make one of the deadlines short, and all others so long that they cannot be met."""

    def shorten(name: str) -> None:
        for each in ("IDLE_S", "HEAD_S", "BODY_S", "STALLED_S", "DROPPED_S"):
            monkeypatch.setattr(module, each, SOON_S if each == name else NEVER_S)

    return shorten


class Slow(Caller):
    """A caller with small buffers that reads only when asked to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def say(self, *pieces: bytes) -> None:
        await self._loop.sock_sendall(self.sock, b"".join(pieces))

    async def rest(self) -> bytes:
        """What comes until the connection ends, whether cleanly or not."""
        got = bytearray()
        async with asyncio.timeout(20):
            try:
                while data := await self._loop.sock_recv(self.sock, 65536):
                    got += data
            except ConnectionResetError:
                pass
        return bytes(got)

    async def until_byte(self) -> bytes:
        async with asyncio.timeout(20):
            return await self._loop.sock_recv(self.sock, 1)


@asynccontextmanager
async def slow(served: Served) -> AsyncIterator[Slow]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
        yield Slow(sock)


@asynccontextmanager
async def calling(served: Served) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()


async def some_turns(served: Served) -> None:
    """Let others have many answers, so that the door had time for anything it wanted to do."""
    async with calling(served) as caller:
        for _ in range(30):
            caller.send(post(b"{}", path="/small"))
            assert (await caller.answer())[0] == 200


def large_of(kind: Kind) -> bytes:
    return post(b"{}", path="/large") if kind == "inference" else get("/asgi/large")


def bodied(kind: Kind, body: bytes = b"{}", *headers: str) -> bytes:
    path = "/small" if kind == "inference" else "/asgi/read"
    return post(body, *headers, path=path)


# -- a caller that takes nothing -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_the_next_request_waits_until_the_last_answer_is_taken(
    kind: Kind, served: Served
) -> None:
    async with slow(served) as caller:
        await caller.say(large_of(kind) * 30)
        assert await caller.until_byte() == b"H"
        await some_turns(served)
        asked = "/large" if kind == "inference" else "/asgi/large"
        assert served.begun.count(asked) == 1
        caller.sock.shutdown(socket.SHUT_WR)
        assert (await caller.rest()).count(LARGE) == 30
    assert served.begun.count(asked) == 30
    assert all(served.writable)


async def test_a_stream_behind_an_answer_begins_when_bytes_are_taken_and_is_told_of_the_pause(
    served: Served,
) -> None:
    async with slow(served) as caller:
        await caller.say(post(b"{}", path="/large"), post(b"{}", path="/stream"))
        await caller.until_byte()
        await some_turns(served)
        assert "/stream" not in served.begun
        caller.sock.shutdown(socket.SHUT_WR)
        assert (await caller.rest()).endswith(LARGE + b"\r\n" + LAST_CHUNK)
    assert all(served.writable)
    assert served.flow[0] is False


def test_an_answer_begun_on_a_paused_connection_knows_it() -> None:
    answer = Answer(
        asyncio.Transport(),
        lambda usable: None,
        True,
        outbox=Outbox(),
        request_id="r",
        writable=False,
    )
    told: list[bool] = []
    answer.on_writable = told.append
    assert not answer.writable
    answer.flow(True)
    assert answer.writable
    assert told == [True]


@pytest.mark.parametrize("more", [1, 3], ids=["one request", "more behind it"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_caller_that_takes_nothing_is_let_go(
    kind: Kind, more: int, served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("STALLED_S")
    async with slow(served) as caller:
        await caller.say(large_of(kind) * more)
        await caller.until_byte()
        await served.let_go()
        assert len(await caller.rest()) < len(LARGE)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_caller_that_takes_nothing_of_his_last_answer_is_let_go(
    kind: Kind, served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("STALLED_S")
    asked = large_of(kind).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    async with slow(served) as caller:
        await caller.say(asked)
        await caller.until_byte()
        await served.let_go()
        assert len(await caller.rest()) < len(LARGE)


async def test_a_caller_that_neither_sends_his_body_nor_takes_his_answer_is_let_go(
    served: Served, deadlines: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines("BODY_S")
    monkeypatch.setattr(module, "STALLED_S", 2 * SOON_S)
    async with slow(served) as caller:
        await caller.say(post(b"{}", "Content-Length: 9", path="/asgi/large", length=False))
        await caller.until_byte()
        await served.let_go()


async def test_a_caller_that_leaves_a_little_untaken_is_let_go_when_he_has_idled(
    served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("IDLE_S")
    async with slow(served) as caller:
        await caller.say(post(b"{}", path="/medium"))
        await caller.until_byte()
        await served.let_go()
        assert len(await caller.rest()) < 62_000


# -- deadlines -------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [False, True], ids=["at first", "after an answer"])
async def test_a_slow_head_is_refused(
    earlier: bool, served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("HEAD_S")
    async with calling(served) as caller:
        if earlier:
            caller.send(bodied("inference"))
            assert (await caller.answer())[0] == 200
        caller.send(b"POST /small HTT")
        status, headers, _ = await caller.answer()
        assert status == 408
        assert headers["connection"] == "close"
        assert await caller.closed() == b""


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_body_is_refused(
    kind: Kind, framing: str, served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("BODY_S")
    async with calling(served) as caller:
        caller.send(bodied(kind))
        assert (await caller.answer())[0] == 200
        if framing == "length":
            caller.send(bodied(kind, b'{"a": 1}')[:-3])
        else:
            head = post(
                b"",
                "Transfer-Encoding: chunked",
                path="/small" if kind == "inference" else "/asgi/read",
                length=False,
            )
            caller.send(head, b"5\r\n{")
        status, headers, body = await caller.answer()
        assert status == 408
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["message"]
        assert await caller.closed() == b""


@pytest.mark.parametrize("kind", KINDS)
async def test_who_has_sent_much_may_not_be_silent_for_long(
    kind: Kind, served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("BODY_S")
    path = "/small" if kind == "inference" else "/asgi/read"
    async with calling(served) as caller:
        caller.send(post(b"", "Content-Length: 600000", path=path, length=False), b" " * 500_000)
        assert (await caller.answer())[0] == 408
        assert await caller.closed() == b""


@pytest.mark.parametrize("kind", KINDS)
async def test_an_idle_connection_is_closed(
    kind: Kind, served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("IDLE_S")
    async with calling(served) as unused, calling(served) as caller:
        caller.send(bodied(kind))
        assert (await caller.answer())[0] == 200
        assert await caller.closed() == b""
        assert await unused.closed() == b""
    await served.let_go()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_connection_that_was_paused_idles_no_longer_than_any(
    kind: Kind, served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("IDLE_S")
    async with slow(served) as caller:
        await caller.say(large_of(kind))
        await caller.until_byte()
        await some_turns(served)
        assert (await caller.rest()).endswith(LARGE)


async def test_a_body_is_awaited_no_longer_because_its_answer_was_paused(
    served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("BODY_S")
    async with slow(served) as caller:
        await caller.say(post(b"{}", "Content-Length: 9", path="/asgi/large", length=False))
        assert (await caller.rest()).endswith(LARGE)
    await served.let_go()


async def test_a_refused_caller_that_goes_on_sending_is_dropped(
    served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("DROPPED_S")
    async with calling(served) as caller:
        caller.send(b"PO ST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await caller.answer())[0] == 400
        assert await caller.closed() == b""
        caller.send(b"more")
        await served.let_go()


@pytest.mark.parametrize("kind", KINDS)
async def test_no_deadline_runs_while_an_answer_is_awaited(
    kind: Kind, served: Served, deadlines: Callable[[str], None]
) -> None:
    deadlines("IDLE_S")
    async with calling(served) as idle, calling(served) as caller:
        caller.send(post(b"{}", path="/waiting" if kind == "inference" else "/asgi/waiting"))
        assert await idle.closed() == b""
        served.go_on.set()
        assert (await caller.answer())[0] == 200


# -- callers that leave early ----------------------------------------------------------------


async def test_what_was_sent_before_the_end_is_all_answered(served: Served) -> None:
    async with calling(served) as caller:
        caller.send(
            post(b"{}", path="/waiting"),
            post(b"{}", path="/small"),
            get("/asgi/small"),
            post(b"{}", path="/small"),
        )
        caller.writer.write_eof()
        await until(lambda: served.begun == ["/waiting"], "the first request to be begun")
        await some_turns(served)
        served.go_on.set()
        answers = [await caller.answer() for _ in range(4)]
        assert [status for status, _, _ in answers] == [200] * 4
        assert "connection" not in answers[0][1]
        assert answers[3][1]["connection"] == "close"
        assert await caller.closed() == b""
    await served.let_go()


@pytest.mark.parametrize(
    ("behind", "begins"),
    [
        (post(b"{}", path="/stream"), b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"),
        (post(b"{}", path="/large"), b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"),
        (get("/asgi/small"), b"HTTP/1.1 200 OK\r\n"),
        (
            post(b"", "Expect: 100-continue", "Content-Length: 2", path="/small", length=False),
            GO_ON,
        ),
        (b"PO ST / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
        (get("/small")[:-2] + b"Transfer-Encoding: chunked\r\n\r\nx", b"HTTP/1.1 400 "),
    ],
    ids=["a stream", "a large one", "the application's", "100", "a refusal", "a refused body"],
)
async def test_answers_that_leave_together_leave_before_what_follows(
    behind: bytes, begins: bytes, served: Served
) -> None:
    async with calling(served) as caller:
        caller.send(post(b"{}", path="/small") * 3, behind)
        for _ in range(3):
            assert (await caller.answer())[2] == b"{}"
        async with asyncio.timeout(20):
            assert await caller.reader.readexactly(len(begins)) == begins


@pytest.mark.parametrize("first", [get("/asgi/small"), bodied("asgi"), bodied("inference")])
async def test_half_a_request_before_the_end_is_not_waited_for(
    first: bytes, served: Served
) -> None:
    async with calling(served) as caller:
        caller.send(first, bodied("inference")[:-1])
        caller.writer.write_eof()
        assert (await caller.answer())[0] == 200
        assert await caller.closed() == b""
    await served.let_go()


async def test_nothing_is_added_within_a_chunk_when_the_caller_sends_no_more(
    served: Served,
) -> None:
    async with calling(served) as caller:
        caller.send(post(b"{}", path="/cut"))
        async with asyncio.timeout(20):
            await caller.reader.readuntil(b"\r\n\r\n")
            assert await caller.reader.readexactly(9) == b"d\r\ndata: "
        caller.writer.write_eof()
        await some_turns(served)
        served.go_on.set()
        await until(lambda: not served.go_on.is_set(), "the first event to be whole")
        served.go_on.set()
        rest = await caller.closed()
    assert rest == b"12345\n\n\r\n" + b"%x\r\n%b\r\n" % (len(EVENT), EVENT) + LAST_CHUNK


async def test_a_caller_that_was_reset_before_he_was_met_is_let_go(served: Served) -> None:
    loop = asyncio.get_running_loop()
    broken: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: broken.append(context))
    try:
        with listener() as sock:
            with socket.create_connection(sock.getsockname()) as caller:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            came, _ = sock.accept()
        with pytest.raises(OSError, match="not connected"):
            came.getpeername()
        came.setblocking(False)
        await loop.connect_accepted_socket(served.server.door, came)
        await some_turns(served)
        await served.let_go()
    finally:
        loop.set_exception_handler(None)
    assert broken == []


# -- refusals --------------------------------------------------------------------------------


async def test_each_refusal_has_a_request_id_of_its_own(served: Served) -> None:
    async with calling(served) as caller:
        caller.send(bodied("inference", b"{}", "X-Request-ID: mine"))
        assert (await caller.answer())[0] == 200
        caller.send(b"PO ST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, headers, _ = await caller.answer()
    assert status == 400
    assert headers["x-request-id"].startswith("req-")


async def test_a_refused_body_has_its_requests_id(served: Served) -> None:
    async with calling(served) as caller:
        head = post(b"", "Transfer-Encoding: chunked", "X-Request-ID: mine", path="/small")
        caller.send(head.replace(b"Content-Length: 0\r\n", b""), b"zz\r\n")
        status, headers, _ = await caller.answer()
    assert status == 400
    assert headers["x-request-id"] == "mine"
