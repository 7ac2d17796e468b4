"""Asked before each load: does it fit beside what runs, what loads, and what others hold?"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hive_agent import measured
from hive_agent.fit import promises, vllm
from hive_agent.fit.advise import Offer, Options, Resident, advise
from hive_agent.fit.correction import Correction, Load
from hive_agent.fit.facts import ModelFacts
from hive_agent.fit.predict import bare, predict, setting
from hive_agent.fit.promises import Phase, Promise
from hive_agent.fit.verdict import MIB, Request, Verdict, free_bytes
from hive_agent.models.storage import read_json, write_json
from hive_agent.workers.base import BaseWorker
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.spec import WorkerSpec
from operations.errors import WontFit
from operations.hosts import Device, Fit
from wire.log import outcome

log = logging.getLogger(__name__)

T = TypeVar("T")

LOG_LINES = 2000  # of an engine that has just come up
EMBEDDING_BATCH = 2048  # tokens; an input is embedded in one piece
STARTED_WITHIN_S = 30.0  # a worker that was let in, and is not there by then, will not come


class Memory:
    """The memory of this machine's devices, and to whom it is promised."""

    def __init__(self, pool: WorkerPool, kept: Path | None = None) -> None:
        """:param kept: the file in which measured loads outlive the agent; None forgets them"""
        self._pool = pool
        self._kept = kept
        self._promises: dict[str, Promise] = {}
        self._made_at: dict[str, float] = {}
        self._asked: dict[str, Request] = {}
        self._free_before: dict[str, dict[str, int]] = {}
        self._learned = _remembered(kept) if kept else Correction()
        self._writing = asyncio.Lock()

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
        self._promises[spec.worker_id] = promises.promise(
            plan, verdict.request.devices, mapped=mapped
        )
        self._made_at[spec.worker_id] = time.monotonic()
        self._asked[spec.worker_id] = verdict.request
        if not self._others(spec):
            free = {device.id: free_bytes(device) for device in devices}
            self._free_before[spec.worker_id] = free
        layers = plan.layers if len(spec.devices) > 1 else ()
        return replace(spec, reserved=reserved, layers=layers)

    async def learn(self, worker: BaseWorker, devices: Sequence[Device]) -> None:
        """Measure what a worker holds now that it is ready, for the next prediction.

        Nothing is learned where nobody tells what it holds, or where it was not predicted.

        :param devices: as they are now, with all processes on them
        """
        request = self._asked.get(worker.spec.worker_id)
        if request is None or worker.pid is None or not bare(request).needs:
            return
        held = await asyncio.to_thread(_held, worker, request, devices)
        if held is None and request.engine == "llamacpp" and worker.spec.device != "cpu":
            held = self._difference(worker.spec, devices)
        if held is None:
            return
        load = most_off(request, held)
        outcome(
            "worker",
            worker=worker.spec.worker_id,
            state="measured",
            model=request.model,
            predicted_mb=load.predicted // MIB,
            measured_mb=load.measured // MIB,
        )
        self._learned = self._learned.after(load)
        if self._kept is not None:
            async with self._writing:
                try:
                    await asyncio.to_thread(write_json, self._kept, self._learned.to_json())
                except OSError as error:
                    log.error("%s could not be written: %s", self._kept, error.strerror)

    def _difference(self, spec: WorkerSpec, devices: Sequence[Device]) -> dict[str, int] | None:
        """What went from the free memory of GPUs whose driver does not say who holds how much;
        None where another worker may have taken some of it."""
        before = self._free_before.get(spec.worker_id)
        if before is None or self._others(spec):
            return None
        free = {device.id: free_bytes(device) for device in devices}
        return {id: max(0, before[id] - free[id]) for id in spec.devices}

    def _others(self, spec: WorkerSpec) -> bool:
        """Whether another worker has, or will have, memory of one of these devices."""
        return any(
            worker_id != spec.worker_id and made.needs.keys() & set(spec.devices)
            for worker_id, made in self._promises.items()
        )

    def last(self, request: Request) -> int | None:
        """Bytes on one device that the latest load in this setting was measured to hold."""
        load = self._learned.last(setting(request))
        return load.measured if load else None

    def left(self, devices: Sequence[Device]) -> list[Device]:
        """The devices with what is promised taken off what they have free."""
        phases = self._phases()
        for worker_id in self._promises.keys() - phases.keys():
            del self._promises[worker_id]
            self._made_at.pop(worker_id, None)
            self._asked.pop(worker_id, None)
            self._free_before.pop(worker_id, None)
        return promises.left(devices, self._promises, phases)

    def started(self, worker_id: str) -> None:
        """The pool has this worker now: what it was promised is its own for as long as it lives."""
        self._made_at.pop(worker_id, None)

    def expect(self, spec: WorkerSpec, devices: Sequence[Device]) -> None:
        """Count on a worker whose need cannot be told: while it loads, its GPUs have no room.

        A scripted worker takes nothing; it is counted by :meth:`workers` all the same.
        """
        there = {device.id: device for device in self.left(devices)}
        needs = {id: free_bytes(there[id]) if id != "cpu" else 0 for id in spec.devices}
        if spec.engine == "scripted":
            needs = dict.fromkeys(needs, 0)
        self._promises[spec.worker_id] = Promise(needs, {}, guessed=True)
        self._made_at[spec.worker_id] = time.monotonic()

    def workers(self) -> Counter[str]:
        """How many workers each device has, by its id; those let in and not started yet, too."""
        here = self._phases()
        return Counter(
            device
            for worker_id, made in self._promises.items()
            if here.get(worker_id, "gone") != "gone"
            for device in made.needs
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
            verdict = predict(replace(request, devices=asked), self._learned)
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
        return advise(replace(request, devices=asked), options, self._learned)

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
                tuple(made.needs.items()),
                busy=worker.requests.count > 0,
            )
            for worker in self._pool.workers()
            if worker.state == "ready"
            and (made := self._promises.get(worker.spec.worker_id)) is not None
            and not made.guessed
        )


def told(hive_id: str, verdict: Verdict, held: int | None = None) -> Fit:
    """A verdict, as callers get it: the sums over all of its devices.

    :param held: bytes on one device, by the latest load of this
    """
    needs, request = verdict.plan.needs, verdict.request
    return Fit(
        hive_id=hive_id,
        model=request.model,
        device=_together([device.id for device in request.devices]),
        engine=request.engine,
        fits=verdict.fits,
        needed_mb=-(-verdict.needed // MIB),
        weights_mb=-(-sum(need.weights for need in needs) // MIB),
        kv_cache_mb=-(-sum(need.kv_cache for need in needs) // MIB),
        compute_mb=-(-sum(need.compute for need in needs) // MIB),
        overhead_mb=sum(need.overhead for need in needs) // MIB,
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
            share=options.memory_share,
            adapters=len(options.lora or []),
        )
    in_one_piece = options.embeddings or options.rerank
    return replace(
        asked,
        facts=replace(known, other=known.other + _adapter_bytes(spec)),
        batch=EMBEDDING_BATCH if in_one_piece else None,
    )


def _together(ids: Sequence[str]) -> str:
    """``cuda:0,1`` for ``cuda:0`` and ``cuda:1``."""
    first, *others = ids
    return ",".join([first, *(other.partition(":")[2] for other in others)])


def most_off(request: Request, held: Mapping[str, int]) -> Load:
    """The load to remember: of several devices, the one that took most beyond its prediction.

    :param held: bytes by device id
    """
    pairs = [(need.total, held[need.device]) for need in bare(request).needs]
    return Load(setting(request), *max(pairs, key=lambda pair: pair[1] - pair[0]))


def _held(worker: BaseWorker, request: Request, devices: Sequence[Device]) -> dict[str, int] | None:
    """Bytes by device id that a worker needs by what it holds now; None where nothing tells it.

    What vLLM takes beyond its need, for more keys and values, is left out. Blocks.
    """
    taken = _taken(worker, request, devices)
    if taken is None or request.engine != "vllm":
        return taken
    cache = measured.vllm_cache(worker.log_tail(LOG_LINES))
    if cache is None:
        return None
    return {need.device: taken[need.device] - cache + need.kv_cache for need in bare(request).needs}


def _taken(
    worker: BaseWorker, request: Request, devices: Sequence[Device]
) -> dict[str, int] | None:
    """Bytes by device id that a worker holds; of GPUs, vLLM holds what it was told to take."""
    spec, pid = worker.spec, worker.pid
    if pid is None:
        return None
    if spec.device == "cpu":
        held = measured.on_cpu(pid)
        return None if held is None else {"cpu": held}
    if spec.reserved is not None:
        plan = vllm.filled(bare(request), request, spec.reserved.share)
        return {need.device: need.total for need in plan.needs}
    return measured.on_gpus(pid, spec.devices, devices)


def _adapter_bytes(spec: WorkerSpec) -> int:
    """Of the files that llama.cpp adds to a model: adapters, and what lets it see."""
    paths = [adapter.path for adapter in spec.options.lora or []]
    paths += [spec.model.projector] if spec.model.projector else []
    return sum(os.path.getsize(path) for path in paths)


def _remembered(kept: Path) -> Correction:
    try:
        return Correction.from_json(read_json(kept))
    except OSError as error:
        log.error("%s could not be read: %s; nothing is known of past loads", kept, error.strerror)
        return Correction()
