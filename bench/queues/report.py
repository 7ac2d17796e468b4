"""What came out: a table, and how Hive compares, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.queues.stages import Plan
from bench.report import Figures, Measure, notes, summary, table_of

MEASURES = (
    Measure("enqueue_1", "enqueue, 1 caller", "/s", 0, better="more"),
    Measure("enqueue_8", "enqueue, 8 callers", "/s", 0, better="more"),
    Measure("enqueue_tens", "enqueue in tens, 1 caller", "/s", 0, better="more"),
    Measure("enqueue_8_tens", "enqueue in tens, 8 callers", "/s", 0, better="more"),
    Measure("work_1", "claim+complete, 1 worker", "/s", 0, better="more"),
    Measure("work_8", "claim+complete, 8 workers", "/s", 0, better="more"),
    Measure("work_tens", "claim+complete in tens, 1", "/s", 0, better="more"),
    Measure("latency_p50_ms", "end to end p50", "ms"),
    Measure("latency_p99_ms", "end to end p99", "ms"),
    Measure("claim_empty_p99_ms", "claim p99, empty table", "ms"),
    Measure("claim_full_p99_ms", "claim p99, finished rows", "ms"),
    Measure("claim_ratio", "the latter over the former", "×", 2),
)

COMPARED: Mapping[str, tuple[str, ...]] = {
    "enqueue_1": ("enqueue_1",),
    "enqueue_8": ("enqueue_8",),
    "enqueue_tens": ("enqueue_tens", "enqueue_1"),
    "enqueue_8_tens": ("enqueue_8_tens", "enqueue_8"),
    "work_1": ("work_1",),
    "work_8": ("work_8",),
    "work_tens": ("work_tens", "work_1"),
}
"""Hive's measure → the others', the first of these that they have: without a form for tens, theirs
one by one."""


@dataclass
class Results(Figures):
    """Of the queue and its peers."""

    measures = MEASURES

    plan: Plan

    def add(self, number: int, row: str, heard: dict[str, float]) -> None:
        while len(self.rounds) <= number:
            self.rounds.append({})
        self.rounds[number][row] = heard

    def document(self) -> dict[str, Any]:
        ratios = {
            hive: {
                measure: {
                    other: summary(found)
                    for other in self.others()
                    if (found := self.against(hive, other, measure))
                }
                for measure in COMPARED
            }
            for hive in self.hives()
        }
        return {**super().document(), "ratios": ratios}

    def hives(self) -> list[str]:
        return [row for row in self.rows() if row.startswith("hive")]

    def others(self) -> list[str]:
        return [row for row in self.rows() if not row.startswith("hive")]

    def against(self, hive: str, other: str, measure: str) -> list[float]:
        """Hive's figure over another queue's, round by round."""
        of = next((one for one in COMPARED[measure] if self.values(other, one)), measure)
        return self.ratios(hive, other, measure, of)


def show(results: Results, console: Console) -> None:
    """The figures, the ratios, and what was not as it should be."""
    plan = results.plan
    title = (
        f"Queue: {plan.tasks:,} tasks worked through, {plan.rate:.0f}/s for latencies, "
        f"{plan.finished:,} finished rows"
    )
    console.print(table_of(results, title))
    if results.hives() and results.others():
        console.print(ratios_of(results))
    notes(results, console)


def ratios_of(results: Results) -> Table:
    """Hive ÷ each other queue, the median of the rounds' ratios and their range."""
    table = Table(title="Hive ÷ others, round by round: over 1, Hive does more")
    table.add_column("", no_wrap=True)
    for other in results.others():
        table.add_column(other.replace(": ", ":\n"), justify="right", no_wrap=True)
    titles = {measure.key: measure.title for measure in MEASURES}
    for hive in results.hives():
        for measure in COMPARED:
            found = [results.against(hive, other, measure) for other in results.others()]
            table.add_row(f"{hive.removeprefix('hive: ')}: {titles[measure]}", *map(_ratio, found))
        table.add_section()
    return table


def _ratio(found: Sequence[float]) -> str:
    if not found:
        return "–"
    middle = f"{statistics.median(found):.2f}"
    return middle if len(found) == 1 else f"{middle}\n[dim]{min(found):.2f}–{max(found):.2f}[/dim]"
