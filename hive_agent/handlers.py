"""What this hive does with each operation: one ``match``.

:meth:`Handlers.admit` checks an operation against the machine and refuses a bad one at once;
what it returns runs it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from hive_agent.attach import attach, look
from hive_agent.checks import hive_check
from hive_agent.devices import Devices
from hive_agent.engines import Engines
from hive_agent.fitting import Fitting
from hive_agent.inference import infer
from hive_agent.models.catalog import Catalog
from hive_agent.models.hub import Hub, in_time
from hive_agent.models.progress import describe
from hive_agent.models.references import parse_reference
from hive_agent.pulse import Pulse
from hive_agent.spawner import Spawner
from hive_agent.workers.pool import Wanted, WorkerPool, choose
from operations.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unavailable
from operations.hosts import EngineInfo, ModelInfo
from operations.names import resolve
from operations.operations import (
    DeviceList,
    EngineDelete,
    EngineInstall,
    EngineList,
    EngineModels,
    HiveCheck,
    Infer,
    ModelDelete,
    ModelDownload,
    ModelFit,
    ModelGet,
    ModelList,
    ModelLoad,
    ModelUnload,
    Operation,
    QueenCheck,
    Status,
    WorkerProcessDelete,
    WorkerProcessGet,
    WorkerProcessList,
    WorkerSpawn,
)
from wire.jobs import Job, Runner, tell
from wire.metrics import Metrics

THIS_MACHINE = "localhost"
"""A ``hive_id`` that always means the hive that is asked."""


@dataclass
class Handlers:
    """Everything that operations work on."""

    hive_id: str
    devices: Devices
    catalog: Catalog
    cache_dir: Path
    state_dir: Path
    hub: Hub
    engines: Engines
    pool: WorkerPool
    pulse: Pulse
    metrics: Metrics
    drain_seconds: float
    fitting: Fitting
    spawner: Spawner

    async def admit(self, operation: Operation) -> Runner:
        """Check an operation; the runner that carries it out.

        :raises HiveError: it cannot be done here, and why
        """
        if operation.hive_id not in (None, THIS_MACHINE, self.hive_id):
            raise NotFound(
                f"This is hive {self.hive_id}, not {operation.hive_id}. Ask that hive, or the "
                "queen, or leave 'hive_id' out.",
                code="hive_not_found",
                param="hive_id",
            )
        match operation:
            case Infer():
                return await self._infer(operation)
            case WorkerSpawn() if operation.options.engine == "external":
                return await attach(operation, self.pool, self.catalog)
            case WorkerSpawn():
                return await self.spawner.admit(operation)
            case ModelLoad():
                return await self.spawner.admit(operation.as_spawn())
            case WorkerProcessList():
                return tell(lambda: {"workers": self.pool.all()})
            case WorkerProcessGet():
                return self._worker_get(operation)
            case WorkerProcessDelete():
                return self._worker_delete(operation)
            case ModelDownload():
                return await self._download(operation)
            case ModelList():
                return self._model_list()
            case ModelGet():
                model = await self.catalog.find(operation.id)
                return tell(lambda: self._at_home(model))
            case ModelDelete():
                return await self._model_delete(operation)
            case ModelUnload():
                return await self._unload(operation)
            case ModelFit():
                return await self.fitting.fit(operation)
            case EngineModels():
                return await look(operation)
            case EngineList():
                return self._engine_list()
            case EngineInstall():
                return self._engine_install(operation)
            case EngineDelete():
                return self._engine_delete(operation)
            case DeviceList():
                return self._device_list()
            case Status():
                return self._status()
            case HiveCheck():
                return lambda job: hive_check(
                    job,
                    self.devices,
                    self.engines,
                    self.catalog,
                    self.cache_dir,
                    self.state_dir,
                    self.pool,
                )
            case QueenCheck():
                raise InvalidRequest(
                    f"This is hive {self.hive_id}, no queen. Ask it for a hive_check instead.",
                    param="operation",
                )
        assert_never(operation)

    async def loaded(self, name: str) -> str:
        """The digest of a model that a worker holds, or is loading.

        :raises NotFound: no such model here; lists what there is
        :raises Unavailable: it is on disk, and nobody has loaded it
        """
        try:
            return self.pool.digest_of(name)
        except NotFound:
            on_disk = [(model.id, model.digest) for model in await self.catalog.list()]
        digest = resolve(name, self.pool.answers_for() + on_disk)
        model_id = next(model_id for model_id, known in on_disk if known == digest)
        raise Unavailable(
            f"{model_id} is on {self.hive_id}'s disk, and no worker has it loaded. "
            f"Start one with 'hive workers spawn {model_id}'.",
            code="model_not_loaded",
            param="model",
        )

    # -- inference and workers ---------------------------------------------------------------

    async def _infer(self, operation: Infer) -> Runner:
        if operation.worker_id is not None:
            self.pool.get(worker_id=operation.worker_id)
        digest = await self.loaded(operation.model)
        wanted = Wanted(digest, device=operation.device, worker_id=operation.worker_id)
        choose(self.pool.all(), wanted)

        async def run(job: Job) -> Any:
            return await infer(job, operation, wanted, self.pool, self.metrics)

        return run

    def _worker_get(self, operation: WorkerProcessGet) -> Runner:
        worker = self.pool.get(worker_id=operation.worker_id, pid=operation.pid)

        def describe_worker() -> Any:
            described = worker.info().model_dump(exclude_none=True)
            return {**described, "log_tail": worker.log_tail(operation.log_lines)}

        return tell(describe_worker)

    def _worker_delete(self, operation: WorkerProcessDelete) -> Runner:
        worker = self.pool.get(worker_id=operation.worker_id, pid=operation.pid)

        async def run(job: Job) -> Any:
            worker_id, pid = worker.spec.worker_id, worker.pid
            if worker.requests.count:
                job.info(
                    f"{worker.requests.count} requests are running; they get up to "
                    f"{self.drain_seconds:.0f} s"
                )
            await self.pool.stop(worker, self.drain_seconds)
            end = "stopped" if worker.url is None else f"detached; {worker.url} runs on"
            return {"worker_id": worker_id, "pid": pid, "message": f"Worker {worker_id} {end}"}

        return run

    # -- models ------------------------------------------------------------------------------

    async def _download(self, operation: ModelDownload) -> Runner:
        reference = parse_reference(operation.model)
        if reference.path is not None:
            model = await self.catalog.register_file(reference)
            self.pulse.models_changed()
            return tell(lambda: self._at_home(model))
        async with in_time(reference):
            plan = await self.hub.plan(reference)

        async def run(job: Job) -> Any:
            job.info(f"Downloading {plan.model_id} to {self.hive_id}")
            await self.hub.fetch(plan, lambda progress: job.info(describe(progress)))
            self.pulse.models_changed()
            try:
                return self._at_home(await self.catalog.find(plan.model_id))
            except NotFound:
                raise InvalidRequest(
                    f"What was fetched as {plan.model_id} is no model that can be read: no GGUF, "
                    "or a damaged one. Choose another repository."
                ) from None

        return run

    def _model_list(self) -> Runner:
        async def run(job: Job) -> Any:
            loaded = {worker.digest for worker in self.pool.all() if worker.state == "ready"}
            return {
                "models": [
                    self._at_home(model, loaded=model.digest in loaded)
                    for model in await self.catalog.list()
                ]
            }

        return run

    async def _model_delete(self, operation: ModelDelete) -> Runner:
        model_id = operation.id
        if model_id.lower().startswith("file:"):  # a file may have gone, and be forgotten yet
            path = str(parse_reference(model_id).path)
        else:
            model = await self.catalog.find(model_id)
            model_id, path = model.id, model.path
            if model.source == "shipped":
                raise Forbidden(
                    f"{model_id} is part of Hive and stays. Delete another model.", param="id"
                )
        # By path: a worker with adapters or another chat template has it under another name.
        if holders := [w.spec.worker_id for w in self.pool.workers() if w.spec.model.path == path]:
            raise Conflict(
                f"{model_id} is loaded by {', '.join(holders)}. Stop it first: "
                f"'hive workers rm {holders[0]}'.",
                code="model_in_use",
                param="id",
            )

        async def run(job: Job) -> Any:
            gone = await self.catalog.delete(model_id)
            self.pulse.models_changed()
            return {"model_id": gone.id, "message": f"{gone.id} removed from {self.hive_id}"}

        return run

    async def _unload(self, operation: ModelUnload) -> Runner:
        digest = await self.loaded(operation.id)

        async def run(job: Job) -> Any:
            workers = self.pool.holding(digest)
            await asyncio.gather(*(self.pool.stop(w, self.drain_seconds) for w in workers))
            return {"stopped": [worker.spec.worker_id for worker in workers]}

        return run

    def _at_home(self, model: ModelInfo, *, loaded: bool | None = None) -> ModelInfo:
        held = bool(self.pool.holding(model.digest)) if loaded is None else loaded
        return model.model_copy(update={"hive_id": self.hive_id, "loaded": held})

    # -- engines -----------------------------------------------------------------------------

    def _engine_list(self) -> Runner:
        async def run(job: Job) -> Any:
            return {"engines": [self._engine(one) for one in await self.engines.all()]}

        return run

    def _engine_install(self, operation: EngineInstall) -> Runner:
        recipe = self.engines.check(operation.engine, operation.version)

        async def run(job: Job) -> Any:
            await asyncio.to_thread(self.devices.sample, self.pool.pids())
            if recipe.kind == "cuda" and (why := self.devices.no_gpu_because):
                job.warn(f"{recipe.name} computes on NVIDIA GPUs, and there is none yet: {why}")
            done = await self.engines.install(operation.engine, operation.version, job.info)
            return self._engine(done)

        return run

    def _engine_delete(self, operation: EngineDelete) -> Runner:
        self.engines.check_delete(operation.engine, operation.version)

        async def run(job: Job) -> Any:
            gone = await self.engines.delete(operation.engine, operation.version)
            return {"engine": gone, "message": f"{gone} removed from {self.hive_id}"}

        return run

    def _engine(self, engine: EngineInfo) -> EngineInfo:
        return engine.model_copy(update={"hive_id": self.hive_id})

    # -- the machine -------------------------------------------------------------------------

    def _device_list(self) -> Runner:
        async def run(job: Job) -> Any:
            devices = await asyncio.to_thread(self.devices.sample, self.pool.pids())
            return {"devices": [{**d.model_dump(), "hive_id": self.hive_id} for d in devices]}

        return run

    def _status(self) -> Runner:
        def describe_hive() -> Any:
            beat = self.pulse.heartbeat().model_dump(exclude_none=True)
            return {"role": "hive", **beat}

        return tell(describe_hive)
