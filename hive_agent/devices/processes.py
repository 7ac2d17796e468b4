"""Whose a process is, from ``/proc/PID/stat`` (Linux, ``proc_pid_stat(5)``)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

PROC = Path("/proc")
DEEPEST = 64


def belongs(pid: int, ours: Collection[int], proc: Path = PROC) -> bool:
    """Whether a process, its process group or one of its ancestors is among ``ours``."""
    if pid in ours:
        return True
    for _ in range(DEEPEST if ours else 0):
        parent, group = _relatives(pid, proc)
        if group in ours or parent in ours:
            return True
        if parent <= 1:
            return False
        pid = parent
    return False


def _relatives(pid: int, proc: Path) -> tuple[int, int]:
    """The parent and the process group; zeros where there is no such process."""
    try:
        stat = (proc / str(pid) / "stat").read_bytes()
    except OSError:
        return 0, 0
    _, parent, group = stat.rpartition(b")")[2].split()[:3]  # the name before may hold anything
    return int(parent), int(group)
