"""The daemon of one machine: what it owns, and in which order that starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from hive_agent import runtime
from hive_agent.announcer import Announcer
from hive_agent.app import build
from hive_agent.devices import Devices, cores
from hive_agent.engines import Engines
from hive_agent.fitting import Fitting
from hive_agent.handlers import Handlers
from hive_agent.memory import Memory
from hive_agent.models.catalog import Catalog
from hive_agent.models.hub import Hub
from hive_agent.prepare import Preparation
from hive_agent.pulse import Pulse
from hive_agent.settings import AgentSettings
from hive_agent.spawner import Spawner
from hive_agent.workers.base import BaseWorker
from hive_agent.workers.llamacpp_build import Builds
from hive_agent.workers.pool import Wanted, WorkerPool
from operations.errors import NotFound
from operations.hosts import VERSION, Health, HealthWorker, Info, Task
from wire.door import Doorway, Request
from wire.door.job_streams import job_streams
from wire.door.relay import Lease, Upstream, relaying
from wire.door.trunked import over_trunks
from wire.gate import Gate
from wire.jobs import LocalJobs
from wire.log import outcome
from wire.mdns import Announcement
from wire.metrics import Metrics, device_gauges, trunk_gauges
from wire.openai import RELAYED
from wire.serve import Listening, Stop
from wire.trunk.frames import PROTOCOL
from wire.trunk.server import PATH, TrunkServer

KEPT_UPSTREAMS = 1024


class Agent:
    """One hive. Implements :class:`wire.serve.Daemon` and :class:`wire.openai.Backend`."""

    role = "hive"

    def __init__(self, settings: AgentSettings, listening: Listening, stop: Stop) -> None:
        """:raises CannotStart: folders or secret cannot be had, or another agent holds them"""
        self.name = settings.hive_id
        self.settings = settings
        self.stop = stop
        stop.at_once = self._refuse_work
        state = runtime.state_folder(settings.state_dir)
        self._lock = runtime.lock(state)
        self.metrics = Metrics(self._gauges)
        self.devices = Devices()
        self._runtime = runtime.runtime_folder(state)
        instance = secrets.token_hex(8)
        self.trust = settings.trust(
            listening, role="hive", id=self.name, instance=instance, kept=state
        )
        self.pool = WorkerPool(
            hive_id=self.name,
            state=state,
            runtime=self._runtime,
            cores=cores(),
            health_s=settings.health_seconds,
        )
        self._upstreams: dict[tuple[str, str], Upstream] = {}
        self._upstreams_at = self.pool.changes
        self.engines = Engines(
            state / "engines",
            in_use=lambda: [(w.spec.worker_id, w.spec.python) for w in self.pool.workers()],
        )
        cache_dir = hub_cache()
        self.catalog = Catalog(cache_dir=cache_dir, state_dir=state)
        self.hub = Hub(cache_dir=cache_dir)
        self.pulse = Pulse(
            self.name,
            instance,
            self.devices,
            self.pool,
            self.catalog.list,
            lambda: len(self.jobs.running),
            lambda: self.trust.revocations.listed,
        )
        self.pool.changed = self.pulse.changed
        self.pool.load_changed = self.pulse.load_changed
        fitting = Fitting(
            hive_id=self.name,
            devices=self.devices,
            catalog=self.catalog,
            pool=self.pool,
            memory=Memory(self.pool, state / "fit.json"),
            hub=self.hub,
            preparation=Preparation(self.engines, self.catalog),
            builds=Builds(self.devices.sample),
        )
        self.handlers = Handlers(
            hive_id=self.name,
            devices=self.devices,
            catalog=self.catalog,
            cache_dir=cache_dir,
            state_dir=state,
            hub=self.hub,
            engines=self.engines,
            pool=self.pool,
            pulse=self.pulse,
            metrics=self.metrics,
            drain_seconds=settings.drain_seconds,
            fitting=fitting,
            spawner=Spawner(
                fitting=fitting,
                catalog=self.catalog,
                pool=self.pool,
                memory=fitting.memory,
                preparation=fitting.preparation,
                builds=fitting.builds,
            ),
        )
        self.jobs = LocalJobs(self.name, self.handlers.admit, ended=self.metrics.job_ended)
        self.gate = Gate(self.trust, settings.max_body)
        serve = relaying(self.lease, "hive", self.metrics)
        routes = dict.fromkeys(RELAYED, serve)
        take = {PROTOCOL.encode(): (PATH, self._take_trunk)}
        self.doorway = Doorway(
            self.gate,
            "hive",
            routes,
            take,
            job_streams(self.jobs),
            refused=self.metrics.request_refused,
        )
        self.trunks = TrunkServer(self.gate, over_trunks(self.doorway.server))
        self._announcer = Announcer(
            self.name, instance, listening, settings, self.trust.secret, self.pulse
        )
        self._announcement: Announcement | None = None
        if self.trust.listens_openly and self.trust.secret is not None:
            self._announcement = Announcement(
                hive_id=self.name,
                cluster_id=self.trust.secret.cluster_id,
                instance=instance,
                version=VERSION,
                port=listening.port,
                tls=listening.certificate is not None,
                bound=None if listening.everywhere else listening.host,
                wanted=settings.interface,
            )
        self.info = Info(
            role="hive",
            id=self.name,
            version=VERSION,
            base_url=listening.url,
            port=listening.port,
            features=["jobs", "openai", "heartbeats", "metrics"],
        )

    async def start(self) -> ASGIApp:
        for record in await asyncio.to_thread(self.pool.records.end_all):
            outcome("worker", worker=record.worker_id, pid=record.pid, state="ended as an orphan")
        await self.engines.start()
        await self.pulse.start()
        self._announcer.start()
        if self._announcement is not None:
            await self._announcement.start()
        return build(self)

    async def drain(self) -> None:
        """Answers may finish until the deadline; everything else (resumable) is cancelled."""
        for job in self.jobs.running:
            if job.operation != "infer" and job.task is not None:
                job.task.cancel()
        self.trunks.drain()
        await self.pool.drain(self.settings.drain_seconds)

    async def close(self) -> None:
        await self.jobs.close(0)
        await self.engines.close()
        await self.pool.close(0)
        await self._announcer.stop()
        if self._announcement is not None:
            await self._announcement.stop()
        self.trunks.close()
        await self.pulse.stop()
        await self.catalog.close()
        with contextlib.suppress(OSError):  # a worker that would not stop keeps its socket
            self._runtime.rmdir()
        self._lock.release()

    def _refuse_work(self) -> None:
        self.jobs.closed = True
        self.pool.lending = False
        self.pulse.stopping = True
        self.pulse.changed()

    # -- for the routes ----------------------------------------------------------------------

    def health(self) -> Health:
        workers = self.pool.all()
        return Health(
            role="hive",
            version=VERSION,
            workers=[HealthWorker(id=worker.worker_id, free=worker.free) for worker in workers],
            queued=sum(max(0, worker.in_flight - worker.slots) for worker in workers),
        )

    def lease(self, model: str, task: Task, failed: frozenset[str]) -> Lease | Awaitable[Lease]:
        """See :data:`wire.door.relay.Find`."""
        try:
            if not failed and (worker := self.pool.take_ready(model, task)) is not None:
                return self._leased(worker, model)
            wanted = self._wanted(self.pool.digest_of(model), task, failed)
        except NotFound:
            return self._lease(model, task, failed)  # says what there is
        worker = self.pool.take(wanted)
        return self._lease(model, task, failed) if worker is None else self._leased(worker, model)

    async def _lease(self, model: str, task: Task, failed: frozenset[str]) -> Lease:
        wanted = self._wanted(await self.handlers.loaded(model), task, failed)
        return self._leased(await self.pool.taken(wanted), model)

    def _leased(self, worker: BaseWorker, model: str) -> Lease:
        return Lease(self._upstream(worker, model), partial(self.pool.give_back, worker))

    def _upstream(self, worker: BaseWorker, model: str) -> Upstream:
        """The way to a worker for one of its model's names, made once and not for each request."""
        if self._upstreams_at != self.pool.changes or len(self._upstreams) >= KEPT_UPSTREAMS:
            self._upstreams_at = self.pool.changes
            self._upstreams.clear()
        worker_id = worker.spec.worker_id
        known = self._upstreams.get((worker_id, model))
        if known is None:
            known = self._upstreams[worker_id, model] = Upstream(
                line=worker.line,
                hop="worker",
                name=self._called(worker_id),
                model=worker.spec.model.id,
                served_as=worker.name_for(model),
                tags={b"x-hive-id": self.name.encode(), b"x-worker-id": worker_id.encode()},
            )
        return known

    def _wanted(self, digest: str, task: Task, failed: frozenset[str]) -> Wanted:
        if not failed:
            return Wanted(digest, task)
        ids = (worker.spec.worker_id for worker in self.pool.workers())
        return Wanted(digest, task, avoid=frozenset(i for i in ids if self._called(i) in failed))

    def _take_trunk(self, request: Request, transport: asyncio.Transport, rest: bytes) -> None:
        self.trunks.take(request.caller, request.headers.get("host", ""), transport, rest)

    def _called(self, worker_id: str) -> str:
        """How messages call a worker of this hive."""
        return f"worker {worker_id} on {self.name}"

    def served_models(self) -> list[dict[str, Any]]:
        served: dict[str, dict[str, Any]] = {}
        for worker in self.pool.all():
            for name, _ in worker.answers_for if worker.state != "failed" else ():
                served.setdefault(
                    name,
                    {
                        "id": name,
                        "object": "model",
                        "created": int(worker.started_at),
                        "owned_by": "hive",
                    },
                )
        return list(served.values())

    def _gauges(self) -> Iterable[tuple[str, str, dict[str, str], float]]:
        for worker in self.pool.all():
            labels = {"worker": worker.worker_id, "model": worker.model, "device": worker.device}
            up = 1.0 if worker.state == "ready" else 0.0
            yield "hive_worker_ready", "Whether a worker takes requests.", labels, up
            yield "hive_worker_in_flight", "Requests on a worker.", labels, worker.in_flight
            yield "hive_worker_restarts", "Restarts of a worker.", labels, worker.restarts
        yield from device_gauges(self.pulse.devices, {})
        yield from trunk_gauges(self.trunks.counters())


def hub_cache() -> Path:
    """The Hugging Face cache of this user, as its own variables name it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
