"""Asked before each load: does it fit beside what runs, what loads, and what others hold?"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hive_agent.fit import promises
from hive_agent.fit.advise import Options, Resident, advise
from hive_agent.fit.facts import ModelFacts, from_gguf
from hive_agent.fit.promises import Phase, Promise
from hive_agent.fit.verdict import MIB, Need, Request, Verdict
from hive_agent.models.local import at_path, read_headers
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.spec import WorkerSpec
from operations.errors import HiveError, WontFit
from operations.hosts import Device, Fit, ModelInfo

log = logging.getLogger(__name__)

EMBEDDING_BATCH = 2048  # tokens; an input is embedded in one piece
STARTED_WITHIN_S = 30.0  # a worker that was let in, and is not there by then, will not come


class Memory:
    """The memory of this machine's devices, and to whom it is promised."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._promises: dict[str, Promise] = {}
        self._made_at: dict[str, float] = {}

    def claim(self, spec: WorkerSpec, request: Request, devices: Sequence[Device]) -> None:
        """Promise a worker its memory, in one step with looking whether it is there.

        :param devices: as they are now
        :raises WontFit: it is not; says how much is missing and what would help
        """
        verdict = self.judge(request, devices)
        if not verdict.fits:
            raise WontFit(f"{verdict.sentence} '--force' loads it all the same.", param="model")
        self.promise(spec, verdict)

    def promise(self, spec: WorkerSpec, verdict: Verdict) -> None:
        """Count a worker's memory as taken from now on, whatever was found."""
        self._promises[spec.worker_id] = promises.promise(verdict.plan, verdict.request.devices)
        self._made_at[spec.worker_id] = time.monotonic()

    def judge(self, request: Request, devices: Sequence[Device]) -> Verdict:
        """The prediction for a request, its devices as others have left them."""
        phases = self._phases()
        for worker_id in self._promises.keys() - phases.keys():
            del self._promises[worker_id], self._made_at[worker_id]
        now = {device.id: device for device in promises.left(devices, self._promises, phases)}
        asked = tuple(now[device.id] for device in request.devices)
        spare = tuple(device for device in now.values() if device not in asked)
        options = Options(spare=spare, residents=self._residents())
        return advise(replace(request, devices=asked), options)

    def _phases(self) -> dict[str, Phase]:
        now = time.monotonic()
        phases: dict[str, Phase] = {
            worker_id: "loading"
            for worker_id, made_at in self._made_at.items()
            if now - made_at < STARTED_WITHIN_S
        }
        for worker in self._pool.workers():
            shown = worker.ready_at is not None and now - worker.ready_at > promises.SHOWN_S
            phases[worker.spec.worker_id] = "loaded" if shown else "loading"
            if worker.state == "failed":
                phases[worker.spec.worker_id] = "gone"
        return phases

    def _residents(self) -> tuple[Resident, ...]:
        return tuple(
            Resident(
                worker.spec.worker_id,
                tuple(self._promises[worker.spec.worker_id].needs.items()),
                busy=worker.requests.count > 0,
            )
            for worker in self._pool.workers()
            if worker.state == "ready" and worker.spec.worker_id in self._promises
        )


def told(hive_id: str, verdict: Verdict) -> Fit:
    """A verdict on one device, as callers get it."""
    device = verdict.request.devices[0].id
    need = verdict.plan.needs[0] if verdict.plan.needs else Need(device, 0, 0, 0, 0)
    return Fit(
        hive_id=hive_id,
        model=verdict.request.model,
        device=need.device,
        fits=verdict.fits,
        needed_mb=-(-need.total // MIB),
        weights_mb=-(-need.weights // MIB),
        kv_cache_mb=-(-need.kv_cache // MIB),
        compute_mb=-(-need.compute // MIB),
        overhead_mb=need.overhead // MIB,
        free_mb=sum(verdict.free) // MIB,
        missing_mb=-(-sum(verdict.missing) // MIB),
        sentence=verdict.sentence,
        notes=list(verdict.notes),
        suggestions=[suggestion.text for suggestion in verdict.suggestions],
    )


async def facts_of(model: ModelInfo) -> ModelFacts | None:
    """What a prediction needs to know of a model; None where its files do not say it."""
    if model.format != "gguf":
        return None
    try:
        return await asyncio.to_thread(_read, model)
    except HiveError as error:
        log.info("what %s needs cannot be predicted: %s", model.id, error.message)
    except Exception:  # it is loaded unasked: the engine says what is wrong with it
        log.exception("what %s needs cannot be predicted", model.id)
    return None


def request_for(spec: WorkerSpec, known: ModelFacts, devices: Sequence[Device]) -> Request:
    """What a worker asks of its devices."""
    in_one_piece = spec.options.embeddings or spec.options.rerank
    return Request(
        model=spec.model.id,
        facts=known,
        engine="llamacpp",
        context_length=spec.context_length,
        slots=spec.slots,
        devices=tuple(device for device in devices if device.id in spec.devices),
        kv_type=spec.options.kv_type or "f16",
        batch=EMBEDDING_BATCH if in_one_piece else None,
    )


def _read(model: ModelInfo) -> ModelFacts:
    """:raises HiveError: the files say too little, or are no longer there"""
    return from_gguf(read_headers(at_path(Path(model.path))), model.digest)
