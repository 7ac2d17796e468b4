"""Everything that is measured, and how each is brought up and down again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from bench.load import Target
from bench.meter import Cores, started_on, tree
from bench.peers import NGINX, PEERS, Absent, Peer
from bench.peers.base import free_port, own_env
from bench.stages import Subject
from bench.upstream import MODEL, Orders
from operations.hosts import VERSION
from tests.cluster import clean_env, cluster, served
from wire.keys import Keys
from wire.secret import Secret

UP_WITHIN_S = 120.0
DOWN_WITHIN_S = 10.0
SLOTS = 4096  # of the external engine, so that no limit of Hive's is measured
SAID = 400  # characters of a peer's last words

BARE = "bare upstream"
QUEEN = "hive: queen alone"
QUEEN_AND_HIVE = "hive: queen + hive"
AGENT = "hive: no queen"


class Entry(ABC):
    """Something to measure. ``rows`` are the lines of the table that it fills, in order."""

    rows: tuple[str, ...]

    @abstractmethod
    def version(self) -> str:
        """:raises Absent: it cannot be measured here"""

    @abstractmethod
    def up(self, upstream: str, cores: Cores) -> AbstractAsyncContextManager[Subject]:
        """Bring it up before this upstream, on the core that is measured, for the block's life.

        :raises Absent: it did not come up, or does not answer
        """


class Bare(Entry):
    """No relay at all: what the rest is compared with. Its CPU is the upstream's own, not shown."""

    rows = (BARE,)

    def version(self) -> str:
        return ""

    @contextlib.asynccontextmanager
    async def up(self, upstream: str, cores: Cores) -> AsyncIterator[Subject]:
        yield Subject(Target(upstream), {})


@dataclass(frozen=True)
class Other(Entry):
    """A peer: one process tree, or as many in a row as a request is to pass through."""

    peer: Peer
    hops: int = 1

    @property
    def rows(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.peer.name if self.hops == 1 else f"{self.peer.name} × {self.hops}",)

    def version(self) -> str:
        return self.peer.version()

    @contextlib.asynccontextmanager
    async def up(self, upstream: str, cores: Cores) -> AsyncIterator[Subject]:
        pids: list[int] = []
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(self.hops):
                target, pid = await stack.enter_async_context(self._one(upstream, cores))
                upstream = target.url
                pids.append(pid)
            yield Subject(target, {self.rows[0]: tuple(pids)})

    @contextlib.asynccontextmanager
    async def _one(self, upstream: str, cores: Cores) -> AsyncIterator[tuple[Target, int]]:
        with tempfile.TemporaryDirectory(prefix="hive-bench-") as folder:
            port = free_port()
            command = self.peer.command(upstream, port, Path(folder))
            with (Path(folder) / "output").open("wb") as output, started_on(cores.measured):
                process = await asyncio.create_subprocess_exec(
                    *command.argv,
                    env={**own_env(), **command.env},
                    cwd=folder,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            try:
                target = Target(f"http://127.0.0.1:{port}", command.key)
                if not await answers(target, process):
                    said = (Path(folder) / "output").read_text(errors="replace")[-SAID:].strip()
                    raise Absent(f"it ended, or did not answer within {UP_WITHIN_S:.0f} s: {said}")
                yield target, process.pid
            finally:
                await end(process)


class Hive(Entry):
    """A proven queen and hive with one external engine, asked with an API key."""

    rows = (QUEEN, QUEEN_AND_HIVE)

    def version(self) -> str:
        return VERSION

    @contextlib.asynccontextmanager
    async def up(self, upstream: str, cores: Cores) -> AsyncIterator[Subject]:
        secret = Secret.new()
        async with cluster() as made:
            made.env = {"HIVE_SECRET": secret.text}
            with started_on(cores.measured):
                queen = await made.queen()
                hive = await made.hive(queen=queen)
            await hive.client.run(external(upstream))
            await served(queen.client, MODEL)
            groups = {QUEEN: (queen.pid,), QUEEN_AND_HIVE: (queen.pid, hive.pid)}
            yield Subject(await proven(queen.url, secret), groups)


class HiveAlone(Entry):
    """The hive asked without a queen: one hop, as a router is."""

    rows = (AGENT,)

    def version(self) -> str:
        return VERSION

    @contextlib.asynccontextmanager
    async def up(self, upstream: str, cores: Cores) -> AsyncIterator[Subject]:
        secret = Secret.new()
        async with cluster() as made:
            made.env = {"HIVE_SECRET": secret.text}
            with started_on(cores.measured):
                hive = await made.hive()
            await hive.client.run(external(upstream))
            await served(hive.client, MODEL)
            yield Subject(await proven(hive.url, secret), {AGENT: (hive.pid,)})


ENTRIES: tuple[Entry, ...] = (
    Bare(),
    *(Other(peer) for peer in PEERS),
    Other(NGINX, hops=2),
    Hive(),
    HiveAlone(),
)


def external(url: str) -> dict[str, object]:
    """The operation behind ``hive workers attach URL``."""
    options = {"engine": "external", "url": url, "slots": SLOTS}
    return {"operation": "worker_spawn", "model": MODEL, "options": options}


async def proven(url: str, secret: Secret) -> Target:
    """A target with a new key, once it is seen that a made-up one is refused.

    :raises Absent: requests are not authenticated, so the figures would not count
    """
    key, _ = Keys(secret).make(scopes=("infer",), tenant="bench")
    if await status(Target(url, key)) != 200:
        raise Absent("it refuses a good API key")
    if await status(Target(url, f"{key}x")) != 401:
        raise Absent("it does not check API keys")
    return Target(url, key)


async def status(target: Target) -> int:
    """What a short question is answered with."""
    async with aiohttp.ClientSession() as http:
        head, _, body = target.request(Orders(), stream=False).partition(b"\r\n\r\n")
        path = head.split(maxsplit=2)[1].decode()
        headers = {"Authorization": f"Bearer {target.key}", "Content-Type": "application/json"}
        async with http.post(target.url + path, data=body, headers=headers) as answer:
            await answer.read()
            return answer.status


async def answers(target: Target, process: asyncio.subprocess.Process) -> bool:
    """Whether a relay that was just started answers a question in time."""
    deadline = asyncio.get_running_loop().time() + UP_WITHIN_S
    while process.returncode is None and asyncio.get_running_loop().time() < deadline:
        with contextlib.suppress(aiohttp.ClientError):
            if await status(target) == 200:
                return True
        await asyncio.sleep(0.1)
    return False


@contextlib.asynccontextmanager
async def upstream_running(cores: Cores) -> AsyncIterator[str]:
    """The upstream on its core; its URL."""
    with started_on(cores.upstream):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.upstream"),
            env=clean_env(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
    """End a process and what it started: first politely."""
    members = tree((process.pid,)) if process.returncode is None else []
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DOWN_WITHIN_S):
            await process.wait()
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()  # psutil looks at the start time, so no other process is hit
    await process.wait()
