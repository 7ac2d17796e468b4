"""Servers that somebody else started, taken as workers: asked, watched, and left alone."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_agent.workers import foreign
from hive_agent.workers.pool import Wanted, choose
from job_client.client import JobFailed
from keeper.attach import engine_key, which
from keeper.engine_options import text_of
from keeper.exits import WrongUsage
from operations.errors import Conflict, HiveError, InvalidRequest, NotFound, Unavailable
from operations.hosts import WorkerInfo
from operations.operations import EngineModels, WorkerOptions, WorkerSpawn
from tests.cluster import Cluster, Daemon, clean_env, cluster, served, spawn, spawn_scripted, until
from tests.terminal import hive as hive_command
from wire.openai import renamed

HEALTH = {"HIVE_HEALTH_SECONDS": "0.2"}
SAID = "It is answered elsewhere."
KEY = "sk-of-the-server-4711"


@dataclass
class Foreign:
    """A running ``tests.foreign_server``."""

    url: str
    process: asyncio.subprocess.Process

    async def seen(self) -> dict[str, Any]:
        async with aiohttp.ClientSession(self.url) as http, http.get("/seen") as answer:
            return dict(await answer.json())

    async def becomes(self, **mood: Any) -> None:
        async with aiohttp.ClientSession(self.url) as http:
            async with http.post("/mood", json=mood) as answer:
                assert answer.status == 200

    async def dies(self) -> int:
        """End it; its port."""
        self.process.kill()
        await self.process.wait()
        return int(self.url.rpartition(":")[2])


async def begin(**mood: Any) -> Foreign:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.foreign_server", json.dumps(mood)),
        env=clean_env(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        port = int(await process.stdout.readline())
    return Foreign(f"http://127.0.0.1:{port}", process)


@contextlib.asynccontextmanager
async def running(**mood: Any) -> AsyncIterator[Foreign]:
    """A foreign server for the life of the block."""
    server = await begin(**mood)
    try:
        yield server
    finally:
        if server.process.returncode is None:
            await server.dies()


@dataclass(frozen=True)
class Pair:
    queen: Daemon
    hive: Daemon


@pytest.fixture(scope="module")
async def pair() -> AsyncIterator[Pair]:
    async with cluster() as made:
        queen = await made.queen()
        yield Pair(queen, await made.hive(queen=queen, env=HEALTH))


@pytest.fixture(params=["queen", "hive"])
def entrance(request: pytest.FixtureRequest, pair: Pair) -> Daemon:
    return pair.queen if request.param == "queen" else pair.hive


async def attach(daemon: Daemon, url: str, model: str = "llama3", **options: Any) -> dict[str, Any]:
    operation = {"operation": "worker_spawn", "model": model}
    options = {"engine": "external", "url": url, **options}
    return dict(await daemon.client.run({**operation, "options": options}))


async def detach(daemon: Daemon, worker: dict[str, Any]) -> None:
    await daemon.client.run(
        {"operation": "worker_process_delete", "worker_id": worker["worker_id"]}
    )


@contextlib.asynccontextmanager
async def attached(
    pair: Pair, url: str, model: str = "llama3", **options: Any
) -> AsyncIterator[dict[str, Any]]:
    """A worker of the pair's hive for the life of the block, known to the queen."""
    worker = await attach(pair.hive, url, model, **options)
    try:
        await served(pair.queen.client, model)
        yield worker
    finally:
        await detach(pair.hive, worker)


async def state_of(daemon: Daemon, worker: dict[str, Any]) -> dict[str, Any]:
    asked = {"operation": "worker_get", "worker_id": worker["worker_id"]}
    return dict(await daemon.client.run(asked))


async def until_state(daemon: Daemon, worker: dict[str, Any], state: str) -> dict[str, Any]:
    async def reached() -> dict[str, Any] | None:
        now = await state_of(daemon, worker)
        return now if now["state"] == state else None

    return dict(await until(reached, f"the worker to be {state}"))


def chat(model: str = "llama3", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Where?"}], **options}


async def post(
    daemon: Daemon, body: dict[str, Any], path: str = "/v1/chat/completions", **options: Any
) -> tuple[int, Any]:
    async with aiohttp.ClientSession(daemon.url) as http:
        async with http.post(path, json=body, **options) as answer:
            return answer.status, await answer.json()


# -- requests ----------------------------------------------------------------------------------


async def test_a_server_that_is_attached_answers_whole_streamed_and_as_a_job(
    pair: Pair, entrance: Daemon
) -> None:
    async with running() as server, attached(pair, server.url) as worker:
        assert (worker["state"], worker["device"], worker["engine"]) == (
            *("ready", "external", "external"),
        )
        status, whole = await post(entrance, chat())
        assert (status, whole["choices"][0]["message"]["content"]) == (200, SAID)
        async with aiohttp.ClientSession(entrance.url) as http:
            async with http.post("/v1/chat/completions", json=chat(stream=True)) as answer:
                assert answer.headers["x-worker-id"] == worker["worker_id"]
                streamed = await answer.text()
        chunks = [json.loads(line[6:]) for line in streamed.split("\n\n")[:-2]]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == SAID
        job = {"operation": "infer", "model": "llama3", "prompt": "Where?"}
        assert (await entrance.client.run(job))["text"] == SAID
        named = {json.loads(body)["model"] for body in (await server.seen())["bodies"]}
        assert named == {"Llama3:latest"}


async def test_embeddings_reach_a_server_attached_for_them(pair: Pair, entrance: Daemon) -> None:
    body = {"model": "vectors", "input": "one"}
    async with running(models=["vectors"]) as server:
        async with attached(pair, server.url, "vectors", embeddings=True):
            status, answer = await post(entrance, body, "/v1/embeddings")
            assert (status, answer["data"][0]["embedding"]) == (200, [0.6, 0.8])
            status, refused = await post(entrance, chat("vectors"))
            assert (status, refused["error"]["type"]) == (503, "unavailable_error")


async def test_a_server_sees_its_own_key_and_nothing_of_the_callers(pair: Pair) -> None:
    headers = {"Authorization": "Bearer callers-own", "Cookie": "a=b", "X-Secret": "c"}
    headers["Accept-Encoding"] = "gzip"
    async with running(key=KEY) as server:
        url = server.url.replace("127.0.0.1", "localhost")  # cookies need a host's name
        async with attached(pair, url, api_key=KEY):
            for _ in range(2):  # the first answer sets a cookie
                assert (await post(pair.hive, chat(), headers=headers))[0] == 200
        for seen in (await server.seen())["headers"]:
            assert seen["authorization"] == f"Bearer {KEY}"
            assert seen["accept-encoding"] == "identity"
            assert not {"cookie", "x-secret"} & seen.keys()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_redirects_is_not_followed_and_not_passed_on(
    pair: Pair, entrance: Daemon, stream: bool
) -> None:
    async with running() as server, running() as other, attached(pair, server.url):
        await server.becomes(redirect=f"{other.url}/v1/chat/completions")
        async with aiohttp.ClientSession(entrance.url) as http:
            asked = chat(stream=stream)
            async with http.post(
                "/v1/chat/completions", json=asked, allow_redirects=False
            ) as answer:
                error = (await answer.json())["error"]
                assert answer.status == 502
                assert "location" not in answer.headers
        assert (error["code"], error["hop"]) == ("engine_redirects", "worker")
        assert error["retryable"] is False
        assert "307" in error["message"]
        assert other.url not in error["message"]
        with pytest.raises(JobFailed, match="redirect"):
            await entrance.client.run({"operation": "infer", "model": "llama3", "prompt": "hello"})
        assert (await other.seen())["bodies"] == []


async def test_a_server_cannot_tell_that_another_answered(pair: Pair, entrance: Daemon) -> None:
    async with running() as server, attached(pair, server.url) as worker:
        async with aiohttp.ClientSession(entrance.url) as http:
            async with http.post("/v1/chat/completions", json=chat()) as answer:
                told = [answer.headers[name] for name in ("x-hive-id", "x-worker-id")]
    assert told == [worker["hive_id"], worker["worker_id"]]


async def test_an_answer_that_unfolds_is_not_unfolded() -> None:
    async def bomb(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        packed = gzip.compress(b" " * 2 * foreign.ANSWER_LIMIT)
        size = str(len(packed)).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: " + size
        writer.write(head + b"\r\n\r\n" + packed)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(bomb, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    address = foreign.parse_address(f"http://127.0.0.1:{port}")
    async with server, foreign.session(address, None) as http:
        status, raw = await foreign.ask(http, address, "/v1/models")
    assert status == 200
    assert len(raw) < foreign.ANSWER_LIMIT // 100


async def test_all_of_a_body_but_the_models_name_arrives_byte_for_byte(pair: Pair) -> None:
    sent = b'{ "x":1.50,"model" :"LLAMA3","y":[1E-7,-0, 12345678901234567890],"messages":[]}'
    async with running() as server, attached(pair, server.url):
        json_type = {"content-type": "application/json"}
        async with aiohttp.ClientSession(pair.queen.url) as http:
            async with http.post("/v1/chat/completions", data=sent, headers=json_type) as answer:
                assert answer.status == 200
        (body,) = (await server.seen())["bodies"]
        assert body == (
            '{"x":1.50,"model":"Llama3:latest","y":[1E-7,-0, 12345678901234567890],"messages":[]}'
        )


async def test_a_model_may_have_a_name_of_its_own_here(pair: Pair) -> None:
    async with running() as server:
        async with attached(pair, server.url, "house-model", served_as="llama3"):
            status, answer = await post(pair.queen, chat("House-Model"))
            assert (status, answer["model"]) == (200, "Llama3:latest")


async def test_a_caller_that_hangs_up_hangs_up_there(pair: Pair, entrance: Daemon) -> None:
    async with running(pace_s=30) as server, attached(pair, server.url):
        async with aiohttp.ClientSession(entrance.url) as http:
            answer = await http.post("/v1/chat/completions", json=chat(stream=True))
            await answer.content.readany()
            answer.close()

        async def left() -> bool:
            seen = await server.seen()
            return bool(seen["hung_up"] == 1 and seen["answering"] == 0)

        await until(left, "the server to notice")


async def test_llama_cpp_on_a_unix_socket_of_somebody_elses_is_taken(pair: Pair) -> None:
    from tests.test_engines import SHIPPED

    with tempfile.TemporaryDirectory(prefix="hive-x-") as folder:
        socket = f"{folder}/theirs.sock"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker.engines.llamacpp", f"--socket={socket}"),
            *("--served-name=tiny", "--context=1024", "--slots=2", "--device=cpu"),
            *(f"--model={SHIPPED}", "--threads=1"),
            env=clean_env(),
        )
        try:

            async def taken() -> dict[str, Any] | None:
                with contextlib.suppress(Unavailable):
                    return await attach(pair.hive, f"unix:{socket}", "tiny")
                return None

            worker = await until(taken, "llama.cpp to be up", within_s=30)
            assert worker["url"] == f"unix:{socket}"
            await served(pair.queen.client, "tiny")
            asked = {"operation": "infer", "model": "tiny", "temperature": 0}
            prompt = "What is the capital of France?"
            assert "Paris" in (await pair.queen.client.run({**asked, "prompt": prompt}))["text"]
            await detach(pair.hive, worker)
            assert process.returncode is None
            assert Path(socket).exists()
        finally:
            process.kill()
            await process.wait()


# -- life and death ----------------------------------------------------------------------------


async def test_a_server_that_dies_and_comes_back_is_taken_again(pair: Pair) -> None:
    async with running() as server, attached(pair, server.url) as worker:
        port = await server.dies()
        away = await until_state(pair.hive, worker, "restarting")
        assert "connection refused" in away["problem"]
        assert away["worker_id"] == worker["worker_id"]
        checked, listed = await asyncio.gather(
            hive_command("check", url=pair.hive.url),
            hive_command("workers", "ls", url=pair.hive.url),
        )
        assert checked.code == 1
        assert "All is well." not in checked.out
        assert f"! worker {worker['worker_id']} (llama3): restarting: Nothing" in checked.out
        assert "GB left for engines, logs and records in" in checked.out
        assert f"{worker['worker_id']}: {away['problem']}" in listed.err
        status, refused = await post(pair.hive, chat())
        assert (status, refused["error"]["code"]) == (503, "engine_unreachable")
        assert "connection refused" in refused["error"]["message"]
        async with running(port=port):
            back = await until_state(pair.hive, worker, "ready")
            assert back["restarts"] == 1
            assert (await post(pair.hive, chat()))[0] == 200


async def test_no_request_fails_while_another_server_has_the_model(fresh: Cluster) -> None:
    hive = await fresh.hive(env={"HIVE_HEALTH_SECONDS": "60"})  # the requests themselves tell
    async with running() as first, running() as second:
        workers = [await attach(hive, server.url) for server in (first, second)]
        assert workers[0]["digest"] == workers[1]["digest"]
        await first.dies()
        answers = await asyncio.gather(*(post(hive, chat()) for _ in range(12)))
        assert [status for status, _ in answers] == [200] * 12
        jobs = ({"operation": "infer", "model": "llama3", "prompt": "x"} for _ in range(3))
        assert {r["text"] for r in await asyncio.gather(*map(hive.client.run, jobs))} == {SAID}
        assert "refused" in (await until_state(hive, workers[0], "restarting"))["problem"]


async def test_two_servers_of_one_name_share_the_requests(pair: Pair) -> None:
    async with running(pace_s=0.02) as first, running(pace_s=0.02) as second:
        async with attached(pair, first.url, slots=2), attached(pair, second.url, slots=2):
            await asyncio.gather(*(post(pair.queen, chat()) for _ in range(8)))
            counts = [len((await server.seen())["bodies"]) for server in (first, second)]
        assert sum(counts) == 8
        assert min(counts) >= 2


async def test_what_others_ask_of_a_server_counts_as_its_load(pair: Pair) -> None:
    async with running(load=7) as busy, running(load=0) as idle:
        async with attached(pair, busy.url) as worker, attached(pair, idle.url):

            async def seven() -> bool:
                return bool((await state_of(pair.hive, worker))["in_flight"] == 7)

            await until(seven, "its load to be known")
            await asyncio.gather(*(post(pair.hive, chat()) for _ in range(4)))
            assert len((await busy.seen())["bodies"]) == 0
            await busy.becomes(load=0)

            async def none() -> bool:
                return bool((await state_of(pair.hive, worker))["in_flight"] == 0)

            await until(none, "its load to go")


async def test_a_server_without_health_or_metrics_is_asked_for_them_once(pair: Pair) -> None:
    async with running() as server, attached(pair, server.url):

        async def asked_often() -> list[str] | None:
            asked = (await server.seen())["asked"]
            return asked if asked.count("/v1/models") > 5 else None

        asked = await until(asked_often, "some rounds of questions")
        assert (asked.count("/health"), asked.count("/metrics")) == (1, 1)


@pytest.mark.parametrize(
    ("mood", "problem"),
    [
        ({"health": 503}, "not well"),
        ({"models": ["other"]}, "no model 'Llama3:latest'. It has: other"),
        ({"key": "changed"}, "does not take the key"),
    ],
)
async def test_a_server_that_can_no_longer_serve_gets_no_requests(
    pair: Pair, mood: dict[str, Any], problem: str
) -> None:
    well = {"health": 200, "models": ["Llama3:latest"], "key": KEY}
    async with running(**well) as server, attached(pair, server.url, api_key=KEY) as worker:
        await server.becomes(**mood)
        assert problem in (await until_state(pair.hive, worker, "restarting"))["problem"]
        await server.becomes(**well)
        await until_state(pair.hive, worker, "ready")


async def test_a_key_that_is_refused_in_between_is_not_the_callers_fault(fresh: Cluster) -> None:
    hive = await fresh.hive(env={"HIVE_HEALTH_SECONDS": "60"})
    async with running(key=KEY) as server:
        await attach(hive, server.url, api_key=KEY)
        await server.becomes(key="changed")
        status, refused = await post(hive, chat())
        assert (status, refused["error"]["code"]) == (502, "engine_key_refused")
        assert KEY not in json.dumps(refused)
        job = {"operation": "infer", "model": "llama3", "prompt": "x"}
        with pytest.raises(HiveError, match="refuses the key") as failed:
            await hive.client.run(job)
        assert KEY not in failed.value.message


async def test_a_server_outlives_its_detachment_and_the_agent(fresh: Cluster) -> None:
    hive = await fresh.hive()
    async with running() as server:
        removed = await attach(hive, server.url)
        told = await hive.client.run(
            {"operation": "worker_process_delete", "worker_id": removed["worker_id"]}
        )
        assert told["message"] == f"Worker {removed['worker_id']} detached; {server.url} runs on"
        assert (await hive.client.run({"operation": "worker_list"}))["workers"] == []
        await attach(hive, server.url)
        assert await hive.stop() == 0
        assert (await server.seen())["answering"] == 0


async def test_a_detachment_waits_for_the_answers_that_run(pair: Pair) -> None:
    async with running(pace_s=0.1) as server:
        async with attached(pair, server.url):
            asking = asyncio.create_task(post(pair.hive, chat()))

            async def answering() -> bool:
                return bool((await server.seen())["answering"])

            await until(answering, "the answer to begin")
        assert (await asking)[0] == 200


async def test_the_key_is_in_no_log_no_answer_and_no_file(fresh: Cluster) -> None:
    hive = await fresh.hive("gpu-0", "--log-level=debug", env=HEALTH)
    async with running(key=KEY) as server:
        worker = await attach(hive, server.url, api_key=KEY)
        assert (await post(hive, chat()))[0] == 200
        await server.becomes(key="another")
        away = await until_state(hive, worker, "restarting")
        jobs = await hive.client.get("/v1/jobs")
        beat = await hive.client.run({"operation": "status"})
        assert KEY not in json.dumps([worker, away, jobs, beat])
        with pytest.raises(InvalidRequest):
            await attach(hive, server.url, "mine", api_key=KEY)
        assert await hive.stop() == 0
    written = [path for path in fresh.folder.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"url": None}, "options.url"),
        ({"url": "ftp://127.0.0.1"}, "options.url"),
        ({"threads": 2}, "options.threads"),
        ({"flags": {"seed": 1}}, "options.flags"),
        ({"script": {}}, "options.script"),
        ({"engine": "llamacpp"}, "options.url"),
        ({"engine": None}, "options.url"),
        ({"api_key": "two words"}, "options.api_key"),
    ],
)
async def test_an_option_that_makes_no_sense_is_refused_by_name(
    pair: Pair, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await attach(pair.hive, **{"url": "http://127.0.0.1:9", **options})
    assert refused.value.param == param
    assert "two words" not in refused.value.message
    assert (await pair.hive.client.run({"operation": "worker_list"}))["workers"] == []


@pytest.mark.parametrize(
    ("mood", "model", "status", "words"),
    [
        ({}, "qwen", 404, "It has: Llama3:latest"),
        ({"models": ["a", "A"]}, "a", None, ""),
        ({"models": ["aB", "Ab"]}, "ab", 409, "aB, Ab"),
        ({"models": []}, "a", 404, "It has: none"),
        ({"models": ["hive-tiny"]}, "hive-tiny", 409, "--as NAME"),
        ({"key": KEY}, "llama3", 400, "asks for a key (401)"),
        ({"owned_by": "hive"}, "llama3", 400, "is a Hive itself"),
    ],
)
async def test_what_cannot_be_attached_is_refused_at_once_and_says_why(
    pair: Pair, mood: dict[str, Any], model: str, status: int | None, words: str
) -> None:
    async with running(**mood) as server:
        if status is None:
            await detach(pair.hive, await attach(pair.hive, server.url, model))
            return
        with pytest.raises(HiveError) as refused:
            await attach(pair.hive, server.url, model)
        assert (refused.value.status, words in refused.value.message) == (status, True)
    assert (await pair.hive.client.run({"operation": "worker_list"}))["workers"] == []


@pytest.mark.parametrize("name", ["Parrot-1B", "parrot-1b-gguf", "parrot-1b-gguf:q4_k_m"])
async def test_a_server_never_takes_over_a_name_by_which_a_loaded_model_is_known(
    pair: Pair, name: str
) -> None:
    loaded = await spawn_scripted(pair.hive, "org/Parrot-1B-GGUF:Q4_K_M")
    try:
        async with running(models=["theirs"]) as server:
            with pytest.raises(Conflict, match=r"another model on .*: org/Parrot-1B-GGUF:Q4_K_M"):
                await attach(pair.hive, server.url, name, served_as="theirs")
            near = await attach(pair.hive, server.url, "parrot-1b-theirs", served_as="theirs")
            await detach(pair.hive, near)
    finally:
        await detach(pair.hive, loaded)


async def test_a_url_that_leads_nowhere_or_to_no_engine_is_refused(pair: Pair) -> None:
    with pytest.raises(Unavailable, match="connection refused"):
        await attach(pair.hive, "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="no such file"):
        await attach(pair.hive, "unix:/nowhere/at-all.sock")
    with pytest.raises(Unavailable) as asked:
        await pair.hive.client.run({"operation": "engine_models", "url": "http://127.0.0.1:9"})
    assert asked.value.param == "url"

    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html/>")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(nonsense, "127.0.0.1", 0) as web:
        with pytest.raises(HiveError, match="something else than a list of models") as refused:
            await attach(pair.hive, f"http://127.0.0.1:{web.sockets[0].getsockname()[1]}")
        assert refused.value.status == 502


def test_the_key_is_in_no_repr() -> None:
    spawned = WorkerSpawn(model="m", options=WorkerOptions(engine="external", api_key=KEY))
    assert KEY not in repr(spawned) + repr(EngineModels(url="http://host", api_key=KEY))


async def test_with_several_hives_an_attachment_names_its_hive(fresh: Cluster) -> None:
    queen = await fresh.queen()
    for hive_id in ("one", "two"):
        await fresh.hive(hive_id, queen=queen)
    async with running() as server:
        with pytest.raises(InvalidRequest, match="--hive") as refused:
            await attach(queen, server.url)
        assert refused.value.param == "hive_id"


async def test_the_url_of_an_external_engine_means_nothing_to_others(pair: Pair) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await spawn(pair.hive, url="http://127.0.0.1:9")
    assert refused.value.param == "options.url"


# -- the command -------------------------------------------------------------------------------


async def test_attach_takes_the_only_model_and_shows_where_it_is(
    pair: Pair, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    async with running(key=KEY, models=["only:latest"]) as server:
        ran = await hive_command(
            *("workers", "attach", f"{server.url}/v1", "--api-key-file", str(key)),
            url=pair.queen.url,
        )
        assert ran.code == 0, ran.err
        assert f"is ready: only:latest at {server.url} of gpu-0." in ran.out
        assert KEY not in ran.out + ran.err
        listed, unkeyed = await asyncio.gather(
            hive_command("workers", "ls", url=pair.hive.url),
            hive_command("workers", "attach", server.url, url=pair.hive.url),
        )
        assert unkeyed.code == 4
        assert "HIVE_ENGINE_KEY" in unkeyed.err
        row = next(line for line in listed.out.splitlines() if server.url in line)
        assert {"only:latest", "external", "ready"} <= set(row.split())
        worker = row.split()[0]
        shown = await hive_command("workers", "show", worker, url=pair.hive.url)
        assert ["url", server.url] in [line.split() for line in shown.out.splitlines()]
        removed = await hive_command("workers", "rm", worker, url=pair.hive.url)
        assert "runs on" in removed.out


async def test_attach_asks_which_of_several_models_or_takes_all(pair: Pair) -> None:
    async with running(models=["a:1", "b:2"]) as server:
        asked, all_, renamed_ = await asyncio.gather(
            hive_command("workers", "attach", server.url, url=pair.hive.url),
            hive_command("workers", "attach", server.url, "--all", "--json", url=pair.hive.url),
            hive_command(
                *("workers", "attach", server.url, "--model", "a:1", "--as", "mine"),
                url=pair.hive.url,
            ),
        )
        assert asked.code == 2
        assert "a:1, b:2" in asked.err
        assert renamed_.code == 0, renamed_.err
        assert "is ready: mine at" in renamed_.out
        assert [worker["model"] for worker in all_.json["workers"]] == ["a:1", "b:2"]
        for worker in (await pair.hive.client.run({"operation": "worker_list"}))["workers"]:
            await detach(pair.hive, worker)


def test_a_servers_key_is_one_word_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVE_ENGINE_KEY", f" {KEY}\n")
    assert engine_key(None) == KEY
    monkeypatch.setenv("HIVE_ENGINE_KEY", " ")
    assert engine_key(None) is None
    monkeypatch.setenv("HIVE_ENGINE_KEY", "two words")
    with pytest.raises(WrongUsage, match=r"^HIVE_ENGINE_KEY holds no key") as refused:
        engine_key(None)
    assert "two words" not in str(refused.value)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(WrongUsage, match="is empty"):
        engine_key(empty)


@pytest.mark.parametrize("read", [engine_key, text_of])
def test_a_file_of_the_command_line_is_a_regular_one_with_an_end(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    fifo, endless = tmp_path / "fifo", tmp_path / "endless"
    os.mkfifo(fifo)
    with endless.open("wb") as file:
        file.truncate(2**40)  # sparse
    for path in (Path("/dev/zero"), fifo, tmp_path):
        with pytest.raises(WrongUsage, match="It is no regular file"):
            read(path)
    with pytest.raises(WrongUsage, match=r"longer than [0-9]+ bytes"):
        read(endless)
    with pytest.raises(WrongUsage, match="No such file"):
        read(tmp_path / "none")


def test_the_only_model_needs_no_name() -> None:
    assert which(["a"], "u", all_models=False) == ["a"]
    assert which(["a", "b"], "u", all_models=True) == ["a", "b"]
    with pytest.raises(WrongUsage, match="a, b"):
        which(["a", "b"], "u", all_models=False)
    with pytest.raises(WrongUsage, match="no model"):
        which([], "u", all_models=True)


# -- decisions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "base_url", "shown"),
    [
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434", "http://127.0.0.1:11434"),
        ("http://gpu:8000/v1/", "http://gpu:8000", "http://gpu:8000"),
        ("HTTPS://api.example/openai/v1", *["https://api.example:443/openai"] * 2),
        ("http://[::1]:8000", "http://[::1]:8000", "http://[::1]:8000"),
        ("http://Straße.example", *["http://strasse.example:80"] * 2),
        ("unix:/run/e.sock", "http://localhost", "unix:/run/e.sock"),
        ("unix:///run/e.sock", "http://localhost", "unix:/run/e.sock"),
    ],
)
def test_an_address_is_read(url: str, base_url: str, shown: str) -> None:
    address = foreign.parse_address(url)
    assert (address.base_url, str(address)) == (base_url, shown)


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:11434", "ftp://host", "file:///etc/passwd", "http://", "http:///v1"),
        *("http://user:pw@host", "http://host?x=1", "http://host/#", "http://host/?"),
        *("http://host:99999", "http://host:0", "http://ho st", "http://host/\n", "http://[::1"),
        *("http://host/../x", "http://host/%2e", "http://host//x", "http://" + "a" * 80),
        *("unix:relative", "unix:", "unix://host/path", "unix:/" + "a" * 107, "unix:/a\x00b"),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        foreign.parse_address(url)
    assert refused.value.param == "options.url"


@given(st.text(max_size=40))
def test_no_text_whatever_breaks_the_reading_of_an_address(text: str) -> None:
    for url in (text, f"http://{text}", f"unix:/{text}"):
        with contextlib.suppress(InvalidRequest):
            foreign.parse_address(url)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama3", "llama3:latest"),
        ("LLAMA3:Latest", "llama3:latest"),
        ("Qwen/Qwen3", "Qwen/Qwen3"),
        ("qwen/qwen3", "Qwen/Qwen3"),
        ("x", "x"),
        ("X", "X"),
    ],
)
def test_a_model_is_found_by_its_exact_name_first(name: str, found: str) -> None:
    there = [foreign.Served(i) for i in ("llama3:latest", "llama3:8b", "Qwen/Qwen3", "x", "X")]
    assert foreign.find(name, there, "there").id == found


def test_a_model_that_is_not_there_is_told_with_the_first_that_are() -> None:
    there = [foreign.Served(f"m{i}") for i in range(25)]
    with pytest.raises(NotFound, match="m19 and 5 more"):
        foreign.find("gone", there, "there")
    with pytest.raises(Conflict):
        foreign.find("aa", [foreign.Served("aA"), foreign.Served("Aa")], "there")


@pytest.mark.parametrize(
    ("told", "context_length"),
    [
        ({"id": "m", "max_model_len": 32768}, 32768),
        ({"id": "m", "meta": {"n_ctx": 4096, "n_ctx_train": 131072}}, 4096),
        ({"id": "m", "created": 1, "owned_by": "library"}, None),
        ({"id": "m", "max_model_len": -1, "meta": None}, None),
        ({"id": "m", "max_model_len": 10**30}, None),
    ],
)
def test_the_context_is_read_where_a_server_tells_it(
    told: dict[str, Any], context_length: int | None
) -> None:
    (model,) = foreign.read_models(json.dumps({"data": [told, told]}).encode(), "there")
    assert (model.id, model.context_length) == ("m", context_length)


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"data":[1]}', b'{"data":[{"id":1}]}', b"\xff"])
def test_what_is_no_list_of_models_is_refused(raw: bytes) -> None:
    with pytest.raises(HiveError) as refused:
        foreign.read_models(raw, "there")
    assert refused.value.code == "engine_not_understood"


def test_load_is_what_runs_and_what_waits_at_any_engine() -> None:
    vllm = """# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="a b"} 3.0
vllm:num_requests_running{engine="1",model_name="a b"} 2.0
vllm:num_requests_waiting{engine="0",model_name="a b"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="x"} 4.0
"""
    llamacpp = "llamacpp:requests_processing 2\nllamacpp:requests_deferred 1\nllamacpp:n 9\n"
    broken = "vllm:num_requests_running NaN\nvllm:num_requests_waiting +Inf\nx\n\n"
    assert [foreign.read_load(text) for text in (vllm, llamacpp, broken)] == [9, 3, 0]


def test_a_server_cannot_claim_any_number_of_requests() -> None:
    hostile = "vllm:num_requests_running 1e300\nvllm:num_requests_waiting 1e300\n"
    assert foreign.read_load(hostile) == foreign.MOST_REQUESTS


def test_a_request_does_not_wait_for_a_server_that_nobody_here_starts_again() -> None:
    def worker(worker_id: str, engine: str, state: Any) -> WorkerInfo:
        named = {"worker_id": worker_id, "model": "m", "digest": "d", "engine": engine}
        busy = {"device": "cpu", "slots": 1, "in_flight": 0, "started_at": 0.0}
        return WorkerInfo.model_validate({**named, **busy, "state": state, "problem": "It died."})

    away, ours = worker("w-1", "external", "restarting"), worker("w-2", "vllm", "restarting")
    with pytest.raises(Unavailable, match="It died") as refused:
        choose([away], Wanted("d"))
    assert refused.value.retry_after is not None
    assert choose([away, ours], Wanted("d")) is None
    ready = [worker("w-3", "external", "ready"), worker("w-4", "external", "ready")]
    assert choose([away, *ready], Wanted("d")) == "w-3"
    assert choose([away, *ready], Wanted("d", avoid=frozenset({"w-3"}))) == "w-4"
    assert choose(ready[:1], Wanted("d", avoid=frozenset({"w-3"}))) == "w-3"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=6), st.text(min_size=1), st.integers(0, 4))
def test_renaming_changes_the_model_and_nothing_else(
    fields: dict[str, Any], name: str, indent: int
) -> None:
    fields["model"] = "before"
    body = json.dumps(fields, indent=indent or None).encode()
    before = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    after = msgspec.json.decode(renamed(body, name), type=dict[str, msgspec.Raw])
    assert list(after) == list(before)
    assert msgspec.json.decode(after.pop("model")) == name
    del before["model"]
    assert {k: bytes(v) for k, v in after.items()} == {k: bytes(v) for k, v in before.items()}


def test_a_body_that_names_the_model_already_is_left_alone() -> None:
    body = b'{ "mod\\u0065l" : "m" ,"x":1}'
    assert renamed(body, "m") is body
    assert renamed(b'{"model":"a","x":1,"model":"b"}', "c") == b'{"model":"c","x":1}'
