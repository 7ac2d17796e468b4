"""What loads teach: each is measured when it is ready, remembered, and used in predictions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hive_agent import measured
from hive_agent.fit import vllm
from hive_agent.fit.correction import Correction, Load
from hive_agent.fit.predict import bare, setting
from hive_agent.fit.verdict import MIB, Request
from hive_agent.models.storage import read_json, write_json
from hive_agent.workers.base import BaseWorker
from operations.hosts import Device
from wire.log import outcome

log = logging.getLogger(__name__)

LOG_LINES = 2000  # of an engine that has just come up


class Learning:
    """The loads that were measured, in memory and in a file."""

    def __init__(self, kept: Path | None) -> None:
        """:param kept: the file in which they outlive the agent; None forgets them"""
        self._kept = kept
        self._writing = asyncio.Lock()
        self.correction = _remembered(kept) if kept else Correction()

    def last(self, request: Request) -> int | None:
        """Bytes on one device that the latest load in this setting was measured to hold."""
        load = self.correction.last(setting(request))
        return load.measured if load else None

    async def take(
        self,
        worker: BaseWorker,
        request: Request,
        devices: Sequence[Device],
        difference: Mapping[str, int] | None,
    ) -> None:
        """Measure a worker that is ready and remember it; nothing where nobody tells what it holds.

        :param request: what it was predicted by
        :param devices: as they are now, with all processes on them
        :param difference: bytes that have gone from what its GPUs had free, where nothing else took
            any of it
        """
        held = await asyncio.to_thread(_held, worker, request, devices)
        if held is None and request.engine == "llamacpp":
            held = dict(difference) if difference is not None else None
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
        self.correction = self.correction.after(load)
        if self._kept is not None:
            async with self._writing:
                try:
                    await asyncio.to_thread(write_json, self._kept, self.correction.to_json())
                except OSError as error:
                    log.error("%s could not be written: %s", self._kept, error.strerror)


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
    """Bytes by device id that a worker holds; of GPUs, vLLM holds what it was told to take, and
    what is assumed to lie outside of that."""
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


def _remembered(kept: Path) -> Correction:
    try:
        return Correction.from_json(read_json(kept))
    except OSError as error:
        log.error("%s could not be read: %s; nothing is known of past loads", kept, error.strerror)
        return Correction()
