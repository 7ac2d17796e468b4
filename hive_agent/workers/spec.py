"""What a worker is started from, and the command that starts it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hive_agent.fit.verdict import Reservation
from operations.hosts import ModelInfo, Task
from operations.operations import Engine, WorkerOptions


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker is started from, and started again from after a crash.

    :param devices: ids; several share the model
    :param cuda_ids: what CUDA is to be told of the NVIDIA GPUs among them, in the same order
    :param python: the interpreter that runs the engine
    :param env: variables that the engine's environment needs
    :param adapters: name → digest of the adapters that can be asked for by name
    :param reserved: what vLLM is to take; None where that was not predicted
    :param layers: of llama.cpp over several GPUs, how many lie on each; () leaves that to it
    """

    worker_id: str
    model: ModelInfo
    engine: Engine
    devices: tuple[str, ...]
    slots: int
    context_length: int
    threads: int
    options: WorkerOptions
    cuda_ids: tuple[str, ...] = ()
    python: str = sys.executable
    reserved: Reservation | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] = ()

    @property
    def device(self) -> str:
        """The first device."""
        return self.devices[0]

    @property
    def visible(self) -> Mapping[str, str]:
        """The variables that show CUDA the worker's own GPUs and no others; none for what is not
        CUDA's.

        What CUDA sees of several it counts from 0, in the order that is given here.
        """
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            return {}  # ROCm, too, would hide its devices
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(self.cuda_ids),
        }

    @property
    def served_as(self) -> str:
        """The model's name at the engine."""
        return self.options.served_as or self.model.id

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

    :param env: added to the agent's own; what is None is taken out of it
    :param connections: how many the engine's server can hold open at once; 0 is any number
    :param files: path (see :func:`beside`) → text: for the engine to read, there while it runs
    """

    argv: tuple[str, ...]
    env: Mapping[str, str | None]
    connections: int = 0
    files: Mapping[Path, str] = field(default_factory=dict)

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The variables of the process, made of those of ``base``."""
        both = {**base, **self.env}
        return {name: value for name, value in both.items() if value is not None}


def beside(socket: Path, name: str) -> Path:
    """Where a file of a worker goes: next to its socket, and gone when the worker is."""
    return socket.with_suffix(f".{name}")


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
