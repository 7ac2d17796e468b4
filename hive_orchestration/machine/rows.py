"""Between rows and what callers see."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import bindparam, update

from hive_orchestration.connection import Row
from hive_orchestration.schema import tasks
from hive_orchestration.transaction import Tx, compact
from operations.errors import Conflict, InvalidRequest, NotFound, TooLarge
from operations.tasks import FINAL, MOST_BYTES, NewTask, Retry, Task, TaskStatus

MS: Final = 1000
AGEING_MS: Final = 60_000  # a step of priority outweighs so much more waiting
TASK_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_BESIDE_PAYLOAD: Final = {
    *("description", "capabilities", "tags", "not_before", "retry", "rate", "callback_url"),
}
_IN_BODY: Final = {"payload", *_BESIDE_PAYLOAD}
_SET = update(tasks).where(tasks.c.seq == bindparam("of"))
_CLAIM_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._:-]{0,127})~([0-9]{1,9})~([A-Za-z0-9_-]{22})")


class ClaimId(NamedTuple):
    """What proves a claim: which task, which of its claims, and what only its holder was told.

    :param tenant: of who holds it up, and finds nothing of other tenants' tasks; None: of all
    """

    task: str
    fence: int
    token: str
    tenant: str | None = None

    def __str__(self) -> str:
        return f"{self.task}~{self.fence}~{self.token}"

    @classmethod
    def parse(cls, text: str, tenant: str | None = None) -> ClaimId:
        """:raises InvalidRequest: it is none"""
        found = _CLAIM_ID.fullmatch(text)
        if found is None:
            raise InvalidRequest(
                "This is no claim's id. Send the one that the claim was answered with.",
                code="bad_claim_id",
                param="claimId",
            )
        return cls(found[1], int(found[2]), found[3], tenant)


def new_token() -> str:
    return secrets.token_urlsafe(16)


def new_id(now: int) -> str:
    """A task's id: a UUID of version 7 (RFC 9562), whose 74 other bits are by chance.

    As it grows with time, the index of ids is written at its end, not all over.

    :param now: ms since the epoch
    """
    version, variant = 7, 0b10
    chance = int.from_bytes(secrets.token_bytes(10), "big")
    number = now << 80 | version << 76 | chance >> 68 << 64 | variant << 62 | chance & (1 << 62) - 1
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def rank(now: int, priority: int) -> int:
    """What the claimable are ordered by: waiting counts as priority does."""
    return now - priority * AGEING_MS


def body_of(new: NewTask) -> dict[str, Any]:
    """What of a task never changes, and is not looked for."""
    if new.model_fields_set.isdisjoint(_BESIDE_PAYLOAD):  # the usual one, and much faster
        return {"payload": new.payload} if new.payload else {}
    return dict(new.model_dump(mode="json", include=_IN_BODY, exclude_defaults=True))


def with_metadata(row: Row, said: Mapping[str, Any]) -> str:
    """A task's metadata and what is added to it, as JSON.

    :raises TooLarge: together they are more than a task may have
    """
    metadata = compact({**json.loads(row["metadata"]), **said})
    return bounded("metadata", metadata)


def write(tx: Tx, row: Row, values: Mapping[str, Any]) -> None:
    """Give a task's columns other values."""
    tx.conn.execute(_SET, {"of": row["seq"], **values})


def bounded(what: str, text: str) -> str:
    """:raises TooLarge: it takes more bytes than a task has room for"""
    if len(text) > MOST_BYTES // 4 and len(text.encode(errors="surrogatepass")) > MOST_BYTES:
        raise TooLarge(
            f"A task's {what} takes {MOST_BYTES} bytes at most. Keep what is large elsewhere, and "
            "queue where it is.",
            param=what,
        )
    return text


def retry_of(body: Mapping[str, Any]) -> Retry:
    return Retry.model_validate(body.get("retry", {}))


def task_of(row: Row) -> Task:
    """A row of ``tasks`` as callers see it."""
    body = _read(row["body"])
    leased = row["state"] == "leased"
    return Task(
        id=row["id"],
        tenant=row["tenant"],
        type=row["type"],
        title=row["title"],
        description=body.get("description", ""),
        payload=body.get("payload", {}),
        metadata=_read(row["metadata"]),
        status=row["status"],
        priority=row["priority"],
        role=row["role"],
        capabilities=tuple(body.get("capabilities", ())),
        tags=tuple(body.get("tags", ())),
        attempts=row["attempts"],
        max_attempts=row["max_attempts"],
        progress=row["progress"],
        result=_read(row["result"]),
        error=_read(row["error"]),
        drone_id=row["drone_id"],
        lease_until=_seconds(row["lease_until"]) if leased else None,
        cancel_requested=bool(row["cancel_requested"]),
        not_before=_seconds(row["due"]),
        deadline=_seconds(row["deadline"]),
        idempotency_key=row["idempotency_key"],
        unique_key=row["unique_key"],
        callback_url=body.get("callback_url"),
        parent=row["parent"],
        created_at=row["created_at"] / MS,
        updated_at=row["updated_at"] / MS,
        started_at=_seconds(row["started_at"]),
        finished_at=_seconds(row["finished_at"]),
    )


def told(tx: Tx, row: Row, topic: str, **data: Any) -> None:
    """The event of a task's transition; and its callback, where it has one and that is of use."""
    status: TaskStatus = data.pop("status", row["status"])
    said = {"type": row["type"], "status": status, **data}
    tx.event(f"task.{topic}", row["id"], row["tenant"], said)
    if '"callback_url"' not in row["body"]:
        return
    url = json.loads(row["body"]).get("callback_url")
    if url and (topic == "started" or topic == "progress" or status in FINAL):
        tx.deliver(row["id"], url, {"jobId": row["id"], "tenant": row["tenant"], **said})


def unknown(id: str) -> NotFound:
    return NotFound(f"There is no task '{id}'. List them with 'hive tasks ls'.", code="no_task")


def stale(id: str) -> Conflict:
    return Conflict(
        f"This claim of task '{id}' holds no more: its lease ran out, or the task was ended or "
        "given to somebody else. Drop this work, and claim anew.",
        code="stale_claim",
    )


def _read(text: str | None) -> Any:
    if text is None:
        return None
    return {} if text == "{}" else json.loads(text)


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / MS
