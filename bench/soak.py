"""Hours of mixed load, after which queen and hive must be as they were: ``make soak``.

``python -m bench.soak [--minutes 60]``: a queen and two hives, of which the second is killed now
and then, with everything on them that callers do, good and bad. Memory and descriptors of the
queen and of the first hive are sampled all the time. It ends with exit status 1 where memory grew
by more than ``DRIFT_MB`` after the warm-up, where descriptors or counters did not come back, or
where an answer was anything but what it should have been.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from bench.load import Target
from bench.meter import Cores
from bench.subjects import external, proven, upstream_running
from bench.upstream import MODEL, STAMP, Orders
from job_client.client import JobClient
from operations.errors import HiveError
from tests.cluster import Cluster, Daemon, cluster, online, served, spawn_scripted
from tests.watched import closed, descriptors, gauges, idle, rss, trunked
from wire.jobs import KEPT_JOBS
from wire.secret import Secret

MB = 1e6
DRIFT_MB = 8.0
"""What memory may seem to grow by from the warm-up to the end: the slope, times that time."""
WARM_UP = 0.25  # of the whole time
SAMPLE_S = 2.0
LARGE, TOO_LARGE = 100_000, 400_000  # bytes of a prompt; the latter is too long for a trunk
LARGE_FIRST = 1600
SPARE = 2  # descriptors that a daemon's own clients may hold or not
KILLS_S = 30.0  # between two deaths
ANSWER_S = 90.0
SETTLED_S = 90.0  # idle connections are kept for 60 s

DIED = frozenset((502, 503))
"""What a request may be answered with when its worker or its hive is killed."""


@dataclass
class Tally:
    """What became of the requests of one kind."""

    good: int = 0
    died: int = 0
    wrong: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Sample:
    at_s: float
    rss_mb: float
    descriptors: int


@dataclass
class Room:
    """What the load runs against, and what is known of it."""

    made: Cluster
    engine: str
    queen: Daemon
    hives: list[Daemon]
    asked: Target
    http: aiohttp.ClientSession
    tallies: dict[str, Tally] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def watched(self) -> tuple[Daemon, Daemon]:
        return self.queen, self.hives[0]

    def tally(self, kind: str) -> Tally:
        return self.tallies.setdefault(kind, Tally())

    def sample(self) -> None:
        at_s = time.monotonic() - self.began
        for daemon in self.watched:
            found = Sample(at_s, rss(daemon) / MB, descriptors(daemon))
            self.samples.setdefault(daemon.name, []).append(found)


def body_of(text: str, *, model: str = MODEL, **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


# -- what callers do -----------------------------------------------------------------------------

Do = Callable[[Room, Tally, random.Random], Awaitable[None]]


async def stream(room: Room, tally: Tally, chance: random.Random) -> None:
    """A stream, read to its end."""
    orders = Orders(chance.randint(5, 60), 30.0)
    async with room.http.post(PATH, json=body_of(orders.text, stream=True)) as answer:
        try:
            text = await answer.read()
        except aiohttp.ClientPayloadError:
            tally.died += 1
            return
    if answer.status != 200:
        refused(tally, answer.status)
    elif text.endswith(b"data: [DONE]\n\n") and len(STAMP.findall(text)) == orders.tokens:
        tally.good += 1
    elif b'"error"' in text and b"[DONE]" not in text:
        tally.died += 1
    else:
        tally.wrong["a stream that is not whole"] += 1


async def short(room: Room, tally: Tally, chance: random.Random) -> None:
    """A short question and its answer."""
    await whole(room, tally, "hello")


async def large(room: Room, tally: Tally, chance: random.Random) -> None:
    """100 KB of prompt; now and then more than the trunk takes."""
    await whole(room, tally, "x" * chance.choice((LARGE, LARGE, LARGE, TOO_LARGE)))


async def whole(room: Room, tally: Tally, text: str) -> None:
    async with room.http.post(PATH, json=body_of(text)) as answer:
        said = await answer.json()
    if answer.status != 200:
        refused(tally, answer.status)
    elif said["choices"][0]["message"]["content"]:
        tally.good += 1


async def cancelled(room: Room, tally: Tally, chance: random.Random) -> None:
    """A caller who hangs up in the middle, or before the beginning."""
    orders = Orders(1000, chance.choice((0.0, 5.0, 100.0)))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(chance.uniform(0, 0.3)):
            async with room.http.post(PATH, json=body_of(orders.text, stream=True)) as answer:
                while await answer.content.readany():
                    pass
                answer.close()
    tally.good += 1


async def slow(room: Room, tally: Tally, chance: random.Random) -> None:
    """A caller who takes an answer more slowly than it comes."""
    parts = urlsplit(room.queen.url)
    orders = Orders(4000)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (parts.hostname, parts.port))
        await loop.sock_sendall(sock, room.asked.request(orders, stream=True))
        data = bytearray()
        while not data.endswith(b"\r\n0\r\n\r\n"):
            piece = await loop.sock_recv(sock, 65536)
            if not piece:
                break
            data += piece
            await asyncio.sleep(0.001)
    status = int(bytes(data[9:12]) or 0)
    if status != 200:
        refused(tally, status)
    elif len(STAMP.findall(data)) == orders.tokens:
        tally.good += 1
    elif b"[DONE]" not in data:  # an error event, or a connection that breaks in an event
        tally.died += 1
    else:
        tally.wrong["a slow stream that is not whole"] += 1


async def job(room: Room, tally: Tally, chance: random.Random) -> None:
    """An ``infer`` job, sometimes cancelled."""
    operation = {"operation": "infer", "model": "parrot", "prompt": "go", "max_tokens": 20}
    async with JobClient(room.queen.url, api_key=room.asked.key, session=room.http) as client:
        try:
            posted = await client.submit(operation)
            if chance.random() < 0.3:
                await client.cancel(posted.job_id)
            outcome = await client.follow(posted.job_id)
        except HiveError as error:
            refused(tally, error.status)
            return
    if outcome.status in ("completed", "cancelled"):
        tally.good += 1
    else:
        tally.died += 1


async def bad(room: Room, tally: Tally, chance: random.Random) -> None:
    """Something that must be refused."""
    key = {"authorization": f"Bearer {room.asked.key}"}
    json_type = {"content-type": "application/json"}
    cases = (
        ({"data": b"{", "headers": {**key, **json_type}}, 400),
        ({"data": b"\xff" * 1000, "headers": {**key, **json_type}}, 400),
        ({"json": {"model": 7}, "headers": key}, 400),
        ({"json": body_of("x", model="nobody-has-this"), "headers": key}, 404),
        ({"json": body_of("x"), "headers": {"authorization": f"Bearer {room.asked.key}x"}}, 401),
        ({"data": b"hello", "headers": {**key, "content-type": "text/plain"}}, 415),
    )
    ask, status = chance.choice(cases)
    async with aiohttp.ClientSession(room.queen.url) as http:
        async with http.post(PATH, **ask) as answer:
            await answer.read()
    if answer.status == status:
        tally.good += 1
    else:
        tally.wrong[f"{answer.status} instead of {status}"] += 1


async def garbage(room: Room, tally: Tally, chance: random.Random) -> None:
    """What is no HTTP."""
    parts = urlsplit(room.queen.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(chance.randbytes(chance.randint(1, 2000)) + b"\r\n\r\n")
        said = await reader.read(20)
    finally:
        writer.transport.abort()
    if said == b"" or said.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505")):
        tally.good += 1
    else:
        tally.wrong[repr(said)] += 1


def refused(tally: Tally, status: int) -> None:
    if status in DIED:
        tally.died += 1
    else:
        tally.wrong[f"status {status}"] += 1


PATH = "/v1/chat/completions"
LOAD: Sequence[tuple[Do, int, float]] = (
    (stream, 8, 0.1),
    (short, 3, 0.1),
    (large, 1, 0.2),
    (cancelled, 3, 0.1),
    (slow, 2, 0.3),
    (job, 1, 0.5),
    (bad, 1, 0.2),
    (garbage, 1, 0.5),
)
"""What is done, by how many at once, and the rest between two turns of each, seconds."""


async def act(room: Room, do: Do, rest_s: float, seed: int, until_s: float) -> None:
    chance = random.Random(seed)
    tally = room.tally(do.__name__)
    while time.monotonic() < until_s:
        try:
            async with asyncio.timeout(ANSWER_S):
                await do(room, tally, chance)
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            tally.wrong[type(error).__name__] += 1
        await asyncio.sleep(rest_s * chance.uniform(0.5, 1.5))


# -- what befalls the daemons --------------------------------------------------------------------


async def kill(room: Room, until_s: float) -> None:
    """Kill a worker, and each other time the whole second hive, which then starts anew."""
    tally, turn = room.tally("deaths"), 0
    while time.monotonic() + KILLS_S < until_s:
        await asyncio.sleep(KILLS_S)
        turn += 1
        if turn % 2:
            hive = room.hives[turn // 2 % 2]
            workers = (await hive.client.run({"operation": "worker_list"}))["workers"]
            for worker in workers:
                if worker["model"] == "parrot" and worker.get("pid"):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        psutil.Process(worker["pid"]).kill()
        else:
            await room.hives[1].stop(signal.SIGKILL)
            room.made.daemons.remove(room.hives[1])
            room.hives[1] = await staffed(room.made, "gpu-1", room.queen, room.engine)
        tally.good += 1


async def staffed(made: Cluster, hive_id: str, queen: Daemon, engine: str) -> Daemon:
    """A hive that has both models."""
    hive = await made.hive(hive_id, queen=queen)
    await hive.client.run(external(engine))
    await spawn_scripted(hive, slots=16)
    return hive


async def watch(room: Room, until_s: float) -> None:
    while time.monotonic() < until_s:
        room.sample()
        await asyncio.sleep(SAMPLE_S)


# -- the whole -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def standing() -> AsyncIterator[Room]:
    here = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    async with cluster() as made, upstream_running(Cores(here, here, here)) as engine:
        os.sched_setaffinity(0, before)
        secret = Secret.new()
        made.env = {"HIVE_SECRET": secret.text}
        queen = await made.queen()
        hives = [await staffed(made, name, queen, engine) for name in ("gpu-0", "gpu-1")]
        await online(queen.client, "gpu-0", "gpu-1")
        await served(queen.client, MODEL, "parrot")
        await trunked(queen, 2)
        asked = await proven(queen.url, secret)
        headers = {"authorization": f"Bearer {asked.key}"}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(queen.url, headers=headers, connector=connector) as http:
            yield Room(made, engine, queen, hives, asked, http)


async def filled(room: Room) -> None:
    """As many jobs as daemons keep for a while, and so many large bodies that the heap knows them:
    what takes memory once, and no more then."""

    async def jobs() -> None:
        for _ in range(KEPT_JOBS // 8 + 1):
            await room.queen.client.run(
                {"operation": "infer", "model": "parrot", "prompt": "go", "max_tokens": 20}
            )

    async def bodies() -> None:
        for _ in range(LARGE_FIRST // 2):
            await whole(room, Tally(), "x" * TOO_LARGE)

    await asyncio.gather(*(jobs() for _ in range(8)))
    await asyncio.gather(*(bodies() for _ in range(2)))  # as few at once as in the load


def growth_mb(samples: Sequence[Sample]) -> float:
    """The slope of memory by least squares, over the whole time of these samples."""
    times = [sample.at_s for sample in samples]
    slope = statistics.linear_regression(times, [sample.rss_mb for sample in samples]).slope
    return slope * (times[-1] - times[0])


async def soak(minutes: float, console: Console) -> list[str]:
    """Run it all; what was wrong, empty if nothing was."""
    seconds = minutes * 60
    async with standing() as room:
        before = {daemon: descriptors(daemon) + SPARE for daemon in room.watched}
        await filled(room)
        await idle(room.queen, *room.hives)
        room.began = time.monotonic()
        room.sample()
        until_s = room.began + seconds
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch(room, until_s))
            tasks.create_task(kill(room, until_s))
            for number, (do, many, rest_s) in enumerate(LOAD):
                for seed in range(many):
                    tasks.create_task(act(room, do, rest_s, 100 * number + seed, until_s))
        problems = [
            f"{kind}: {count} times {what}"
            for kind, tally in room.tallies.items()
            for what, count in tally.wrong.items()
        ]
        problems += [f"{kind}: never" for kind, tally in room.tallies.items() if not tally.good]
        deaths = room.tallies["deaths"].good
        for do, many, _ in LOAD:
            if (died := room.tally(do.__name__).died) > many * deaths:
                problems.append(f"{do.__name__}: {died} met one of {deaths} deaths, {many} at once")
        try:
            await idle(room.queen, *room.hives, within_s=SETTLED_S)
            await closed(before, within_s=SETTLED_S)
        except AssertionError as error:
            problems.append(str(error))
        room.sample()
        for name, samples in room.samples.items():
            grown = growth_mb(settled(samples, seconds))
            if grown > DRIFT_MB:
                problems.append(f"{name} grew by {grown:.1f} MB after the warm-up: not flat")
        show(room, seconds, await gauges(room.queen), console)
    return problems


def settled(samples: Sequence[Sample], seconds: float) -> list[Sample]:
    """Those of the load, after the warm-up."""
    return [one for one in samples if seconds * WARM_UP <= one.at_s <= seconds]


def show(room: Room, seconds: float, counted: Counter[str], console: Console) -> None:
    table = Table(title=f"{seconds / 60:.0f} minutes of mixed load")
    for column in ("", "good", "met a death", "wrong"):
        table.add_column(column, justify="right" if column else "left")
    for kind, tally in room.tallies.items():
        wrong = str(sum(tally.wrong.values()))
        table.add_row(kind, str(tally.good), str(tally.died), wrong)
    console.print(table)
    table = Table(title="memory (MB) and descriptors, over time")
    for column in ("", "start", "25 %", "50 %", "75 %", "100 %", "idle", "slope x time"):
        table.add_column(column, justify="right" if column else "left")
    for name, samples in room.samples.items():
        loaded = [sample for sample in samples if sample.at_s <= seconds]
        marks = [loaded[round(part * (len(loaded) - 1))] for part in (0, 0.25, 0.5, 0.75, 1)]
        marks.append(samples[-1])
        grown = f"{growth_mb(settled(samples, seconds)):+.1f}"
        table.add_row(f"{name}: memory", *(f"{one.rss_mb:.1f}" for one in marks), grown)
        table.add_row(f"{name}: descriptors", *(str(one.descriptors) for one in marks), "")
    console.print(table)
    requests = sum(count for name, count in counted.items() if name == "hive_requests_total")
    console.print(f"The queen counted {requests:.0f} requests.", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    problems = asyncio.run(soak(options.minutes, console))
    for problem in problems:
        console.print(f"WRONG: {problem}", markup=False, highlight=False)
    console.print("NOT FLAT" if problems else "FLAT")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
