"""Which hive answers: pure functions of a snapshot of the registry."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from operations.errors import HiveError, NotFound, Unavailable, WontFit
from operations.hosts import Fit, HiveInfo, Task, WorkerInfo
from operations.names import resolve
from operations.operations import WorkerSpawn

NOTHING_ASKED: Final[Mapping[str, Fit]] = MappingProxyType({})


@dataclass(frozen=True)
class Placement:
    """Where a request goes, and why in one word."""

    hive_id: str
    hive_url: str
    worker_id: str
    model: str
    reason: str


Candidate = tuple[HiveInfo, WorkerInfo]
"""A worker that can take a request, and its hive."""


def place(
    model: str,
    hives: Sequence[HiveInfo],
    *,
    task: Task = "generate",
    hive_id: str | None = None,
    device: str | None = None,
    worker_id: str | None = None,
    avoid: Collection[str] = (),
) -> Placement:
    """Choose a hive that has the model loaded: ready before loading, least outstanding first.

    :param avoid: ids of hives that have just failed; one of them is chosen only if no other can
    :raises NotFound: no hive knows the model, or there is no such hive
    :raises Conflict: the name fits several models
    :raises Unavailable: nobody has it loaded, or only hives that are not heard from
    """
    found = candidates(model, hives, task=task, hive_id=hive_id, device=device, worker_id=worker_id)
    return least(found, lambda hive, worker: worker.in_flight, avoid)


def candidates(
    model: str,
    hives: Sequence[HiveInfo],
    *,
    task: Task = "generate",
    hive_id: str | None = None,
    device: str | None = None,
    worker_id: str | None = None,
) -> list[Candidate]:
    """All that :func:`place` chooses from, never empty; raises what it does."""
    asked = [named(hive_id, hives)] if hive_id is not None else hives
    if not asked:
        raise _none_heard()
    digest = _digest(model, asked)  # also of a hive that is not heard from: 503, not 404
    found = [
        (hive, worker)
        for hive in asked
        if hive.state == "online"
        for worker in hive.workers
        if worker.has(digest)
        and task in worker.tasks
        and worker.state in ("ready", "starting", "restarting")
        and (device is None or device in (worker.device, *worker.devices))
        and worker_id in (None, worker.worker_id)
    ]
    if not found:
        raise _nobody(model, digest, asked, hives)
    return found


def least(
    found: Sequence[Candidate],
    in_flight: Callable[[HiveInfo, WorkerInfo], int],
    avoid: Collection[str] = (),
) -> Placement:
    """The one with the least load a slot."""

    def load(candidate: Candidate) -> tuple[bool, bool, float, str, str]:
        hive, worker = candidate
        failed, waiting = hive.hive_id in avoid, worker.state != "ready"
        busy = in_flight(hive, worker) / worker.slots
        return (failed, waiting, busy, hive.hive_id, worker.worker_id)

    hive, worker = found[0] if len(found) == 1 else min(found, key=load)
    only = all(other is hive for other, _ in found)
    return Placement(
        hive_id=hive.hive_id,
        hive_url=hive.hive_url,
        worker_id=worker.worker_id,
        model=worker.model,
        reason="only" if only else "least_outstanding",
    )


def place_worker(
    model: str,
    kind: str | None,
    hives: Sequence[HiveInfo],
    verdicts: Mapping[str, Fit] = NOTHING_ASKED,
    *,
    force: bool = False,
) -> HiveInfo:
    """Choose a hive for a new worker: one that has the device, best the model too, on which it
    fits; a GPU before a CPU where both would do, then the least busy.

    :param kind: of device; None is any
    :param verdicts: whether it fits, by hive id, of those that were asked and answered
    :param force: choose one although it fits nowhere
    :raises Unavailable: no hive has such a device
    :raises WontFit: every hive that has the model says no; tells what the one that lacks least says
    """
    able = _able(kind, hives)
    holders = [hive for hive in able if _has(model, hive)]
    refusals = [v for hive in holders if (v := verdicts.get(hive.hive_id)) and not v.fits]
    if refusals and len(refusals) == len(holders) and not force:
        best = min(refusals, key=lambda fit: fit.missing_mb)
        raise WontFit(
            f"{model} fits on no hive. Best on {best.hive_id}: {best.sentence} "
            "'--force' loads it all the same.",
            param="model",
        )

    def burden(hive: HiveInfo) -> tuple[bool, bool, bool, int, str]:
        verdict = verdicts.get(hive.hive_id)
        will_not = verdict is not None and (not verdict.fits or verdict.engine_problem is not None)
        on_cpu = not _has_gpu(hive) if verdict is None else _kind(verdict) == "cpu"
        slow = kind is None and on_cpu
        return (hive not in holders, will_not, slow, len(hive.workers), hive.hive_id)

    return min(able, key=burden)


def to_be_asked(model: str, kind: str | None, hives: Sequence[HiveInfo]) -> list[HiveInfo]:
    """The hives whose verdicts would decide where a worker goes; none where there is no choice.

    :raises Unavailable: no hive has such a device
    """
    holders = [hive for hive in _able(kind, hives) if _has(model, hive)]
    return holders if len(holders) > 1 else []


def verdict_for(operation: WorkerSpawn, fits: Sequence[Fit]) -> Fit | None:
    """Of what a hive says of its devices, what counts for this worker: the best it could do.

    Where no kind of device is named, it is the one that the hive would take: a GPU, if an engine of
    the hive computes there.

    :returns: None where it says nothing of the devices that are asked for
    """
    kind = operation.worker or ("cuda" if operation.gpus is not None else None)
    if kind is None:
        usable = {_kind(fit) for fit in fits if fit.engine_problem is None}
        kind = "cuda" if "cuda" in (usable or {_kind(fit) for fit in fits}) else "cpu"
    there = [fit for fit in fits if _kind(fit) == kind]
    if operation.device is not None:
        there = [fit for fit in there if [fit.device] == operation.device_ids()]
    elif operation.devices is not None or (operation.gpus or 1) > 1:
        return None  # sets of devices are judged by the hive itself
    return min(there, key=lambda fit: (not fit.fits, fit.missing_mb), default=None)


def _kind(fit: Fit) -> str:
    return fit.device.partition(":")[0]


def full_name(model: str, hives: Sequence[HiveInfo]) -> str:
    """The name under which a hub knows a model that some hive fetched from there, else as given."""
    on_disk = [m for hive in hives for m in hive.models]
    try:
        digest = resolve(model, [(m.id, m.digest) for m in on_disk])
    except HiveError:
        return model
    return next((m.id for m in on_disk if m.digest == digest and m.source == "hub"), model)


def _able(kind: str | None, hives: Sequence[HiveInfo]) -> list[HiveInfo]:
    able = [
        hive
        for hive in hives
        if hive.state == "online"
        and (kind is None or any(d.id.partition(":")[0] == kind for d in hive.devices))
    ]
    if not able and kind is None:
        raise _none_heard()
    if not able:
        raise Unavailable(
            f"No hive has a {kind} device. 'hive devices' shows what there is.", code="no_device"
        )
    return able


def _none_heard() -> Unavailable:
    return Unavailable(
        "No hive is heard from. Start one with 'hive agent'; 'hive doctor' says more.",
        code="no_hive",
    )


def _has(model: str, hive: HiveInfo) -> bool:
    try:
        resolve(model, [(m.id, m.digest) for m in hive.models])
    except NotFound:
        return False
    return True


def _has_gpu(hive: HiveInfo) -> bool:
    return any(device.id.startswith("cuda:") and device.healthy for device in hive.devices)


def named(hive_id: str, hives: Sequence[HiveInfo]) -> HiveInfo:
    """The hive of that id; ``localhost`` is the only hive there is.

    :raises NotFound: there is none of that id; the message lists those that there are
    :raises Unavailable: it is not heard from
    """
    online = [hive for hive in hives if hive.state == "online"]
    found = [hive for hive in online if hive.hive_id == hive_id]
    found = found or [hive for hive in hives if hive.hive_id == hive_id]
    if hive_id == "localhost" and not found and len(online) == 1:
        found = online
    if not found:
        there = ", ".join(hive.hive_id for hive in hives) or "none yet; start one with 'hive agent'"
        raise NotFound(
            f"The queen knows no hive '{hive_id}'. Known hives: {there}.",
            code="hive_not_found",
            param="hive_id",
        )
    if found[0].state != "online":
        raise Unavailable(
            f"Hive {found[0].hive_id} is {found[0].state}: {found[0].problem or 'not heard from'}. "
            "Look at that machine, or name another hive.",
            code="hive_offline",
            param="hive_id",
        )
    return found[0]


def _digest(model: str, hives: Sequence[HiveInfo]) -> str:
    loaded = [pair for hive in hives for worker in hive.workers for pair in worker.answers_for]
    try:
        return resolve(model, loaded)
    except NotFound:
        on_disk = [(m.id, m.digest) for hive in hives for m in hive.models]
        return resolve(model, loaded + on_disk)


def _nobody(
    model: str, digest: str, asked: Sequence[HiveInfo], hives: Sequence[HiveInfo]
) -> Unavailable:
    here = [hive for hive in asked if hive.state == "online"]
    workers = [w for hive in here for w in hive.workers if w.has(digest)]
    holders = [hive.hive_id for hive in asked if any(m.digest == digest for m in hive.models)]
    away = [hive.hive_id for hive in hives if hive.state != "online"]
    failed = [worker for worker in workers if worker.state == "failed"]
    if failed:
        why = f"its worker {failed[0].worker_id} has failed: {failed[0].problem}"
    elif any(worker.state == "stopping" for worker in workers):
        why = "its worker is stopping"
    elif workers:
        why = (
            "no worker of it fits what was asked (device, worker_id, or embeddings or "
            "reranking, which need workers of their own)"
        )
    elif not here:
        why = "the hive that has it is not heard from"
    else:
        why = f"no worker has it loaded; it is on the disk of {', '.join(holders)}"
    lost = f" Not heard from: {', '.join(away)}." if away else ""
    where = "Start 'hive agent' there again, or a worker elsewhere" if lost else "Start a worker"
    return Unavailable(
        f"No hive can serve '{model}' now: {why}.{lost} {where} with 'hive workers spawn {model}'.",
        code="model_not_loaded",
        param="model",
    )
