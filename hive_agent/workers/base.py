"""What a worker is to those who use it: a state, requests in flight, one owner, one stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import aiohttp

from hive_agent.workers.spec import WorkerSpec
from operations.errors import HiveError
from operations.hosts import WorkerInfo, WorkerState
from wire.door.lines import HttpLine
from wire.inflight import InFlight
from wire.log import outcome

FREE_SPACE = "Free some space, or give the agent a --state-dir on a larger disk, and load it again."


class BaseWorker(ABC):
    """Something that answers for one model, watched by a task that owns it.

    Its two kinds: :class:`hive_agent.workers.worker.Worker`, a process that the hive starts, and
    :class:`hive_agent.workers.external.External`, a server that somebody else started. All methods
    belong to the agent's event loop. Callers read, and only the owner writes.
    """

    line: HttpLine
    """Where requests are relayed to."""
    http: aiohttp.ClientSession
    """Where requests go."""
    base_url: str
    """What comes before the path of a request on :attr:`http`."""

    def __init__(self, spec: WorkerSpec, *, hive_id: str, health_s: float) -> None:
        """:param health_s: seconds between questions for its health"""
        self.spec = spec
        self.state: WorkerState = "starting"
        self.problem: str | None = None
        self.pid: int | None = None
        self.requests = InFlight()
        self.restarts = 0
        self.rss_mb: int | None = None  # MiB, as last sampled
        self.socket: Path | None = None
        self.log_path: Path | None = None
        self.url: str | None = None
        self.created_at = time.time()
        self.ready_at: float | None = None  # monotonic; None while its engine is not up
        self.disturbed = False  # others took or gave back memory of its GPUs as it last loaded
        self.progress: str | None = None  # how far loading has come, as the engine tells it
        self.told: Callable[[str], None] = lambda step: None
        self.changed: Callable[[], None] = lambda: None
        self.gone: Callable[[], None] = lambda: None
        self.came_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.came_up.add_done_callback(_retrieved)
        self._hive_id = hive_id
        self._health_s = health_s
        self._owner: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @abstractmethod
    async def _own(self) -> None:
        """Start it, watch it, and leave nothing behind when cancelled."""

    @abstractmethod
    async def _hang_up(self) -> None:
        """Close the sessions, after the owner has ended."""

    def start(self) -> None:
        self._owner = asyncio.create_task(self._own(), name=self.spec.worker_id)

    async def stop(self, drain_s: float) -> None:
        """No new requests; running ones may finish for ``drain_s`` seconds; then the owner ends.

        Fine before the start has finished, and fine twice: there is one stop, which everybody
        waits for and nobody cancels. ``drain_s`` of 0 cuts short one that drains.
        """
        if drain_s <= 0:
            self._hurry.set()
        if self._stopping is None:
            self._enter("stopping")
            name = f"stop {self.spec.worker_id}"
            self._stopping = asyncio.create_task(self._stop(drain_s), name=name)
        await asyncio.shield(self._stopping)

    async def _stop(self, drain_s: float) -> None:
        waits = [
            asyncio.create_task(self.requests.settled(drain_s)),
            asyncio.create_task(self._hurry.wait()),
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._owner is not None:
            self._owner.cancel()  # once: its end is the end of what it owns
            await asyncio.wait([self._owner])
        await self._hang_up()
        self.gone()

    @property
    def in_flight(self) -> int:
        """Requests that it works on."""
        return self.requests.count

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.spec.worker_id,
            pid=self.pid,
            model=self.spec.model.id,
            digest=self.spec.model.digest,
            engine=self.spec.engine,
            device=self.spec.device,
            devices=self.spec.devices,
            state=self.state,
            slots=self.spec.slots,
            in_flight=self.in_flight,
            restarts=self.restarts,
            started_at=self.created_at,
            rss_mb=self.rss_mb,
            context_length=self.spec.context_length or None,
            tasks=self.spec.tasks,
            adapters=dict(self.spec.adapters),
            problem=self.problem,
            progress=self.progress if self.state in ("starting", "restarting") else None,
            hive_id=self._hive_id,
            url=self.url,
            socket=str(self.socket) if self.socket else None,
            log=str(self.log_path) if self.log_path else None,
        )

    def name_for(self, model: str) -> str | None:
        """What the engine must be told as the ``model`` of a request.

        :param model: what the caller wrote
        :returns: None where the engine takes any name, and the body may stay as it is
        """
        if self.spec.engine not in ("vllm", "external"):
            return None
        adapters = {name.lower(): name for name in self.spec.adapters}
        return adapters.get(model.lower(), self.spec.served_as)

    @abstractmethod
    def doubt(self) -> None:
        """A request got no answer from it, or heard that it is lost: its owner looks at once."""

    def sample(self) -> None:  # noqa: B027  what others started is not ours to measure
        """Measure the process's resident memory."""

    def log_tail(self, lines: int) -> list[str]:
        """The last lines of the engine's log; none where it is not ours."""
        return []

    def _not_up(self, error: HiveError) -> None:
        if not self.came_up.done():
            self.came_up.set_exception(error)

    def _is_up(self) -> None:
        if not self.came_up.done():
            self.came_up.set_result(None)

    def _enter(self, state: WorkerState, problem: str | None = None) -> None:
        if self.state == "stopping":
            return
        self.state, self.problem = state, problem
        if state != "stopping":  # until its end, its engine holds what it held
            self.ready_at = time.monotonic() if state == "ready" else None
        outcome(
            "worker",
            level=logging.WARNING if problem else logging.INFO,
            worker=self.spec.worker_id,
            state=state,
            model=self.spec.model.id,
            device=self.spec.device,
            pid=self.pid,
            why=problem,
        )
        self.changed()


def broke(error: Exception) -> str:
    """Why an owner ended that should not have; in the system's words, where it has some."""
    if not isinstance(error, OSError) or not error.strerror:
        return f"{type(error).__name__} in the agent; see its log"
    about = f": {error.filename}" if error.filename else ""
    advice = FREE_SPACE if full(error) else "Mend that, and load the model again."
    return f"{error.strerror}{about}. {advice}"


def full(error: OSError) -> bool:
    """Whether a disk, or what one user may have of it, is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _retrieved(came_up: asyncio.Future[None]) -> None:
    """Nobody may be waiting; then a failure is in the worker's state and needs no warning."""
    if not came_up.cancelled():
        came_up.exception()
