"""Figures and times as people read them."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

MIB = 1024 * 1024


def size(count: float) -> str:
    """Bytes as ``639.4 MB``; decimal units, as disks and downloads have them."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def memory(mib: float) -> str:
    """MiB as ``139.8 GB``; binary units under their everyday names, as GPUs are sold."""
    return f"{mib:.0f} MB" if mib < 1024 else f"{mib / 1024:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as ``0.4 s``, ``12 s``, ``2 min``, ``3 h`` or ``5 days``."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86_400:.0f} days"


def age(seconds: float) -> str:
    """How long ago, in whole seconds at least: ``3 s``, ``2 min``."""
    return duration(seconds) if seconds >= 10 else f"{max(0.0, seconds):.0f} s"


def count(number: int, noun: str) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """Text without the control characters by which a stranger could drive a terminal."""
    return _CONTROL.sub("", text)
