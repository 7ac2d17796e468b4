"""The queen and her hives: how they are found, heard, lost and found again."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from contextlib import aclosing
from typing import Any

import aiohttp
import psutil
import pytest

from operations.errors import Conflict, HiveError, NotFound, Unavailable
from operations.hosts import Device, HiveInfo, HiveState, ModelInfo, WorkerInfo, WorkerState
from queen.scheduler import named, place, place_worker
from tests.cluster import Cluster, Daemon, online, served, spawn, spawn_scripted, until
from tests.conftest import Room
from tests.gguf_files import write_llama
from tests.hub import HubServer
from wire import sse

INFER = {"operation": "infer", "model": "parrot", "prompt": "hello"}


# -- the scheduler, as a table ---------------------------------------------------------------


def worker(
    model: str, in_flight: int = 0, state: WorkerState = "ready", slots: int = 4, name: str = "w"
) -> WorkerInfo:
    return WorkerInfo(
        worker_id=f"{name}-{model}",
        pid=1,
        model=model,
        digest=f"sha256:{model}",
        engine="llamacpp",
        device="cpu",
        state=state,
        slots=slots,
        in_flight=in_flight,
        started_at=0,
        problem="it broke" if state == "failed" else None,
    )


def hive(
    hive_id: str,
    *workers: WorkerInfo,
    state: HiveState = "online",
    disk: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu",),
) -> HiveInfo:
    return HiveInfo(
        hive_id=hive_id,
        hive_url=f"http://{hive_id}",
        state=state,
        found_by="ready",
        workers=list(workers),
        models=[
            ModelInfo(
                id=model,
                digest=f"sha256:{model}",
                format="gguf",
                size_bytes=1,
                source="hub",
                path="/x",
            )
            for model in disk
        ],
        devices=[
            Device(id=d, name=d, device_type="gpu", vram_total_mb=1, vram_free_mb=1)
            for d in devices
        ],
    )


@pytest.mark.parametrize(
    ("hives", "chosen", "reason"),
    [
        ([hive("a", worker("m")), hive("b", worker("n"))], "a", "only"),
        ([hive("a", worker("m", 2)), hive("b", worker("m", 1))], "b", "least_outstanding"),
        ([hive("a", worker("m", 3, slots=8)), hive("b", worker("m", 2, slots=4))], "a", None),
        ([hive("a", worker("m", 1)), hive("b", worker("m", 1))], "a", None),
        ([hive("a", worker("m", 0, "restarting")), hive("b", worker("m", 9))], "b", None),
        ([hive("a", worker("m", 0, "starting")), hive("b", disk=("m",))], "a", "only"),
        ([hive("a", worker("m"), state="suspect"), hive("b", worker("m", 9))], "b", "only"),
        ([hive("a", worker("m", 0, "failed")), hive("b", worker("m", 9))], "b", "only"),
        ([hive("a", worker("m", 0, "stopping")), hive("b", worker("m", 9))], "b", "only"),
    ],
)
def test_a_request_goes_to_the_hive_with_the_least_load(
    hives: list[HiveInfo], chosen: str, reason: str | None
) -> None:
    placement = place("m", hives)
    assert placement.hive_id == chosen
    assert reason in (None, placement.reason)


@pytest.mark.parametrize(
    ("hives", "refusal", "words"),
    [
        ([], Unavailable, "No hive is heard from"),
        ([hive("a", worker("m"), state="suspect")], Unavailable, "not heard from"),
        ([hive("a", worker("m", 0, "stopping"))], Unavailable, "stopping"),
        ([hive("a", worker("n"))], NotFound, "n"),
        ([hive("a", disk=("m",))], Unavailable, "hive workers spawn m"),
        ([hive("a", worker("m", 0, "failed"))], Unavailable, "it broke"),
        ([hive("a", disk=("m",)), hive("b", state="gone")], Unavailable, "Not heard from: b"),
    ],
)
def test_a_request_that_nobody_can_serve_is_told_why(
    hives: list[HiveInfo], refusal: type[HiveError], words: str
) -> None:
    with pytest.raises(refusal, match=words):
        place("m", hives)


def test_a_request_may_ask_for_a_hive_a_device_or_a_worker() -> None:
    hives = [hive("a", worker("m")), hive("b", worker("m", 9, name="x"))]
    assert place("m", hives, hive_id="b").hive_id == "b"
    assert place("m", hives, worker_id="x-m").hive_id == "b"
    with pytest.raises(Unavailable):
        place("m", hives, device="cuda:0")
    with pytest.raises(NotFound, match="a, b"):
        place("m", hives, hive_id="c")


def test_a_new_worker_goes_where_its_model_and_device_are() -> None:
    hives = [
        hive("a", devices=("cpu",)),
        hive("b", worker("n"), disk=("m",), devices=("cpu", "cuda:0")),
    ]
    assert place_worker("m", "cpu", hives).hive_id == "b"
    assert place_worker("other", "cpu", hives).hive_id == "a"
    assert place_worker("other", "cuda", hives).hive_id == "b"
    with pytest.raises(Unavailable):
        place_worker("m", "metal", hives)


def test_localhost_is_the_only_hive_there_is() -> None:
    assert named("localhost", [hive("a")]).hive_id == "a"
    with pytest.raises(NotFound):
        named("localhost", [hive("a"), hive("b")])
    with pytest.raises(Unavailable):
        named("a", [hive("a", state="suspect")])


# -- real daemons ----------------------------------------------------------------------------


async def state_of(queen: Daemon, hive_id: str) -> str | None:
    hives = (await queen.client.get("/v1/hives"))["hives"]
    return next((h["state"] for h in hives if h["hive_id"] == hive_id), None)


async def test_each_request_reaches_the_hive_that_has_its_model(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hives = [await fresh.hive(f"gpu-{i}", queen=queen) for i in range(2)]
    for i, daemon in enumerate(hives):
        await spawn_scripted(daemon, f"model-{i}", answer=f"I am {i}")
    await served(queen.client, "model-0", "model-1")
    for i in (0, 1, 1, 0):
        job = await queen.client.submit({**INFER, "model": f"model-{i}"})
        assert (await queen.client.follow(job.job_id)).value()["text"] == f"I am {i}"
        assert (await queen.client.get(f"/v1/jobs/{job.job_id}"))["hive_id"] == f"gpu-{i}"


async def test_operations_go_to_the_hive_that_is_named(fresh: Cluster) -> None:
    queen = await fresh.queen()
    for i in range(2):
        await fresh.hive(f"gpu-{i}", queen=queen)
    worker = await spawn_scripted(queen, hive_id="gpu-1")
    assert worker["hive_id"] == "gpu-1"
    listed = await queen.client.run({"operation": "device_list", "hive_id": "gpu-0"})
    assert {device["hive_id"] for device in listed["devices"]} == {"gpu-0"}
    everywhere = await queen.client.run({"operation": "device_list"})
    assert {device["hive_id"] for device in everywhere["devices"]} == {"gpu-0", "gpu-1"}
    with pytest.raises(HiveError, match="needs a 'hive_id'"):
        await queen.client.submit({"operation": "model_unload", "id": "parrot"})


async def test_a_hive_given_by_url_needs_no_announcement(fresh: Cluster) -> None:
    hive_daemon = await fresh.hive()
    queen = await fresh.queen(f"--hive={hive_daemon.url}")
    await online(queen.client, "gpu-0")
    (found,) = (await queen.client.get("/v1/hives"))["hives"]
    assert found["found_by"] == "flag"
    assert found["hive_url"] == hive_daemon.url


async def test_a_restarted_queen_knows_everything_again_without_a_file(fresh: Cluster) -> None:
    first = await fresh.queen()
    port = int(first.url.rpartition(":")[2])
    hive_daemon = await fresh.hive(queen=first)
    await spawn_scripted(hive_daemon)
    first.process.send_signal(signal.SIGKILL)
    await first.process.wait()
    second = await fresh.queen(port=port)
    await online(second.client, "gpu-0")
    assert (await second.client.run(INFER))["text"]


async def test_a_hive_that_dies_is_lost_at_once_and_gone_in_five_seconds(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive_daemon = await fresh.hive(queen=queen)
    await spawn_scripted(hive_daemon)
    await served(queen.client, "parrot")
    hive_daemon.process.kill()

    async def lost() -> bool:
        return await state_of(queen, "gpu-0") in ("suspect", "gone")

    await until(lost, "the hive to be suspect", within_s=3)
    with pytest.raises(HiveError) as refused:
        await queen.client.submit(INFER)
    assert refused.value.status in (404, 503)

    async def gone() -> bool:
        return await state_of(queen, "gpu-0") == "gone"

    await until(gone, "the hive to be gone", within_s=8)
    again = await fresh.hive(queen=queen)
    await spawn_scripted(again)
    await served(queen.client, "parrot")
    assert (await queen.client.run(INFER))["text"]


async def test_a_hive_that_comes_back_on_another_port_is_one_hive(fresh: Cluster) -> None:
    queen = await fresh.queen()
    first = await fresh.hive(queen=queen)
    first.process.kill()

    async def gone() -> bool:
        return await state_of(queen, "gpu-0") == "gone"

    await until(gone, "the hive to be gone")
    second = await fresh.hive(queen=queen)
    (known,) = (await queen.client.get("/v1/hives"))["hives"]
    assert known["hive_url"] == second.url
    for name in ("gpu-0", "localhost"):
        assert await queen.client.run({"operation": "device_list", "hive_id": name})


async def test_requests_at_once_are_spread_over_the_hives(fresh: Cluster) -> None:
    queen = await fresh.queen()
    for i in range(2):
        hive_daemon = await fresh.hive(f"gpu-{i}", queen=queen)
        await spawn_scripted(hive_daemon, tokens_per_second=50)

    async def both() -> bool:
        models = (await queen.client.get("/v1/models"))["data"]
        return bool(models) and len(models[0]["hives"]) == 2

    await until(both, "both hives to serve the model")
    submitted = await asyncio.gather(*(queen.client.submit(INFER) for _ in range(8)))
    placed = [(await queen.client.get(f"/v1/jobs/{job.job_id}"))["hive_id"] for job in submitted]
    assert sorted(placed) == ["gpu-0"] * 4 + ["gpu-1"] * 4


async def test_a_hub_that_never_answers_delays_no_heartbeat_and_no_answer(
    fresh: Cluster, tmp_path: Any
) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as hub:
        port = hub.sockets[0].getsockname()[1]
        queen = await fresh.queen()
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path)}
        hive_daemon = await fresh.hive(queen=queen, env=env)
        await spawn_scripted(hive_daemon)
        await served(queen.client, "parrot")
        downloads = [
            asyncio.create_task(
                hive_daemon.client.submit({"operation": "model_download", "model": f"org/m{i}"})
            )
            for i in range(12)
        ]
        ages = []
        async with aiohttp.ClientSession(queen.url) as http:
            async with http.get("/v1/heartbeats/stream") as stream:
                async with aclosing(sse.decode(stream.content.iter_any())) as beats:
                    async for beat in beats:
                        (known,) = json.loads(beat.data)["hives"]
                        assert known["state"] == "online"
                        ages.append(known["last_heard_s"])
                        assert (await queen.client.run(INFER))["text"]
                        if len(ages) == 5:
                            break
        assert max(ages) < 2.5
        refused = await asyncio.gather(*downloads, return_exceptions=True)
        assert {type(error) for error in refused} == {Unavailable}


async def test_a_hive_that_stops_in_order_is_forgotten(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive_daemon = await fresh.hive(queen=queen)
    await hive_daemon.stop()

    async def forgotten() -> bool:
        return await state_of(queen, "gpu-0") is None

    await until(forgotten, "the hive to be forgotten")


async def test_nobody_waits_for_a_hive_that_has_frozen(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive_daemon = await fresh.hive(queen=queen)
    await spawn_scripted(hive_daemon, tokens_per_second=20)
    await served(queen.client, "parrot")
    job = await queen.client.submit({**INFER, "max_tokens": 10_000})
    lines: list[str] = []
    async with aiohttp.ClientSession(queen.url) as http:
        asked = {"model": "parrot", "messages": [{"role": "user", "content": "hello"}]}
        chat = await http.post(
            "/v1/chat/completions", json={**asked, "stream": True, "max_tokens": 10_000}
        )
        await chat.content.readany()
        async with aclosing(queen.client.stream(job.job_id)) as source:
            async for event in source:
                lines.append(event.data)
                if len(lines) == 5:
                    hive_daemon.process.send_signal(signal.SIGSTOP)
                    posted = asyncio.create_task(queen.client.submit(INFER))
        assert lines[-1] == "[ERROR] Hive gpu-0 was lost on the way: it has fallen silent"
        with pytest.raises(Unavailable):
            await posted
        assert b"has fallen silent" in await chat.content.read()
    hive_daemon.process.send_signal(signal.SIGCONT)


async def test_a_silent_hive_gets_no_work_until_it_speaks_again(fresh: Cluster) -> None:
    """The process is stopped: its connections stay open, and nothing comes."""
    queen = await fresh.queen()
    hive_daemon = await fresh.hive(queen=queen)
    hive_daemon.process.send_signal(signal.SIGSTOP)

    async def state(wanted: str) -> bool:
        return await state_of(queen, "gpu-0") == wanted

    await until(lambda: state("suspect"), "the hive to be suspect", within_s=8)
    await until(lambda: state("gone"), "the hive to be gone", within_s=8)
    with pytest.raises(Unavailable):
        await queen.client.submit({**INFER, "model": "hive-tiny"})
    hive_daemon.process.send_signal(signal.SIGCONT)
    await until(lambda: state("online"), "the hive to be back", within_s=8)


async def test_a_second_hive_of_the_same_id_is_refused_loudly(fresh: Cluster) -> None:
    queen = await fresh.queen()
    first = await fresh.hive("gpu-0", queen=queen)
    other = await fresh.start(
        "agent", "--port=0", "--hive-id=gpu-0", f"--queen-url={queen.url}", folder="other"
    )
    await until(lambda: "status=refused" in other.log, "the second hive to be refused")
    assert "another --hive-id" in other.log
    hives = (await queen.client.get("/v1/hives"))["hives"]
    assert [h["hive_url"] for h in hives if h["state"] == "online"] == [first.url]
    with pytest.raises(Conflict):
        await queen.client.post(
            "/v1/hive/ready", {"hive_id": "gpu-0", "hive_url": "http://127.0.0.1:9"}
        )


async def test_a_heartbeat_comes_at_once_when_something_changes(room: Room) -> None:
    async with aiohttp.ClientSession(room.hive.url) as http:
        async with http.get("/v1/heartbeats/stream") as stream:
            beats = sse.decode(stream.content.iter_any())
            first = await anext(beats)
            assert first.event == "heartbeat"
            await spawn_scripted(room.hive, "newcomer")
            async for beat in beats:
                if '"newcomer"' in beat.data and '"ready"' in beat.data:
                    break
            await beats.aclose()
    workers = (await room.hive.client.run({"operation": "worker_list"}))["workers"]
    newcomer = next(w for w in workers if w["model"] == "newcomer")
    await room.hive.client.run({"operation": "worker_stop", "worker_id": newcomer["worker_id"]})


async def test_health_info_capabilities_and_metrics_answer(room: Room, door: Daemon) -> None:
    health = await door.client.get("/health")
    role = "queen" if door is room.queen else "hive"
    assert (health["ok"], health["role"], health["queued"]) == (True, role, 0)
    assert {"id": room.tiny["worker_id"], "free": True} in health["workers"]
    info = await door.client.get("/v1/info")
    assert (info["role"], info["base_url"]) == (role, door.url)
    capabilities = await room.hive.client.get("/v1/capabilities")
    assert capabilities["devices"][-1]["id"] == "cpu"
    await door.client.run({**INFER, "model": "hive-tiny", "max_tokens": 2})
    async with aiohttp.ClientSession(door.url) as http:
        async with http.get("/metrics") as answer:
            text = await answer.text()
    wanted = ["hive_device_memory_free_mib", "hive_requests_total", "hive_ttft_seconds_bucket"]
    wanted += ["hive_placements_total", "hive_hive_online"] if role == "queen" else []
    for name in (*wanted, "hive_tokens_out_total"):
        assert f"# TYPE {name.removesuffix('_bucket')}" in text, name
    chat = {"model": "HIVE-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    counted = []
    for _ in range(2):
        async with aiohttp.ClientSession(door.url) as http:
            for stream in (True, False):
                async with http.post(
                    "/v1/chat/completions", json={**chat, "stream": stream}
                ) as got:
                    assert got.status == 200
                    await got.read()
            async with http.get("/metrics") as answer:
                found = re.search(
                    r'^hive_tokens_out_total\{model="hive-tiny"\} (\S+)$', await answer.text(), re.M
                )
                assert found is not None
                counted.append(float(found[1]))
    assert counted[1] - counted[0] >= 6


async def test_an_infer_goes_to_the_hive_that_has_its_model_and_a_download_to_the_one_named(
    fresh: Cluster, tmp_path: Any
) -> None:
    async with HubServer() as hub:
        model = write_llama(tmp_path / "small.gguf", name="small")
        hub.add("org/small-GGUF", {"small-Q8_0.gguf": model.read_bytes()})
        queen = await fresh.queen()
        first = await fresh.hive("gpu-0", queen=queen)
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        await fresh.hive("gpu-1", queen=queen, env=env)
        await spawn(first)
        await served(queen.client, "hive-tiny")
        lines: list[str] = []
        infer = (
            '{"operation":"infer","model":"hive-tiny","prompt":"hello","max_tokens":20,'
            '"temperature":0}'
        )
        job = await queen.client.submit_and_stream(json.loads(infer), lines.append)
        assert lines[0] == "[INFO] On hive gpu-0 (only)"
        events = [json.loads(line) for line in lines if line.startswith("{")]
        assert events[0]["type"] == "started"
        tokens = [event["t"] for event in events if event["type"] == "token"]
        assert "".join(tokens) == job.value()["text"] != ""
        lines.clear()
        download = {"operation": "model_download", "hive_id": "gpu-1", "model": "org/small-GGUF"}
        job = await queen.client.submit_and_stream(download, lines.append)
        assert job.value()["hive_id"] == "gpu-1"
        assert lines[0] == "[INFO] On hive gpu-1 (named)"
        assert any(" % (" in line and line.startswith("[INFO] small-Q8_0.gguf") for line in lines)


@pytest.mark.parametrize("route", ["openai", "jobs"])
async def test_what_has_not_begun_on_a_frozen_hive_is_asked_of_the_next(
    fresh: Cluster, route: str
) -> None:
    """The frozen one takes connections and says nothing: the worst that a hive can do."""
    queen = await fresh.queen()
    hives = [await fresh.hive(f"gpu-{n}", queen=queen) for n in range(2)]
    for hive in hives:
        await spawn_scripted(hive, slots=8)
    await served(queen.client, "parrot")

    async def both() -> bool:
        found = (await queen.client.get("/v1/models"))["data"]
        return found[0]["hives"] == ["gpu-0", "gpu-1"]

    await until(both, "parrot on both")
    hives[0].process.send_signal(signal.SIGSTOP)
    try:

        async def ask() -> str:
            if route == "jobs":
                lines: list[str] = []
                job = await queen.client.submit_and_stream({**INFER, "max_tokens": 2}, lines.append)
                assert job.value()["tokens_out"] == 2
                return lines[0].split()[3]
            chat = {"model": "parrot", "messages": [{"role": "user", "content": "hi"}]}
            async with aiohttp.ClientSession(queen.url) as http:
                async with http.post("/v1/chat/completions", json=chat) as got:
                    assert got.status == 200, await got.text()
                    return got.headers["x-hive-id"]

        assert set(await asyncio.gather(*(ask() for _ in range(6)))) == {"gpu-1"}
    finally:
        hives[0].process.send_signal(signal.SIGCONT)


async def test_a_hive_without_a_descriptor_left_is_heard_again_when_it_has_some(
    fresh: Cluster,
) -> None:
    queen = await fresh.queen()
    hive = await fresh.start(
        "agent",
        "--port=0",
        "--hive-id=gpu-0",
        f"--queen-url={queen.url}",
        folder="gpu-0",
        prefix=["prlimit", "--nofile=120:120"],
    )
    await online(queen.client, "gpu-0")
    await spawn_scripted(hive)
    port = int(hive.url.rpartition(":")[2])
    idle = []
    for _ in range(150):
        idle.append(await asyncio.open_connection("127.0.0.1", port))

    async def unwell() -> bool:
        return psutil.Process(hive.pid).num_fds() >= 118

    await until(unwell, "the hive to have no descriptor left")
    await asyncio.sleep(3)  # some heartbeats have to be built meanwhile
    for _, writer in idle:
        writer.close()

    async def beats() -> bool:
        hives = (await queen.client.get("/v1/hives"))["hives"]
        return hives[0]["state"] == "online" and hives[0]["last_heard_s"] < 1.5

    await until(beats, "heartbeats to go on")
    first = (await queen.client.run({"operation": "status", "hive_id": "gpu-0"}))["timestamp"]
    await until(beats, "heartbeats to go on")
    assert (await queen.client.run({**INFER, "max_tokens": 2}))["tokens_out"] == 2
    assert first > 0


# -- downloads, through the queen ------------------------------------------------------------


async def test_a_model_is_downloaded_with_progress_and_then_answers(
    fresh: Cluster, tmp_path: Any
) -> None:
    model = write_llama(tmp_path / "small.gguf", name="small")
    async with HubServer() as hub:
        hub.add("org/small-GGUF", {"small-Q8_0.gguf": model.read_bytes()})
        queen = await fresh.queen()
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        await fresh.hive(queen=queen, env=env)
        lines: list[str] = []
        download = {"operation": "model_download", "hive_id": "gpu-0", "model": "org/small-GGUF"}
        outcome = await queen.client.submit_and_stream(download, lines.append)
        assert outcome.value()["id"] == "org/small-GGUF:Q8_0"
        assert any(" % (" in line and line.startswith("[INFO] small-Q8_0.gguf") for line in lines)
        spawn = {"operation": "worker_spawn", "model": "small", "worker": "cpu", "device": 0}
        await queen.client.run(spawn)
        await served(queen.client, "org/small-GGUF:Q8_0")
        answer = await queen.client.run({**INFER, "model": "small", "max_tokens": 3})
        assert answer["tokens_out"] == 3
        deleted = {"operation": "model_delete", "id": "small"}
        with pytest.raises(Conflict):
            await queen.client.run(deleted)
        await queen.client.run({"operation": "model_unload", "id": "small"})
        await queen.client.run(deleted)
        models = (await queen.client.run({"operation": "model_list", "hive_id": "gpu-0"}))["models"]
        assert [m["id"] for m in models] == ["hive-tiny"]


async def test_a_download_that_cannot_begin_is_refused_at_the_post(
    fresh: Cluster, tmp_path: Any
) -> None:
    async with HubServer() as hub:
        hub.add("org/gated", {"gated-Q8_0.gguf": b"GGUF"}, gated=True)
        queen = await fresh.queen()
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        await fresh.hive(queen=queen, env=env)
        for model, status, words in (
            ("org/nothing", 404, "org/nothing"),
            ("org/gated", 403, "licence"),
        ):
            with pytest.raises(HiveError) as refused:
                await queen.client.submit({"operation": "model_download", "model": model})
            assert refused.value.status == status
            assert words in refused.value.message.replace("license", "licence")
