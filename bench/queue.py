"""What a task costs, beside other people's queues: ``make bench-queue``.

``python -m bench.queue [--quick] [--rounds 5] [--only NAME …]``

Callers and workers have one core, what keeps the queue another. Each round starts each queue
afresh, in an order of its own, and ends it. ``--quick`` (one short round, not to be quoted) takes
some five minutes. The results go into ``bench/results`` as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench import report
from bench.meter import Busy, Cores
from bench.peers.base import Absent
from bench.queues.report import Results, show
from bench.queues.stages import STAGES, Failed, Plan, Turn, past
from bench.queues.subjects import SUBJECTS, Subject

PAPER_WIDTH = 240
RESULTS = Path(__file__).parent / "results"


async def measure(plan: Plan, subjects: Sequence[Subject], console: Console) -> Results:
    results = Results(plan, report.machine(), report.today(), report.commit(), {})
    present: list[Subject] = []
    for subject in subjects:
        try:
            results.versions[subject.row] = subject.version()
            present.append(subject)
        except Absent as why:
            results.skipped[subject.row] = str(why)
    cores = Cores.choose()
    for number in range(plan.rounds):
        order = list(present)
        random.Random(number).shuffle(order)
        for subject in order:
            if subject.row not in results.skipped:
                await turn(number, subject, results, cores, console)
    return results


async def turn(
    number: int, subject: Subject, results: Results, cores: Cores, console: Console
) -> None:
    """Bring one queue up, put all questions to it, and write down what it said."""
    began = time.monotonic()
    try:
        async with subject.server.up(cores) as up:
            before, asked = Busy.now(), time.monotonic()
            one = Turn(results.plan, subject, up, cores)
            await one.ask("prepare", one.fresh(), results.plan.within_s * 10)
            for stage in STAGES:
                if stage is past and number >= results.plan.pasts:
                    continue
                try:
                    await stage(one)
                except Failed as why:
                    said = f"round {number + 1}, {subject.row}, {stage.__name__}: {why}"
                    results.errors.append(said)
            others = Busy.now().others_since(before) / (time.monotonic() - asked)
    except (Absent, Failed) as why:
        results.skipped[subject.row] = str(why)
        console.print(f"{subject.row} is skipped: {why}", markup=False, highlight=False)
        return
    results.add(number, subject.row, one.heard)
    results.others_cores.append(round(others, 2))
    took = time.monotonic() - began
    console.print(
        f"round {number + 1}/{results.plan.rounds}  {subject.row:24}  {took:4.0f} s",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round, not to be quoted")
    parser.add_argument("--rounds", type=int, help="rounds of the full run (5)")
    parser.add_argument("--only", nargs="+", default=(), help="names or parts of names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    plan = Plan.quick() if options.quick else Plan()
    if options.rounds:
        plan = replace(plan, rounds=options.rounds)
    console = Console(width=None if sys.stdout.isatty() else PAPER_WIDTH)
    subjects = [
        subject
        for subject in SUBJECTS
        if not options.only or any(part in subject.row for part in options.only)
    ]
    results = asyncio.run(measure(plan, subjects, console))
    show(results, console)
    name = f"queue-{results.date}{'-quick' if options.quick else ''}"
    console.print(f"Written: {report.save(results, options.out, name)}")


if __name__ == "__main__":
    main()
