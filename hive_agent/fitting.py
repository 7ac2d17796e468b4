"""What a model would take of this machine, and where it would go: asked before a load, or instead
of one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hive_agent.devices import Devices
from hive_agent.fit.facts import ModelFacts
from hive_agent.fit.verdict import Verdict
from hive_agent.known import Known, at_hub, facts_of, offers
from hive_agent.memory import Memory, request_for, told
from hive_agent.models.catalog import Catalog
from hive_agent.models.derived import derived
from hive_agent.models.hub import Hub, in_time
from hive_agent.models.references import is_repo, parse_reference
from hive_agent.models.safetensors import check_weights
from hive_agent.placement import Choice, Machine, candidates
from hive_agent.prepare import Preparation
from hive_agent.workers.launch import decide, engine_of, scripted_model
from hive_agent.workers.llamacpp_build import Builds
from hive_agent.workers.options import check
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.spec import WorkerSpec
from operations.errors import InvalidRequest, NotFound
from operations.hosts import Device, Fit, ModelInfo
from operations.operations import ModelFit, WorkerOptions, WorkerSpawn
from wire.jobs import Job, Runner

KINDS: Final = ("cuda", "cpu")  # of devices on which workers run


@dataclass
class Fitting:
    """Judges models against this machine, and chooses devices for them."""

    hive_id: str
    devices: Devices
    catalog: Catalog
    pool: WorkerPool
    memory: Memory
    hub: Hub
    preparation: Preparation
    builds: Builds

    async def fit(self, operation: ModelFit) -> Runner:
        """What a model would take of each device; of several GPUs, where one is not enough.

        :raises HiveError: neither this disk nor the hub has such a model, it says too little, or
            its weights are damaged
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
        problems = await self._engine_problems(known.model, operation.options)

        async def run(job: Job) -> Any:
            devices = await self.sample()
            verdicts = [
                self._judged(operation, known, facts, [device], devices)
                for device in devices
                if device.healthy and _kind(device) in KINDS
            ]
            if shared := self._sharing(operation, known, facts, devices):
                verdicts.insert(len(verdicts) - 1, shared)
            return {"fits": [self._told(known, verdict, problems) for verdict in verdicts]}

        return run

    async def model(self, name: str, options: WorkerOptions) -> ModelInfo:
        """The model that is asked for, as its options make it.

        :raises HiveError: there is none on this disk, or the options do not suit it
        """
        if options.engine == "scripted":
            check("scripted", options)
            return scripted_model(name, options)
        model = await self.catalog.find(name)
        check(engine_of(options, model), options)
        return await derived(self.catalog, model, options)

    async def sample(self) -> list[Device]:
        """The devices as they are now, with all of their processes, those of workers too."""
        return await asyncio.to_thread(self.devices.sample)

    async def check_devices(self, operation: WorkerSpawn, model: ModelInfo) -> None:
        """See that there are the devices that are asked for, whatever they have free.

        :raises InvalidRequest: there are not, or they take no work
        """
        if operation.worker is not None or operation.gpus is not None:
            machine = self._machine(await self.sample())
            candidates(operation, engine_of(operation.options, model), machine)

    def placed(
        self,
        operation: WorkerSpawn,
        model: ModelInfo,
        facts: ModelFacts | None,
        devices: Sequence[Device],
    ) -> tuple[Choice, WorkerSpec]:
        """The first devices in which it fits; where it fits in none, those that lack least.

        :param facts: None where its need cannot be predicted; it gets the emptiest then
        :raises HiveError: no such devices, or it cannot run there
        """
        engine = engine_of(operation.options, model)
        if facts is None and engine != "scripted":
            operation = operation.model_copy(update={"placement": "spread"})
        choices = (
            (choice, self._decided(operation, model, choice.devices))
            for choice in candidates(operation, engine, self._machine(devices))
        )
        if facts is None:
            return next(choices)
        return self.memory.best(
            ((tried, request_for(tried[1], facts, devices)) for tried in choices), devices
        )

    def _machine(self, devices: Sequence[Device]) -> Machine:
        return Machine(
            self.memory.left(devices), self.memory.workers(), self.devices.no_gpu_because
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

    async def _known(self, operation: ModelFit) -> Known:
        """The model on this disk, or else at the hub.

        :raises HiveError: neither has it, or its weights are damaged
        """
        try:
            model = await self.model(operation.model, operation.options)
        except NotFound as error:
            return await self._at_hub(operation, error)
        if model.format == "safetensors":
            await asyncio.to_thread(check_weights, Path(model.path))
        others = await self.catalog.list()
        return Known(model, await facts_of(model), offers(model, others))

    async def _at_hub(self, operation: ModelFit, nowhere: NotFound) -> Known:
        """:raises NotFound: as given, where the name is none of a repository"""
        repo = operation.model.partition(":")[0]
        if not is_repo(repo):
            raise nowhere
        reference = parse_reference(operation.model)
        async with in_time(reference):
            known = await at_hub(self.hub, reference)
        check(engine_of(operation.options, known.model), operation.options)
        return known

    async def _engine_problems(self, model: ModelInfo, options: WorkerOptions) -> Mapping[str, str]:
        """By kind of device, why no engine here computes there."""
        match engine_of(options, model):
            case "llamacpp":
                return await self.builds.problems(KINDS)
            case "vllm":
                return await self.preparation.problems(options.engine_version)
        return {}

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
        choice, _ = self.placed(wanted, known.model, facts, devices)
        if len(choice.devices) == 1:
            return None
        return self._judged(operation, known, facts, choice.devices, devices)

    def _told(self, known: Known, verdict: Verdict, problems: Mapping[str, str]) -> Fit:
        fit = told(self.hive_id, verdict, self.memory.last(verdict.request))
        problem = problems.get(_kind(verdict.request.devices[0]))
        return fit.model_copy(update={"on_disk": bool(known.model.path), "engine_problem": problem})


def _kind(device: Device) -> str:
    return device.id.partition(":")[0]
