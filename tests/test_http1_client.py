"""One exchange with an upstream: its bytes as they came, whatever the upstream does to them."""

from __future__ import annotations

import asyncio
import functools
import itertools
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import h11
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from keeper.tls import make
from operations.errors import HiveError, WorkerBroke
from wire.http1.body import Chunked, chunk
from wire.http1.client import Connection, Exchange, NoAnswer, Pool, Unreachable, tcp, unix
from wire.http1.cuts import CHUNK_BYTES, EVENT_BYTES, Chunks, Plain
from wire.http1.head import Header
from wire.http1.pieces import PART_BYTES, Pieces

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
HELLO = JSON + b"content-length: 5\r\n\r\nhello"
EVENTS = [b'data: {"i":%d}\n\n' % i for i in range(5)]
STREAM = b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"
BIG = 20_000_000
DEADLINE_S = 15


def over_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test on the loop that the daemons run on."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        async def in_time() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await test(*args, **options)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(in_time())

    return run


class Heard:
    """A sink that writes down what it is told, and checks the order it is told in."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[Header] = []
        self.chunked = False
        self.pieces: list[bytes] = []
        self.error: HiveError | None = None
        self.started = False
        self.begun = asyncio.Event()
        self.over = asyncio.Event()
        self.on_data: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        self.at_once = False  # whether all of it was told with one call

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def head(self, status: int, headers: list[Header], chunked: bool) -> None:
        assert not self.status
        assert not self.over.is_set()
        self.status, self.headers, self.chunked = status, headers, chunked
        self.begun.set()

    def data(self, data: bytes) -> None:
        assert self.status
        assert data
        assert type(data) is bytes
        assert not self.over.is_set()
        self.pieces.append(data)
        self.on_data()

    def end(self) -> None:
        assert self.status
        assert not self.over.is_set()
        self.over.set()
        self.on_end()

    def whole(self, status: int, headers: list[Header], body: bytes) -> None:
        assert not self.status
        self.at_once = True
        self.head(status, headers, False)
        if body:
            self.data(body)
        self.end()

    def failed(self, error: HiveError, started: bool) -> None:
        assert not self.over.is_set()
        assert started == bool(self.status)
        self.error, self.started = error, started
        self.over.set()


class Upstream:
    """A server that does with each connection what the test says."""

    def __init__(self, path: str, handler: Handler) -> None:
        self.path = path
        self.accepted = 0
        self.open = 0
        self.gone = asyncio.Event()
        self._handler = handler

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open += 1
        try:
            await self._handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self.gone.set()
            writer.close()


@asynccontextmanager
async def upstream(handler: Handler) -> AsyncIterator[Upstream]:
    with tempfile.TemporaryDirectory() as folder:
        served = Upstream(f"{folder}/u.sock", handler)
        server = await asyncio.start_unix_server(served, served.path)
        try:
            yield served
        finally:
            server.close()


@asynccontextmanager
async def pool(path: str, **options: Any) -> AsyncIterator[Pool]:
    made = Pool(unix(path), host=b"engine", name="worker w-1", hop="worker", **options)
    try:
        yield made
    finally:
        made.close()
        await drained(made)


async def drained(made: Pool) -> None:
    """Everything of the pool is gone."""
    await eventually(lambda: made.connections == made.idle == made.waiting == 0)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():  # noqa: ASYNC110  # it is no event of ours
            await asyncio.sleep(0.001)


def ask(made: Pool, heard: Heard, body: bytes | Pieces = b"{}", method: str = "POST") -> Exchange:
    return made.request(method, b"/v1/x", [(b"content-type", b"application/json")], body, heard)


async def told(made: Pool, **options: Any) -> Heard:
    heard = Heard()
    ask(made, heard, **options)
    await heard.over.wait()
    return heard


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = [line for line in head.split(b"\r\n") if line.startswith(b"content-length: ")]
    return head, await reader.readexactly(int(length[0][16:])) if length else b""


def answers(*raw: bytes, close: bool = False, step: int = 0) -> Handler:
    """Answers each request of a connection with ``raw``, ``step`` bytes at a time."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            for part in raw:
                for at in range(0, len(part), step or len(part)):
                    writer.write(part[at : at + (step or len(part))])
                    await asyncio.sleep(0)
            if close:
                return

    return handler


def payload(raw: bytes) -> bytes:
    """What chunks carry, as h11 reads them."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + raw)
    found = b""
    while type(event := reader.next_event()) is not h11.NEED_DATA:
        match event:
            case h11.Data():
                found += event.data
            case h11.EndOfMessage():
                return found
            case h11.Response():
                pass
            case _:
                break
    return found


# -- answers, however they come ----------------------------------------------------------------

ANSWERS = {
    "length": (HELLO, "POST", b"hello"),
    "no body": (JSON + b"content-length: 0\r\n\r\n", "POST", b""),
    "chunks": (JSON + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "POST", None),
    "events": (SSE + STREAM, "POST", None),
    "trailers": (SSE + STREAM[:-2] + b"x-took: 3\r\nx-more: 1\r\n\r\n", "POST", None),
    "interim": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + HELLO,
        "POST",
        b"hello",
    ),
    "HEAD": (JSON + b"content-length: 5\r\n\r\n", "HEAD", b""),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", "POST", b""),
    "304": (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", "GET", b""),
    "error": (b"HTTP/1.1 500 \r\ncontent-length: 4\r\n\r\noops", "POST", b"oops"),
}


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("name", ANSWERS)
@over_uvloop
async def test_an_answer_comes_as_it_was_sent_and_its_connection_serves_the_next(
    name: str, step: int
) -> None:
    raw, method, body = ANSWERS[name]
    async with upstream(answers(raw, step=step)) as there, pool(there.path) as made:
        for _ in range(2):
            heard = await told(made, method=method, body=b"" if method != "POST" else b"{}")
            assert heard.error is None
            assert heard.body == (body if body is not None else raw.partition(b"\r\n\r\n")[2])
            assert heard.chunked == (body is None)
            assert made.idle == 1
        assert there.accepted == 1


def whole(body: bytes, *lines: bytes) -> bytes:
    return JSON + b"".join(lines) + b"content-length: %d\r\n\r\n" % len(body) + body


@over_uvloop
async def test_answers_with_nearly_the_same_head_are_told_apart() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\ncontent-length: 3\r\n\r\n"
    script = [
        (whole(b"hello"), b"hello"),
        (whole(b"hello again"), b"hello again"),
        (whole(b""), b""),
        (whole(b"x" * 300_000), b"x" * 300_000),
        (whole(b"dated", b"date: today\r\n"), b"dated"),
        (hints + whole(b"hinted"), b"hinted"),
        (hints + whole(b"twice"), b"twice"),
        (JSON + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", None),
        (whole(b"last"), b"last"),
    ]

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for raw, _ in script:
            await read_request(reader)
            writer.write(raw)

    async with upstream(handler) as there, pool(there.path) as made:
        for raw, body in script:
            heard = await told(made)
            assert (heard.error, heard.status) == (None, 200)
            head = raw.removeprefix(hints).partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
            assert [b": ".join(header) for header in heard.headers] == head
            assert heard.chunked == (body is None)
            if body is not None:
                assert heard.body == body
        assert there.accepted == 1


@over_uvloop
async def test_what_answers_head_has_no_body_under_a_known_head() -> None:
    bare = HELLO.removesuffix(b"hello")

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for raw in (HELLO, bare, HELLO):
            await read_request(reader)
            writer.write(raw)

    async with upstream(handler) as there, pool(there.path) as made:
        assert (await told(made)).body == b"hello"
        assert (await told(made, method="HEAD", body=b"")).body == b""
        assert (await told(made)).body == b"hello"
        assert there.accepted == 1


@over_uvloop
async def test_interim_answers_without_end_are_no_answer() -> None:
    flood = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 1000
    async with upstream(answers(flood + HELLO)) as there, pool(there.path) as made:
        heard = await told(made)
        assert heard.error is not None
        assert heard.error.code == "bad_answer"
        assert "interim" in heard.error.message
        assert made.idle == 0


@pytest.mark.parametrize("step", [0, 1])
@over_uvloop
async def test_an_answer_without_a_length_ends_with_its_connection(step: int) -> None:
    raw = JSON + b"\r\n" + b"so it goes " * 50
    async with upstream(answers(raw, step=step, close=True)) as there, pool(there.path) as made:
        heard = await told(made)
        assert (heard.error, heard.chunked) == (None, False)
        assert heard.body == b"so it goes " * 50
        assert made.idle == 0


@pytest.mark.parametrize("step", [0, 1, 3])
@over_uvloop
async def test_a_stream_of_events_without_chunks_is_cut_where_events_end(step: int) -> None:
    raw = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(EVENTS)
    async with upstream(answers(raw, step=step, close=True)) as there, pool(there.path) as made:
        heard = await told(made)
        assert heard.body == b"".join(EVENTS)
        assert all(piece.endswith(b"\n\n") for piece in heard.pieces)


@over_uvloop
async def test_the_upstream_gets_the_request_as_it_was_given() -> None:
    got: list[tuple[bytes, bytes]] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            got.append(await read_request(reader))
            writer.write(HELLO)

    async with upstream(handler) as there, pool(there.path) as made:
        await told(made, body=b"x" * 300_000)
        await told(made, body=b"")
        await told(made, body=b"", method="GET")
    (big, body), (empty, _), (get, _) = got
    assert body == b"x" * 300_000
    assert big == (
        b"POST /v1/x HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
        b"content-length: 300000\r\n\r\n"
    )
    assert b"content-length: 0\r\n" in empty
    assert b"content-length" not in get


@over_uvloop
async def test_a_header_that_would_break_the_request_is_refused_and_nothing_is_sent() -> None:
    async with upstream(answers(HELLO)) as there, pool(there.path) as made:
        with pytest.raises(ValueError, match="CR, LF or NUL"):
            made.request("POST", b"/", [(b"x", b"1\r\nhost: evil")], b"", Heard())
        with pytest.raises(ValueError, match="percent-encode"):
            made.request("POST", b"/ HTTP/1.1\r\nx: ", [], b"", Heard())
        assert made.connections == 0


@over_uvloop
async def test_a_sink_that_asks_again_as_its_answer_ends_gets_the_same_connection() -> None:
    async with upstream(answers(HELLO)) as there, pool(there.path) as made:
        first, second = Heard(), Heard()
        first.on_end = lambda: ask(made, second) and None
        ask(made, first)
        await second.over.wait()
        assert second.body == b"hello"
        assert there.accepted == 1


# -- where it is cut -----------------------------------------------------------------------------


def test_events_that_are_chunks_pass_without_a_copy() -> None:
    body = Chunks(events=True)
    for read in (chunk(EVENTS[0]), b"".join(map(chunk, EVENTS)), chunk(b"data: 1\r\n\r\n")):
        assert body.feed(read) is read
    assert body.feed(b"0\r\n\r\n") == b"0\r\n\r\n"
    assert body.ended
    assert not body.surplus


def test_a_read_that_ends_in_a_chunk_passes_on_the_bytes_before_it_as_they_came() -> None:
    body = Chunks(events=True)
    first, second = b"00a;x=y\r\ndata: 12\n\n\r\n", chunk(EVENTS[1])
    assert body.feed(first + second[:6]) == first
    assert body.feed(second[6:] + first) == second + first


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_chunks_own_line_breaks_are_not_taken_for_the_end_of_an_event(line_end: bytes) -> None:
    body = Chunks(events=True)
    assert body.feed(chunk(b"data: 1")) == b""
    assert body.feed(chunk(line_end)) == b""
    assert body.feed(chunk(line_end)) == chunk(b"data: 1" + 2 * line_end)
    assert body.feed(chunk(line_end)) == b"" or line_end == b"\r"


def test_events_that_do_not_fall_together_with_chunks_come_as_soon_as_they_are_whole() -> None:
    body = Chunks(events=True)
    assert body.feed(chunk(EVENTS[0] + EVENTS[1][:5])) == chunk(EVENTS[0])
    assert body.feed(chunk(EVENTS[1][5:] + EVENTS[2][:5])) == chunk(EVENTS[1])
    assert body.feed(chunk(EVENTS[2][5:])) == chunk(EVENTS[2])
    read = chunk(EVENTS[3])
    assert body.feed(read) is read
    assert body.feed(b"0\r\n\r\nHTTP") == b"0\r\n\r\n"
    assert body.ended
    assert body.surplus


def test_what_follows_a_body_is_no_part_of_it_however_it_is_cut() -> None:
    body = Chunks(events=True)
    assert body.feed(chunk(EVENTS[0] + b"data") + b"0\r\nx: 1\r\n\r\nHTTP") == (
        chunk(EVENTS[0] + b"data") + b"0\r\nx: 1\r\n\r\n"
    )
    assert body.ended
    assert body.surplus
    body = Chunks(events=True)
    assert body.feed(chunk(EVENTS[0] + b"data")) == chunk(EVENTS[0])
    assert body.feed(b"0\r\nx: 1\r\n\r\nHTTP") == chunk(b"data") + b"0\r\n\r\n"
    assert body.ended
    assert body.surplus


@pytest.mark.parametrize(
    ("lines", "at_once"),
    [
        (b"content-type: application/json\r\n", True),
        (b"content-type: text/event-stream\r\n", False),  # to which an event may be added
        (b"content-type: text/event-stream\r\ncontent-encoding: br\r\n", False),
        (b"content-type: application/json\r\nconnection: close\r\n", True),
    ],
)
@over_uvloop
async def test_an_answer_that_comes_in_one_piece_is_told_with_one_call(
    lines: bytes, at_once: bool
) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for nr in range(3):  # of the first one's head the others are known
            await read_request(reader)
            body = b"data: %d\n\n" % nr
            head = b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n" % (lines, len(body))
            writer.write(head + body)
            if b"close" in lines:
                break

    async with upstream(handler) as there, pool(there.path) as made:
        for nr in range(1 if b"close" in lines else 3):
            heard = Heard()
            ask(made, heard)
            await heard.over.wait()
            assert (heard.error, heard.body, heard.at_once) == (
                None,
                b"data: %d\n\n" % nr,
                at_once,
            )


@over_uvloop
async def test_events_that_are_compressed_are_not_searched_for_their_ends() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(SSE.replace(b"\r\n\r\n", b"\r\ncontent-encoding: br\r\n\r\n"))
        writer.write(chunk(b"squeezed"))
        await reader.read(1)

    async with upstream(handler) as there, pool(there.path) as made:
        heard = Heard()
        ask(made, heard)
        await eventually(lambda: heard.body == chunk(b"squeezed"))


def test_a_large_chunk_is_not_collected() -> None:
    body = Chunks(events=False)
    size = 10 * CHUNK_BYTES
    passed = body.feed(b"%x\r\n" % size) + body.feed(b"x" * 2 * CHUNK_BYTES)
    assert payload(passed) == b"x" * 2 * CHUNK_BYTES
    rest = [body.feed(b"x" * CHUNK_BYTES) for _ in range(8)]
    assert all(payload(piece) == b"x" * CHUNK_BYTES for piece in rest)
    body.feed(b"\r\n")
    assert body.feed(chunk(b"and as it came again")) == chunk(b"and as it came again")


@pytest.mark.parametrize("chunked", [True, False])
def test_an_event_too_large_to_hold_passes_in_parts_and_that_is_told(chunked: bool) -> None:
    body = Chunks(events=True) if chunked else Plain(None, events=True)
    frame = chunk if chunked else bytes
    passed = [body.feed(frame(b"data: 1\n\n"))]
    assert body.whole
    piece = b"x" * 10_000
    while body.whole:
        passed.append(body.feed(frame(piece)))
        assert len(passed) < EVENT_BYTES / 9_000
    passed.append(body.feed(frame(b"\n\n")))
    assert body.whole
    whole = payload(b"".join(passed)) if chunked else b"".join(passed)
    assert whole == b"data: 1\n\n" + piece * (len(passed) - 2) + b"\n\n"


texts = st.binary(min_size=1, max_size=12) | st.sampled_from(
    [
        b"\n",
        b"\r\n",
        b"\n\n",
        b"\r\n\r\n",
        b"data: 2",
        b"2\r\n\r\n",
        b"data: x\n\n",
        b"data: 1\r\n\r\n",
    ]
)


def pieces_of(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(raw) + 1) for cut in cuts} - {0}), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(edges) if a != b]


@settings(max_examples=3000)
@given(
    chunks=st.lists(texts, max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    every_byte=st.booleans(),
    events=st.booleans(),
    extension=st.sampled_from([b"", b";a=1", b"; q"]),
)
def test_any_cut_of_any_chunks_passes_on_whole_chunks_and_events_with_the_same_payload(
    chunks: list[bytes], cuts: list[int], every_byte: bool, events: bool, extension: bytes
) -> None:
    lines = (b"%x%b\r\n%b\r\n" % (len(text), extension, text) for text in chunks)
    raw = b"".join(lines) + b"0\r\n\r\n"
    reads = [raw[i : i + 1] for i in range(len(raw))] if every_byte else pieces_of(raw, cuts)
    body, passed = Chunks(events=events), b""
    for read in reads:
        assert not body.ended
        piece = body.feed(read)
        scanner, carried = Chunked(), list[bytes]()
        assert scanner.feed(piece, 0, carried) == len(piece)
        assert scanner.whole
        passed += piece
        if events and piece and not body.ended:
            assert b"".join(carried).endswith((b"\n\n", b"\n\r\n", b"\r\r"))
    assert body.ended
    assert not body.surplus
    assert payload(passed) == b"".join(chunks)


# -- upstreams that break -------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [HELLO, SSE + STREAM], ids=["whole", "stream"])
@over_uvloop
async def test_an_upstream_that_dies_at_any_byte_is_told_once_and_as_what_it_was(
    raw: bytes,
) -> None:
    told_head = raw.index(b"\r\n\r\n") + 4
    for sent in range(len(raw) + 1):
        async with upstream(answers(raw[:sent], close=True)) as there, pool(there.path) as made:
            heard = await told(made)
            assert raw[told_head:].startswith(heard.body)
            assert there.accepted == 1
            if sent == len(raw):
                assert heard.error is None
            elif sent < told_head:
                assert isinstance(heard.error, NoAnswer)
                assert heard.error.retryable
            else:
                assert type(heard.error) is WorkerBroke
                assert heard.started
                if heard.chunked and heard.body:
                    assert heard.body.endswith(b"\n\n\r\n")


@over_uvloop
async def test_an_upstream_that_resets_the_connection_is_told_as_one_that_ends_it() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(10)  # what is left unread makes closing a reset
        writer.transport.abort()

    async with upstream(handler) as there, pool(there.path) as made:
        heard = await told(made)
        assert isinstance(heard.error, NoAnswer)


@over_uvloop
async def test_a_connection_that_died_idle_is_replaced_once() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HELLO)
        await reader.readexactly(1)  # the next request finds it dying
        writer.transport.abort()

    async with upstream(handler) as there, pool(there.path) as made:
        for requests in range(1, 5):
            heard = await told(made)
            assert heard.body == b"hello"
            assert there.accepted == requests


@over_uvloop
async def test_a_request_is_not_sent_a_third_time() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        if there.accepted == 1:
            writer.write(HELLO)
            await read_request(reader)

    async with upstream(handler) as there, pool(there.path) as made:
        assert (await told(made)).error is None
        assert isinstance((await told(made)).error, NoAnswer)
        assert there.accepted == 2


@over_uvloop
async def test_a_request_that_was_begun_to_be_answered_is_not_sent_again() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HELLO)
        await read_request(reader)
        writer.write(b"H")

    async with upstream(handler) as there, pool(there.path) as made:
        assert (await told(made)).error is None
        assert isinstance((await told(made)).error, NoAnswer)
        assert there.accepted == 1


@over_uvloop
async def test_a_connection_that_is_closed_while_idle_leaves_the_pool() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HELLO)
        await close.wait()

    close = asyncio.Event()
    async with upstream(handler) as there, pool(there.path) as made:
        await told(made)
        assert made.idle == 1
        close.set()
        await eventually(lambda: made.connections == 0)


@over_uvloop
async def test_an_upstream_that_hangs_up_on_whoever_connects_leaves_nobody_waiting() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with upstream(handler) as there, pool(there.path) as made:
        heard = await asyncio.gather(*(told(made) for _ in range(200)))
        assert all(isinstance(answer.error, NoAnswer) for answer in heard)


@over_uvloop
async def test_a_connection_that_ends_as_it_is_made_is_told_as_no_answer() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async with upstream(handler) as there:

        async def connect(factory: Callable[[], asyncio.Protocol]) -> None:
            connection = factory()
            await unix(there.path)(lambda: connection)
            assert isinstance(connection, Connection)
            await eventually(lambda: connection.lost)

        made = Pool(connect, host=b"engine", name="worker w-1", hop="worker")
        assert isinstance((await told(made)).error, NoAnswer)
        await drained(made)


@over_uvloop
async def test_a_request_that_is_sent_again_is_not_overtaken_by_those_that_wait() -> None:
    order: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            if body == b"0" and there.accepted == 1:
                return
            order.append(body)
            writer.write(HELLO)

    async with upstream(handler) as there, pool(there.path, limit=1) as made:
        await told(made, body=b"warm")
        await asyncio.gather(*(told(made, body=b"%d" % i) for i in range(4)))
        assert order == [b"warm", b"0", b"1", b"2", b"3"]


@over_uvloop
async def test_nobody_there_is_told_as_such() -> None:
    async with pool("/nowhere/u.sock") as made:
        heard = await told(made)
        assert isinstance(heard.error, Unreachable)
        assert heard.error.message == (
            "The worker w-1 cannot be reached: No such file or directory. Send the request again."
        )
        assert heard.error.hop == "worker"


@over_uvloop
async def test_a_full_backlog_is_waited_for_as_long_as_connecting_may_take(tmp_path: Path) -> None:
    path = str(tmp_path / "u.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(0)
        async with pool(path, connect_s=0.1) as made:
            sinks = [Heard() for _ in range(5)]
            exchanges = [ask(made, heard) for heard in sinks]
            await eventually(lambda: sum(heard.over.is_set() for heard in sinks) >= 4)
            assert {type(heard.error) for heard in sinks[1:]} == {Unreachable}
            assert "within 0.1 s" in str(sinks[-1].error)
            exchanges[0].cancel()
        async with pool(path) as made:
            listening.setblocking(False)
            server = await asyncio.start_unix_server(answers_once(HELLO), sock=listening.dup())
            heard = [told(made) for _ in range(50)]
            assert all(answer.body == b"hello" for answer in await asyncio.gather(*heard))
            server.close()


def answers_once(raw: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await read_request(reader)
            writer.write(raw)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    return handler


WRONG = {
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\ncontent-length: 2\n\nhi",
    "length and chunks": JSON + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
    "two lengths": JSON + b"content-length: 2\r\ncontent-length: 3\r\n\r\nhi",
    "length is no number": JSON + b"content-length: +2\r\n\r\nhi",
    "another coding": JSON + b"transfer-encoding: gzip, chunked\r\n\r\n",
    "chunk size": JSON + b"transfer-encoding: chunked\r\n\r\nfg\r\n",
    "chunk end": JSON + b"transfer-encoding: chunked\r\n\r\n1\r\nxyz\r\n",
    "switches": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000,
}


@pytest.mark.parametrize("name", WRONG)
@over_uvloop
async def test_an_answer_that_is_not_http_breaks_its_connection_and_no_other(name: str) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        writer.write(HELLO if head.startswith(b"GET") else WRONG[name])
        await reader.read(1)

    async with upstream(handler) as there, pool(there.path) as made:
        heard = await told(made)
        assert heard.error is not None
        assert heard.error.code == "bad_answer"
        assert not heard.error.retryable
        assert made.idle == 0
        assert (await told(made, method="GET", body=b"")).body == b"hello"
        assert there.accepted == 2


@pytest.mark.parametrize("raw", [HELLO + b"HTTP/1.1 200 OK\r\n", SSE + STREAM + b"x"])
@over_uvloop
async def test_a_connection_with_more_than_its_answer_is_not_used_again(raw: bytes) -> None:
    async with upstream(answers(raw)) as there, pool(there.path) as made:
        heard = await told(made)
        assert heard.error is None
        assert heard.body in (b"hello", STREAM)
        assert made.idle == 0
        assert (await told(made)).error is None
        assert there.accepted == 2


@over_uvloop
async def test_an_answer_that_nobody_asked_for_closes_its_connection() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HELLO)
        await unasked.wait()
        writer.write(HELLO)
        await reader.read(1)

    unasked = asyncio.Event()
    async with upstream(handler) as there, pool(there.path) as made:
        await told(made)
        assert made.idle == 1
        unasked.set()
        await there.gone.wait()
        await eventually(lambda: made.connections == 0)


@pytest.mark.parametrize("way", ["unix", "tcp"])
@over_uvloop
async def test_an_answer_before_the_request_is_sent_comes_through_though_the_connection_breaks(
    way: str,
) -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\ncontent-length: 9\r\n\r\ntoo large"

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refusal)
        writer.close()

    async with upstream(handler) as there:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connect = tcp("127.0.0.1", port) if way == "tcp" else unix(there.path)
        made = Pool(connect, host=b"x", name="hive gpu-0", hop="hive")
        for _ in range(20):
            heard = await told(made, body=b"x" * BIG)
            assert (heard.status, heard.body, heard.error) == (413, b"too large", None)
            assert made.idle == 0
        made.close()
        server.close()


@over_uvloop
async def test_an_answer_not_yet_read_comes_through_though_sending_the_request_broke() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HELLO)

    async with upstream(handler) as there, pool(there.path) as made:
        heard = Heard()
        ask(made, heard, body=b"x" * BIG).flow(False)  # so that the break is seen before the answer
        await heard.over.wait()
        assert (heard.body, heard.error) == (b"hello", None)


@over_uvloop
async def test_an_answer_that_ends_while_the_request_is_being_sent_costs_its_connection() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HELLO)
        await hold.wait()

    hold = asyncio.Event()
    async with upstream(handler) as there, pool(there.path) as made:
        heard = await told(made, body=b"x" * BIG)
        assert heard.body == b"hello"
        assert made.idle == 0
        hold.set()


def in_pieces(count: int, size: int = 100_000) -> Pieces:
    pieces = Pieces()
    for number in range(count):
        pieces.add(b"%07d" % number * (size // 7))
    return pieces


@over_uvloop
async def test_a_body_in_pieces_is_written_as_far_as_it_is_read() -> None:
    body = in_pieces(300)
    came = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        begun.set()
        await read_on.wait()
        came.append(await reader.readexactly(body.size))
        writer.write(HELLO)
        await reader.read(1)

    begun, read_on = asyncio.Event(), asyncio.Event()
    async with upstream(handler) as there, pool(there.path) as made:
        heard = Heard()
        ask(made, heard, body=body)
        await begun.wait()
        (connection,) = made._connections
        await eventually(lambda: connection._congested)
        for _ in range(50):
            await asyncio.sleep(0)
            assert connection.transport.get_write_buffer_size() <= 2 * PART_BYTES
        read_on.set()
        await heard.over.wait()
        assert heard.body == b"hello"
        assert came == [b"".join(body)]
        assert made.idle == 1


@over_uvloop
async def test_a_body_in_pieces_is_sent_again_where_its_connection_had_died() -> None:
    bodies = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if there.accepted == 1 and bodies:
                return
            length = int(head.partition(b"content-length: ")[2].split(b"\r")[0])
            bodies.append(await reader.readexactly(length))
            writer.write(HELLO)

    async with upstream(handler) as there, pool(there.path) as made:
        await told(made)
        body = in_pieces(100)
        assert (await told(made, body=body)).body == b"hello"
        assert bodies == [b"{}", b"".join(body)]
        assert there.accepted == 2


@over_uvloop
async def test_an_answer_before_all_pieces_are_sent_costs_its_connection() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HELLO)
        await hold.wait()

    hold = asyncio.Event()
    async with upstream(handler) as there, pool(there.path) as made:
        heard = await told(made, body=in_pieces(100))
        assert (heard.body, heard.error) == (b"hello", None)
        assert made.idle == 0
        hold.set()
        cancelled = ask(made, Heard(), body=in_pieces(100))
        await eventually(lambda: there.accepted == 2)
        cancelled.cancel()


# -- the caller's side ----------------------------------------------------------------------------


@over_uvloop
async def test_a_cancelled_exchange_closes_its_connection_and_says_nothing_more() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(SSE)
        while not reader.at_eof():
            writer.write(chunk(EVENTS[0]))
            await writer.drain()
            await asyncio.sleep(0)

    async with upstream(handler) as there, pool(there.path) as made:
        heard = Heard()
        exchange = ask(made, heard)
        heard.on_data = exchange.cancel
        await there.gone.wait()
        exchange.cancel()
        await drained(made)
        assert len(heard.pieces) == 1
        assert not heard.over.is_set()


@over_uvloop
async def test_exchanges_cancelled_in_any_state_leave_nothing_behind() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(SSE + chunk(EVENTS[0]))
        await reader.read(1)

    async with upstream(handler) as there, pool(there.path, limit=100) as made:
        for turns in range(8):  # as they are dialled, sent, answered; 300 wait for a connection
            sinks = [Heard() for _ in range(400)]
            exchanges = [ask(made, heard) for heard in sinks]
            for _ in range(turns):
                await asyncio.sleep(0)
            for exchange in exchanges:
                exchange.cancel()
            await drained(made)
            assert not any(heard.over.is_set() for heard in sinks)
        await eventually(lambda: there.open == 0)
        heard = Heard()
        ask(made, heard)
        await heard.begun.wait()


@over_uvloop
async def test_an_exchange_that_is_paused_stalls_its_upstream_and_no_other() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_request(reader)
        if head.startswith(b"GET"):
            writer.write(HELLO)
        else:
            writer.write(JSON + b"content-length: %d\r\n\r\n" % BIG)
            for _ in range(BIG // 20_000):
                writer.write(b"x" * 20_000)
                await writer.drain()
            sent.set()
        await reader.read(1)

    sent = asyncio.Event()
    async with upstream(handler) as there, pool(there.path) as made:
        heard = Heard()
        exchange = ask(made, heard)
        heard.on_data = partial(exchange.flow, False)
        await heard.begun.wait()
        for _ in range(20):
            assert (await told(made, method="GET", body=b"")).body == b"hello"
        assert len(heard.pieces) == 1
        assert not sent.is_set()
        heard.on_data = lambda: None
        exchange.flow(True)
        await heard.over.wait()
        assert len(heard.body) == BIG


@over_uvloop
async def test_a_connection_is_read_again_after_an_exchange_that_ended_paused() -> None:
    async with upstream(answers(HELLO)) as there, pool(there.path) as made:
        heard = Heard()
        ask(made, heard).flow(False)  # while it is being connected
        exchange = ask(made, second := Heard())
        second.on_data = partial(exchange.flow, False)
        await second.over.wait()
        assert (await told(made)).body == b"hello"
        assert not heard.begun.is_set()


@pytest.mark.parametrize("keep", [0, 64])
@over_uvloop
async def test_a_limit_of_connections_is_kept_and_the_others_wait_their_turn(keep: int) -> None:
    most = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most
        while True:
            await read_request(reader)
            most = max(most, there.open)
            writer.write(HELLO)

    async with upstream(handler) as there, pool(there.path, limit=3, keep=keep) as made:
        heard = await asyncio.gather(*(told(made) for _ in range(30)))
        assert all(answer.body == b"hello" for answer in heard)
        assert most == there.accepted == 3
        assert made.idle == min(keep, 3)
        await eventually(lambda: there.open == made.idle)


@over_uvloop
async def test_waiting_requests_get_a_connection_though_those_before_them_break() -> None:
    async with upstream(answers(b"", close=True)) as there, pool(there.path, limit=2) as made:
        heard = await asyncio.gather(*(told(made) for _ in range(20)))
        assert all(isinstance(answer.error, NoAnswer) for answer in heard)
        assert there.accepted == 20


@over_uvloop
async def test_idle_connections_are_kept_up_to_a_number_and_a_time() -> None:
    async with (
        upstream(answers(HELLO)) as there,
        pool(there.path, keep=2, idle_s=0.05) as made,
    ):
        await asyncio.gather(*(told(made) for _ in range(5)))
        assert made.idle == 2
        await eventually(lambda: made.connections == 0)
        await eventually(lambda: there.open == 0)


@over_uvloop
async def test_a_pool_that_closes_tells_all_who_ask_it() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(SSE)
        await reader.read(1)

    async with upstream(handler) as there, pool(there.path, limit=2) as made:
        sinks = [Heard() for _ in range(4)]
        for heard in sinks:
            ask(made, heard)
        await sinks[1].begun.wait()
        made.close()
        made.close()
        assert [type(heard.error) for heard in sinks[:2]] == [WorkerBroke, WorkerBroke]
        assert [type(heard.error) for heard in sinks[2:]] == [Unreachable, Unreachable]
        assert [heard.started for heard in sinks] == [True, True, False, False]
        sinks.append(Heard())
        ask(made, sinks[-1])
        assert not sinks[-1].over.is_set()
        await sinks[-1].over.wait()
        await drained(made)

    async with upstream(handler) as there, pool(there.path) as made:
        ask(made, heard := Heard())
        made.close()  # while it is being connected
        assert isinstance(heard.error, Unreachable)


@over_uvloop
async def test_a_pool_that_closes_tells_whether_the_request_was_sent() -> None:
    taken = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        taken.set()
        await reader.read(1)

    async with upstream(handler) as there, pool(there.path, limit=1) as made:
        sent, waits = Heard(), Heard()
        ask(made, sent)
        ask(made, waits)
        await taken.wait()
        made.close()
        assert isinstance(sent.error, NoAnswer)
        assert isinstance(waits.error, Unreachable)


@over_uvloop
async def test_a_sink_that_raises_costs_its_own_connection_alone() -> None:
    def broken() -> None:
        raise RuntimeError("of the sink's own")

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with upstream(answers(SSE + STREAM)) as there, pool(there.path) as made:
        heard = Heard()
        heard.on_data = broken
        ask(made, heard)
        await heard.over.wait()
        assert isinstance(heard.error, WorkerBroke)
        assert (await told(made)).body == STREAM


@over_uvloop
async def test_a_certificate_other_than_the_pinned_one_gets_no_request(tmp_path: Path) -> None:
    pair = make(["localhost"], 1, datetime.now(UTC))
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(pair.cert)
    key.write_bytes(pair.key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    asked = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        try:
            while True:
                await read_request(reader)
                asked += 1
                writer.write(SSE + STREAM)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    def over_tls(fingerprint: str) -> Pool:
        connect = tcp("127.0.0.1", port, fingerprint=fingerprint)
        return Pool(connect, host=b"x", name="hive gpu-0", hop="hive")

    right, wrong = over_tls(pair.fingerprint.hex()), over_tls(32 * "00")
    for _ in range(2):
        assert (await told(right, body=b"x" * 300_000)).body == STREAM
    assert right.connections == right.idle == 1
    heard = await told(wrong)
    assert isinstance(heard.error, Unreachable)
    assert "another certificate" in heard.error.message
    assert asked == 2
    for made in (right, wrong):
        made.close()
        await drained(made)
    server.close()


@over_uvloop
async def test_an_answer_before_its_request_has_left_ends_the_connection() -> None:
    async with upstream(answers(HELLO)) as there, pool(there.path) as made:
        ask(made, first := Heard())
        await first.over.wait()
        [connection] = made._idle
        ask(made, early := Heard())
        connection.data_received(HELLO)  # nobody has asked it yet
        ask(made, other := Heard())
        await other.over.wait()
        assert early.over.is_set()
        assert connection.transport.is_closing()
        assert connection not in made._idle
