"""How a worker comes to be: what it is to run, if there is room, and the wait until it is up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hive_agent.fitting import Fitting
from hive_agent.known import facts_of
from hive_agent.memory import Memory, request_for
from hive_agent.models.catalog import Catalog
from hive_agent.prepare import Preparation
from hive_agent.workers.base import BaseWorker
from hive_agent.workers.launch import crowding, engine_of, seated
from hive_agent.workers.llamacpp_build import Build, Builds
from hive_agent.workers.options import check_before_model, check_device
from hive_agent.workers.pool import COMPUTING, WorkerPool
from hive_agent.workers.spec import WorkerSpec
from operations.errors import Conflict
from operations.hosts import ModelInfo
from operations.names import taken_by
from operations.operations import WorkerOptions, WorkerSpawn
from wire.jobs import Job, Runner


@dataclass
class Spawner:
    """Checks requests for workers against the machine, and starts them."""

    fitting: Fitting
    catalog: Catalog
    pool: WorkerPool
    memory: Memory
    preparation: Preparation
    builds: Builds

    async def admit(self, operation: WorkerSpawn) -> Runner:
        """Check a request for a worker and promise it its memory; the runner that starts it.

        :raises HiveError: it cannot run here, or will not fit, and why
        """
        check_before_model(operation.options)
        model = await self.fitting.model(operation.model, operation.options)
        engine = engine_of(operation.options, model)
        # Before what an engine lacks: who has no GPU need not install anything for one.
        await self.fitting.check_devices(operation, model)
        build = await self._build(operation.options) if engine == "llamacpp" else None
        prepared = None
        if engine == "vllm":
            prepared = await self.preparation.prepare(model, operation.options, operation.worker)
            await self._check_names(model, prepared.adapters)
        warnings: list[str] = []
        known = await facts_of(model)
        # No waiting between a look at the devices and the promise: two spawns at once must not
        # both be given the same memory.
        devices = await self.fitting.sample()
        installed = build or prepared
        if installed is not None and (why := installed.cpu_only(operation, devices)):
            operation = operation.model_copy(update={"worker": "cpu"})
            warnings.append(why)
        choice, spec = self.fitting.placed(operation, model, known, devices)
        check_device(engine, operation.options, spec.device)
        if build is not None:
            build.check_device(spec.device)
        if prepared is not None:
            spec = prepared.applied(spec)
        if known is None:
            self.memory.expect(spec, devices)
        else:
            request = request_for(spec, known, devices)
            spread = operation.placement == "spread"
            spec = self.memory.claim(spec, request, devices, spread=spread, force=operation.force)

        async def run(job: Job) -> Any:
            for warning in warnings:
                job.warn(warning)
            for note in choice.notes:
                job.info(note)
            return await self._start(job, spec)

        return run

    async def _build(self, options: WorkerOptions) -> Build:
        """The installed build of llama.cpp, which takes these options."""
        build = await self.builds.installed()
        build.check_options(options)
        return build

    async def _check_names(self, model: ModelInfo, adapters: Mapping[str, str]) -> None:
        """:raises Conflict: an adapter has a name to which another model answers here"""
        known = self.pool.answers_for()
        known += [(other.id, other.digest) for other in (model, *await self.catalog.list())]
        for name, digest in adapters.items():
            if (other := taken_by(name, digest, known)) is not None:
                raise Conflict(
                    f"The adapter's name '{name}' is one of another model on {self.pool.hive_id}: "
                    f"{other}. Give the adapter a name of its own.",
                    code="model_name_taken",
                    param="options.lora",
                )

    async def _start(self, job: Job, spec: WorkerSpec) -> Any:
        # Counted here, without waiting until it is in the pool: of two spawns at once the second
        # sees the threads of the first.
        in_use = self.pool.threads_in_use
        spec = seated(spec, self.pool.cores, in_use)
        if spec.engine in COMPUTING and (
            crowded := crowding(spec.threads, self.pool.cores, in_use)
        ):
            job.warn(crowded)
        job.info(f"Starting worker {spec.worker_id}: {spec.engine} on {', '.join(spec.devices)}")
        worker = self.pool.spawn(spec)
        worker.told = job.info
        self.memory.started(spec.worker_id)
        job.info(
            f"Loading {spec.model.id} ({spec.model.size_bytes / 1e6:.1f} MB), "
            f"{spec.slots} slots of {spec.context_length} tokens"
        )
        began = asyncio.get_running_loop().time()
        await self.pool.came_up(worker)
        took = asyncio.get_running_loop().time() - began
        job.info(f"Worker {spec.worker_id} is ready after {took:.1f} s (process {worker.pid})")
        await self._learn(worker)
        return worker.info()

    async def _learn(self, worker: BaseWorker) -> None:
        """Measure what a worker holds that is ready, for the next prediction."""
        await self.memory.learn(worker, await self.fitting.sample())
