"""Many requests at once through queen, trunk, hive and engine: what one costs the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import httptools
import pytest

from bench.load import Heard, Target, callers
from bench.meter import Cores
from bench.subjects import external, proven, upstream_running
from bench.upstream import MODEL, STAMP, Orders
from tests.cluster import Cluster, Daemon, cluster, online, served, spawn_scripted, until
from tests.watched import closed, descriptors, gauges, idle, proxied, rss, trunked
from wire.door.door import STALLED_S
from wire.secret import Secret
from wire.trunk.frames import WINDOW

CHAT = "/v1/chat/completions"
KIB, MIB = 1024, 1024 * 1024

HERE = min(os.sched_getaffinity(0))
FILES = 8192  # descriptors: 1,000 callers, here and in each daemon


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES:
        pytest.skip(f"a process may open {hard} files here, and this needs {FILES}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass(frozen=True)
class Chain:
    """A caller's way: queen, trunk, hive, and an engine that does what the prompt orders."""

    queen: Daemon
    hive: Daemon
    asked: Target
    engine: Target

    async def streaming(self) -> int:
        """Answers that the engine is giving."""
        async with aiohttp.ClientSession(self.engine.url) as http, http.get("/state") as answer:
            return int((await answer.json())["streams"])


@pytest.fixture(scope="module")
async def chain() -> AsyncIterator[Chain]:
    cores = Cores(load=HERE, upstream=HERE, measured=HERE)
    async with cluster() as made:
        os.sched_setaffinity(0, before := os.sched_getaffinity(0))
        async with upstream_running(cores) as url:
            os.sched_setaffinity(0, before)
            secret = Secret.new()
            made.env = {"HIVE_SECRET": secret.text}
            queen = await made.queen()
            hive = await made.hive(queen=queen)
            await hive.client.run(external(url))
            await served(queen.client, MODEL)
            await trunked(queen, 1)
            yield Chain(queen, hive, await proven(queen.url, secret), Target(url))


# -- callers that stop reading -------------------------------------------------------------------

STALLED, FLOWING = 100, 100
TRIES = 3
ANSWER = Orders(tokens=8_000)  # 2 MB, as fast as they are taken
FLOW = Orders(tokens=100, rate=25.0)

HIGH_WATER = 64 * KIB  # what uvloop holds for a connection before it says to stop
READ = 250 * KIB  # what uvloop reads at once
MARGIN = 16 * MIB  # 100 flows, fragmentation, and what a daemon takes anyway

# Of an answer that nobody reads, the queen holds what the hive may send before any is granted
# again, and what her connection took before it said to stop; the hive holds what it had read
# when it had to stop. The rest stays in the kernel's buffers and in the engine.
QUEEN_GROWS = STALLED * (WINDOW + HIGH_WATER) + MARGIN
HIVE_GROWS = STALLED * READ + MARGIN


class Sleeper(asyncio.Protocol):
    """A caller who asks, and reads nothing until he is woken."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self.pieces: list[bytes] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    @classmethod
    async def of(cls, target: Target) -> Sleeper:
        parts = urlsplit(target.url)
        sock = socket.socket()
        # The kernel takes little of the answer on itself.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (parts.hostname, parts.port))
        request = target.request(ANSWER, stream=True)
        _, made = await loop.create_connection(lambda: cls(request), sock=sock)
        return made

    def wake(self) -> None:
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        self.transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error or ConnectionError("it ended before the answer did"))

    def on_body(self, data: bytes) -> None:
        self.pieces.append(data)

    def on_message_complete(self) -> None:
        assert self._parser.get_status_code() == 200
        self.over.set_result(None)
        self.transport.close()


async def flow(target: Target) -> float:
    """Seconds that 100 paced streams take, each of which gets all its tokens."""
    heard = Heard()
    request = target.request(FLOW, stream=True)
    done = asyncio.Event()

    def one() -> None:
        if heard.answers + sum(heard.errors.values()) == FLOWING:
            done.set()

    async with callers(target, heard, FLOWING) as made:
        began = time.monotonic()
        for caller in made:
            caller.on_answer = caller.on_end = one
            caller.send(request, stream=True)
        async with asyncio.timeout(60):
            await done.wait()
        took = time.monotonic() - began
    assert heard.errors == {}
    assert heard.tokens == FLOWING * FLOW.tokens
    return took


async def answer_of(target: Target) -> bytes:
    """The body of the long answer, as the engine itself gives it."""
    async with sleeping(target, 1) as (sleeper,):
        sleeper.wake()
        await sleeper.over
        return b"".join(sleeper.pieces)


@contextlib.asynccontextmanager
async def sleeping(target: Target, count: int) -> AsyncIterator[list[Sleeper]]:
    """So many sleepers for the life of the block."""
    made: list[Sleeper] = []
    try:
        for _ in range(count):
            made.append(await Sleeper.of(target))
        yield made
    finally:
        for sleeper in made:
            sleeper.transport.abort()
            sleeper.over.cancel()


async def full(chain: Chain) -> None:
    """Wait until the windows of all sleepers are full, and nothing more comes."""
    owed: list[float] = []

    async def stands() -> bool:
        owed.append((await gauges(chain.queen))["hive_trunk_owed_bytes"])
        return owed[-1] > STALLED * WINDOW / 2 and len(set(owed[-10:])) == 1

    await until(stands, "the windows to be full", within_s=40, every_s=0.1)


def without_times(body: bytes) -> bytes:
    return STAMP.sub(b"@@", body)


@pytest.mark.long
async def test_callers_that_stop_reading_cost_the_others_nothing_and_get_all_in_the_end(
    chain: Chain,
) -> None:
    said = without_times(await answer_of(chain.engine))
    assert len(said) > 1.5 * MIB
    assert without_times(await answer_of(chain.asked)) == said
    alone = await flow(chain.asked)
    limit = 1.5 * alone + 1
    await idle(chain.queen, chain.hive)
    before = {daemon: rss(daemon) for daemon in (chain.queen, chain.hive)}
    began = time.monotonic()
    async with sleeping(chain.asked, STALLED) as sleepers:
        await full(chain)
        beside = math.inf
        for _ in range(TRIES):  # a busy machine slows one down, those that stall each of them
            beside = min(beside, await flow(chain.asked))
            if beside < limit:
                break
        grown = {daemon.name: rss(daemon) - count for daemon, count in before.items()}
        owed = (await gauges(chain.queen))["hive_trunk_owed_bytes"]
        print(
            f"{FLOWING} flows took {alone:.2f} s alone and {beside:.2f} s beside {STALLED} that "
            f"stall; {owed / MIB:.1f} MiB owed; "
            + ", ".join(f"{name} grew by {count / MIB:.1f} MiB" for name, count in grown.items())
        )
        assert STALLED * WINDOW / 2 < owed <= STALLED * WINDOW
        assert beside < limit
        assert grown[chain.queen.name] < QUEEN_GROWS < STALLED * len(said) / 2
        assert grown[chain.hive.name] < HIVE_GROWS < STALLED * len(said) / 2
        assert time.monotonic() - began < STALLED_S / 2

        for sleeper in sleepers:
            sleeper.wake()
        async with asyncio.timeout(90):
            await asyncio.gather(*(sleeper.over for sleeper in sleepers))
        for sleeper in sleepers:
            body = b"".join(sleeper.pieces)
            assert without_times(body) == said
            times = [int(stamp) for stamp in STAMP.findall(body)]
            assert times == sorted(set(times))
    await idle(chain.queen, chain.hive)
    assert await chain.streaming() == 0


# -- 1,000 who hang up -----------------------------------------------------------------------------

MANY = 1000
SLOW = Orders(tokens=1000, rate=0.5)
SERVED_WITHIN_S = 10.0


async def test_a_thousand_that_hang_up_at_once_leave_nothing_and_delay_nobody_for_long(
    chain: Chain,
) -> None:
    await flow(chain.asked)
    await idle(chain.queen, chain.hive)
    before = {daemon: descriptors(daemon) for daemon in (chain.queen, chain.hive)}
    heard = Heard()
    request = chain.asked.request(SLOW, stream=True)

    async def all_stream() -> bool:
        return await chain.streaming() == MANY and heard.tokens >= MANY

    async with callers(chain.asked, heard, MANY) as made:
        for caller in made:
            caller.send(request, stream=True)
        await until(all_stream, "all to stream", within_s=60)
        counted = await gauges(chain.queen)
        assert counted["hive_trunk_streams"] == (MANY if counted["hive_trunks"] else 0)
        began = time.monotonic()
    # Leaving the block has hung up on all of them.
    async with aiohttp.ClientSession() as http:
        key = {"authorization": f"Bearer {chain.asked.key}"}
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        async with http.post(chain.asked.url + CHAT, json=body, headers=key) as answer:
            assert answer.status == 200
            await answer.read()
    served_s = time.monotonic() - began

    async def none_stream() -> bool:
        return await chain.streaming() == 0

    await until(none_stream, "the engine to give no answer", within_s=30)
    freed_s = time.monotonic() - began
    print(f"after {MANY} hung up: served in {served_s:.2f} s, engine free in {freed_s:.2f} s")
    assert heard.errors == {}
    assert served_s < SERVED_WITHIN_S
    await idle(chain.queen, chain.hive)
    await closed(before)


# -- a trunk that is cut ---------------------------------------------------------------------------

TOKENS = 30
EACH = 200  # streams, and as many whole answers, over two hives


@dataclass(frozen=True)
class Got:
    """What a caller got: the hive that answered, the status, and the events or the answer."""

    hive: str
    status: int
    events: list[str]

    @property
    def errors(self) -> list[Any]:
        return [json.loads(event)["error"] for event in self.events if '"error"' in event]


async def ask(http: aiohttp.ClientSession, *, stream: bool, first: asyncio.Semaphore) -> Got:
    """:param first: is released with the first byte of the answer"""
    body = {
        "model": "parrot",
        "messages": [{"role": "user", "content": "go"}],
        "max_tokens": TOKENS,
        "stream": stream,
    }
    async with http.post(CHAT, json=body) as answer:
        first.release()
        text = await answer.text()  # raises if the message does not end as HTTP has it
        events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
        return Got(answer.headers["x-hive-id"], answer.status, events)


@pytest.mark.long
@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_a_lost_trunk_costs_only_the_answers_that_had_begun_and_comes_back(
    how: str, fresh: Cluster
) -> None:
    fresh.env = {"HIVE_SECRET": Secret.new().text}
    async with proxied() as proxy, contextlib.AsyncExitStack() as stack:
        far = await fresh.hive("gpu-0", f"--advertise-url={proxy.url}")
        proxy.leads_to(far)
        queen = await fresh.queen(f"--hive={proxy.url}")
        near = await fresh.hive("gpu-1", queen=queen)
        await online(queen.client, "gpu-0")
        for hive in (far, near):
            await spawn_scripted(hive, slots=512, tokens_per_second=5)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        http = await stack.enter_async_context(
            aiohttp.ClientSession(queen.url, connector=connector)
        )

        async def both() -> bool:
            got = await asyncio.gather(*(one_word(http) for _ in range(8)))
            return {one.hive for one in got} == {"gpu-0", "gpu-1"}

        await until(both, "both hives to answer")
        await trunked(queen, 2)
        await asyncio.gather(*(one_word(http) for _ in range(2 * EACH)))
        daemons = (queen, far, near)
        await idle(*daemons)
        before = {daemon: descriptors(daemon) for daemon in daemons}

        first = asyncio.Semaphore(0)
        unseen = asyncio.Semaphore(0)
        streams = [asyncio.create_task(ask(http, stream=True, first=first)) for _ in range(EACH)]
        whole = [asyncio.create_task(ask(http, stream=False, first=unseen)) for _ in range(EACH)]
        for _ in range(EACH):
            await first.acquire()

        async def all_asked() -> bool:
            return (await gauges(queen))["hive_trunk_streams"] == 2 * EACH

        await until(all_asked, "all requests to be on trunks")
        there = int((await gauges(far))["hive_trunk_streams"])
        proxy.refuses = True
        if how == "cut":
            proxy.cut()
        else:
            proxy.hold()
        got = await asyncio.gather(*streams)
        proxy.refuses = False
        proxy.cut()
        answers = await asyncio.gather(*whole)

        lost = [one for one in got if one.hive == "gpu-0"]
        kept = [one for one in got if one.hive == "gpu-1"]
        print(f"{how}: of {there} requests on the trunk {len(lost)} had begun to be answered")
        assert len(lost) > EACH / 4
        assert there > len(lost) + EACH / 4
        for one in lost:
            assert one.status == 200
            assert len(one.errors) == 1
            assert one.errors == [json.loads(one.events[-1])["error"]]
            assert one.errors[0]["hop"] == "hive"
            assert one.errors[0]["retryable"]
            assert "gpu-0" in one.errors[0]["message"]
        for one in kept:
            assert (one.errors, one.events[-1], len(one.events)) == ([], "[DONE]", TOKENS + 3)
        for one in answers:
            assert one.status == 200
            assert json.loads(one.events[0])["usage"]["completion_tokens"] == TOKENS
        assert {one.hive for one in answers} == {"gpu-1"}

        await trunked(queen, 2)
        await until(both, "both hives to answer again")
        await idle(*daemons)
        await closed(before)


async def one_word(http: aiohttp.ClientSession) -> Got:
    body = {
        "model": "parrot",
        "messages": [{"role": "user", "content": "go"}],
        "max_tokens": 1,
    }
    async with http.post(CHAT, json=body) as answer:
        return Got(answer.headers["x-hive-id"], answer.status, [await answer.text()])
