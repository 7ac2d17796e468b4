"""How a worker comes to be: what it is to run, if there is room, and the wait until it is up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hive_agent.devices import Devices
from hive_agent.fit.facts import ModelFacts
from hive_agent.fit.verdict import Verdict
from hive_agent.known import Known, at_hub, facts_of, offers
from hive_agent.memory import Memory, request_for, told
from hive_agent.models.catalog import Catalog
from hive_agent.models.derived import derived
from hive_agent.models.hub import Hub
from hive_agent.models.references import is_repo, parse_reference
from hive_agent.placement import Choice, Machine, candidates
from hive_agent.prepare import Preparation
from hive_agent.workers.base import BaseWorker
from hive_agent.workers.launch import crowding, decide, engine_of, scripted_model, seated
from hive_agent.workers.llamacpp_build import Build, Builds
from hive_agent.workers.options import check, check_before_model
from hive_agent.workers.pool import COMPUTING, WorkerPool
from hive_agent.workers.spec import WorkerSpec
from operations.errors import InvalidRequest, NotFound, Unavailable
from operations.hosts import Device, Fit, ModelInfo
from operations.operations import ModelFit, WorkerOptions, WorkerSpawn
from wire.jobs import Job, Runner

HUB_S = 30.0  # what the hub gets to tell of a model


@dataclass
class Spawner:
    """Checks requests for workers against the machine, and starts them."""

    hive_id: str
    devices: Devices
    catalog: Catalog
    pool: WorkerPool
    memory: Memory
    hub: Hub
    preparation: Preparation
    _builds: Builds = field(default_factory=Builds, init=False)

    async def admit(self, operation: WorkerSpawn) -> Runner:
        """Check a request for a worker and promise it its memory; the runner that starts it.

        :raises HiveError: it cannot run here, or will not fit, and why
        """
        check_before_model(operation.options)
        model = await self._model(operation.model, operation.options)
        engine = engine_of(operation.options, model)
        build = await self._build(operation.options) if engine == "llamacpp" else None
        prepared = None
        if engine == "vllm":
            prepared = await self.preparation.prepare(model, operation.options, operation.worker)
        warnings: list[str] = []
        known = await facts_of(model)
        # No waiting between a look at the devices and the promise: two spawns at once must not
        # both be given the same memory.
        devices = await asyncio.to_thread(self.devices.sample, self.pool.pids())
        if build is not None and (why := build.cpu_only(operation, devices)):
            operation = operation.model_copy(update={"worker": "cpu"})
            warnings.append(why)
        choice, spec = self._placed(operation, model, known, devices)
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

    async def fit(self, operation: ModelFit) -> Runner:
        """What a model would take of each device; of several GPUs, where one is not enough.

        :raises HiveError: neither this disk nor the hub has such a model, or it says too little
        """
        known = await self._known(operation)
        facts = known.facts
        if facts is None:
            raise InvalidRequest(
                f"What {known.model.id} needs cannot be told: its files do not say enough, or its "
                "engine decides by itself. Try to load it.",
                code="fit_unknown",
                param="model",
            )

        async def run(job: Job) -> Any:
            devices = await asyncio.to_thread(self.devices.sample, self.pool.pids())
            verdicts = [
                self._judged(operation, known, facts, [device], devices)
                for device in devices
                if device.healthy and device.id.partition(":")[0] in ("cuda", "cpu")
            ]
            if shared := self._sharing(operation, known, facts, devices):
                verdicts.insert(len(verdicts) - 1, shared)
            return {"fits": [self._told(known, verdict) for verdict in verdicts]}

        return run

    async def _known(self, operation: ModelFit) -> Known:
        """The model on this disk, or else at the hub."""
        try:
            model = await self._model(operation.model, operation.options)
        except NotFound as error:
            return await self._at_hub(operation, error)
        others = await self.catalog.list()
        return Known(model, await facts_of(model), offers(model, others))

    async def _at_hub(self, operation: ModelFit, nowhere: NotFound) -> Known:
        """:raises NotFound: as given, where the name is none of a repository"""
        repo = operation.model.partition(":")[0]
        if not is_repo(repo):
            raise nowhere
        reference = parse_reference(operation.model)
        try:
            async with asyncio.timeout(HUB_S):
                known = await at_hub(self.hub, reference)
        except TimeoutError:
            raise Unavailable(
                f"The hub did not tell of '{reference}' within {HUB_S:.0f} s. Try again later.",
                code="hub_unreachable",
            ) from None
        check(engine_of(operation.options, known.model), operation.options)
        return known

    def _judged(
        self,
        operation: ModelFit,
        known: Known,
        facts: ModelFacts,
        chosen: Sequence[Device],
        devices: Sequence[Device],
    ) -> Verdict:
        wanted = WorkerSpawn(model=operation.model, options=operation.options)
        spec = self._decided(wanted, known.model, chosen)
        return self.memory.judge(request_for(spec, facts, devices), devices, known.offers)

    def _sharing(
        self, operation: ModelFit, known: Known, facts: ModelFacts, devices: Sequence[Device]
    ) -> Verdict | None:
        """The verdict on the best set of several GPUs, where it fits on no single one."""
        if sum(device.id.startswith("cuda:") and device.healthy for device in devices) < 2:
            return None
        wanted = WorkerSpawn(model=operation.model, worker="cuda", options=operation.options)
        choice, _ = self._placed(wanted, known.model, facts, devices)
        if len(choice.devices) == 1:
            return None
        return self._judged(operation, known, facts, choice.devices, devices)

    def _told(self, known: Known, verdict: Verdict) -> Fit:
        fit = told(self.hive_id, verdict, self.memory.last(verdict.request))
        return fit.model_copy(update={"on_disk": bool(known.model.path)})

    async def _model(self, name: str, options: WorkerOptions) -> ModelInfo:
        """The model that is asked for, as its options make it."""
        if options.engine == "scripted":
            check("scripted", options)
            return scripted_model(name, options)
        model = await self.catalog.find(name)
        check(engine_of(options, model), options)
        return await derived(self.catalog, model, options)

    async def _build(self, options: WorkerOptions) -> Build:
        """The installed build of llama.cpp, which takes these options."""
        build = await self._builds.installed()
        build.check_options(options)
        return build

    def _placed(
        self,
        operation: WorkerSpawn,
        model: ModelInfo,
        known: ModelFacts | None,
        devices: Sequence[Device],
    ) -> tuple[Choice, WorkerSpec]:
        """The first devices in which it fits; where it fits in none, those that lack least.

        Without a prediction, the emptiest.

        :raises HiveError: no such devices, or it cannot run there
        """
        machine = Machine(
            self.memory.left(devices), self.memory.workers(), self.devices.no_gpu_because
        )
        engine = engine_of(operation.options, model)
        if known is None and engine != "scripted":
            operation = operation.model_copy(update={"placement": "spread"})
        choices = (
            (choice, self._decided(operation, model, choice.devices))
            for choice in candidates(operation, engine, machine)
        )
        if known is None:
            return next(choices)
        return self.memory.best(
            ((tried, request_for(tried[1], known, devices)) for tried in choices), devices
        )

    def _decided(
        self, operation: WorkerSpawn, model: ModelInfo, devices: Sequence[Device]
    ) -> WorkerSpec:
        return decide(
            operation,
            model,
            devices,
            worker_id=self.pool.new_id(),
            cores=self.pool.cores,
            threads_in_use=self.pool.threads_in_use,
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
        await self._learn(worker)
        return worker.info()

    async def _learn(self, worker: BaseWorker) -> None:
        """Measure what a worker holds that is ready, for the next prediction."""
        devices = await asyncio.to_thread(self.devices.sample)
        await self.memory.learn(worker, devices)
