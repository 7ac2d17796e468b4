"""Asked before each load: does it fit beside what runs, what loads, and what others hold?"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hive_agent import measured
from hive_agent.fit import promises, vllm
from hive_agent.fit.advise import Offer, Options, Resident, advise
from hive_agent.fit.facts import ModelFacts
from hive_agent.fit.predict import bare, predict
from hive_agent.fit.promises import Phase, Promise
from hive_agent.fit.verdict import MIB, Request, Verdict, free_bytes
from hive_agent.learning import Learning
from hive_agent.workers.base import BaseWorker
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.spec import WorkerSpec
from hive_agent.workers.vllm import batch_asked
from operations.errors import WontFit
from operations.hosts import Device, Fit, together

T = TypeVar("T")

EMBEDDING_BATCH = 2048  # tokens; an input is embedded in one piece
STARTED_WITHIN_S = 30.0  # a worker that was let in, and is not there by then, will not come


@dataclass
class _Let:
    """What a worker was let in with.

    :param made_at: seconds of the monotonic clock
    :param asked: what it was predicted by; None where it was not
    :param free_before: bytes by device id, where nobody else had any of its devices
    :param started: it is in the pool, or was
    """

    promise: Promise
    made_at: float
    asked: Request | None = None
    free_before: Mapping[str, int] | None = None
    started: bool = False


class Memory:
    """The memory of this machine's devices, and to whom it is promised.

    The devices that are given to it have all of their processes, those of workers too.
    """

    def __init__(self, pool: WorkerPool, kept: Path | None = None) -> None:
        """:param kept: the file in which measured loads outlive the agent; None forgets them"""
        self._pool = pool
        self._lets: dict[str, _Let] = {}
        self._learning = Learning(kept)

    def claim(
        self,
        spec: WorkerSpec,
        request: Request,
        devices: Sequence[Device],
        *,
        spread: bool = True,
        force: bool = False,
    ) -> WorkerSpec:
        """Promise a worker its memory, in one step with looking whether it is there.

        :param devices: as they are now
        :param spread: vLLM may fill GPUs that nobody else uses
        :param force: promise it whatever is found
        :returns: the worker, told what it may take
        :raises WontFit: it is not there; says how much is missing and what would help
        """
        verdict = self.judge(request, devices)
        if not verdict.fits and not force:
            raise WontFit(f"{verdict.sentence} '--force' loads it all the same.", param="model")
        plan, reserved = verdict.plan, None
        if request.engine == "vllm":
            reserved = vllm.reservation(verdict.request, plan, spread=spread)
            if reserved is not None and reserved.share is not None:
                plan = vllm.filled(plan, verdict.request, reserved.share)
        mapped = request.engine == "llamacpp"
        free = {device.id: free_bytes(device) for device in devices}
        self._lets[spec.worker_id] = _Let(
            promises.promise(plan, verdict.request.devices, mapped=mapped),
            time.monotonic(),
            asked=verdict.request,
            free_before=None if self._others(spec) else free,
        )
        layers = plan.layers if len(spec.devices) > 1 else ()
        return replace(spec, reserved=reserved, layers=layers)

    async def learn(self, worker: BaseWorker, devices: Sequence[Device]) -> None:
        """Measure what a worker holds now that it is ready, for the next prediction.

        Nothing is learned where nobody tells what it holds, where it was not predicted, and of vLLM
        where others took or gave back memory as it measured its own.

        :param devices: as they are now
        """
        let = self._lets.get(worker.spec.worker_id)
        if let is None or let.asked is None or worker.pid is None or not bare(let.asked).needs:
            return
        if worker.disturbed and worker.spec.engine == "vllm":
            return
        difference = None if worker.disturbed else self._difference(worker.spec, let, devices)
        await self._learning.take(worker, let.asked, devices, difference)

    def _difference(
        self, spec: WorkerSpec, let: _Let, devices: Sequence[Device]
    ) -> dict[str, int] | None:
        """What has gone from the free memory of a worker's GPUs; None where another worker may have
        taken some of it."""
        before = let.free_before
        if before is None or spec.device == "cpu" or self._others(spec):
            return None
        free = {device.id: free_bytes(device) for device in devices}
        return {id: max(0, before[id] - free[id]) for id in spec.devices}

    def _others(self, spec: WorkerSpec) -> bool:
        """Whether another worker has, or will have, memory of one of these devices."""
        return any(
            worker_id != spec.worker_id and let.promise.needs.keys() & set(spec.devices)
            for worker_id, let in self._lets.items()
        )

    def last(self, request: Request) -> int | None:
        """Bytes on one device that the latest load in this setting was measured to hold."""
        return self._learning.last(request)

    def left(self, devices: Sequence[Device]) -> list[Device]:
        """The devices with what is promised taken off what they have free."""
        phases = self._phases()
        for worker_id in self._lets.keys() - phases.keys():
            del self._lets[worker_id]
        held = self._held(phases, devices)
        return promises.left(
            devices,
            (
                let.promise.hidden(phases[worker_id], held.get(worker_id, {}))
                for worker_id, let in self._lets.items()
            ),
        )

    def started(self, worker_id: str) -> None:
        """The pool has this worker now: what it was promised is its own for as long as it lives."""
        if (let := self._lets.get(worker_id)) is not None:
            let.started = True

    def expect(self, spec: WorkerSpec, devices: Sequence[Device]) -> None:
        """Count on a worker whose need cannot be told: while it loads, its GPUs have no room.

        A scripted worker takes nothing; it is counted by :meth:`workers` all the same.
        """
        there = {device.id: device for device in self.left(devices)}
        needs = {id: free_bytes(there[id]) if id != "cpu" else 0 for id in spec.devices}
        if spec.engine == "scripted":
            needs = dict.fromkeys(needs, 0)
        self._lets[spec.worker_id] = _Let(Promise(needs, {}, guessed=True), time.monotonic())

    def workers(self) -> Counter[str]:
        """How many workers each device has, by its id; those let in and not started yet, too."""
        here = self._phases()
        return Counter(
            device
            for worker_id, let in self._lets.items()
            if here.get(worker_id, "gone") != "gone"
            for device in let.promise.needs
        )

    def best(self, choices: Iterable[tuple[T, Request]], devices: Sequence[Device]) -> T:
        """The first of these choices whose request fits, else the one that lacks least.

        :param choices: at least one; none is asked for after one that fits
        """
        now = {device.id: device for device in self.left(devices)}
        lacking: list[tuple[bool, int]] = []
        tried: list[T] = []
        for choice, request in choices:
            asked = tuple(now[device.id] for device in request.devices)
            verdict = predict(replace(request, devices=asked), self._learning.correction)
            if verdict.fits:
                return choice
            tried.append(choice)
            lacking.append((verdict.refused is not None, sum(verdict.missing)))
        return tried[lacking.index(min(lacking))]

    def judge(
        self, request: Request, devices: Sequence[Device], offers: tuple[Offer, ...] = ()
    ) -> Verdict:
        """The prediction for a request, its devices as others have left them.

        :param offers: the same model in other files, to be suggested where it does not fit
        """
        now = {device.id: device for device in self.left(devices)}
        asked = tuple(now[device.id] for device in request.devices)
        spare = tuple(device for device in now.values() if device not in asked)
        options = Options(offers=offers, spare=spare, residents=self._residents())
        return advise(replace(request, devices=asked), options, self._learning.correction)

    def _phases(self) -> dict[str, Phase]:
        now = time.monotonic()
        phases: dict[str, Phase] = {
            worker_id: "loading"
            for worker_id, let in self._lets.items()
            if not let.started and now - let.made_at < STARTED_WITHIN_S
        }
        for worker in self._pool.workers():
            ready_for_s = None if worker.ready_at is None else now - worker.ready_at
            failed = worker.state == "failed"
            phases[worker.spec.worker_id] = "gone" if failed else promises.phase_of(ready_for_s)
        return phases

    def _held(
        self, phases: Mapping[str, Phase], devices: Sequence[Device]
    ) -> dict[str, dict[str, int]]:
        """Bytes by worker and device: what the loading ones are seen to hold of their GPUs."""
        return {
            worker.spec.worker_id: measured.so_far_on_gpus(worker.pid, worker.spec.devices, devices)
            for worker in self._pool.workers()
            if worker.pid is not None and phases[worker.spec.worker_id] in ("loading", "settling")
        }

    def _residents(self) -> tuple[Resident, ...]:
        return tuple(
            Resident(
                worker.spec.worker_id,
                tuple(let.promise.needs.items()),
                busy=worker.requests.count > 0,
            )
            for worker in self._pool.workers()
            if worker.state == "ready"
            and (let := self._lets.get(worker.spec.worker_id)) is not None
            and not let.promise.guessed
        )


def told(hive_id: str, verdict: Verdict, held: int | None = None) -> Fit:
    """A verdict, as callers get it: the sums over all of its devices.

    :param held: bytes on one device, by the latest load of this
    """
    needs, request = verdict.plan.needs, verdict.request
    return Fit(
        hive_id=hive_id,
        model=request.model,
        device=together([device.id for device in request.devices]),
        engine=request.engine,
        fits=verdict.fits,
        needed_mb=-(-verdict.needed // MIB),
        weights_mb=-(-sum(need.weights for need in needs) // MIB),
        kv_cache_mb=-(-sum(need.kv_cache for need in needs) // MIB),
        compute_mb=-(-sum(need.compute for need in needs) // MIB),
        overhead_mb=sum(need.overhead + need.outside for need in needs) // MIB,
        free_mb=sum(verdict.free) // MIB,
        missing_mb=-(-sum(verdict.missing) // MIB),
        measured_mb=None if held is None else held * len(needs) // MIB,
        sentence=verdict.sentence,
        notes=list(verdict.notes),
        suggestions=[suggestion.text for suggestion in verdict.suggestions],
    )


def request_for(spec: WorkerSpec, known: ModelFacts, devices: Sequence[Device]) -> Request:
    """What a worker asks of its devices, in the order of its spec."""
    options, there = spec.options, {device.id: device for device in devices}
    asked = Request(
        model=spec.model.id,
        facts=known,
        engine="llamacpp",
        context_length=spec.context_length,
        slots=spec.slots,
        devices=tuple(there[id] for id in spec.devices),
        kv_type=options.kv_type or "f16",
    )
    if spec.engine == "vllm":
        return replace(
            asked,
            engine="vllm",
            facts=vllm.quantized(known, options.quantization),
            number_bytes=4 if options.dtype == "float32" else 2,
            batch=batch_asked(options),
            share=vllm.rounded(options.memory_share) if options.memory_share else None,
            adapters=len(options.lora or []),
        )
    in_one_piece = options.embeddings or options.rerank
    return replace(
        asked,
        facts=replace(known, other=known.other + _adapter_bytes(spec)),
        batch=EMBEDDING_BATCH if in_one_piece else None,
    )


def _adapter_bytes(spec: WorkerSpec) -> int:
    """Of the adapters that llama.cpp adds to a model. What lets it see is among its facts."""
    return sum(os.path.getsize(adapter.path) for adapter in spec.options.lora or [])
