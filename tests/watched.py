"""What is seen of daemons from outside: what they count, and what they hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import Daemon, until

TRUNK = ("hive_trunk_streams", "hive_trunk_owed_bytes", "hive_trunk_held_bytes")
"""What is zero when nothing runs."""


async def gauges(daemon: Daemon) -> Counter[str]:
    """What it tells at ``/metrics``, by name, over all labels; what it does not tell is 0."""
    async with aiohttp.ClientSession(daemon.url) as http, http.get("/metrics") as answer:
        assert answer.status == 200
        text = await answer.text()
    told: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            told[sample.name] += sample.value
    return told


def rss(daemon: Daemon) -> int:
    """Resident memory of the daemon alone, bytes."""
    return int(psutil.Process(daemon.pid).memory_info().rss)


def descriptors(daemon: Daemon) -> int:
    return psutil.Process(daemon.pid).num_fds()


async def trunked(queen: Daemon, count: int) -> None:
    """Wait until the queen has so many trunks; where the tests run without, it has none."""
    if os.environ.get("HIVE_TEST_TRUNKS") == "0":
        count = 0

    async def there() -> bool:
        return (await gauges(queen))["hive_trunks"] == count

    await until(there, f"{count} trunks")


async def idle(*daemons: Daemon, within_s: float = 20) -> None:
    """Wait until nothing runs on their trunks and workers."""
    seen: dict[str, dict[str, float]] = {}

    async def nothing() -> bool:
        for daemon in daemons:
            told = await gauges(daemon)
            seen[daemon.name] = {name: told[name] for name in (*TRUNK, "hive_worker_in_flight")}
        return not any(value for one in seen.values() for value in one.values())

    try:
        await until(nothing, "nothing to run", within_s=within_s)
    except AssertionError:
        raise AssertionError(f"after {within_s} s still: {seen}") from None


async def closed(before: dict[Daemon, int], within_s: float = 20) -> None:
    """Wait until each daemon has no more descriptors than before."""

    def fewer() -> bool:
        return all(descriptors(daemon) <= count for daemon, count in before.items())

    try:
        await until(fewer, "descriptors to be closed", within_s=within_s)
    except AssertionError:
        now = {daemon.name: (count, descriptors(daemon)) for daemon, count in before.items()}
        raise AssertionError(f"descriptors before and now: {now}") from None


class Proxy:
    """A TCP proxy on loopback, which can cut what passes, or hold it silently."""

    def __init__(self) -> None:
        self.url = ""
        self.refuses = False
        self._target = ("", 0)
        self._passes = asyncio.Event()
        self._passes.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def leads_to(self, daemon: Daemon) -> None:
        host, _, port = daemon.url.rpartition("//")[2].rpartition(":")
        self._target = (host, int(port))

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._passes.set()

    def hold(self) -> None:
        """Pass nothing on, and end nothing, until :meth:`cut`."""
        self._passes.clear()

    async def taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self.refuses:
            writer.transport.abort()
            return
        try:
            there = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(there[1])
        async with asyncio.TaskGroup() as ways:
            ways.create_task(self._pass(reader, there[1]))
            ways.create_task(self._pass(there[0], writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)


@contextlib.asynccontextmanager
async def proxied() -> AsyncIterator[Proxy]:
    """A proxy for the life of the block."""
    proxy = Proxy()
    async with await asyncio.start_server(proxy.taken, "127.0.0.1", 0) as server:
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield proxy
        proxy.cut()
