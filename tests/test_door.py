"""The front door of both daemons over the wire: HTTP/1.1 in full, whoever serves the request."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.cluster import Daemon
from tests.conftest import Room
from wire.keys import Keys

CHAT = "/v1/chat/completions"


class Caller:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *pieces: bytes) -> None:
        self.writer.write(b"".join(pieces))

    async def trickle(self, raw: bytes, sizes: Iterable[int]) -> None:
        """Send in pieces, each of which is a packet of its own."""
        place = 0
        for size in sizes:
            self.writer.write(raw[place : place + size])
            await self.writer.drain()
            await asyncio.sleep(0)
            place += size
        self.writer.write(raw[place:])

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next final answer: status, headers, body without its framing."""
        async with asyncio.timeout(20):
            while True:
                head = await self.reader.readuntil(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1])
                lines = head.decode("latin-1").split("\r\n")[1:-2]
                headers = {n.lower(): v.strip() for n, _, v in (x.partition(":") for x in lines)}
                if status >= 200:
                    break
            if headers.get("transfer-encoding") == "chunked":
                return status, headers, await self._chunks()
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def closed(self) -> bytes:
        """What comes until the connection ends."""
        async with asyncio.timeout(20):
            return await self.reader.read()


@asynccontextmanager
async def calling(daemon: Daemon) -> AsyncIterator[Caller]:
    parts = urlsplit(daemon.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()


def chat(text: str = "hello", **more: Any) -> bytes:
    body = {"model": "parrot", "messages": [{"role": "user", "content": text}], "max_tokens": 5}
    return json.dumps({**body, **more}).encode()


def post(body: bytes, *headers: str, path: str = CHAT, length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def chunked(body: bytes, cuts: int = 3) -> bytes:
    size = max(1, len(body) // cuts)
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


async def test_one_connection_alternates_between_inference_and_other_routes(door: Daemon) -> None:
    async with calling(door) as caller:
        for _ in range(3):
            caller.send(post(chat()))
            status, headers, body = await caller.answer()
            assert status == 200
            assert headers["x-worker-id"]
            assert json.loads(body)["choices"][0]["message"]["content"]
            caller.send(get("/v1/models"))
            status, headers, body = await caller.answer()
            assert status == 200
            assert "x-worker-id" not in headers
            assert json.loads(body)["data"]
            caller.send(post(chat(stream=True)))
            status, _, body = await caller.answer()
            assert status == 200
            assert body.endswith(b"data: [DONE]\n\n")


async def test_pipelined_requests_are_answered_in_their_order(door: Daemon) -> None:
    texts = ["one", "two", "three"]
    async with calling(door) as caller:
        caller.send(
            post(chat(texts[0])),
            get("/health"),
            post(chat(texts[1], stream=True)),
            get("/v1/models"),
            post(chunked(chat(texts[2])), "Transfer-Encoding: chunked", length=False),
        )
        kinds = [(await caller.answer())[1]["content-type"].split(";")[0] for _ in range(5)]
    assert kinds == [
        "application/json",
        "application/json",
        "text/event-stream",
        "application/json",
        "application/json",
    ]


async def test_each_request_under_one_head_gets_an_answer_of_its_own(door: Daemon) -> None:
    texts = ["word " * count for count in (3, 3, 1, 200, 20_000, 2)]
    ids = set()
    async with calling(door) as caller:

        async def is_answered(text: str) -> None:
            status, headers, body = await caller.answer()
            assert (status, json.loads(body)["usage"]["prompt_tokens"]) == (200, len(text.split()))
            assert headers["x-request-id"] not in ids
            ids.add(headers["x-request-id"])

        for text in texts:
            caller.send(post(chat(text)))
            await is_answered(text)
        for text in texts:  # as many clients send: the head first
            head, _, body = post(chat(text)).partition(b"\r\n\r\n")
            caller.send(head, b"\r\n\r\n")
            await caller.writer.drain()
            await asyncio.sleep(0)
            caller.send(body)
            await is_answered(text)
        caller.send(*(post(chat(text)) for text in texts))
        for text in texts:
            await is_answered(text)
        caller.send(post(chat(texts[0], stream=True)))
        assert (await caller.answer())[2].endswith(b"data: [DONE]\n\n")
        caller.send(post(chat(texts[1])))
        await is_answered(texts[1])


async def test_a_head_that_was_let_in_without_a_body_lets_none_in(door: Daemon) -> None:
    plain = post(b"").replace(b"application/json", b"text/plain")
    async with calling(door) as caller:
        caller.send(plain)
        assert (await caller.answer())[0] == 400
        caller.send(plain.replace(b"Length: 0", b"Length: 2"), b"{}")
        assert (await caller.answer())[0] == 415


async def test_a_head_that_was_let_in_lets_no_body_over_the_limit_in(door: Daemon) -> None:
    async with calling(door) as caller:
        caller.send(post(chat()))
        assert (await caller.answer())[0] == 200
        lines, _, _ = post(b"").partition(b"Content-Length: ")
        caller.send(lines, b"Content-Length: %d\r\n\r\n" % (64 * 1024 * 1024 + 1))
        assert (await caller.answer())[0] == 413


async def test_a_key_that_holds_no_more_is_refused_on_a_connection_that_knows_it(
    room: Room, door: Daemon
) -> None:
    keys = Keys(room.secret)
    revoked, key_id = keys.make(scopes=("infer",))
    brief, _ = keys.make(scopes=("infer",), seconds=2)
    few, _ = keys.make(scopes=("infer",), rpm=3)
    async with calling(door) as one, calling(door) as two, calling(door) as three:

        async def asked(caller: Caller, key: str) -> str:
            caller.send(post(chat(), f"Authorization: Bearer {key}"))
            status, _, body = await caller.answer()
            return "ok" if status == 200 else json.loads(body)["error"]["code"]

        assert [await asked(one, revoked) for _ in range(3)] == ["ok"] * 3
        await door.client.post("/v1/keys/revoked", {"key_ids": [key_id]})
        assert await asked(one, revoked) == "revoked_key"
        assert [await asked(three, few) for _ in range(4)] == ["ok"] * 3 + ["rate_limit_exceeded"]
        assert await asked(two, brief) == "ok"
        said = "ok"
        async with asyncio.timeout(15):
            while said == "ok":
                said = await asked(two, brief)
        assert said == "expired_key"


@pytest.mark.parametrize("seed", range(8))
async def test_a_request_may_come_in_any_pieces(seed: int, door: Daemon) -> None:
    chance = random.Random(seed)
    raw = b"".join(
        (
            post(chat()),
            post(chunked(chat(), 7), "Transfer-Encoding: chunked", length=False),
            get("/health"),
        )
    )
    sizes = [1] * len(raw) if seed == 0 else [chance.randint(1, 60) for _ in range(40)]
    async with calling(door) as caller:
        await caller.trickle(raw, sizes)
        assert [(await caller.answer())[0] for _ in range(3)] == [200, 200, 200]


async def test_a_body_is_asked_for_when_the_caller_waits_to_be(door: Daemon) -> None:
    body = chat()
    head = post(body, "Expect: 100-continue")[: -len(body)]
    async with calling(door) as caller:
        caller.send(head)
        async with asyncio.timeout(10):
            assert await caller.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        caller.send(body)
        assert (await caller.answer())[0] == 200
    async with calling(door) as caller:
        caller.send(head.replace(b"localhost", b"evil.example"))
        status, headers, _ = await caller.answer()
        assert status in (401, 403)
        assert headers["connection"] == "close"


async def test_a_caller_that_sends_no_more_still_gets_his_answer(door: Daemon) -> None:
    async with calling(door) as caller:
        caller.send(post(chat(stream=True, max_tokens=50)))
        caller.writer.write_eof()
        status, _, body = await caller.answer()
        assert status == 200
        assert body.endswith(b"data: [DONE]\n\n")
        assert await caller.closed() == b""


async def test_http_1_0_gets_an_answer_without_chunks(door: Daemon) -> None:
    async with calling(door) as caller:
        caller.send(post(chat(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0"))
        whole = await caller.closed()
    head, _, body = whole.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head
    assert body.startswith(b"data: ")
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", [CHAT, "/v1/jobs"])
@pytest.mark.parametrize(
    "spoil",
    [
        (b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n"),
        (b"Content-Length: ", b"Content-Length: +"),
        (b"Content-Length: ", b"Content-Length : "),
        (b"\r\nContent-Type", b"\r\n folded\r\nContent-Type"),
        (b"\r\nContent-Type", b"\nContent-Type"),
        (b"Host: localhost", b"Host: local\x00host"),
        (b"Host: localhost", b"Host: localhost\r\nHost: localhost"),
        (b"Host: localhost\r\n", b""),
        (b"\r\n\r\n", b"\r\nX: " + b"y" * 100_000 + b"\r\n\r\n"),
        (b"HTTP/1.1", b"HTTP/2.0"),
        (b"POST", b"PO ST"),
    ],
    ids=[
        "length and chunks",
        "two lengths",
        "signed length",
        "space before the colon",
        "folded",
        "bare LF",
        "NUL",
        "two hosts",
        "no host",
        "100 KB of headers",
        "another version",
        "a method of two words",
    ],
)
async def test_what_smugglers_send_is_refused_and_the_connection_ends(
    spoil: tuple[bytes, bytes], path: str, door: Daemon
) -> None:
    body = chat()
    head = post(body, path=path)[: -len(body)].replace(*spoil, 1)
    async with calling(door) as caller:
        caller.send(head, body, get("/health"))
        said = await caller.closed()
    status = int(said.split(b" ", 2)[1])
    assert status in (400, 431, 505)
    assert said.count(b"x-request-id: ") == 1
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    "body", [b'5\n{"a"}\r\n0\r\n\r\n', b"zz\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n"]
)
async def test_bad_chunks_are_refused(body: bytes, door: Daemon) -> None:
    async with calling(door) as caller:
        caller.send(post(body, "Transfer-Encoding: chunked", length=False))
        assert (await caller.closed()).startswith(b"HTTP/1.1 400 ")


async def test_other_methods_on_inference_routes_are_refused_as_such(door: Daemon) -> None:
    async with calling(door) as caller:
        caller.send(get(CHAT))
        assert (await caller.answer())[0] == 405
        caller.send(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n", get("/health"))
        async with asyncio.timeout(10):
            head = await caller.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        status, _, body = await caller.answer()
        assert status == 200
        assert json.loads(body)


async def test_a_body_over_the_limit_is_refused_before_it_is_read(door: Daemon) -> None:
    async with calling(door) as caller:
        caller.send(post(b"", f"Content-Length: {10**10}", length=False))
        status, headers, body = await caller.answer()
    assert status == 413
    assert headers["connection"] == "close"
    assert b"--max-body" in body


async def test_the_room_still_works_after_all_that(room: Room) -> None:
    for daemon in (room.queen, room.hive):
        async with calling(daemon) as caller:
            caller.send(post(chat()))
            assert (await caller.answer())[0] == 200
