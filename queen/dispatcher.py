"""The dispatcher, as its SDK speaks it: ``/enqueue``, ``/claim``, ``/callback``.

A ticket is a task of one of three types, whose id is the ticket's ``jobId``.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator
from pydantic.alias_generators import to_camel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.tasks import (
    MOST_LOG_CHARS,
    TICKET_TYPES,
    Beat,
    Claim,
    ClaimRequest,
    DroneId,
    NewTask,
    RoleName,
    TaskId,
    TicketType,
    Word,
)
from queen.queue_house import QueueHouse
from queen.targets import Targets
from queen.tasks_api import admitted, claimed, queues_for, read, sees
from wire.reply import reply
from wire.trust_api import caller_of

LEASE_S: Final = 900.0
TOKEN: Final = "githubToken"

_REPO = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/][^\s]*", re.IGNORECASE)
_OLDER: Final = {"progress": "running", "success": "succeeded", "error": "failed"}


class _Spoken(BaseModel):
    """As the SDK spells it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, alias_generator=to_camel
    )


class Ticket(_Spoken):
    """``POST /enqueue``."""

    job_id: TaskId
    task: TicketType
    instructions: str
    repo: str | None = Field(default=None, max_length=2048)
    branch: str | None = Field(default=None, max_length=1024)
    base: str | None = Field(default=None, max_length=1024)
    github_token: str | None = Field(default=None, max_length=4096, repr=False)
    metadata: dict[str, JsonValue] | None = None
    callback_url: str | None = Field(default=None, max_length=2048)

    @field_validator("repo")
    @classmethod
    def _is_a_url(cls, repo: str | None) -> str | None:
        if repo is not None and not _REPO.fullmatch(repo):
            raise ValueError("it must be a URL, as https://github.com/owner/name")
        return repo

    def as_task(self, default_url: str | None) -> NewTask:
        """What is queued. :param default_url: of its callbacks"""
        payload = self.model_dump(
            mode="json", by_alias=True, exclude={"github_token"}, exclude_unset=True
        )
        first_line = self.instructions.strip().partition("\n")[0]
        return NewTask(
            type=self.task,
            title=first_line.replace("\0", "")[:200],
            payload=payload,
            lease_s=LEASE_S,
            idempotency_key=self.job_id,
            callback_url=self.callback_url or default_url,
            secrets={TOKEN: self.github_token} if self.github_token else {},
        )


class _Claiming(_Spoken):
    """``POST /claim``; the SDK sends nothing at all."""

    worker_id: DroneId = "anonymous"
    role: RoleName = ""
    capabilities: list[Word] = Field(default=[], max_length=128)
    wait: float = Field(default=0.0, ge=0, le=60)
    n: int | None = Field(default=None, ge=1, le=100)


class _Callback(_Spoken):
    """``POST /callback``."""

    claim_id: str
    worker_id: str = Field(max_length=1024)
    status: Literal["running", "succeeded", "failed"]
    logs: str | None = None
    metadata: dict[str, JsonValue] | None = None

    @field_validator("status", mode="before")
    @classmethod
    def _by_its_newer_name(cls, name: object) -> object:
        return _OLDER.get(name, name) if isinstance(name, str) else name

    def beat(self) -> Beat:
        """Of the logs the end, where they are longer than a heartbeat's may be."""
        logs = None if self.logs is None else self.logs[-MOST_LOG_CHARS:]
        return Beat(logs=logs, metadata=self.metadata)


def dispatcher_routes(house: QueueHouse, targets: Targets, max_queue: int) -> list[Route]:
    """:param max_queue: tickets of a tenant that may wait"""

    async def enqueue(request: Request) -> Response:
        tenant = queues_for(request, {})
        ticket = await read(request, Ticket, "enqueue")
        new = admitted(ticket.as_task(targets.default), caller_of(request), targets, "callbackUrl")
        opened = await house.open()
        from hive_orchestration.machine import tickets
        from hive_orchestration.machine.enqueue import Wanted

        sealer = opened.sealer
        wanted = Wanted(sealer.veiled(new), sealer.seal(new.secrets), ticket.job_id)
        _, waiting = await opened.store.write(
            lambda tx: tickets.queue(tx, tenant, wanted, max_queue)
        )
        return reply({"accepted": True, "queueLength": waiting})

    async def claim(request: Request) -> Response:
        asked = await read(request, _Claiming, "claim")
        wanted = ClaimRequest(
            drone_id=asked.worker_id,
            role=asked.role,
            capabilities=tuple(asked.capabilities),
            types=TICKET_TYPES,
            wait=asked.wait,
            n=asked.n or 1,
            lease_s=LEASE_S,
        )
        jobs = [_job(one) for one in await claimed(house, request, sees(request), wanted)]
        if asked.n is not None:
            return reply({"jobs": jobs})
        return reply({"job": jobs[0] if jobs else None})

    async def callback(request: Request) -> Response:
        tenant = sees(request)
        said = await read(request, _Callback, "callback")
        opened = await house.open()
        from hive_orchestration.machine import tickets
        from hive_orchestration.machine.rows import ClaimId

        id, queue = said.claim_id, opened.queue
        claim = ClaimId.parse(id, tenant)
        match said.status:
            case "running":
                kept = await opened.store.write(
                    lambda tx: tickets.running(tx, claim, said.beat(), LEASE_S)
                )
                return reply({"ok": True} | ({"cancel": True} if kept.cancel else {}))
            case "succeeded":
                await queue.complete(id, said=said.beat(), tenant=tenant)
            case "failed":
                words = "The worker said that it failed."
                await queue.fail(id, words, retryable=False, said=said.beat(), tenant=tenant)
        return reply({"ok": True})

    return [
        Route("/enqueue", enqueue, methods=["POST"]),
        Route("/claim", claim, methods=["POST"]),
        Route("/callback", callback, methods=["POST"]),
    ]


def _job(claim: Claim) -> dict[str, Any]:
    """What was enqueued, and what proves the claim; the same for a task that came another way."""
    task = claim.task
    return {
        "jobId": task.id,
        "task": task.type,
        "instructions": task.description or task.title,
        **task.payload,
        **claim.secrets,
        "claimId": claim.claim_id,
    }
