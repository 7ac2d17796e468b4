"""What NVML says of the GPUs, in our units. What a GPU does not support is None.

Every call here may block for as long as a driver hangs. Source: the NVML API reference, ``nvml.h``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pynvml

from hive_agent.devices.seats import identify
from hive_agent.devices.text import readable
from operations.hosts import DeviceProcess

MIB = 2**20
ECC_EVERY_S = 10.0
MOST_PROCESSES = 64  # of one GPU, those that hold most

DRIVER_GONE = (
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
)
GPU_LOST = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
    pynvml.NVML_ERROR_RESET_REQUIRED,
)
GPU_GONE = (*DRIVER_GONE, *GPU_LOST)
RESET = "stop this hive agent and all else that uses the GPU, then 'sudo nvidia-smi --gpu-reset'"
REASONS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "no NVIDIA driver library (libnvidia-ml.so.1) on this machine"
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "the NVIDIA driver is installed but not loaded; load it with 'sudo modprobe nvidia'"
    ),
    pynvml.NVML_ERROR_UNINITIALIZED: "the NVIDIA driver was unloaded; it is looked for again",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the NVIDIA driver was updated and its library does not fit it; restart this hive agent, "
        "and the machine if that does not help"
    ),
    pynvml.NVML_ERROR_GPU_IS_LOST: (
        "GPU is lost: it has fallen off the bus; restart the machine, and look at the GPU's power, "
        "cooling and seat if it happens again"
    ),
    pynvml.NVML_ERROR_GPU_NOT_FOUND: (
        "GPU is not found: the driver does not list it any more; restart the machine"
    ),
    pynvml.NVML_ERROR_RESET_REQUIRED: f"GPU needs a reset: {RESET}",
    pynvml.NVML_ERROR_NO_PERMISSION: (
        "the NVIDIA driver refuses this user; give it access to /dev/nvidia*"
    ),
    pynvml.NVML_ERROR_UNKNOWN: (
        "the NVIDIA driver reports an unknown error; 'sudo dmesg | grep -i xid' says more; restart "
        "the machine if it stays"
    ),
}

PCI_LINKS = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "pcie-switch",  # two GPUs on one board
    pynvml.NVML_TOPOLOGY_SINGLE: "pcie-switch",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "pcie-switch",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "host-bridge",
    pynvml.NVML_TOPOLOGY_NODE: "node",
    pynvml.NVML_TOPOLOGY_SYSTEM: "system",
}
"""The nearest common ancestor of two GPUs (``nvmlGpuTopologyLevel_t``), as one of ``LINKS``."""

T = TypeVar("T")
Handle = Any  # pynvml has no types


@dataclass(frozen=True)
class Facts:
    """What does not change of a GPU while its driver is loaded."""

    uuid: str | None
    name: str
    capability: str | None


@dataclass(frozen=True)
class Unit:
    """A compute device, a GPU or a MIG instance, as it is now; sizes in MiB.

    :param key: tells it from others: the UUID where there is one
    :param problem: why it takes no work, although it answers
    """

    key: str
    facts: Facts
    total_mb: int = 0
    free_mb: int = 0
    used_mb: int | None = None
    parent: str | None = None
    utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: int | None = None
    processes: tuple[DeviceProcess, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Board:
    """A GPU; ``units`` is None where it does not answer, for the reason in ``problem``.

    :param lost: it has failed itself, and what ran on it with it; others may only be silent
    :param links: which of ``LINKS`` joins it to each other GPU, by that one's key, where it is told
    """

    key: str
    units: tuple[Unit, ...] | None
    problem: str | None = None
    lost: bool = False
    links: Mapping[str, str] = field(default_factory=dict)


class Nvml:
    """One conversation with the driver. Used by one thread at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.is_open = False
        self.driver: str | None = None
        self.cuda: str | None = None
        self._clock = clock
        self._keys: list[str] = []
        self._facts: dict[int, Facts] = {}
        self._instances: dict[str, Facts] = {}
        self._memory_errors: dict[int, tuple[float, str | None]] = {}
        self._process_names: dict[int, str] = {}
        self._links: dict[tuple[int, int], str | None] = {}

    def open(self) -> None:
        """Load the library and begin.

        :raises pynvml.NVMLError: no library, no driver, or they do not fit
        """
        pynvml.nvmlInit()
        self.is_open = True
        self.driver = readable(_bytes_of(pynvml.nvmlSystemGetDriverVersion), "") or None
        cuda = _maybe(pynvml.nvmlSystemGetCudaDriverVersion_v2)
        self.cuda = None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"
        self._facts.clear()
        self._instances.clear()
        self._memory_errors.clear()
        self._links.clear()

    def close(self) -> None:
        """End it; fine if it has ended, or the driver with it."""
        if self.is_open:
            self.is_open = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def boards(self) -> list[Board]:
        """Every GPU, in NVML's order.

        :raises pynvml.NVMLError: one of ``DRIVER_GONE``, or the GPUs cannot be counted
        """
        asked = [self._board(index) for index in range(pynvml.nvmlDeviceGetCount())]
        facts = [self._facts.get(index) for index in range(len(asked))]
        self._keys = identify([one.uuid if one else None for one in facts], self._keys)
        links = self._links_among([i for i, board in enumerate(asked) if board.units is not None])
        boards = [
            _named(board, key, {self._keys[other]: link for other, link in links[index].items()})
            for index, (board, key) in enumerate(zip(asked, self._keys, strict=True))
        ]
        there = {p.pid for board in boards for unit in board.units or () for p in unit.processes}
        self._process_names = {k: v for k, v in self._process_names.items() if k in there}
        return boards

    def _board(self, index: int) -> Board:
        """A GPU, under a key that is not final yet."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            facts = self._facts.get(index)
            if facts is None:
                facts = self._facts[index] = _facts(handle)
            return Board("", self._units(index, handle, facts))
        except pynvml.NVMLError as error:
            if error.value in DRIVER_GONE:
                raise
            return Board("", None, why(error), lost=error.value in GPU_LOST)

    def _links_among(self, indices: Sequence[int]) -> Mapping[int, Mapping[int, str]]:
        """What joins these GPUs, both ways; asked once, for it does not change under a driver."""
        found: defaultdict[int, dict[int, str]] = defaultdict(dict)
        for pair in combinations(indices, 2):
            if pair not in self._links:
                try:
                    one, other = (pynvml.nvmlDeviceGetHandleByIndex(index) for index in pair)
                    self._links[pair] = _link(one, other)
                except pynvml.NVMLError as error:  # lost since it answered; the next look asks
                    if error.value in DRIVER_GONE:
                        raise
                    continue
            if (link := self._links[pair]) is not None:
                one_way, back = pair
                found[one_way][back] = found[back][one_way] = link
        return found

    def _units(self, index: int, handle: Handle, facts: Facts) -> tuple[Unit, ...]:
        problem = self._memory_problem(index, handle)
        mig = _maybe(pynvml.nvmlDeviceGetMigMode, handle)
        if mig is None or mig[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return (replace(self._whole(handle, facts), problem=problem),)
        temperature = _temperature(handle)
        units = tuple(
            replace(
                self._instance(instance, facts, number),
                temperature_c=temperature,
                problem=problem,
            )
            for number, instance in enumerate(_mig_handles(handle))
        )
        return units or (Unit("", facts, problem=_no_instance(index)),)

    def _whole(self, handle: Handle, facts: Facts) -> Unit:
        total, free, used = _memory(handle)
        power = _maybe(pynvml.nvmlDeviceGetPowerUsage, handle)
        return Unit(
            "",
            facts,
            total,
            free,
            used,
            utilization_percent=_utilization(handle),
            temperature_c=_temperature(handle),
            power_w=None if power is None else round(power / 1000),
            processes=self._processes(handle),
        )

    def _instance(self, handle: Handle, gpu: Facts, number: int) -> Unit:
        """A MIG instance; the driver tells utilisation and power of whole GPUs only."""
        uuid = readable(_bytes_of(pynvml.nvmlDeviceGetUUID, handle), "")
        key = uuid or f"{gpu.uuid}/{number}"
        facts = self._instances.get(key)
        if facts is None:
            name = readable(_bytes_of(pynvml.nvmlDeviceGetName, handle), f"{gpu.name} MIG")
            facts = self._instances[key] = Facts(uuid or None, name, gpu.capability)
        total, free, used = _memory(handle)
        return Unit(
            key, facts, total, free, used, parent=gpu.uuid, processes=self._processes(handle)
        )

    def _memory_problem(self, index: int, handle: Handle) -> str | None:
        """What is wrong with a GPU's memory; looked at every 10 s, for it may take a while."""
        at, problem = self._memory_errors.get(index, (float("-inf"), None))
        if self._clock() - at >= ECC_EVERY_S:
            problem = _memory_problem(handle)
            self._memory_errors[index] = (self._clock(), problem)
        return problem

    def _processes(self, handle: Handle) -> tuple[DeviceProcess, ...]:
        used: dict[int, int | None] = {}
        for process in _running(handle):
            size = process.usedGpuMemory
            known = used.get(process.pid)
            used[process.pid] = known if size is None else max(size // MIB, known or 0)
        most = sorted(used.items(), key=lambda item: (-(item[1] or 0), item[0]))[:MOST_PROCESSES]
        return tuple(
            DeviceProcess(pid=pid, name=self._process_name(pid), used_mb=size) for pid, size in most
        )

    def _process_name(self, pid: int) -> str:
        if pid not in self._process_names:
            path = readable(_bytes_of(pynvml.nvmlSystemGetProcessName, pid), "")
            self._process_names[pid] = Path(path).name or _kernel_name(pid)
        return self._process_names[pid]


def why(error: pynvml.NVMLError) -> str:
    """An error in words, with what to do."""
    return REASONS.get(error.value) or f"the NVIDIA driver says: {error}; 'nvidia-smi' says more"


def _named(board: Board, key: str, links: Mapping[str, str]) -> Board:
    """The board under its final key, and a whole GPU under the same."""
    units = board.units
    if units is not None:
        units = tuple(unit if unit.key else replace(unit, key=key) for unit in units)
    return replace(board, key=key, units=units, links=links)


def _facts(handle: Handle) -> Facts:
    capability = _maybe(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Facts(
        uuid=readable(_bytes_of(pynvml.nvmlDeviceGetUUID, handle), "") or None,
        name=readable(_bytes_of(pynvml.nvmlDeviceGetName, handle), "NVIDIA GPU"),
        capability=None if capability is None else "{}.{}".format(*capability),
    )


def _memory(handle: Handle) -> tuple[int, int, int | None]:
    """Total, free and used MiB. A GPU without memory of its own (GB10) has the machine's."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.total // MIB, memory.free // MIB, memory.used // MIB
    except pynvml.NVMLError_NotSupported:
        machine = psutil.virtual_memory()
        return machine.total // MIB, machine.available // MIB, None


def _memory_problem(handle: Handle) -> str | None:
    remapped = _maybe(pynvml.nvmlDeviceGetRemappedRows, handle)
    if remapped is not None and remapped[3]:
        return "GPU has no spare memory rows left for the broken ones; it has to be replaced"
    uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    errors = _maybe(
        pynvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, pynvml.NVML_VOLATILE_ECC
    )
    if not errors:
        return None
    return f"GPU has {errors} uncorrectable memory errors (ECC); {RESET}"


def _no_instance(index: int) -> str:
    return (
        "MIG is on and the GPU has no MIG instance; make one with "
        f"'sudo nvidia-smi mig -i {index} -cgi PROFILE -C', or turn MIG off with "
        f"'sudo nvidia-smi -i {index} -mig 0'"
    )


def _link(one: Handle, other: Handle) -> str | None:
    """Which of ``LINKS`` joins two GPUs; None where the driver does not tell.

    Through NVLink if they reach each other's memory by it, a switch of it between them or not; so
    vLLM looks at it, too (``is_fully_connected`` in ``vllm/platforms/cuda.py``).
    """
    caps = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
    if _maybe(pynvml.nvmlDeviceGetP2PStatus, one, other, caps) == pynvml.NVML_P2P_STATUS_OK:
        return "nvlink"
    level = _maybe(pynvml.nvmlDeviceGetTopologyCommonAncestor, one, other)
    return None if level is None else PCI_LINKS.get(level)


def _mig_handles(handle: Handle) -> Iterator[Handle]:
    for number in range(_maybe(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        instance = _maybe(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if instance is not None:
            yield instance


def _utilization(handle: Handle) -> int | None:
    rates = _maybe(pynvml.nvmlDeviceGetUtilizationRates, handle)
    return int(rates.gpu) if rates is not None and rates.gpu <= 100 else None


def _temperature(handle: Handle) -> int | None:
    """Degrees Celsius."""
    found = _maybe(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    return int(found) if found is not None and found < 256 else None


def _running(handle: Handle) -> Iterator[Any]:
    """What computes or draws; a process may come more than once. Old drivers lack version 3."""
    for kind in ("Compute", "Graphics", "MPSCompute"):
        found: Sequence[Any] | None = None
        for version in ("v3", "v2"):
            if found is None:
                ask = getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}")
                found = _maybe(ask, handle)
        yield from found or ()


def _kernel_name(pid: int) -> str:
    try:
        return readable(psutil.Process(pid).name(), "?")
    except psutil.Error:  # it has ended, or lives in another container
        return "?"


def _maybe(ask: Callable[..., T], *args: Any) -> T | None:
    """An answer, or None where the GPU has none; that it is lost is raised."""
    try:
        return ask(*args)
    except pynvml.NVMLError as error:
        if error.value in GPU_GONE:
            raise
        return None


def _bytes_of(ask: Callable[..., str], *args: Any) -> bytes | None:
    """A text as NVML has it: pynvml's own decoding fails on what is not UTF-8."""
    raw: Callable[..., bytes] = inspect.unwrap(ask)
    return _maybe(raw, *args)
