"""All workers of this machine: spawn, look up, stop, and lend them to requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp

from hive_agent.workers.base import BaseWorker
from hive_agent.workers.external import External
from hive_agent.workers.records import Records
from hive_agent.workers.spec import WorkerSpec
from hive_agent.workers.turns import Turns
from hive_agent.workers.worker import Worker
from operations.errors import NotFound, Unavailable
from operations.hosts import Device, Task, WorkerInfo
from operations.names import resolve
from wire.http1.client import NoAnswer, Unreachable
from wire.log import outcome

log = logging.getLogger(__name__)

KEPT_LOGS = 50
COMPUTING: Final = ("llamacpp", "vllm")
"""The engines whose threads compute."""

UNANSWERED: Final = (aiohttp.ClientError, NoAnswer, Unreachable)
KEPT_NAMES = 1024  # that callers have for models
WAIT_FOR_WORKER_S = 120.0  # a request waits this long for a worker that is loading
EXTERNAL_BACK_S = 10.0  # when to ask again for a server that somebody else must start


@dataclass(frozen=True)
class Wanted:
    """Which worker a request may have: model and task; device or id where it names them.

    :param avoid: ids of workers that have just failed it; taken only if there is no other
    """

    digest: str
    task: Task = "generate"
    device: str | None = None
    worker_id: str | None = None
    avoid: frozenset[str] = frozenset()

    def fits(self, worker: WorkerInfo) -> bool:
        return (
            worker.has(self.digest)
            and self.task in worker.tasks
            and (self.device is None or self.device in (worker.device, *worker.devices))
            and self.worker_id in (None, worker.worker_id)
        )


def _as_told(worker: WorkerInfo) -> int:
    return worker.in_flight


def _load(worker: BaseWorker) -> tuple[float, str]:
    return (worker.in_flight / worker.spec.slots, worker.spec.worker_id)


def choose(
    workers: Sequence[WorkerInfo],
    wanted: Wanted,
    in_flight: Callable[[WorkerInfo], int] = _as_told,
) -> str | None:
    """The worker for a request: of those that are ready, the one with the least load a slot.

    :param in_flight: what runs on a worker now
    :returns: its id; None while those that fit are still loading
    :raises Unavailable: none fits, or none of those will come up
    """
    fitting = [worker for worker in workers if wanted.fits(worker)]
    ready = [worker for worker in fitting if worker.state == "ready"]
    if ready:

        def load(worker: WorkerInfo) -> tuple[bool, float, str]:
            failed = worker.worker_id in wanted.avoid
            return (failed, in_flight(worker) / worker.slots, worker.worker_id)

        return min(ready, key=load).worker_id
    coming = [worker for worker in fitting if worker.state in ("starting", "restarting")]
    if any(worker.engine != "external" or worker.state == "starting" for worker in coming):
        return None
    if coming:  # nobody here starts it again, so waiting for it may be in vain
        raise Unavailable(
            f"Worker {coming[0].worker_id} is a server that somebody else runs, and takes no "
            f"requests now. {coming[0].problem} It is taken again as soon as it answers.",
            code="engine_unreachable",
            retry_after=EXTERNAL_BACK_S,
        )
    if failed := [worker for worker in fitting if worker.state == "failed"]:
        raise Unavailable(
            f"Worker {failed[0].worker_id} has failed: {failed[0].problem}. "
            f"Remove it with 'hive workers rm {failed[0].worker_id}' and spawn another.",
            code="worker_failed",
            retryable=False,
        )
    raise Unavailable(
        "No running worker of this model fits what was asked (device, worker_id, or embeddings or "
        "reranking, which need workers of their own: 'hive workers spawn MODEL --embeddings'). "
        "'hive workers ls' shows what runs.",
        code="no_worker",
        param="model",
    )


class WorkerPool:
    """The workers, by id, in the order of their birth."""

    def __init__(
        self, *, hive_id: str, state: Path, runtime: Path, cores: int, health_s: float
    ) -> None:
        self.hive_id = hive_id
        self.cores = cores
        self._health_s = health_s
        self.changed: Callable[[], None] = lambda: None
        self.load_changed: Callable[[], None] = lambda: None
        self.records = Records(state / "workers")
        self._logs = state / "logs"
        self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._runtime = runtime
        self._workers: dict[str, BaseWorker] = {}
        self._turns = Turns()
        self._news: asyncio.Event | None = None
        self._infos: list[WorkerInfo] | None = None
        self._digests: dict[str, str] = {}
        self._ready: dict[tuple[str, Task], list[BaseWorker]] = {}
        self.changes = 0
        """Counts what may change which worker answers for what."""
        self.lending = True

    def pids(self) -> frozenset[int]:
        """The processes of the workers."""
        return frozenset(w.pid for w in self._workers.values() if w.pid is not None)

    def seen(self, devices: Sequence[Device]) -> None:
        """The devices as they are now; a worker whose device is lost fails.

        One whose device's driver is silent goes on: it computes, or its own failure says more.
        """
        problems = {device.id: device.problem for device in devices if device.lost}
        for worker in self._workers.values():
            if not isinstance(worker, Worker):  # an external one has no device of ours
                continue
            for device in worker.spec.devices:
                if (problem := problems.get(device)) is not None:
                    worker.give_up(f"its device {device} is lost: {problem}")
                    break

    def workers(self) -> list[BaseWorker]:
        return list(self._workers.values())

    def all(self) -> list[WorkerInfo]:
        return [worker.info() for worker in self._workers.values()]

    def answers_for(self) -> list[tuple[str, str]]:
        """Names, and digests, of what the workers answer for."""
        return [pair for worker in self._as_they_were() for pair in worker.answers_for]

    def digest_of(self, name: str) -> str:
        """The digest of what a worker answers for under this name; raises what
        :func:`operations.names.resolve` does."""
        infos = self._as_they_were()  # forgets the digests when they are not the same any more
        if (digest := self._digests.get(name)) is None:
            digest = resolve(name, [pair for worker in infos for pair in worker.answers_for])
            if len(self._digests) < KEPT_NAMES:
                self._digests[name] = digest
        return digest

    def _as_they_were(self) -> list[WorkerInfo]:
        """The workers when one last changed its state; requests have come and gone since."""
        if self._infos is None:
            self._infos = self.all()
            self._digests.clear()
            self._ready.clear()
        return self._infos

    def sample(self) -> None:
        """Measure every worker's memory."""
        for worker in self._workers.values():
            worker.sample()

    def get(self, *, worker_id: str | None = None, pid: int | None = None) -> BaseWorker:
        """:raises NotFound: no worker of ours has that id, or that process id"""
        for worker in self._workers.values():
            if worker.spec.worker_id == worker_id or (pid is not None and worker.pid == pid):
                return worker
        named = f"'{worker_id}'" if worker_id is not None else f"with process id {pid}"
        raise NotFound(
            f"There is no worker {named} on {self.hive_id}. 'hive workers ls' shows them.",
            code="worker_not_found",
            param="worker_id" if worker_id is not None else "pid",
        )

    def new_id(self) -> str:
        while (worker_id := f"w-{secrets.token_hex(3)}") in self._workers:
            pass
        return worker_id

    @property
    def threads_in_use(self) -> int:
        """CPU threads of the engines that run or load."""
        return sum(
            worker.spec.threads
            for worker in self._workers.values()
            if worker.spec.engine in COMPUTING and worker.state != "failed"
        )

    def holding(self, digest: str) -> list[BaseWorker]:
        """The workers that have a model loaded, or are loading it."""
        return [w for w in self._workers.values() if w.spec.model.digest == digest]

    def spawn(self, spec: WorkerSpec) -> BaseWorker:
        """Start a worker, or attach an external one.

        ``await worker.came_up`` tells when it is ready, or why not.

        :raises Unavailable: the agent is stopping
        """
        if not self.lending:
            raise Unavailable("This hive is stopping and starts no workers. Try another hive.")
        worker = self._made(spec)
        worker.changed = self._changed
        worker.gone = lambda: self._gone(spec.worker_id)
        self._workers[spec.worker_id] = worker
        worker.start()
        self._changed()
        return worker

    def _made(self, spec: WorkerSpec) -> BaseWorker:
        if spec.engine == "external":
            return External(spec, hive_id=self.hive_id, health_s=self._health_s)
        return Worker(
            spec,
            folder=self._runtime,
            logs=self._logs,
            records=self.records,
            turns=self._turns,
            hive_id=self.hive_id,
            health_s=self._health_s,
        )

    async def came_up(self, worker: BaseWorker) -> None:
        """Wait until a worker is ready; one that does not come up, or that nobody waits for any
        more, is stopped.

        :raises HiveError: why it did not come up
        """
        try:
            await asyncio.shield(worker.came_up)
        except BaseException:
            await self.stop(worker, 0)
            raise

    async def stop(self, worker: BaseWorker, drain_s: float) -> None:
        """Stop a worker; it is forgotten when it has stopped, whoever still waits for that."""
        await worker.stop(drain_s)

    def _gone(self, worker_id: str) -> None:
        del self._workers[worker_id]
        self._changed()
        outcome("worker", worker=worker_id, state="stopped")
        self._prune_logs()

    def _prune_logs(self) -> None:
        """Keep the newest logs of workers that are no more, where they can be removed."""
        alive = {worker.log_path for worker in self._workers.values()}
        try:
            logs = sorted(self._logs.glob("*.log*"), key=lambda path: path.lstat().st_mtime)
            for path in [path for path in logs if path not in alive][:-KEPT_LOGS]:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning(
                "old logs of workers are not removed (%s: %s); look at that folder",
                error.filename,
                error.strerror,
            )

    async def drain(self, deadline_s: float) -> None:
        """Lend no more workers; wait until none is lent, or for ``deadline_s`` seconds."""
        self.lending = False
        self._changed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while any(worker.requests.count for worker in self._workers.values()):
                    await self._something_new()

    async def close(self, drain_s: float) -> None:
        """Stop all workers at once. Fine to call twice."""
        self.lending = False
        await asyncio.gather(*(self.stop(w, drain_s) for w in list(self._workers.values())))
        self._prune_logs()

    @contextlib.asynccontextmanager
    async def lease(self, wanted: Wanted) -> AsyncIterator[BaseWorker]:
        """:meth:`taken` for the life of a block."""
        worker = await self.taken(wanted)
        failure: Exception | None = None
        try:
            yield worker
        except Exception as error:
            failure = error
            raise
        finally:
            self.give_back(worker, failure)

    def take(self, wanted: Wanted) -> BaseWorker | None:
        """A worker for one request, to be given back; None while those that fit are loading.

        :raises Unavailable: nothing fits
        """
        chosen = self._free(wanted)
        if chosen is None:
            return None
        worker = self._workers[chosen]
        worker.requests.begin()
        self.load_changed()
        return worker

    def take_ready(self, model: str, task: Task) -> BaseWorker | None:
        """:meth:`take` for most requests; None where it takes that one to find a worker, or to say
        why there is none.

        :param model: as the caller has it; raises what :meth:`digest_of` does
        """
        self._as_they_were()  # forgets who was ready when they are not the same any more
        if (ready := self._ready.get((model, task))) is None:
            ready = self._all_ready(Wanted(self.digest_of(model), task))
            if len(self._ready) < KEPT_NAMES:
                self._ready[model, task] = ready
        if not (ready and self.lending):
            return None
        worker = ready[0] if len(ready) == 1 else min(ready, key=_load)
        worker.requests.begin()
        self.load_changed()
        return worker

    def _all_ready(self, wanted: Wanted) -> list[BaseWorker]:
        infos = self._as_they_were()
        return [self._workers[w.worker_id] for w in infos if w.state == "ready" and wanted.fits(w)]

    async def taken(self, wanted: Wanted) -> BaseWorker:
        """The same; waits for one that is loading. :raises Unavailable: nothing came up in time"""
        try:
            async with asyncio.timeout(WAIT_FOR_WORKER_S):
                while (worker := self.take(wanted)) is None:
                    await self._something_new()
                return worker
        except TimeoutError:
            raise Unavailable(
                f"The worker of this model is still loading after {WAIT_FOR_WORKER_S:.0f} s. "
                "Retry later; 'hive workers ls' shows its state.",
                code="worker_loading",
                retry_after=10,
            ) from None

    def give_back(self, worker: BaseWorker, failure: Exception | None) -> None:
        """A request is over. :param failure: what it failed with, if it did"""
        worker.requests.end()
        if failure is not None and isinstance(failure, UNANSWERED):
            worker.doubt()
        self._tell()
        self.load_changed()

    def _free(self, wanted: Wanted) -> str | None:
        """A worker for a request; None while those that fit are loading.

        :raises Unavailable: nothing fits
        """
        if not self.lending:
            raise Unavailable("This hive is stopping. Retry on another.")
        return choose(self._as_they_were(), wanted, self._in_flight)

    def _in_flight(self, worker: WorkerInfo) -> int:
        return self._workers[worker.worker_id].in_flight

    async def _something_new(self) -> None:
        if self._news is None:
            self._news = asyncio.Event()
        await self._news.wait()

    def _changed(self) -> None:
        """A worker came, went, or has another state."""
        self._infos = None
        self.changes += 1
        self._tell()
        self.changed()

    def _tell(self) -> None:
        """Wake who waits for something new."""
        if self._news is not None:
            self._news.set()
            self._news = None
