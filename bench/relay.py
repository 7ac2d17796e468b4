"""What the path of a token costs, beside peers: ``make bench``.

``python -m bench.relay [--quick] [--rounds 5] [--arrival spread|steps] [--only NAME …]
[--stages tokens …]``

Load and upstream have one core (two where there are three), what is measured has another to
itself, all of its processes. Each round starts each relay afresh, in an order of its own, and
ends it. The full run takes about 40 minutes, ``--quick`` (one short round, not to be quoted) 5.
The results go into ``bench/results``: everything as JSON, the main figures as a picture.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import uvloop
from rich.console import Console

from bench import picture, report
from bench.load import Target
from bench.meter import Busy, Cores
from bench.peers import Absent
from bench.report import Results
from bench.stages import STAGES, Answers, Plan, Round
from bench.subjects import BARE, ENTRIES, Entry, upstream_running
from bench.upstream import Arrival

FILES = 20_000  # descriptors: callers, and as many for the relay that inherits the limit
PAPER_WIDTH = 200
RESULTS = Path(__file__).parent / "results"


async def measure(plan: Plan, entries: Sequence[Entry], console: Console) -> Results:
    results = Results(plan, report.machine(), report.today(), report.commit(), {})
    present: list[Entry] = []
    for entry in entries:
        try:
            results.versions |= dict.fromkeys(entry.rows, entry.version())
            present.append(entry)
        except Absent as why:
            results.skipped[entry.rows[-1]] = str(why)
    cores = Cores.choose()
    os.sched_setaffinity(0, {cores.load})
    async with upstream_running(cores) as url:
        for number in range(plan.rounds):
            for entry in order(present, number):
                if entry.rows[-1] in results.skipped:
                    continue
                await turn(number, entry, results, cores, url, console)
    return results


def order(entries: Sequence[Entry], number: int) -> list[Entry]:
    """Each round's own, the bare upstream first: others are compared with it."""
    bare = [entry for entry in entries if entry.rows == (BARE,)]
    rest = [entry for entry in entries if entry.rows != (BARE,)]
    random.Random(number).shuffle(rest)
    return bare + rest


async def turn(
    number: int,
    entry: Entry,
    results: Results,
    cores: Cores,
    url: str,
    console: Console,
) -> None:
    """Bring one entry up, put all questions to it, and write down what it said."""
    name, answers = entry.rows[-1], Answers()
    began = time.monotonic()
    try:
        async with entry.up(url, cores) as subject:
            before, asked = Busy.now(), time.monotonic()
            for stage in STAGES:
                if results.plan.stages and stage.__name__ not in results.plan.stages:
                    continue
                gc.collect()
                try:
                    await stage(Round(results.plan, subject, Target(url), answers))
                except OSError as error:  # it refuses connections: its next stage may go better
                    answers.errors[stage.__name__] = {f"broken off: {error!r}": 1}
            others = Busy.now().others_since(before) / (time.monotonic() - asked)
    except Absent as why:
        results.skipped[name] = str(why)
        console.print(f"{name} is skipped: {why}", markup=False, highlight=False)
        return
    results.add(number, entry.rows, answers)
    results.others_cores.append(round(others, 2))
    took = time.monotonic() - began
    console.print(
        f"round {number + 1}/{results.plan.rounds}  {name:20}  {took:4.0f} s", highlight=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round, not to be quoted")
    parser.add_argument("--rounds", type=int, help="rounds of the full run (5)")
    parser.add_argument(
        "--arrival",
        choices=get_args(Arrival),
        default="spread",
        help="each stream has a beat of its own, or all get their tokens in one decode step",
    )
    parser.add_argument("--only", nargs="+", default=(), help="names or parts of names")
    parser.add_argument(
        "--stages", nargs="+", default=(), choices=[stage.__name__ for stage in STAGES]
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    plan = Plan.quick(options.arrival) if options.quick else Plan(arrival=options.arrival)
    plan = replace(plan, rounds=options.rounds or plan.rounds, stages=tuple(options.stages))
    entries = [
        entry
        for entry in ENTRIES
        if not options.only
        or entry.rows == (BARE,)
        or any(part in row for part in options.only for row in entry.rows)
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(FILES, hard)), hard))
    gc.disable()  # collected between the stages instead
    console = Console(width=None if sys.stdout.isatty() else PAPER_WIDTH)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(measure(plan, entries, console))
    report.show(results, console)
    name = f"relay-{results.date}{'-steps' if plan.arrival == 'steps' else ''}"
    name += "-quick" if options.quick else ""
    path = report.save(results, options.out, name)
    path.with_suffix(".svg").write_text(picture.svg(results))
    console.print(f"Written: {path} and .svg")


if __name__ == "__main__":
    main()
