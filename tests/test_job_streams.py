"""Streams of jobs as the doors serve them: the hive's bytes, at the hive and through the queen."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from operations import events
from operations.operations import Infer
from tests.cluster import Cluster, Daemon, online, served, spawn_scripted, until
from tests.conftest import Room
from tests.test_external import attach, detach, running
from wire import sse
from wire.door import Answer, Request, job_streams
from wire.http1.outbox import Outbox
from wire.jobs import Job, JobTable, new_job_id
from wire.keys import LOCAL

INFER = {"operation": "infer", "model": "parrot", "prompt": "hello", "max_tokens": 40}


async def stream(daemon: Daemon, job_id: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    url = f"{daemon.url}/v1/jobs/{job_id}/stream"
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as http, http.get(url, headers=sent) as got:
        return got.status, {n.lower(): v for n, v in got.headers.items()}, await got.read()


async def test_the_queen_adds_a_greeting_and_changes_nothing(room: Room) -> None:
    job = await room.queen.client.submit(INFER)
    status, headers, through = await stream(room.queen, job.job_id)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-request-id"]
    greeting, _, rest = through.partition(b"\n\n")
    assert greeting == b"event: message\ndata: [INFO] On hive gpu-0 (only)"
    status, headers, at_hive = await stream(room.hive, job.job_id)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert rest == at_hive
    ids = [event.id for event in sse.Decoder().feed(at_hive)]
    epoch = str(ids[0]).partition(":")[0]
    assert ids == [f"{epoch}:{n}" for n in range(1, len(ids) + 1)]
    for daemon in (room.queen, room.hive):
        resumed = await stream(daemon, job.job_id, last_event_id=str(ids[9]))
        assert resumed[2] == b"\n\n".join(at_hive.split(b"\n\n")[10:])
        status, headers, body = await stream(daemon, job.job_id, last_event_id=str(ids[-1]))
        assert (status, body) == (204, b"")
        assert "content-length" not in headers


async def test_what_cannot_be_streamed_is_refused_in_the_envelope(door: Daemon) -> None:
    job = await door.client.submit(INFER)
    for job_id, headers, expected in (
        (job.job_id, {"last_event_id": "deadbeef:1"}, (410, "gone")),
        (job.job_id, {"last_event_id": "ä".encode().decode("latin-1")}, (400, "invalid_request")),
        (new_job_id(), {}, (404, "job_not_found")),
        ("job-1", {}, (400, "invalid_request")),
    ):
        status, told, body = await stream(door, job_id, **headers)
        error = json.loads(body)["error"]
        assert (status, error["code"]) == expected
        assert error["request_id"] == told["x-request-id"]


async def test_a_reader_of_http_1_0_gets_no_chunks(door: Daemon) -> None:
    job = await door.client.submit(INFER)
    parts = urlsplit(door.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"GET /v1/jobs/{job.job_id}/stream HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
    async with asyncio.timeout(20):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert b"chunked" not in head.lower()
    lines = [event.data for event in sse.Decoder().feed(body)]
    assert lines[-1] == events.DONE
    assert sum('"type":"token"' in line for line in lines) == 40


async def test_a_connection_goes_on_after_a_stream(door: Daemon) -> None:
    async with aiohttp.ClientSession(door.url, connector=aiohttp.TCPConnector(limit=1)) as http:
        for _ in range(3):
            async with http.post("/v1/jobs", json=INFER) as posted:
                job = await posted.json()
            async with http.get(job["sse_url"]) as got:
                assert (await got.read()).endswith(b"data: [DONE]\n\n")
            async with http.get("/v1/models") as listed:
                assert listed.status == 200


async def test_a_reader_that_takes_nothing_is_cut_off_and_nobody_waits_for_it(
    door: Daemon, room: Room
) -> None:
    """The answer is larger than what is kept of it, and than what sockets hold."""
    async with running(models=["loud"], times=50, padding=40_000) as engine:
        worker = await attach(room.hive, engine.url, "loud")
        await served(room.queen.client, "loud")
        job = await door.client.submit({**INFER, "model": "loud"})
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        parts = urlsplit(door.url)
        await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
        writer.write(f"GET {job.sse_url} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

        async def completed() -> bool:
            return (await room.hive.client.get(f"/v1/jobs/{job.job_id}"))["status"] == "completed"

        await until(completed, "the job to end", within_s=60)
        body = b""
        async with asyncio.timeout(60):
            while not body.endswith(b"\r\n0\r\n\r\n"):
                got = await reader.read(65536)
                assert got
                body += got
        writer.close()
        assert b"data: [DONE]" not in body
        assert b"data: [ERROR]" not in body
        last = body[body.rindex(b"\nid: ") + 5 :].partition(b"\n")[0].decode()
        assert (await stream(door, job.job_id, last_event_id=last))[0] == 410
        await detach(room.hive, worker)


# -- a queen's connection to a hive ----------------------------------------------------------


class Cutting:
    """A proxy before a hive, which cuts each connection that carries streams after some bytes."""

    def __init__(self, hive: Daemon, after: int) -> None:
        self._port = urlsplit(hive.url).port
        self._after = after
        self.cuts = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Its URL."""
        async with await asyncio.start_server(self._proxied, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _proxied(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, out = await asyncio.open_connection("127.0.0.1", self._port)
        carries = False

        async def ask() -> None:
            nonlocal carries
            while data := await reader.read(65536):
                carries |= b"/stream HTTP" in data and b"/v1/jobs/job-" in data
                carries |= b"/v1/trunk" in data
                out.write(data)

        async def answer() -> None:
            passed = 0
            while data := await there.read(512):
                passed += len(data) if carries else 0
                if passed > self._after:
                    self.cuts += 1
                    return
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.create_task(ask()), asyncio.create_task(answer())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in (writer, out):
            end.transport.abort()


@pytest.mark.parametrize("trunks", ["true", "false"])
async def test_a_stream_goes_on_where_the_connection_to_the_hive_broke(
    trunks: str, fresh: Cluster
) -> None:
    hive = await fresh.hive()
    await spawn_scripted(hive, tokens_per_second=200)
    cutting = Cutting(hive, 6000)
    async with cutting.running() as url:
        fresh.env = {"HIVE_TRUNKS": trunks}
        queen = await fresh.queen(f"--hive={url}")
        await online(queen.client, "gpu-0")
        job = await queen.client.submit({**INFER, "max_tokens": 300})
        status, _, body = await stream(queen, job.job_id)
    assert status == 200
    assert cutting.cuts > 1
    greeting, *through = list(sse.Decoder().feed(body))
    assert greeting.data.startswith("[INFO] On hive")
    _, _, at_hive = await stream(hive, job.job_id)
    assert [event for event in through if event.id] == list(sse.Decoder().feed(at_hive))
    assert sum('"type":"token"' in event.data for event in through) == 300


async def test_a_stream_from_a_hive_that_was_started_again_says_so(fresh: Cluster) -> None:
    hive = await fresh.hive()
    await spawn_scripted(hive, tokens_per_second=20)
    queen = await fresh.queen(f"--hive={hive.url}")
    await online(queen.client, "gpu-0")
    job = await queen.client.submit({**INFER, "max_tokens": 10_000})
    lines: list[str] = []
    starting: asyncio.Task[Daemon] | None = None
    async with aclosing(queen.client.stream(job.job_id)) as source:
        async for event in source:
            lines.append(event.data)
            if len(lines) == 5:
                hive.process.kill()
                await hive.process.wait()
                port = urlsplit(hive.url).port or 0
                starting = asyncio.create_task(fresh.hive(port=port))
    assert starting is not None
    await starting
    # A slow machine takes longer to start a hive than a queen waits for it.
    assert lines[-1].startswith(
        (
            "[ERROR] Hive gpu-0 was started again and the job is lost.",
            "[ERROR] Hive gpu-0 was lost on the way: ",
        )
    )


# -- one stream, seen from inside ------------------------------------------------------------


class Served(asyncio.Protocol):
    """Serves the stream of one job to whoever connects."""

    def __init__(self, table: JobTable, job: Job) -> None:
        path = f"/v1/jobs/{job.id}/stream"
        serve = job_streams.job_streams(table)(path)
        assert serve is not None
        self._serve = serve
        self._request = Request("GET", path, path, {}, b"", "r", LOCAL)
        self._outbox = Outbox()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._answer = Answer(transport, self._ended, True, outbox=self._outbox, request_id="r")
        self._task = asyncio.ensure_future(self._serve(self._request, self._answer))

    def _ended(self, usable: bool) -> None:
        self._outbox.flush()
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._answer.lost()
        self._task.cancel()


@asynccontextmanager
async def reading(table: JobTable, job: Job) -> AsyncIterator[asyncio.StreamReader]:
    server = await asyncio.get_running_loop().create_server(
        lambda: Served(table, job), "127.0.0.1", 0
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            await reader.readuntil(b"\r\n\r\n")
            yield reader
        finally:
            writer.close()


async def test_lines_of_one_moment_are_one_chunk() -> None:
    table = JobTable("gpu-0")
    go = asyncio.Event()

    async def talk(job: Job) -> None:
        for _ in range(3):
            await go.wait()
            go.clear()
            for i in range(4):
                job.info(str(i))

    job = table.start(Infer(model="m", prompt="x"), talk)
    chunks = []
    async with reading(table, job) as reader, asyncio.timeout(10):
        for _ in range(3):
            await until(lambda: job.readers == 1, "the reader")
            go.set()
            size = int((await reader.readuntil(b"\r\n")).strip(), 16)
            chunks.append(await reader.readexactly(size + 2))
        await reader.read()
    assert [chunk.count(b"data: [INFO]") for chunk in chunks] == [4, 4, 4]
    await table.close(0)


async def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_streams, "PING_S", 0.05)
    table = JobTable("gpu-0")

    async def silent(job: Job) -> None:
        await asyncio.Event().wait()

    job = table.start(Infer(model="m", prompt="x"), silent)
    async with reading(table, job) as reader, asyncio.timeout(10):
        for _ in range(3):
            assert await reader.readuntil(b"\n\n\r\n") == b"8\r\n: ping\n\n\r\n"
        assert job.readers == 1
    await until(lambda: job.readers == 0, "the reader to be gone")
    await table.close(0)


async def test_a_job_is_cancelled_when_its_last_reader_stays_away() -> None:
    table = JobTable("gpu-0", disconnect_grace_s=0.05)

    async def forever(job: Job) -> None:
        job.info("begun")
        await asyncio.Event().wait()

    job = table.start(Infer(model="m", prompt="x"), forever)
    async with reading(table, job) as reader, asyncio.timeout(10):
        await reader.readuntil(b"begun\n\n")
    assert job.task is not None
    async with asyncio.timeout(10):
        await asyncio.wait([job.task])
    assert job.status == "cancelled"
    await table.close(0)
