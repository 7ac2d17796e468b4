"""One thing that the doctor found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A sentence or more for people: what is, where, and, if it is not well, what to do next."""

    text: str
    well: bool = True


def problem(text: str) -> Finding:
    """Something to be mended."""
    return Finding(text, well=False)
