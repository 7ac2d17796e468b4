"""Bad input at queen and hive: a clear 4xx in the common envelope, and nothing left behind."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster import Cluster, Daemon
from tests.conftest import Room

UNKNOWN_JOB = "job-00000000-0000-4000-8000-000000000000"
INFER = {"operation": "infer", "model": "hive-tiny", "prompt": "hello"}
SPAWN = {"operation": "worker_spawn", "model": "hive-tiny", "worker": "cpu", "device": 0}
CHAT = {"model": "hive-tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def http(door: Daemon) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(door.url) as session:
        yield session


async def envelope(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The error of an answer; checks that it has every field of the common envelope."""
    payload = await answer.json()
    error = payload["error"]
    assert set(payload) == {"error"}
    assert error["message"]
    assert error["message"].rstrip().endswith(".")
    assert error["type"]
    assert error["code"]
    assert error["hop"] in ("queen", "hive", "worker")
    assert isinstance(error["retryable"], bool)
    assert error["request_id"] == answer.headers["x-request-id"]
    return dict(error)


async def workers_and_jobs(room: Room) -> tuple[set[str], int]:
    workers = (await room.hive.client.run({"operation": "worker_list"}))["workers"]
    jobs = (await room.hive.client.get("/v1/jobs"))["jobs"]
    running = sum(job["status"] in ("queued", "running") for job in jobs)
    return {worker["worker_id"] for worker in workers}, running


@pytest.fixture(autouse=True)
async def nothing_left_behind(room: Room) -> AsyncIterator[None]:
    before = await workers_and_jobs(room)
    yield
    assert await workers_and_jobs(room) == before


@pytest.mark.parametrize(
    ("operation", "status", "param"),
    [
        ({"operation": "hatch"}, 400, "operation"),
        ({}, 400, "operation"),
        ({**INFER, "colour": "red"}, 400, "colour"),
        ({"operation": "infer", "model": "hive-tiny"}, 400, None),
        ({"operation": "infer", "prompt": "x"}, 400, "model"),
        ({**INFER, "prompt": 5}, 400, "prompt"),
        ({**INFER, "max_tokens": -1}, 400, "max_tokens"),
        ({**INFER, "max_tokens": 10**30}, 400, "max_tokens"),
        ({**INFER, "temperature": -3}, 400, "temperature"),
        ({**INFER, "temperature": 1e300}, 400, "temperature"),
        ({**INFER, "top_k": -5}, 400, "top_k"),
        ({**INFER, "model": "gpt-5"}, 404, "model"),
        ({**INFER, "model": "../../etc/passwd"}, 404, "model"),
        ({**INFER, "model": "x" * 2000}, 400, "model"),
        ({**INFER, "hive_id": "gpu-9"}, 404, "hive_id"),
        ({**INFER, "hive_id": "../gpu-0"}, 400, "hive_id"),
        ({**INFER, "device": "cuda:7"}, 503, "model"),
        ({**SPAWN, "hive_id": "gpu-9"}, 404, "hive_id"),
        ({**SPAWN, "device": 99}, 400, "device"),
        ({**SPAWN, "device": -1}, 400, "device"),
        ({**SPAWN, "worker": "abacus"}, 400, "worker"),
        ({**SPAWN, "devices": [0]}, 400, None),
        ({**SPAWN, "model": "gpt-5"}, 404, "model"),
        ({**SPAWN, "model": "../../etc/passwd"}, 404, "model"),
        ({**SPAWN, "model": "file:../../etc/passwd"}, 400, "model"),
        ({**SPAWN, "model": "file:/etc/../etc/passwd"}, 400, "model"),
        ({**SPAWN, "model": "file:/etc/passwd"}, 400, "model"),
        ({**SPAWN, "model": "file:/nowhere.gguf"}, 400, "model"),
        ({**SPAWN, "options": {"slots": 0}}, 400, "options.slots"),
        ({**SPAWN, "options": {"slots": 1000}}, 400, "options.slots"),
        ({**SPAWN, "model": "a\0b"}, 400, "model"),
        ({**SPAWN, "options": {"threads": 1000}}, 400, "options.threads"),
        ({**SPAWN, "options": {"context_length": 10**7}}, 400, "options.context_length"),
        ({**SPAWN, "options": {"engine": "vllm"}}, 400, "options.engine"),
        ({**SPAWN, "options": {"script": {}}}, 400, "options.script"),
        ({**SPAWN, "options": {"wings": 2}}, 400, "options.wings"),
        ({"operation": "model_load", "id": "hive-tiny", "device": "cpu:99"}, 400, "device"),
        ({"operation": "model_load", "id": "hive-tiny", "device": "gpu:0"}, 400, "worker"),
        ({"operation": "model_get", "id": "../../etc/passwd"}, 404, "model"),
        ({"operation": "model_delete", "id": "../hive-tiny"}, 404, "model"),
        ({"operation": "model_delete", "id": "hive-tiny"}, 403, "id"),
        ({"operation": "model_download", "model": "../../etc/passwd"}, 400, "model"),
        ({"operation": "model_download", "model": "org/../repo"}, 400, "model"),
        ({"operation": "model_download", "model": "file:/etc/passwd"}, 400, "model"),
        ({"operation": "worker_get", "worker_id": "w-none"}, 404, "worker_id"),
        ({"operation": "worker_get", "worker_id": "../w"}, 400, "worker_id"),
        ({"operation": "worker_stop", "pid": 1}, 404, "pid"),
        ({"operation": "worker_stop", "pid": -1}, 400, "pid"),
    ],
)
async def test_a_bad_operation_is_refused_when_it_is_posted(
    http: aiohttp.ClientSession, operation: dict[str, Any], status: int, param: str | None
) -> None:
    async with http.post("/v1/jobs", json=operation) as answer:
        error = await envelope(answer)
        assert (answer.status, error.get("param")) == (status, param), error


async def test_a_gpu_that_is_not_there_is_an_error_that_says_why(room: Room) -> None:
    spawn = {**SPAWN, "worker": "cuda"}
    async with aiohttp.ClientSession(room.hive.url) as http:
        async with http.post("/v1/jobs", json=spawn) as answer:
            error = await envelope(answer)
            assert (answer.status, error["code"]) == (400, "device_not_found")
            assert "libnvidia-ml" in error["message"] or "NVIDIA" in error["message"]
    async with aiohttp.ClientSession(room.queen.url) as http:
        async with http.post("/v1/jobs", json=spawn) as answer:
            assert (answer.status, (await envelope(answer))["code"]) == (503, "no_device")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"operation":"infer","prompt":"\xff"}']
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/chat/completions"])
async def test_a_body_that_is_no_json_object_is_refused(
    http: aiohttp.ClientSession, path: str, raw: bytes
) -> None:
    headers = {"content-type": "application/json"}
    async with http.post(path, data=raw, headers=headers) as answer:
        await envelope(answer)
        assert answer.status == 400


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"model": None}, 400),
        ({"model": 5}, 400),
        ({"model": ""}, 400),
        ({"model": "gpt-5"}, 404),
        ({"model": "../../x"}, 404),
        ({"max_tokens": -1}, 400),
        ({"max_tokens": 10**30}, 400),
        ({"temperature": -3}, 400),
        ({"temperature": "hot"}, 400),
        ({"top_logprobs": 10**8}, 400),
        ({"n": 0}, 400),
        ({"n": 10**6}, 400),
        ({"messages": "hello"}, 400),
        ({"messages": None}, 400),
        ({"messages": [{"role": "nobody", "content": 5}]}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, 400),
        ({"tools": "x"}, 400),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, 400),
    ],
)
async def test_a_bad_openai_request_is_refused(
    http: aiohttp.ClientSession, wrong: dict[str, Any], status: int
) -> None:
    async with http.post("/v1/chat/completions", json={**CHAT, **wrong}) as answer:
        assert answer.status == status, await answer.text()
        await envelope(answer)


async def test_an_unknown_job_is_404_everywhere(http: aiohttp.ClientSession) -> None:
    for method, path in (("GET", ""), ("GET", "/stream"), ("DELETE", "")):
        async with http.request(method, f"/v1/jobs/{UNKNOWN_JOB}{path}") as answer:
            assert answer.status == 404
            assert (await envelope(answer))["code"] == "job_not_found"


@pytest.mark.parametrize("job_id", ["job-1", "..%2f..%2fetc%2fpasswd", "job_abc123", "%00"])
async def test_a_malformed_job_id_is_refused(http: aiohttp.ClientSession, job_id: str) -> None:
    async with http.get(f"/v1/jobs/{job_id}") as answer:
        assert answer.status in (400, 404)
        await envelope(answer)


async def test_a_foreign_last_event_id_is_refused(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/jobs", json={"operation": "status"}) as answer:
        stream = (await answer.json())["sse_url"]
    for foreign in ("dead:1", "nonsense", "x" * 500):
        async with http.get(stream, headers={"last-event-id": foreign}) as answer:
            assert answer.status in (400, 410)
            await envelope(answer)


async def test_an_unknown_route_and_a_wrong_method_are_in_the_envelope(
    http: aiohttp.ClientSession,
) -> None:
    async with http.get("/v1/nothing") as answer:
        assert answer.status == 404
        await envelope(answer)
    async with http.put("/v1/jobs") as answer:
        assert answer.status == 405
        await envelope(answer)
        assert answer.headers["allow"] == "GET, HEAD, POST"  # of two routes
    async with http.get("/v1/chat/completions") as answer:
        assert (answer.status, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "origin",
    [
        "http://[",
        "http://evil.example",
        "null",
        "http://localhost.evil.example",
        "http://127.0.0.1:1",
    ],
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/shutdown", "/v1/chat/completions"])
async def test_a_foreign_origin_is_refused(
    http: aiohttp.ClientSession, path: str, origin: str
) -> None:
    async with http.post(path, json=INFER, headers={"origin": origin}) as answer:
        assert answer.status == 403
        await envelope(answer)


async def test_a_foreign_host_is_refused(http: aiohttp.ClientSession) -> None:
    """DNS rebinding: a web page's own name that points to 127.0.0.1."""
    for host in ("evil.example", "evil.example:7833", "localhost.evil.example", "10.0.0.1", ""):
        async with http.get("/v1/jobs", headers={"host": host}) as answer:
            assert answer.status == 403
            await envelope(answer)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
async def test_a_body_that_a_web_form_could_send_is_refused(
    http: aiohttp.ClientSession, content_type: str
) -> None:
    body = json.dumps(INFER).encode()
    async with http.post("/v1/jobs", data=body, headers={"content-type": content_type}) as answer:
        assert answer.status == 415
        await envelope(answer)


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/chat/completions"])
async def test_a_body_over_the_limit_is_refused(fresh: Cluster, path: str) -> None:
    queen = await fresh.queen("--max-body=100000")
    hive = await fresh.hive("gpu-0", "--max-body=100000", queen=queen)
    large = json.dumps({**INFER, "prompt": "x" * 200_000}).encode()
    headers = {"content-type": "application/json"}

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 10_000):
            yield large[start : start + 10_000]

    for daemon in (queen, hive):
        async with aiohttp.ClientSession(daemon.url) as http:
            for body in (large, chunks()):
                async with http.post(path, data=body, headers=headers) as answer:
                    assert answer.status == 413
                    assert "--max-body" in (await envelope(answer))["message"]


async def test_the_limit_is_64_mib_unless_said_otherwise(room: Room) -> None:
    async with aiohttp.ClientSession(room.hive.url) as http:
        headers = {"content-type": "application/json"}
        body = b" " * (64 * 1024 * 1024) + b"{}"
        async with http.post("/v1/jobs", data=io.BytesIO(body), headers=headers) as answer:
            assert answer.status == 413
        async with http.post("/v1/jobs", data=io.BytesIO(body[3:]), headers=headers) as answer:
            assert answer.status == 400


async def test_a_broken_gguf_is_refused_before_a_process_starts(room: Room, tmp_path: Path) -> None:
    files = {
        "text.gguf": b"hello",
        "empty.gguf": b"",
        "short.gguf": b"GGUF\x03\x00\x00\x00",
        "absurd.gguf": b"GGUF\x03\x00\x00\x00" + b"\xff" * 64,
    }
    async with aiohttp.ClientSession(room.queen.url) as http:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
            spawn = {**SPAWN, "model": f"file:{tmp_path / name}"}
            async with http.post("/v1/jobs", json=spawn) as answer:
                assert answer.status == 400
                assert name in (await envelope(answer))["message"]
        async with http.post("/v1/jobs", json={**SPAWN, "model": f"file:{tmp_path}"}) as answer:
            assert answer.status == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    ],
)
async def test_what_is_no_http_is_answered_4xx_or_cut(door: Daemon, raw: bytes) -> None:
    host, _, port = door.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    line = answer.split(b"\r\n")[0]
    assert line == b"" or b" 4" in line or b" 505 " in line
    assert (await door.client.get("/health"))["ok"] is True


@pytest.mark.parametrize(
    "hello",
    [
        {},
        {"hive_id": "gpu-1"},
        {"hive_id": "../x", "hive_url": "http://127.0.0.1:1"},
        {"hive_id": "gpu-1", "hive_url": "ftp://127.0.0.1"},
        {"hive_id": "gpu-1", "hive_url": "http://127.0.0.1:1/path"},
        {"hive_id": "gpu-1", "hive_url": "http://[:7835"},
        {"hive_id": "gpu-1", "hive_url": "http://user@127.0.0.1:1"},
        {"hive_id": 5, "hive_url": "http://127.0.0.1:1"},
    ],
)
async def test_a_bad_ready_is_refused(room: Room, hello: dict[str, Any]) -> None:
    async with aiohttp.ClientSession(room.queen.url) as http:
        async with http.post("/v1/hive/ready", json=hello) as answer:
            assert answer.status == 400
            await envelope(answer)


async def test_a_hive_of_another_machine_is_refused(room: Room) -> None:
    hello = {"hive_id": "gpu-1", "hive_url": "http://169.254.169.254"}
    async with aiohttp.ClientSession(room.queen.url) as http:
        async with http.post("/v1/hive/ready", json=hello) as answer:
            assert answer.status == 403
            await envelope(answer)


async def test_no_prompt_reaches_a_log(fresh: Cluster) -> None:
    queen = await fresh.queen("--log-level=debug")
    hive = await fresh.hive("gpu-0", "--log-level=debug", queen=queen)
    worker = await hive.client.run(SPAWN)
    secret = "xyzzy-plugh"
    for door in (queen, hive):
        await door.client.run({**INFER, "prompt": secret, "max_tokens": 5})
        async with aiohttp.ClientSession(door.url) as http:
            for body in (
                {**CHAT, "messages": [{"role": "user", "content": secret}], "max_tokens": 5},
                {**CHAT, "messages": [{"role": secret, "content": secret}]},
                {**CHAT, "messages": secret},
                {**CHAT, "tools": secret},
                {**INFER, "prompt": [secret]},
            ):
                path = "/v1/jobs" if "operation" in body else "/v1/chat/completions"
                async with http.post(path, json=body) as answer:
                    await answer.read()
            broken = b'{"operation":"infer","model":"hive-tiny","prompt":"' + secret.encode()
            headers = {"content-type": "application/json"}
            async with http.post("/v1/jobs", data=broken, headers=headers) as answer:
                assert answer.status == 400
    logs = [queen.log, hive.log, Path(worker["log"]).read_text()]
    assert all(logs)
    assert not any(secret in log for log in logs)
