"""All devices of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

from hive_agent.devices.amd import SYSFS, Amd
from hive_agent.devices.cpu import Cpu
from hive_agent.devices.nvidia import Nvidia
from operations.hosts import Device


class Devices:
    """Samples the devices; any thread may ask.

    :param clock: seconds; says when what failed is tried again
    :param sysfs: where AMD GPUs are looked for
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, sysfs: Path = SYSFS) -> None:
        self._nvidia = Nvidia(clock)
        self._amd = Amd(sysfs)
        self._cpu = Cpu()

    @property
    def no_gpu_because(self) -> str | None:
        """Why there is no NVIDIA GPU, as of the last sample; None where there is one."""
        return self._nvidia.absent_because

    def sample(self, ours: Collection[int] = frozenset()) -> list[Device]:
        """All devices as they are now: NVIDIA GPUs by number, AMD GPUs, the CPU last.

        About 1 ms a GPU. A driver that hangs delays it by a second at most (its very first answer,
        by 10 s); an unhealthy device says so in ``problem``. Raises nothing for a device's sake.

        :param ours: processes whose GPU memory is ours: pids of workers, whose process groups and
            descendants count as well
        """
        return [*self._nvidia.sample(ours), *self._amd.sample(), self._cpu.sample()]
