"""Samples the devices once for each line that it is told; says what it saw, a JSON object a line.

A line is ``{"ours": [pid, …], "wait": seconds by which its clock is put forward first}``.
``python -m tests.fake_nvml.sampler N`` says what N samples in a row cost instead.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time

from hive_agent.devices import Devices


class Clock:
    """The time, which can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


def answer() -> None:
    clock = Clock()
    devices = Devices(clock=clock)
    for line in sys.stdin:
        asked = json.loads(line)
        clock.ahead += asked.get("wait", 0.0)
        began = time.monotonic()
        found = devices.sample(asked.get("ours", ()))
        took = time.monotonic() - began
        seen = [device.model_dump() for device in found]
        told = {"devices": seen, "why": devices.no_gpu_because, "took_s": took}
        print(json.dumps(told), flush=True)


def measure(rounds: int) -> None:
    devices = Devices()
    devices.sample()
    times, cpu = [], time.process_time()
    for _ in range(rounds):
        began = time.perf_counter()
        devices.sample()
        times.append(time.perf_counter() - began)
    cpu = (time.process_time() - cpu) / rounds
    print(json.dumps({"median_s": statistics.median(times), "max_s": max(times), "cpu_s": cpu}))


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr)
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        answer()
