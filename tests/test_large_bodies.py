"""Large request bodies, through real daemons: what arrives, what is refused, who is disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from bench.load import Target
from bench.upstream import MODEL, STAMP, Orders
from keeper.tls import make
from tests.body_sink import MUCH
from tests.cluster import Cluster, Daemon, clean_env, cluster, served, until
from tests.test_door import Caller, calling, post
from tests.uploader import Large
from wire.secret import Secret

MIB = 1024 * 1024
SIZE = 70 * MIB  # over the limit that daemons have by themselves
MAX_BODY = "--max-body=100000000"


def head_of(body: Large) -> bytes:
    return post(b"", f"Content-Length: {len(body)}", length=False)


@dataclass(frozen=True)
class Served:
    """A running process that serves at a URL."""

    url: str
    process: asyncio.subprocess.Process

    async def get(self, path: str) -> dict[str, Any]:
        async with aiohttp.ClientSession(self.url) as http, http.get(path) as answer:
            return dict(await answer.json(content_type=None))

    async def text(self, path: str) -> str:
        async with aiohttp.ClientSession(self.url) as http, http.get(path) as answer:
            return await answer.text()


@contextlib.asynccontextmanager
async def running(module: str, *arguments: str) -> AsyncIterator[Served]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        env=clean_env(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            url = (await process.stdout.readline()).decode().strip()
        yield Served(url, process)
    finally:
        process.kill()
        await process.wait()


@dataclass(frozen=True)
class Room:
    """A queen and a hive that takes large bodies, and a sink attached to it: as ``sink``, which it
    calls ``Sink:latest`` itself, and as its other models, by their own names."""

    queen: Daemon
    hive: Daemon
    sink: Served


@contextlib.asynccontextmanager
async def room_of(
    made: Cluster, *flags: str, hive_flags: tuple[str, ...] = ()
) -> AsyncIterator[Room]:
    queen = await made.queen(*flags)
    hive = await made.hive("gpu-0", *flags, *hive_flags, queen=queen)
    models = {name: name for name in ("plain", "slow", "much", "much-chunked")}
    models["sink"] = "Sink:latest"
    names = json.dumps({"models": list(models.values())})
    async with running("tests.body_sink", names) as sink:
        for model, served_as in models.items():
            await attach(queen, sink.url, model, served_as)
        yield Room(queen, hive, sink)


async def attach(queen: Daemon, url: str, model: str, served_as: str, slots: int = 64) -> None:
    options = {"engine": "external", "url": url, "served_as": served_as, "slots": slots}
    spawn = {"operation": "worker_spawn", "hive_id": "gpu-0", "model": model}
    await queen.client.run({**spawn, "options": options})
    await served(queen.client, model)


@pytest.fixture(scope="module")
async def large_room() -> AsyncIterator[Room]:
    async with cluster() as made:
        made.env = {"HIVE_SECRET": Secret.new().text}
        async with room_of(made, MAX_BODY) as room:
            yield room


@pytest.fixture(params=["queen", "hive"])
def entrance(request: pytest.FixtureRequest, large_room: Room) -> Daemon:
    return large_room.queen if request.param == "queen" else large_room.hive


async def send(caller: Caller, body: Large, *, chunked: bool = False) -> dict[str, Any]:
    """Post a body; what the sink has got."""
    if chunked:
        caller.send(post(b"", "Transfer-Encoding: chunked", length=False))
    else:
        caller.send(head_of(body))
    for piece in body.pieces():
        caller.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        await caller.writer.drain()
    if chunked:
        caller.send(b"0\r\n\r\n")
    status, headers, answer = await caller.answer()
    assert status == 200, answer
    assert headers["x-hive-id"] == "gpu-0"
    return dict(json.loads(answer))


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_large_body_arrives_byte_for_byte(entrance: Daemon, chunked: bool) -> None:
    body = Large("plain", SIZE)
    async with calling(entrance) as caller:
        for _ in range(2):  # the connection goes on
            got = await send(caller, body, chunked=chunked)
            assert (got["size"], got["sha256"]) == (len(body), body.sha256)


async def test_a_large_body_is_renamed_for_an_engine_that_knows_its_model_by_another_name(
    entrance: Daemon,
) -> None:
    for body in (Large("sink", SIZE), Large("other", SIZE, ',"model":"sink"}')):
        async with calling(entrance) as caller:
            got = await send(caller, body)
        renamed = Large(
            body.model.replace("sink", "Sink:latest"),
            SIZE,
            body.end.replace("sink", "Sink:latest"),
        )
        assert (got["size"], got["sha256"]) == (len(renamed), renamed.sha256)


async def test_a_large_body_arrives_over_tls(tmp_path: Path) -> None:
    pair = make(["127.0.0.1"], 1, datetime.now(UTC))
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(pair.cert)
    key.write_bytes(pair.key)
    key.chmod(0o600)
    async with cluster() as made:
        made.env = {"HIVE_SECRET": Secret.new().text}
        tls = (f"--tls-cert={cert}", f"--tls-key={key}")
        async with room_of(made, MAX_BODY, hive_flags=tls) as room, calling(room.queen) as caller:
            body = Large("plain", SIZE)
            got = await send(caller, body)
            assert (got["size"], got["sha256"]) == (len(body), body.sha256)


async def test_a_chunked_body_is_refused_as_soon_as_it_passes_the_limit(entrance: Daemon) -> None:
    async with calling(entrance) as caller:
        caller.send(post(b"", "Transfer-Encoding: chunked", length=False))
        async with asyncio.timeout(60):
            answer_comes = asyncio.create_task(caller.answer())
            caller.send(b'6\r\n{"x":"\r\n')
            with contextlib.suppress(ConnectionError):
                while not answer_comes.done():
                    caller.send(b"%x\r\n%b\r\n" % (MIB, b"x" * MIB))
                    await caller.writer.drain()
                    await asyncio.sleep(0)
            status, headers, answer = await answer_comes
    assert status == 413
    assert headers["connection"] == "close"
    assert b"--max-body" in answer


@pytest.mark.parametrize(
    ("begin", "code"),
    [
        (b'["' + b"x" * 2 * MIB, None),
        (b'{"model":"plain","x":' + b"y" * 2 * MIB, "invalid_json"),
        (b'{"model":"plain","x":"' + b"\xff" * 2 * MIB, "invalid_utf8"),
        (b'{"model":"plain","x":' + b"[" * 2 * MIB, "invalid_json"),
    ],
    ids=["a list", "no JSON", "no UTF-8", "too deep"],
)
async def test_a_large_body_that_is_no_json_object_is_refused_while_it_comes(
    entrance: Daemon, begin: bytes, code: str | None
) -> None:
    async with calling(entrance) as caller:
        caller.send(post(b"", f"Content-Length: {50 * MIB}", length=False), begin)
        status, headers, answer = await caller.answer()
    assert status == 400
    assert headers["connection"] == "close"
    error = json.loads(answer)["error"]
    assert error["message"]
    assert code in (None, error["code"])


@pytest.mark.parametrize(
    ("model", "end", "status", "said"),
    [
        ("nobody", "}", 404, "nobody"),
        ("plain", ',"temperature":7}', 400, "temperature"),
        ("plain", ',"model":1}', 400, "model"),
        ("plain", "", 400, "ends before"),
        ("plain", "}}", 400, "follows"),
    ],
)
async def test_a_large_body_is_checked_like_a_small_one(
    entrance: Daemon, model: str, end: str, status: int, said: str
) -> None:
    body = Large(model, 2 * MIB, end)
    async with calling(entrance) as caller:
        caller.send(head_of(body), *body.pieces())
        told, _, answer = await caller.answer()
    assert told == status
    assert said in json.loads(answer)["error"]["message"]


async def test_callers_that_hang_up_within_a_large_body_leave_nothing(
    large_room: Room, entrance: Daemon
) -> None:
    before = await large_room.sink.get("/seen")
    process = psutil.Process(entrance.pid)
    held = process.memory_info().rss
    body = Large("plain", 90 * MIB)
    for _ in range(4):
        async with calling(entrance) as caller:
            caller.send(head_of(body))
            sent = 0
            for piece in body.pieces():
                caller.send(piece)
                await caller.writer.drain()
                sent += len(piece)
                if sent > 60 * MIB:
                    break
            caller.writer.transport.abort()
    await until(lambda: process.memory_info().rss < held + 100 * MIB, "the memory to come back")
    assert await large_room.sink.get("/seen") == before
    async with calling(entrance) as caller:
        assert (await send(caller, Large("plain", 2 * MIB)))["size"] > MIB


async def test_a_caller_that_hangs_up_while_his_body_is_passed_on_ends_that(
    large_room: Room, entrance: Daemon
) -> None:
    sink = large_room.sink
    before = await sink.get("/seen")

    async def busy() -> int:
        workers = (await large_room.hive.client.run({"operation": "worker_list"}))["workers"]
        return sum(worker["in_flight"] for worker in workers)

    body = Large("slow", SIZE)
    async with calling(entrance) as caller:
        caller.send(head_of(body), *body.pieces())
        await caller.writer.drain()
        await until(lambda: _stalled(sink), "the engine to stop reading", within_s=60)
        assert await busy() == 1
        caller.writer.transport.abort()

    async def idle() -> bool:
        return await busy() == 0

    await until(idle, "nothing to be in flight")
    await sink.get("/go")

    async def ended() -> bool:
        return (await sink.get("/seen"))["broken"] == before["broken"] + 1

    await until(ended, "the engine to be hung up on")
    assert (await sink.get("/seen"))["whole"] == before["whole"]


@pytest.mark.parametrize("model", ["much", "much-chunked"])
async def test_a_large_answer_comes_whole_to_a_caller_who_takes_his_time(
    entrance: Daemon, model: str
) -> None:
    async with calling(entrance) as caller:
        caller.send(post(json.dumps({"model": model, "messages": []}).encode()))
        async with asyncio.timeout(30):
            head = await caller.reader.readuntil(b"\r\n\r\n")
            assert b"content-length: %d\r\n" % len(MUCH) in head
            body = b""
            while len(body) < len(MUCH):
                body += await caller.reader.readexactly(min(MIB, len(MUCH) - len(body)))
                if len(body) < 10 * MIB:
                    await asyncio.sleep(0.01)
        assert body == MUCH
        caller.send(post(json.dumps({"model": "plain", "messages": []}).encode()))
        assert (await caller.answer())[0] == 200
    metrics = await Served(entrance.url, entrance.process).text("/metrics")
    counted = re.search(f'hive_tokens_out_total{{model="{model}"}} (.*)', metrics)
    assert counted is not None
    assert float(counted[1]) in (7.0, 14.0)  # the hive has passed on the queen's, too


async def _stalled(sink: Served) -> bool:
    return bool((await sink.get("/seen"))["stalled"])


# -- beside streams ------------------------------------------------------------------------------

STREAMS = 20
GIGABYTE = 10**9
FLOOR_MS = {"gap": 20.0, "delay": 40.0}
"""What is no disturbance: one beat of a stream between two reads, and, where five busy processes
share two cores, as much as two beats until a token has been passed on by three of them."""


class Listener:
    """Reads one stream; while ``sampling``, notes in ms the gaps between reads and how long each
    token was under way."""

    def __init__(self) -> None:
        self.sampling = False
        self.gaps: list[float] = []
        self.delays: list[float] = []

    async def listen(self, url: str) -> None:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(Target(url).request(Orders(tokens=10**6, rate=50), stream=True))
            last = None
            while data := await reader.read(65536):
                now = time.monotonic_ns()
                stamps = STAMP.findall(data)
                if self.sampling and stamps:
                    self.delays += [(now - int(stamp)) / 1e6 for stamp in stamps]
                    if last is not None:
                        self.gaps.append((now - last) / 1e6)
                last = now if stamps else last
        finally:
            writer.transport.abort()

    def take(self) -> dict[str, float]:
        """The median and the 99th percentile of both, since the last time."""
        told = {}
        for name, values in (("gap", self.gaps), ("delay", self.delays)):
            cuts = quantiles(values, n=100)
            told |= {f"{name} p50": cuts[49], f"{name} p99": cuts[98]}
            values.clear()
        return told


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_an_upload_of_a_gigabyte_leaves_the_streams_beside_it_alone() -> None:
    """20 streams of 50 tokens a second run through queen and hive. Measured of them, before the
    upload and from its first byte to its answer: the gaps between reads, and how long each token
    was on its way; of the daemons: the resident memory, which holds the body once."""
    async with contextlib.AsyncExitStack() as stack:
        made = await stack.enter_async_context(cluster())
        made.env = {"HIVE_SECRET": Secret.new().text}
        room = await stack.enter_async_context(room_of(made, f"--max-body={GIGABYTE + MIB}"))
        engine = await stack.enter_async_context(running("bench.upstream"))
        await attach(room.queen, engine.url, MODEL, MODEL)
        daemons = [psutil.Process(room.queen.pid), psutil.Process(room.hive.pid)]
        listener = Listener()
        tasks = [asyncio.create_task(listener.listen(room.queen.url)) for _ in range(STREAMS)]
        stack.callback(lambda: [task.cancel() for task in tasks])

        async def flowing() -> bool:
            return (await engine.get("/state"))["streams"] == STREAMS

        await until(flowing, "all streams to flow")
        listener.sampling = True
        await asyncio.sleep(10)
        before = listener.take()
        resident = [process.memory_info().rss for process in daemons]
        most = list(resident)
        uploading = asyncio.create_task(upload(room.queen.url, GIGABYTE))
        while not uploading.done():
            await asyncio.wait([uploading], timeout=0.1)
            now = [process.memory_info().rss for process in daemons]
            most = [max(pair) for pair in zip(most, now, strict=True)]
        got = await uploading
        during = listener.take()
        grown = [(m - r) / GIGABYTE for m, r in zip(most, resident, strict=True)]
        assert got["size"] > GIGABYTE - MIB
        assert not any(task.done() for task in tasks)
        assert max(grown) < 1.3
        for name, value in before.items():
            most_ms = 2 * max(value, FLOOR_MS[name.split()[0]])
            assert during[name] <= most_ms, (name, before, during, grown)

        def let_go() -> bool:
            now = [process.memory_info().rss for process in daemons]
            return all(n < r + GIGABYTE / 5 for n, r in zip(now, resident, strict=True))

        await until(let_go, "the memory to come back", within_s=30)


async def upload(url: str, size: int) -> dict[str, Any]:
    """Post a body from a process of its own; what the sink has got."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.uploader", url, "plain", str(size)),
        env=clean_env(),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    return dict(json.loads(out))
