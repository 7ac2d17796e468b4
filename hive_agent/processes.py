"""Starting, naming and ending processes: what several rooms of the agent do alike."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

SECRET = re.compile(r"^HIVE_|TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL")

GROUP_POLL_S = 0.02


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """What an engine may know of the agent's environment: it parses other people's files."""
    return {name: value for name, value in environment.items() if not SECRET.search(name)}


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, over one that is there."""
    path.unlink(missing_ok=True)
    private = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(private, "w", encoding="utf-8") as file:
        file.write(text)


def signal_group(pid: int, signum: int) -> None:
    """Signal the process group that a process leads; it may be gone already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def group_lives(pgid: int) -> bool:
    """Whether a process of the group still runs; zombies do not."""
    try:
        os.killpg(pgid, 0)
    except OSError:
        return False
    return any(_runs_in(pid, pgid) for pid in psutil.pids())


def wait_for_group(pgid: int, within_s: float) -> None:
    """Block until no process of the group runs, or the time is over."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and group_lives(pgid):
        time.sleep(GROUP_POLL_S)


def _runs_in(pid: int, pgid: int) -> bool:
    try:
        return os.getpgid(pid) == pgid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", encoding="ascii") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
