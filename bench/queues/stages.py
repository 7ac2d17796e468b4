"""The questions that are put to every queue, each in seconds, one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from bench.meter import Cores, started_on
from bench.queues.driver import NS
from bench.queues.subjects import Subject, Up
from bench.stages import NS_PER_MS, percentile
from bench.subjects import end

MANY = 8  # callers, workers
TENS = 10
SETTLED_S = 1.0  # of a pace, before it counts
PREPARED_S = 60.0
SAID = 400  # characters of a driver's last words
LINE = 2**26  # bytes of a driver's line


@dataclass(frozen=True)
class Plan:
    """How much is asked. Times in seconds.

    :param tasks: that workers work through, or as many as they can in ``within_s``
    :param claims: that are timed, one by one, before the empty table and the full one
    :param finished: rows of the full one
    :param pasts: rounds in which that is measured
    """

    rounds: int = 5
    enqueue_s: float = 4.0
    tasks: int = 2000
    within_s: float = 10.0
    rate: float = 100.0
    pace_s: float = 15.0
    claims: int = 1000
    finished: int = 1_000_000
    pasts: int = 2

    @classmethod
    def quick(cls) -> Plan:
        """One short round: to see that it works, not to quote."""
        return cls(
            rounds=1,
            enqueue_s=1.0,
            tasks=300,
            within_s=5.0,
            pace_s=4.0,
            claims=200,
            finished=100_000,
        )


class Failed(Exception):
    """A driver did not do what it was asked; the message is what it said last."""


@dataclass
class Turn:
    """One subject's turn of a round: where it is, and what was heard of it."""

    plan: Plan
    subject: Subject
    up: Up
    cores: Cores
    heard: dict[str, float] = field(default_factory=dict)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    def fresh(self) -> str:
        """The name of a queue that nobody has used."""
        return f"stage{next(self._numbers)}"

    async def ask(self, verb: str, queue: str, within_s: float, **said: Any) -> dict[str, Any]:
        """Have the driver do one thing. :raises Failed: it did not"""
        async with self.asking(verb, queue, **said) as process:
            return await self.answer(process, within_s)

    @contextlib.asynccontextmanager
    async def asking(
        self, verb: str, queue: str, **said: Any
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """The driver at work on it, and ended with the block."""
        options = {"url": self.up.url, "queue": queue, **self.up.more, **said}
        here = self.cores.load
        if verb == "work" and not self.subject.served:
            here = self.cores.measured
        with started_on(here):
            process = await asyncio.create_subprocess_exec(
                *self.subject.argv(),
                verb,
                json.dumps(options),
                env=self.subject.env(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=LINE,
            )
        try:
            yield process
        finally:
            await end(process)

    async def answer(self, process: asyncio.subprocess.Process, within_s: float) -> dict[str, Any]:
        """Its next line. :raises Failed: it ended without one, or took longer"""
        assert process.stdout is not None
        assert process.stderr is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                if line := await process.stdout.readline():
                    return dict(json.loads(line))
                raise Failed(_why(await process.stderr.read()))
        raise Failed(f"it took longer than {within_s:.0f} s")


def _why(said: bytes) -> str:
    """The line of a driver's last words that names an error; else the last one."""
    lines = said.decode(errors="replace").strip().splitlines() or ["nothing was said"]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1])[:SAID]


async def enqueue(turn: Turn) -> None:
    """Tasks a second, each acknowledged before its caller sends the next."""
    seconds = turn.plan.enqueue_s
    asked = [("enqueue_1", 1, 1), ("enqueue_8", MANY, 1)]
    if turn.subject.tens:
        asked += [("enqueue_tens", 1, TENS), ("enqueue_8_tens", MANY, TENS)]
    for measure, callers, each in asked:
        said = await turn.ask(
            *("enqueue", turn.fresh(), seconds + PREPARED_S),
            callers=callers,
            each=each,
            seconds=seconds,
        )
        turn.heard[measure] = said["per_s"]


async def work(turn: Turn) -> None:
    """Empty tasks that are claimed, run and completed a second."""
    plan = turn.plan
    asked = [("work_1", 1, 1), ("work_8", MANY, 1)]
    if turn.subject.takes_tens:
        asked.append(("work_tens", 1, TENS))
    for measure, workers, each in asked:
        queue = turn.fresh()
        await turn.ask("fill", queue, PREPARED_S, tasks=plan.tasks)
        said = {"workers": workers, "each": each, "tasks": plan.tasks, "within_s": plan.within_s}
        async with turn.asking("work", queue, **said) as process:
            await turn.answer(process, PREPARED_S)  # it has begun
            turn.heard[measure] = (await turn.answer(process, plan.within_s + PREPARED_S))["per_s"]


async def latency(turn: Turn) -> None:
    """From when a task was due to be sent until it ran, while they come evenly."""
    plan, queue = turn.plan, turn.fresh()
    tasks = round(plan.rate * plan.pace_s)
    said = {
        "workers": MANY,
        "each": 1,
        "tasks": tasks + 1,
        "within_s": plan.pace_s + plan.within_s,
    }
    async with turn.asking("work", queue, **said) as process:
        await turn.ask("fill", queue, PREPARED_S, tasks=1)
        await turn.answer(process, PREPARED_S)
        paced = turn.ask(
            *("pace", queue, plan.pace_s + PREPARED_S), rate=plan.rate, seconds=plan.pace_s
        )
        await paced
        runs = (await turn.answer(process, plan.pace_s + plan.within_s + PREPARED_S))["runs"]
    sent = sorted(run for run in runs if run[0])
    settled = [run for run in sent if run[0] >= sent[0][0] + SETTLED_S * NS]
    if len(sent) < tasks:
        raise Failed(f"of {tasks} tasks {len(sent)} ran in time")
    took = [ran - due for due, ran in settled]
    for percent in (50, 99):
        turn.heard[f"latency_p{percent}_ms"] = percentile(took, percent) / NS_PER_MS


async def past(turn: Turn) -> None:
    """Claims before an almost empty table, and before one with very many finished rows."""
    if not turn.subject.past:
        return
    plan, queue = turn.plan, turn.fresh()
    for measure in ("claim_empty_p99_ms", "claim_full_p99_ms"):
        said = await turn.ask("claim", queue, PREPARED_S, tasks=plan.claims)
        took = [round(ms * NS_PER_MS) for ms in said["ms"]]
        turn.heard[measure] = percentile(took, 99) / NS_PER_MS
        if measure == "claim_empty_p99_ms":
            await turn.ask("finished", queue, 10 * PREPARED_S, tasks=plan.finished)
    turn.heard["claim_ratio"] = turn.heard["claim_full_p99_ms"] / turn.heard["claim_empty_p99_ms"]


STAGES = (enqueue, work, latency, past)
