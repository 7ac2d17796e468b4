"""How a worker comes to be: what it is to run, if there is room, and the wait until it is up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from hive_agent.devices import Devices
from hive_agent.memory import Memory, facts_of, request_for, told
from hive_agent.models.catalog import Catalog
from hive_agent.workers.launch import decide, scripted_model
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.spec import WorkerSpec
from operations.errors import InvalidRequest
from operations.hosts import Device, Fit, ModelInfo
from operations.operations import ModelFit, WorkerSpawn
from wire.jobs import Job, Runner


@dataclass
class Spawner:
    """Checks requests for workers against the machine, and starts them."""

    hive_id: str
    devices: Devices
    catalog: Catalog
    pool: WorkerPool
    memory: Memory

    async def admit(self, operation: WorkerSpawn) -> Runner:
        """Check a request for a worker and promise it its memory; the runner that starts it.

        :raises HiveError: it cannot run here, or will not fit, and why
        """
        scripted = operation.options.engine == "scripted"
        if operation.options.script is not None and not scripted:
            raise InvalidRequest(
                "'script' belongs to the engine 'scripted'. Leave it out.", param="options.script"
            )
        if scripted:
            model = scripted_model(operation)
        else:
            model = await self.catalog.find(operation.model)
        known = await facts_of(model)
        # No waiting between a look at the devices and the promise: two spawns at once must not
        # both be given the same memory.
        devices = await asyncio.to_thread(self.devices.sample, self.pool.pids())
        spec = self._decided(operation, model, devices)

        if known is not None:
            request = request_for(spec, known, devices)
            if operation.force:
                self.memory.promise(spec, self.memory.judge(request, devices))
            else:
                self.memory.claim(spec, request, devices)

        async def run(job: Job) -> Any:
            return await self._start(job, spec)

        return run

    async def fit(self, operation: ModelFit) -> Runner:
        """What a model would take of each device.

        :raises HiveError: there is no such model here
        """
        model = await self.catalog.find(operation.model)
        known = await facts_of(model)

        async def run(job: Job) -> Any:
            devices = await asyncio.to_thread(self.devices.sample, self.pool.pids())
            found: list[Fit] = []
            for device in devices:
                kind, _, index = device.id.partition(":")
                if not device.healthy or kind not in ("cuda", "cpu"):
                    continue
                wanted = WorkerSpawn(
                    model=model.id,
                    worker=kind,  # type: ignore[arg-type]  # one of the two
                    device=int(index or 0),
                    options=operation.options,
                )
                spec = self._decided(wanted, model, devices)
                if known is None:
                    raise InvalidRequest(
                        f"What {model.id} needs cannot be told: its files do not say enough, or "
                        "its engine decides by itself. Try to load it.",
                        code="fit_unknown",
                        param="model",
                    )
                request = request_for(spec, known, devices)
                found.append(told(self.hive_id, self.memory.judge(request, devices)))
            return {"fits": found}

        return run

    def _decided(
        self, operation: WorkerSpawn, model: ModelInfo, devices: list[Device]
    ) -> WorkerSpec:
        return decide(
            operation,
            model,
            devices,
            worker_id=self.pool.new_id(),
            cores=self.pool.cores,
            threads_in_use=self.pool.threads_in_use,
            no_gpu_because=self.devices.no_gpu_because,
        )

    async def _start(self, job: Job, spec: WorkerSpec) -> Any:
        job.info(f"Starting worker {spec.worker_id}: {spec.engine} on {spec.device}")
        worker = self.pool.spawn(spec)
        try:
            job.info(
                f"Loading {spec.model.id} ({spec.model.size_bytes / 1e6:.1f} MB), "
                f"{spec.slots} slots of {spec.context_length} tokens"
            )
            began = asyncio.get_running_loop().time()
            await asyncio.shield(worker.came_up)
        except BaseException:
            await self.pool.stop(worker, 0)
            raise
        took = asyncio.get_running_loop().time() - began
        job.info(f"Worker {spec.worker_id} is ready after {took:.1f} s (process {worker.pid})")
        return worker.info()
