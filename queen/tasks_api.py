"""The durable queue over HTTP: tasks, claims, roles, drones, events."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, field_validator
from pydantic import ValidationError as Invalid
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.errors import (
    CallerGone,
    Forbidden,
    HiveError,
    InvalidRequest,
    NotFound,
    TooLarge,
)
from operations.operations import (
    EngineModels,
    Operation,
    WorkerSpawn,
    parse,
    parse_json_object,
)
from operations.tasks import (
    ALIASES,
    DAY_S,
    MOST_BYTES,
    MOST_LOG_CHARS,
    Beat,
    Claim,
    ClaimRequest,
    DroneId,
    DroneStatus,
    NewDrone,
    NewTask,
    RoleName,
    Task,
    TaskId,
    TaskStatus,
    Word,
    status_of,
)
from queen.queue_house import QueueHouse, stopping
from queen.targets import Targets
from wire import sse
from wire.errors import REQUEST_ID
from wire.jobs_api import event_stream, scope_of
from wire.keys import TENANT, Caller
from wire.prefer import preferences
from wire.reply import reply
from wire.trust_api import caller_of, validated

if TYPE_CHECKING:
    from hive_orchestration.machine.enqueue import Queued
    from hive_orchestration.queue import Queue

OPERATION: Final = "operation"
"""The type of tasks that the queen runs herself; their payload is the operation."""
QUEENS_ROLE: Final = "queen"
"""The role of those: no drone may claim in it."""

MOST_TOGETHER: Final = 100
MOST_TOGETHER_BYTES: Final = 16 * MOST_BYTES
MOST_LISTED: Final = 1000
MOST_TOPICS: Final = 32

_TOPIC = re.compile(r"\*|[a-z][a-z0-9_.-]{0,62}\*?")
_NUMBER = re.compile(r"[0-9]{1,18}")

log = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Nothing(_Closed):
    """A body that says nothing."""


class _NewTasks(_Closed):
    tasks: list[NewTask] = Field(min_length=1, max_length=MOST_TOGETHER)


class _Status(_Closed):
    status: TaskStatus
    metadata: dict[str, JsonValue] | None = None

    @field_validator("status", mode="before")
    @classmethod
    def _by_its_own_name(cls, name: object) -> object:
        return ALIASES.get(name, name) if isinstance(name, str) else name


class _Heartbeat(Beat):
    lease_s: float | None = Field(default=None, ge=1, le=DAY_S)


class _Said(_Closed):
    logs: Annotated[str, Field(max_length=MOST_LOG_CHARS)] | None = None
    metadata: dict[str, JsonValue] | None = None

    def beat(self) -> Beat | None:
        if self.logs is None and self.metadata is None:
            return None
        return Beat(logs=self.logs, metadata=self.metadata)


class _Done(_Said):
    result: JsonValue = None
    status: Literal["completed", "review_pending", "escalated"] = "completed"


class _Failed(_Said):
    message: str = Field(min_length=1, max_length=65_536)
    code: Word = "drone_failed"
    retryable: bool = True


class _OneDone(_Closed):
    claim_id: str
    result: JsonValue = None


class _AllDone(_Closed):
    claims: list[_OneDone] = Field(min_length=1, max_length=MOST_TOGETHER)


class _Role(_Closed):
    role: RoleName


class _Alive(_Closed):
    status: DroneStatus | None = None


_ROLE: TypeAdapter[str] = TypeAdapter(RoleName)
_WORD: TypeAdapter[str] = TypeAdapter(Word)
_TASK_ID: TypeAdapter[str] = TypeAdapter(TaskId)
_DRONE_ID: TypeAdapter[str] = TypeAdapter(DroneId)


def task_routes(house: QueueHouse, targets: Targets) -> list[Route]:
    """:param targets: where callbacks may go"""

    # -- tasks -------------------------------------------------------------------------------

    async def enqueue(request: Request) -> Response:
        tenant = queues_for(request, _query(request, "tenant"))
        payload = parse_json_object(await body_of(request, MOST_TOGETHER_BYTES))
        together = "tasks" in payload
        if together:
            new = validated(_NewTasks, payload, "tasks").tasks
        else:
            new = [validated(NewTask, payload, "task")]
        caller = caller_of(request)
        ready = [admitted(one, caller, targets) for one in new]
        said = await (await house.queue()).enqueue(tenant, ready)
        if together:
            return reply({"tasks": [_minimal(one) for one in said]}, status=201)
        [one] = said
        status, headers = 201 if one.created else 200, {"location": f"/v1/tasks/{one.id}"}
        wish = preferences(",".join(request.headers.getlist("prefer"))).get("return")
        if wish != "minimal":
            return reply(shown(one.task), status=status, headers=headers)
        headers["preference-applied"] = "return=minimal"
        return reply(_minimal(one), status=status, headers=headers)

    async def listing(request: Request) -> Response:
        asked = _query(request, "tenant", "status", "type", "role", "parent", "limit", "cursor")
        page = await (await house.queue()).page(
            sees(request, asked),
            statuses=[status_of(name) for name in asked.get("status", "").split(",") if name],
            type=_checked(_WORD, asked, "type"),
            role=_checked(_ROLE, asked, "role"),
            parent=_checked(_TASK_ID, asked, "parent"),
            limit=_number(asked, "limit", 100, MOST_LISTED),
            cursor=_digits(asked, "cursor"),
        )
        tasks = [shown(task) for task in page.tasks]
        return reply({"tasks": tasks} | ({"next": page.next} if page.next else {}))

    async def waiting(request: Request) -> Response:
        asked = _query(request, "tenant", "type", "limit")
        found = await (await house.queue()).waiting(
            sees(request, asked),
            type=_checked(_WORD, asked, "type"),
            limit=_number(asked, "limit", 10, MOST_LISTED),
        )
        return reply({"tasks": [shown(task) for task in found]})

    async def get(request: Request) -> Response:
        tenant, id = sees(request), _task_id(request)
        return reply(shown(await (await house.queue()).get(tenant, id)))

    async def lines(request: Request) -> Response:
        tenant, id = sees(request), _task_id(request)
        return reply({"lines": await (await house.queue()).lines(tenant, id)})

    async def delete(request: Request) -> Response:
        tenant, id = sees(request), _task_id(request)
        return reply({"deleted": await (await house.queue()).remove(tenant, id)})

    async def move(request: Request) -> Response:
        tenant, id = sees(request), _task_id(request)
        asked = await read(request, _Status, "status")
        queue = await house.queue()
        return reply(shown(await queue.move(tenant, id, asked.status, asked.metadata)))

    async def cancel(request: Request) -> Response:
        tenant, id = sees(request), _task_id(request)
        await read(request, _Nothing, "cancel")
        return reply(shown(await (await house.queue()).cancel(tenant, id)))

    async def retry(request: Request) -> Response:
        tenant, id = sees(request), _task_id(request)
        await read(request, _Nothing, "retry")
        return reply(shown(await (await house.queue()).retry(tenant, id)))

    async def replay(request: Request) -> Response:
        tenant, id = sees(request), _task_id(request)
        await read(request, _Nothing, "replay")
        return reply(shown(await (await house.queue()).replay(tenant, id)))

    # -- claims ------------------------------------------------------------------------------

    async def claim(request: Request) -> Response:
        tenant = sees(request, _query(request, "tenant"))
        asked = await read(request, ClaimRequest, "claim")
        claims = await claimed(house, request, tenant, asked)
        return reply({"claims": [_shown_claim(one) for one in claims]})

    async def beat(request: Request) -> Response:
        tenant, id = sees(request), str(request.path_params["claim_id"])
        said = await read(request, _Heartbeat, "heartbeat")
        queue = await house.queue()
        return reply(await queue.beat(id, said, lease_s=said.lease_s, tenant=tenant))

    async def complete(request: Request) -> Response:
        tenant, id = sees(request), str(request.path_params["claim_id"])
        said = await read(request, _Done, "complete")
        queue = await house.queue()
        done = await queue.complete(
            id, said.result, status=said.status, said=said.beat(), tenant=tenant
        )
        return reply(shown(done))

    async def fail(request: Request) -> Response:
        tenant, id = sees(request), str(request.path_params["claim_id"])
        said = await read(request, _Failed, "fail")
        queue = await house.queue()
        failed = await queue.fail(
            id,
            said.message,
            code=said.code,
            retryable=said.retryable,
            said=said.beat(),
            tenant=tenant,
        )
        return reply(shown(failed))

    async def release(request: Request) -> Response:
        tenant, id = sees(request), str(request.path_params["claim_id"])
        await read(request, _Nothing, "release")
        queue = await house.queue()
        return reply(shown(await queue.release(id, tenant=tenant)))

    async def complete_all(request: Request) -> Response:
        tenant = sees(request)
        asked = await read(request, _AllDone, "complete", MOST_TOGETHER_BYTES)
        queue = await house.queue()

        async def one(done: _OneDone) -> dict[str, Any]:
            try:
                return {
                    "task": shown(await queue.complete(done.claim_id, done.result, tenant=tenant))
                }
            except HiveError as error:
                body = error.body("queen", request.scope[REQUEST_ID])
                return {"error": body.model_dump(exclude_none=True)}

        return reply({"claims": await asyncio.gather(*map(one, asked.claims))})

    # -- roles and drones --------------------------------------------------------------------

    async def roles(request: Request) -> Response:
        tenant = sees(request, _query(request, "tenant"))
        return reply({"roles": await (await house.queue()).roles(tenant)})

    async def pause(request: Request) -> Response:
        role = (await read(request, _Role, "pause")).role
        return reply({"changed": await (await house.queue()).pause(role)})

    async def resume(request: Request) -> Response:
        role = (await read(request, _Role, "resume")).role
        return reply({"changed": await (await house.queue()).resume(role)})

    async def register(request: Request) -> Response:
        tenant = queues_for(request, _query(request, "tenant"))
        new = await read(request, NewDrone, "drone")
        drone = await (await house.queue()).register(tenant, new)
        return reply(_without_none(drone), status=201)

    async def drones(request: Request) -> Response:
        asked = _query(request, "tenant", "role", "active")
        found = await (await house.queue()).drones(
            sees(request, asked), _checked(_ROLE, asked, "role"), active=_flag(asked, "active")
        )
        return reply({"drones": [_without_none(drone) for drone in found]})

    async def drone(request: Request) -> Response:
        tenant, id = sees(request), _drone_id(request)
        return reply(_without_none(await (await house.queue()).drone(tenant, id)))

    async def unregister(request: Request) -> Response:
        tenant, id = sees(request), _drone_id(request)
        return reply({"deleted": await (await house.queue()).unregister(tenant, id)})

    async def heard(request: Request) -> Response:
        tenant, id = sees(request), _drone_id(request)
        status = (await read(request, _Alive, "heartbeat")).status
        return reply(_without_none(await (await house.queue()).heard(tenant, id, status)))

    # -- events ------------------------------------------------------------------------------

    async def events(request: Request) -> Response:
        asked = _query(request, "tenant", "topics", "after", "follow")
        tenant = sees(request, asked)
        topics = [topic for topic in asked.get("topics", "").split(",") if topic]
        if len(topics) > MOST_TOPICS or not all(map(_TOPIC.fullmatch, topics)):
            raise InvalidRequest(
                "A topic is as task.completed, or as task.* for all that begin so; 32 at most.",
                param="topics",
            )
        follow = _flag(asked, "follow", default=True)
        last_event_id = request.headers.get("last-event-id")
        if last_event_id is not None:
            asked = {"after": last_event_id}
        digits = _digits(asked, "after")
        after = None if digits is None else int(digits)
        opened = await house.open()
        from hive_orchestration.machine import reading

        if not follow:
            page = await opened.store.read(lambda tx: reading.past(tx, tenant, after or 0, topics))
            return reply(page.model_dump(mode="json"))
        place = await opened.store.read(lambda tx: reading.place(tx, after))
        return event_stream(_told(house, opened.queue, tenant, place, topics))

    return [
        Route("/v1/tasks", enqueue, methods=["POST"]),
        Route("/v1/tasks", listing, methods=["GET"]),
        Route("/v1/tasks/waiting", waiting, methods=["GET"]),
        Route("/v1/tasks/{id}", get, methods=["GET"]),
        Route("/v1/tasks/{id}", delete, methods=["DELETE"]),
        Route("/v1/tasks/{id}/logs", lines, methods=["GET"]),
        Route("/v1/tasks/{id}/status", move, methods=["POST"]),
        Route("/v1/tasks/{id}/cancel", cancel, methods=["POST"]),
        Route("/v1/tasks/{id}/retry", retry, methods=["POST"]),
        Route("/v1/tasks/{id}/replay", replay, methods=["POST"]),
        Route("/v1/claims", claim, methods=["POST"]),
        Route("/v1/claims/complete", complete_all, methods=["POST"]),
        Route("/v1/claims/{claim_id}/heartbeat", beat, methods=["POST"]),
        Route("/v1/claims/{claim_id}/complete", complete, methods=["POST"]),
        Route("/v1/claims/{claim_id}/fail", fail, methods=["POST"]),
        Route("/v1/claims/{claim_id}/release", release, methods=["POST"]),
        Route("/v1/roles", roles, methods=["GET"]),
        Route("/v1/roles/pause", pause, methods=["POST"]),
        Route("/v1/roles/resume", resume, methods=["POST"]),
        Route("/v1/drones", register, methods=["POST"]),
        Route("/v1/drones", drones, methods=["GET"]),
        Route("/v1/drones/{id:path}/heartbeat", heard, methods=["POST"]),
        Route("/v1/drones/{id:path}", drone, methods=["GET"]),
        Route("/v1/drones/{id:path}", unregister, methods=["DELETE"]),
        Route("/v1/events", events, methods=["GET"]),
    ]


# -- who --------------------------------------------------------------------------------------


def sees(request: Request, asked: dict[str, str] | None = None) -> str | None:
    """Whose tasks a caller sees and touches; None: everybody's.

    :param asked: the request's query, where it may name a tenant
    :raises Forbidden: it names another one than the caller's own
    """
    caller = caller_of(request)
    tenant = (asked or {}).get("tenant")
    if tenant is not None and not TENANT.fullmatch(tenant):
        raise InvalidRequest("This can be no tenant's name.", param="tenant")
    if caller.may("admin"):
        return tenant
    if tenant not in (None, caller.tenant):
        raise Forbidden(
            "This key is another tenant's. Leave 'tenant' out.", code="other_tenant", param="tenant"
        )
    return caller.tenant


def queues_for(request: Request, asked: dict[str, str]) -> str:
    """Whose a caller's tasks and drones are. Raises as :func:`sees`."""
    return sees(request, asked) or "default"


def admitted(
    new: NewTask, caller: Caller, targets: Targets, url_field: str = "callback_url"
) -> NewTask:
    """A task that may be queued.

    :param url_field: what the request calls its callbacks' URL
    :raises HiveError: it may not be
    """
    if new.callback_url is not None:
        url = str(targets.check(new.callback_url, url_field))
        if new.callback_url not in (url, targets.default):  # one host is written in one way
            new = new.model_copy(update={"callback_url": url})
    if "\0" in new.title:
        raise InvalidRequest("A title has no NUL in it.", param="title")
    if new.type == OPERATION:
        if new.role not in ("", QUEENS_ROLE):
            raise InvalidRequest(
                "Operations are run by the queen herself. Leave 'role' out.", param="role"
            )
        operation = operation_of(new.payload)
        caller.must(scope_of(operation))
        if _has_key(operation):
            raise InvalidRequest(
                "A task's payload can be read by all who may see the task. Send the engine's key "
                "as 'api_key' in 'secrets'.",
                param="payload",
            )
        return new.model_copy(update={"role": QUEENS_ROLE})
    if new.role == QUEENS_ROLE:
        raise _queens_own()
    return new


def operation_of(
    payload: dict[str, JsonValue], secrets: Mapping[str, str] = MappingProxyType({})
) -> Operation:
    """A task's operation; an ``api_key`` among its secrets is an engine's.

    :raises InvalidRequest: the payload is none
    """
    operation = parse(to_json(payload))
    if (key := secrets.get("api_key")) is not None:
        if isinstance(operation, WorkerSpawn):
            options = operation.options.model_copy(update={"api_key": key})
            return operation.model_copy(update={"options": options})
        if isinstance(operation, EngineModels):
            return operation.model_copy(update={"api_key": key})
    return operation


def _has_key(operation: Operation) -> bool:
    if isinstance(operation, WorkerSpawn):
        return operation.options.api_key is not None
    return isinstance(operation, EngineModels) and operation.api_key is not None


def _queens_own() -> InvalidRequest:
    return InvalidRequest(
        f"The role '{QUEENS_ROLE}' is of operations, which the queen runs herself. Choose another.",
        param="role",
    )


# -- claiming -----------------------------------------------------------------------------------


async def claimed(
    house: QueueHouse, request: Request, tenant: str | None, asked: ClaimRequest
) -> list[Claim]:
    """Claim for a caller; what he does not live to hear of is given back.

    :raises Unavailable: the queen stops
    """
    if asked.role == QUEENS_ROLE:
        raise _queens_own()
    if house.stopping.is_set():
        raise stopping()
    queue = await house.queue()
    if given := await queue.claim(tenant, asked.model_copy(update={"wait": 0.0})):
        return given
    if not asked.wait:
        return []
    claiming = asyncio.ensure_future(queue.claim(tenant, asked))
    gone = asyncio.ensure_future(_gone(request))
    closing = asyncio.ensure_future(house.stopping.wait())
    waits: Sequence[asyncio.Future[Any]] = (claiming, gone, closing)
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if claiming.done() and not gone.done():
            return claiming.result()
        raise CallerGone("The caller hung up. Claim anew.") if gone.done() else stopping()
    except BaseException:
        house.give_back(claiming)
        raise
    finally:
        for wait in (gone, closing):
            wait.cancel()


async def _gone(request: Request) -> None:
    """Return when the caller has hung up; his body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- reading requests -----------------------------------------------------------------------


async def body_of(request: Request, most: int = MOST_BYTES) -> bytes:
    """:raises TooLarge: it has more bytes than that"""
    if int(request.headers.get("content-length", "0")) > most:
        raise _too_large(most)
    body = await request.body()
    if len(body) > most:
        raise _too_large(most)
    return body


async def read(request: Request, cls: type[M], what: str, most: int = MOST_BYTES) -> M:
    """A body; an empty one says nothing. :raises InvalidRequest: it is none of this kind"""
    body = await body_of(request, most)
    return validated(cls, parse_json_object(body) if body else {}, what)


def _too_large(most: int) -> TooLarge:
    return TooLarge(
        f"This takes more than {most} bytes. Keep what is large elsewhere, and queue where it is."
    )


def _query(request: Request, *names: str) -> dict[str, str]:
    """:raises InvalidRequest: there are other parameters"""
    if not request.scope["query_string"]:
        return {}
    for name in request.query_params:
        if name not in names:
            raise InvalidRequest(
                f"There is no parameter '{name[:64]}' here. There are: {', '.join(names)}.",
                param=name[:64],
            )
    return dict(request.query_params)


def _checked(adapter: TypeAdapter[str], asked: dict[str, str], name: str) -> str | None:
    if name not in asked:
        return None
    try:
        return adapter.validate_python(asked[name])
    except Invalid:
        raise InvalidRequest(f"This can be no task's '{name}'.", param=name) from None


def _digits(asked: dict[str, str], name: str) -> str | None:
    if name in asked and not _NUMBER.fullmatch(asked[name]):
        raise InvalidRequest(f"'{name}' is a number that was answered before.", param=name)
    return asked.get(name)


def _flag(asked: dict[str, str], name: str, *, default: bool = False) -> bool:
    said = asked.get(name, str(default).lower())
    if said not in ("true", "false"):
        raise InvalidRequest(f"'{name}' is true or false.", param=name)
    return said == "true"


def _number(asked: dict[str, str], name: str, default: int, most: int) -> int:
    text = asked.get(name, str(default))
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= most:
        raise InvalidRequest(f"'{name}' is a number from 1 to {most}.", param=name)
    return int(text)


def _task_id(request: Request) -> str:
    id = str(request.path_params["id"])
    try:
        return _TASK_ID.validate_python(id)
    except Invalid:
        raise NotFound(
            "There is no task of this id. List them with 'hive tasks ls'.", code="no_task"
        ) from None


def _drone_id(request: Request) -> str:
    id = str(request.path_params["id"])
    try:
        return _DRONE_ID.validate_python(id)
    except Invalid:
        raise NotFound(
            "There is no drone of this id. Register it: POST /v1/drones.", code="no_drone"
        ) from None


# -- writing answers --------------------------------------------------------------------------


def shown(task: Task) -> dict[str, Any]:
    """A task as callers see it: what it has not, is left out; what its payload has, is not."""
    return _without_none(task)


def _shown_claim(claim: Claim) -> dict[str, Any]:
    return {**vars(claim), "task": shown(claim.task)}


def _minimal(queued: Queued) -> dict[str, Any]:
    return {"id": queued.id, "created": queued.created}


def _without_none(value: BaseModel) -> dict[str, Any]:
    # ``exclude_none`` would look into payloads, too; and ``model_dump`` would copy them.
    return {k: v for k, v in vars(value).items() if v is not None}


async def _told(
    house: QueueHouse, queue: Queue, tenant: str | None, after: int, topics: Sequence[str]
) -> AsyncGenerator[sse.Event, None]:
    """Events as they happen, until the queen stops."""
    closing = asyncio.ensure_future(house.stopping.wait())
    try:
        async with aclosing(queue.follow(tenant, after, topics)) as events:  # type: ignore[type-var]
            while True:
                coming = asyncio.ensure_future(anext(events))
                try:
                    await asyncio.wait((coming, closing), return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        return
                    event = coming.result()
                finally:
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
                yield sse.Event(event.model_dump_json(), event=event.topic, id=str(event.seq))
    except HiveError as error:  # he comes again, and is told then
        log.info("a stream of events was ended: %s", error.message)
    finally:
        closing.cancel()
