"""The queue for code that has no event loop: one in the background, and a queue on it.

Opened by the first call, and open until the process ends: the file in this user's state folder,
which is a queen's as well, or, where ``HIVE_QUEEN_URL`` is set, that queen.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

import platformdirs

from operations.errors import InvalidRequest, Unavailable
from operations.tasks import (
    QUEUE_FILE,
    QUEUE_KEY_FILE,
    Drone,
    DroneStatus,
    NewDrone,
    NewTask,
    Task,
    TaskPage,
    TaskStatus,
)

if TYPE_CHECKING:
    from hive_orchestration.queue import Queue
    from wire.secret import Secret

T = TypeVar("T")

TENANT: Final = "default"
CLOSE_S: Final = 5.0  # what is asked gets so long to end


class Tasks(Protocol):
    """What the queue in a file and :class:`job_client.tasks.TaskClient` have in common."""

    async def enqueue(self, new: NewTask) -> Task: ...

    async def get(self, id: str) -> Task: ...

    async def page(
        self,
        *,
        statuses: Sequence[TaskStatus] = (),
        limit: int = 100,
        cursor: str | None = None,
    ) -> TaskPage: ...

    async def waiting(self, *, type: str | None = None, limit: int = 10) -> list[Task]: ...

    async def move(
        self, id: str, status: TaskStatus, metadata: Mapping[str, Any] | None = None
    ) -> Task: ...

    async def remove(self, id: str) -> bool: ...

    async def register(self, new: NewDrone) -> Drone: ...

    async def heard(self, id: str, status: DroneStatus | None = None) -> Drone: ...

    async def drone(self, id: str) -> Drone: ...

    async def drones(self, role: str | None = None, *, active: bool = False) -> list[Drone]: ...

    async def unregister(self, id: str) -> bool: ...

    async def close(self) -> None: ...


Question = Callable[[Tasks], Awaitable[T]]


@dataclass(frozen=True)
class Where:
    """Which queue, by the environment."""

    queen_url: str | None
    api_key: str | None
    state_dir: Path
    secret: str | None
    secret_file: Path | None

    @classmethod
    def by_environment(cls) -> Self:
        def said(name: str) -> str | None:
            return os.environ.get(name) or None

        state_dir, secret_file = said("HIVE_STATE_DIR"), said("HIVE_SECRET_FILE")
        return cls(
            queen_url=said("HIVE_QUEEN_URL"),
            api_key=said("HIVE_API_KEY"),
            state_dir=Path(state_dir) if state_dir else platformdirs.user_state_path("hive"),
            secret=said("HIVE_SECRET"),
            secret_file=Path(secret_file) if secret_file else None,
        )

    def cluster_secret(self) -> Secret | None:
        """:raises InvalidRequest: there is one, and it cannot be used"""
        from wire import secret

        try:
            return secret.find(self.secret, self.secret_file or self.state_dir / secret.FILE)
        except secret.BadSecret as error:
            raise InvalidRequest(f"The cluster secret cannot be used: {error}.") from None


class Embedded:
    """A queue in this process, as :class:`Tasks`: it queues for one tenant, and sees all."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    async def enqueue(self, new: NewTask) -> Task:
        [queued] = await self._queue.enqueue(TENANT, [new])
        return queued.task

    async def get(self, id: str) -> Task:
        return await self._queue.get(None, id)

    async def page(
        self,
        *,
        statuses: Sequence[TaskStatus] = (),
        limit: int = 100,
        cursor: str | None = None,
    ) -> TaskPage:
        return await self._queue.page(None, statuses=statuses, limit=limit, cursor=cursor)

    async def waiting(self, *, type: str | None = None, limit: int = 10) -> list[Task]:
        return await self._queue.waiting(None, type=type, limit=limit)

    async def move(
        self, id: str, status: TaskStatus, metadata: Mapping[str, Any] | None = None
    ) -> Task:
        return await self._queue.move(None, id, status, dict(metadata or {}))

    async def remove(self, id: str) -> bool:
        return await self._queue.remove(None, id)

    async def register(self, new: NewDrone) -> Drone:
        return await self._queue.register(TENANT, new)

    async def heard(self, id: str, status: DroneStatus | None = None) -> Drone:
        return await self._queue.heard(None, id, status)

    async def drone(self, id: str) -> Drone:
        return await self._queue.drone(None, id)

    async def drones(self, role: str | None = None, *, active: bool = False) -> list[Drone]:
        return await self._queue.drones(None, role, active=active)

    async def unregister(self, id: str) -> bool:
        return await self._queue.unregister(None, id)

    async def close(self) -> None:
        await self._queue.close()


async def open_tasks(where: Where) -> Tasks:
    """The queue that is meant.

    :raises HiveError: its file cannot be used, or the cluster secret cannot
    """
    return _of_queen(where, where.queen_url) if where.queen_url else await _in_file(where)


async def _in_file(where: Where) -> Tasks:
    from hive_orchestration.queue import Queue
    from hive_orchestration.seal import sealer_for
    from hive_orchestration.sqlite import SqliteStore

    if not threading.main_thread().is_alive():  # no executor takes work any more
        raise Unavailable(
            "The program's main thread has ended, and its queue with it. Let it wait for the "
            "other threads: thread.join().",
            code="queue_unavailable",
        )
    try:
        where.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        key_file = where.state_dir / QUEUE_KEY_FILE
        sealer = sealer_for(where.cluster_secret(), key_file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(
            f"The queue's folder {where.state_dir} cannot be used: {why}. Mend that, "
            "or name another in HIVE_STATE_DIR."
        ) from None
    queue = Queue(await SqliteStore.open(where.state_dir / QUEUE_FILE), sealer)
    queue.start()
    return Embedded(queue)


def _of_queen(where: Where, url: str) -> Tasks:
    from job_client.client import JobClient
    from job_client.tasks import TaskClient
    from wire.peer import Peer

    secret = None if where.api_key else where.cluster_secret()
    if secret is None:
        return TaskClient(url, api_key=where.api_key)
    peer = Peer(url, secret, role="keeper", id="keeper", roles=("queen",), lenient=True)
    return TaskClient(JobClient(url, peer=peer), owned=True)


class _Room:
    """What is open. Lives on the background's loop."""

    def __init__(self) -> None:
        self._opening = asyncio.Lock()
        self._where: Where | None = None
        self._tasks: Tasks | None = None
        self._asked: set[asyncio.Task[Any]] = set()

    async def ask(self, where: Where, question: Question[T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._asked.add(task)
        try:
            return await question(await self._at(where))
        finally:
            self._asked.discard(task)

    async def _at(self, where: Where) -> Tasks:
        async with self._opening:
            if self._tasks is None or self._where != where:
                await self._leave()
                self._tasks, self._where = await open_tasks(where), where
            return self._tasks

    async def _leave(self) -> None:
        tasks, self._tasks = self._tasks, None
        if tasks is not None:
            await tasks.close()

    async def close(self) -> None:
        """What is asked is answered first, if that does not take long."""
        if self._asked:
            _, late = await asyncio.wait(self._asked, timeout=CLOSE_S)
            for task in late:
                task.cancel()
        async with self._opening:
            await self._leave()


class Background:
    """A thread with an event loop, begun by the first question. Any thread may ask.

    It ends before a fork: SQLite's locks do not survive one. Parent and child begin anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._room: _Room | None = None

    def ask(self, question: Question[T]) -> concurrent.futures.Future[T]:
        """Ask the queue that the environment names now."""
        where = Where.by_environment()
        with self._lock:
            if self._loop is None or self._room is None:
                self._begin()
            assert self._loop is not None
            assert self._room is not None
            return asyncio.run_coroutine_threadsafe(self._room.ask(where, question), self._loop)

    def close(self) -> None:
        """Fine to call twice; the next question opens it again."""
        with self._lock:
            self._end()

    def before_fork(self) -> None:
        self._lock.acquire()
        self._end()

    def after_fork(self) -> None:
        self._lock.release()

    def _begin(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._room = _Room()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="hive-queue", daemon=True
        )
        self._thread.start()

    def _end(self) -> None:
        loop, thread, room = self._loop, self._thread, self._room
        self._loop = self._thread = self._room = None
        if loop is None or thread is None or room is None:
            return
        closing = asyncio.run_coroutine_threadsafe(room.close(), loop)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            closing.result(2 * CLOSE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_S)
        if not thread.is_alive():
            loop.close()


background: Final = Background()
"""This process's."""

# What is registered last is called first. So concurrent.futures.thread is imported above: its
# threads are given no work during a fork, nor once the main thread has ended, which is before
# atexit's functions are called.
getattr(threading, "_register_atexit", atexit.register)(background.close)
os.register_at_fork(
    before=background.before_fork,
    after_in_parent=background.after_fork,
    after_in_child=background.after_fork,
)
