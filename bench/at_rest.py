"""What a queen and an agent cost who do nothing but listen and look: RSS and CPU.

``python -m bench.at_rest [--hives 20] [--seconds 30]``: a queen over real agents with a scripted
worker each, on loopback, proven by a secret; the queen browses mDNS.

``python -m bench.at_rest --agent [--gpus 8] [--seconds 30]``: an agent that samples so many GPUs
of a fake driver (the tests' ``libnvidia-ml.so.1``; a C compiler makes it), with two foreign
processes on each and NVLink between them, while a queen listens to its heartbeat.

Either prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import tempfile
from pathlib import Path

import psutil

from tests.cluster import cluster, online, spawn_scripted
from tests.fake_nvml.driver import GIB, FakeDriver, Gpu, Process, build
from wire.secret import Secret

SETTLE_S = 5.0
FIRST_PID = 2**22  # more than a kernel gives out


async def queen(hives: int, seconds: float) -> dict[str, object]:
    async with cluster() as made:
        made.env = {"HIVE_SECRET": Secret.new().text}
        queen = await made.queen()
        started = []
        for number in range(hives):  # one after the other: starting is not what is measured
            started.append(await made.hive(f"gpu-{number}", queen=queen))
            await spawn_scripted(started[-1], f"model-{number}")
        await online(queen.client, *(hive.name for hive in started))
        return {"hives": hives, **await cost(queen.pid, seconds)}


async def agent(gpus: int, seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="hive-bench-") as folder:
        build(Path(folder))
        driver = FakeDriver(Path(folder), Path(folder) / "state")
        driver.write([busy_gpu(number) for number in range(gpus)])
        async with cluster() as made:
            queen = await made.queen()
            hive = await made.hive("gpu-0", queen=queen, env=driver.env)
            seen = (await hive.client.get("/v1/capabilities"))["devices"]
            assert sum(device["id"].startswith("cuda:") for device in seen) == gpus
            return {"gpus": gpus, **await cost(hive.pid, seconds)}


def busy_gpu(number: int) -> Gpu:
    others = (Process(FIRST_PID + 2 * number), Process(FIRST_PID + 2 * number + 1, 4 * GIB))
    return Gpu(f"GPU-{number}", used=5 * GIB, processes=others, nvlink="all", place="0/0/0")


async def cost(pid: int, seconds: float) -> dict[str, object]:
    process = psutil.Process(pid)
    await asyncio.sleep(SETTLE_S)
    before = sum(process.cpu_times()[:2])
    await asyncio.sleep(seconds)
    spent = sum(process.cpu_times()[:2]) - before
    return {
        "rss_mb": round(process.memory_info().rss / 1e6, 1),
        "cpu_percent_of_a_core": round(100 * spent / seconds, 2),
        "seconds": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agent", action="store_true", help="an agent instead of a queen")
    parser.add_argument("--hives", type=int, default=20)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    if options.agent:
        measured = agent(options.gpus, options.seconds)
    else:
        measured = queen(options.hives, options.seconds)
    print(json.dumps(asyncio.run(measured)))


if __name__ == "__main__":
    main()
