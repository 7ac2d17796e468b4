"""Bad frames against a daemon's trunk: the trunk ends, and nothing else does.

Each of them, against one end alone, is in ``test_trunk``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.cluster import served, spawn_scripted
from tests.conftest import Room
from tests.watched import gauges, idle, rss
from wire.http1.head import request_bytes
from wire.peer import Peer
from wire.trunk.frames import (
    CANCEL,
    CREDIT,
    DATA,
    END,
    ERROR,
    GOAWAY,
    HELLO,
    OPEN,
    PING,
    PROTOCOL,
    Decoder,
    frame,
    header,
)
from wire.trunk.messages import OURS, Open, hello_payload, open_payload, reason_of
from wire.trunk.server import PATH

CHAT = "/v1/chat/completions"
HELLO_FRAME = frame(HELLO, 0, hello_payload(OURS))
BODY = b'{"model":"parrot","messages":[{"role":"user","content":"hello"}],"max_tokens":2}'
PLAIN = {"content-type": "application/json"}
FORGED = open_payload(Open(CHAT, "r-1", {**PLAIN, "x-hive-session": "made.up"}), BODY)
MIB = 1024 * 1024


class Intruder:
    """A proven caller with a trunk of his own, who writes on it what he likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._reader = reader
        self._decoder = Decoder()

    async def frames(self) -> AsyncIterator[tuple[int, int, bytes]]:
        """What the hive sends, until it hangs up."""
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionResetError):
                while data := await self._reader.read(65536):
                    for one in self._decoder.feed(data):
                        yield one

    async def reason(self) -> str:
        """Why the hive closes the trunk; it does."""
        said = [reason_of(payload) async for kind, _, payload in self.frames() if kind == GOAWAY]
        assert len(said) == 1
        return said[0]


@contextlib.asynccontextmanager
async def intruding(room: Room) -> AsyncIterator[Intruder]:
    peer = Peer(room.hive.url, room.secret, role="queen", id="queen-odd", roles=("hive",))
    await peer.open()
    parts = urlsplit(peer.base_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        signed = peer.signature("GET", PATH, b"", {})
        assert signed is not None
        headers = [
            (b"host", parts.netloc.encode()),
            (b"connection", b"Upgrade"),
            (b"upgrade", PROTOCOL.encode()),
            (b"x-hive-session", signed.encode()),
        ]
        writer.write(request_bytes("GET", PATH.encode(), headers))
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        yield Intruder(reader, writer)
    finally:
        writer.close()
        await peer.close()


@pytest.fixture(scope="module")
async def talker(room: Room) -> None:
    """A scripted model that takes its time, on the shared room."""
    await spawn_scripted(room.hive, "talker", slots=64, tokens_per_second=50)
    await served(room.queen.client, "talker")


@contextlib.asynccontextmanager
async def a_stream_meanwhile(room: Room) -> AsyncIterator[None]:
    """Beside the block an answer goes over the queen's own trunk, and comes whole."""
    body = {
        "model": "talker",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 50,
        "stream": True,
    }
    async with aiohttp.ClientSession(room.queen.url) as http, http.post(CHAT, json=body) as answer:
        assert answer.status == 200
        began = await answer.content.readuntil(b"\n\n")
        assert (await gauges(room.queen))["hive_trunk_streams"] >= 1
        yield
        rest = began + await answer.content.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert rest.count(b"data: ") == 50 + 3


BAD = [
    pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "unknown kind", id="garbage"),
    pytest.param(frame(OPEN, 1, FORGED), "OPEN before HELLO", id="before HELLO"),
    pytest.param(HELLO_FRAME * 2, "a second HELLO", id="a second HELLO"),
    pytest.param(HELLO_FRAME + header(2**32 - 1, OPEN, 1), "OPEN of 4294967295", id="huge"),
    pytest.param(HELLO_FRAME + header(2**20, PING, 0), "PING of 1048576", id="oversize"),
    pytest.param(HELLO_FRAME + frame(99, 1, b"x"), "unknown kind 99", id="unknown kind"),
    pytest.param(HELLO_FRAME + frame(DATA, 1, b"x"), "DATA that does not", id="the hive's kind"),
    pytest.param(HELLO_FRAME + frame(CANCEL, 3), "CANCEL that does not", id="unopened"),
    pytest.param(
        HELLO_FRAME + frame(OPEN, 9, FORGED) + frame(OPEN, 1, FORGED),
        "OPEN of stream 1 after 9",
        id="numbers that fall",
    ),
    pytest.param(
        HELLO_FRAME + frame(OPEN, 1, b"\xff\xff{}"), "whose head ends at", id="a head too short"
    ),
    pytest.param(HELLO_FRAME + frame(CREDIT, 1, b"\xff"), "CREDIT of 1 bytes", id="short CREDIT"),
]


@pytest.mark.usefixtures("talker")
@pytest.mark.parametrize(("sent", "why"), BAD)
async def test_bad_frames_end_their_trunk_and_no_other(sent: bytes, why: str, room: Room) -> None:
    async with a_stream_meanwhile(room), intruding(room) as intruder:
        intruder.writer.write(sent)
        assert why in await intruder.reason()
    assert (await gauges(room.hive))["hive_trunks"] == 1
    await idle(room.queen, room.hive)


@pytest.mark.usefixtures("talker")
async def test_a_trunk_that_ends_in_the_middle_of_a_frame_leaves_nothing(room: Room) -> None:
    before = rss(room.hive)
    async with a_stream_meanwhile(room):
        for _ in range(20):
            async with intruding(room) as intruder:
                half = header(len(FORGED) + 200_000, OPEN, 1) + FORGED + bytes(100_000)
                intruder.writer.write(HELLO_FRAME + half)
                await intruder.writer.drain()
                assert [kind async for kind, _, _ in ended(intruder)] == [HELLO]
    await idle(room.queen, room.hive)
    assert (await gauges(room.hive))["hive_trunks"] == 1
    assert rss(room.hive) - before < 16 * MIB


async def ended(intruder: Intruder) -> AsyncIterator[tuple[int, int, bytes]]:
    """What came before this end has said that it sends no more."""
    intruder.writer.write_eof()
    async for one in intruder.frames():
        yield one


@pytest.mark.usefixtures("talker")
async def test_requests_with_a_made_up_signature_are_refused_one_by_one(room: Room) -> None:
    count = 50
    async with a_stream_meanwhile(room), intruding(room) as intruder:
        opens = [frame(OPEN, number, FORGED) for number in range(1, count + 1)]
        intruder.writer.write(HELLO_FRAME + b"".join(opens))
        refused: list[int] = []
        async for kind, stream, payload in intruder.frames():
            assert kind in (HELLO, ERROR, PING)
            if kind == ERROR:
                refused.append(stream)
                assert json.loads(payload)["status"] == 401
            if len(refused) == count:
                break
        intruder.writer.write(frame(END, 1))
        assert "END that does not" in await intruder.reason()
    assert refused == list(range(1, count + 1))
    await idle(room.queen, room.hive)
