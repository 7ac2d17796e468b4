"""The older documents' flow, word for word, on a hive's default port and through the queen."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import aclosing
from typing import Any

import aiohttp
import pytest

from job_client.client import JobCancelled, JobFailed
from operations.errors import HiveError, NotFound
from tests.cluster import Cluster, Daemon, spawn_scripted
from tests.conftest import Room

HELLO = {
    "operation": "infer",
    "model": "hive-tiny",
    "prompt": "hello",
    "max_tokens": 20,
    "temperature": 0,
}


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def raw_flow(url: str, operation: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """POST, then read the stream with nothing but HTTP: the answer, and the ``data:`` lines."""
    async with aiohttp.ClientSession(url) as http:
        async with http.post("/v1/jobs", json=operation) as posted:
            assert posted.status == 201
            answer = await posted.json()
            assert posted.headers["location"] == f"/v1/jobs/{answer['job_id']}"
        async with http.get(f"/v1/jobs/{answer['job_id']}/stream") as stream:
            assert stream.status == 200
            assert stream.headers["content-type"].startswith("text/event-stream")
            text = (await stream.read()).decode()
    events = [event for event in text.split("\n\n") if event.strip()]
    assert all("event: message" in event.split("\n") for event in events)
    data = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return answer, data


@pytest.mark.skipif(taken(7835), reason="port 7835 is in use, so the default cannot be tried")
async def test_spawn_and_infer_on_the_default_port_word_for_word(fresh: Cluster) -> None:
    hive = await fresh.start("agent", folder="default")
    assert hive.url == "http://127.0.0.1:7835"
    spawn = {
        "operation": "worker_spawn",
        "hive_id": "localhost",
        "model": "hive-tiny",
        "worker": "cpu",
        "device": 0,
    }
    answer, lines = await raw_flow(hive.url, spawn)
    assert answer["job_id"].startswith("job-")
    assert answer["sse_url"] == f"/v1/jobs/{answer['job_id']}/stream"
    *progress, result, end = lines
    assert progress
    assert all(line.startswith("[INFO] ") for line in progress)
    assert end == "[DONE]"
    worker = json.loads(result)
    assert worker["worker_id"]
    assert worker["pid"] > 1

    _, lines = await raw_flow(hive.url, HELLO)
    check_answer(lines)


async def test_infer_through_the_queen_streams_the_hives_tokens(room: Room) -> None:
    _, lines = await raw_flow(room.queen.url, HELLO)
    assert lines[0] == "[INFO] On hive gpu-0 (only)"
    started = check_answer(lines[1:])
    assert started["hive_id"] == "gpu-0"


def check_answer(lines: list[str]) -> dict[str, Any]:
    started, *tokens, end = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert started["type"] == "started"
    assert [token["type"] for token in tokens] == ["token"] * len(tokens)
    assert [token["i"] for token in tokens] == list(range(len(tokens)))
    assert len(tokens) > 1
    assert end["type"] == "end"
    assert end["text"] == "".join(token["t"] for token in tokens)
    assert 0 < end["tokens_out"] <= 20
    assert end["stop_reason"] in ("stop", "length")
    assert end["usage"]["completion_tokens"] == end["tokens_out"]
    return dict(started)


async def test_a_job_has_one_id_end_to_end(room: Room) -> None:
    submitted = await room.queen.client.submit(HELLO)
    await room.queen.client.follow(submitted.job_id)
    at_queen = await room.queen.client.get(f"/v1/jobs/{submitted.job_id}")
    at_hive = await room.hive.client.get(f"/v1/jobs/{submitted.job_id}")
    assert at_queen == at_hive
    assert at_hive["status"] == "completed"
    listed = (await room.queen.client.get("/v1/jobs"))["jobs"]
    assert submitted.job_id in [job["job_id"] for job in listed]


async def test_a_queen_finds_a_job_that_she_did_not_place(room: Room) -> None:
    submitted = await room.hive.client.submit(HELLO)
    outcome = await room.queen.client.follow(submitted.job_id)
    assert outcome.status == "completed"


async def test_without_stream_only_the_end_comes(door: Daemon) -> None:
    lines: list[str] = []
    await door.client.submit_and_stream({**HELLO, "stream": False}, lines.append)
    kinds = [json.loads(line)["type"] for line in lines if line.startswith("{")]
    assert kinds == ["started", "end"]


async def test_messages_make_a_chat(door: Daemon) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    end = await door.client.run(
        {"operation": "infer", "model": "hive-tiny", "messages": messages, "temperature": 0}
    )
    assert "Paris" in end["text"]


async def test_a_stop_sequence_ends_the_answer(door: Daemon) -> None:
    end = await door.client.run(
        {"operation": "infer", "model": "parrot", "prompt": "x", "max_tokens": 9, "stop": " sends"}
    )
    assert end["text"] == "the queen"


async def test_every_listing_operation_answers(door: Daemon) -> None:
    run = door.client.run
    workers = (await run({"operation": "worker_list"}))["workers"]
    assert {worker["model"] for worker in workers} >= {"hive-tiny", "parrot"}
    assert all(worker["hive_id"] == "gpu-0" for worker in workers)
    models = (await run({"operation": "model_list"}))["models"]
    tiny = next(model for model in models if model["id"] == "hive-tiny")
    assert tiny["loaded"]
    assert tiny["hive_id"] == "gpu-0"
    devices = (await run({"operation": "device_list"}))["devices"]
    assert "cpu" in [device["id"] for device in devices]
    assert (await run({"operation": "model_get", "id": "HIVE-TINY"}))["id"] == "hive-tiny"
    assert (await run({"operation": "hive_check"}))["ok"] is True
    status = await run({"operation": "status"})
    assert status["role"] == door.name.partition("-")[0] or status["role"] == "hive"


async def test_one_worker_is_named_by_its_id_or_its_process(door: Daemon, room: Room) -> None:
    by_id = {"operation": "worker_get", "worker_id": room.tiny["worker_id"]}
    by_pid = {"operation": "worker_process_get", "pid": room.tiny["pid"]}
    for operation in (by_id, by_pid):
        worker = await door.client.run(operation)
        assert worker["worker_id"] == room.tiny["worker_id"]
        assert any("llama.cpp serves hive-tiny" in line for line in worker["log_tail"])


async def test_load_and_unload_are_spawn_and_stop(fresh: Cluster) -> None:
    hive = await fresh.hive()
    await hive.client.run({"operation": "model_load", "id": "hive-tiny", "device": "cpu"})
    workers = (await hive.client.run({"operation": "worker_list"}))["workers"]
    stopped = await hive.client.run({"operation": "model_unload", "id": "hive-tiny"})
    assert stopped["stopped"] == [workers[0]["worker_id"]]
    assert (await hive.client.run({"operation": "worker_list"}))["workers"] == []


async def test_a_job_is_cancelled_from_either_end(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    await spawn_scripted(hive, hang_after_tokens=1)
    for door in (queen, hive):
        job = await queen.client.submit({**HELLO, "model": "parrot"})
        assert await door.client.cancel(job.job_id) == "cancelled"
        assert await door.client.cancel(job.job_id) == "cancelled"
        outcome = await queen.client.follow(job.job_id)
        assert outcome.status == "cancelled"
        with pytest.raises(JobCancelled):
            outcome.value()


async def test_a_finished_stream_answers_204_to_a_reader_that_saw_the_end(door: Daemon) -> None:
    job = await door.client.submit(HELLO)
    async with aclosing(door.client.stream(job.job_id)) as source:
        ids = [event.id async for event in source if event.id]
    assert await door.client.open(job.job_id, ids[-1]) is None


async def test_an_engines_refusal_is_the_jobs_error(door: Daemon) -> None:
    too_long = {"operation": "infer", "model": "hive-tiny", "prompt": "hello " * 5000}
    with pytest.raises(JobFailed) as failed:
        await door.client.run(too_long)
    assert "context" in failed.value.message


async def test_a_worker_that_cannot_load_says_why_and_leaves_nothing(fresh: Cluster) -> None:
    hive = await fresh.hive()
    with pytest.raises(JobFailed) as failed:
        await spawn_scripted(hive, fail_load="the moon is wrong")
    assert "the moon is wrong" in failed.value.message
    assert (await hive.client.run({"operation": "worker_list"}))["workers"] == []
    assert not list((fresh.folder / "gpu-0" / "agent" / "workers").iterdir())


async def test_a_spawn_that_is_cancelled_leaves_nothing(fresh: Cluster) -> None:
    hive = await fresh.hive()
    job = await hive.client.submit(
        {
            "operation": "worker_spawn",
            "model": "slow",
            "worker": "cpu",
            "options": {"engine": "scripted", "script": {"load_seconds": 600}},
        }
    )
    source = hive.client.stream(job.job_id)
    async with aclosing(source):
        await anext(source)
        assert await hive.client.cancel(job.job_id) == "cancelled"
    assert (await hive.client.run({"operation": "worker_list"}))["workers"] == []


async def test_a_request_waits_for_a_worker_that_is_loading(fresh: Cluster) -> None:
    hive = await fresh.hive()
    loading = asyncio.create_task(spawn_scripted(hive, load_seconds=1.0, answer="at last"))
    while True:
        try:
            job = await hive.client.submit({"operation": "infer", "model": "parrot", "prompt": "x"})
            break
        except NotFound:  # the spawn has not been admitted yet
            await asyncio.sleep(0.01)
    assert (await hive.client.follow(job.job_id)).value()["text"] == "at last"
    await loading


async def test_a_refused_post_carries_the_daemons_own_words(door: Daemon) -> None:
    with pytest.raises(HiveError) as refused:
        await door.client.submit({**HELLO, "model": "gpt-5"})
    assert refused.value.status == 404
    assert "hive-tiny" in refused.value.message
    assert refused.value.hop == ("queen" if door.name.startswith("queen") else "hive")


async def test_a_job_on_a_hive_that_dies_ends_in_an_error(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    await spawn_scripted(hive, tokens_per_second=5)
    job = await queen.client.submit(
        {"operation": "infer", "model": "parrot", "prompt": "x", "max_tokens": 1000}
    )
    lines: list[str] = []
    async with aclosing(queen.client.stream(job.job_id)) as source:
        async for event in source:
            lines.append(event.data)
            if len(lines) == 4:
                hive.process.kill()
    assert lines[-1].startswith("[ERROR] Hive gpu-0 was lost on the way")
