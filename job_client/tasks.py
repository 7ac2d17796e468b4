"""The client of the durable queue: queue tasks, work through them, watch them.

Every call is one that the queue takes twice: tasks and claims get keys, and the rest says the same
again. So what a lost connection has left open, and what the queen cannot do now (503), is asked
again until ``patience_s`` have passed.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlencode

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import from_json

from job_client.client import BROKEN, FIRST_PAUSE_S, LAST_PAUSE_S, JobClient
from operations.errors import (
    BY_STATUS,
    HiveError,
    Unavailable,
    WorkerBroke,
    from_envelope,
    from_validation,
)
from operations.tasks import (
    Beat,
    Claim,
    ClaimRequest,
    Drone,
    DroneStatus,
    EventPage,
    Kept,
    NewDrone,
    NewTask,
    QueueEvent,
    RoleInfo,
    Task,
    TaskPage,
    TaskStatus,
)
from wire import sse

PATIENCE_S: Final = 15.0
ANSWER_S: Final = 30.0

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Enqueued(NamedTuple):
    """:param created: False where it was there already, by its idempotency or unique key"""

    id: str
    created: bool


class TaskClient:
    """Speaks to one queen.

    All calls raise :class:`HiveError` as the queen said it, :class:`Unavailable` where she cannot
    be reached or her database is away for longer than ``patience_s``.

    :param queen: her URL, or a client of hers
    :param api_key: with a URL: sent as a bearer token
    :param owned: close the client with this one, too
    :param patience_s: how long a call is repeated; 0: it is made once
    """

    def __init__(
        self,
        queen: str | JobClient,
        *,
        api_key: str | None = None,
        owned: bool = False,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._owns_client = owned or isinstance(queen, str)
        self._client = JobClient(queen, api_key=api_key) if isinstance(queen, str) else queen
        self._patience_s = patience_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fine to call twice."""
        if self._owns_client:
            await self._client.close()

    # -- tasks -------------------------------------------------------------------------------

    async def enqueue(self, new: NewTask) -> Task:
        """Queue a task. :raises Conflict: its idempotency key came with another body before"""
        return _told(Task, await self._post("/v1/tasks", _keyed(new)))

    async def enqueue_all(self, new: Sequence[NewTask]) -> list[Enqueued]:
        """Queue 1 to 100 tasks, all of them or none."""
        keyed = [_keyed(one) for one in new]
        tries = 0

        async def send() -> Any:
            nonlocal tries
            tries += 1
            body = {"tasks": [_plain(one) for one in keyed]}
            return await self._client.post("/v1/tasks", body, timeout_s=ANSWER_S)

        said = _among("tasks", await self._repeated(send))
        # What was there at a second try is what the first has made, where the key is our own.
        made_here = [tries > 1 and one.idempotency_key is None for one in new]
        return [
            Enqueued(str(one["id"]), bool(one["created"]) or here)
            for one, here in zip(said, made_here, strict=True)
        ]

    async def get(self, id: str) -> Task:
        """:raises NotFound: there is none, or it is another tenant's"""
        return _told(Task, await self._get(_task(id)))

    async def page(
        self,
        *,
        statuses: Sequence[TaskStatus] = (),
        type: str | None = None,
        role: str | None = None,
        parent: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> TaskPage:
        """Tasks that fit, the newest first."""
        query = {
            "status": ",".join(statuses) or None,
            "type": type,
            "role": role,
            "parent": parent,
            "limit": limit,
            "cursor": cursor,
        }
        return _told(TaskPage, await self._get("/v1/tasks", query))

    async def each(
        self,
        *,
        statuses: Sequence[TaskStatus] = (),
        type: str | None = None,
        role: str | None = None,
        parent: str | None = None,
    ) -> AsyncGenerator[Task, None]:
        """All tasks that fit, the newest first, page by page."""
        cursor: str | None = None
        while True:
            page = await self.page(
                statuses=statuses, type=type, role=role, parent=parent, cursor=cursor
            )
            for task in page.tasks:
                yield task
            cursor = page.next
            if cursor is None:
                return

    async def waiting(self, *, type: str | None = None, limit: int = 10) -> list[Task]:
        """What is queued, the next one first."""
        answer = await self._get("/v1/tasks/waiting", {"type": type, "limit": limit})
        return _each(Task, answer, "tasks")

    async def lines(self, id: str) -> list[dict[str, Any]]:
        """What a task's drones have logged: ``claim`` (its fence), ``at`` and ``text``."""
        return [dict(line) for line in _among("lines", await self._get(f"{_task(id)}/logs"))]

    async def move(
        self, id: str, status: TaskStatus, metadata: Mapping[str, JsonValue] | None = None
    ) -> Task:
        """Set the status of a task that nobody holds through a claim.

        :raises Conflict: somebody does, or what it is cannot become this
        """
        body = {"status": status, "metadata": metadata}
        return _told(Task, await self._post(f"{_task(id)}/status", body))

    async def cancel(self, id: str) -> Task:
        """At once where nobody works on it, else when its drone hears of it."""
        return _told(Task, await self._post(f"{_task(id)}/cancel"))

    async def retry(self, id: str) -> Task:
        """Let the next attempt begin now. :raises Conflict: it waits for none"""
        return _told(Task, await self._post(f"{_task(id)}/retry"))

    async def replay(self, id: str) -> Task:
        """Queue a failed task anew. :raises Conflict: it has not failed"""
        return _told(Task, await self._post(f"{_task(id)}/replay"))

    async def remove(self, id: str) -> bool:
        """Delete a task; False where there is none. :raises Conflict: somebody works on it"""
        return bool((await self._delete(_task(id)))["deleted"])

    # -- claims ------------------------------------------------------------------------------

    async def claim(self, request: ClaimRequest) -> list[Claim]:
        """Be given tasks; waits up to ``request.wait`` seconds for the first one."""
        if request.key is None:
            request = request.model_copy(update={"key": uuid.uuid4().hex})
        answer = await self._post("/v1/claims", request, timeout_s=request.wait + ANSWER_S)
        return _each(Claim, answer, "claims")

    async def beat(
        self, claim_id: str, said: Beat | None = None, *, lease_s: float | None = None
    ) -> Kept:
        """Still at work. :raises Conflict: the claim is stale"""
        body = {**_plain(said or Beat()), "lease_s": lease_s}
        return _told(Kept, await self._post(f"{_claim(claim_id)}/heartbeat", body))

    async def complete(
        self,
        claim_id: str,
        result: JsonValue = None,
        *,
        status: TaskStatus = "completed",
        said: Beat | None = None,
    ) -> Task:
        """Done. :raises Conflict: the claim is stale

        :param status: ``review_pending`` or ``escalated``, where somebody is to decide
        """
        body = {**_last_words(said), "result": result, "status": status}
        return _told(Task, await self._post(f"{_claim(claim_id)}/complete", body))

    async def complete_all(
        self, results: Sequence[tuple[str, JsonValue]]
    ) -> list[Task | HiveError]:
        """Several at once, 1 to 100, each by itself: its task, or why not."""
        claims = [_without_none({"claim_id": id, "result": result}) for id, result in results]
        answer = await self._post("/v1/claims/complete", {"claims": claims})
        return [self._outcome(one) for one in _among("claims", answer)]

    async def fail(
        self,
        claim_id: str,
        message: str,
        *,
        code: str = "drone_failed",
        retryable: bool = True,
        said: Beat | None = None,
    ) -> Task:
        """It could not be done. :raises Conflict: the claim is stale"""
        body = {**_last_words(said), "message": message, "code": code, "retryable": retryable}
        return _told(Task, await self._post(f"{_claim(claim_id)}/fail", body))

    async def release(self, claim_id: str) -> Task:
        """Given back, not begun. :raises Conflict: the claim is stale"""
        return _told(Task, await self._post(f"{_claim(claim_id)}/release"))

    # -- roles and drones --------------------------------------------------------------------

    async def roles(self) -> list[RoleInfo]:
        """What waits and runs, by role."""
        return _each(RoleInfo, await self._get("/v1/roles"), "roles")

    async def pause(self, role: str) -> bool:
        """Give out nothing of this role; False where that was so."""
        return bool((await self._post("/v1/roles/pause", {"role": role}))["changed"])

    async def resume(self, role: str) -> bool:
        """False where it was not paused."""
        return bool((await self._post("/v1/roles/resume", {"role": role}))["changed"])

    async def register(self, new: NewDrone) -> Drone:
        """Known from now on, or described anew."""
        return _told(Drone, await self._post("/v1/drones", new))

    async def heard(self, id: str, status: DroneStatus | None = None) -> Drone:
        """A drone's heartbeat. :raises NotFound: it is not registered"""
        return _told(Drone, await self._post(f"{_drone(id)}/heartbeat", {"status": status}))

    async def drone(self, id: str) -> Drone:
        """:raises NotFound: it is not registered"""
        return _told(Drone, await self._get(_drone(id)))

    async def drones(self, role: str | None = None, *, active: bool = False) -> list[Drone]:
        """Those that are registered; ``active``: and were heard of lately."""
        query = {"role": role, "active": "true" if active else None}
        return _each(Drone, await self._get("/v1/drones", query), "drones")

    async def unregister(self, id: str) -> bool:
        """False where it was not registered."""
        return bool((await self._delete(_drone(id)))["deleted"])

    # -- events ------------------------------------------------------------------------------

    async def events(
        self, topics: Sequence[str] = (), *, after: int | None = None
    ) -> AsyncGenerator[QueueEvent, None]:
        """What happens, without end, in order, however often the connection drops.

        :param topics: exact ones, and beginnings as ``task.*``; none: all
        :param after: the number of the last event seen; None: from now on
        :raises Gone: what came after that place is not kept any more
        :raises Unavailable: nobody has answered for ``patience_s``
        """
        path = "/v1/events" + _query({"topics": ",".join(topics) or None, "after": after})
        place = None if after is None else str(after)
        pause = FIRST_PAUSE_S
        while True:
            response = await self._repeated(partial(self._client.connect, path, place))
            if response is None:
                return
            async with response, aclosing(sse.decode(response.content.iter_any())) as decoded:
                try:
                    async for event in decoded:
                        place, pause = event.id or place, FIRST_PAUSE_S
                        yield _told(QueueEvent, _json(event.data))
                except BROKEN:
                    pass  # resumed below
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LAST_PAUSE_S)

    async def past_events(
        self, topics: Sequence[str] = (), *, after: int = 0
    ) -> AsyncGenerator[QueueEvent, None]:
        """What has happened until now, in order; ends there, however much happens meanwhile.

        :param topics: as of :meth:`events`
        :param after: the number of the last event seen; 0: from the first that is kept
        :raises Gone: what came after that place is not kept any more
        """
        query = {"follow": "false", "topics": ",".join(topics) or None}
        last: int | None = None
        while last is None or after < last:
            page = _told(EventPage, await self._get("/v1/events", {**query, "after": after}))
            last = page.last if last is None else last
            for event in page.events:
                if event.seq > last:
                    return
                yield event
            after = page.next

    # -- inside ------------------------------------------------------------------------------

    async def _get(self, path: str, query: Mapping[str, Any] | None = None) -> Any:
        whole = path + _query(query or {})
        return await self._repeated(lambda: self._client.get(whole, timeout_s=ANSWER_S))

    async def _post(self, path: str, body: Any = None, *, timeout_s: float = ANSWER_S) -> Any:
        sent = {} if body is None else _plain(body)
        return await self._repeated(lambda: self._client.post(path, sent, timeout_s=timeout_s))

    async def _delete(self, path: str) -> Any:
        return await self._repeated(lambda: self._client.delete(path, timeout_s=ANSWER_S))

    async def _repeated(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer, or patience has ended.

        :raises Unavailable: what the last try raised
        """
        loop = asyncio.get_running_loop()
        until: float | None = None  # patience begins with the first failure: a claim may wait long
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await ask()
            except Unavailable as error:
                until = until or loop.time() + self._patience_s
                wait = max(error.retry_after or 0.0, pause * random.uniform(0.5, 1.0))
                if loop.time() + wait > until:
                    raise
            await asyncio.sleep(wait)
            pause = min(pause * 2, LAST_PAUSE_S)

    def _outcome(self, said: Any) -> Task | HiveError:
        if "error" not in said:
            return _told(Task, said.get("task"))
        type = said["error"].get("type")
        status = next((code for code, cls in BY_STATUS.items() if cls.type == type), 500)
        return from_envelope(status, said, hop="queen", where=self._client.base_url)


def _keyed(new: NewTask) -> NewTask:
    """With an idempotency key, so that it can be sent again."""
    if new.idempotency_key is not None:
        return new
    return new.model_copy(update={"idempotency_key": uuid.uuid4().hex})


def _last_words(said: Beat | None) -> dict[str, Any]:
    """Logs and metadata that go with a claim's end."""
    return {} if said is None else said.model_dump(include={"logs", "metadata"}, exclude_none=True)


def _plain(body: Any) -> dict[str, Any]:
    """As it is sent: without what is left to the queen."""
    if isinstance(body, BaseModel):
        return body.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return _without_none(body)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _query(values: Mapping[str, Any]) -> str:
    given = _without_none(values)
    return f"?{urlencode(given)}" if given else ""


def _task(id: str) -> str:
    return f"/v1/tasks/{quote(id, safe='')}"


def _claim(id: str) -> str:
    return f"/v1/claims/{quote(id, safe='')}"


def _drone(id: str) -> str:
    return f"/v1/drones/{quote(id, safe='')}"


def _json(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        raise _not_understood("it is no JSON") from None


def _told(model: type[M], value: Any) -> M:
    """:raises WorkerBroke: it is not what this version understands"""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _not_understood(from_validation(error, model.__name__).message) from None


def _each(model: type[M], answer: Any, among: str) -> list[M]:
    return [_told(model, value) for value in _among(among, answer)]


def _among(name: str, answer: Any) -> list[Any]:
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise _not_understood(f"it has no list of {name}")
    return found


def _not_understood(reason: str) -> WorkerBroke:
    return WorkerBroke(
        f"The queen's answer is not understood ({reason.rstrip('.')}). Run the same version of "
        "Hive here and there.",
        code="answer_not_understood",
    )
