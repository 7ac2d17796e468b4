"""Which GPUs a worker gets: pure decisions, and the same over a real agent with a fake driver."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hive_agent.known import facts_of
from hive_agent.memory import Memory, request_for
from hive_agent.placement import Choice, Machine, candidates, worst_link
from hive_agent.workers.launch import decide
from hive_agent.workers.pool import WorkerPool
from operations.errors import HiveError, InvalidRequest, WontFit
from operations.hosts import Device, ModelInfo
from operations.operations import Engine, WorkerSpawn
from tests.cluster import Cluster, Daemon, clean_env
from tests.fake_nvml.driver import GIB, FakeDriver, Gpu, gpus, islands
from tests.gguf_files import write_llama
from tests.terminal import hive as command
from tests.test_devices import FOREIGN, GPU_IS_LOST, HEARD_WITHIN_S, beats, healthy

MIB = 2**20
GPU_BUILD = Path(__file__).with_name("gpu_build")
CPU = Device(id="cpu", name="CPU", device_type="cpu", vram_total_mb=64_000, vram_free_mb=60_000)


def gpu(number: int, free_mb: int = 80_000, **more: Any) -> Device:
    given = {"name": "H100", "device_type": "gpu", "vram_total_mb": 81_920, **more}
    return Device(id=f"cuda:{number}", vram_free_mb=free_mb, uuid=f"GPU-{number}", **given)


def linked(devices: Sequence[Device], *groups: tuple[str, Iterable[int]]) -> list[Device]:
    """The devices, those of each group joined by its link; the first group that has both holds."""
    links: dict[str, dict[str, str]] = {device.id: {} for device in devices}
    for link, numbers in groups:
        ids = [f"cuda:{number}" for number in numbers]
        for one in ids:
            for other in ids:
                if one != other:
                    links[one].setdefault(other, link)
    return [device.model_copy(update={"links": links[device.id]}) for device in devices]


def numbers(choice: Choice) -> list[int]:
    return [int(device.id.partition(":")[2] or 0) for device in choice.devices]


def chosen(
    there: Sequence[Device],
    engine: Engine = "vllm",
    workers: Mapping[str, int] | None = None,
    **request: Any,
) -> list[list[int]]:
    """The numbers of the devices in each set to try."""
    machine = Machine([*there, CPU], workers or {}, None if there else "no driver")
    found = candidates(WorkerSpawn(model="m", **request), engine, machine)
    return [numbers(choice) for choice in found]


def refused(there: Sequence[Device], **request: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        chosen(there, **request)
    return error.value


ALIKE = [gpu(0, 50_000), gpu(1, 80_000), gpu(2, 10_000), gpu(3, 70_000)]
TWO_ISLANDS = linked(
    [gpu(n, 80_000 - n) for n in range(8)],
    ("nvlink", range(4)),
    ("nvlink", range(4, 8)),
    ("system", range(8)),
)


# -- the decision, as a table ------------------------------------------------------------------


def test_one_gpu_is_tried_before_several_the_emptiest_first() -> None:
    found = chosen(ALIKE)
    assert found == [[1], [3], [0], [2], [1, 3], [0, 1, 2, 3]]


def test_to_pack_the_fullest_is_tried_first_and_every_set_that_might_have_room() -> None:
    found = chosen(ALIKE, placement="pack")
    assert found == [[2], [0], [3], [1], [0, 2], [0, 3], [1, 3], [0, 1, 2, 3]]


def test_llama_cpp_shares_a_model_among_any_number_and_unlike_gpus() -> None:
    devices = [gpu(0), gpu(1, 20_000, name="RTX 4090", vram_total_mb=24_564), gpu(2, 40_000)]
    assert chosen(devices, "llamacpp") == [[0], [2], [1], [0, 2], [0, 1, 2]]


def test_tensor_parallel_needs_gpus_of_one_name_and_size() -> None:
    small = {"name": "RTX 4090", "vram_total_mb": 24_564}
    devices = [gpu(0), gpu(1, 24_000, **small), gpu(2, 40_000), gpu(3, 23_000, **small)]
    assert [one for one in chosen(devices) if len(one) > 1] == [[0, 2], [1, 3]]
    assert "no 3 cuda devices" in refused(devices, gpus=3).message


def test_of_equally_empty_gpus_the_one_with_fewer_workers_is_taken() -> None:
    devices = [gpu(n) for n in range(4)]
    workers = {"cuda:0": 1, "cuda:1": 2, "cuda:2": 0, "cuda:3": 0}
    assert chosen(devices, "scripted", workers) == [[2], [3], [0], [1]]
    assert chosen(devices, "scripted", workers, placement="pack") == [[1], [0], [2], [3]]
    assert chosen(devices, gpus=2, workers=workers)[0] == [2, 3]


def test_a_fast_link_comes_before_free_memory() -> None:
    devices = linked(
        [gpu(0), gpu(1, 60_000), gpu(2, 79_000), gpu(3, 30_000)],
        ("nvlink", (0, 3)),
        ("pcie-switch", (1, 2)),
        ("system", range(4)),
    )
    assert chosen(devices, gpus=2) == [[0, 3], [1, 2], [0, 2]]


def test_each_kind_of_link_is_preferred_to_the_next() -> None:
    tree = (("nvlink", (0, 1)), ("pcie-switch", (2, 3)), ("host-bridge", (4, 5)), ("node", (6, 7)))
    devices = linked([gpu(n) for n in range(8)], *tree, ("system", range(8)))
    assert chosen(devices, gpus=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [worst_link([devices[n], devices[n + 1]]) for n in (0, 2, 4, 6, 1)] == [
        *("nvlink", "pcie-switch", "host-bridge", "node", "system")
    ]


def test_four_gpus_come_from_one_nvlink_island_and_eight_from_both() -> None:
    assert chosen(TWO_ISLANDS, gpus=4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chosen(TWO_ISLANDS, gpus=8) == [list(range(8))]
    assert chosen(TWO_ISLANDS, gpus=5)[0] == [0, 1, 2, 3, 4]


def test_an_island_that_is_full_gives_way_to_gpus_of_both() -> None:
    """Two empty GPUs in each island: four are only to be had across."""
    free = [80_000, 80_000, 1_000, 1_000, 80_000, 80_000, 1_000, 1_000]
    devices = [
        device.model_copy(update={"vram_free_mb": left})
        for device, left in zip(TWO_ISLANDS, free, strict=True)
    ]
    assert chosen(devices, gpus=4) == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 4, 5]]


def test_a_ring_of_links_gives_no_set_whose_members_are_not_all_joined() -> None:
    ring = [("nvlink", (n, (n + 1) % 4)) for n in range(4)]
    devices = linked([gpu(n) for n in range(4)], *ring)
    pairs = chosen(devices, gpus=2)
    assert all((one - other) % 4 in (1, 3) for one, other in pairs[:2])
    assert chosen(devices, gpus=3) == [[0, 1, 2]]


def test_what_the_driver_does_not_tell_of_links_is_no_hindrance() -> None:
    devices = [gpu(0), gpu(1, 70_000, links={"cuda:0": "hyperlane"})]
    assert chosen(devices, gpus=2) == [[0, 1]]


def test_a_mig_instance_works_alone() -> None:
    slices = [gpu(n, 40_000, parent="GPU-x", name="H100 MIG 3g.40gb") for n in (0, 1)]
    devices = [*slices, gpu(2, 30_000), gpu(3, 20_000)]
    assert chosen(devices, "llamacpp") == [[0], [1], [2], [3], [2, 3]]
    assert chosen(devices, worker="cuda", device=1) == [[1]]
    for named in ([0, 1], [1, 2]):
        error = refused(devices, worker="cuda", devices=named)
        assert (error.code, error.param) == ("device_not_shareable", "devices")
        assert "MIG" in error.message
    assert "cuda:2, cuda:3" in refused(devices, gpus=3).message


def test_named_devices_are_the_only_ones_tried_in_the_order_given() -> None:
    assert chosen(ALIKE, worker="cuda", device=2) == [[2]]
    assert chosen(ALIKE, worker="cuda", devices=[3, 0, 2]) == [[3, 0, 2]]
    assert chosen(ALIKE, worker="cpu", device=0) == [[0]]


LOST = gpu(1, 0, healthy=False, problem="GPU is lost")


@pytest.mark.parametrize(
    ("devices", "request_", "code", "says"),
    [
        ([], {"worker": "cuda"}, "device_not_found", "no cuda device (no driver)"),
        ([], {"worker": "cuda", "device": 0}, "device_not_found", "cuda:0 (no driver)"),
        ([], {"gpus": 1}, "device_not_found", "no cuda device (no driver)"),
        ([gpu(0)], {"worker": "cuda", "device": 7}, "device_not_found", "It has: cuda:0, cpu"),
        ([gpu(0)], {"worker": "rocm"}, "device_not_found", "no rocm device"),
        ([gpu(0)], {"worker": "cpu", "device": 1}, "device_not_found", "cpu:1"),
        ([gpu(0), LOST], {"worker": "cuda", "devices": [0, 1]}, "device_unhealthy", "is lost"),
        ([LOST], {"worker": "cuda"}, "device_unhealthy", "cuda:1: GPU is lost"),
        ([gpu(0), LOST], {"gpus": 2}, "too_few_devices", "cuda:0 (cuda:1: GPU is lost)"),
        ([gpu(0)], {"worker": "cpu", "gpus": 2}, "too_few_devices", "the CPU is one device"),
    ],
)
def test_devices_that_cannot_be_had_are_refused_with_the_reason(
    devices: list[Device], request_: dict[str, Any], code: str, says: str
) -> None:
    error = refused(devices, **request_)
    assert error.code == code
    assert says in error.message
    assert error.message.endswith(".")


def test_a_lost_gpu_is_passed_by() -> None:
    assert chosen([gpu(0), LOST, gpu(2)]) == [[0], [2], [0, 2]]


@pytest.mark.parametrize(("devices", "why"), [([], "no driver"), ([LOST], "cuda:1: GPU is lost")])
def test_the_cpu_is_taken_only_where_no_gpu_is_and_it_says_so(
    devices: list[Device], why: str
) -> None:
    machine = Machine([*devices, CPU], {}, None if devices else "no driver")
    (choice,) = candidates(WorkerSpawn(model="m"), "llamacpp", machine)
    assert [device.id for device in choice.devices] == ["cpu"]
    assert why in choice.notes[0]
    (asked,) = candidates(WorkerSpawn(model="m", worker="cpu"), "llamacpp", machine)
    assert asked.notes == ()


def test_a_set_of_several_says_why_and_what_joins_it() -> None:
    machine = Machine([*TWO_ISLANDS, CPU], {})
    sets = list(candidates(WorkerSpawn(model="m"), "vllm", machine))
    assert sets[0].notes == ()
    four = next(one for one in sets if len(one.devices) == 4)
    assert four.notes == (
        "It does not fit on fewer: cuda:0, cuda:1, cuda:2, cuda:3 share the model, "
        "joined by NVLink",
    )
    asked = next(candidates(WorkerSpawn(model="m", gpus=8), "vllm", machine))
    assert asked.notes[0].startswith("cuda:0, ")
    assert "the machine's own interconnect" in asked.notes[0]


def test_a_machine_of_many_gpus_has_few_sets_to_try() -> None:
    devices = [gpu(n, 80_000 - n) for n in range(64)]
    assert len(chosen(devices, "llamacpp")) == 64 + 63
    packed = chosen(devices, placement="pack")
    assert len(packed) == len({tuple(one) for one in packed}) == 64 + 63 + 61 + 57


# -- the real agent, on GPUs of a fake driver --------------------------------------------------


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slot of 262,144 tokens takes 262,144 × 8 layers × 256 bytes: 512 MiB."""
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    return write_llama(path, layers=8, width=128, heads=4, kv_heads=2, context_length=2**18)


async def gpu_hive(fresh: Cluster, driver: FakeDriver) -> Daemon:
    """A hive whose llama.cpp says that it computes on GPUs, and never ends loading there."""
    path = os.pathsep.join((str(GPU_BUILD), clean_env()["PYTHONPATH"]))
    return await fresh.hive(env={**driver.env, "PYTHONPATH": path})


async def placed(hive: Daemon, model: str, **wanted: Any) -> tuple[list[str], list[str]]:
    """Have a worker started; its devices, and what the job said until then."""
    job = await hive.client.submit({"operation": "worker_spawn", "model": model, **wanted})
    lines: list[str] = []
    async with aclosing(hive.client.stream(job.job_id)) as events:
        async for event in events:
            lines.append(event.data)
            if "Starting worker" in event.data:
                return event.data.rpartition(" on ")[2].split(", "), lines
    raise AssertionError(lines)


def gib(size: int) -> dict[str, Any]:
    """Options with which the model's KV cache takes so many GiB."""
    return {"options": {"context_length": 2**18, "slots": 2 * size}}


SCRIPTED: dict[str, Any] = {"options": {"engine": "scripted"}}


async def fits(hive: Daemon, model: str, **wanted: Any) -> dict[str, bool]:
    told = await hive.client.run({"operation": "model_fit", "model": model, **wanted})
    return {fit["device"]: fit["fits"] for fit in told["fits"]}


async def workers_on(hive: Daemon) -> Counter[str]:
    workers = (await hive.client.run({"operation": "worker_list"}))["workers"]
    return Counter(device for worker in workers for device in worker["devices"])


async def test_what_another_program_takes_changes_verdict_and_placement_soon(
    driver: FakeDriver, fresh: Cluster, model: Path
) -> None:
    name = f"file:{model}"
    machine = gpus(2)
    driver.write(machine)
    hive = await gpu_hive(fresh, driver)
    await hive.client.run({"operation": "model_download", "model": name})
    before = await fits(hive, name, **gib(64))
    assert (before["cuda:0"], before["cuda:1"]) == (True, True)
    machine[0] = replace(machine[0], used=20 * GIB, processes=(FOREIGN,))
    driver.write(machine)
    async with asyncio.timeout(HEARD_WITHIN_S):
        after = await fits(hive, name, **gib(64))
        where, _ = await placed(hive, name, **gib(50))
    assert (after["cuda:0"], after["cuda:1"]) == (False, True)
    assert where == ["cuda:1"]
    assert (await placed(hive, name, **gib(50)))[0] == ["cuda:0"]
    with pytest.raises(WontFit, match="lacks"):
        await placed(hive, name, **gib(50))


async def test_a_model_too_large_for_one_gpu_is_shared_by_those_best_linked(
    driver: FakeDriver, fresh: Cluster, model: Path
) -> None:
    machine = islands()
    machine[0] = replace(machine[0], used=GIB)
    machine[4] = replace(machine[4], used=2 * GIB)
    driver.write(machine)
    hive = await gpu_hive(fresh, driver)
    name = f"file:{model}"
    await hive.client.run({"operation": "model_download", "model": name})
    where, lines = await placed(hive, name, **gib(100))
    assert where == ["cuda:1", "cuda:2"]
    says = "It does not fit on fewer: cuda:1, cuda:2 share the model, joined by NVLink"
    assert any(says in line for line in lines)
    (worker,) = (await hive.client.run({"operation": "worker_list"}))["workers"]
    assert (worker["device"], worker["devices"]) == ("cuda:1", ["cuda:1", "cuda:2"])
    packed, _ = await placed(hive, name, placement="pack", **gib(20))
    assert packed == ["cuda:1"]  # it has least left, and that is enough
    with pytest.raises(WontFit) as refused:
        await placed(hive, name, gpus=1, **gib(100))
    assert "--force" in refused.value.message


async def test_fifty_spawns_at_once_over_eight_gpus_never_overcommit(
    driver: FakeDriver, fresh: Cluster, model: Path
) -> None:
    driver.write(islands())
    hive = await gpu_hive(fresh, driver)
    name = f"file:{model}"
    await hive.client.run({"operation": "model_download", "model": name})
    wanted = {"operation": "worker_spawn", "model": name, "gpus": 1, **gib(45)}
    answers = await asyncio.gather(
        *(hive.client.submit(wanted) for _ in range(50)), return_exceptions=True
    )
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(error, WontFit) for error in refused), refused
    assert len(refused) == 50 - 8
    assert await workers_on(hive) == {f"cuda:{number}": 1 for number in range(8)}


async def test_workers_of_all_sizes_never_have_more_of_a_gpu_than_it_has(
    tmp_path: Path, model: Path
) -> None:
    pool = WorkerPool(hive_id="h", state=tmp_path, runtime=tmp_path, cores=1, health_s=10)
    memory = Memory(pool)
    devices = [device.model_copy(update={"vram_free_mb": 78_000}) for device in TWO_ISLANDS]
    file = ModelInfo(
        id="m", digest="sha256:0", format="gguf", size_bytes=1, source="file", path=str(model)
    )
    facts = await facts_of(file)
    assert facts is not None
    given: Counter[str] = Counter()
    shared = refusals = 0
    for number in range(50):
        size, placement = (5, 30, 60, 100)[number % 4], ("spread", "pack")[number % 3 == 0]
        asked = WorkerSpawn(model="m", placement=placement, **gib(size))  # type: ignore[arg-type]
        machine = Machine(memory.left(devices), memory.workers())
        decided = [
            decide(asked, file, one.devices, worker_id=f"w-{number}", cores=2, threads_in_use=0)
            for one in candidates(asked, "llamacpp", machine)
        ]
        requests = [request_for(spec, facts, devices) for spec in decided]
        spec, request = memory.best(
            [(pair, pair[1]) for pair in zip(decided, requests, strict=True)], devices
        )
        needs = memory.judge(request, devices).plan.needs
        try:
            memory.claim(spec, request, devices)
        except WontFit:
            refusals += 1
        else:
            given.update({need.device: need.total for need in needs})
            shared += len(spec.devices) > 1
    assert shared
    assert refusals
    assert all(0.8 * 78_000 < given[one.id] / MIB <= 78_000 for one in devices), given


async def test_eight_gpus_with_mig_are_listed_and_given_out(
    driver: FakeDriver, fresh: Cluster
) -> None:
    slices = tuple(Gpu(f"MIG-{n}", "NVIDIA H100 MIG 3g.40gb", total=40 * GIB) for n in (0, 1))
    machine = islands()
    machine[0] = replace(machine[0], mig=1, instances=slices)
    driver.write(machine)
    hive = await fresh.hive(env=driver.env)
    devices = (await hive.client.run({"operation": "device_list"}))["devices"]
    assert [device["uuid"] for device in devices[:-1]] == [
        *("MIG-0", "MIG-1", "GPU-1", "GPU-2", "GPU-3", "GPU-4", "GPU-5", "GPU-6", "GPU-7")
    ]
    four, _ = await placed(hive, "shared", gpus=4, **SCRIPTED)
    assert four == ["cuda:5", "cuda:6", "cuda:7", "cuda:8"]
    each = await asyncio.gather(*(placed(hive, f"m-{n}", **SCRIPTED) for n in range(3)))
    assert sorted(where for where, _ in each) == [["cuda:2"], ["cuda:3"], ["cuda:4"]]
    mig, _ = await placed(hive, "sliced", worker="cuda", device=1, **SCRIPTED)
    assert mig == ["cuda:1"]
    with pytest.raises(InvalidRequest, match="MIG instance"):
        await placed(hive, "sliced", worker="cuda", devices=[0, 1], **SCRIPTED)
    with pytest.raises(InvalidRequest, match="no 8 cuda devices"):
        await placed(hive, "shared", gpus=8, **SCRIPTED)
    shown = await command("workers", "ls", url=hive.url, env={"COLUMNS": "80"})
    assert "cuda:5,6,7,8" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) <= 80


async def test_a_lost_gpu_fails_the_workers_that_share_it_and_no_others(
    driver: FakeDriver, fresh: Cluster
) -> None:
    driver.write(islands())
    hive = await fresh.hive(env=driver.env)
    for model, devices in (("well", [2, 3]), ("doomed", [4, 5])):
        spawn = {"operation": "worker_spawn", "model": model, "worker": "cuda"}
        await hive.client.run({**spawn, "devices": devices, **SCRIPTED})
    machine = islands()
    machine[5] = replace(machine[5], error=GPU_IS_LOST)
    async with aclosing(beats(hive.url)) as heard:
        await anext(heard)
        driver.write(machine)
        async with asyncio.timeout(HEARD_WITHIN_S):
            while all(healthy(await anext(heard))):
                pass
    workers = (await hive.client.run({"operation": "worker_list"}))["workers"]
    state = {worker["model"]: (worker["state"], worker.get("problem") or "") for worker in workers}
    assert state["well"] == ("ready", "")
    assert state["doomed"][0] == "failed"
    assert "its device cuda:5 is lost: GPU is lost" in state["doomed"][1]
    said = await hive.client.run({"operation": "infer", "model": "well", "prompt": "hi"})
    assert said["text"]
    with pytest.raises(HiveError, match="GPU is lost"):
        await hive.client.run({"operation": "infer", "model": "doomed", "prompt": "hi"})
    four, _ = await placed(hive, "next", gpus=4, **SCRIPTED)
    assert four == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    with pytest.raises(InvalidRequest, match="cuda:5: GPU is lost"):
        await placed(hive, "next", gpus=8, **SCRIPTED)


async def test_keeper_leaves_the_gpus_to_the_hive_or_names_them(
    driver: FakeDriver, fresh: Cluster
) -> None:
    driver.write(islands())
    hive = await fresh.hive(env=driver.env)
    spawn = ("workers", "spawn", "parrot", "--engine", "scripted")
    older = ("--worker-type", "cuda", "--device", "7")
    named = (
        (("--device", "0", "--device", "1"), "cuda:0,1"),
        (older, "cuda:7"),
    )
    ran = await asyncio.gather(
        *(command(*spawn, *flags, url=hive.url) for flags, _ in named),
        command(*spawn, "--device", "9", url=hive.url),
    )
    for done, (_, on) in zip(ran, named, strict=False):
        assert f"parrot on {on} of gpu-0" in done.out, done.err
    assert "no device cuda:9" in ran[-1].err
    chosen_by_hive = await command(*spawn, "--gpus", "2", url=hive.url)
    assert "parrot on cuda:2,3 of gpu-0" in chosen_by_hive.out, chosen_by_hive.err
    packed = await command(*spawn, "--placement", "pack", url=hive.url)
    assert "parrot on cuda:0 of gpu-0" in packed.out, packed.err


async def test_without_a_gpu_the_hive_says_that_it_takes_the_cpu(
    driver: FakeDriver, fresh: Cluster
) -> None:
    driver.write([])
    hive = await fresh.hive(env=driver.env)
    where, lines = await placed(hive, "parrot", **SCRIPTED)
    assert where == ["cpu"]
    assert any("no GPU takes work here: the NVIDIA driver sees no GPU" in one for one in lines)
    with pytest.raises(InvalidRequest, match="the NVIDIA driver sees no GPU"):
        await placed(hive, "parrot", worker="cuda", **SCRIPTED)


async def test_who_asks_for_a_gpu_that_is_not_there_is_not_told_to_install_an_engine(
    driver: FakeDriver, fresh: Cluster, tmp_path: Path
) -> None:
    driver.write([])
    hive = await fresh.hive(env=driver.env)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    with pytest.raises(InvalidRequest, match="the NVIDIA driver sees no GPU") as refused:
        await placed(hive, f"file:{tmp_path}", worker="cuda")
    assert refused.value.code == "device_not_found"
