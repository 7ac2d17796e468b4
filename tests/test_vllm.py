"""The real vLLM server, on the CPU, under a hive and a queen; ``make test-vllm`` runs this."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from hive_agent.workers.command import launch
from hive_agent.workers.engine_log import explain
from operations.errors import HiveError
from tests.cluster import Cluster, Daemon, alive, clean_env, cluster, until
from tests.test_engines import GOLDEN, INSTALL_S, spec

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(INSTALL_S)]
LOAD_S = 150

QUESTION = "What is Hive?"


@asynccontextmanager
async def hive_with_vllm(made: Cluster, engines: Path, *, queen: Daemon | None = None) -> Any:
    """A hive whose folder of engines is the one that the tests share."""
    state = made.folder / "gpu-0" / "agent"
    state.mkdir(parents=True)
    (state / "engines").symlink_to(engines)
    yield await made.hive("gpu-0", queen=queen)


@pytest.fixture(scope="module")
async def vllm_room(
    vllm_engines: Path, hive_tiny_folder: Path
) -> AsyncIterator[tuple[Daemon, Daemon, dict[str, Any], Sequence[str]]]:
    """A queen, her hive, the worker that was spawned through her, and what was told meanwhile."""
    async with cluster() as made:
        queen = await made.queen()
        async with hive_with_vllm(made, vllm_engines, queen=queen) as hive:
            lines: list[str] = []
            stream = await queen.client.submit_and_stream(operation(hive_tiny_folder), lines.append)
            yield queen, hive, stream.value(), lines


def operation(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "operation": "worker_spawn",
        "model": f"file:{folder}",
        "worker": "cpu",
        "force": bool(options.pop("force", False)),
        "options": {"engine": "vllm", "dtype": "float32", "context_length": 1024, **options},
    }


Room = tuple[Daemon, Daemon, dict[str, Any], Sequence[str]]


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
    while True:
        answer = await http.post(f"{url}/v1/chat/completions", json=body)
        # vLLM may leave the hive no time to speak; the queen asks for a retry then.
        if answer.status != 503:
            return answer
        answer.release()
        await asyncio.sleep(1)


async def asked(url: str, model: str, messages: list[dict[str, str]], **more: Any) -> Any:
    body = {"model": model, "messages": messages, "temperature": 0, **more}
    async with aiohttp.ClientSession() as http:
        async with await post(http, url, body) as answer:
            return answer.status, await answer.json()


def question(text: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def text_of(url: str, model: str, text: str = QUESTION) -> str:
    status, answer = await asked(url, model, question(text), max_tokens=64)
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])


async def test_a_worker_tells_how_far_it_is_and_becomes_ready(vllm_room: Room) -> None:
    _, _, worker, lines = vllm_room
    assert worker["state"] == "ready"
    assert worker["engine"] == "vllm"
    told = [line.removeprefix("[INFO] ") for line in lines]
    for step in ("it is a LlamaForCausalLM", "loading weights 1/1", "starting its server"):
        assert step in told, lines


@pytest.mark.parametrize("door", ["queen", "hive"])
async def test_the_golden_answers_come_through(door: str, vllm_room: Room) -> None:
    daemon = vllm_room[0] if door == "queen" else vllm_room[1]
    for wanted in json.loads(GOLDEN.read_text())[:12]:
        status, answer = await asked(
            daemon.url, "hive-tiny", wanted["messages"], max_tokens=wanted["max_tokens"]
        )
        assert status == 200, answer
        choice = answer["choices"][0]
        assert choice["message"]["content"] == wanted["text"]
        assert choice["finish_reason"] == wanted["stop_reason"]


async def test_an_infer_job_streams_its_tokens(vllm_room: Room) -> None:
    queen = vllm_room[0]
    tokens: list[str] = []
    end: dict[str, Any] = {}

    def hear(line: str) -> None:
        if line.startswith("{"):
            event = json.loads(line)
            if event["type"] == "token":
                tokens.append(event["t"])
            end.update(event)

    infer = {"operation": "infer", "model": "hive-tiny", "prompt": QUESTION, "temperature": 0}
    await queen.client.submit_and_stream(infer, hear)
    assert "".join(tokens) == end["text"] == await text_of(queen.url, "HIVE-tiny")
    assert end["stop_reason"] == "stop"


async def test_a_caller_that_hangs_up_frees_the_slot(vllm_room: Room) -> None:
    queen, _, worker, _ = vllm_room
    body = {
        "model": "hive-tiny",
        "messages": question("Count to 100."),
        "stream": True,
        "max_tokens": 900,
        "ignore_eos": True,
    }
    async with aiohttp.ClientSession() as http:
        answer = await post(http, queen.url, body)
        assert answer.status == 200, await answer.text()
        await answer.content.readany()

        async def running_are(count: int) -> bool:
            return await running(worker["socket"]) == count

        # vLLM counts a request after it has let its first token go.
        await until(lambda: running_are(1), "vLLM's own count to be 1", within_s=5)
        answer.close()
        await until(lambda: running_are(0), "vLLM's own count to be 0", within_s=5)


async def running(socket: str) -> int:
    """Requests that vLLM works on, by its own metrics."""
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as http:
        async with http.get("http://worker/metrics") as answer:
            lines = (await answer.text()).splitlines()
    return int(
        sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_r"))
    )


async def test_prompts_are_in_no_log(vllm_room: Room) -> None:
    queen, hive, worker, _ = vllm_room
    await text_of(queen.url, "hive-tiny", "What is a xylophone-77?")
    for log in (queen.log, hive.log, Path(worker["log"]).read_text()):
        assert "xylophone-77" not in log


async def test_bad_requests_are_the_callers_fault(vllm_room: Room) -> None:
    queen = vllm_room[0]
    for more in ({"max_tokens": 10**6 - 1}, {"tools": 5}, {"response_format": {"type": "x"}}):
        status, answer = await asked(queen.url, "hive-tiny", question(), **more)
        assert status == 400, answer
        assert answer["error"]["message"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"flags": {"enable-prefix-cachin": True}}, "Did you mean --enable-prefix-caching"),
        ({"flags": {"host": "0.0.0.0"}}, "refused"),
        ({"memory_share": 0.5}, "share of a GPU's memory"),
        ({"flags": {"max-model-len": 12}}, "options.context_length"),
        ({"lora": [{"name": "x", "path": "/nonexistent"}]}, "no adapter_config.json"),
        ({"engine_version": "0.1"}, "0.1"),
        ({"kv_type": "q8_0"}, "q8_0"),
        ({"projector": "/x"}, "projector"),
    ],
)
async def test_options_that_will_not_do_are_refused_at_once(
    options: dict[str, Any], says: str, vllm_room: Room, hive_tiny_folder: Path
) -> None:
    queen = vllm_room[0]
    with pytest.raises(HiveError, match=says) as refused:
        await queen.client.submit(operation(hive_tiny_folder, **options))
    assert 400 <= refused.value.status < 504


async def test_a_lora_is_asked_for_by_its_name_beside_its_base(
    vllm_room: Room, hive_tiny_folder: Path, tmp_path: Path
) -> None:
    queen, hive, first, _ = vllm_room
    adapter = write_adapter(tmp_path / "adapter")
    worker = await queen.client.run(
        operation(
            hive_tiny_folder,
            lora=[{"name": "Pirate", "path": str(adapter)}],
            flags={"enable-prefix-caching": False},
        )
    )
    models = [model["id"] for model in (await queen.client.get("/v1/models"))["data"]]
    assert "Pirate" in models
    base = await text_of(queen.url, "hive-tiny")
    changed = {await text_of(url, "pirate") for url in (queen.url, hive.url)}
    assert len(changed) == 1
    assert changed != {base}
    assert worker["digest"] == first["digest"]
    await queen.client.run(
        {"operation": "worker_process_delete", "worker_id": worker["worker_id"], "hive_id": "gpu-0"}
    )
    status, answer = await asked(queen.url, "pirate", question())
    assert status == 404, answer


def write_adapter(folder: Path) -> Path:
    """A LoRA of rank 8 on the first block's queries of hive-tiny, large enough to be heard."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{at}.lora_A.weight": generator.normal(0, 1, (8, 256)).astype(np.float32),
            f"{at}.lora_B.weight": generator.normal(0, 1, (256, 8)).astype(np.float32),
        },
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "hive-tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


async def test_a_dead_engine_core_is_an_error_a_restart_and_an_answer(vllm_room: Room) -> None:
    """vLLM computes in a process of its own; its server outlives it, and answers nothing."""
    queen, hive, worker, _ = vllm_room
    before = await text_of(queen.url, "hive-tiny")
    server = psutil.Process(worker["pid"])
    cores = [p for p in server.children(recursive=True) if "EngineCore" in p.name() + title(p)]
    assert cores, [title(p) for p in server.children(recursive=True)]
    os.kill(cores[0].pid, signal.SIGKILL)

    async def again() -> bool:
        (now,) = [
            one
            for one in (await hive.client.run({"operation": "worker_process_list"}))["workers"]
            if one["worker_id"] == worker["worker_id"]
        ]
        return bool(now["state"] == "ready" and now["restarts"] >= 1)

    await until(again, "the worker to be back", within_s=LOAD_S, every_s=0.5)
    assert await text_of(queen.url, "hive-tiny") == before


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def test_a_damaged_file_is_refused_before_anything_starts(
    vllm_room: Room, hive_tiny_folder: Path, tmp_path: Path
) -> None:
    broken = copied(hive_tiny_folder, tmp_path)
    os.truncate(broken / "model.safetensors", 5_000_000)
    with pytest.raises(HiveError, match="5000000 bytes") as refused:
        await vllm_room[1].client.submit(operation(broken))
    assert refused.value.status == 400


async def test_an_unknown_architecture_is_explained(
    vllm_room: Room, hive_tiny_folder: Path, tmp_path: Path
) -> None:
    odd = copied(hive_tiny_folder, tmp_path)
    config = odd / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NoSuchForCausalLM"))
    with pytest.raises(HiveError, match=r"does not know this model's architecture .*NoSuch"):
        await vllm_room[1].client.run(operation(odd))


async def test_too_little_memory_is_explained(
    vllm_room: Room, hive_tiny_folder: Path, tmp_path: Path
) -> None:
    """8,192 tokens × 4 KiB a slot, and so many slots that the machine has not as much."""
    slots = psutil.virtual_memory().total * 5 // 4 // 2**25
    if slots > 4096:
        pytest.skip("this machine has too much memory to run out of it like this")
    long = shutil.copytree(hive_tiny_folder, tmp_path / "long")
    config = json.loads((long / "config.json").read_text())
    config["max_position_embeddings"] = 8192
    (long / "config.json").write_text(json.dumps(config))
    flags = {"max-num-batched-tokens": max(8192, 2 * slots)}
    wanted = operation(long, slots=slots, context_length=8192, flags=flags, force=True)
    with pytest.raises(HiveError, match=r"not enough memory .*'hive fit MODEL'"):
        await vllm_room[1].client.run(wanted)


async def test_a_missing_kernel_is_explained(vllm_room: Room, hive_tiny_folder: Path) -> None:
    """Quantization to FP8 is declared on the CPU, and not built for it."""
    with pytest.raises(HiveError, match=r"no kernel for this model on this device .*fp8"):
        await vllm_room[1].client.run(
            operation(hive_tiny_folder, quantization="fp8", dtype="bfloat16")
        )


async def test_a_configuration_that_vllm_refuses_is_told_in_its_words(
    vllm_room: Room, hive_tiny_folder: Path
) -> None:
    wanted = operation(hive_tiny_folder, slots=4096, force=True)
    with pytest.raises(HiveError, match=r"max_num_batched_tokens \(\d+\) must be greater"):
        await vllm_room[1].client.run(wanted)


async def test_a_socket_that_cannot_be_had_is_explained(
    vllm_python: Path, hive_tiny_folder: Path
) -> None:
    wanted = spec("vllm", hive_tiny_folder, str(vllm_python), dtype="float32")
    command = launch(wanted, Path("/nonexistent/w.sock"))
    process = await asyncio.create_subprocess_exec(
        *command.argv,
        env=command.environment(clean_env()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    failure = explain(said.decode().splitlines())
    assert failure is not None
    assert failure.kind == "engine_socket"


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


async def test_nothing_is_left_of_a_worker_that_was_stopped(vllm_room: Room) -> None:
    _, hive, worker, _ = vllm_room
    (now,) = (await hive.client.run({"operation": "worker_process_list"}))["workers"]
    server = psutil.Process(now["pid"])
    family = [server, *server.children(recursive=True)]
    assert len(family) > 1
    shared = shared_memory(family)
    assert shared
    await hive.client.run({"operation": "worker_process_delete", "worker_id": worker["worker_id"]})
    assert not any(alive(one.pid) for one in family)
    assert not Path(now["socket"]).exists()
    assert [path for path in shared if path.exists()] == []


def shared_memory(processes: Sequence[psutil.Process]) -> set[Path]:
    """The named shared memory that processes have mapped and that is still there."""
    mapped = {Path(area.path) for one in processes for area in one.memory_maps()}
    return {path for path in mapped if path.is_relative_to("/dev/shm") and path.exists()}
