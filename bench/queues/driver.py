"""What every driver in Python shares. It runs in the peers' environments: nothing but the standard
library is imported here.

``driver VERB JSON`` does one thing and says one line of JSON on standard output:

``prepare {}``
    the tables, where there are any
``enqueue {callers, each, seconds}``
    each caller puts ``each`` tasks in a call, and the next when that is acknowledged → ``{per_s}``
``fill {tasks}``
    so many tasks, as fast as it goes
``work {workers, each, tasks, within_s}``
    claim, do nothing, complete; a line ``{"ready": true}`` when the first has run; ends when all
    have, or the time is over → ``{per_s, runs: [[sent, ran], …]}`` in ns of the monotonic clock
``pace {rate, seconds}``
    a task every 1/rate seconds, sent when it is due and no later → ``{}``
``finished {tasks}``, ``claim {tasks}``
    so many finished rows; claims one by one with nothing else to do → ``{ms: […]}``

Each is given ``url`` and ``queue``, the name of a queue that only this stage uses.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import struct
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

TOGETHER = 100  # tasks of a fill in one call
PACERS = 8  # threads that send at a pace, where the library waits for its answers
BURN_IN = 0.1  # share of the first runs that do not count
NS = 1e9

Said = dict[str, Any]


class Driver(ABC):
    """One library's way of doing things.

    :ivar options: what came as JSON
    """

    def __init__(self, options: Said) -> None:
        self.options = options
        self.url: str = options["url"]
        self.queue: str = options["queue"]

    def prepare(self) -> None:  # noqa: B027  # most have nothing to prepare
        """Make what must be there before the first task."""

    @abstractmethod
    def work(self, workers: int, each: int) -> None:
        """Work for ever; each task calls :func:`ran` with what was sent."""

    @property
    def processes(self) -> int:
        """Into how many the work is split; by default one that does several at a time."""
        return 1

    @abstractmethod
    def enqueue(self, callers: int, each: int, seconds: float) -> float:
        """Tasks a second."""

    @abstractmethod
    def fill(self, tasks: int) -> None: ...

    @abstractmethod
    def pace(self, rate: float, seconds: float) -> None: ...

    def finished(self, tasks: int) -> None:
        raise NotImplementedError

    def claim(self, tasks: int) -> list[float]:
        raise NotImplementedError


class Plain(Driver):
    """A library whose calls return when they are acknowledged."""

    @abstractmethod
    def put(self, sent: int) -> None:
        """One task; what it is to be called with."""

    def put_all(self, sent: Sequence[int]) -> None:
        """Several in one call, where there is one."""
        for one in sent:
            self.put(one)

    def enqueue(self, callers: int, each: int, seconds: float) -> float:
        self._send(each)
        counts = [0] * callers
        began = time.monotonic()

        def call(number: int) -> None:
            while time.monotonic() - began < seconds:
                self._send(each)
                counts[number] += each

        if callers == 1:
            call(0)
        else:
            threads = [threading.Thread(target=call, args=(n,)) for n in range(callers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return sum(counts) / (time.monotonic() - began)

    def fill(self, tasks: int) -> None:
        for begin in range(0, tasks, TOGETHER):
            self.put_all([0] * min(TOGETHER, tasks - begin))

    def pace(self, rate: float, seconds: float) -> None:
        with ThreadPoolExecutor(PACERS) as threads:
            sent = []
            began = time.monotonic_ns()
            for number in range(round(rate * seconds)):
                due = began + int(number * NS / rate)
                time.sleep(max(0.0, (due - time.monotonic_ns()) / NS))
                sent.append(threads.submit(self.put, due))
        for one in sent:
            one.result()

    def _send(self, each: int) -> None:
        if each == 1:
            self.put(0)
        else:
            self.put_all([0] * each)


class Async(Driver):
    """A library of coroutines."""

    async def open(self) -> None:
        """Connect."""

    async def close(self) -> None:
        """Fine to call once."""

    @abstractmethod
    async def put(self, sent: int) -> None: ...

    async def put_all(self, sent: Sequence[int]) -> None:
        await asyncio.gather(*(self.put(one) for one in sent))

    @abstractmethod
    async def serve(self, workers: int, each: int) -> None:
        """Work for ever."""

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(main)

    def work(self, workers: int, each: int) -> None:
        self.run(self.serve(workers, each))

    def enqueue(self, callers: int, each: int, seconds: float) -> float:
        async def main() -> float:
            await asyncio.gather(*(self._send(each) for _ in range(callers)))
            began = time.monotonic()

            async def call() -> int:
                count = 0
                while time.monotonic() - began < seconds:
                    await self._send(each)
                    count += each
                return count

            counts = await asyncio.gather(*(call() for _ in range(callers)))
            return sum(counts) / (time.monotonic() - began)

        return float(self._within(main))

    def fill(self, tasks: int) -> None:
        async def main() -> None:
            for begin in range(0, tasks, TOGETHER):
                await self.put_all([0] * min(TOGETHER, tasks - begin))

        self._within(main)

    def pace(self, rate: float, seconds: float) -> None:
        async def main() -> None:
            sent = []
            began = time.monotonic_ns()
            for number in range(round(rate * seconds)):
                due = began + int(number * NS / rate)
                await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / NS))
                sent.append(asyncio.create_task(self.put(due)))
            await asyncio.gather(*sent)

        self._within(main)

    async def _send(self, each: int) -> None:
        if each == 1:
            await self.put(0)
        else:
            await self.put_all([0] * each)

    def _within(self, main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        async def opened() -> Any:
            await self.open()
            try:
                return await main()
            finally:
                await self.close()

        return self.run(opened())


_RUN = struct.Struct("qq")
_READ = 65_536  # of a pipe
_EVERY_S = 0.02  # the pipe is looked into
_out = -1


def ran(sent: int) -> None:
    """The empty task: it writes down that it ran. Forked workers and threads share the pipe."""
    os.write(_out, _RUN.pack(sent, time.monotonic_ns()))


def worked(driver: Driver, workers: int, each: int, tasks: int, within_s: float) -> Said:
    """Let processes work until so many tasks have run, or the time since the first is over."""
    global _out
    into, _out = os.pipe()
    processes = min(workers, driver.processes)
    children = [_forked(driver, workers // processes, each) for _ in range(processes)]
    runs: list[tuple[int, int]] = []
    until = time.monotonic() + within_s
    try:
        while len(runs) < tasks and (left := until - time.monotonic()) > 0:
            if not select.select([into], [], [], left)[0]:
                break
            if not runs:
                print(json.dumps({"ready": True}), flush=True)
                until = time.monotonic() + within_s
            runs += _RUN.iter_unpack(os.read(into, _READ // _RUN.size * _RUN.size))
            time.sleep(_EVERY_S)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return {"per_s": rate_of([at for _, at in runs]), "runs": runs}


def rate_of(ran_at: Sequence[int]) -> float:
    """Tasks a second, the first ones left out; 0 where there is nothing to say it from."""
    times = sorted(ran_at)
    first = int(len(times) * BURN_IN)
    if len(times) - first < 2:
        return 0.0
    return (len(times) - 1 - first) * NS / (times[-1] - times[first])


def _forked(driver: Driver, workers: int, each: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        driver.work(workers, each)
    except BaseException:  # noqa: BLE001  # a fork must not go on as its parent
        traceback.print_exc()
    os._exit(1)


def main(kind: Callable[[Said], Driver]) -> None:
    """Do what the command line says."""
    verb, options = sys.argv[1], json.loads(sys.argv[2])
    driver = kind(options)
    print(json.dumps(_done(driver, verb, options)), flush=True)


def _done(driver: Driver, verb: str, said: Said) -> Said:
    match verb:
        case "prepare":
            driver.prepare()
        case "enqueue":
            return {"per_s": driver.enqueue(said["callers"], said["each"], said["seconds"])}
        case "fill":
            driver.fill(said["tasks"])
        case "pace":
            driver.pace(said["rate"], said["seconds"])
        case "work":
            sizes = said["workers"], said["each"], said["tasks"], said["within_s"]
            return worked(driver, *sizes)
        case "finished":
            driver.finished(said["tasks"])
        case "claim":
            return {"ms": driver.claim(said["tasks"])}
        case _:
            raise SystemExit(f"There is no '{verb}'. The docstring of bench.queues.driver has all.")
    return {}
