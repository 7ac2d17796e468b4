"""The questions that are put to everything measured, each in seconds, one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

from bench.load import Caller, Heard, Target, callers, closed_loop, connect, first_token
from bench.meter import cpu_seconds, rss_mb
from bench.upstream import Arrival, Orders

US_PER_S = 1e6
NS_PER_MS = 1e6

TTFT_WITHIN_S = 5.0
FIRST_TOKENS_S = 20.0  # until all streams of a stage have begun, or it is measured without them
SERVED_WITHIN_S = 30.0
IDLE_S = 0.002  # between two idle requests
SETTLE_S = 0.5
GIVEN_UP_AFTER = 5  # idle requests without an answer
WARM_UP = 5  # idle requests that do not count


@dataclass(frozen=True)
class Plan:
    """How much is asked. Times in seconds."""

    rounds: int = 5
    streams: int = 100
    rate: float = 50.0
    arrival: Arrival = "spread"
    tokens_s: float = 10.0
    idle_requests: int = 200
    short_s: float = 5.0
    short_callers: int = 64
    bodies_s: float = 4.0
    body_callers: int = 8
    body_bytes: int = 100_000
    many: int = 2000
    many_rate: float = 0.5
    many_s: float = 5.0
    cancelled: int = 1000
    stages: tuple[str, ...] = ()  # of these names; empty: all

    @classmethod
    def quick(cls, arrival: Arrival) -> Plan:
        """One short round: to see that it works, not to quote."""
        return cls(
            rounds=1, arrival=arrival, tokens_s=3.0, idle_requests=50, short_s=2.0, bodies_s=1.5
        )


@dataclass(frozen=True)
class Subject:
    """What is measured in one go.

    :param groups: the rows of the table that it fills: name → processes whose CPU and memory count
    """

    target: Target
    groups: Mapping[str, Sequence[int]]


@dataclass
class Answers:
    """What one round said of one subject.

    :param whole: figures of the path, by measure
    :param groups: figures of each group of processes, by group and measure
    """

    whole: dict[str, float] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, dict[str, int]] = field(default_factory=dict)

    def blame(self, stage: str, heard: Heard) -> None:
        if heard.errors:
            self.errors[stage] = dict(heard.errors)


@dataclass(frozen=True)
class Round:
    """One subject's turn: the subject, the bare upstream beside it, and what was heard so far."""

    plan: Plan
    subject: Subject
    bare: Target
    answers: Answers

    @property
    def overwhelmed(self) -> bool:
        """Whether it let less than half of the tokens through.

        It is still at work on them, and whatever is asked next would measure that.
        """
        asked = self.plan.streams * self.plan.rate
        return self.answers.whole.get("tokens_per_s", asked) < asked / 2

    @contextlib.asynccontextmanager
    async def spending(self, measure: str) -> AsyncIterator[Callable[[int], None]]:
        """CPU of each group within the block, in µs for each of as many as the block says."""
        before = {name: cpu_seconds(pids) for name, pids in self.subject.groups.items()}
        counted = 0

        def count(number: int) -> None:
            nonlocal counted
            counted = number

        yield count
        for name, pids in self.subject.groups.items():
            spent = cpu_seconds(pids) - before[name]
            if counted:
                self.answers.groups.setdefault(name, {})[measure] = spent * US_PER_S / counted


async def idle_ttft(turn: Round) -> None:
    """Time to first token where nothing else happens, against the bare upstream's in turns."""
    orders = Orders(tokens=2, rate=1000.0)
    heard = Heard()
    took: dict[Target, list[int]] = {turn.bare: [], turn.subject.target: []}
    made: dict[Target, Caller] = {}
    lost = 0
    for number in range(turn.plan.idle_requests + WARM_UP):
        if lost >= GIVEN_UP_AFTER:
            break
        for target, times in took.items():
            if target not in made or made[target].over:
                made[target] = await connect(target, heard)
            request = target.request(orders, stream=True)
            ns = await first_token(made[target], request, within_s=TTFT_WITHIN_S)
            if ns is None:
                heard.error(f"no token within {TTFT_WITHIN_S:.0f} s, or none at all")
                lost += 1
            elif number >= WARM_UP:
                times.append(ns)
            await asyncio.sleep(IDLE_S)
    for caller in made.values():
        caller.hang_up()
    turn.answers.blame("ttft", heard)
    there, here = took[turn.bare], took[turn.subject.target]
    if here and there:
        for percent in (50, 99):
            added = percentile(here, percent) - percentile(there, percent)
            turn.answers.whole[f"ttft_p{percent}_ms"] = added / NS_PER_MS


async def tokens(turn: Round) -> None:
    """CPU and delay of a token while many streams flow; delays include the bare upstream's."""
    plan = turn.plan
    heard = Heard()
    length = round(plan.rate * (plan.tokens_s + 4 * SETTLE_S + FIRST_TOKENS_S))
    request = turn.subject.target.request(Orders(length, plan.rate, plan.arrival), stream=True)
    async with callers(turn.subject.target, heard, plan.streams) as made:
        await begin(made, request, over_s=SETTLE_S)
        await asyncio.sleep(2 * SETTLE_S)
        async with turn.spending("token_us") as count:
            before, heard.sampling = heard.tokens, True
            began = time.monotonic()
            await asyncio.sleep(plan.tokens_s)
            seconds = time.monotonic() - began
            heard.sampling = False
            count(heard.tokens - before)
        turn.answers.whole["tokens_per_s"] = (heard.tokens - before) / seconds
    if heard.delays_ns:
        for percent in (50, 99):
            delay = percentile(heard.delays_ns, percent)
            turn.answers.whole[f"delay_p{percent}_ms"] = delay / NS_PER_MS
    if turn.overwhelmed:
        heard.error("less than half of the tokens came, so nothing more was asked")
    turn.answers.blame("tokens", heard)


async def short(turn: Round) -> None:
    """Short questions with whole answers, as many as it takes."""
    await loop_closed(turn, "short", turn.plan.short_callers, turn.plan.short_s)


async def bodies(turn: Round) -> None:
    """Large questions with short answers, as many as it takes."""
    plan = turn.plan
    await loop_closed(turn, "body", plan.body_callers, plan.bodies_s, padding=plan.body_bytes)


async def loop_closed(
    turn: Round, measure: str, count: int, seconds: float, *, padding: int = 0
) -> None:
    heard = Heard()
    target = turn.subject.target
    request = target.request(Orders(), stream=False, padding=padding)
    async with callers(target, heard, count) as made:
        with closed_loop(made, request):
            await asyncio.sleep(SETTLE_S)
            async with turn.spending(f"{measure}_us") as answered:
                before, began = heard.answers, time.monotonic()
                await asyncio.sleep(seconds)
                took = time.monotonic() - began
                answered(heard.answers - before)
            turn.answers.whole[f"{measure}_per_s"] = (heard.answers - before) / took
    turn.answers.blame(measure, heard)


async def memory(turn: Round) -> None:
    """What many streams hold that hardly say anything, and whether all of them are served."""
    if turn.overwhelmed:
        return
    plan = turn.plan
    heard = Heard()
    length = round(plan.many_rate * (plan.many_s + 4 * FIRST_TOKENS_S)) + 1
    request = turn.subject.target.request(Orders(length, plan.many_rate), stream=True)
    async with callers(turn.subject.target, heard, plan.many) as made:
        await begin(made, request, over_s=4 * SETTLE_S)
        await until(lambda: all(c.first_ns or c.over for c in made), FIRST_TOKENS_S)
        await asyncio.sleep(plan.many_s)
        turn.answers.whole["many_served"] = sum(bool(c.first_ns) and not c.over for c in made)
        for name, pids in turn.subject.groups.items():
            turn.answers.groups.setdefault(name, {})["many_mb"] = rss_mb(pids)
    turn.answers.blame("memory", heard)


async def cancellations(turn: Round) -> None:
    """Many hang up at once: when is the next request served, and when has the engine stopped?"""
    if turn.overwhelmed:
        return
    heard, after = Heard(), Heard()
    target = turn.subject.target
    length = round(2 * (4 * FIRST_TOKENS_S))
    async with callers(target, heard, turn.plan.cancelled) as made:
        await begin(made, target.request(Orders(length, 2.0), stream=True), over_s=4 * SETTLE_S)
        await until(lambda: all(c.first_ns or c.over for c in made), FIRST_TOKENS_S)
        for caller in made:
            caller.hang_up()
        began = time.monotonic()
        stopped = asyncio.create_task(silence(turn.bare))
        served = await next_served(target, after, within_s=SERVED_WITHIN_S)
    for measure, ended in (("served", served), ("stopped", await stopped)):
        if ended is None:
            after.error(f"not {measure} within {SERVED_WITHIN_S:.0f} s")
        else:
            turn.answers.whole[f"cancel_{measure}_ms"] = 1000 * (ended - began)
    turn.answers.blame("cancellations", heard)
    turn.answers.blame("after cancellations", after)


async def next_served(target: Target, heard: Heard, *, within_s: float) -> float | None:
    """When a new request on a new connection was answered, tried until it is; monotonic seconds."""
    deadline = time.monotonic() + within_s
    request = target.request(Orders(tokens=1, rate=1000.0), stream=True)
    while (left := deadline - time.monotonic()) > 0:
        try:
            caller = await connect(target, heard)
        except OSError:
            heard.error("not connected")
            continue
        try:
            if await first_token(caller, request, within_s=left) is not None:
                return time.monotonic()
        finally:
            caller.hang_up()
    return None


async def silence(bare: Target) -> float | None:
    """When the upstream had no more streams, monotonic seconds; None after 30 s."""
    async with aiohttp.ClientSession(bare.url) as http:
        deadline = time.monotonic() + SERVED_WITHIN_S
        while time.monotonic() < deadline:
            async with http.get("/state") as answer:
                if (await answer.json())["streams"] <= 1:  # the next request's
                    return time.monotonic()
            await asyncio.sleep(0.005)
    return None


async def begin(made: Sequence[Caller], request: bytes, *, over_s: float) -> None:
    """Let each caller send at a time of its own within ``over_s``."""
    loop = asyncio.get_running_loop()
    chance = random.Random(5)  # the same for everything measured
    for caller in made:
        send = functools.partial(_send, caller, request)
        loop.call_later(chance.uniform(0, over_s), send)
    await asyncio.sleep(over_s)


def _send(caller: Caller, request: bytes) -> None:
    if not caller.over:
        caller.send(request, stream=True)


async def until(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while True:
        if (held := condition()) or time.monotonic() > deadline:
            return held
        await asyncio.sleep(0.02)


def percentile(values: Sequence[int], percent: int) -> int:
    """The smallest value that ``percent`` % of them do not exceed (nearest rank)."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


STAGES: tuple[Callable[[Round], Awaitable[None]], ...] = (
    idle_ttft,
    short,
    bodies,
    tokens,
    memory,
    cancellations,
)
