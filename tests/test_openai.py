"""The official ``openai`` client against queen and hive."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from tests.cluster import Cluster, Daemon, served, spawn, spawn_scripted, until
from tests.conftest import Room
from tests.gguf_files import write_llama

COUNTED = 'hive_requests_total{route="/v1/chat/completions",status="401"}'
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def client(door: Daemon) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_models_are_listed_and_found(client: AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert {"hive-tiny", "parrot"} <= set(listed)
    assert (await client.models.retrieve("hive-tiny")).owned_by == "hive"


async def test_chat_answers_whole(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="hive-tiny", messages=FRANCE, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 1


async def test_chat_streams_with_usage(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="hive-tiny",
        messages=FRANCE,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage, pieces = "", None, 0
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            pieces += bool(choice.delta.content)
    assert "Paris" in text
    assert pieces > 1
    assert usage is not None
    assert usage.completion_tokens >= pieces


async def test_a_streamed_answer_is_the_whole_one(client: AsyncOpenAI) -> None:
    asked = {"model": "hive-tiny", "messages": FRANCE, "temperature": 0}
    whole = await client.chat.completions.create(**asked)
    stream = await client.chat.completions.create(**asked, stream=True)
    pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content


async def test_completions_answer(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="hive-tiny", prompt="Hive is", max_tokens=8)
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8


async def test_a_wrong_model_is_404_and_names_the_known_ones(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await client.chat.completions.create(model="gpt-5", messages=FRANCE)
    assert "hive-tiny" in refused.value.message
    assert "parrot" in refused.value.message
    assert refused.value.code == "model_not_found"


async def test_where_no_hive_is_known_yet_nobody_says_that_a_model_is_not_there(
    fresh: Cluster,
) -> None:
    queen = await fresh.queen()
    async with AsyncOpenAI(base_url=f"{queen.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(model="hive-tiny", messages=FRANCE)
    assert (refused.value.status_code, refused.value.code) == (503, "no_hive")


async def test_a_model_that_nobody_has_loaded_says_how_to_load_it(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    for door in (queen, hive):
        async with AsyncOpenAI(base_url=f"{door.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as refused:
                await client.chat.completions.create(model="hive-tiny", messages=FRANCE)
            assert refused.value.status_code == 503
            assert "hive workers spawn hive-tiny" in refused.value.message


async def test_a_name_in_another_case_reaches_the_model(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="Hive-Tiny", messages=FRANCE, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")


async def test_an_engines_refusal_comes_in_the_envelope(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model="hive-tiny",
            messages=FRANCE,
            response_format={"type": "nonsense"},  # type: ignore[arg-type]
        )
    body = refused.value.body
    assert isinstance(body, dict)
    assert body["hop"] == "worker"
    assert body["request_id"]


async def test_the_answer_says_who_gave_it(door: Daemon, room: Room) -> None:
    body = {"model": "parrot", "messages": FRANCE}
    async with aiohttp.ClientSession(door.url) as http:
        headers = {"x-request-id": "my-own-id"}
        async with http.post("/v1/chat/completions", json=body, headers=headers) as answer:
            assert answer.status == 200
            assert answer.headers["x-hive-id"] == "gpu-0"
            assert answer.headers["x-worker-id"] == room.parrot["worker_id"]
            assert answer.headers["x-request-id"] == "my-own-id"


async def test_schemas_and_logprobs_pass_through(client: AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
    }
    answer = await client.chat.completions.create(
        model="hive-tiny",
        messages=FRANCE,
        max_tokens=60,
        logprobs=True,
        top_logprobs=2,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": schema, "strict": True},
        },
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2


async def test_other_routes_of_the_engine_are_relayed(door: Daemon) -> None:
    message = {"model": "hive-tiny", "max_tokens": 16, "messages": FRANCE}
    response = {"model": "hive-tiny", "max_output_tokens": 16, "input": "hello"}
    async with aiohttp.ClientSession(door.url) as http:
        async with http.post("/v1/messages", json=message) as answer:
            assert answer.status == 200
            assert (await answer.json())["type"] == "message"
        async with http.post("/v1/responses", json=response) as answer:
            assert answer.status == 200
            assert (await answer.json())["object"] == "response"


async def test_embeddings_and_chat_each_reach_a_worker_made_for_them(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    await spawn(hive)
    async with AsyncOpenAI(base_url=f"{hive.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="embeddings"):
            await client.embeddings.create(model="hive-tiny", input="one")
    both = {str((await spawn(hive, embeddings=True))["worker_id"])}

    async def known() -> bool:
        health = await queen.client.get("/health")
        return both <= {worker["id"] for worker in health["workers"]}

    await until(known, "the queen to know both workers")
    for door in (queen, hive):
        async with AsyncOpenAI(base_url=f"{door.url}/v1", api_key="x", max_retries=0) as client:
            for _ in range(4):
                await client.chat.completions.create(
                    model="hive-tiny", messages=FRANCE, max_tokens=2
                )
            answer = await client.embeddings.create(model="hive-tiny", input=["one", "two"])
            assert len(answer.data) == 2
            assert len(answer.data[0].embedding) == len(answer.data[1].embedding) > 16


async def test_reranking_reaches_a_worker_made_for_it(fresh: Cluster) -> None:
    hive = await fresh.hive()
    chat = await spawn(hive, kv_type="q8_0")
    wanted = {"model": "hive-tiny", "query": "a bee", "documents": ["a bee flies", "a stone"]}
    async with aiohttp.ClientSession(hive.url) as http:
        async with http.post("/v1/rerank", json=wanted) as answer:
            assert answer.status == 503
            assert "rerank" in (await answer.json())["error"]["message"]
        ranker = await spawn(hive, rerank=True)
        assert (chat["tasks"], ranker["tasks"]) == (["generate"], ["rerank"])
        async with http.post("/v1/rerank", json=wanted) as answer:
            assert answer.status == 200
            assert answer.headers["x-worker-id"] == ranker["worker_id"]
            assert len((await answer.json())["results"]) == 2
        body = {"model": "hive-tiny", "messages": FRANCE, "temperature": 0}
        async with http.post("/v1/chat/completions", json=body) as answer:
            assert answer.headers["x-worker-id"] == chat["worker_id"]
            assert "Paris" in (await answer.json())["choices"][0]["message"]["content"]


async def test_an_embedding_model_needs_no_option(fresh: Cluster, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "vectors.gguf", pooling=True)
    hive = await fresh.hive()
    assert (await spawn(hive, f"file:{model}"))["tasks"] == ["embed"]
    async with AsyncOpenAI(base_url=f"{hive.url}/v1", api_key="x", max_retries=0) as client:
        answer = await client.embeddings.create(model="vectors", input="one")
    assert len(answer.data[0].embedding) > 16


async def test_a_worker_that_dies_in_mid_answer_is_an_error_not_an_end(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    await spawn_scripted(hive, crash_after_tokens=5, tokens_per_second=100)
    await served(queen.client, "parrot")
    for door in (hive, queen):
        async with AsyncOpenAI(base_url=f"{door.url}/v1", api_key="x", max_retries=0) as client:
            asked = {"model": "parrot", "messages": FRANCE, "max_tokens": 50}
            stream = await client.chat.completions.create(**asked, stream=True)
            pieces = []

            async def read() -> None:
                async for chunk in stream:  # noqa: B023
                    pieces.append(chunk.choices[0].delta.content)  # noqa: B023

            with pytest.raises(openai.APIError) as broken:
                await read()
            assert len(pieces) >= 5
            assert "ended before its answer did" in broken.value.message
            with pytest.raises(openai.InternalServerError) as whole:
                await client.chat.completions.create(**asked)
            assert whole.value.status_code in (502, 503)  # each try costs the worker a life


async def test_a_request_that_is_not_let_in_is_counted(door: Daemon) -> None:
    async def refused() -> float:
        async with aiohttp.ClientSession() as http, http.get(f"{door.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        counted = [line for line in lines if line.startswith(COUNTED)]
        return float(counted[0].split()[-1]) if counted else 0

    before = await refused()
    headers = {"authorization": "Bearer hk-made.up"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{door.url}/v1/chat/completions", json={}, headers=headers) as answer,
    ):
        assert answer.status == 401
    assert await refused() == before + 1
