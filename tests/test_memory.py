"""Asked before each load: a worker that will not fit is refused, and no memory is given twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hive_agent.fit.facts import ModelFacts
from hive_agent.fit.promises import Phase, Promise, left
from hive_agent.memory import Memory, facts_of, request_for
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.spec import WorkerSpec
from operations.errors import HiveError, WontFit
from operations.hosts import Device, ModelInfo
from operations.operations import WorkerOptions
from tests.cluster import Cluster, spawn
from tests.fake_nvml.driver import GIB, FakeDriver, gpus
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
def memory(tmp_path: Path) -> Memory:
    return Memory(WorkerPool(hive_id="h", state=tmp_path, runtime=tmp_path, cores=1, health_s=10))


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
    ("phase", "cpu", "gpu"), [("loading", 70, 90), ("loaded", 80, 100), ("gone", 100, 100)]
)
def test_what_is_promised_is_taken_off_for_as_long_as_it_does_not_show(
    phase: Phase, cpu: int, gpu: int
) -> None:
    devices = [device("cpu", 100), device("cuda:0", 100)]
    found = left(devices, {"w": HELD}, {"w": phase})
    assert [one.vram_free_mb for one in found] == [cpu, gpu]
    assert left(devices, {"w": HELD}, {}) == devices


def test_promises_of_several_add_up_and_never_below_nothing() -> None:
    promises = {f"w-{n}": HELD for n in range(5)}
    found = left([device("cpu", 100)], promises, dict.fromkeys(promises, "loading"))
    assert found[0].vram_free_mb == 0


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
    fresh: Cluster, driver: FakeDriver
) -> None:
    driver.write([replace(gpus(1)[0], used=80 * GIB - 64 * MIB)])
    hive = await fresh.hive(env=driver.env)
    wanted = {"operation": "worker_spawn", "model": "hive-tiny", "worker": "cuda", "device": 0}
    with pytest.raises(WontFit, match="cuda:0"):
        await hive.client.run(wanted)
    driver.write(gpus(1))
    for operation in (wanted, {**wanted, "force": True}):
        with pytest.raises(HiveError, match="sees 0 GPUs"):  # let in; the driver is a fake
            await hive.client.run(operation)
    driver.write([replace(gpus(1)[0], used=80 * GIB)])
    with pytest.raises(HiveError, match="sees 0 GPUs"):
        await hive.client.run({**wanted, "force": True})


async def test_a_hive_tells_what_a_model_would_take_of_each_device(
    fresh: Cluster, driver: FakeDriver, model: Path
) -> None:
    driver.write([gpus(2)[0], replace(gpus(2)[1], used=80 * GIB - 100 * MIB)])
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
    only = await queen.client.run({"operation": "model_fit", "model": f"file:{model}"})
    assert {fit["hive_id"] for fit in only["fits"]} >= {"gpu-0"}
    with pytest.raises(HiveError, match="No hive can say"):
        await queen.client.run({"operation": "model_fit", "model": "nothing"})
