"""Where a model does not fit: which single change would make it, and what that costs.

Every suggestion carries the request that follows from it, and that request was predicted to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

from hive_agent.fit.correction import Correction
from hive_agent.fit.predict import NOTHING_LEARNED, predict, said
from hive_agent.fit.verdict import MIB, Change, Request, Suggestion, Verdict
from hive_agent.kv_types import OFFERED
from operations.hosts import Device

MIN_CONTEXT: Final = 1024  # tokens; less is of little use
CONTEXT_STEP: Final = 256  # tokens
MOST_EVICTED: Final = 3
MOST_CONSIDERED: Final = 12  # workers whose eviction is weighed; bounds the search


@dataclass(frozen=True)
class Offer:
    """Another file of the same model. ``weights``: bytes."""

    quantization: str
    weights: int


@dataclass(frozen=True)
class Resident:
    """A worker that could be stopped.

    :param held: bytes by device id
    :param busy: it is answering somebody
    """

    worker_id: str
    held: tuple[tuple[str, int], ...]
    busy: bool = False


@dataclass(frozen=True)
class Options:
    """What could be changed besides the settings.

    :param offers: other quantizations of the model
    :param spare: further devices of this machine
    :param residents: workers on it
    """

    offers: tuple[Offer, ...] = ()
    spare: tuple[Device, ...] = ()
    residents: tuple[Resident, ...] = ()


NO_OPTIONS: Final = Options()
Judge = Callable[[Request], Verdict]


def advise(
    request: Request, options: Options = NO_OPTIONS, learned: Correction = NOTHING_LEARNED
) -> Verdict:
    """The prediction, and where it says no, what would help, the cheapest change first."""
    verdict = predict(request, learned)
    if verdict.fits:
        return verdict

    def judge(changed: Request) -> Verdict:
        return predict(changed, learned)

    suggestions = tuple(_suggestions(request, options, judge))
    if suggestions:
        sentence = f"{verdict.sentence} {suggestions[0].text}"
    else:
        sentence = f"{verdict.sentence} No change of its settings helps: take a smaller model."
    return replace(verdict, suggestions=suggestions, sentence=sentence)


def _suggestions(request: Request, options: Options, judge: Judge) -> Iterator[Suggestion]:
    """In the order of ``Change``; several at once only where no single setting is enough."""
    alone = [
        *_more_devices(request, options.spare, judge),
        *_smaller_kv(request, judge),
        *_fewer_slots(request, judge),
        *_shorter_context(request, judge),
    ]
    yield from alone or _all_settings(request, judge)
    yield from _other_file(request, options.offers, judge)
    yield from _evictions(request, options.residents, judge)


def _more_devices(request: Request, spare: Iterable[Device], judge: Judge) -> Iterator[Suggestion]:
    """Of whole GPUs only: a process can use one MIG instance, and no other GPU beside it."""
    if not all(_joins(device) for device in request.devices):
        return
    used = {device.id for device in request.devices}
    ready = sorted(
        (d for d in spare if d.healthy and _joins(d) and d.id not in used),
        key=lambda device: -device.vram_free_mb,
    )
    for count in range(1, len(ready) + 1):
        changed = replace(request, devices=(*request.devices, *ready[:count]))
        if (verdict := judge(changed)).fits:
            names = ", ".join(device.id for device in changed.devices)
            yield _suggestion("devices", verdict, f"Use {names} together")
            return


def _joins(device: Device) -> bool:
    return device.device_type == "gpu" and device.parent is None


def _smaller_kv(request: Request, judge: Judge) -> Iterator[Suggestion]:
    now = judge(request)
    for kv_type in OFFERED[request.engine]:
        verdict = judge(replace(request, kv_type=kv_type))
        if verdict.fits and _holds_less(verdict, now):
            yield _suggestion("kv_type", verdict, f"Keep keys and values as {kv_type}")
            return


def _holds_less(then: Verdict, now: Verdict) -> bool:
    """Whether the KV cache shrinks; from a type that the engine does not know, any will do."""
    caches = [sum(need.kv_cache for need in verdict.plan.needs) for verdict in (then, now)]
    return now.refused is not None or caches[0] < caches[1]


def _fewer_slots(request: Request, judge: Judge) -> Iterator[Suggestion]:
    most = _largest(1, request.slots - 1, 1, lambda n: judge(replace(request, slots=n)).fits)
    if most is not None:
        verdict = judge(replace(request, slots=most))
        yield _suggestion("slots", verdict, f"Serve {most} at a time instead of {request.slots}")


def _shorter_context(request: Request, judge: Judge) -> Iterator[Suggestion]:
    longest = _longest_context(request, judge)
    if longest is not None:
        verdict = judge(replace(request, context_length=longest))
        text = f"Shorten the context to {longest:,} tokens from {request.context_length:,}"
        yield _suggestion("context", verdict, text)


def _all_settings(request: Request, judge: Judge) -> Iterator[Suggestion]:
    """One slot, the smallest KV cache, and the longest context that then fits."""
    smallest = replace(request, slots=1, kv_type=OFFERED[request.engine][-1])
    longest = request.context_length
    if not judge(smallest).fits:
        longest = _longest_context(smallest, judge) or 0
    if longest:
        changed = replace(smallest, context_length=longest)
        text = f"Serve 1 at a time with {longest:,} tokens and {changed.kv_type} keys and values"
        yield _suggestion("several", judge(changed), text)


def _other_file(request: Request, offers: Iterable[Offer], judge: Judge) -> Iterator[Suggestion]:
    """The largest of the smaller ones: it is the most precise."""
    smaller = [one for one in offers if 0 < one.weights < request.facts.weights]
    for offer in sorted(smaller, key=lambda one: -one.weights):
        facts = request.facts.requantized(offer.quantization, offer.weights)
        verdict = judge(replace(request, facts=facts))
        if verdict.fits:
            yield _suggestion("quantization", verdict, f"Take it as {offer.quantization}")
            return


def _evictions(
    request: Request, residents: Iterable[Resident], judge: Judge
) -> Iterator[Suggestion]:
    """As few workers as help, idle ones before busy ones, and then the least memory."""
    here = {device.id for device in request.devices}
    on_these = [one for one in residents if here & {device for device, _ in one.held}]
    on_these = sorted(on_these, key=lambda one: (one.busy, -sum(size for _, size in one.held)))
    on_these = on_these[:MOST_CONSIDERED]
    for count in range(1, min(MOST_EVICTED, len(on_these)) + 1):
        groups = sorted(combinations(on_these, count), key=_cost)
        for group in groups:
            verdict = judge(replace(request, devices=_without(request.devices, group)))
            if verdict.fits:
                names = tuple(sorted(one.worker_id for one in group))
                yield _suggestion("evict", verdict, f"Stop {', '.join(names)}", names)
                return


def _cost(group: tuple[Resident, ...]) -> tuple[int, int, tuple[str, ...]]:
    held = sum(size for one in group for _, size in one.held)
    return (sum(one.busy for one in group), held, tuple(one.worker_id for one in group))


def _without(devices: tuple[Device, ...], stopped: tuple[Resident, ...]) -> tuple[Device, ...]:
    freed: dict[str, int] = {}
    for worker in stopped:
        for device_id, size in worker.held:
            freed[device_id] = freed.get(device_id, 0) + size // MIB
    return tuple(
        device.model_copy(
            update={
                "vram_free_mb": max(
                    device.vram_free_mb,
                    min(device.vram_total_mb, device.vram_free_mb + freed.get(device.id, 0)),
                )
            }
        )
        for device in devices
    )


def _longest_context(request: Request, judge: Judge) -> int | None:
    return _largest(
        MIN_CONTEXT,
        request.context_length - 1,
        CONTEXT_STEP,
        lambda n: judge(replace(request, context_length=n)).fits,
    )


def _largest(low: int, high: int, step: int, works: Callable[[int], bool]) -> int | None:
    """The largest of ``low, low + step, …`` up to ``high`` that works, if smaller ones do too."""
    if high < low or not works(low):
        return None
    good, bad = 0, (high - low) // step + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if works(low + middle * step):
            good = middle
        else:
            bad = middle
    return low + good * step


def _suggestion(
    change: Change, verdict: Verdict, text: str, evict: tuple[str, ...] = ()
) -> Suggestion:
    text = f"{text}: {said(verdict.needed)} of {said(sum(verdict.free))} free."
    return Suggestion(change, verdict.request, evict, verdict.needed, text)
