"""What came out: medians and spread over rounds, ratios round by round, a table, a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from bench.stages import Answers, Plan
from bench.subjects import BARE


@dataclass(frozen=True)
class Measure:
    """A column.

    :param added: the bare upstream's figure of the same round is taken off
    :param better: which direction is good
    """

    key: str
    title: str
    unit: str
    digits: int = 1
    added: bool = False
    better: str = "less"


MEASURES = (
    Measure("token_us", "CPU a token", "µs"),
    Measure("ttft_p50_ms", "TTFT added, p50", "ms", 2),
    Measure("ttft_p99_ms", "TTFT added, p99", "ms", 2),
    Measure("delay_p50_ms", "token delay added, p50", "ms", 2, added=True),
    Measure("delay_p99_ms", "token delay added, p99", "ms", 2, added=True),
    Measure("short_per_s", "short requests a second", "/s", 0, better="more"),
    Measure("short_us", "CPU a short request", "µs", 0),
    Measure("body_per_s", "100 KB bodies a second", "/s", 0, better="more"),
    Measure("body_us", "CPU a 100 KB body", "µs", 0),
    Measure("many_served", "of many streams, served", "", 0, better="more"),
    Measure("many_mb", "memory at many streams", "MB", 0),
    Measure("cancel_served_ms", "served after cancellations", "ms", 0),
    Measure("cancel_stopped_ms", "engine free after cancellations", "ms", 0),
    Measure("tokens_per_s", "tokens a second that came", "/s", 0, better="more"),
)

COMPARED = ("token_us", "short_per_s", "short_us", "many_mb")
QUIET_CORES = 0.1  # what a machine that does nothing else may use

Rounds = list[dict[str, dict[str, float]]]
"""Each round's figures: row → measure → figure."""


@dataclass
class Figures:
    """Everything of one run; what the file holds."""

    measures: ClassVar[Sequence[Measure]]

    plan: Any
    machine: str
    date: str
    commit: str
    versions: dict[str, str]
    rounds: Rounds = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    others_cores: list[float] = field(default_factory=list)
    """Cores that processes of somebody else had, while each subject was measured."""

    def rows(self) -> list[str]:
        measured = {row for figures in self.rounds for row in figures}
        return [row for row in self.versions if row in measured]

    def values(self, row: str, measure: str) -> list[float]:
        return [f[row][measure] for f in self.rounds if measure in f.get(row, {})]

    def ratios(self, row: str, other: str, measure: str, of: str | None = None) -> list[float]:
        """``row`` over ``other``, round by round.

        :param of: the other's measure, where it is not the same
        """
        of = of or measure
        return [
            figures[row][measure] / figures[other][of]
            for figures in self.rounds
            if measure in figures.get(row, {}) and figures.get(other, {}).get(of)
        ]

    @property
    def where(self) -> str:
        """Machine, date and source, for the foot of a table."""
        return f"{self.machine}; {self.date}; {self.commit}"

    def document(self) -> dict[str, Any]:
        rows = {
            row: {
                measure.key: summary(values)
                for measure in self.measures
                if (values := self.values(row, measure.key))
            }
            for row in self.rows()
        }
        return {**asdict(self), "summary": rows}


@dataclass
class Results(Figures):
    """Of the relay and its peers."""

    measures = MEASURES

    plan: Plan

    def add(self, number: int, rows: Sequence[str], answers: Answers) -> None:
        while len(self.rounds) <= number:
            self.rounds.append({})
        bare = self.rounds[number].get(BARE, {})  # it comes first; from its own nothing is taken
        whole = dict(answers.whole)
        for measure in MEASURES:
            if measure.added and measure.key in whole:
                whole[measure.key] -= bare.get(measure.key, 0.0)
        for row in rows:
            own = answers.groups.get(row, {})
            # The path is that of the last row, the whole of what stands in it.
            self.rounds[number][row] = {**own, **(whole if row == rows[-1] else {})}
        for stage, errors in answers.errors.items():
            said = ", ".join(f"{count} × {what}" for what, count in errors.items())
            self.errors.append(f"round {number + 1}, {rows[-1]}, {stage}: {said}")


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> str:
    """The processor, its cores, the kernel and Python: what absolute figures depend on."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        model = found[1]
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def commit() -> str:
    """Of Hive's source as it is measured, ``-dirty`` where it is not what was committed."""
    try:
        asked = ("git", "describe", "--always", "--dirty", "--exclude=*")
        return subprocess.run(
            asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # not a checkout


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def show(results: Results, console: Console) -> None:
    """The table: a row for each thing measured, median and spread over the rounds."""
    plan = results.plan
    title = (
        f"Relay: {plan.streams} streams × {plan.rate:.0f} tokens/s ({plan.arrival}), "
        f"{plan.short_callers} callers, {plan.many} streams held, {plan.cancelled} cancelled"
    )
    console.print(table_of(results, title))
    for line in compared(results):
        console.print(line, highlight=False)
    notes(results, console)


def table_of(results: Figures, title: str) -> Table:
    """A line for each measure, a column for each thing measured."""
    table = Table(title=f"{title}; median of {len(results.rounds)}", caption=results.where)
    table.add_column("", no_wrap=True)
    rows = results.rows()
    for row in rows:
        version = results.versions.get(row, "")
        name = row.replace(": ", ":\n")
        table.add_column(f"{name}\n{version}".strip(), justify="right", no_wrap=True)
    for measure in results.measures:
        cells = (_cell(measure, results.values(row, measure.key)) for row in rows)
        table.add_row(f"{measure.title} [dim]{measure.unit}[/dim]", *cells)
    return table


def notes(results: Figures, console: Console) -> None:
    """What was left out, what went wrong, and whether somebody else was busy."""
    for name, why in results.skipped.items():
        console.print(f"{name} is skipped: {why}", markup=False, highlight=False)
    for line in results.errors:
        console.print(f"errors: {line}", markup=False, highlight=False)
    if results.others_cores and max(results.others_cores) > QUIET_CORES:
        console.print(
            f"Other processes used up to {max(results.others_cores):.1f} cores of this machine "
            "meanwhile, so these figures are no good to quote. Run it again when it is quiet.",
            highlight=False,
        )


def _cell(measure: Measure, values: Sequence[float]) -> str:
    if not values:
        return "–"
    digits = measure.digits
    middle = f"{statistics.median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle}\n[dim]{min(values):,.{digits}f}–{max(values):,.{digits}f}[/dim]"


def compared(results: Results) -> Iterable[str]:
    """Hive's rows over the others', the median of the rounds' ratios."""
    rows = results.rows()
    hive = [row for row in rows if row.startswith("hive")]
    others = [row for row in rows if not row.startswith("hive") and row != BARE]
    for measure in MEASURES:
        if measure.key not in COMPARED:
            continue
        for row in hive:
            ratios = {other: results.ratios(row, other, measure.key) for other in others}
            said = [f"{statistics.median(r):.2f}× {other}" for other, r in ratios.items() if r]
            if said:
                yield f"{measure.title}, {row}: {', '.join(said)}"


def save(results: Figures, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results.document(), indent=1) + "\n")
    return path


def figures(results: Results, measure: str) -> Mapping[str, dict[str, float]]:
    """Row → summary of a measure, for those rows that have it."""
    found = {row: results.values(row, measure) for row in results.rows()}
    return {row: summary(values) for row, values in found.items() if values}
