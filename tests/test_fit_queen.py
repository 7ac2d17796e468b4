"""Where a new worker goes: to the hive on which it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from operations.errors import HiveError, Unavailable, WontFit
from operations.hosts import Device, Fit, HiveInfo, ModelInfo, WorkerInfo
from operations.operations import WorkerSpawn
from queen.scheduler import full_name, place_worker, to_be_asked, verdict_for
from tests.cluster import Cluster, until
from tests.fake_nvml.driver import GIB, FakeDriver, gpus
from tests.gguf_files import write_llama


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


def fit(hive_id: str, device: str = "cpu", missing_mb: int = 0) -> Fit:
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
    gpu, fits = hive("h", "cuda:0", "cuda:1"), [fit("h", "cuda:0", 5), fit("h", "cuda:1"), fit("h")]

    def counts(**asked: object) -> Fit | None:
        return verdict_for(WorkerSpawn.model_validate({"model": "m", **asked}), gpu, fits)

    assert counts() == fits[1]
    assert counts(worker="cpu") == fits[2]
    assert counts(worker="cuda", device=0) == fits[0]
    assert counts(worker="cuda", gpus=2) is None
    assert counts(worker="cuda", device=7) is None
    assert verdict_for(WorkerSpawn(model="m"), hive("h"), fits) == fits[2]


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
    queen = await fresh.queen()
    hives = [
        await fresh.hive("a-crowded", queen=queen, env=driver.env),
        await fresh.hive("b-crowded", queen=queen, env=driver.env),
        await fresh.hive("roomy", queen=queen),
    ]
    for one in hives:
        await one.client.run({"operation": "model_download", "model": path})

    async def known() -> bool:
        told = (await queen.client.run({"operation": "model_list"}))["models"]
        return sum(one["id"] == path for one in told) == len(hives)

    await until(known, "the queen to know all three")
    spawned = {"operation": "worker_spawn", "model": path}
    worker = await queen.client.run(spawned)
    assert (worker["hive_id"], worker["device"]) == ("roomy", "cpu")
    with pytest.raises(WontFit, match=r"fits on no hive\. Best on [ab]-crowded: .* on cuda:0"):
        await queen.client.run({**spawned, "worker": "cuda"})
    with pytest.raises(HiveError, match="does not compute on cuda"):  # the driver is a fake
        await queen.client.run({**spawned, "worker": "cuda", "force": True})
