"""What processes cost: CPU and memory of whole process trees, and who else is busy here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import psutil

MB = 1e6


@dataclass(frozen=True)
class Cores:
    """Where what runs, for the whole run.

    :param load: the load generator's core
    :param upstream: the upstream's, which is the load generator's where there are only two
    :param measured: the core of what is measured, all of its processes
    """

    load: int
    upstream: int
    measured: int

    @classmethod
    def choose(cls) -> Self:
        """:raises RuntimeError: this process may run on one core only"""
        free = sorted(os.sched_getaffinity(0))
        if len(free) < 2:
            raise RuntimeError(
                "The load and what it measures need a core each, and this process may use one. "
                "Run it where there are two, or widen its CPU affinity."
            )
        return cls(load=free[0], upstream=free[1] if len(free) > 2 else free[0], measured=free[-1])


@contextlib.contextmanager
def started_on(core: int) -> Iterator[None]:
    """Processes started within the block live on one core and see no other."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def tree(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes and all that they started."""
    found: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the trees, of their ended children too (proc(5), stat)."""
    total = 0.0
    for process in tree(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


def rss_mb(pids: Iterable[int]) -> float:
    """Resident memory of the trees in MB (10^6 bytes); what processes share counts for each."""
    total = 0
    for process in tree(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / MB


@dataclass(frozen=True)
class Busy:
    """CPU seconds of the whole machine, and of this process with all that it started."""

    machine: float
    ours: float

    @classmethod
    def now(cls) -> Self:
        times = psutil.cpu_times()
        idle = times.idle + times.iowait
        return cls(machine=sum(times[:8]) - idle, ours=cpu_seconds((os.getpid(),)))

    def others_since(self, before: Busy) -> float:
        """CPU seconds that went to somebody else (a hypervisor's included) since ``before``."""
        return max(0.0, self.machine - before.machine - (self.ours - before.ours))
