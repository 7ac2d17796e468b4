"""A daemon that has no file descriptors left says so, and goes on when it has some again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.cluster import cluster, until

FEW = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"]
SAID = "no file descriptors are left"
REQUEST = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize("command", ["queen", "agent"])
async def test_a_daemon_out_of_descriptors_says_so_once_and_goes_on(command: str) -> None:
    async with cluster() as made:
        daemon = await made.start(command, "--port=0", prefix=FEW)
        for _ in range(2):
            async with used_up(daemon.url):
                await until(lambda: SAID in daemon.log, "it to be told")
            health = await daemon.client.get("/health")
            assert health["ok"]
        assert daemon.log.count(SAID) == 1
        assert "may have 64" in daemon.log


@asynccontextmanager
async def used_up(url: str) -> AsyncIterator[None]:
    """Connections that were answered, so many that a further one is not."""
    host, port = url.removeprefix("http://").split(":")
    writers: list[asyncio.StreamWriter] = []
    try:
        for _ in range(100):
            reader, writer = await asyncio.open_connection(host, int(port))
            writers.append(writer)
            writer.write(REQUEST)
            answer = b""
            with suppress(ConnectionError):
                answer = await reader.read(1)
            if not answer:
                break
        else:
            raise AssertionError("a hundred connections were answered")
        yield
    finally:
        for writer in writers:
            writer.close()
