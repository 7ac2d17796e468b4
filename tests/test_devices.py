"""The devices of a machine: GPUs through the real nvidia-ml-py and a fake driver, AMD, the CPU."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hive_agent.devices.amd import Amd
from hive_agent.devices.cpu import Memory, cores, groups, instruction_sets, limited
from hive_agent.devices.nvidia import Reading, devices, read
from hive_agent.devices.nvml import Board, Facts, Unit
from hive_agent.devices.processes import belongs
from hive_agent.devices.seats import Seat, Seen, identify, seat
from hive_agent.devices.text import readable
from keeper import tables
from keeper.output import Table, aligned, worth_showing
from operations.errors import HiveError
from operations.hosts import Device, DeviceProcess
from tests.cluster import Cluster, clean_env, spawn_scripted
from tests.fake_nvml.driver import GIB, FakeDriver, Gpu, Process, build, compiler, gpus, islands
from wire import sse

GPU_IS_LOST, RESET_REQUIRED, UNKNOWN = 15, 16, 999
UNINITIALIZED, DRIVER_NOT_LOADED, VERSION_MISMATCH = 1, 9, 18
FOREIGN = Process(2**22 + 1, 20 * GIB, "/opt/other/train.py")

HEARD_WITHIN_S = 2.0


# -- who has which number, as a table ----------------------------------------------------------


def seen(index: int, gpu: str, *units: str) -> Seen:
    return Seen(index, gpu, units)


def seats(*pairs: tuple[str, str | None]) -> tuple[Seat, ...]:
    return tuple(Seat(gpu, unit) for gpu, unit in pairs)


AB = seats(("a", "a"), ("b", "b"))
SLICED = seats(("a", "a1"), ("a", "a2"), ("b", "b"))


@pytest.mark.parametrize(
    ("before", "now", "after"),
    [
        ((), [seen(0, "a", "a"), seen(1, "b", "b")], AB),
        ((), [seen(0, "a", "a1", "a2"), seen(1, "b", "b")], SLICED),
        (AB, [Seen(0, "a", None), seen(1, "b", "b")], AB),
        (AB, [seen(0, "b", "b")], AB),
        (AB, [], AB),
        (AB, [seen(0, "c", "c"), seen(1, "b", "b")], (*AB, Seat("c", "c"))),
        ((), [Seen(0, "index:0", None), seen(1, "b", "b")], seats(("index:0",) * 2, ("b", "b"))),
        (seats(("index:0",) * 2, ("b", "b")), [seen(0, "a", "a"), seen(1, "b", "b")], AB),
        (SLICED, [Seen(0, "a", None), seen(1, "b", "b")], SLICED),
        (SLICED, [seen(0, "a", "a2"), seen(1, "b", "b")], (Seat("a", None), *SLICED[1:])),
        (
            (Seat("a", None), *SLICED[1:]),
            [seen(0, "a", "a2", "a3", "a4"), seen(1, "b", "b")],
            seats(("a", "a3"), ("a", "a2"), ("b", "b"), ("a", "a4")),
        ),
        (AB, [seen(0, "a", "a1", "a2")], seats(("a", "a1"), ("b", "b"), ("a", "a2"))),
    ],
)
def test_a_number_stays_with_its_gpu(
    before: tuple[Seat, ...], now: list[Seen], after: tuple[Seat, ...]
) -> None:
    assert seat(before, now) == after
    assert seat(after, now) == after


@pytest.mark.parametrize(
    ("uuids", "before", "keys"),
    [
        (["a", "b"], [], ["a", "b"]),
        ([None, "b"], [], ["index:0", "b"]),
        ([None, "b"], ["a", "b"], ["a", "b"]),
        ([None, "c"], ["a", "b", "c"], ["a", "c"]),
        ([None, "a"], ["a", "b"], ["index:0", "a"]),
        (["same", "same"], [], ["same", "index:1"]),
    ],
)
def test_a_silent_gpu_is_known_by_its_place(
    uuids: list[str | None], before: list[str], keys: list[str]
) -> None:
    assert identify(uuids, before) == keys


def test_a_driver_that_does_not_answer_makes_its_gpus_unhealthy() -> None:
    stuck = Reading(at=100.0, seats=AB)
    found = devices(stuck, 112.0, ())
    assert [device.id for device in found] == ["cuda:0", "cuda:1"]
    assert all("has not answered for 12 s" in str(device.problem) for device in found)
    assert not any(device.lost for device in found)


def test_of_gpus_that_take_no_work_only_those_that_failed_themselves_are_lost() -> None:
    first, second = (Unit(one.gpu, Facts(one.gpu, one.gpu, None)) for one in AB)
    well = read(Reading(0.0), [Board(AB[0].gpu, (first,)), Board(AB[1].gpu, (second,))], 1, "", "")
    assert not any(device.lost for device in devices(well, 1, ()))
    ill = read(
        well,
        [Board(AB[0].gpu, None, "it is lost", lost=True), Board(AB[1].gpu, None, "no answer")],
        2,
        "",
        "",
    )
    assert [(d.healthy, d.lost) for d in devices(ill, 2, ())] == [(False, True), (False, False)]
    assert not any(device.lost for device in devices(ill, 2 + 60, ()))  # silent: nobody knows
    broken = replace(first, problem="uncorrectable memory errors")
    gone = read(ill, [Board(AB[0].gpu, (broken,))], 3, "", "")
    assert [device.lost for device in devices(gone, 3, ())] == [True, True]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"NVIDIA \xff\xfe H100", "NVIDIA \ufffd\ufffd H100"),
        (b"a\x1b[31m\r\nb\x07", "a [31m b"),
        (b"", "unknown"),
        (None, "unknown"),
        ("\u202egnp.exe", "gnp.exe"),
        (b"x" * 1000, "x" * 96),
    ],
)
def test_names_are_made_fit_to_be_shown(raw: bytes | str | None, shown: str) -> None:
    assert readable(raw, "unknown") == shown


def test_a_process_is_ours_by_its_group_or_its_ancestors(tmp_path: Path) -> None:
    for pid, parent, group in ((50, 1, 50), (51, 50, 50), (52, 51, 52), (60, 1, 50), (70, 1, 70)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) R 9 9 (b) S {parent} {group} 0")
    ours = {50}
    found = {pid: belongs(pid, ours, tmp_path) for pid in (50, 51, 52, 60, 70, 99)}
    assert found == {50: True, 51: True, 52: True, 60: True, 70: False, 99: False}
    assert not belongs(50, (), tmp_path)


# -- the fake driver, in a process of its own --------------------------------------------------


class Sampler:
    """A process that samples when it is asked to."""

    def __init__(self, driver: FakeDriver) -> None:
        self.log = driver.state.with_name("sampler.log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fake_nvml.sampler"],
                env={**clean_env(), **driver.env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __call__(self, *, wait: float = 0.0, ours: Sequence[int] = ()) -> dict[str, Any]:
        """One sample, after ``wait`` seconds of its clock."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"wait": wait, "ours": list(ours)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.log.read_text()
        told: dict[str, Any] = json.loads(line)
        return told

    def gpus(self, *, wait: float = 0.0, ours: Sequence[int] = ()) -> list[Device]:
        found = [Device(**device) for device in self(wait=wait, ours=ours)["devices"]]
        assert found[-1].id == "cpu"
        return [device for device in found if device.id.startswith("cuda")]

    def close(self) -> None:
        with self._process as process:
            process.kill()


@pytest.fixture
def sample(driver: FakeDriver) -> Iterator[Sampler]:
    """Samples a machine of 8 GPUs, unless the test writes another before it asks."""
    driver.write(gpus(8))
    sampler = Sampler(driver)
    yield sampler
    sampler.close()


def healthy(found: Sequence[Device]) -> list[bool]:
    return [device.healthy for device in found]


def test_every_gpu_is_told_with_all_that_its_driver_knows(sample: Sampler) -> None:
    found = sample.gpus()
    assert [device.id for device in found] == [f"cuda:{index}" for index in range(8)]
    assert found[3] == Device(
        id="cuda:3",
        name="NVIDIA H100 80GB HBM3",
        device_type="gpu",
        vram_total_mb=81920,
        vram_free_mb=81920,
        vram_used_mb=0,
        compute_capability="9.0",
        uuid="GPU-3",
        utilization_percent=12,
        temperature_c=41,
        power_w=70,
        driver_version="550.54.15",
        cuda_version="12.4",
    )


def test_processes_that_are_not_ours_are_told_with_their_memory(
    driver: FakeDriver, sample: Sampler
) -> None:
    worker = Process(os.getpid(), 5 * GIB)
    small = Process(FOREIGN.pid + 1, GIB, "")
    driver.write([Gpu("GPU-0", used=25 * GIB, processes=(small, worker, FOREIGN))])
    (gpu,) = sample.gpus(ours=[os.getppid()])
    assert gpu.vram_used_mb == 25 * 1024
    assert gpu.processes == (
        DeviceProcess(pid=FOREIGN.pid, name="train.py", used_mb=20 * 1024),
        DeviceProcess(pid=small.pid, name="?", used_mb=1024),
    )
    everyone = sample.gpus()[0].processes
    assert DeviceProcess(pid=worker.pid, name="python3", used_mb=5 * 1024) in everyone


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"error": GPU_IS_LOST}, "fallen off the bus; restart the machine"),
        ({"error": RESET_REQUIRED}, "nvidia-smi --gpu-reset"),
        ({"error": UNKNOWN}, "unknown error"),
        ({"error": 14}, "Corrupted infoROM"),
        ({"ecc": 3}, "3 uncorrectable memory errors"),
        ({"remap": 1}, "has to be replaced"),
    ],
)
def test_a_failing_gpu_keeps_its_number_says_why_and_comes_back(
    driver: FakeDriver, sample: Sampler, fault: dict[str, int], says: str
) -> None:
    machine = gpus(8)
    assert all(healthy(sample.gpus()))
    driver.write([*machine[:3], replace(machine[3], **fault), *machine[4:]])
    found = sample.gpus(wait=10)
    assert healthy(found) == [index != 3 for index in range(8)]
    assert [device.uuid for device in found] == [f"GPU-{index}" for index in range(8)]
    assert (found[3].name, found[3].vram_total_mb) == ("NVIDIA H100 80GB HBM3", 81920)
    assert says in str(found[3].problem)
    driver.write(machine)
    assert all(healthy(sample.gpus(wait=10)))


def test_a_gpu_that_is_lost_from_the_start_is_numbered_too(
    driver: FakeDriver, sample: Sampler
) -> None:
    machine = gpus(3)
    driver.write([replace(machine[0], error=GPU_IS_LOST), *machine[1:]])
    found = sample.gpus()
    assert [(d.id, d.uuid) for d in found[1:]] == [("cuda:1", "GPU-1"), ("cuda:2", "GPU-2")]
    assert (found[0].id, found[0].healthy, found[0].uuid) == ("cuda:0", False, None)
    driver.write(machine)
    assert [device.uuid for device in sample.gpus()] == ["GPU-0", "GPU-1", "GPU-2"]


def test_a_gpu_that_the_driver_forgets_is_looked_for_and_others_keep_their_numbers(
    driver: FakeDriver, sample: Sampler
) -> None:
    machine = gpus(4)
    driver.write(machine)
    sample.gpus()
    driver.write([machine[0], *machine[2:]], generation=1)  # a reload that found three
    sample.gpus()
    found = sample.gpus(wait=30)
    assert healthy(found) == [True, False, True, True]
    assert [device.uuid for device in found] == ["GPU-0", "GPU-1", "GPU-2", "GPU-3"]
    assert "not found" in str(found[1].problem)
    driver.write([*machine, Gpu("GPU-new")], generation=2)
    sample.gpus()
    assert [d.uuid for d in sample.gpus(wait=30)] == [f"GPU-{n}" for n in (0, 1, 2, 3, "new")]


def test_mig_instances_stand_in_the_place_of_their_gpu(driver: FakeDriver, sample: Sampler) -> None:
    first = Gpu("MIG-1", "NVIDIA H100 MIG 1g.10gb", total=10 * GIB, used=GIB, processes=(FOREIGN,))
    second = Gpu("MIG-2", "NVIDIA H100 MIG 2g.20gb", total=20 * GIB)
    sliced = Gpu("GPU-0", mig=1, temp=55, instances=(first, second))
    driver.write([sliced, Gpu("GPU-1")])
    found = sample.gpus()
    assert [(d.id, d.uuid, d.parent) for d in found] == [
        ("cuda:0", "MIG-1", "GPU-0"),
        ("cuda:1", "MIG-2", "GPU-0"),
        ("cuda:2", "GPU-1", None),
    ]
    assert (found[0].vram_total_mb, found[0].vram_used_mb) == (10 * 1024, 1024)
    assert (found[0].utilization_percent, found[0].power_w) == (None, None)
    assert (found[0].temperature_c, found[0].compute_capability) == (55, "9.0")
    assert [process.pid for process in found[0].processes] == [FOREIGN.pid]
    driver.write([replace(sliced, error=GPU_IS_LOST), Gpu("GPU-1")])
    lost = sample.gpus()
    assert healthy(lost) == [False, False, True]
    assert [d.name for d in lost[:2]] == ["NVIDIA H100 MIG 1g.10gb", "NVIDIA H100 MIG 2g.20gb"]
    driver.write([replace(sliced, instances=(second,)), Gpu("GPU-1")])
    assert [(d.id, d.uuid) for d in sample.gpus()] == [("cuda:1", "MIG-2"), ("cuda:2", "GPU-1")]


def test_what_joins_the_gpus_is_told_of_each_to_each(driver: FakeDriver, sample: Sampler) -> None:
    driver.write(islands())
    links = [device.links for device in sample.gpus()]
    island = ["nvlink"] * 3 + ["system"] * 4
    assert [links[0][f"cuda:{other}"] for other in range(1, 8)] == island
    assert links[6]["cuda:5"] == links[5]["cuda:6"] == "nvlink"
    assert [len(one) for one in links] == [7] * 8


def test_gpus_without_nvlink_are_told_by_their_place_on_the_pci_bus(
    driver: FakeDriver, sample: Sampler
) -> None:
    places = ("0/0/0", "0/0/0", "0/0/1", "0/1/2", "1/0/0", "")
    driver.write([replace(one, place=at) for one, at in zip(gpus(6), places, strict=True)])
    found = sample.gpus()
    assert found[0].links == {
        "cuda:1": "pcie-switch",
        "cuda:2": "host-bridge",
        "cuda:3": "node",
        "cuda:4": "system",
    }
    assert found[5].links == {}
    assert all(healthy(found))


def test_links_are_read_once_and_again_after_a_reload(driver: FakeDriver, sample: Sampler) -> None:
    apart = [replace(gpu, nvlink="") for gpu in islands()]
    lost = replace(apart[1], error=GPU_IS_LOST)
    driver.write([apart[0], lost, *apart[2:]])
    assert sample.gpus()[0].links.keys() == {f"cuda:{n}" for n in range(2, 8)}
    driver.write(islands())
    now = sample.gpus()[0].links
    assert (now["cuda:1"], now["cuda:2"]) == ("nvlink", "host-bridge")
    driver.write(islands(), generation=1)
    sample.gpus()
    assert sample.gpus(wait=1)[0].links["cuda:2"] == "nvlink"


def test_a_mig_instance_has_no_links(driver: FakeDriver, sample: Sampler) -> None:
    machine = islands()[:3]
    machine[0] = replace(machine[0], mig=1, instances=(Gpu("MIG-1"), Gpu("MIG-2")))
    driver.write(machine)
    assert [device.links for device in sample.gpus()] == [
        *({}, {}, {"cuda:3": "nvlink"}, {"cuda:2": "nvlink"})
    ]


def test_a_gpu_with_mig_and_no_instance_says_what_to_do(
    driver: FakeDriver, sample: Sampler
) -> None:
    driver.write([Gpu("GPU-0", mig=1), Gpu("GPU-1")])
    found = sample.gpus()
    assert healthy(found) == [False, True]
    assert "nvidia-smi mig -i 0" in str(found[0].problem)
    driver.write([Gpu("GPU-0", mig=1, instances=(Gpu("MIG-1"),)), Gpu("GPU-1")])
    assert [device.uuid for device in sample.gpus()] == ["MIG-1", "GPU-1"]


def test_a_driver_that_is_unloaded_and_loaded_again_is_found_again(
    driver: FakeDriver, sample: Sampler
) -> None:
    assert all(healthy(sample.gpus()))
    driver.write(gpus(8), error=DRIVER_NOT_LOADED)
    told = sample()
    assert told["why"] is None
    assert {device["problem"] for device in told["devices"][:-1]} == {
        "the NVIDIA driver is installed but not loaded; load it with 'sudo modprobe nvidia'"
    }
    for wait in (1, 2, 4, 8, 16, 30, 30):
        assert not any(healthy(sample.gpus(wait=wait)))
    driver.write([replace(g, name="NVIDIA H200") for g in gpus(8)], version="570", generation=1)
    assert not any(healthy(sample.gpus(wait=20)))
    found = sample.gpus(wait=10)
    assert all(healthy(found))
    assert (found[7].name, found[7].driver_version) == ("NVIDIA H200", "570")


def test_a_driver_that_was_reloaded_unseen_is_opened_again(
    driver: FakeDriver, sample: Sampler
) -> None:
    sample.gpus()
    driver.write(gpus(8), generation=7)
    found = sample.gpus()
    assert "was unloaded" in str(found[0].problem)
    assert all(healthy(sample.gpus(wait=1)))


def test_what_cannot_change_is_read_once(driver: FakeDriver, sample: Sampler) -> None:
    sample.gpus()
    driver.write([replace(gpu, name="other", used=GIB) for gpu in gpus(8)])
    found = sample.gpus(wait=60)
    assert (found[0].name, found[0].vram_used_mb) == ("NVIDIA H100 80GB HBM3", 1024)


@pytest.mark.parametrize(
    ("error", "says"),
    [(DRIVER_NOT_LOADED, "not loaded"), (VERSION_MISMATCH, "was updated"), (4, "/dev/nvidia")],
)
def test_a_driver_that_comes_after_the_start_is_found(
    driver: FakeDriver, sample: Sampler, error: int, says: str
) -> None:
    driver.write(gpus(8), error=error)
    told = sample()
    assert [device["id"] for device in told["devices"]] == ["cpu"]
    assert says in told["why"]
    driver.write(gpus(8))
    assert sample.gpus(wait=29) == []
    assert len(sample.gpus(wait=1)) == 8
    assert sample()["why"] is None


def test_a_driver_without_a_gpu_is_asked_again(driver: FakeDriver, sample: Sampler) -> None:
    driver.write([])
    assert sample()["why"] == "the NVIDIA driver sees no GPU"
    driver.write(gpus(1), generation=1)
    sample.gpus(wait=30)
    assert len(sample.gpus(wait=30)) == 1


def test_a_library_that_is_installed_after_the_start_is_found(tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("no C compiler here (cc or gcc); it makes the fake NVIDIA driver")
    (tmp_path / "lib").mkdir()
    driver = FakeDriver(tmp_path / "lib", tmp_path / "state")
    driver.write(gpus(2))
    sample = Sampler(driver)
    try:
        told = sample()
        if len(told["devices"]) > 1:
            pytest.skip("this machine has a real NVIDIA driver")
        assert "no NVIDIA driver library" in told["why"]
        build(tmp_path / "lib")
        assert len(sample.gpus(wait=30)) == 2
    finally:
        sample.close()


def test_what_a_gpu_does_not_support_is_left_out(driver: FakeDriver, sample: Sampler) -> None:
    lacking = "util,temp,power,processes,mig,ecc,remap,capability"
    driver.write([Gpu("GPU-0", unsupported=lacking), Gpu("", unsupported="uuid,name,memory")])
    first, second = sample.gpus()
    assert healthy([first, second]) == [True, True]
    assert (first.utilization_percent, first.temperature_c, first.power_w) == (None, None, None)
    assert (first.compute_capability, first.processes) == (None, ())
    assert (second.uuid, second.name, second.vram_used_mb) == (None, "NVIDIA GPU", None)
    assert second.vram_total_mb > 0  # it shares the machine's


def test_hostile_names_are_shown_harmlessly(driver: FakeDriver, sample: Sampler) -> None:
    evil = Process(FOREIGN.pid, GIB, b"/x/\xff\x1b]0;title\x07rm")
    names = [b"NVIDIA \xff\xfe\x1b[2J H100", b"\x80" * 90, b"  "]
    driver.write(
        [
            Gpu(b"GPU-\xff" + bytes([48 + n]), name, processes=(evil,))
            for n, name in enumerate(names)
        ]
    )
    found = sample.gpus()
    assert [device.name for device in found] == [
        "NVIDIA \ufffd\ufffd [2J H100",
        "\ufffd" * 90,
        "NVIDIA GPU",
    ]
    assert found[0].uuid == "GPU-\ufffd0"
    assert found[0].processes[0].name == "\ufffd ]0;title rm"


def test_a_driver_that_hangs_does_not_hang_a_sample(driver: FakeDriver, sample: Sampler) -> None:
    before = sample.gpus()
    driver.write(gpus(8), delay_ms=60_000)
    first, second = sample(), sample()
    assert 0.9 < first["took_s"] < 3
    assert second["took_s"] < 0.5
    assert [Device(**told) for told in second["devices"][:-1]] == before


# -- the real agent ----------------------------------------------------------------------------


async def beats(url: str) -> AsyncIterator[list[Device]]:
    """The GPUs in each heartbeat of a hive."""
    async with aiohttp.ClientSession(url) as http:
        async with http.get("/v1/heartbeats/stream") as stream:
            async with aclosing(sse.decode(stream.content.iter_any())) as events:
                async for event in events:
                    told = json.loads(event.data)["devices"]
                    yield [Device(**d) for d in told if d["device_type"] == "gpu"]


async def test_the_heartbeat_shows_foreign_memory_and_a_lost_gpu_soon(
    driver: FakeDriver, fresh: Cluster
) -> None:
    driver.write(gpus(8))
    hive = await fresh.hive(env=driver.env)
    machine = gpus(8)
    async with aclosing(beats(hive.url)) as heard:
        found = await anext(heard)
        assert healthy(found) == [True] * 8
        machine[2] = replace(machine[2], used=20 * GIB, processes=(FOREIGN,))
        driver.write(machine)
        async with asyncio.timeout(HEARD_WITHIN_S):
            while not (found := await anext(heard))[2].processes:
                pass
        assert found[2].vram_free_mb == 60 * 1024
        assert found[2].processes[0].used_mb == 20 * 1024
        driver.write([*machine[:5], replace(machine[5], error=GPU_IS_LOST), *machine[6:]])
        async with asyncio.timeout(HEARD_WITHIN_S):
            while all(healthy(found := await anext(heard))):
                pass
        assert healthy(found) == [index != 5 for index in range(8)]
        spawn = {"operation": "worker_spawn", "model": "hive-tiny", "worker": "cuda", "device": 5}
        with pytest.raises(HiveError, match="cuda:5 takes no work: GPU is lost"):
            await hive.client.run(spawn)
        driver.write(machine)
        async with asyncio.timeout(HEARD_WITHIN_S):
            while not all(healthy(await anext(heard))):
                pass


async def test_workers_of_a_lost_gpu_fail_with_that_reason_and_others_go_on(
    driver: FakeDriver, fresh: Cluster
) -> None:
    driver.write(gpus(8))
    hive = await fresh.hive(env=driver.env)
    script = {"tokens_per_second": 20}
    spawn = {"operation": "worker_spawn", "worker": "cuda"}
    for index, model in ((2, "well"), (5, "doomed")):
        options = {"engine": "scripted", "script": script}
        wanted = {**spawn, "model": model, "device": index, "options": options}
        await hive.client.run(wanted)

    async def whole(model: str) -> str:
        body = {"model": model, "stream": True, "max_tokens": 60}
        async with aiohttp.ClientSession(hive.url) as http:
            chat = {**body, "messages": [{"role": "user", "content": "hi"}]}
            async with http.post("/v1/chat/completions", json=chat) as got:
                begun[model].set()
                return await got.text()

    begun = {"well": asyncio.Event(), "doomed": asyncio.Event()}
    streams = [asyncio.create_task(whole(model)) for model in begun]
    await asyncio.gather(*(event.wait() for event in begun.values()))
    machine = gpus(8)
    driver.write([*machine[:5], replace(machine[5], error=GPU_IS_LOST), *machine[6:]])
    well, doomed = await asyncio.gather(*streams)
    assert well.rstrip().endswith("[DONE]")
    assert '"error"' in doomed
    workers = (await hive.client.run({"operation": "worker_list"}))["workers"]
    state = {worker["model"]: (worker["state"], worker.get("problem", "")) for worker in workers}
    assert state["well"] == ("ready", "")
    assert state["doomed"][0] == "failed"
    assert "its device cuda:5 is lost: GPU is lost" in state["doomed"][1]
    infer = {"operation": "infer", "model": "doomed", "prompt": "hi"}
    with pytest.raises(HiveError, match="GPU is lost"):
        await hive.client.run(infer)


async def test_a_driver_that_falls_silent_for_a_while_takes_no_worker_with_it(
    driver: FakeDriver, fresh: Cluster
) -> None:
    driver.write(gpus(2))
    hive = await fresh.hive(env=driver.env)
    spawn = {"operation": "worker_spawn", "model": "parrot", "worker": "cuda", "device": 1}
    worker = await hive.client.run({**spawn, "options": {"engine": "scripted"}})
    async with aclosing(beats(hive.url)) as heard:
        await anext(heard)
        for generation, error in ((0, VERSION_MISMATCH), (1, 0)):
            driver.write(gpus(2), generation=generation, error=error)
            async with asyncio.timeout(2 * HEARD_WITHIN_S):
                while all(healthy(await anext(heard))) is bool(error):
                    pass
            asked = {"operation": "worker_get", "worker_id": worker["worker_id"]}
            now = await hive.client.run(asked)
            assert (now["state"], now["pid"]) == ("ready", worker["pid"])


async def test_a_worker_of_the_hive_is_no_foreign_process(
    driver: FakeDriver, fresh: Cluster
) -> None:
    driver.write(gpus(1))
    hive = await fresh.hive(env=driver.env)
    worker = await spawn_scripted(hive)
    ours = replace(FOREIGN, pid=worker["pid"])
    driver.write([replace(gpus(1)[0], used=20 * GIB, processes=(ours, FOREIGN))])
    async with aclosing(beats(hive.url)) as heard:
        async with asyncio.timeout(HEARD_WITHIN_S):
            while not (found := await anext(heard))[0].processes:
                pass
    assert [process.pid for process in found[0].processes] == [FOREIGN.pid]


# -- AMD GPUs and the CPU ----------------------------------------------------------------------


def card(sysfs: Path, name: str, **files: str) -> None:
    pci = sysfs / "devices" / f"0000:{len(name):02x}:00.{name[-1]}"
    pci.mkdir(parents=True)
    for file, text in files.items():
        (pci / file).write_text(f"{text}\n")
    (sysfs / "class" / "drm" / name).mkdir(parents=True)
    (sysfs / "class" / "drm" / name / "device").symlink_to(pci)


def test_amd_gpus_are_listed_and_take_no_work(tmp_path: Path) -> None:
    assert Amd(tmp_path).sample() == []
    memory = {"mem_info_vram_total": str(24 * GIB), "mem_info_vram_used": str(GIB)}
    card(tmp_path, "card10", vendor="0x1002", device="0x73bf")
    card(tmp_path, "card2", vendor="0x1002", product_name="RX 7900", gpu_busy_percent="7", **memory)
    card(tmp_path, "card1", vendor="0x10de", device="0x2330")
    (tmp_path / "class" / "drm" / "card2-DP-1").mkdir()
    first, second = Amd(tmp_path).sample()
    assert (first.id, first.name, first.utilization_percent) == ("rocm:0", "RX 7900", 7)
    assert (first.vram_total_mb, first.vram_used_mb, first.vram_free_mb) == (24576, 1024, 23552)
    assert first.pci_address == "0000:05:00.2"
    assert (second.id, second.name, second.vram_used_mb) == ("rocm:1", "AMD GPU 1002:73bf", None)
    assert not first.healthy
    assert "use the CPU" in str(first.problem)


def proc_of(folder: Path, *mounts: str, cgroup: str, cpuinfo: str = "") -> Path:
    """A ``/proc`` of a process in a cgroup."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(cgroup)
    (folder / "proc" / "self" / "mountinfo").write_text("\n".join(mounts))
    (folder / "proc" / "cpuinfo").write_text(cpuinfo)
    return folder / "proc"


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("100000000 100000", None)],
)
def test_cores_are_limited_by_the_group_above_in_version_2(
    tmp_path: Path, quota: str, expected: int | None
) -> None:
    top = tmp_path / "cg"
    write(top / "pod", cpu_max=quota)
    write(top / "pod" / "box", cpu_max="max 100000")
    mount = f"30 29 0:26 / {top} rw - cgroup2 cgroup2 rw"
    proc = proc_of(tmp_path, mount, cgroup="0::/pod/box\n")
    assert cores(proc) == (expected or len(os.sched_getaffinity(0)))


def test_cores_are_limited_by_version_1(tmp_path: Path) -> None:
    folder = tmp_path / "cg"
    folder.mkdir()
    (folder / "cpu.cfs_quota_us").write_text("150000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    mount = f"30 29 0:26 /docker/abc {folder} rw - cgroup cgroup rw,cpu,cpuacct"
    proc = proc_of(tmp_path, mount, cgroup="5:cpuacct,cpu:/docker/abc\n0::/\n")
    assert cores(proc) == 1
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cores(proc) == len(os.sched_getaffinity(0))


def test_memory_is_limited_by_all_groups_of_version_2(tmp_path: Path) -> None:
    top = tmp_path / "cg"
    write(top / "pod", memory_max="6000", memory_current="5500")
    write(top / "pod" / "box", memory_max="4000", memory_current="1000")
    mount = f"30 29 0:26 / {top} rw - cgroup2 cgroup2 rw"
    proc = proc_of(tmp_path, mount, cgroup="0::/pod/box\n")
    folders = list(groups("", proc))
    assert folders == [top / "pod" / "box", top / "pod", top]
    assert limited(Memory(9000, 8000), folders) == Memory(4000, 500)
    write(top / "pod", memory_max="max")
    assert limited(Memory(9000, 8000), folders) == Memory(4000, 3000)
    assert limited(Memory(3000, 200), folders) == Memory(3000, 200)


def test_memory_is_limited_by_version_1(tmp_path: Path) -> None:
    write(tmp_path, memory_limit_in_bytes="4000", memory_usage_in_bytes="4500")
    assert limited(Memory(9000, 8000), [tmp_path]) == Memory(4000, 0)
    write(tmp_path, memory_limit_in_bytes="9223372036854771712")
    assert limited(Memory(9000, 8000), [tmp_path]) == Memory(9000, 8000)


@pytest.mark.parametrize("stat", ["inactive_file 1000\n", "total_inactive_file 1000\n"])
def test_files_that_were_read_do_not_fill_a_groups_memory(tmp_path: Path, stat: str) -> None:
    write(tmp_path, memory_limit_in_bytes="4000", memory_usage_in_bytes="3500")
    (tmp_path / "memory.stat").write_text(f"anon 2500\n{stat}")
    assert limited(Memory(9000, 8000), [tmp_path]) == Memory(4000, 1500)


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("flags\t\t: fpu avx2 avx512f amx_tile\n", ("avx2", "avx512f", "amx")),
        ("flags : fpu avx avx512_bf16\n", ()),
        ("Features\t: fp asimd neon\n", ("neon",)),
    ],
)
def test_instruction_sets_are_those_that_matter(
    tmp_path: Path, cpuinfo: str, found: tuple[str, ...]
) -> None:
    assert instruction_sets(proc_of(tmp_path, cgroup="", cpuinfo=cpuinfo)) == found


# -- the table ---------------------------------------------------------------------------------


def gpu(number: int, **more: Any) -> tuple[str, Device]:
    given = {"vram_total_mb": 81559, "vram_free_mb": 60000, "vram_used_mb": 21559, **more}
    name = given.pop("name", "NVIDIA H100 80GB HBM3")
    return "a", Device(id=f"cuda:{number}", name=name, device_type="gpu", **given)


def test_the_table_of_devices_fits_80_columns() -> None:
    others = (
        DeviceProcess(pid=7, name="small", used_mb=300),
        DeviceProcess(pid=8, name="python3.11", used_mb=20480),
    )
    table = tables.devices(
        [
            gpu(0, utilization_percent=100, temperature_c=64, processes=others),
            gpu(1, name="NVIDIA A100-SXM4-40GB MIG 1g.5gb", compute_capability="8.0"),
            gpu(2, vram_used_mb=None, healthy=False, problem="GPU is lost"),
        ]
    )
    kept = [place for place in range(len(table.columns)) if worth_showing(table, place)]
    shown = Table([table.columns[n] for n in kept], [[r[n] for n in kept] for r in table.rows], "")
    assert aligned(shown) == [
        "DEVICE  NAME                        MEMORY USED  BUSY  TEMP  REMARK",
        "cuda:0  H100 80GB HBM3             21.1/79.6 GB  100%  64°C  python3… 20.0 GB +1",
        "cuda:1  A100-SXM4-40GB MIG 1g.5gb  21.1/79.6 GB     -     -  compute 8.0",
        "cuda:2  H100 80GB HBM3                  79.6 GB     -     -  GPU is lost",
    ]
    assert max(len(line) for line in aligned(shown)) <= 80
