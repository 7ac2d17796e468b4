"""The hive's heartbeat: the whole state, every second and at once when something changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from hive_agent.devices import Devices
from hive_agent.workers.pool import WorkerPool
from operations.hosts import VERSION, Device, Heartbeat, ModelInfo
from wire import sse

log = logging.getLogger(__name__)

BEAT_S = 1.0
COALESCE_S = 0.05  # changes closer together than this make one heartbeat
LOAD_S = 0.25  # how old the load may be that is told; who sends requests counts his own
DEVICES_EVERY_S = 0.9
MODELS_EVERY_S = 2.0


def matters(devices: Sequence[Device]) -> list[object]:
    """What of the devices is told at once; temperatures and the like can wait for their second."""
    return [
        (d.id, d.healthy, d.problem, [(p.pid, (p.used_mb or 0) >> 8) for p in d.processes])
        for d in devices
    ]


class Pulse:
    """Builds heartbeats and hands them to any number of listeners."""

    def __init__(
        self,
        hive_id: str,
        instance: str,
        devices: Devices,
        pool: WorkerPool,
        list_models: Callable[[], Awaitable[Sequence[ModelInfo]]],
        jobs_in_flight: Callable[[], int],
        revoked_keys: Callable[[], list[str]],
    ) -> None:
        self.stopping = False
        self.devices: list[Device] = []
        self.models: list[ModelInfo] = []
        self.queens: dict[str, int] = {}
        """Open subscriptions by queen id."""
        self._hive_id = hive_id
        self._instance = instance
        self._devices = devices
        self._pool = pool
        self._list_models = list_models
        self._jobs_in_flight = jobs_in_flight
        self._revoked_keys = revoked_keys
        self._changed = asyncio.Event()
        self._beat = asyncio.Event()
        # A thread of its own: downloads and hashing must not delay a heartbeat.
        self._sampler = ThreadPoolExecutor(1, thread_name_prefix="devices")
        self._sampling: asyncio.Future[list[Device]] | None = None
        self._listing: asyncio.Task[None] | None = None
        self._latest = ""
        self._ended = False
        self._models_at = self._devices_at = float("-inf")
        self._telling: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._sample()
        assert self._sampling is not None
        self.devices = await self._sampling
        if self._listing is not None:
            await self._listing  # the first heartbeat knows the models already
        self._latest = self.heartbeat().model_dump_json()
        self._task = asyncio.create_task(self._run(), name="pulse")

    async def stop(self) -> None:
        """End the heartbeats; every listener's stream ends with them."""
        self._ended = True
        self._latest = self.heartbeat().model_dump_json()  # it says that this hive stops
        self._beat.set()
        if self._telling is not None:
            self._telling.cancel()
        for task in (self._task, self._listing):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        self._sampler.shutdown(wait=False, cancel_futures=True)

    def changed(self) -> None:
        """Something in the heartbeat is different now."""
        self._changed.set()

    def load_changed(self) -> None:
        """A request has come or gone."""
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(LOAD_S, self._tell_load)

    def _tell_load(self) -> None:
        self._telling = None
        self._changed.set()

    def models_changed(self) -> None:
        """The models on disk are different now."""
        self._models_at = float("-inf")
        self._changed.set()

    def heartbeat(self) -> Heartbeat:
        workers = self._pool.all()
        loaded = {worker.digest for worker in workers if worker.state == "ready"}
        busy = any(worker.in_flight for worker in workers)
        return Heartbeat(
            hive_id=self._hive_id,
            instance=self._instance,
            version=VERSION,
            hostname=socket.gethostname(),
            timestamp=time.time(),
            operational_status="stopping" if self.stopping else "busy" if busy else "ready",
            devices=self.devices,
            models=[m.model_copy(update={"loaded": m.digest in loaded}) for m in self.models],
            workers=workers,
            jobs_in_flight=self._jobs_in_flight(),
            revoked_keys=self._revoked_keys(),
        )

    async def listen(self, queen_id: str | None) -> AsyncGenerator[sse.Event, None]:
        """The latest heartbeat at once, then every new one. A slow listener skips some."""
        if queen_id is not None:
            self.queens[queen_id] = self.queens.get(queen_id, 0) + 1
        try:
            while True:
                beat, last = self._beat, self._ended
                yield sse.Event(self._latest, event="heartbeat")
                if last:
                    return
                await beat.wait()
        finally:
            if queen_id is not None:
                self.queens[queen_id] -= 1
                if not self.queens[queen_id]:
                    del self.queens[queen_id]

    async def _run(self) -> None:
        while True:
            try:
                self._sample()
                self._latest = self.heartbeat().model_dump_json()
            except Exception:  # a heartbeat that cannot be built is missed; the next is tried
                log.exception("a heartbeat could not be built")
            beat, self._beat = self._beat, asyncio.Event()
            beat.set()
            await asyncio.sleep(COALESCE_S)
            # Not asyncio.wait_for: in Python 3.11 it loses a cancellation that comes with the news.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S - COALESCE_S):
                    await self._changed.wait()
            self._changed.clear()

    def _sample(self) -> None:
        """Begin to look at everything again; what is slow is in a later heartbeat."""
        now = time.monotonic()
        due = now - self._devices_at >= DEVICES_EVERY_S
        if due and (self._sampling is None or self._sampling.done()):
            self._devices_at = now
            self._pool.sample()
            loop = asyncio.get_running_loop()
            ours = self._pool.pids()
            self._sampling = loop.run_in_executor(self._sampler, self._devices.sample, ours)
            self._sampling.add_done_callback(self._sampled)
        due = now - self._models_at >= MODELS_EVERY_S
        if due and (self._listing is None or self._listing.done()):
            self._models_at = now
            self._listing = asyncio.create_task(self._list(), name="list models")

    def _sampled(self, sampling: asyncio.Future[list[Device]]) -> None:
        if sampling.cancelled():
            return
        if (error := sampling.exception()) is not None:
            log.error("the devices could not be sampled", exc_info=error)
        else:
            before, self.devices = self.devices, sampling.result()
            self._pool.seen(self.devices)
            if matters(before) != matters(self.devices):
                self.changed()

    async def _list(self) -> None:
        try:
            models = list(await self._list_models())
        except Exception:  # the next round lists again
            log.exception("the models could not be listed")
            return
        if models != self.models:
            self.models = models
            self.changed()
