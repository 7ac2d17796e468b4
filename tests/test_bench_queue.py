"""The measurement of the queue measures what it says, and cleans up after itself."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from bench.queue import measure
from bench.queues.driver import rate_of
from bench.queues.report import MEASURES, Results, show
from bench.queues.stages import Plan
from bench.queues.subjects import SQLITE, SUBJECTS

SHORT = Plan(
    rounds=1, enqueue_s=0.1, tasks=20, within_s=5.0, pace_s=1.2, claims=5, finished=100, pasts=1
)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made meanwhile; its path is short, for sockets."""
    made = Path(tempfile.mkdtemp(prefix="hive-"))
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    yield made
    shutil.rmtree(made)


@pytest.mark.skipif(len(psutil.Process().cpu_affinity()) < 2, reason="it takes two cores")
async def test_hive_is_asked_everything_and_nothing_is_left_behind(folder: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    subjects = [subject for subject in SUBJECTS if subject.row == SQLITE]
    said = io.StringIO()
    results = await measure(SHORT, subjects, Console(file=said, width=200))
    show(results, Console(file=said, width=200))
    assert not results.errors
    assert not results.skipped
    assert set(results.rounds[0][SQLITE]) == {measure.key for measure in MEASURES}
    assert all(value > 0 for value in results.rounds[0][SQLITE].values())
    assert "claim+complete, 8 workers" in said.getvalue()
    assert set(psutil.Process().children(recursive=True)) == before
    assert not list(folder.iterdir())


def test_tens_are_compared_with_one_by_one_where_there_is_no_form_for_tens() -> None:
    made = Results(SHORT, "a machine", "2026-01-01", "abc", dict.fromkeys(("hive: x", "RQ"), "1"))
    for slow in (1.0, 2.0):
        made.rounds.append(
            {
                "hive: x": {"enqueue_tens": 400.0, "work_tens": 300.0},
                "RQ": {"enqueue_tens": 200.0 * slow, "enqueue_1": 1.0, "work_1": 100.0 * slow},
            }
        )
    assert made.against("hive: x", "RQ", "enqueue_tens") == [2.0, 1.0]
    assert made.against("hive: x", "RQ", "work_tens") == [3.0, 1.5]
    ratios = made.document()["ratios"]["hive: x"]
    assert ratios["work_tens"]["RQ"] == {"median": 2.25, "min": 1.5, "max": 3.0}


def test_a_rate_leaves_the_first_runs_out() -> None:
    slow_start = [0, *range(10_000_000_000, 11_000_000_001, 100_000_000)]
    assert rate_of(slow_start) == pytest.approx(10)
    assert rate_of([5]) == 0
