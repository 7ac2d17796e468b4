"""The fake driver of one machine: compiles the library, and writes what it answers.

A machine is its GPUs; a test changes them with :meth:`FakeDriver.write` while others look.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

GIB = 2**30
SOURCE = Path(__file__).with_name("nvml.c")
LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Process:
    pid: int
    used: int = GIB
    name: str | bytes = "/usr/bin/python3"


@dataclass(frozen=True)
class Gpu:
    """A GPU or, in the ``instances`` of one, a MIG instance; sizes in bytes, power in mW.

    :param place: its NUMA node, host bridge and PCIe switch (``0/1/2``); empty is not told
    :param nvlink: GPUs of one such name are joined by NVLink
    """

    uuid: str | bytes
    name: str | bytes = "NVIDIA H100 80GB HBM3"
    total: int = 80 * GIB
    used: int = 0
    util: int = 12
    temp: int = 41
    power: int = 70_400
    major: int = 9
    minor: int = 0
    error: int = 0
    ecc: int = 0
    remap: int = 0
    mig: int = 0
    unsupported: str = ""
    place: str = ""
    nvlink: str = ""
    instances: tuple[Gpu, ...] = ()
    processes: tuple[Process, ...] = ()


def gpus(count: int) -> list[Gpu]:
    return [Gpu(f"GPU-{index}") for index in range(count)]


def islands() -> list[Gpu]:
    """Eight GPUs on two NUMA nodes: NVLink within the four of each node only."""
    return [
        replace(gpu, place=f"{index // 4}/0/{index // 2}", nvlink=f"island {index // 4}")
        for index, gpu in enumerate(gpus(8))
    ]


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> None:
    """Compile the library into a folder."""
    command = compiler()
    assert command is not None
    target = folder / f"{LIBRARY}.part"
    subprocess.run([command, "-O1", "-shared", "-fPIC", "-o", target, SOURCE], check=True)
    target.rename(folder / LIBRARY)


@dataclass
class FakeDriver:
    """``folder`` has the library; ``state`` is the file that it answers from."""

    folder: Path
    state: Path
    _versions: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def env(self) -> dict[str, str]:
        return {"LD_LIBRARY_PATH": str(self.folder), "FAKE_NVML": str(self.state)}

    def write(
        self,
        found: Sequence[Gpu],
        *,
        version: str = "550.54.15",
        generation: int = 0,
        error: int = 0,
        delay_ms: int = 0,
    ) -> None:
        """Let the driver say this from now on; a new ``generation`` is a reload."""
        lines = [
            _line(
                "driver",
                version=version,
                cuda=12040,
                generation=generation,
                error=error,
                delay_ms=delay_ms,
            )
        ]
        for gpu in found:
            lines += _lines("gpu", gpu)
        fresh = self.state.with_name(f"state-{next(self._versions)}")
        fresh.write_bytes(b"".join(lines))
        fresh.replace(self.state)


def _lines(kind: str, gpu: Gpu) -> list[bytes]:
    told = {k: v for k, v in vars(gpu).items() if k not in ("instances", "processes")}
    lines = [_line(kind, **told), *(_line("process", **vars(p)) for p in gpu.processes)]
    for instance in gpu.instances:
        lines += _lines("mig", instance)
    return lines


def _line(kind: str, **fields: object) -> bytes:
    parts = [kind.encode()]
    for key, value in fields.items():
        parts.append(key.encode() + b"=" + _bytes(value))
    return b"\t".join(parts) + b"\n"


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
