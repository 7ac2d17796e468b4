"""The calls of an older package, under its names, on the durable queue.

Older code awaits these functions, and other older code calls them plainly. So called where an event
loop runs they return a future of the value, and elsewhere the value itself; a future's call is made
without being waited for, after those that were made on its loop before. Tasks and drones
("workers" here) are dicts.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar, get_args
from weakref import WeakKeyDictionary

from pydantic import ValidationError

from hive_orchestration.embedded import Question, Tasks, background
from operations.errors import InvalidRequest, NotFound, from_validation
from operations.tasks import Drone, DroneStatus, NewDrone, NewTask, Task, status_of

T = TypeVar("T")

PAGE: Final = 500
MOST_PENDING: Final = 1000
DRONE_STATUSES: Final[tuple[DroneStatus, ...]] = get_args(DroneStatus)
_KEPT: Final = ("workflow", "current_phase")
"""What older code says of a task, and Hive keeps as metadata."""


# -- tasks ---------------------------------------------------------------------------------------


def create_task(
    title: str | None = None,
    task_type: str | None = None,
    description: str = "",
    workflow: Any = None,
    payload: Mapping[str, Any] | None = None,
    priority: int = 1,
    tags: Sequence[str] | None = None,
    **more: Any,
) -> Any:
    """Queue a task; its id, a ``str``. Of title and type, one alone is both.

    :param more: ``max_retries``, ``current_phase``, and the fields of
        :class:`operations.tasks.NewTask`
    :raises InvalidRequest: one of these is wrong, and which
    """
    return _said(_create(title, task_type, description, workflow, payload, priority, tags, **more))


def get_task(task_id: str) -> Any:
    """A task as a ``dict``, or None."""
    return _said(_get(task_id))


def update_task_status(task_id: str, status: str, metadata: Mapping[str, Any] | None = None) -> Any:
    """Set the status of a task that nobody holds through a claim; False where there is none.

    :param metadata: added to the task's
    :raises Conflict: somebody does, or what it is cannot become this
    :raises InvalidRequest: there is no such status
    """
    return _said(_update(task_id, status, metadata))


def get_tasks_by_status(status: str) -> Any:
    """All tasks with this status, a ``list`` of dicts, the newest first."""
    return _said(_by_status(status))


def get_queued_tasks(limit: int = 10, task_type: str | None = None) -> Any:
    """What is queued, a ``list`` of dicts, the next first."""
    return _said(_queued(limit, task_type))


def delete_task(task_id: str) -> Any:
    """False where there is none. :raises Conflict: somebody works on it"""
    return _said(lambda tasks: tasks.remove(task_id))


# -- workers -------------------------------------------------------------------------------------


def register_worker(
    worker_id: str | None = None,
    role: str | None = None,
    capabilities: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    worker_type: str | None = None,
) -> Any:
    """Known from now on, or described anew; its id, a ``str``.

    :param worker_id: one is made if there is none
    :param worker_type: another name of ``role``
    :raises InvalidRequest: one of these is wrong, and which
    """
    return _said(_register(worker_id, role or worker_type, capabilities, metadata))


def update_worker_heartbeat(worker_id: str, status: str | None = None) -> Any:
    """False where it is not registered.

    :param status: ``active``, ``idle``, ``offline`` or ``error``
    """
    return _said(_heard(worker_id, status))


def get_active_workers(role: str | None = None) -> Any:
    """A ``list`` of dicts: those that are active, and were heard of within ten minutes."""
    return _said(_active(role))


def get_worker(worker_id: str) -> Any:
    """A worker as a ``dict``, or None."""
    return _said(_worker(worker_id))


def unregister_worker(worker_id: str) -> Any:
    """False where it was not registered."""
    return _said(lambda tasks: tasks.unregister(worker_id))


# -- the client ----------------------------------------------------------------------------------


def get_client() -> OrchestrationClient:
    return OrchestrationClient()


class OrchestrationClient:
    """The same, finished when a call returns, wherever it is made."""

    def create_task(
        self, title: str | None = None, task_type: str | None = None, **more: Any
    ) -> str:
        """As :func:`create_task`."""
        return _finished(_create(title, task_type, **more))

    def get_task(self, task_id: str) -> dict[str, Any] | None:
        return _finished(_get(task_id))

    def update_task_status(
        self, task_id: str, status: str, metadata: Mapping[str, Any] | None = None
    ) -> bool:
        """As :func:`update_task_status`."""
        return _finished(_update(task_id, status, metadata))

    def get_pending_tasks(self, task_type: str | None = None) -> list[dict[str, Any]]:
        """What is queued, the next first."""
        return _finished(_queued(MOST_PENDING, task_type))

    def get_tasks_by_status(self, status: str) -> list[dict[str, Any]]:
        return _finished(_by_status(status))

    def delete_task(self, task_id: str) -> bool:
        return _finished(lambda tasks: tasks.remove(task_id))

    def register_worker(
        self,
        worker_id: str | None = None,
        role: str | None = None,
        capabilities: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """As :func:`register_worker`."""
        return _finished(_register(worker_id, role, capabilities, metadata))

    def heartbeat(self, worker_id: str, status: str | None = None) -> bool:
        """As :func:`update_worker_heartbeat`."""
        return _finished(_heard(worker_id, status))

    def get_available_workers(self, role: str | None = None) -> list[dict[str, Any]]:
        """As :func:`get_active_workers`."""
        return _finished(_active(role))


# -- what is asked -------------------------------------------------------------------------------


def _create(
    title: str | None = None,
    task_type: str | None = None,
    description: str = "",
    workflow: Any = None,
    payload: Mapping[str, Any] | None = None,
    priority: int = 1,
    tags: Sequence[str] | None = None,
    *,
    max_retries: int | None = None,
    current_phase: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    **more: Any,
) -> Question[str]:
    kept = {"workflow": workflow, "current_phase": current_phase}
    fields: dict[str, Any] = {
        **more,
        "type": title if task_type is None else task_type,
        "title": task_type if title is None else title,
        "description": description,
        "payload": payload or {},
        "metadata": {
            **(metadata or {}),
            **{name: value for name, value in kept.items() if value is not None},
        },
        "priority": priority,
        "tags": tuple(tags or ()),
    }
    if max_retries is not None:
        fields["retry"] = {**more.get("retry", {}), "attempts": max_retries + 1}
    try:
        new = NewTask.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, "create_task") from None

    async def create(tasks: Tasks) -> str:
        return (await tasks.enqueue(new)).id

    return create


def _get(task_id: str) -> Question[dict[str, Any] | None]:
    async def get(tasks: Tasks) -> dict[str, Any] | None:
        with contextlib.suppress(NotFound):
            return _task(await tasks.get(task_id))
        return None

    return get


def _update(task_id: str, status: str, metadata: Mapping[str, Any] | None) -> Question[bool]:
    wanted = status_of(status)

    async def update(tasks: Tasks) -> bool:
        with contextlib.suppress(NotFound):
            await tasks.move(task_id, wanted, metadata)
            return True
        return False

    return update


def _by_status(status: str) -> Question[list[dict[str, Any]]]:
    wanted = status_of(status)

    async def by_status(tasks: Tasks) -> list[dict[str, Any]]:
        page = await tasks.page(statuses=(wanted,), limit=PAGE)
        found = [*page.tasks]
        while page.next is not None:
            page = await tasks.page(statuses=(wanted,), limit=PAGE, cursor=page.next)
            found += page.tasks
        return [_task(task) for task in found]

    return by_status


def _queued(limit: int, task_type: str | None) -> Question[list[dict[str, Any]]]:
    async def queued(tasks: Tasks) -> list[dict[str, Any]]:
        return [_task(task) for task in await tasks.waiting(type=task_type, limit=limit)]

    return queued


def _register(
    worker_id: str | None,
    role: str | None,
    capabilities: Sequence[str] | None,
    metadata: Mapping[str, Any] | None,
) -> Question[str]:
    fields = {
        "id": f"worker-{uuid.uuid4()}" if worker_id is None else worker_id,
        "role": role or "",
        "capabilities": tuple(capabilities or ()),
        "metadata": metadata or {},
    }
    try:
        new = NewDrone.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, "register_worker") from None

    async def register(tasks: Tasks) -> str:
        return (await tasks.register(new)).id

    return register


def _heard(worker_id: str, status: str | None) -> Question[bool]:
    known = next((one for one in DRONE_STATUSES if one == status), None)
    if status is not None and known is None:
        raise InvalidRequest(
            f"A worker cannot be '{status[:64]}'. It is one of {', '.join(DRONE_STATUSES)}.",
            code="unknown_status",
            param="status",
        )

    async def heard(tasks: Tasks) -> bool:
        with contextlib.suppress(NotFound):
            await tasks.heard(worker_id, known)
            return True
        return False

    return heard


def _active(role: str | None) -> Question[list[dict[str, Any]]]:
    async def active(tasks: Tasks) -> list[dict[str, Any]]:
        return [_drone(drone) for drone in await tasks.drones(role, active=True)]

    return active


def _worker(worker_id: str) -> Question[dict[str, Any] | None]:
    async def worker(tasks: Tasks) -> dict[str, Any] | None:
        with contextlib.suppress(NotFound):
            return _drone(await tasks.drone(worker_id))
        return None

    return worker


# -- how it is answered --------------------------------------------------------------------------


def _finished(question: Question[T]) -> T:
    return background.ask(question).result()


def _said(question: Question[T]) -> Any:
    """The value; where an event loop runs, a future of it."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return _finished(question)
    asked = background.ask(_after(_last.get(loop), question))
    _last[loop] = asked
    return _future(asked, loop)


_last: WeakKeyDictionary[asyncio.AbstractEventLoop, concurrent.futures.Future[Any]]
_last = WeakKeyDictionary()
"""What was asked last on a loop. Who awaits nothing relies on the order of his calls."""


def _after(before: concurrent.futures.Future[Any] | None, question: Question[T]) -> Question[T]:
    async def in_turn(tasks: Tasks) -> T:
        if before is not None:
            await asyncio.wait([asyncio.wrap_future(before)])
        return await question(tasks)

    return in_turn


def _future(
    asked: concurrent.futures.Future[T], loop: asyncio.AbstractEventLoop
) -> asyncio.Future[T]:
    """On a loop that may be closed before there is an answer, for nobody need wait for one."""
    future: asyncio.Future[T] = loop.create_future()

    def tell() -> None:
        if future.done():
            return
        if asked.cancelled():
            future.cancel()
        elif (error := asked.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(asked.result())

    def answered(_: concurrent.futures.Future[T]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell)

    asked.add_done_callback(answered)
    return future


def _task(task: Task) -> dict[str, Any]:
    """With the names that older code reads."""
    found = task.model_dump(mode="json")
    metadata = found["metadata"]
    return {
        **found,
        **{name: metadata.get(name) for name in _KEPT},
        "task_type": task.type,
        "assigned_worker": task.drone_id or metadata.get("assigned_worker"),
        "max_retries": task.max_attempts - 1,
    }


def _drone(drone: Drone) -> dict[str, Any]:
    found = drone.model_dump(mode="json")
    return {
        **found,
        "worker_id": drone.id,
        "worker_type": drone.role,
        "last_heartbeat": drone.heartbeat_at,
    }
