"""The suite that every engine passes, run against the engine's own socket.

vLLM takes its part in ``make test-vllm``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import hive_agent
from hive_agent.processes import signal_group
from hive_agent.workers.command import launch
from hive_agent.workers.spec import WorkerSpec
from operations.hosts import ModelInfo
from operations.operations import WorkerOptions
from tests.cluster import clean_env, until

SHIPPED = Path(hive_agent.__file__).parent / "shipped" / "hive-tiny.Q8_0.gguf"
GOLDEN = Path(__file__).parent / "golden" / "hive-tiny.json"
SLOTS = 4
START_S = 120  # vLLM takes half a minute on two idle cores
INSTALL_S = 900  # the first test that needs vLLM waits until it is installed
VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(INSTALL_S)])


@dataclass
class Engine:
    """A running engine process and a session on its socket."""

    name: str
    http: aiohttp.ClientSession
    process: asyncio.subprocess.Process

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        async with self.http.post(f"http://engine{path}", json=body) as answer:
            return answer.status, await answer.json()

    async def chat(self, text: str, **options: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        status, answer = await self.post(
            "/v1/chat/completions",
            {"model": "hive-tiny", "messages": messages, "temperature": 0} | options,
        )
        assert status == 200, answer
        return answer

    async def busy(self) -> int:
        """Requests that hold a slot, by the engine's own count."""
        async with self.http.get("http://engine/metrics") as answer:
            for line in (await answer.text()).splitlines():
                if line.startswith("#"):
                    continue
                name, _, value = line.rpartition(" ")
                if name.partition("{")[0].endswith(
                    (":requests_processing", ":num_requests_running")
                ):
                    return int(float(value))
        raise AssertionError("the engine does not count its requests")


def spec(
    engine: str, path: Path = SHIPPED, python: str = sys.executable, **options: Any
) -> WorkerSpec:
    """hive-tiny on the CPU."""
    return WorkerSpec(
        worker_id="w-test",
        model=ModelInfo(
            id="hive-tiny",
            digest="sha256:0",
            format="safetensors" if path.is_dir() else "gguf",
            size_bytes=0,
            source="file",
            path=str(path),
        ),
        engine=engine,  # type: ignore[arg-type]
        devices=("cpu",),
        slots=SLOTS,
        context_length=1024,
        threads=1,
        options=WorkerOptions(**options),
        python=python,
    )


def specified(request: pytest.FixtureRequest, engine: str, **options: Any) -> WorkerSpec:
    """The same for any engine; what vLLM needs is made when it is asked for."""
    if engine != "vllm":
        return spec(engine, **options)
    folder = request.getfixturevalue("hive_tiny_folder")
    python = str(request.getfixturevalue("vllm_python"))
    return spec(engine, folder, python, dtype="float32", **options)


@asynccontextmanager
async def running(wanted: WorkerSpec) -> AsyncIterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="hive-e-") as folder:
        socket = Path(folder) / "e.sock"
        if wanted.engine != "vllm":  # for which the agent removes it
            socket.touch()  # engines must cope with what an earlier one left
        command = launch(wanted, socket)
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            env=command.environment(clean_env()),
            cwd=folder,
            start_new_session=True,
        )
        connector = aiohttp.UnixConnector(str(socket), force_close=True)
        try:
            async with aiohttp.ClientSession(connector=connector) as http:

                async def healthy() -> bool:
                    assert process.returncode is None, "the engine has ended"
                    try:
                        async with http.get("http://engine/health") as answer:
                            return answer.status == 200
                    except (aiohttp.ClientError, OSError):
                        return False

                await until(healthy, f"{wanted.engine} to be healthy", within_s=START_S)
                yield Engine(wanted.engine, http, process)
        finally:
            signal_group(process.pid, 15)
            await asyncio.wait_for(process.wait(), 10)


@pytest.fixture(scope="module", params=["scripted", "llamacpp", VLLM])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with running(specified(request, request.param)) as made:
        yield made


async def test_the_served_name_is_listed(engine: Engine) -> None:
    async with engine.http.get("http://engine/v1/models") as answer:
        assert (await answer.json())["data"][0]["id"] == "hive-tiny"


async def test_chat_gives_text_reason_and_usage(engine: Engine) -> None:
    answer = await engine.chat("hello")
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def streamed(
    engine: Engine, path: str, body: dict[str, Any]
) -> tuple[list[str], str, dict[str, Any]]:
    """The pieces, the reason and the usage of a streamed answer."""
    pieces: list[str] = []
    reason, usage = "", {}
    body = {
        "model": "hive-tiny",
        "temperature": 0,
        "stream_options": {"include_usage": True},
        **body,
    }
    async with engine.http.post(f"http://engine{path}", json={**body, "stream": True}) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = (await answer.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    for line in lines[:-2]:
        chunk = json.loads(line.removeprefix("data: "))
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            said = choice["delta"].get("content") if "delta" in choice else choice["text"]
            pieces += [said] if said else []
            reason = choice["finish_reason"] or reason
    return pieces, reason, usage


async def test_a_streamed_chat_says_the_same_as_a_whole_one(engine: Engine) -> None:
    whole = await engine.chat("What is Hive?")
    messages = [{"role": "user", "content": "What is Hive?"}]
    pieces, reason, usage = await streamed(engine, "/v1/chat/completions", {"messages": messages})
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert len(pieces) > 3
    assert reason == whole["choices"][0]["finish_reason"]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]


async def test_a_streamed_completion_says_the_same_as_a_whole_one(engine: Engine) -> None:
    body = {"model": "hive-tiny", "prompt": "Hive is", "max_tokens": 12, "temperature": 0}
    status, whole = await engine.post("/v1/completions", body)
    assert status == 200
    pieces, reason, _ = await streamed(engine, "/v1/completions", body)
    assert "".join(pieces) == whole["choices"][0]["text"]
    assert reason == whole["choices"][0]["finish_reason"]


async def test_max_tokens_ends_an_answer_with_length(engine: Engine) -> None:
    answer = await engine.chat("Tell me a short story.", max_tokens=3)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_a_stop_sequence_ends_an_answer_before_it(engine: Engine) -> None:
    whole = (await engine.chat("What is Hive?"))["choices"][0]["message"]["content"]
    stop = whole.split(" ")[3]
    answer = await engine.chat("What is Hive?", stop=[stop])
    assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_greedy_answers_repeat(engine: Engine) -> None:
    first = await engine.chat("Tell me a short story.")
    again = await engine.chat("Tell me a short story.", seed=7)
    assert first["choices"][0]["message"] == again["choices"][0]["message"]


async def test_a_seed_repeats_what_chance_chose(engine: Engine) -> None:
    wild = {"model": "hive-tiny", "prompt": "A", "temperature": 1, "max_tokens": 24}
    first, again, other = [
        (await engine.post("/v1/completions", {**wild, "seed": seed}))[1]["choices"][0]["text"]
        for seed in (7, 7, 8)
    ]
    assert first == again
    assert first != other or engine.name == "scripted"


async def test_logprobs_are_told_for_every_token(engine: Engine) -> None:
    answer = await engine.chat("What is Hive?", logprobs=True, top_logprobs=3, max_tokens=8)
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert len(tokens) == answer["usage"]["completion_tokens"]
    said = "".join(token["token"] for token in tokens)
    assert said.startswith(answer["choices"][0]["message"]["content"])
    for token in tokens:
        best = max(token["top_logprobs"], key=lambda one: one["logprob"])
        assert best["token"] == token["token"]  # greedy
        assert token["logprob"] <= 0


async def test_bad_requests_are_refused_and_free_their_slot(engine: Engine) -> None:
    for body in (
        {"model": "hive-tiny"},
        {"model": "hive-tiny", "messages": "x"},
        {"model": "hive-tiny", "messages": 5},
    ):
        status, answer = await engine.post("/v1/chat/completions", body)
        assert status == 400
        assert answer["error"]["message"]
    assert await engine.busy() == 0


async def test_more_requests_than_slots_are_all_answered(engine: Engine) -> None:
    alone = await engine.chat("hello")
    answers = await asyncio.gather(*(engine.chat("hello") for _ in range(3 * SLOTS)))
    said = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert said == {alone["choices"][0]["message"]["content"]}


async def test_a_caller_that_hangs_up_frees_the_slot(engine: Engine) -> None:
    body = {
        "model": "hive-tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 100_000,
        "stream": True,
    }
    for _ in range(10):
        answer = await engine.http.post("http://engine/v1/chat/completions", json=body)
        await answer.content.readany()
        answer.close()

    async def idle() -> bool:
        return await engine.busy() == 0

    await until(idle, "all slots to be free", within_s=1)


@pytest.mark.parametrize("name", ["scripted", "llamacpp"])
async def test_documents_are_reranked(name: str) -> None:
    async with running(spec(name, rerank=True)) as engine:
        wanted = {
            "model": "hive-tiny",
            "query": "a bee",
            "documents": ["a stone", "a bee flies", "bees"],
        }
        status, answer = await engine.post("/v1/rerank", wanted)
        assert status == 200, answer
        assert sorted(result["index"] for result in answer["results"]) == [0, 1, 2]
        scores = [result["relevance_score"] for result in answer["results"]]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("name", ["scripted", "llamacpp", VLLM])
async def test_embeddings_are_unit_vectors_of_one_length(
    name: str, request: pytest.FixtureRequest
) -> None:
    async with running(specified(request, name, embeddings=True)) as engine:
        texts = ["a queen", "a queen", "something else entirely"]
        status, answer = await engine.post("/v1/embeddings", {"model": "hive-tiny", "input": texts})
        assert status == 200
        first, second, third = (row["embedding"] for row in answer["data"])
        assert first == pytest.approx(second, abs=1e-3)
        assert first != pytest.approx(third, abs=1e-2)
        assert sum(x * x for x in first) == pytest.approx(1, abs=1e-3)


async def test_the_model_gives_its_golden_answers(engine: Engine) -> None:
    """The same bytes from every engine that runs the model."""
    if engine.name == "scripted":
        pytest.skip("the scripted engine has no model")
    for wanted in json.loads(GOLDEN.read_text()):
        body = {
            "model": "hive-tiny",
            "messages": wanted["messages"],
            "max_tokens": wanted["max_tokens"],
            "temperature": 0,
        }
        _, answer = await engine.post("/v1/chat/completions", body)
        choice = answer["choices"][0]
        assert choice["message"]["content"] == wanted["text"], wanted["messages"]
        assert choice["finish_reason"] == wanted["stop_reason"]


async def test_a_file_that_is_no_model_is_an_error_not_a_crash(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(SHIPPED.read_bytes()[:100_000])
    wanted = spec("llamacpp")
    model = wanted.model.model_copy(update={"path": str(broken)})
    argv = [
        argument.replace(wanted.model.path, model.path)
        for argument in launch(wanted, tmp_path / "e.sock").argv
    ]
    process = await asyncio.create_subprocess_exec(
        *argv, env=clean_env(), stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert b"error: llama.cpp cannot load broken.gguf" in said
