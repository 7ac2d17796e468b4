"""Many hives: requests reach the right one, evenly, and hives that die take no answer with them."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from typing import Any

import aiohttp
import psutil
import pytest

from tests.cluster import Cluster, Daemon, served, spawn_scripted, until

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


async def ask(http: aiohttp.ClientSession, queen: Daemon, model: str, **more: Any) -> str:
    """The hive that answered; raises for an error."""
    body = {**CHAT, "model": model, "max_tokens": 2, **more}
    async with http.post(f"{queen.url}/v1/chat/completions", json=body) as got:
        answer = await got.json()
        assert got.status == 200, answer
        assert answer["model"] == model
        return got.headers["x-hive-id"]


@pytest.mark.parametrize("route", ["openai", "jobs"])
async def test_a_hundred_requests_at_once_are_shared_evenly(fresh: Cluster, route: str) -> None:
    queen = await fresh.queen()
    hives = await asyncio.gather(*(fresh.hive(f"gpu-{n}", queen=queen) for n in range(2)))
    script = {"tokens_per_second": 50}
    await asyncio.gather(*(spawn_scripted(hive, "both", slots=100, **script) for hive in hives))
    await spawn_scripted(hives[0], "left")
    await spawn_scripted(hives[1], "right")
    await served(queen.client, "both", "left", "right")
    split: Counter[str] = Counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for model, hive_id in (("left", "gpu-0"), ("right", "gpu-1")):
            told = await asyncio.gather(*(ask(http, queen, model) for _ in range(10)))
            assert set(told) == {hive_id}
        if route == "openai":
            split.update(await asyncio.gather(*(ask(http, queen, "both") for _ in range(100))))
        else:
            infer = {"operation": "infer", "model": "both", "prompt": "hi", "max_tokens": 2}

            async def run() -> str:
                ends: list[str] = []
                job = await queen.client.submit_and_stream(infer, ends.append)
                assert job.value()["tokens_out"] == 2
                return next(line.split()[3] for line in ends if line.startswith("[INFO] On hive"))

            split.update(await asyncio.gather(*(run() for _ in range(100))))
    assert sum(split.values()) == 100
    assert max(split.values()) <= 60, split


async def storm(
    fresh: Cluster, hives: int, streams: int, kills: int, rng: random.Random
) -> Counter[str]:
    """Streams for many models while hives are killed; how they ended.

    Each model is loaded on two hives, and its workers say its name, again and again.
    """
    queen = await fresh.queen()
    started = await asyncio.gather(*(fresh.hive(f"gpu-{n}", queen=queen) for n in range(hives)))
    holders: dict[str, set[str]] = {}
    for n in range(hives):
        model = f"model-{n}"
        holders[model] = {f"gpu-{n}", f"gpu-{(n + 1) % hives}"}

    async def load(hive: Daemon, model: str) -> None:
        words = " ".join([model] * 40)
        await spawn_scripted(hive, model, slots=64, answer=words, tokens_per_second=20)

    for model, names in holders.items():
        await asyncio.gather(*(load(hive, model) for hive in started if hive.name in names))
    await served(queen.client, *holders)
    ended: Counter[str] = Counter()
    begun = asyncio.Semaphore(0)

    async def stream(http: aiohttp.ClientSession) -> None:
        model = rng.choice(list(holders))
        body = {**CHAT, "model": model, "stream": True, "max_tokens": 40}
        text, broken = "", False
        async with http.post(f"{queen.url}/v1/chat/completions", json=body) as got:
            if got.status != 200:
                begun.release()
                error = (await got.json())["error"]
                assert error["message"], error
                assert error["code"], error
                ended[f"refused {got.status}"] += 1
                return
            assert got.headers["x-hive-id"] in holders[model]
            async for line in got.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    assert chunk["error"]["message"]
                    broken = True
                    continue
                if not text:
                    begun.release()
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
        assert set(text.split()) <= {model}
        whole = len(text.split()) == 40
        assert whole != broken, (text, broken)
        ended["whole" if whole else "broken off"] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        running = [asyncio.create_task(stream(http)) for _ in range(streams)]
        for _ in range(streams // 2):
            await begun.acquire()
        for hive in rng.sample(started, kills):
            hive.process.send_signal(signal.SIGKILL)
            await asyncio.sleep(rng.uniform(0, 0.3))
        async with asyncio.timeout(90):
            await asyncio.gather(*running)
        # Afterwards every model that somebody still holds is answered.
        alive = {hive.name for hive in started if hive.process.returncode is None}
        await until(lambda: at_rest(queen, alive), "the queen to know who is left")
        for model, names in holders.items():
            if names & alive:
                assert await ask(http, queen, model) in names & alive
    return ended


async def at_rest(queen: Daemon, alive: set[str]) -> bool:
    hives = (await queen.client.get("/v1/hives"))["hives"]
    online_now = {hive["hive_id"] for hive in hives if hive["state"] == "online"}
    return online_now == alive and not any(
        hive["in_flight"] for hive in hives if hive["state"] == "online"
    )


async def test_hives_that_die_break_off_answers_and_never_mix_them_up(fresh: Cluster) -> None:
    ended = await storm(fresh, hives=4, streams=60, kills=2, rng=random.Random(1))
    assert sum(ended.values()) == 60
    assert ended["whole"] > 0
    assert ended["broken off"] > 0


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_twenty_hives_five_hundred_streams_and_random_kills(fresh: Cluster) -> None:
    ended = await storm(fresh, hives=20, streams=500, kills=6, rng=random.Random(2))
    print(dict(ended))
    assert sum(ended.values()) == 500
    assert ended["whole"] > 250
    assert ended["broken off"] > 0


async def test_many_callers_that_hang_up_leave_nothing_behind(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive("gpu-0", queen=queen)
    worker = await spawn_scripted(hive, slots=32, tokens_per_second=200, first_token_seconds=0.02)
    await served(queen.client, "parrot")
    processes = [psutil.Process(pid) for pid in (queen.pid, hive.pid, worker["pid"])]
    rng = random.Random(3)

    async def hang_up(http: aiohttp.ClientSession) -> None:
        door = rng.choice((queen, hive))
        stream = rng.random() < 0.7
        body = {**CHAT, "model": "parrot", "max_tokens": 200, "stream": stream}
        infer = {"operation": "infer", "model": "parrot", "prompt": "hello", "max_tokens": 200}
        try:
            async with asyncio.timeout(rng.uniform(0.0005, 0.3)):
                if rng.random() < 0.8:
                    async with http.post(f"{door.url}/v1/chat/completions", json=body) as got:
                        await got.read()
                else:
                    async with http.post(f"{door.url}/v1/jobs", json=infer) as got:
                        job = await got.json()
                    async with http.get(f"{door.url}{job['sse_url']}") as got:
                        await got.read()
        except TimeoutError:
            pass

    async def round_of(count: int) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            many = asyncio.Semaphore(100)

            async def one() -> None:
                async with many:
                    await hang_up(http)

            await asyncio.gather(*(one() for _ in range(count)))

    async def quiet() -> bool:
        hives = (await queen.client.get("/v1/hives"))["hives"]
        jobs = (await queen.client.get("/v1/jobs"))["jobs"]
        running = [job for job in jobs if job["status"] in ("queued", "running")]
        return not running and not hives[0]["in_flight"]

    await round_of(100)
    await until(quiet, "all jobs and slots to be free", within_s=30)
    before = [process.num_fds() for process in processes]
    await round_of(1000)
    await until(quiet, "all jobs and slots to be free", within_s=30)

    def closed() -> bool:
        now = [process.num_fds() for process in processes]
        return all(n <= b + 8 for n, b in zip(now, before, strict=True))

    await until(closed, "connections to be closed", within_s=90)
    assert (
        await queen.client.run(
            {"operation": "infer", "model": "parrot", "prompt": "x", "max_tokens": 3}
        )
    )["tokens_out"] == 3
