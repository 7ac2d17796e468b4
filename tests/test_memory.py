"""Asked before each load: a worker that will not fit is refused, and no memory is given twice."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from hive_agent.devices import nvidia
from hive_agent.fit.facts import ModelFacts, from_config
from hive_agent.fit.promises import SHOWN_ON_GPUS_S, Phase, Promise, left, phase_of
from hive_agent.fit.verdict import Request
from hive_agent.known import facts_of
from hive_agent.measured import held, on_gpus, vllm_cache
from hive_agent.memory import Memory, request_for
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.records import Records
from hive_agent.workers.spec import WorkerSpec
from hive_agent.workers.turns import Turns
from hive_agent.workers.worker import Worker
from operations.errors import HiveError, WontFit
from operations.hosts import Device, DeviceProcess, ModelInfo
from operations.operations import WorkerOptions
from tests.cluster import Cluster, spawn, until
from tests.fake_nvml.driver import GIB, FakeDriver, gpus
from tests.fit_models.configs import PUBLIC
from tests.fit_models.shapes import Shape, write_shape
from tests.gguf_files import write_llama

MIB = 2**20


def device(id: str, free_mb: int) -> Device:
    kind = "cpu" if id == "cpu" else "gpu"
    return Device(id=id, name=id, device_type=kind, vram_total_mb=100_000, vram_free_mb=free_mb)


def spec(path: Path, worker_id: str = "w-1", on: str = "cpu", **options: object) -> WorkerSpec:
    return WorkerSpec(
        worker_id=worker_id,
        model=ModelInfo(
            id="m", digest="sha256:0", format="gguf", size_bytes=1, source="file", path=str(path)
        ),
        engine="llamacpp",
        devices=(on,),
        slots=4,
        context_length=65_536,
        threads=1,
        options=WorkerOptions.model_validate(options),
    )


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    made = WorkerPool(hive_id="h", state=tmp_path, runtime=tmp_path, cores=1, health_s=10)
    yield made
    await made.close(0)


@pytest.fixture
def memory(pool: WorkerPool) -> Memory:
    return Memory(pool)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its KV cache takes 4 slots × 65,536 tokens × 8 layers × 256 bytes: 512 MiB."""
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    return write_llama(path, layers=8, width=128, heads=4, kv_heads=2, context_length=65_536)


async def known(model: Path) -> ModelFacts:
    found = await facts_of(spec(model).model)
    assert found is not None
    return found


HELD = Promise(needs={"cpu": 30 * MIB, "cuda:0": 10 * MIB}, mapped={"cpu": 20 * MIB})


@pytest.mark.parametrize(
    ("phase", "cpu", "gpu"),
    [("loading", 70, 90), ("settling", 80, 90), ("loaded", 80, 100), ("gone", 100, 100)],
)
def test_what_is_promised_is_taken_off_for_as_long_as_it_does_not_show(
    phase: Phase, cpu: int, gpu: int
) -> None:
    devices = [device("cpu", 100), device("cuda:0", 100)]
    found = left(devices, [HELD.hidden(phase, {})])
    assert [one.vram_free_mb for one in found] == [cpu, gpu]
    assert left(devices, []) == devices


def test_promises_of_several_add_up_and_never_below_nothing() -> None:
    found = left([device("cpu", 100)], [HELD.hidden("loading", {})] * 5)
    assert found[0].vram_free_mb == 0


def test_a_reading_that_a_silent_driver_left_behind_gives_no_memory_twice() -> None:
    """Whoever is ready counts as loading on GPUs until no reading can be older than that."""
    assert [phase_of(ready) for ready in (None, 0.0, 3.0, nvidia.STALE_S, 60.0)] == [
        "loading",
        "loading",
        "settling",
        "settling",
        "loaded",
    ]
    assert nvidia.STALE_S < SHOWN_ON_GPUS_S


async def test_what_a_loading_worker_holds_already_is_not_taken_off_twice(
    memory: Memory, pool: WorkerPool, model: Path
) -> None:
    empty = device("cuda:0", 6000)
    request = request_for(spec(model, on="cuda:0"), await known(model), [empty])
    mine = memory.claim(spec(model, on="cuda:0"), request, [empty])
    needed = memory.judge(request, [empty]).needed // MIB
    worker = pool.spawn(mine)
    memory.started(mine.worker_id)
    worker.pid = os.getpid()
    for taken in (0, 500, needed, needed + 400):
        process = DeviceProcess(pid=os.getpid(), name="me", used_mb=taken)
        now = device("cuda:0", 6000 - taken).model_copy(update={"processes": (process,)})
        (left,) = memory.left([now])
        assert left.vram_free_mb == pytest.approx(6000 - max(needed, taken), abs=2)
    silent = DeviceProcess(pid=os.getpid(), name="me")
    now = device("cuda:0", 5500).model_copy(update={"processes": (silent,)})
    (left,) = memory.left([now])
    assert left.vram_free_mb == pytest.approx(5500 - needed, abs=2)
    worker.pid = None
    await pool.stop(worker, 0)
    assert memory.left([empty]) == [empty]


async def test_a_worker_that_drains_hides_no_memory_that_shows(
    memory: Memory, pool: WorkerPool, model: Path
) -> None:
    empty = device("cuda:0", 6000)
    request = request_for(spec(model, on="cuda:0"), await known(model), [empty])
    worker = pool.spawn(memory.claim(spec(model, on="cuda:0"), request, [empty]))
    memory.started(worker.spec.worker_id)
    worker.ready_at = time.monotonic() - 60
    loaded = device("cuda:0", 4900)
    assert memory.left([loaded]) == [loaded]
    with worker.requests:
        stopping = asyncio.create_task(pool.stop(worker, 60))
        await until(lambda: worker.state == "stopping", "it to drain")
        assert memory.left([loaded]) == [loaded]
    await stopping


async def test_vllm_learns_nothing_where_others_disturbed_it(
    memory: Memory, pool: WorkerPool, tmp_path: Path
) -> None:
    devices = [device("cuda:0", 98_000)]
    facts = from_config(PUBLIC["Qwen3-0.6B"].config, PUBLIC["Qwen3-0.6B"].weights, digest="q")
    wanted = replace(spec(Path(), on="cuda:0"), engine="vllm", context_length=4096)
    request = request_for(wanted, facts, devices)
    worker = Worker(
        memory.claim(wanted, request, devices),
        folder=tmp_path,
        logs=tmp_path,
        records=pool.records,
        turns=Turns(),
        hive_id="h",
        health_s=1,
    )
    worker.pid, worker.disturbed = os.getpid(), True
    worker.log_path.write_text("Available KV cache memory: 80.00 GiB\n")
    await memory.learn(worker, devices)
    assert memory.last(request) is None
    worker.disturbed = False
    await memory.learn(worker, devices)
    assert memory.last(request) is not None
    float32 = replace(wanted, options=WorkerOptions(dtype="float32"))
    assert memory.last(request_for(float32, facts, devices)) is None
    await worker.stop(0)


async def test_fifty_spawns_at_once_are_never_given_the_same_memory(
    memory: Memory, model: Path
) -> None:
    devices = [device("cpu", 4096), device("cuda:0", 6000), device("cuda:1", 2000)]
    given: dict[str, int] = {"cpu": 0, "cuda:0": 0, "cuda:1": 0}
    refused = 0
    for number in range(50):
        on = ("cpu", "cuda:0", "cuda:1")[number % 3]
        wanted = spec(model, f"w-{number}", on)
        request = request_for(wanted, await known(model), devices)
        needed = memory.judge(request, devices).needed
        try:
            memory.claim(wanted, request, devices)
        except WontFit:
            refused += 1
        else:
            given[on] += needed
    for one in devices:
        assert 0 < given[one.id] <= one.vram_free_mb * MIB
    assert given["cpu"] > 2 * 512 * MIB
    assert refused > 30


async def test_vllm_on_an_empty_gpu_leaves_room_for_others_only_where_it_is_packed(
    memory: Memory,
) -> None:
    devices = [device("cuda:0", 98_000), device("cuda:1", 98_000)]
    facts = from_config(PUBLIC["Qwen3-0.6B"].config, PUBLIC["Qwen3-0.6B"].weights)

    def wants(worker_id: str, on: str) -> tuple[WorkerSpec, Request]:
        one = replace(spec(Path(), worker_id, on), engine="vllm", context_length=4096)
        return one, request_for(one, facts, devices)

    for number in (1, 2):
        packed = memory.claim(*wants(f"w-{number}", "cuda:0"), devices, spread=False)
        assert packed.reserved is not None
        assert packed.reserved.share is not None
        assert packed.reserved.share < 0.1
    alone = memory.claim(*wants("w-3", "cuda:1"), devices)
    assert alone.reserved is not None
    assert alone.reserved.share == 0.9
    beside = memory.claim(*wants("w-4", "cuda:1"), devices)
    assert beside.reserved is not None
    assert beside.reserved.share == packed.reserved.share
    many, request = wants("w-5", "cuda:1")
    with pytest.raises(WontFit):
        memory.claim(many, replace(request, slots=64), devices)


async def test_a_worker_that_never_came_gives_its_memory_back(
    memory: Memory, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [device("cpu", 800)]
    request = request_for(spec(model), await known(model), devices)
    memory.claim(spec(model), request, devices)
    with pytest.raises(WontFit):
        memory.claim(spec(model, "w-2"), request, devices)
    monkeypatch.setattr("hive_agent.memory.STARTED_WITHIN_S", 0)
    memory.claim(spec(model, "w-2"), request, devices)


async def test_what_cannot_be_predicted_is_loaded_unasked(tmp_path: Path, model: Path) -> None:
    scripted = spec(model).model.model_copy(update={"format": "scripted"})
    assert await facts_of(scripted) is None
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 60)
    assert await facts_of(spec(broken).model) is None
    assert await facts_of(spec(tmp_path / "gone.gguf").model) is None


async def test_a_spawn_that_will_not_fit_is_refused_at_the_post(
    fresh: Cluster, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "long.gguf", layers=8, width=128, context_length=2**20)
    hive = await fresh.hive()
    with pytest.raises(HiveError) as refused:
        await spawn(hive, f"file:{model}", slots=256, context_length=2**20)
    assert refused.value.status == 507
    assert "lacks" in refused.value.message
    assert "--force" in refused.value.message
    jobs = (await hive.client.get("/v1/jobs"))["jobs"]
    assert not jobs
    assert (await spawn(hive, f"file:{model}", slots=1, context_length=2048))["state"] == "ready"


async def test_what_others_hold_of_a_gpu_is_not_given_away_unless_forced(
    memory: Memory, model: Path
) -> None:
    full = [device("cuda:0", 200)]
    request = request_for(spec(model, on="cuda:0"), await known(model), full)
    with pytest.raises(WontFit, match=r"lacks .* on cuda:0"):
        memory.claim(spec(model, on="cuda:0"), request, full)
    memory.claim(spec(model, on="cuda:0"), request, full, force=True)
    with pytest.raises(WontFit):  # what was forced is counted as taken, too
        memory.claim(spec(model, "w-2", on="cuda:0"), request, [device("cuda:0", 2000)])


async def test_a_hive_tells_what_a_model_would_take_of_each_device(
    fresh: Cluster, driver: FakeDriver, model: Path
) -> None:
    driver.write([gpus(2)[0], replace(gpus(2)[1], used=80 * GIB - 535 * MIB)])
    queen = await fresh.queen()
    hive = await fresh.hive("gpu-0", queen=queen, env=driver.env)
    await fresh.hive("gpu-1", queen=queen)
    await hive.client.run({"operation": "model_download", "model": f"file:{model}"})
    asked = {"operation": "model_fit", "model": f"file:{model}", "options": {"slots": 4}}
    told = (await hive.client.run(asked))["fits"]
    assert [(fit["device"], fit["fits"]) for fit in told] == [
        ("cuda:0", True),
        ("cuda:1", False),
        ("cpu", True),
    ]
    assert told[1]["missing_mb"] > 0
    assert told[1]["suggestions"]
    assert told[2]["kv_cache_mb"] == 8 * 4 * 4096 * 256 // MIB
    for fit in told:
        parts = ("weights_mb", "kv_cache_mb", "compute_mb", "overhead_mb")
        assert abs(sum(fit[part] for part in parts) - fit["needed_mb"]) <= 4
    tiny = (await queen.client.run({"operation": "model_fit", "model": "hive-tiny"}))["fits"]
    assert [(fit["hive_id"], fit["device"]) for fit in tiny] == [
        ("gpu-0", "cuda:0"),
        ("gpu-0", "cuda:1"),
        ("gpu-0", "cpu"),
        ("gpu-1", "cpu"),
    ]
    assert {fit["engine"] for fit in tiny} == {"llamacpp"}
    only = await queen.client.run({"operation": "model_fit", "model": f"file:{model}"})
    assert {fit["hive_id"] for fit in only["fits"]} >= {"gpu-0"}
    with pytest.raises(HiveError, match="No hive can say"):
        await queen.client.run({"operation": "model_fit", "model": "nothing"})


async def test_damaged_weights_are_told_before_what_they_would_take(
    fresh: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC["Llama-3.2-1B"].config))
    weights = tmp_path / "model.safetensors"
    whole = (2).to_bytes(8, "little") + b"{}"
    hive = await fresh.hive()
    asked = {"operation": "model_fit", "model": f"file:{tmp_path}"}
    weights.write_bytes(whole)
    assert (await hive.client.run(asked))["fits"]
    weights.write_bytes(whole + b"more")
    with pytest.raises(HiveError, match="its header speaks of 10") as refused:
        await hive.client.run(asked)
    assert (refused.value.status, refused.value.code) == (400, "bad_model_file")


async def test_where_one_gpu_is_not_enough_the_best_of_several_are_told(
    fresh: Cluster, driver: FakeDriver, model: Path
) -> None:
    """0.5 GiB of keys and values, and 0.5 GiB that an engine takes of each GPU."""
    driver.write([replace(one, used=one.total - 950 * MIB) for one in gpus(3)])
    hive = await fresh.hive(env=driver.env)
    options = {"context_length": 65_536}
    asked = {"operation": "model_fit", "model": f"file:{model}", "options": options}
    fits = {fit["device"]: fit for fit in (await hive.client.run(asked))["fits"]}
    assert {id: fit["fits"] for id, fit in fits.items()} == {
        "cuda:0": False,
        "cuda:1": False,
        "cuda:2": False,
        "cuda:0,1": True,
        "cpu": True,
    }
    assert fits["cuda:0"]["suggestions"][0].startswith("Use cuda:0, cuda:1 together: ")
    assert fits["cuda:0,1"]["kv_cache_mb"] == fits["cuda:0"]["kv_cache_mb"] == 512
    assert fits["cuda:0,1"]["free_mb"] == 2 * 950


# --- learning from loads ---------------------------------------------------------------------


async def test_one_load_brings_the_prediction_half_way_to_what_was_measured(
    fresh: Cluster, tmp_path: Path
) -> None:
    path = write_shape(tmp_path / "m.gguf", Shape())
    options = {"slots": 4, "context_length": 2048}
    asked = {"operation": "model_fit", "model": f"file:{path}", "options": options}
    hive = await fresh.hive()
    (before,) = (await hive.client.run(asked))["fits"]
    worker = await spawn(hive, f"file:{path}", **options)
    (after,) = (await hive.client.run(asked))["fits"]
    real = after["measured_mb"]
    print(f"predicted {before['needed_mb']} MiB, then {after['needed_mb']}; measured {real}")
    assert before["needed_mb"] == pytest.approx(real, rel=0.15)
    wrong, left = before["needed_mb"] - real, after["needed_mb"] - real
    assert left == pytest.approx(wrong / 2, abs=2)
    assert abs(left) < abs(wrong) or abs(wrong) <= 1
    await hive.client.run({"operation": "worker_stop", "worker_id": worker["worker_id"]})
    await hive.stop()
    again = await fresh.hive()
    (kept,) = (await again.client.run(asked))["fits"]
    assert kept["needed_mb"] == after["needed_mb"]
    assert kept["measured_mb"] == real


async def test_a_load_that_failed_teaches_nothing(fresh: Cluster, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    broken = bytearray(path.read_bytes())
    at = broken.find(b"blk.0.attn_q.weight")
    broken[at : at + 5] = b"odd.0"
    path.write_bytes(broken)
    hive = await fresh.hive()
    with pytest.raises(HiveError, match="did not come up"):
        await spawn(hive, f"file:{path}")
    assert not (fresh.folder / "gpu-0" / "agent" / "fit.json").exists()


async def test_memory_that_cannot_be_written_down_is_remembered_all_the_same(
    fresh: Cluster, tmp_path: Path
) -> None:
    hive = await fresh.hive()
    (fresh.folder / "gpu-0" / "agent" / "fit.json").mkdir()
    await spawn(hive)
    asked = {"operation": "model_fit", "model": "hive-tiny"}
    assert (await hive.client.run(asked))["fits"][0]["measured_mb"] > 30
    assert "fit.json could not be written" in hive.log


def test_what_is_allocated_and_not_touched_yet_counts_as_held(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(
        mapping("7f00-8f00000", "r--s", 7, rss=100, pss=50)  # a mapped file
        + mapping("10000000-14000000", "rw-p", 0, rss=1024, pss=1024)  # 64 MiB, little touched
        + mapping("20000000-20800000", "rw-p", 0, rss=16, pss=16)  # a thread's stack
        + mapping("30000000-34000000", "---p", 0, rss=0, pss=0)  # reserved address space
    )
    assert held(smaps, alone=True) == 100 * 1024 + 64 * MIB + 16 * 1024
    assert held(smaps, alone=False) == 50 * 1024 + 64 * MIB + 16 * 1024


def mapping(where: str, rights: str, inode: int, *, rss: int, pss: int) -> str:
    """KiB."""
    return f"{where} {rights} 00000000 00:00 {inode}  name\nRss: {rss} kB\nPss: {pss} kB\n"


def test_gpu_memory_is_that_of_all_processes_of_a_worker() -> None:
    mine = DeviceProcess(pid=os.getpid(), name="me", used_mb=300)
    other = DeviceProcess(pid=1, name="init", used_mb=500)
    silent = DeviceProcess(pid=os.getpid(), name="me")
    gpu = device("cuda:0", 100)
    both = [gpu.model_copy(update={"processes": (mine, other)}), device("cuda:1", 5)]
    assert on_gpus(os.getpid(), ["cuda:0"], both) == {"cuda:0": 300 * MIB}
    assert on_gpus(os.getpid(), ["cuda:0", "cuda:1"], both) is None
    mute = [gpu.model_copy(update={"processes": (silent,)})]
    assert on_gpus(os.getpid(), ["cuda:0"], mute) is None


@pytest.mark.parametrize("alone", [True, False])
async def test_where_the_driver_does_not_say_who_holds_what_the_difference_tells(
    memory: Memory, model: Path, tmp_path: Path, alone: bool
) -> None:
    before, after = [device("cuda:0", 6000)], [device("cuda:0", 4900)]
    request = request_for(spec(model, on="cuda:0"), await known(model), before)
    mine = memory.claim(spec(model, on="cuda:0"), request, before)
    if not alone:
        memory.claim(spec(model, "w-2", on="cuda:0"), request, before)
    worker = Worker(
        mine,
        folder=tmp_path,
        logs=tmp_path,
        records=Records(tmp_path),
        turns=Turns(),
        hive_id="h",
        health_s=1,
    )
    worker.pid = os.getpid()
    await memory.learn(worker, after)
    assert memory.last(request) == (1100 * MIB if alone else None)
    await worker.stop(0)


def test_the_cache_of_vllm_is_read_from_its_log() -> None:
    gpu = "INFO 11-21 [gpu_worker.py:298] Available KV cache memory: 12.50 GiB"
    cpu = "INFO 11-21 [cpu_worker.py:260] Explicitly set (1.0/9.21) GiB for KV cache on node 0."
    assert vllm_cache(["loading", gpu]) == 12.5 * GIB
    assert vllm_cache([cpu]) == GIB
    assert vllm_cache(["ready"]) is None


async def test_vllm_is_predicted_with_the_batch_that_it_is_told(model: Path) -> None:
    facts, gpu = await known(model), device("cuda:0", 6000)
    for flags, batch in (({"max-num-batched-tokens": 8192}, 8192), ({"seed": 1}, None)):
        wanted = replace(spec(model, on="cuda:0", flags=flags), engine="vllm")
        assert request_for(wanted, facts, [gpu]).batch == batch
