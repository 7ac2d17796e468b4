"""How a vLLM worker is started."""

from __future__ import annotations

from pathlib import Path

from hive_agent.workers.spec import Launch, WorkerSpec


def launch(spec: WorkerSpec, socket: Path) -> Launch:
    """The command of vLLM's own server, run by the interpreter of its environment."""
    raise NotImplementedError
