"""Loads on one GPU: nothing else loads where vLLM measures what it takes itself."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.spec import WorkerSpec
from hive_agent.workers.turns import Turns
from operations.errors import WorkerBroke
from operations.hosts import ModelInfo
from operations.operations import Engine, WorkerOptions
from tests.cluster import until

ENGINE = """#!{python}
import socketserver, sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

uds = next(one.partition("=")[2] for one in sys.argv if one.startswith("--uds="))
starts, hold = Path({folder!r}) / "starts", Path({folder!r}) / "hold"
with starts.open("a") as file:
    file.write(Path(uds).stem + "\\n")
if len(starts.read_text().split()) <= {disturbed}:
    sys.exit(
        "AssertionError: Error in memory profiling. Initial free memory 12.5 GiB, current free "
        "memory 14.0 GiB. This happens when other processes sharing the same container release "
        "GPU memory while vLLM is profiling during initialization."
    )

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if hold.exists() else 200)
        self.end_headers()

    def log_message(self, *told):
        pass

socketserver.UnixStreamServer(uds, Handler).serve_forever()
"""
"""Stands for vLLM's server: healthy unless it is held up, after some starts that were disturbed."""


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    with tempfile.TemporaryDirectory() as sockets:
        made = WorkerPool(hive_id="h", state=tmp_path, runtime=Path(sockets), cores=1, health_s=5)
        yield made
        await made.close(0)


def engine(folder: Path, disturbed: int = 0) -> str:
    path = folder / "engine"
    path.write_text(ENGINE.format(python=sys.executable, folder=str(folder), disturbed=disturbed))
    path.chmod(0o700)
    return str(path)


def spec(worker_id: str, kind: Engine = "vllm", on: tuple[str, ...] = ("cuda:0",)) -> WorkerSpec:
    model = ModelInfo(
        id="m", digest="sha256:0", format="safetensors", size_bytes=1, source="file", path="/m"
    )
    return WorkerSpec(
        worker_id=worker_id,
        model=model,
        engine=kind,
        devices=on,
        slots=1,
        context_length=128,
        threads=1,
        options=WorkerOptions(),
    )


class Load:
    """One load that lasts until it is ended."""

    def __init__(self, turns: Turns, spec: WorkerSpec) -> None:
        self.loads, self.end = asyncio.Event(), asyncio.Event()
        self.told: list[str] = []
        self.disturbed: bool | None = None
        self._turns, self._spec = turns, spec
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._turns.taken(self._spec, self.told.append) as turn:
            self.loads.set()
            await self.end.wait()
        self.disturbed = turn.disturbed

    async def ended(self) -> None:
        self.end.set()
        await self.task


async def settled() -> None:
    """Whatever can go on has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def loading(*loads: Load) -> list[bool]:
    await settled()
    return [load.loads.is_set() for load in loads]


async def test_nothing_loads_beside_vllm_on_its_gpus_and_none_overtakes() -> None:
    turns = Turns()
    first = Load(turns, spec("w-1", on=("cuda:0", "cuda:1")))
    await settled()
    gguf = Load(turns, spec("w-2", "llamacpp", ("cuda:1",)))
    await settled()
    second = Load(turns, spec("w-3", on=("cuda:1",)))
    await settled()
    late = Load(turns, spec("w-4", "llamacpp", ("cuda:1",)))
    elsewhere = Load(turns, spec("w-5", on=("cuda:2",)))
    on_cpu = [Load(turns, spec(f"w-{n}", on=("cpu",))) for n in (6, 7)]
    scripted = Load(turns, spec("w-8", "scripted"))
    others = (elsewhere, *on_cpu, scripted)
    assert await loading(first, gguf, second, late, *others) == [True, *[False] * 3, *[True] * 4]
    assert gguf.told == ["waiting until worker w-1 has loaded on cuda:1"]
    await first.ended()
    assert await loading(gguf, second, late) == [True, False, False]
    await gguf.ended()
    assert await loading(second, late) == [True, False]
    await second.ended()
    assert await loading(late) == [True]
    for load in (late, *others):
        await load.ended()
    assert not any(load.disturbed for load in (first, gguf, second, late, *others))


async def test_loads_of_llamacpp_go_together_and_know_that_they_were_not_alone() -> None:
    turns = Turns()
    first, second = (Load(turns, spec(f"w-{n}", "llamacpp")) for n in (1, 2))
    assert await loading(first, second) == [True, True]
    await first.ended()
    await second.ended()
    assert (first.disturbed, second.disturbed) == (True, True)


async def test_a_load_knows_that_memory_came_back_meanwhile() -> None:
    turns = Turns()
    near, far = Load(turns, spec("w-1")), Load(turns, spec("w-2", on=("cuda:1",)))
    await settled()
    turns.gave_back(spec("w-1"))  # its own start before
    turns.gave_back(spec("w-3", on=("cpu",)))
    turns.gave_back(spec("w-4", on=("cuda:1", "cuda:2")))
    await near.ended()
    await far.ended()
    assert (near.disturbed, far.disturbed) == (False, True)


async def test_one_who_does_not_wait_any_longer_holds_up_nobody() -> None:
    turns = Turns()
    first, second, third = (Load(turns, spec(f"w-{n}")) for n in (1, 2, 3))
    assert await loading(first, second, third) == [True, False, False]
    second.task.cancel()
    await settled()
    await first.ended()
    assert await loading(third) == [True]
    await third.ended()


async def test_vllm_workers_of_one_gpu_come_up_one_after_the_other(
    pool: WorkerPool, tmp_path: Path
) -> None:
    starts, hold = tmp_path / "starts", tmp_path / "hold"
    hold.touch()
    python = engine(tmp_path)
    first = pool.spawn(replace(spec("w-1"), python=python))
    second = pool.spawn(replace(spec("w-2"), python=python))
    told: list[str] = []
    second.told = told.append
    stopped = pool.spawn(replace(spec("w-3"), python=python))
    await until(starts.exists, "the first to start")
    await pool.stop(stopped, 0)
    assert (second.pid, second.state) == (None, "starting")
    assert told == ["waiting until worker w-1 has loaded on cuda:0"]
    hold.unlink()
    await asyncio.gather(first.came_up, second.came_up)
    assert starts.read_text().split() == ["w-1", "w-2"]
    assert not first.disturbed
    assert not second.disturbed


@pytest.mark.parametrize(("disturbed", "comes_up"), [(2, True), (3, False)])
async def test_a_load_that_others_disturbed_is_tried_again_twice(
    pool: WorkerPool, tmp_path: Path, disturbed: int, comes_up: bool
) -> None:
    worker = pool.spawn(replace(spec("w-1"), python=engine(tmp_path, disturbed)))
    if comes_up:
        await worker.came_up
    else:
        with pytest.raises(WorkerBroke, match="gave back memory of the GPU") as failed:
            await worker.came_up
        assert failed.value.code == "gpu_disturbed"
    assert worker.restarts == 2
    assert len((tmp_path / "starts").read_text().split()) == 3


async def test_a_process_that_ends_tells_whoever_loads_on_its_gpu(
    pool: WorkerPool, tmp_path: Path
) -> None:
    python, hold = engine(tmp_path), tmp_path / "hold"
    before = pool.spawn(replace(spec("w-1"), python=python))
    await before.came_up
    hold.touch()
    loads = pool.spawn(replace(spec("w-2"), python=python))
    await until(lambda: loads.pid is not None, "the second to start")
    await pool.stop(before, 0)
    hold.unlink()
    await loads.came_up
    assert loads.disturbed
