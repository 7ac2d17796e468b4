"""A build of ``xllamacpp`` that says that it sees CUDA's GPUs, for machines without any."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


def installed() -> dict[str, str]:
    """The variables of an agent for which this build is the installed one."""
    return {"PYTHONPATH": f"{FOLDER}:{ROOT}"}
