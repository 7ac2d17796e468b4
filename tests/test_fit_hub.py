"""Whether a model that is not here would fit, told from what the hub says of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hive_agent.fit.facts import from_config, from_gguf
from hive_agent.known import at_hub, facts_of
from hive_agent.memory import request_for
from hive_agent.models.gguf import read_beginning, read_header
from hive_agent.models.hub import Hub
from hive_agent.models.references import parse_reference
from hive_agent.models.transfer import Retry
from hive_agent.workers.launch import decide
from operations.errors import Conflict, Forbidden, HiveError, InvalidRequest, NotFound, Unavailable
from operations.hosts import Device, ModelInfo
from operations.operations import WorkerSpawn
from tests.cluster import Cluster
from tests.fake_nvml.driver import GIB, FakeDriver, gpus
from tests.fit_models.configs import PUBLIC
from tests.fit_models.shapes import Shape, write_shape
from tests.gguf_files import write_llama, write_projector
from tests.hub import HubServer, IgnoreRange, Stall, Status

MIB = 2**20
WORDY = Shape(width=128, heads=2, kv_heads=2, layers=2, feed_forward=256, vocabulary=100_000)
"""Its tokenizer alone takes more than the first piece that is read."""


@pytest.fixture
async def server() -> AsyncIterator[HubServer]:
    async with HubServer(cdn=True) as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> Hub:
    retry = Retry(attempts=1, base_s=0.01, stall_s=2)
    return Hub(cache_dir=tmp_path / "cache", endpoint=server.url, retry=retry)


@pytest.fixture(scope="session")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape(tmp_path_factory.mktemp("models") / "wordy-F16.gguf", WORDY)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "small.gguf")


def header_bytes(path: Path) -> int:
    return path.stat().st_size - read_header(path).tensors.data


def env(server: HubServer, folder: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hf")}


def asked(model: str, **options: Any) -> dict[str, Any]:
    return {"operation": "model_fit", "model": model, "options": options}


# --- what is read ----------------------------------------------------------------------------


async def test_the_beginning_of_a_gguf_is_enough(
    server: HubServer, hub: Hub, wordy: Path, tmp_path: Path
) -> None:
    needed = header_bytes(wordy)
    assert MIB < needed < wordy.stat().st_size // 2
    server.add("org/wordy-GGUF", {"wordy-F16.gguf": wordy})
    server.fault("wordy-F16.gguf", Stall(after=2 * needed + MIB))
    known = await at_hub(hub, parse_reference("org/wordy-GGUF"))
    assert known.facts == from_gguf([read_header(wordy)])
    assert known.model.id == "org/wordy-GGUF:F16"
    assert known.model.size_bytes == wordy.stat().st_size
    assert known.model.context_length == 32_768
    (there,) = server.ranges("wordy-F16.gguf")
    assert there is not None
    assert not (tmp_path / "cache").exists()


async def test_a_server_that_knows_no_ranges_serves_too(
    server: HubServer, hub: Hub, wordy: Path
) -> None:
    server.add("org/wordy-GGUF", {"wordy-F16.gguf": wordy})
    server.fault("wordy-F16.gguf", IgnoreRange())
    known = await at_hub(hub, parse_reference("org/wordy-GGUF:F16"))
    assert known.facts == from_gguf([read_header(wordy)])


def test_every_beginning_of_a_header_gives_it_or_asks_for_more(small: Path) -> None:
    data, whole = small.read_bytes(), read_header(small)
    needed = header_bytes(small)
    for count in range(0, needed + 2 * MIB, 10_007):
        found = read_beginning(data[:count], len(data), "small.gguf")
        assert found in (None, whole)
        assert found == whole or count < needed + MIB


async def test_all_parts_of_a_split_model_count(server: HubServer, hub: Hub, small: Path) -> None:
    data = small.read_bytes()
    names = [f"big-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    sizes = {names[1]: 3 * GIB, names[2]: 2 * GIB}
    server.add("org/big", {names[0]: data, names[1]: b"x", names[2]: b"x"}, claimed_sizes=sizes)
    known = await at_hub(hub, parse_reference("org/big:Q8_0"))
    assert known.facts is not None
    alone = from_gguf([read_header(small)])
    assert known.facts.weights == pytest.approx(alone.weights + 5 * GIB, abs=1000)
    assert known.facts.vocabulary == alone.vocabulary
    assert not server.seen(names[1])


async def test_what_lets_a_model_see_is_counted_once_here_and_at_the_hub(
    server: HubServer, hub: Hub, small: Path, tmp_path: Path
) -> None:
    projector = write_projector(tmp_path / "mmproj-F16.gguf")
    server.add("org/seeing", {"m-F16.gguf": small, "mmproj-F16.gguf": projector})
    server.add("org/blind", {"m-F16.gguf": small})
    seeing = (await at_hub(hub, parse_reference("org/seeing:F16"))).facts
    blind = (await at_hub(hub, parse_reference("org/blind:F16"))).facts
    assert seeing is not None
    assert blind is not None
    size = projector.stat().st_size
    assert seeing == replace(blind, other=blind.other + size)

    model = ModelInfo(
        id="m",
        digest="",
        format="gguf",
        size_bytes=small.stat().st_size + size,
        source="file",
        path=str(small),
        projector=str(projector),
    )
    here = await facts_of(model)
    assert here is not None
    assert here.other == seeing.other
    cpu = Device(id="cpu", name="c", device_type="cpu", vram_total_mb=9999, vram_free_mb=9999)
    operation = WorkerSpawn(model="m", worker="cpu")
    spec = decide(operation, model, [cpu], worker_id="w-1", cores=1, threads_in_use=0)
    assert request_for(spec, here, [cpu]).facts.other == seeing.other


async def test_safetensors_are_told_by_their_config_and_sizes(server: HubServer, hub: Hub) -> None:
    public = PUBLIC["Llama-3.1-8B"]
    weights = {"model-00001-of-00002.safetensors": 10 * GIB, "model-00002-of-00002.safetensors": 0}
    weights["model-00002-of-00002.safetensors"] = public.weights - 10 * GIB
    config = {**public.config, "max_position_embeddings": 131_072}
    files = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"}
    server.add("org/llama", {**files, **dict.fromkeys(weights, b"x")}, claimed_sizes=weights)
    known = await at_hub(hub, parse_reference("org/llama"))
    assert known.facts is not None
    assert known.facts.weights == pytest.approx(public.weights, rel=1e-6)
    assert known.model.format == "safetensors"
    assert known.model.context_length == 131_072


async def test_safetensors_on_disk_are_told_by_the_same(tmp_path: Path) -> None:
    public = PUBLIC["Qwen3-0.6B"]
    (tmp_path / "config.json").write_text(json.dumps(public.config))
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(public.weights)  # a sparse file
    model = ModelInfo(
        id="m", digest="sha256:1", format="safetensors", size_bytes=1, source="file",
        path=str(tmp_path),
    )  # fmt: skip
    assert await facts_of(model) == from_config(public.config, public.weights, "sha256:1")
    (tmp_path / "config.json").write_text('{"model_type": "odd"}')
    assert await facts_of(model) is None


@pytest.mark.parametrize("config", [b"[]", b"{", b'{"model_type": 7}', b"\xff" * 100])
async def test_a_config_that_is_none_is_refused(server: HubServer, hub: Hub, config: bytes) -> None:
    server.add("org/odd", {"config.json": config, "model.safetensors": b"x"})
    with pytest.raises(InvalidRequest, match=r"config\.json of org/odd is no configuration"):
        await at_hub(hub, parse_reference("org/odd"))


async def test_what_is_no_gguf_is_refused(server: HubServer, hub: Hub) -> None:
    server.add("org/odd", {"odd-Q8_0.gguf": b"<html>" * 1000})
    with pytest.raises(InvalidRequest, match=r"odd-Q8_0\.gguf is no GGUF file"):
        await at_hub(hub, parse_reference("org/odd"))


async def test_a_header_that_never_ends_is_given_up(
    server: HubServer, hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_agent.models.remote.MOST_HEADER_BYTES", 8192)
    server.add("org/long", {"long-Q8_0.gguf": small.read_bytes()})
    with pytest.raises(InvalidRequest, match="has a header of more than"):
        await at_hub(hub, parse_reference("org/long"))


async def test_files_that_are_not_for_us_are_told_as_such(server: HubServer, hub: Hub) -> None:
    server.add("org/gated", {"m-Q8_0.gguf": b"GGUF"}, gated=True)
    with pytest.raises(Forbidden, match="is gated"):
        await at_hub(hub, parse_reference("org/gated"))
    server.add("org/broken", {"m-Q8_0.gguf": b"GGUF"})
    server.fault("m-Q8_0.gguf", Status(500))
    with pytest.raises(Unavailable, match=r"The beginning of m-Q8_0\.gguf could not be read"):
        await at_hub(hub, parse_reference("org/broken"))
    server.add("org/silent", {"m-Q8_0.gguf": b"GGUF" * 100})
    server.fault("m-Q8_0.gguf", Stall(after=2))
    with pytest.raises(Unavailable, match="nothing came for"):
        await at_hub(hub, parse_reference("org/silent"))
    with pytest.raises(NotFound):
        await at_hub(hub, parse_reference("org/nothing"))
    server.add("org/two", {"a-Q8_0.gguf": b"GGUF", "b-Q8_0.gguf": b"GGUF"})
    with pytest.raises(Conflict, match="fits more than one model"):
        await at_hub(hub, parse_reference("org/two:Q8_0"))


# --- over the wire ---------------------------------------------------------------------------


async def test_a_hive_that_lacks_a_model_answers_as_one_that_has_it(
    fresh: Cluster, server: HubServer, wordy: Path, tmp_path: Path
) -> None:
    server.add("org/wordy-GGUF", {"wordy-F16.gguf": wordy})
    queen = await fresh.queen()
    has = await fresh.hive("has", queen=queen, env=env(server, tmp_path / "has"))
    await fresh.hive("lacks", queen=queen, env=env(server, tmp_path / "lacks"))
    await has.client.run({"operation": "model_download", "model": "org/wordy-GGUF:F16"})
    fits = (await queen.client.run(asked("org/wordy-GGUF:F16", slots=2)))["fits"]
    told = {fit["hive_id"]: fit for fit in fits}
    assert told["has"]["on_disk"]
    assert not told["lacks"]["on_disk"]
    parts = ("model", "engine", "weights_mb", "kv_cache_mb", "compute_mb", "overhead_mb", "fits")
    assert {p: told["has"][p] for p in parts} == {p: told["lacks"][p] for p in parts}


async def test_a_model_that_does_not_fit_is_offered_as_another_file_of_its_repository(
    fresh: Cluster, server: HubServer, wordy: Path, tmp_path: Path, driver: FakeDriver
) -> None:
    driver.write([replace(gpus(1)[0], total=24 * GIB)])
    sizes = {"m-F16.gguf": 60 * GIB, "m-Q8_0.gguf": 30 * GIB, "m-Q4_K_M.gguf": 17 * GIB}
    server.add("org/m", dict.fromkeys(sizes, wordy), claimed_sizes=sizes)
    server.fault("m-F16.gguf", Stall(after=wordy.stat().st_size))
    hive = await fresh.hive(env={**env(server, tmp_path), **driver.env})
    gpu = (await hive.client.run(asked("org/m:F16", context_length=512)))["fits"][0]
    assert (gpu["device"], gpu["fits"]) == ("cuda:0", False)
    assert gpu["suggestions"][0].startswith("Take it as Q4_K_M: 17.")


async def test_safetensors_at_the_hub_are_predicted_for_vllm(
    fresh: Cluster, server: HubServer, tmp_path: Path, driver: FakeDriver
) -> None:
    """Llama 3.1 8B, 15 GiB of weights and 2 GiB for 4 x 4,096 tokens, on GPUs of 16 GiB."""
    driver.write([replace(one, total=16 * GIB) for one in gpus(2)])
    public = PUBLIC["Llama-3.1-8B"]
    files = {"config.json": json.dumps(public.config).encode(), "model.safetensors": b"x"}
    server.add("org/llama", files, claimed_sizes={"model.safetensors": public.weights})
    hive = await fresh.hive(env={**env(server, tmp_path), **driver.env})
    fits = {fit["device"]: fit for fit in (await hive.client.run(asked("org/llama")))["fits"]}
    assert {fit["engine"] for fit in fits.values()} == {"vllm"}
    assert "hive engines install vllm" in fits["cuda:0,1"]["engine_problem"]
    assert not fits["cuda:0"]["fits"]
    assert fits["cuda:0,1"]["fits"]
    assert fits["cuda:0,1"]["kv_cache_mb"] == fits["cuda:0"]["kv_cache_mb"] == 2048
    assert fits["cuda:0,1"]["weights_mb"] == pytest.approx(public.weights / MIB, abs=2)


async def test_a_name_that_no_hub_could_know_is_looked_for_on_disk_only(
    fresh: Cluster, server: HubServer, tmp_path: Path
) -> None:
    hive = await fresh.hive(env=env(server, tmp_path))
    with pytest.raises(HiveError, match="There is no model 'nothing'") as refused:
        await hive.client.run(asked("nothing"))
    assert refused.value.status == 404
    assert not server.requests
    with pytest.raises(HiveError, match="has no 'org/nothing' that we may see") as refused:
        await hive.client.run(asked("org/nothing"))
    assert refused.value.status == 404
