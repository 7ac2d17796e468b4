"""Callers that hang up, and readers that drop, resume and crowd.

The model is a large one with random weights: an answer of the length asked for takes far longer
than 20 s, so a slot that is free within 1 s was freed by the hang-up and by nothing else.

A stream is cut at its next token. Where llama.cpp has nothing to send (a whole answer, a prompt
that is being read) it looks for its caller only after a second in which it had nothing at all to
tell, not even its metrics; so these tests watch the engine's CPU and ask for metrics once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from job_client.client import JobClient
from operations import events
from tests.cluster import Daemon, cluster, served, spawn, spawn_scripted, until
from tests.conftest import Room

TOKENS = 4000
FREE_WITHIN_S = 1.0
SILENT_WITHIN_S = 8.0  # llama.cpp's second, the batch that is being computed, a noisy machine


@dataclass(frozen=True)
class SlowRoom:
    """A queen and a hive whose worker needs more than 20 s for an answer."""

    queen: Daemon
    hive: Daemon
    socket: str
    pid: int

    async def processing(self) -> int:
        """How many requests hold a slot, by the engine's own metrics."""
        connector = aiohttp.UnixConnector(self.socket)
        async with (
            aiohttp.ClientSession(connector=connector) as http,
            http.get("http://engine/metrics") as answer,
        ):
            for line in (await answer.text()).splitlines():
                if line.startswith("llamacpp:requests_processing "):
                    return int(float(line.split()[1]))
        raise AssertionError("llama.cpp does not count its requests")

    async def until_busy(self) -> None:
        async def busy() -> bool:
            return await self.processing() > 0

        await until(busy, "the engine to work")

    async def freed(self) -> float:
        """Seconds until no slot is held."""
        began = time.monotonic()

        async def idle() -> bool:
            return await self.processing() == 0

        await until(idle, "the engine's slots to be free", within_s=10)
        return time.monotonic() - began

    async def fell_silent(self) -> float:
        """Seconds until the engine computes no more, seen from outside; then no slot is held."""
        began = time.monotonic()
        engine = psutil.Process(self.pid)
        used = [float("-inf")]

        def computes_nothing() -> bool:
            used.append(sum(engine.cpu_times()[:2]))
            return used[-1] - used[-2] < 0.02

        await until(computes_nothing, "the engine to fall silent", every_s=0.2)
        assert await self.processing() == 0
        return time.monotonic() - began


@pytest.fixture(scope="module")
async def slow(large_model: Path) -> AsyncIterator[SlowRoom]:
    async with cluster() as made:
        queen = await made.queen()
        hive = await made.hive(queen=queen)
        worker = await spawn(hive, f"file:{large_model}", context_length=4096, slots=2)
        await served(queen.client, worker["model"])
        yield SlowRoom(queen, hive, worker["socket"], worker["pid"])


def chat(**options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me everything."}]
    return {"model": "large", "messages": messages, "max_tokens": TOKENS, **options}


@pytest.fixture(params=["queen", "hive"])
def entrance(request: pytest.FixtureRequest, slow: SlowRoom) -> Daemon:
    return slow.queen if request.param == "queen" else slow.hive


async def test_the_answer_would_take_more_than_20_s(slow: SlowRoom) -> None:
    async with aiohttp.ClientSession(slow.hive.url) as http:
        answer = await http.post("/v1/chat/completions", json=chat(stream=True))
        await answer.content.readany()
        began, count = time.monotonic(), 0
        while time.monotonic() - began < 2:
            count += (await answer.content.readany()).count(b"data: ")
        answer.close()
    rate = count / (time.monotonic() - began)
    assert TOKENS / rate > 20
    assert await slow.freed() < FREE_WITHIN_S


async def test_a_hang_up_in_mid_stream_frees_the_slot(slow: SlowRoom, entrance: Daemon) -> None:
    async with aiohttp.ClientSession(entrance.url) as http:
        answer = await http.post("/v1/chat/completions", json=chat(stream=True))
        for _ in range(5):
            await answer.content.readany()
        assert await slow.processing() == 1
        answer.close()
    assert await slow.freed() < FREE_WITHIN_S


async def test_a_hang_up_before_a_whole_answer_frees_the_slot(
    slow: SlowRoom, entrance: Daemon
) -> None:
    async with aiohttp.ClientSession(entrance.url) as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=chat()))
        await slow.until_busy()
        await hang_up(asking)
    assert await slow.fell_silent() < SILENT_WITHIN_S


async def test_a_hang_up_during_prefill_frees_the_slot(slow: SlowRoom, entrance: Daemon) -> None:
    long = [{"role": "user", "content": "hello " * 1500}]
    async with aiohttp.ClientSession(entrance.url) as http:
        asking = asyncio.create_task(
            http.post("/v1/chat/completions", json=chat(stream=True, messages=long, max_tokens=9))
        )
        await slow.until_busy()
        await hang_up(asking)
    assert await slow.fell_silent() < SILENT_WITHIN_S


async def test_a_cancelled_job_frees_the_slot(slow: SlowRoom, entrance: Daemon) -> None:
    job = await entrance.client.submit(
        {"operation": "infer", "model": "large", "prompt": "hello", "max_tokens": TOKENS}
    )
    await slow.until_busy()
    assert await entrance.client.cancel(job.job_id) == "cancelled"
    assert await slow.freed() < FREE_WITHIN_S


async def test_a_hundred_hang_ups_leave_no_request_and_no_descriptor(
    slow: SlowRoom, entrance: Daemon
) -> None:
    async with aiohttp.ClientSession(entrance.url) as http:
        before = descriptors(entrance)
        for _ in range(10):
            asking = [
                asyncio.create_task(http.post("/v1/chat/completions", json=chat(stream=True)))
                for _ in range(10)
            ]
            await slow.until_busy()
            await hang_up(*asking)
    assert await slow.fell_silent() < SILENT_WITHIN_S

    async def settled() -> bool:
        health = await slow.hive.client.get("/v1/info")
        return bool(health) and descriptors(entrance) <= before + 5

    await until(settled, "the descriptors to be closed")
    workers = (await slow.hive.client.run({"operation": "worker_list"}))["workers"]
    assert [worker["in_flight"] for worker in workers] == [0]


async def hang_up(*asking: asyncio.Task[aiohttp.ClientResponse]) -> None:
    """Leave, whether the answer has begun or not."""
    for task in asking:
        task.cancel()
    for answer in await asyncio.gather(*asking, return_exceptions=True):
        if isinstance(answer, aiohttp.ClientResponse):
            answer.close()


def descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


# -- readers of a job ------------------------------------------------------------------------

COUNT = 300


def long_job() -> dict[str, Any]:
    return {"operation": "infer", "model": "paced", "prompt": "x", "max_tokens": COUNT}


@pytest.fixture(scope="module")
async def paced(room: Room) -> None:
    """A scripted model of 200 tokens a second, on the shared room."""
    await spawn_scripted(room.hive, "paced", slots=64, tokens_per_second=200)
    await served(room.queen.client, "paced")


async def numbered(daemon: Daemon, job_id: str) -> list[tuple[str | None, str]]:
    async with aclosing(daemon.client.stream(job_id)) as source:
        return [(event.id, event.data) async for event in source if event.id]


@pytest.mark.usefixtures("paced")
async def test_a_reader_that_drops_again_and_again_gets_every_event_once(
    door: Daemon, room: Room
) -> None:
    job = await room.queen.client.submit(long_job())
    got: list[tuple[str | None, str]] = []
    drops = 0
    while not got or not events.is_terminal(got[-1][1]):
        last = got[-1][0] if got else None
        async with aclosing(door.client.stream(job.job_id, last)) as source:
            async for event in source:
                if event.id:
                    got.append((event.id, event.data))
                    if len(got) % 20 == 0:
                        drops += 1
                        break
    assert drops >= 10
    assert got == await numbered(room.hive, job.job_id)
    assert len(got) == len(set(got))
    assert sum('"type":"token"' in line for _, line in got) == COUNT


@pytest.mark.usefixtures("paced")
async def test_ten_readers_at_once_get_every_event_once(room: Room) -> None:
    job = await room.queen.client.submit(long_job())
    readers = [numbered(d, job.job_id) for d in (room.queen, room.hive) for _ in range(5)]
    streams = await asyncio.gather(*readers)
    assert all(stream == streams[0] for stream in streams)
    assert sum('"type":"token"' in line for _, line in streams[0]) == COUNT
    assert streams[0][-1][1] == "[DONE]"


@pytest.mark.usefixtures("paced")
async def test_a_client_resumes_by_itself_when_its_connection_is_cut(room: Room) -> None:
    """A plain TCP proxy stands before the queen and cuts every connection after 4 KB."""
    cuts = 0

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> None:
        nonlocal cuts
        passed = 0
        while chunk := await reader.read(512):
            passed += len(chunk)
            if passed > limit:
                cuts += 1
                break
            writer.write(chunk)
            await writer.drain()

    async def proxied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = room.queen.url.removeprefix("http://").partition(":")
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        tasks = [
            asyncio.create_task(pipe(reader, up_writer, 10**9)),
            asyncio.create_task(pipe(up_reader, writer, 4096)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in (writer, up_writer):
            stream.transport.abort()

    async with await asyncio.start_server(proxied, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        async with JobClient(f"http://localhost:{port}") as client:
            job = await client.submit(long_job())
            lines: list[str] = []
            outcome = await client.follow(job.job_id, lines.append)
    assert outcome.status == "completed"
    assert cuts > 3
    tokens = [line for line in lines if '"type":"token"' in line]
    assert len(tokens) == COUNT
    assert tokens == [
        line for _, line in await numbered(room.hive, job.job_id) if '"token"' in line
    ]
