"""What needs an NVIDIA GPU: the real driver, vLLM and memory that comes back. ``make test-gpu``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pynvml
import pytest

from tests.cluster import Daemon, cluster, until
from tests.test_engines import GOLDEN, INSTALL_S
from tests.test_vllm import asked, hive_with_vllm, operation, text_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(INSTALL_S)]

SLACK_MB = 512  # what a driver keeps, and what others do meanwhile


def used_mb(gpu: Any) -> int:
    return int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used) >> 20


@pytest.fixture(scope="module")
async def hive(gpu: Any, vllm_cuda_engines: Path) -> AsyncIterator[Daemon]:
    async with cluster() as made, hive_with_vllm(made, vllm_cuda_engines) as daemon:
        yield daemon


async def test_the_gpu_is_told_as_it_is(gpu: Any, hive: Daemon) -> None:
    devices = (await hive.client.get("/v1/capabilities"))["devices"]
    first = next(device for device in devices if device["id"] == "cuda:0")
    assert first["uuid"] == pynvml.nvmlDeviceGetUUID(gpu)
    assert first["vram_total_mb"] == int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total) >> 20
    assert first["healthy"]
    assert first["compute_capability"]


async def test_vllm_answers_sleeps_wakes_and_gives_its_memory_back(
    gpu: Any, hive: Daemon, hive_tiny_folder: Path
) -> None:
    before = used_mb(gpu)
    wanted = operation(hive_tiny_folder, memory_share=0.2, flags={"enable-sleep-mode": True})
    worker = await hive.client.run({**wanted, "worker": "cuda", "device": 0})
    for golden in json.loads(GOLDEN.read_text()):
        status, answer = await asked(
            hive.url, "hive-tiny", golden["messages"], max_tokens=golden["max_tokens"]
        )
        assert status == 200, answer
        assert answer["choices"][0]["message"]["content"] == golden["text"]
    awake, said = used_mb(gpu), await text_of(hive.url, "hive-tiny")

    await control(worker["socket"], "/sleep?level=1")
    await until(lambda: used_mb(gpu) < (before + awake) / 2, "its memory to be free", within_s=60)
    await control(worker["socket"], "/wake_up")
    assert await text_of(hive.url, "hive-tiny") == said

    await hive.client.run({"operation": "worker_process_delete", "worker_id": worker["worker_id"]})
    await until(lambda: used_mb(gpu) < before + SLACK_MB, "all of it to be back", within_s=30)


async def control(socket: str, path: str) -> None:
    """Ask vLLM itself: these routes are not relayed."""
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as http:
        async with http.post(f"http://worker{path}") as answer:
            assert answer.status == 200, await answer.text()
