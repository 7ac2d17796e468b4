"""The devices of this machine: NVIDIA GPUs through NVML, and the CPU."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path

import psutil
import pynvml

from operations.hosts import Device

log = logging.getLogger(__name__)

MIB = 2**20


class Devices:
    """Samples the devices. NVML is tried once; why it failed is kept for :attr:`no_gpu_because`."""

    def __init__(self) -> None:
        self.no_gpu_because: str | None = None
        self._gpus = 0
        try:
            pynvml.nvmlInit()
            self._gpus = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self.no_gpu_because = _why(error)
        self._cpu_name = cpu_name()
        self._cores = cores()

    def sample(self) -> list[Device]:
        """All devices as they are now: GPUs by index, the CPU last. Takes about 1 ms a GPU."""
        return [*(self._gpu(index) for index in range(self._gpus)), self._cpu()]

    def _cpu(self) -> Device:
        memory = psutil.virtual_memory()
        return Device(
            id="cpu",
            name=self._cpu_name,
            device_type="cpu",
            vram_total_mb=memory.total // MIB,
            vram_free_mb=memory.available // MIB,
            cores=self._cores,
        )

    def _gpu(self, index: int) -> Device:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            return Device(
                id=f"cuda:{index}",
                name=_text(pynvml.nvmlDeviceGetName(handle)),
                device_type="gpu",
                vram_total_mb=memory.total // MIB,
                vram_free_mb=memory.free // MIB,
                compute_capability=f"{major}.{minor}",
                uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                utilization_percent=_utilization(handle),
            )
        except pynvml.NVMLError as error:
            return Device(
                id=f"cuda:{index}",
                name="unknown",
                device_type="gpu",
                vram_total_mb=0,
                vram_free_mb=0,
                healthy=False,
                problem=f"NVML: {error}",
            )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _utilization(handle: object) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:  # not supported by every GPU
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _why(error: pynvml.NVMLError) -> str:
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return "no NVIDIA driver library (libnvidia-ml.so.1) on this machine"
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        return "the NVIDIA driver is installed but not loaded"
    return f"NVML: {error}"
