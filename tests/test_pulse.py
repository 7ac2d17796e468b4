"""The hive's pulse, and others that wait for an event or a moment: they end when they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hive_agent.devices import Devices
from hive_agent.pulse import Pulse
from hive_agent.workers.pool import WorkerPool
from operations.hosts import ModelInfo
from queen.known import KnownHive
from wire.peer import Peer

TICKS = range(6)  # of the loop, between the news and the end: one of them is the unlucky one


async def no_models() -> Sequence[ModelInfo]:
    return []


@pytest.mark.parametrize("ticks", TICKS)
async def test_a_pulse_stops_even_if_something_changes_as_it_is_stopped(
    tmp_path: Path, ticks: int
) -> None:
    pool = WorkerPool(hive_id="h", state=tmp_path, runtime=tmp_path, cores=1, health_s=10)
    pulse = Pulse("h", "aa", Devices(), pool, no_models, lambda: 0, list)
    await pulse.start()
    await asyncio.sleep(0.3)  # the first rounds are over: it waits for news
    pulse.changed()
    for _ in range(ticks):
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await pulse.stop()


@pytest.mark.parametrize("ticks", TICKS)
async def test_listening_stops_even_if_a_hive_is_sighted_as_it_is_forgotten(ticks: int) -> None:
    peer = Peer("http://127.0.0.1:1", None, role="queen", id="q", roles=("hive",))
    hive = KnownHive(peer, "mdns", None, None, 0.0)
    hive.heard_at, hive.pause_s = time.monotonic(), 60

    async def listen() -> None:
        while True:
            await hive.rest()

    hive.task = asyncio.create_task(listen())
    await asyncio.sleep(0.01)
    hive.hurry()
    for _ in range(ticks):
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await hive.close()
