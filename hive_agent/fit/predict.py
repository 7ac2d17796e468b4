"""The prediction itself: an engine's plan, held against what the devices have free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from hive_agent.fit import llamacpp, vllm
from hive_agent.fit.correction import Correction, Setting
from hive_agent.fit.verdict import (
    GIB,
    FitEngine,
    Plan,
    Request,
    Verdict,
    free_bytes,
)
from operations.hosts import Device

_REFUSALS: Final[Mapping[FitEngine, Callable[[Request], str | None]]] = {
    "llamacpp": llamacpp.refusal,
    "vllm": vllm.refusal,
}
_PLANS: Final[Mapping[FitEngine, Callable[[Request], Plan]]] = {
    "llamacpp": llamacpp.plan,
    "vllm": vllm.plan,
}

NOTHING_LEARNED: Final = Correction()


def predict(request: Request, learned: Correction = NOTHING_LEARNED) -> Verdict:
    """What a request needs on each of its devices, and whether they have it.

    :param learned: what past loads taught
    """
    refused = _REFUSALS[request.engine](request)
    plan = _corrected(bare(request), request, learned)
    if request.engine == "vllm":
        plan = vllm.filled(plan, request)
    free = tuple(_room(request, device) for device in request.devices) if plan.needs else ()
    verdict = Verdict(request, plan, free, refused, request.facts.notes, "")
    return replace(verdict, sentence=_sentence(verdict))


def bare(request: Request) -> Plan:
    """The plan without what past loads taught, and without what vLLM takes beyond its need; an
    empty one where the engine would not start."""
    if _REFUSALS[request.engine](request) is not None:
        return Plan(())
    return _PLANS[request.engine](request)


def _room(request: Request, device: Device) -> int:
    """Bytes that a device has for this request: no more than the share that it is allowed, and
    what comes on top of that."""
    free = free_bytes(device)
    if request.share is None or device.device_type == "cpu":
        return free
    return min(free, vllm.share_bytes(request.share, device) + vllm.outside_bytes(request))


def setting(request: Request) -> Setting:
    """Under which name the bytes of a load are remembered."""
    first = request.devices[0]
    return Setting(
        digest=request.facts.digest,
        engine=request.engine,
        device=first.name if first.device_type == "gpu" else "cpu",
        devices=len(request.devices),
        context_length=request.context_length,
        slots=request.slots,
        kv_type=request.kv_type,
        number_bytes=request.number_bytes,
        quantization=request.facts.quantization or "",
        batch=request.batch or 0,
        adapters=request.adapters,
    )


def said(amount: int) -> str:
    """Bytes for people."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB // 10 else f"{amount / 2**20:.0f} MiB"


def _corrected(plan: Plan, request: Request, learned: Correction) -> Plan:
    here = setting(request)
    needs = tuple(
        replace(need, overhead=need.overhead + learned.adjustment(here, need.total))
        if need.total
        else need
        for need in plan.needs
    )
    return replace(plan, needs=needs)


def _sentence(verdict: Verdict) -> str:
    request = verdict.request
    devices = ", ".join(device.id for device in request.devices)
    if verdict.refused is not None:
        return f"{request.model} cannot run on {devices}: {verdict.refused}."
    what = (
        f"{request.model} with {request.slots} × {request.context_length:,} tokens "
        f"needs {said(verdict.needed)} on {devices}"
    )
    if verdict.fits:
        return f"{what}, where {said(sum(verdict.free))} are free: it fits."
    lacking = ", ".join(
        f"{said(missing)} on {need.device}"
        for need, missing in zip(verdict.plan.needs, verdict.missing, strict=True)
        if missing
    )
    return f"{what}, where {said(sum(verdict.free))} are free: it lacks {lacking}."
