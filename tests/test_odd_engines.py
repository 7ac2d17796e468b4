"""Engines that answer in every way that HTTP/1.1 allows, and in some that it does not.

A raw server is attached as a worker. What comes out is read from one connection of a caller, which
asks for other things in between, and so notices any byte that is not where it belongs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from tests.cluster import Cluster, Daemon, served, spawn_scripted, until, with_constants
from tests.conftest import Room
from tests.test_door import Caller, calling, get, post
from tests.test_external import attach
from tests.watched import idle
from wire.http1.body import chunk

MODEL = "odd"
EVENTS = [b'data: {"n":%d}\n\n' % n for n in range(20)] + [b"data: [DONE]\n\n"]
STREAM = b"".join(EVENTS)
WHOLE = b'{"choices":[{"message":{"content":"hello"}}],"usage":{"completion_tokens":1}}'
MODELS = b'{"object":"list","data":[{"id":"odd","object":"model"}]}'


def chunks(pieces: list[bytes], *, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    framed = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join(framed) + b"0\r\n" + trailers + b"\r\n"


def head(*lines: bytes, status: bytes = b"200 OK", version: bytes = b"1.1") -> bytes:
    return b"\r\n".join([b"HTTP/" + version + b" " + status, *lines, b"", b""])


SSE = b"Content-Type: text/event-stream"
JSON = b"Content-Type: application/json"
CHUNKED = b"Transfer-Encoding: chunked"
SIZED = b"Content-Length: %d"
STREAMED = head(SSE, CHUNKED) + chunks(EVENTS)
ANSWERED = head(JSON, SIZED % len(WHOLE)) + WHOLE


@dataclass(frozen=True)
class Play:
    """What the engine sends.

    :param step: bytes that go out at once
    :param ends: it closes the connection then
    :param resets: it resets the connection then
    :param endless: it sends this then, over and over, until the connection breaks
    """

    sent: bytes
    step: int = 1 << 20
    ends: bool = False
    resets: bool = False
    endless: bytes = b""


GOOD = {
    "merged": (Play(STREAMED), STREAM),
    "byte by byte": (Play(STREAMED, step=1), STREAM),
    "seven bytes at a time": (Play(STREAMED, step=7), STREAM),
    "one chunk": (Play(head(SSE, CHUNKED) + chunks([STREAM])), STREAM),
    "a byte a chunk": (Play(head(SSE, CHUNKED) + chunks([b"%c" % b for b in STREAM])), STREAM),
    "a length": (Play(head(SSE, SIZED % len(STREAM)) + STREAM, step=5), STREAM),
    "until it closes": (Play(head(SSE) + STREAM, step=9, ends=True), STREAM),
    "HTTP 1.0": (Play(head(SSE, version=b"1.0") + STREAM, ends=True), STREAM),
    "100 and 103 before": (
        Play(
            head(status=b"100 Continue")
            + head(b"Link: </x>", status=b"103 Early Hints")
            + STREAMED,
            step=11,
        ),
        STREAM,
    ),
    "102 twice, whole": (Play(head(status=b"102 Processing") * 2 + ANSWERED, step=3), WHOLE),
    "trailers": (
        Play(head(SSE, CHUNKED, b"Trailer: X-Sum") + chunks(EVENTS, trailers=b"X-Sum: 7\r\n")),
        STREAM,
    ),
    "trailers byte by byte": (
        Play(head(JSON, CHUNKED) + chunks([WHOLE], trailers=b"X-Sum: 7\r\nX-Y: z\r\n"), step=1),
        WHOLE,
    ),
    "chunk extensions": (Play(head(SSE, CHUNKED) + chunks(EVENTS, extension=b";a=b")), STREAM),
    "it closes behind": (Play(head(SSE, CHUNKED, b"Connection: close") + chunks(EVENTS)), STREAM),
    "whole, it closes behind": (Play(ANSWERED, ends=True), WHOLE),
    "whole, byte by byte": (Play(ANSWERED, step=1), WHOLE),
}

BROKEN_STREAMS = {
    "closed between events": Play(STREAMED[:300], ends=True),
    "closed in an event": Play(STREAMED[:305], ends=True),
    "reset in an event": Play(STREAMED[:311], resets=True),
    "a length not reached": Play(head(SSE, SIZED % 1000) + b"".join(EVENTS[:4]), ends=True),
    "a bad chunk": Play(head(SSE, CHUNKED) + chunks(EVENTS[:3])[:-5] + b"zz\r\nno\r\n"),
    "closed byte by byte": Play(STREAMED[:300], step=1, ends=True),
}

BROKEN_ANSWERS = {
    "nothing": Play(b"", ends=True),
    "a reset": Play(b"", resets=True),
    "half a head": Play(ANSWERED[:20], ends=True),
    "half a body": Play(ANSWERED[:-9], ends=True),
    "no HTTP": Play(b"hello\r\n\r\n", ends=True),
    "two lengths": Play(head(JSON, SIZED % 5, SIZED % 6) + b"hello", ends=True),
    "length and chunks": Play(head(JSON, SIZED % 5, CHUNKED) + chunks([b"hello"])),
    "1xx and no more": Play(head(status=b"100 Continue"), ends=True),
    "an endless refusal": Play(
        head(JSON, CHUNKED, status=b"400 Bad Request"), endless=chunk(b"x" * 65536)
    ),
}

REFUSED = b'{"error":{"message":"the first half, and the second"}}'
REFUSALS = {
    "in two chunks": Play(
        head(JSON, CHUNKED, status=b"400 No") + chunks([REFUSED[:30], REFUSED[30:]]), step=7
    ),
    "in two packets": Play(head(JSON, SIZED % len(REFUSED), status=b"400 No") + REFUSED, step=99),
    "until it closes": Play(head(JSON, status=b"400 No") + REFUSED, step=9, ends=True),
}
ENDLESS = "an endless answer"

PLAYS: dict[str, Play] = {
    **{name: play for name, (play, _) in GOOD.items()},
    **BROKEN_STREAMS,
    **BROKEN_ANSWERS,
    **{f"refused {name}": play for name, play in REFUSALS.items()},
    ENDLESS: Play(head(JSON, CHUNKED), endless=chunk(b"x" * 65536)),
}


@dataclass
class OddEngine:
    """Plays what the prompt names; answers a GET with its models."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in asked.lower().split(b"\r\n"):
                    name, _, value = line.partition(b":")
                    length = int(value) if name == b"content-length" else length
                body = await reader.readexactly(length)
                if asked.startswith(b"GET"):
                    writer.write(head(JSON, SIZED % len(MODELS)) + MODELS)
                    continue
                name = json.loads(body)["messages"][0]["content"]
                self.asked.append(name)
                play = PLAYS[name]
                for at in range(0, len(play.sent), play.step):
                    writer.write(play.sent[at : at + play.step])
                    await writer.drain()
                    if play.step < 100:
                        await asyncio.sleep(0)  # a packet of its own
                while play.endless:
                    writer.write(play.endless)
                    try:
                        await writer.drain()
                    except ConnectionError:
                        self.cut_off.append(name)
                        raise
                if play.resets:
                    writer.transport.abort()
                if play.ends or play.resets:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture(scope="module")
async def engine(room: Room) -> AsyncIterator[OddEngine]:
    made = OddEngine()
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        options = {"engine": "external", "url": made.url, "slots": 64}
        spawn = {"operation": "worker_spawn", "model": MODEL, "options": options}
        worker = await room.hive.client.run(spawn)
        await served(room.queen.client, MODEL)
        yield made
        await room.hive.client.run(
            {"operation": "worker_process_delete", "worker_id": worker["worker_id"]}
        )


class Reader(Caller):
    """Knows chunk extensions and trailers, too: they are passed on as the engine sends them."""

    async def _chunks(self) -> bytes:
        body = b""
        while size := int((await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        while await self.reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return body

    async def stream(self) -> bytes:
        """The body of an answer of chunks whose head has been read."""
        async with asyncio.timeout(20):
            return await self._chunks()


@asynccontextmanager
async def reading(daemon: Daemon) -> AsyncIterator[Reader]:
    async with calling(daemon) as caller:
        yield Reader(caller.reader, caller.writer)


def asking(name: str, model: str = MODEL, **more: Any) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": name}], **more}
    return post(json.dumps(body).encode())


async def in_step(caller: Caller) -> None:
    """The connection carries other things as if nothing had been."""
    for path, status in (("/v1/models", b" 200 "), ("/v1/chat/completions", b" 405 ")):
        caller.send(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        async with asyncio.timeout(20):
            assert status in await caller.reader.readuntil(b"\r\n\r\n")
    caller.send(get("/v1/models"))
    code, _, body = await caller.answer()
    assert code == 200
    assert MODEL in {model["id"] for model in json.loads(body)["data"]}


@pytest.mark.parametrize("name", GOOD)
async def test_an_answer_comes_whole_however_the_engine_frames_it(
    name: str, engine: OddEngine, door: Daemon
) -> None:
    expected = GOOD[name][1]
    async with reading(door) as caller:
        for _ in range(2):
            caller.send(asking(name, stream=expected is STREAM))
            status, headers, body = await caller.answer()
            assert status == 200
            assert headers["x-hive-id"] == "gpu-0"
            assert "x-sum" not in headers
            assert body == expected
            await in_step(caller)


@pytest.mark.parametrize("name", BROKEN_STREAMS)
async def test_a_stream_that_breaks_ends_in_one_error_and_the_connection_goes_on(
    name: str, engine: OddEngine, door: Daemon
) -> None:
    async with reading(door) as caller:
        caller.send(asking(name, stream=True))
        status, _, body = await caller.answer()
        assert status == 200
        *events, last = body.removesuffix(b"\n\n").split(b"\n\n")
        assert STREAM.startswith(b"".join(event + b"\n\n" for event in events))
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["hop"] == "worker"
        assert body.count(b'"error"') == 1
        assert b"[DONE]" not in body
        await in_step(caller)


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
async def test_an_answer_that_is_none_is_a_502_and_the_connection_goes_on(
    name: str, engine: OddEngine, door: Daemon
) -> None:
    async with reading(door) as caller:
        caller.send(asking(name))
        status, _, body = await caller.answer()
        assert status == 502
        assert json.loads(body)["error"]["hop"] == "worker"
        await in_step(caller)


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_refusal_is_read_whole_however_it_comes(
    name: str, engine: OddEngine, door: Daemon
) -> None:
    async with reading(door) as caller:
        caller.send(asking(f"refused {name}"))
        status, _, body = await caller.answer()
        assert status == 400
        assert json.loads(body)["error"]["message"].startswith("the first half, and the second")
        await in_step(caller)


async def test_a_refusal_that_never_ends_is_cut_off(engine: OddEngine, door: Daemon) -> None:
    engine.cut_off.clear()
    async with reading(door) as caller:
        caller.send(asking("an endless refusal"))
        status, _, body = await caller.answer()
        assert status == 502
        assert "more than anybody can use" in json.loads(body)["error"]["message"]
        await until(lambda: engine.cut_off == ["an endless refusal"], "the engine to be cut off")


async def test_an_answer_that_never_ends_is_cut_off(engine: OddEngine, fresh: Cluster) -> None:
    engine.cut_off.clear()
    hive = await fresh.start(
        *("agent", "--port=0", "--hive-id=gpu-9", "--queen-url=http://127.0.0.1:9"),
        prefix=with_constants("wire.door.relay", WHOLE_BYTES=2**20, LARGE_BYTES=2**18),
    )
    await attach(hive, engine.url, MODEL)
    async with reading(hive) as caller:
        caller.send(asking(ENDLESS))
        status, _, body = await caller.answer()
        assert status == 502
        error = json.loads(body)["error"]
        assert (error["hop"], error["retryable"]) == ("worker", False)
        assert "more than anybody can use" in error["message"]
        await until(lambda: engine.cut_off == [ENDLESS], "the engine to be cut off")
        await in_step(caller)


async def test_one_connection_lives_through_all_of_it(engine: OddEngine, door: Daemon) -> None:
    async with reading(door) as caller:
        for name in (*GOOD, *BROKEN_STREAMS, *BROKEN_ANSWERS):
            caller.send(asking(name, stream=True))
            assert (await caller.answer())[0] in (200, 502)
            caller.send(get("/health"))
            assert (await caller.answer())[0] == 200


async def test_callers_that_leave_in_the_middle_leave_nothing(
    engine: OddEngine, room: Room, door: Daemon
) -> None:
    asked = asking("byte by byte", stream=True)
    for cut in (1, len(asked) // 2, len(asked) - 1, len(asked)):
        for reset in (False, True):
            async with reading(door) as caller:
                caller.send(asked[:cut])
                await caller.writer.drain()
                if cut == len(asked):
                    async with asyncio.timeout(20):
                        await caller.reader.readuntil(b"\n\n")
                if reset:
                    caller.writer.transport.abort()
    await idle(room.queen, room.hive)
    async with reading(door) as caller:
        caller.send(asking("merged", stream=True))
        assert (await caller.answer())[2] == STREAM


async def test_a_connection_outlives_the_worker_that_answered_on_it(
    room: Room, door: Daemon
) -> None:
    worker = await spawn_scripted(room.hive, f"mortal-{door.name}", tokens_per_second=20)
    model = worker["model"]
    await served(room.queen.client, model)
    async with reading(door) as caller:
        caller.send(asking("go", model, stream=True, max_tokens=1000))
        async with asyncio.timeout(20):
            begun = await caller.reader.readuntil(b"\r\n\r\n")
        assert begun.startswith(b"HTTP/1.1 200 ")
        psutil.Process(worker["pid"]).kill()
        body = await caller.stream()
        assert b'"error"' in body
        assert b"[DONE]" not in body
        caller.send(get("/v1/models"))
        assert (await caller.answer())[0] == 200

        async def answered() -> bool:
            caller.send(asking("go", model, max_tokens=1))
            return (await caller.answer())[0] == 200

        await until(answered, "the worker's successor")
    workers = (await room.hive.client.run({"operation": "worker_list"}))["workers"]
    (worker_id,) = [one["worker_id"] for one in workers if one["model"] == model]
    await room.hive.client.run({"operation": "worker_process_delete", "worker_id": worker_id})
