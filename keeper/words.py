"""Figures and times as people read them."""

from __future__ import annotations

import re

_UNSEEN = r"\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(rf"[\x00-\x1f{_UNSEEN}]")
_CONTROL_IN_BLOCK = re.compile(rf"[\x00-\x08\x0b-\x1f{_UNSEEN}]")

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


def printable(text: str, *, block: bool = False) -> str:
    """What somebody else has said, so that it drives no terminal and breaks no line of a table.

    Control characters, and those that turn the direction of writing, are shown as Python writes
    them: ``\\x1b``, ``\\n``.

    :param block: it stands by itself: line breaks and tabs stay
    """
    if block:
        return _CONTROL_IN_BLOCK.sub(_escaped, text.replace("\r\n", "\n"))
    return _CONTROL.sub(_escaped, text)


def printable_line(text: str) -> str:
    """The same of a line whose tabs mean something."""
    return _CONTROL_IN_BLOCK.sub(_escaped, text).replace("\n", "\\n")


def printable_json(text: str) -> str:
    """JSON that means the same, with those characters escaped which JSON would allow."""
    return _CONTROL_IN_BLOCK.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
