"""What vLLM needs before a worker of it can start: whole files, an environment that has it, flags
that it knows, and adapters."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hive_agent.asked import Asked
from hive_agent.engines import Chosen, Engines
from hive_agent.engines.recipes import Kind
from hive_agent.models.catalog import Catalog
from hive_agent.models.derived import adapters
from hive_agent.models.safetensors import check_weights
from hive_agent.processes import without_secrets
from hive_agent.workers import vllm
from hive_agent.workers.flags import Flag, flags_of
from hive_agent.workers.spec import WorkerSpec
from operations.errors import HiveError
from operations.hosts import Device, ModelInfo
from operations.operations import DeviceKind, WorkerOptions, WorkerSpawn


@dataclass(frozen=True)
class Prepared:
    """:param chosen: by kind of device: the environment, or why there is none
    :param adapters: name → digest
    """

    chosen: Mapping[Kind, Chosen | HiveError]
    adapters: Mapping[str, str]

    def cpu_only(self, request: WorkerSpawn, devices: Sequence[Device]) -> str | None:
        """Why a request that leaves the device to the hive gets the CPU in spite of GPUs."""
        left_open = request.worker is None and request.gpus is None
        for_gpus = self.chosen.get("cuda")
        if not left_open or not isinstance(for_gpus, HiveError) or for_gpus.retryable:
            return None
        if not any(device.id.startswith("cuda:") for device in devices):
            return None
        return f"This worker runs on the CPU. {for_gpus.message}"

    def applied(self, spec: WorkerSpec) -> WorkerSpec:
        """The spec with what it is run by.

        :raises HiveError: nothing here runs it on its devices
        """
        chosen = self.chosen["cpu" if spec.device == "cpu" else "cuda"]
        if isinstance(chosen, HiveError):
            raise chosen
        return replace(spec, python=chosen.python, env=chosen.env, adapters=self.adapters)


@dataclass
class Preparation:
    """Checks what is asked of vLLM against what is installed."""

    engines: Engines
    catalog: Catalog
    _flags: Asked[tuple[str, str], dict[str, Flag]] = field(default_factory=Asked, init=False)

    async def prepare(
        self, model: ModelInfo, options: WorkerOptions, wanted: DeviceKind | None
    ) -> Prepared:
        """:param wanted: the kind of device; None where it is not decided yet
        :raises InvalidRequest: damaged weights, no adapter, or a flag that will not do
        :raises Unavailable: no environment for any of the kinds
        """
        await asyncio.to_thread(check_weights, Path(model.path))
        named = await adapters(self.catalog, model, options.lora or ())
        kinds: Sequence[Kind] = ("cpu",) if wanted == "cpu" else ("cuda",)
        if wanted is None:
            kinds = ("cuda", "cpu")
        chosen = {kind: await self._choose(kind, options.engine_version) for kind in kinds}
        found = [one for one in chosen.values() if isinstance(one, Chosen)]
        if not found:
            raise next(one for one in chosen.values() if isinstance(one, HiveError))
        if options.flags:
            for one in found:
                vllm.RULES.check(options.flags, await self._known_flags(one))
        return Prepared(chosen, named)

    async def problems(self, version: str | None) -> dict[str, str]:
        """By kind of device, why no environment here computes there, and what to do.

        :param version: the only one that will do
        """
        kinds: Sequence[Kind] = ("cuda", "cpu")
        chosen = {kind: await self._choose(kind, version) for kind in kinds}
        return {kind: one.message for kind, one in chosen.items() if isinstance(one, HiveError)}

    async def _choose(self, kind: Kind, version: str | None) -> Chosen | HiveError:
        try:
            return await self.engines.python_for("vllm", version, kind)
        except HiveError as error:
            return error

    async def _known_flags(self, chosen: Chosen) -> dict[str, Flag]:
        env = {**without_secrets(os.environ), **chosen.env}
        env.pop("PYTHONPATH", None)
        return await self._flags.get(
            (chosen.python, chosen.version), lambda: flags_of(chosen.python, vllm.SERVER, env)
        )
