"""The trunk: both of its ends against the vectors of docs/trunk.md, and against each other."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from keeper.tls import make
from operations.errors import Forbidden, HiveError, TooLarge, Unavailable
from queen.trunks import Trunks
from tests.cluster import until
from wire import errors
from wire.gate import Gate
from wire.http1.client import NoAnswer, Unreachable
from wire.http1.head import request_head, response_bytes
from wire.keys import LOCAL, Caller
from wire.peer import Peer
from wire.proof import HELLO as HELLO_PATH
from wire.proof import Hello as DaemonsHello
from wire.revocations import Revocations
from wire.secret import Secret
from wire.serve import Certificate, read_certificate
from wire.trunk import frames
from wire.trunk.caller import Stream, Trunk
from wire.trunk.dial import dial
from wire.trunk.frames import (
    CANCEL,
    CREDIT,
    DATA,
    END,
    ERROR,
    GOAWAY,
    HEAD,
    HELLO,
    MAX_BODY,
    MAX_DATA,
    OPEN,
    PART,
    PING,
    PONG,
    WINDOW,
    Decoder,
    Frame,
    TrunkError,
    frame,
)
from wire.trunk.link import PING_S, SILENT_S, Link
from wire.trunk.messages import OURS, Open, hello_payload, open_payload, reason_of
from wire.trunk.server import PATH, Answer, ServedTrunk, TrunkServer
from wire.trust import Trust

Header = tuple[bytes, bytes]

PAGE = Path(__file__).parent.parent / "docs" / "trunk.md"
HELLO_FRAME = frame(HELLO, 0, hello_payload(OURS))
ASKED = Open("/v1/completions", "r-1", {"content-type": "application/json"})
HEADERS = [(b"content-type", b"text/event-stream")]
HEAD_FRAME = frame(HEAD, 1, b'{"status":200,"headers":[],"chunked":true}')
TOKEN = b"8\r\ndata: x\n\r\n"


class Told:
    """A sink that keeps what it is told; consumes at once unless told not to."""

    def __init__(self, *, reads: bool = True) -> None:
        self.reads = reads
        self.stream: Stream | None = None
        self.status = 0
        self.headers: list[Header] = []
        self.chunked: bool | None = None
        self.pieces: list[bytes] = []
        self.error: HiveError | None = None
        self.started: bool | None = None
        self.over = asyncio.Event()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def owed(self) -> int:
        assert self.stream is not None
        return self.stream.owed

    def head(self, status: int, headers: Sequence[Header], chunked: bool) -> None:
        self.status, self.headers, self.chunked = status, list(headers), chunked

    def data(self, data: bytes) -> None:
        self.pieces.append(data)
        if self.reads and self.stream is not None:
            self.stream.passed(len(data))

    def end(self) -> None:
        assert not self.over.is_set()
        self.over.set()

    def whole(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        raise AssertionError("a trunk tells head, data and end")

    def failed(self, error: HiveError, started: bool) -> None:
        assert not self.over.is_set()
        self.error, self.started = error, started
        self.over.set()


@dataclass
class Served:
    """What a hive's end was asked, and the answers that it may give."""

    asked: list[tuple[Open, bytes, Answer]] = field(default_factory=list)

    def __call__(self, head: Open, body: bytes, answer: Answer) -> None:
        self.asked.append((head, body, answer))

    def __getitem__(self, index: int) -> Answer:
        return self.asked[index][2]

    def __len__(self) -> int:
        return len(self.asked)


def anybody(head: Open, body: bytes) -> None:
    """Lets every request in."""


def ask(trunk: Trunk, body: bytes = b"{}", *, reads: bool = True, head: Open = ASKED) -> Told:
    told = Told(reads=reads)
    told.stream = trunk.open(head, body, told)
    return told


@asynccontextmanager
async def both(
    ping_s: float = PING_S, silent_s: float = SILENT_S
) -> AsyncIterator[tuple[Trunk, ServedTrunk, Served]]:
    """Both ends over a socketpair, greeted."""
    loop = asyncio.get_running_loop()
    served = Served()
    queen = Trunk("hive gpu-0", ping_s=ping_s, silent_s=silent_s)
    hive = ServedTrunk("queen queen-1", served, anybody, ping_s=ping_s, silent_s=silent_s)
    ours, theirs = socket.socketpair()
    await loop.create_connection(lambda: queen, sock=ours)
    await loop.create_connection(lambda: hive, sock=theirs)
    await queen.greeted.wait()
    await hive.greeted.wait()
    try:
        yield queen, hive, served
    finally:
        queen.close("the test is over")
        hive.close("the test is over")


@dataclass
class Raw:
    """The other end of a trunk, spoken by hand."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    decoder: Decoder = field(default_factory=Decoder)
    seen: list[Frame] = field(default_factory=list)

    async def frame(self) -> Frame:
        """The next frame but PING."""
        while True:
            while self.seen:
                if (first := self.seen.pop(0))[0] != PING:
                    return first
            data = await self.reader.read(65536)
            assert data, "the trunk was closed"
            self.seen += self.decoder.feed(data)

    async def reason(self) -> str:
        """Why the trunk was closed: its last words, and the end."""
        while (last := await self.frame())[0] != GOAWAY:
            pass
        assert await self.reader.read() == b""
        return reason_of(last[2])


@asynccontextmanager
async def by_hand(link: Link) -> AsyncIterator[Raw]:
    """One end on a socketpair; the other one is the test's."""
    ours, theirs = socket.socketpair()
    await asyncio.get_running_loop().create_connection(lambda: link, sock=ours)
    reader, writer = await asyncio.open_connection(sock=theirs)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        link.close("the test is over")


# -- the page's vectors --------------------------------------------------------------------------


def vectors() -> list[tuple[str, bytes, str]]:
    """Who sends it, the frame, and its name; from the page."""
    block = PAGE.read_text().partition("```vectors\n")[2].partition("```")[0]
    found = []
    for line in block.splitlines():
        sender, rest = line.split(maxsplit=1)
        digits, _, said = rest.partition("  ")
        found.append((sender, bytes.fromhex(digits.replace("-", "")), said.split(":")[0].strip()))
    return found


def sent_by(sender: str) -> list[bytes]:
    return [data for who, data, _ in vectors() if who == sender]


def test_every_kind_of_frame_has_a_vector_and_a_row_on_the_page() -> None:
    shown = {name for _, _, name in vectors()}
    assert shown == {shape.name for shape in frames.SHAPES.values()}
    text = PAGE.read_text()
    for kind, shape in frames.SHAPES.items():
        size = f"{shape.least}–{shape.most}" if shape.least != shape.most else str(shape.least)
        stream = "n" if shape.streamed else "0"
        assert f"| {kind} | {shape.name} | {shape.sender} | {stream} | {size} |" in text


@pytest.mark.parametrize(("sender", "data", "name"), vectors())
def test_a_vector_is_read_and_written_as_the_page_says(sender: str, data: bytes, name: str) -> None:
    ((kind, stream, payload),) = Decoder().feed(data)
    assert frames.SHAPES[kind].name == name
    assert frames.SHAPES[kind].sender in (sender, "both")
    assert frame(kind, stream, payload) == data


async def test_the_queens_end_holds_the_conversation_of_the_page() -> None:
    link = Trunk("hive gpu-0", ping_s=600)
    async with by_hand(link) as hive:
        from_hive = iter(sent_by("hive"))
        hive.writer.write(next(from_hive))
        await link.greeted.wait()
        one, two, three = ask(link), ask(link, b""), ask(link, b"")
        assert three.stream is not None
        three.stream.cancel()
        for data in from_hive:
            hive.writer.write(data)
        said = [await hive.frame() for _ in range(5)]
        written = [frame(*each) for each in said]
        own = [data for who, data, name in vectors() if who == "queen" and name != "PING"]
        assert written == [data for data in own if data[4] != CREDIT]
        await one.over.wait()
        assert (one.status, one.headers, one.chunked) == (200, HEADERS, True)
        assert one.pieces == [b"b\r\ndata: ", b"one\n\n\r\n", b"0\r\n\r\n"]
        await two.over.wait()
        assert isinstance(two.error, Unavailable)
        assert (two.error.message, two.error.retry_after) == ("No room. Try again.", 2.0)
        assert two.started is False
        assert await hive.reason() == "nothing runs on it any more"  # the hive said that it goes
        assert not three.over.is_set()


async def test_the_hives_end_holds_the_conversation_of_the_page() -> None:
    served = Served()
    link = ServedTrunk("queen queen-1", served, anybody)
    async with by_hand(link) as queen:
        for data in sent_by("queen"):
            queen.writer.write(data)
        await until(lambda: len(served) == 3 and served[2].gone, "three requests")
        assert [(head, body) for head, body, _ in served.asked] == [
            (ASKED, b"{}"),
            (ASKED, b""),
            (ASKED, b""),
        ]
        served[0].head(200, HEADERS, length=None)
        link.send(PART, 1, b"b\r\ndata: ")
        served[0].write(b"one\n\n\r\n")
        served[0].write(b"0\r\n\r\n")
        served[0].end()
        served[1].fail(Unavailable("No room. Try again.", retry_after=2.0))
        link.go_away("this hive is stopping")
        expected = sent_by("hive")
        got = [frame(*(await queen.frame())) for _ in expected]
        assert sorted(got) == sorted(expected)
        for stream in (1, 2, 3):
            of_it = [data for data in expected if data[5:9] == stream.to_bytes(4, "big")]
            assert [data for data in got if data[5:9] == stream.to_bytes(4, "big")] == of_it


# -- frames --------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from([DATA, PART]), st.integers(1, 2**32 - 1), st.binary(min_size=1)),
        max_size=20,
    ),
    st.data(),
)
def test_frames_are_the_same_however_they_are_cut(sent: list[Frame], data: st.DataObject) -> None:
    raw = b"".join(frame(*each) for each in sent)
    decoder = Decoder()
    got: list[Frame] = []
    for piece in cut(raw, data):
        got += decoder.feed(piece)
    assert got == sent


@given(st.binary(max_size=200), st.data())
def test_no_bytes_raise_anything_but_a_trunk_error(raw: bytes, data: st.DataObject) -> None:
    def outcome(pieces: list[bytes]) -> tuple[list[Frame], str | None]:
        decoder, got = Decoder(), []
        try:
            for piece in pieces:
                for each in decoder.feed(piece):
                    got.append(each)
        except TrunkError as error:
            return got, error.reason
        return got, None

    assert outcome(cut(raw, data)) == outcome([raw])


def test_a_large_frame_that_comes_byte_by_byte_is_not_copied_each_time() -> None:
    raw = frame(OPEN, 1, bytes(MAX_BODY))
    decoder = Decoder()
    got = [each for at in range(len(raw)) for each in decoder.feed(raw[at : at + 1])]
    assert got == [(OPEN, 1, bytes(MAX_BODY))]  # 34 GB of copies would not end in time


def cut(raw: bytes, data: st.DataObject) -> list[bytes]:
    at = data.draw(st.lists(st.integers(0, len(raw)), max_size=12).map(sorted))
    return [raw[i:j] for i, j in zip([0, *at], [*at, len(raw)], strict=True)]


# -- who breaks the rules ------------------------------------------------------------------------

OPENED = frame(OPEN, 1, open_payload(ASKED, b"{}"))


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", "unknown kind", id="garbage"),
        pytest.param(frame(PING), "PING before HELLO", id="before HELLO"),
        pytest.param(HEAD_FRAME, "HEAD before HELLO", id="a stream before HELLO"),
        pytest.param(HELLO_FRAME * 2, "a second HELLO", id="a second HELLO"),
        pytest.param(frame(HELLO, 0, b'{"version":0}'), "nothing this daemon", id="version 0"),
        pytest.param(frame(HELLO, 0, b'{"version":1,"credit":9}'), "nothing", id="no window"),
        pytest.param(frame(HELLO, 0, b"[" * 4096), "nothing", id="deep JSON"),
        pytest.param(HELLO_FRAME + frame(99, 1, b"x"), "unknown kind 99", id="unknown kind"),
        pytest.param(HELLO_FRAME + frame(0), "unknown kind 0", id="kind 0"),
        pytest.param(
            HELLO_FRAME + frames.header(MAX_DATA + 1, DATA, 1), "DATA of 65537", id="oversize"
        ),
        pytest.param(
            HELLO_FRAME + frames.header(2**32 - 1, HELLO, 0), "HELLO of 4294967295", id="huge"
        ),
        pytest.param(HELLO_FRAME + frame(DATA, 1), "DATA of 0", id="empty DATA"),
        pytest.param(HELLO_FRAME + frame(DATA, 0, b"x"), "DATA for no stream", id="stream 0"),
        pytest.param(HELLO_FRAME + frame(PING, 7), "PING for stream 7", id="PING of a stream"),
        pytest.param(HELLO_FRAME + frame(END, 1, b"x"), "END of 1 bytes", id="long END"),
        pytest.param(HELLO_FRAME + OPENED, "OPEN that does not belong", id="the queen's kind"),
        pytest.param(
            HELLO_FRAME + frame(CREDIT, 1, bytes(4)), "CREDIT that does", id="the queen's CREDIT"
        ),
        pytest.param(HELLO_FRAME + frame(DATA, 1, b"x"), "before its HEAD", id="DATA first"),
        pytest.param(HELLO_FRAME + frame(END, 1), "before its answer's", id="END first"),
        pytest.param(HELLO_FRAME + HEAD_FRAME * 2, "a second HEAD", id="a second HEAD"),
        pytest.param(
            HELLO_FRAME + HEAD_FRAME + frame(PART, 1, b"x") + frame(END, 1),
            "before its answer's",
            id="END within a part",
        ),
        pytest.param(
            HELLO_FRAME + HEAD_FRAME + frame(END, 1) + frame(DATA, 1, b"x"),
            "DATA that does not belong to stream 1",
            id="DATA after END",
        ),
        pytest.param(
            HELLO_FRAME + frame(END, 77), "END that does not belong to stream 77", id="unopened"
        ),
        pytest.param(
            HELLO_FRAME + HEAD_FRAME + frame(DATA, 1, bytes(MAX_DATA)) * 5,
            "more than its credit",
            id="over its credit",
        ),
    ],
)
async def test_a_hive_that_breaks_the_rules_loses_its_trunk_and_nothing_else(
    sent: bytes, why: str
) -> None:
    link = Trunk("hive gpu-0")
    async with both() as (other, _, served), by_hand(link) as hive:
        begins = sent.startswith(HELLO_FRAME)
        told = None
        if begins:
            hive.writer.write(HELLO_FRAME)
            sent = sent.removeprefix(HELLO_FRAME)
            await link.greeted.wait()
            told = ask(link, reads=False)
        hive.writer.write(sent)
        assert re.search(why, await hive.reason())
        assert link.closed
        assert (link.counters().streams, link.counters().owed) == (0, 0)
        if told is not None:
            assert told.over.is_set()
        with pytest.raises(Unreachable):
            ask(link)
        untouched = ask(other)
        await until(lambda: len(served) == 1, "a request on another trunk")
        served[0].whole(200, HEADERS, b"fine")
        await untouched.over.wait()
        assert untouched.body == b"fine"


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", "unknown kind", id="garbage"),
        pytest.param(OPENED, "OPEN before HELLO", id="before HELLO"),
        pytest.param(HELLO_FRAME + HELLO_FRAME, "a second HELLO", id="a second HELLO"),
        pytest.param(HELLO_FRAME + OPENED * 2, "OPEN of stream 1 after 1", id="a number twice"),
        pytest.param(
            HELLO_FRAME + frame(OPEN, 9, OPENED[9:]) + OPENED,
            "OPEN of stream 1 after 9",
            id="numbers that fall",
        ),
        pytest.param(
            HELLO_FRAME + frame(OPEN, 1, b"\xff\xff{}"), "whose head ends at 65537", id="short OPEN"
        ),
        pytest.param(
            HELLO_FRAME + frames.header(2**20, OPEN, 1), "OPEN of 1048576", id="huge OPEN"
        ),
        pytest.param(HELLO_FRAME + HEAD_FRAME, "HEAD that does not", id="the hive's kind"),
        pytest.param(HELLO_FRAME + frame(CANCEL, 3), "CANCEL that does not", id="unopened CANCEL"),
        pytest.param(
            HELLO_FRAME + frame(CREDIT, 3, bytes(4)), "CREDIT that does not", id="unopened CREDIT"
        ),
        pytest.param(
            HELLO_FRAME + OPENED + frame(CREDIT, 1, bytes(4)), "CREDIT of 0", id="CREDIT of 0"
        ),
        pytest.param(
            HELLO_FRAME + OPENED + frame(CREDIT, 1, b"\xff" * 4),
            "CREDIT of 4294967295",
            id="too much CREDIT",
        ),
        pytest.param(HELLO_FRAME + frame(CREDIT, 1, b"x"), "CREDIT of 1 bytes", id="short CREDIT"),
    ],
)
async def test_a_queen_that_breaks_the_rules_loses_her_trunk_and_nothing_else(
    sent: bytes, why: str
) -> None:
    served = Served()
    link = ServedTrunk("queen queen-1", served, anybody)
    async with both() as (other, _, elsewhere), by_hand(link) as queen:
        queen.writer.write(sent)
        assert re.search(why, await queen.reason())
        assert link.closed
        assert (link.counters().streams, link.counters().held) == (0, 0)
        assert all(answer.gone for _, _, answer in served.asked)
        untouched = ask(other)
        await until(lambda: len(elsewhere) == 1, "a request on another trunk")
        elsewhere[0].whole(200, HEADERS, b"fine")
        await untouched.over.wait()
        assert untouched.body == b"fine"


async def test_the_reason_of_a_stranger_is_fit_for_a_log() -> None:
    assert reason_of(json.dumps({"reason": "a\nb\x1b[2J" + "c" * 1000}).encode()) == (
        "a b [2J" + "c" * 193
    )
    assert reason_of(b"\xff\xff") == "it did not say why"


@pytest.mark.parametrize(
    "head",
    [
        b'{"path":"/v1/x y","request_id":"r"}',
        b'{"path":"/v1/x\\r\\nx: y","request_id":"r"}',
        b'{"path":"v1","request_id":"r"}',
        b'{"path":"/","request_id":"r\\n"}',
        b'{"path":"/","request_id":"r","headers":{"a":"b\\r\\nc: d"}}',
        b'{"path":"/","request_id":"r","headers":{"A b":"c"}}',
        b'{"path":"/","request_id":"r","headers":{"a":"\\u4e00"}}',
        b'{"path":"/","request_id":"r","method":"GET /"}',
        b'{"request_id":"r"}',
        b"[[[[",
        b"[" * 60_000,
        b"\xff",
        b"",
    ],
)
async def test_a_head_that_http_does_not_allow_harms_only_its_own_stream(head: bytes) -> None:
    served = Served()
    link = ServedTrunk("queen queen-1", served, anybody)
    async with by_hand(link) as queen:
        queen.writer.write(HELLO_FRAME + frame(OPEN, 1, len(head).to_bytes(2, "big") + head))
        queen.writer.write(frame(OPEN, 2, OPENED[9:]))
        assert (await queen.frame())[0] == HELLO
        kind, stream, payload = await queen.frame()
        assert (kind, stream, json.loads(payload)["status"]) == (ERROR, 1, 400)
        assert [(head, body) for head, body, _ in served.asked] == [(ASKED, b"{}")]


@pytest.mark.parametrize(
    "payload",
    [
        b'{"status":200,"headers":[["a","b\\r\\nc: d"]],"chunked":true}',
        b'{"status":101,"headers":[],"chunked":true}',
        b'{"status":200}',
        b"null",
    ],
)
async def test_an_answers_head_that_http_does_not_allow_ends_only_its_stream(
    payload: bytes,
) -> None:
    link = Trunk("hive gpu-0")
    async with by_hand(link) as hive:
        hive.writer.write(HELLO_FRAME)
        await link.greeted.wait()
        one, two = ask(link), ask(link)
        hive.writer.write(frame(HEAD, 1, payload) + frame(DATA, 1, b"x") + frame(END, 1))
        hive.writer.write(frame(HEAD, 2, HEAD_FRAME[9:]) + frame(END, 2))
        await two.over.wait()
        assert (one.error is not None, one.status, one.pieces, one.started) == (True, 0, [], False)
        assert (two.error, two.status) == (None, 200)
        assert link.counters().streams == 0
        assert not link.closed


# -- streams -------------------------------------------------------------------------------------


async def test_one_of_200_streams_that_stalls_stalls_nobody_else() -> None:
    async with both() as (queen, hive, served):
        asked = [ask(queen, reads=number != 7) for number in range(200)]
        await until(lambda: len(served) == 200, "200 requests")
        flows: dict[int, list[bool]] = {number: [] for number in range(200)}
        for number in range(200):
            served[number].on_writable = flows[number].append
            served[number].head(200, HEADERS, length=None)
        piece = b"%x\r\n%b\r\n" % (4000, bytes(4000))
        for _ in range(100):  # 400 KB each, over the window of 256 KiB
            for number in range(200):
                if served[number].writable:
                    served[number].write(piece)
            await asyncio.sleep(0)
            await until(
                lambda: all(served[number].writable for number in range(200) if number != 7),
                "the others' credit",
                every_s=0.001,
            )
        for number in range(200):
            if number != 7:
                served[number].end()
        await asyncio.gather(*(told.over.wait() for told in asked if told is not asked[7]))
        assert all(told.body == piece * 100 for told in asked if told is not asked[7])
        slow = asked[7]
        assert slow.stream is not None
        assert flows[7][-1] is False
        assert WINDOW - len(piece) < len(slow.body) <= WINDOW
        assert served[7].held == len(piece)
        assert queen.counters().owed == len(slow.body)
        assert hive.counters().held == len(piece)
        served[7].end()  # and the rest follows when the caller reads again
        slow.stream.passed(len(slow.body))
        await slow.over.wait()
        assert len(slow.body) % len(piece) == 0
        for end in (queen, hive):
            counters = end.counters()
            assert (counters.streams, counters.owed, counters.held) == (0, 0, 0)


async def test_a_piece_larger_than_the_window_passes_in_parts_and_says_where_it_may_be_cut() -> (
    None
):
    async with both() as (queen, _, served):
        told = ask(queen, reads=False)
        assert told.stream is not None
        await until(lambda: len(served) == 1, "the request")
        served[0].head(200, HEADERS, length=None)
        served[0].write(bytes(3 * WINDOW))
        await until(lambda: len(told.body) == WINDOW, "a window of it")
        assert not told.stream.whole
        while len(told.body) < 3 * WINDOW:
            seen = len(told.body)
            told.stream.passed(MAX_DATA)
            await until(lambda seen=seen: len(told.body) > seen, "more of it", every_s=0.001)
        assert told.stream.whole
        assert served[0].writable
        served[0].end()
        await told.over.wait()


async def test_a_piece_that_has_credit_waits_behind_one_that_has_none() -> None:
    async with both() as (queen, _, served):
        told = ask(queen, reads=False)
        assert told.stream is not None
        await until(lambda: len(served) == 1, "the request")
        served[0].head(200, HEADERS, length=None)
        for piece in (b"a" * (WINDOW - 9), b"b" * 20, b"c" * 5):
            served[0].write(piece)
        served[0].end()
        await until(lambda: len(told.body) == WINDOW - 9, "what has credit")
        assert served[0].held == 25
        told.stream.passed(WINDOW - 9)
        await told.over.wait()
        assert told.body == b"a" * (WINDOW - 9) + b"b" * 20 + b"c" * 5


async def test_credit_is_given_in_steps_and_for_what_was_consumed() -> None:
    async with both() as (queen, _, served):
        told = ask(queen, reads=False)
        assert told.stream is not None
        await until(lambda: len(served) == 1, "the request")
        served[0].head(200, HEADERS, length=None)
        for _ in range(4):
            served[0].write(bytes(MAX_DATA))
        await until(lambda: len(told.body) == WINDOW, "a window of it")
        frames_out = queen.frames_out
        told.stream.passed(MAX_DATA - 1)
        assert (told.owed, queen.frames_out - frames_out) == (WINDOW, 0)
        told.stream.passed(11)
        assert (told.owed, queen.frames_out - frames_out) == (WINDOW - MAX_DATA - 10, 1)
        told.stream.passed(MAX_DATA)
        assert (told.owed, queen.frames_out - frames_out) == (WINDOW - 2 * MAX_DATA - 10, 2)


async def test_what_is_sent_in_one_iteration_leaves_in_one_write() -> None:
    link, tape = ServedTrunk("queen queen-1", Served(), anybody), Tape()
    link.take_over(tape)
    await asyncio.sleep(0)
    for _ in range(3):
        writes = tape.writes
        for number in range(100):
            link.send(END, number + 1)
        assert tape.writes == writes
        await asyncio.sleep(0)
        assert tape.writes == writes + 1
        link.send(DATA, 1, bytes(MAX_DATA))
        link.send(DATA, 1, bytes(MAX_DATA))
        assert tape.writes == writes + 2  # much is not kept until the iteration ends
        await asyncio.sleep(0)
    link.close("the test is over")


async def test_data_that_follows_data_at_once_leaves_with_what_comes_meanwhile() -> None:
    link, tape = ServedTrunk("queen queen-1", Served(), anybody), Tape()
    link.take_over(tape)
    link.send(HEAD, 1, b"{}")
    await asyncio.sleep(0)
    link.send(DATA, 1, TOKEN)
    await asyncio.sleep(0)
    assert tape.kinds() == [HELLO, HEAD, DATA]  # the first token waits for nobody
    writes = tape.writes
    for number in range(1, 100):
        link.send(DATA, number + 1, TOKEN)
        await asyncio.sleep(0)
    assert tape.writes < writes + 50
    await until(lambda: tape.kinds().count(DATA) == 100, "the last of the data")
    link.close("the test is over")


async def test_what_is_no_data_does_not_wait_and_keeps_its_place() -> None:
    link, tape = ServedTrunk("queen queen-1", Served(), anybody), Tape()
    link.take_over(tape)
    link.send(DATA, 1, TOKEN)
    link.flush()
    link.send(DATA, 1, TOKEN)
    link.send(END, 1)
    await asyncio.sleep(0)
    assert tape.kinds()[-2:] == [DATA, END]
    link.close("the test is over")


async def test_a_closed_trunk_serves_nothing() -> None:
    served = Served()
    link = ServedTrunk("queen queen-1", served, anybody)
    link.take_over(Tape(), HELLO_FRAME)
    link.close("the test is over")
    link.data_received(OPENED)
    assert not served


async def test_a_cancelled_request_ends_at_the_hive_and_tells_its_sink_nothing_more() -> None:
    async with both() as (queen, hive, served):
        asked = [ask(queen) for _ in range(1000)]
        await until(lambda: len(served) == 1000, "1000 requests")
        gone: list[int] = []
        for number in range(1000):
            served[number].on_gone = lambda number=number: gone.append(number)
            served[number].head(200, HEADERS, length=None)
            served[number].write(TOKEN)
        await until(lambda: asked[-1].pieces, "tokens")
        for told in asked:
            assert told.stream is not None
            told.stream.cancel()
            told.stream.cancel()
        assert queen.counters().streams == 1000  # until the hive confirms
        for number in range(1000):
            served[number].write(TOKEN)  # under way while it is cancelled
        told = ask(queen)
        await until(lambda: len(served) == 1001, "a request after them")
        served[1000].whole(200, HEADERS, b"fine")
        await told.over.wait()
        assert gone == list(range(1000))
        assert all(one.pieces == [TOKEN] and not one.over.is_set() for one in asked)
        served[0].write(TOKEN)
        served[0].end()
        assert (queen.counters().streams, hive.counters().streams) == (0, 0)
        assert not queen.closed
        assert not hive.closed


async def test_a_lost_trunk_says_which_requests_can_go_elsewhere() -> None:
    async with both() as (queen, hive, served):
        asked = [ask(queen) for _ in range(200)]
        await until(lambda: len(served) == 200, "200 requests")
        for number in range(0, 200, 2):
            served[number].head(200, HEADERS, length=None)
            served[number].write(TOKEN)
        await until(lambda: asked[198].pieces, "tokens")
        assert hive._transport is not None
        hive._transport.abort()
        await asyncio.gather(*(told.over.wait() for told in asked))
        for number, told in enumerate(asked):
            assert told.error is not None
            assert told.error.retryable
            assert told.started is (number % 2 == 0)
            assert isinstance(told.error, NoAnswer) is (number % 2 == 1)
        await until(lambda: all(answer.gone for _, _, answer in served.asked), "the hive to know")
        assert (queen.counters().streams, hive.counters().streams) == (0, 0)
        with pytest.raises(Unreachable):
            ask(queen)
        for answer in (served[0], served[1]):  # what still serves them does no harm
            answer.write(TOKEN)
            answer.fail(HiveError("too late"))


async def test_an_error_comes_as_it_was_whether_or_not_its_answer_has_begun() -> None:
    async with both() as (queen, hive, served):
        one, two, three = ask(queen), ask(queen), ask(queen)
        await until(lambda: len(served) == 3, "the requests")
        served[0].fail(TooLarge("Too much. Send less.", param="prompt", request_id="r-9"))
        served[1].head(200, HEADERS, length=None)
        served[1].write(TOKEN)
        served[1].abort()
        served[2].fail(HiveError("x" * 200_000))
        await asyncio.gather(*(told.over.wait() for told in (one, two, three)))
        assert isinstance(one.error, TooLarge)
        assert (one.error.message, one.error.param, one.error.hop, one.error.request_id) == (
            "Too much. Send less.",
            "prompt",
            "hive",
            "r-9",
        )
        assert (one.started, two.started, two.pieces) == (False, True, [TOKEN])
        assert two.error is not None
        assert two.error.request_id == "r-1"
        assert three.error is not None
        assert three.error.message == "x" * 8000
        assert (queen.counters().streams, hive.counters().streams) == (0, 0)


async def test_what_breaks_in_one_request_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async with both() as (queen, hive, served):

        class Broken(Told):
            def data(self, data: bytes) -> None:
                raise RuntimeError("a bug")

        broken, fine = Broken(), ask(queen)
        queen.open(ASKED, b"", broken)
        await until(lambda: len(served) == 2, "the requests")

        def bug() -> None:
            raise RuntimeError("another bug")

        served[1].on_gone = bug
        served[1].head(200, HEADERS, length=None)
        served[1].write(TOKEN)
        await broken.over.wait()
        await until(lambda: served[1].gone, "the hive to know")
        served[0].whole(200, HEADERS, b"fine")
        await fine.over.wait()
        assert fine.body == b"fine"
        assert "a bug" in caplog.text
        assert "another bug" in caplog.text
        assert (queen.counters().streams, hive.counters().streams) == (0, 0)


async def test_a_hive_that_leaves_ends_what_runs_and_takes_nothing_new() -> None:
    async with both() as (queen, hive, served):
        told = ask(queen)
        await until(lambda: len(served) == 1, "the request")
        hive.go_away("this hive is stopping")
        late = ask(queen)  # it crosses the news
        await late.over.wait()
        assert isinstance(late.error, Unavailable)
        assert queen.over.is_set()
        with pytest.raises(Unreachable):
            ask(queen)
        served[0].whole(200, HEADERS, b"fine")
        await told.over.wait()
        assert told.body == b"fine"
        await until(lambda: queen.closed and hive.closed, "the trunk to be closed")


async def test_a_trunk_on_which_nothing_runs_stays_and_a_silent_one_does_not() -> None:
    async with both(ping_s=0.02, silent_s=0.2) as (queen, hive, _):
        await until(lambda: queen.frames_in > 20, "pings and pongs")
        assert not queen.closed
        assert not hive.closed
    silent = Trunk("hive gpu-0", ping_s=0.02, silent_s=0.2)
    async with by_hand(silent) as raw:
        raw.writer.write(HELLO_FRAME)
        await silent.greeted.wait()
        told = ask(silent)
        assert (await raw.reason()).startswith("nothing was heard")
        assert isinstance(told.error, NoAnswer)


async def test_a_flood_of_pings_is_answered_once_a_read() -> None:
    link = ServedTrunk("queen queen-1", Served(), anybody)
    async with by_hand(link) as raw:
        raw.writer.write(HELLO_FRAME + frame(PING) * 5000)
        assert [(await raw.frame())[0], (await raw.frame())[0]] == [HELLO, PONG]
        await until(lambda: link.frames_in == 5001, "all of them")
        assert link.frames_out < 100


async def test_a_trunk_whose_queen_reads_nothing_holds_back_the_answers() -> None:
    served = Served()
    link = ServedTrunk("queen queen-1", served, anybody)
    async with by_hand(link) as raw:
        raw.writer.write(HELLO_FRAME)
        for number in range(1, 101):
            raw.writer.write(frame(OPEN, number, OPENED[9:]))
        await until(lambda: len(served) == 100, "the requests")
        raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
        wrote = 100 * 3 * MAX_DATA
        for _, _, answer in served.asked:
            answer.head(200, HEADERS, length=None)
            answer.write(bytes(3 * MAX_DATA))
        assert link.paused
        # All have credit; what the connection does not take waits with each, where it is seen.
        assert sum(not answer.writable for _, _, answer in served.asked) > 50
        assert link.counters().held > wrote // 2
        writable: list[bool] = []
        for _, _, answer in served.asked:
            answer.on_writable = writable.append
            answer.end()
        raw.reader._transport.resume_reading()  # type: ignore[attr-defined]
        got = ends = 0
        while ends < 100:
            kind, _, payload = await raw.frame()
            got += len(payload) if kind in (DATA, PART) else 0
            ends += kind == END
        assert got == wrote
        assert link.counters().streams == 0


def test_numbers_that_are_used_up_make_a_trunk_retire() -> None:
    async def story() -> None:
        async with both() as (queen, _, served):
            queen._next = frames.LAST_STREAM
            told = ask(queen)
            assert queen.over.is_set()
            with pytest.raises(Unreachable):
                ask(queen)
            await until(lambda: len(served) == 1, "the last request")
            served[0].whole(200, HEADERS, b"fine")
            await told.over.wait()
            assert queen.closed

    alone(story)


def alone(
    story: Callable[[], Coroutine[Any, Any, None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    """Run on a loop of its own."""
    loop = new_loop()
    try:
        loop.run_until_complete(story())
    finally:
        loop.close()


# -- both ends, however they are interleaved -------------------------------------------------------


class Tape(asyncio.Transport):
    """A connection that keeps what is written, for the test to carry over as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.writes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        self.writes += 1

    def kinds(self) -> list[int]:
        """The kinds of the frames that were written."""
        return [kind for kind, _, _ in Decoder().feed(bytes(self.written))]

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False


class Play:
    """A queen and a hive on two tapes; what either does and what arrives is the test's choice."""

    def __init__(self) -> None:
        self.served = Served()
        self.queen = Trunk("hive gpu-0")
        self.hive = ServedTrunk("queen queen-1", self.served, anybody)
        self.tapes = {"queen": Tape(), "hive": Tape()}
        self.queen.take_over(self.tapes["queen"])
        self.hive.take_over(self.tapes["hive"])
        self.told: list[Told] = []
        self.cancelled: set[int] = set()
        self.written: dict[int, bytes] = {}
        self.carry("queen", None)
        self.carry("hive", None)

    def carry(self, sender: str, count: int | None) -> None:
        """Carry over so many bytes, or all."""
        (self.queen if sender == "queen" else self.hive).flush()
        tape = self.tapes[sender].written
        data = bytes(tape[:count])
        del tape[:count]
        if data:
            (self.hive if sender == "queen" else self.queen).data_received(data)

    def do(self, what: str, which: int, size: int) -> None:
        if what == "open":
            body = b"%d" % len(self.told)
            self.told.append(ask(self.queen, body, reads=False))
        elif what in ("queen", "hive"):
            self.carry(what, size)
        elif what == "pause":
            self.hive.pause_writing()
        elif what == "resume":
            self.hive.resume_writing()
        elif self.told and what in ("consume", "cancel"):
            number = which % len(self.told)
            stream = self.told[number].stream
            assert stream is not None
            if what == "cancel" and not self.told[number].over.is_set():
                self.cancelled.add(number)
                stream.cancel()
            elif what == "consume":
                owed = stream.owed if number not in self.cancelled else 0
                stream.passed(min(size, max(0, owed - stream._spent)))
        elif len(self.served):
            self.answer(what, which % len(self.served), size)

    def answer(self, what: str, which: int, size: int) -> None:
        _, body, answer = self.served.asked[which]
        number = int(body)
        if answer.ended or answer.gone:
            return
        if not answer.started:
            answer.head(200, HEADERS, length=None)
        if what == "write":
            data = bytes((number + at) % 251 for at in range(8)) * (size // 8 + 1)
            self.written[number] = self.written.get(number, b"") + data
            answer.write(data)
        elif what == "end":
            answer.end()
        elif what == "fail":
            answer.fail(Unavailable("No room. Try again."))

    def settle(self) -> None:
        """Let everything arrive and every answer end."""
        self.hive.resume_writing()
        for _ in range(200):
            self.carry("queen", None)
            self.carry("hive", None)
            for number, told in enumerate(self.told):
                stream = told.stream
                if stream is not None and number not in self.cancelled:
                    stream.passed(max(0, stream.owed - stream._spent))
            for which in range(len(self.served)):
                self.answer("end", which, 0)
            quiet = not any(tape.written for tape in self.tapes.values())
            if quiet and not self.queen._out and not self.hive._out:
                return
        raise AssertionError("it does not come to rest")


DOINGS = [
    *("open", "queen", "hive", "write", "write", "write", "consume"),
    *("end", "fail", "cancel", "pause", "resume"),
]
SIZES = st.integers(0, 100) | st.integers(0, 300_000) | st.just(WINDOW)
STEP = st.tuples(st.sampled_from(DOINGS), st.integers(0, 3), SIZES)


@given(st.lists(STEP, min_size=20, max_size=80))
def test_answers_arrive_whole_and_in_order_however_both_ends_are_interleaved(
    steps: list[tuple[str, int, int]],
) -> None:
    async def story() -> None:
        play = Play()
        play.do("open", 0, 0)
        play.do("queen", 0, WINDOW)
        for step in steps:
            play.do(*step)
            assert all(0 <= told.owed <= WINDOW for told in play.told)
        play.settle()
        assert (play.queen.reason, play.hive.reason) == ("", "")
        for number, told in enumerate(play.told):
            sent = play.written.get(number, b"")
            if number in play.cancelled:
                assert not told.over.is_set()
                assert sent.startswith(told.body)
            else:
                assert told.over.is_set()
                assert told.body == sent
        for end in (play.queen, play.hive):
            counters = end.counters()
            assert (counters.streams, counters.owed, counters.held) == (0, 0, 0)
        assert not play.queen._cancelled
        assert not play.hive._waiting
        play.queen.close("the test is over")
        play.hive.close("the test is over")

    alone(story)


# -- how a trunk comes to be -----------------------------------------------------------------------


class Hive:
    """A hive as far as a trunk needs one: its port, its hello, and the upgrade."""

    def __init__(
        self,
        secret: Secret,
        folder: Path,
        *,
        trunks: bool = True,
        certificate: Certificate | None = None,
    ) -> None:
        self.served = Served()
        self.certificate = certificate
        self.trust = Trust(
            secret,
            Revocations(folder / "revoked"),
            role="hive",
            id="gpu-0",
            instance="ab" * 8,
            listens_openly=True,
            fingerprint=certificate.fingerprint if certificate else "",
        )
        self.gate = Gate(self.trust)
        self.server = TrunkServer(self.gate, self.served)
        self.trunks = trunks
        self.taken: list[ServedTrunk] = []
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.url = ""
        self._listening: asyncio.Server | None = None

    async def listen(self, port: int = 0) -> None:
        tls = None
        if self.certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(self.certificate.path, self.certificate.key_path)
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(
            lambda: HivesHttp(self), "127.0.0.1", port, ssl=tls
        )
        host, port = self._listening.sockets[0].getsockname()
        self.url = f"{self.trust.scheme}://{host}:{port}"

    async def close(self) -> None:
        self.server.close()
        assert self._listening is not None
        self._listening.close()


class HivesHttp(asyncio.Protocol):
    """One connection to it."""

    def __init__(self, hive: Hive) -> None:
        self.hive = hive
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's only look like one

    def data_received(self, data: bytes) -> None:
        self.data += data
        found = request_head(self.data)
        if found is None or (found[0].length or 0) > len(self.data) - found[1]:
            return
        head, at = found
        body, self.data = self.data[at:], b""
        self.hive.asked.append(head.path)
        scope: dict[str, Any] = {
            "type": "http",
            "method": head.method,
            "path": head.path,
            "raw_path": head.path.encode(),
            "query_string": head.query,
            "client": self.transport.get_extra_info("peername"),
            "server": self.transport.get_extra_info("sockname"),
        }
        headers = {n.decode(): v.decode("latin-1") for n, v in head.values.items()}
        try:
            caller = self.hive.gate.admit(scope, headers).caller
            if head.path == HELLO_PATH:
                said = DaemonsHello.model_validate_json(body)
                answer = self.hive.trust.greet(said, scope).model_dump_json().encode()
                self.answer(200, answer)
            elif head.path == PATH and self.hive.trunks:
                assert head.upgrade == b"hive-trunk/1"
                host = head.host.decode()
                self.hive.taken.append(self.hive.server.take(caller, host, self.transport, body))
            else:
                self.answer(404, b"")
        except HiveError as error:
            self.hive.refused.append(error.code)
            self.answer(error.status, errors.envelope(error, "hive", "r-0"))

    def answer(self, status: int, body: bytes) -> None:
        length = b"%d" % len(body)
        kind = b"application/json"
        fields = [(b"content-type", kind), (b"content-length", length)]
        self.transport.write(response_bytes(status, fields, body))


@asynccontextmanager
async def proven(
    folder: Path, *, trunks: bool = True, certificate: Certificate | None = None
) -> AsyncIterator[tuple[Hive, Peer]]:
    secret = Secret.new()
    hive = Hive(secret, folder, trunks=trunks, certificate=certificate)
    await hive.listen()
    peer = Peer(hive.url, secret, role="queen", id="queen-1", roles=("hive",))
    await peer.open()
    try:
        yield hive, peer
    finally:
        await peer.close()
        await hive.close()


@asynccontextmanager
async def kept(peer: Peer) -> AsyncIterator[Trunks]:
    trunks = Trunks(first_pause_s=0.01, look_s=0.05)
    trunks.keep(peer, "gpu-0")
    try:
        yield trunks
    finally:
        await trunks.close()
        await trunks.close()
    assert trunks.counters() == []


async def test_a_queen_has_a_trunk_to_a_proven_hive_and_signs_what_goes_over_it(
    tmp_path: Path,
) -> None:
    async with proven(tmp_path) as (hive, peer), kept(peer) as trunks:
        trunk = await until(lambda: trunks.to(peer.url), "a trunk")
        trunks.keep(peer, "gpu-0")
        assert trunks.to("http://127.0.0.1:1") is None
        told = ask(trunk, b'{"prompt":"hello"}', head=Open("/v1/completions", "r-2", query="a=b"))
        await until(lambda: len(hive.served), "the request")
        assert hive.served.asked[0][1] == b'{"prompt":"hello"}'
        hive.served[0].whole(200, HEADERS, b"fine")
        await told.over.wait()
        assert told.headers == [*HEADERS, (b"content-length", b"4")]
        assert (told.body, told.chunked) == (b"fine", False)
        assert len(hive.taken) == 1
        assert hive.taken[0].name == "queen queen-1"


async def test_whoever_breaks_into_the_connection_can_add_or_change_no_request(
    tmp_path: Path,
) -> None:
    async with proven(tmp_path) as (hive, peer), kept(peer) as trunks:
        trunk = await until(lambda: trunks.to(peer.url), "a trunk")
        signed = peer.signature("POST", ASKED.path, b"{}", ASKED.headers)
        assert signed is not None
        plain = dict(ASKED.headers)
        forged = [
            (Open(ASKED.path, "r-1", plain), b"{}", "no_key"),
            (Open(ASKED.path, "r-1", {**plain, "x-hive-session": signed}), b"{ }", "bad_signature"),
            (Open("/v1/else", "r-1", {**plain, "x-hive-session": signed}), b"{}", "bad_signature"),
            (Open(ASKED.path, "r-1", {**plain, "x-hive-session": signed}), b"{}", "replayed"),
        ]
        refused = []
        trunk._sign = None
        for head, body, _ in forged:
            told = ask(trunk, body, head=head)
            await told.over.wait()
            assert told.error is not None
            assert told.error.status == 401
            refused.append(told.error.code)
        assert refused == [code for _, _, code in forged]
        assert not hive.served
        assert not trunk.closed


async def test_a_trunk_that_was_cut_is_there_again_and_no_request_waits_for_it(
    tmp_path: Path,
) -> None:
    async with proven(tmp_path) as (hive, peer), kept(peer) as trunks:
        first = await until(lambda: trunks.to(peer.url), "a trunk")
        asked = [ask(first) for _ in range(200)]
        await until(lambda: len(hive.served) == 200, "the requests")
        assert hive.taken[0]._transport is not None
        hive.taken[0]._transport.abort()
        await asyncio.gather(*(told.over.wait() for told in asked))
        assert trunks.to(peer.url) is not first
        second = await until(lambda: trunks.to(peer.url), "another trunk")
        told = ask(second)
        await until(lambda: len(hive.served) == 201, "the request")
        hive.served[200].whole(200, HEADERS, b"fine")
        await told.over.wait()
        assert told.body == b"fine"
        assert [counters.streams for counters in trunks.counters()] == [0]
        await until(lambda: [c.streams for c in hive.server.counters()] == [0], "the hive's end")


async def test_a_hive_that_must_prove_itself_anew_gets_no_request_over_its_trunk(
    tmp_path: Path,
) -> None:
    async with proven(tmp_path) as (_, peer), kept(peer) as trunks:
        trunk = await until(lambda: trunks.to(peer.url), "a trunk")
        peer.doubt()
        assert trunks.to(peer.url) is None
        await peer.open()
        assert trunks.to(peer.url) is trunk  # the same life of the same hive


async def test_a_hive_that_is_lost_sight_of_loses_its_trunk_when_nothing_runs_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queen.trunks.DOUBT_S", 0.1)
    async with proven(tmp_path) as (hive, peer), kept(peer) as trunks:
        trunk = await until(lambda: trunks.to(peer.url), "a trunk")
        told = ask(trunk)
        await until(lambda: len(hive.served), "the request")
        await peer.close()
        await until(trunk.over.is_set, "the queen to give it up")
        assert not trunk.closed
        hive.served[0].whole(200, HEADERS, b"fine")
        await told.over.wait()
        assert told.body == b"fine"
        await until(lambda: hive.taken[0].closed, "the end of it")
        assert hive.taken[0].reason == "the connection ended"


async def test_a_hive_without_trunks_is_asked_by_http_and_left_in_peace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with proven(tmp_path, trunks=False) as (_, peer), kept(peer) as trunks:
        await until(lambda: "it answers 404" in caplog.text, "the refusal")
        assert trunks.to(peer.url) is None
        assert caplog.text.count("it answers 404") == 1


def certificate_in(folder: Path) -> Certificate:
    pair = make((ip_address("127.0.0.1"),), 1, datetime.now(UTC))
    folder.mkdir()
    (folder / "cert.pem").write_bytes(pair.cert)
    (folder / "key.pem").write_bytes(pair.key)
    return read_certificate(folder / "cert.pem", folder / "key.pem")


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_trunk_over_tls_goes_only_to_who_has_the_proven_certificate(
    tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    own, other = certificate_in(tmp_path / "own"), certificate_in(tmp_path / "other")

    async def story() -> None:
        async with proven(tmp_path, certificate=own) as (hive, peer), kept(peer) as trunks:
            trunk = await until(lambda: trunks.to(peer.url), "a trunk")
            told = ask(trunk, bytes(MAX_BODY))
            await until(lambda: len(hive.served), "the request")
            hive.served[0].whole(200, HEADERS, bytes(WINDOW))
            await told.over.wait()
            assert told.body == bytes(WINDOW)

            await hive.close()  # and somebody else takes its port
            rogue = Hive(Secret.new(), tmp_path, certificate=other)
            await rogue.listen(urlsplit(peer.url).port or 0)
            with pytest.raises(ssl.SSLError):
                await dial(peer, "hive gpu-0")
            assert not rogue.asked
            await rogue.close()

    alone(story, new_loop)


async def test_a_hive_that_stops_gives_no_trunk(tmp_path: Path) -> None:
    async with proven(tmp_path) as (hive, peer):
        hive.server.drain()
        async with kept(peer) as trunks:
            await until(lambda: hive.refused, "a refusal")
            assert trunks.to(peer.url) is None


async def test_a_key_gets_no_trunk(tmp_path: Path) -> None:
    hive = Hive(Secret.new(), tmp_path)
    with pytest.raises(Forbidden):
        hive.server.take(Caller("key", "alice", frozenset({"admin"})), "here", Tape())
    tape = Tape()
    hive.server.take(LOCAL, "here", tape).flush()
    assert tape.written.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    hive.server.close()
