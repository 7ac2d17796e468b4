"""The NVIDIA GPUs: numbered once and for all, sampled without waiting for a driver that hangs.

state    means                      becomes
closed   no library or no driver    open: tried every 30 s; after a driver was lost, in 1 s, 2 s,
                                    4 s and so on up to 30 s
open     the driver answers         closed: it is unloaded or reloaded; every 30 s while a GPU is
                                    lost or there is none, to find it
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pynvml

from hive_agent.devices.nvml import Board, Nvml, Unit, why
from hive_agent.devices.processes import belongs
from hive_agent.devices.seats import Seat, Seen, seat
from operations.hosts import Device

log = logging.getLogger(__name__)

RETRY_S = 30.0
FIRST_RETRY_S = 1.0
PATIENCE_S = 1.0
FIRST_PATIENCE_S = 10.0  # the first look loads the library, and wakes GPUs that sleep
STALE_S = 10.0

NO_GPU = "the NVIDIA driver sees no GPU"
NOT_LISTED = "GPU is not found: the driver does not list it any more; restart the machine"


@dataclass(frozen=True)
class Reading:
    """What the last look found.

    :param at: seconds of the monotonic clock
    :param units: as they were when they last answered, by key
    :param problems: of GPUs that do not answer, by key
    :param lost: keys of those among them that have failed themselves
    :param links: which of ``LINKS`` joins a GPU to others, by key of the one and of the other
    :param problem: of the driver, and so of every GPU
    """

    at: float
    seats: tuple[Seat, ...] = ()
    units: Mapping[str, Unit] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    problem: str | None = None
    driver: str | None = None
    cuda: str | None = None
    links: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Nvidia:
    """Samples the NVIDIA GPUs. A look at them runs in a thread of its own, one at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._nvml = Nvml(clock)
        self._reading: Reading | None = None
        self._retry_at = float("-inf")
        self._retry_s = FIRST_RETRY_S
        self._reopen_at: float | None = None
        self._lock = threading.Lock()
        self._looking: threading.Thread | None = None
        self._begun_at = 0.0

    @property
    def absent_because(self) -> str | None:
        """Why no GPU is listed; None where one is."""
        reading = self._reading
        if reading is None:
            return "the NVIDIA driver has not answered yet"
        return None if reading.seats else reading.problem or NO_GPU

    def sample(self, ours: Collection[int]) -> list[Device]:
        """The GPUs as they are now, or as they were if the driver is slow to answer.

        :param ours: processes that are left out, with their groups and descendants
        """
        self._look_within_patience()
        reading = self._reading
        if reading is None:
            return []
        now = time.monotonic()
        foreign = {
            process.pid
            for unit in reading.units.values()
            for process in unit.processes
            if not belongs(process.pid, ours)
        }
        return devices(reading, now, foreign)

    def _look_within_patience(self) -> None:
        with self._lock:
            looking = self._looking
            if looking is None:
                self._begun_at = time.monotonic()
                looking = threading.Thread(target=self._run, name="nvml", daemon=True)
                looking.start()
                self._looking = looking
        patience = FIRST_PATIENCE_S if self._reading is None else PATIENCE_S
        looking.join(max(0.0, self._begun_at + patience - time.monotonic()))

    def _run(self) -> None:
        try:
            reading = self._look()
        except Exception as error:  # a broken library; the next sample looks again
            log.exception("the NVIDIA GPUs could not be looked at")
            reading = self._without_driver(f"the NVIDIA library failed: {error!r}")
        _tell_changes(self._reading, reading)
        with self._lock:
            self._reading, self._looking = reading, None

    def _look(self) -> Reading:
        now = self._clock()
        if self._nvml.is_open and self._reopen_at is not None and now >= self._reopen_at:
            self._nvml.close()
            self._reopen_at, self._retry_at = None, now
        problem = self._reading.problem if self._reading else None
        if not self._nvml.is_open and now < self._retry_at:
            return self._without_driver(problem)
        try:
            if not self._nvml.is_open:
                self._nvml.open()
            boards = self._nvml.boards()
        except pynvml.NVMLError as error:
            self._nvml.close()
            self._retry_at = now + self._next_retry_s()
            return self._without_driver(why(error))
        well = bool(boards) and all(board.units is not None for board in boards)
        self._retry_s = FIRST_RETRY_S
        self._reopen_at = None if well else self._reopen_at or now + RETRY_S
        return self._with_driver(boards)

    def _next_retry_s(self) -> float:
        """Soon where there were GPUs a moment ago; a machine without any is asked rarely."""
        if self._reading is None or not self._reading.seats:
            return RETRY_S
        wait = self._retry_s
        self._retry_s = min(2 * wait, RETRY_S)
        return wait

    def _without_driver(self, problem: str | None) -> Reading:
        before = self._reading or Reading(0.0)
        return Reading(
            time.monotonic(), before.seats, before.units, problem=problem, links=before.links
        )

    def _with_driver(self, boards: Sequence[Board]) -> Reading:
        before = self._reading or Reading(0.0)
        return read(before, boards, time.monotonic(), self._nvml.driver, self._nvml.cuda)


def read(
    before: Reading, boards: Sequence[Board], at: float, driver: str | None, cuda: str | None
) -> Reading:
    """The reading after these boards were seen: who sits where, and what is wrong with whom."""
    seen = [
        Seen(index, board.key, None if board.units is None else tuple(u.key for u in board.units))
        for index, board in enumerate(boards)
    ]
    seats = seat(before.seats, seen)
    units = {key: unit for key, unit in before.units.items() if any(s.unit == key for s in seats)}
    units |= {unit.key: unit for board in boards for unit in board.units or ()}
    problems = {one.gpu: NOT_LISTED for one in seats}
    for board in boards:
        problems.pop(board.key, None)
        if board.problem:
            problems[board.key] = board.problem
    answering = {board.key for board in boards if not board.lost}
    links = {**before.links, **{board.key: board.links for board in boards if board.units}}
    return Reading(
        at,
        seats,
        units,
        problems,
        frozenset(problems.keys() - answering),
        driver=driver,
        cuda=cuda,
        links=links,
    )


def devices(reading: Reading, now: float, foreign: Collection[int]) -> list[Device]:
    """What is told of a reading.

    :param now: seconds of the clock that ``reading.at`` is of
    :param foreign: pids of the processes to tell of
    """
    problem = reading.problem
    if now - reading.at > STALE_S:
        problem = (
            f"the NVIDIA driver has not answered for {now - reading.at:.0f} s; "
            "'sudo dmesg | grep -i xid' says more; restart the machine if it stays"
        )
    return [
        _device(number, one, reading, problem, foreign)
        for number, one in enumerate(reading.seats)
        if one.unit is not None
    ]


def _device(
    number: int, one: Seat, reading: Reading, problem: str | None, foreign: Collection[int]
) -> Device:
    unit = reading.units.get(one.unit or "")
    silent = problem or reading.problems.get(one.gpu)
    if unit is None or silent:
        facts = unit.facts if unit else None
        return Device(
            id=f"cuda:{number}",
            name=facts.name if facts else "unknown",
            device_type="gpu",
            vram_total_mb=unit.total_mb if unit else 0,
            vram_free_mb=0,
            compute_capability=facts.capability if facts else None,
            uuid=facts.uuid if facts else None,
            parent=unit.parent if unit else None,
            driver_version=reading.driver,
            cuda_version=reading.cuda,
            healthy=False,
            problem=silent or NOT_LISTED,
            lost=problem is None and one.gpu in reading.lost,
        )
    return Device(
        id=f"cuda:{number}",
        name=unit.facts.name,
        device_type="gpu",
        vram_total_mb=unit.total_mb,
        vram_free_mb=unit.free_mb,
        vram_used_mb=unit.used_mb,
        compute_capability=unit.facts.capability,
        uuid=unit.facts.uuid,
        parent=unit.parent,
        utilization_percent=unit.utilization_percent,
        temperature_c=unit.temperature_c,
        power_w=unit.power_w,
        driver_version=reading.driver,
        cuda_version=reading.cuda,
        links=_links(one, reading),
        processes=tuple(process for process in unit.processes if process.pid in foreign),
        healthy=unit.problem is None,
        problem=unit.problem,
        lost=unit.problem is not None,
    )


def _links(one: Seat, reading: Reading) -> dict[str, str]:
    """By device id; a MIG instance has none, for it works alone."""
    if one.unit != one.gpu:
        return {}
    numbers = {s.gpu: number for number, s in enumerate(reading.seats) if s.unit == s.gpu}
    told = reading.links.get(one.gpu, {})
    return {f"cuda:{numbers[gpu]}": link for gpu, link in told.items() if gpu in numbers}


def _tell_changes(before: Reading | None, after: Reading) -> None:
    """Log what has become of GPUs since the last look, a line each."""
    was = {d.id: d.problem for d in devices(before, before.at, ())} if before else {}
    for device in devices(after, after.at, ()):
        if device.problem and was.get(device.id) != device.problem:
            log.warning("device %s: %s", device.id, device.problem)
        elif device.healthy and was.get(device.id):
            log.warning("device %s: is well again", device.id)
