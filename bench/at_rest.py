"""What a queen costs who does nothing but listen: RSS and CPU with twenty hives.

``python -m bench.at_rest [--hives 20] [--seconds 30]``: real agents with a scripted worker each, on
loopback, proven by a secret; the queen browses mDNS. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform

import psutil

from tests.cluster import cluster, online, spawn_scripted
from wire.secret import Secret

SETTLE_S = 5.0


async def measure(hives: int, seconds: float) -> dict[str, object]:
    async with cluster() as made:
        made.env = {"HIVE_SECRET": Secret.new().text}
        queen = await made.queen()
        started = []
        for number in range(hives):  # one after the other: starting is not what is measured
            started.append(await made.hive(f"gpu-{number}", queen=queen))
            await spawn_scripted(started[-1], f"model-{number}")
        await online(queen.client, *(hive.name for hive in started))
        process = psutil.Process(queen.pid)
        await asyncio.sleep(SETTLE_S)
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(seconds)
        spent = sum(process.cpu_times()[:2]) - before
        return {
            "hives": hives,
            "rss_mb": round(process.memory_info().rss / 1e6, 1),
            "cpu_percent_of_a_core": round(100 * spent / seconds, 2),
            "seconds": seconds,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}",
            "date": datetime.date.today().isoformat(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hives", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.hives, options.seconds))))


if __name__ == "__main__":
    main()
