"""What a worker is started from, and the command that starts it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from operations.hosts import ModelInfo, Task
from operations.operations import Engine, WorkerOptions


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker is started from, and started again from after a crash.

    :param devices: ids; several share the model
    :param uuids: of the GPUs among them, in the same order, as CUDA is to be told
    :param python: the interpreter that runs the engine
    """

    worker_id: str
    model: ModelInfo
    engine: Engine
    devices: tuple[str, ...]
    slots: int
    context_length: int
    threads: int
    options: WorkerOptions
    uuids: tuple[str, ...] = ()
    python: str = sys.executable

    @property
    def device(self) -> str:
        """The first device."""
        return self.devices[0]

    @property
    def tasks(self) -> tuple[Task, ...]:
        if self.engine == "scripted":
            return ("generate", "embed", "rerank")
        if self.options.rerank:
            return ("rerank",)
        return ("embed",) if self.options.embeddings else ("generate",)


@dataclass(frozen=True)
class Launch:
    """A command for the operating system.

    :param env: added to the agent's own
    :param connections: how many the engine's server can hold open at once; 0 is any number
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    connections: int = 0


def ours(spec: WorkerSpec, socket: Path, *flags: str, connections: int = 0) -> Launch:
    """The command of one of the engines in ``worker.engines``, with the flags that all take."""
    argv = (
        spec.python,
        "-m",
        f"worker.engines.{spec.engine}",
        f"--socket={socket}",
        f"--served-name={spec.model.id}",
        f"--context={spec.context_length}",
        f"--slots={spec.slots}",
        f"--device={spec.device}",
        *flags,
    )
    return Launch(argv, {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}, connections)
