"""What who holds a claim may do with his task. Each call is fenced: a stale claim changes nothing.

Calls may come twice, for an answer can get lost: the same call again says the same again, as long
as nobody has done anything else with the task since.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal

from pydantic import JsonValue
from sqlalchemy import BigInteger, Text, bindparam, delete, func, insert, select, update

from hive_orchestration.connection import Row
from hive_orchestration.machine.claim import forget
from hive_orchestration.machine.limits import unpark
from hive_orchestration.machine.rows import (
    MS,
    ClaimId,
    bounded,
    retry_of,
    stale,
    task_of,
    told,
    unknown,
    with_metadata,
    write,
)
from hive_orchestration.schema import DELAYED, DONE, HELD, LEASED, PARKED, READY, is_, logs, tasks
from hive_orchestration.transaction import Tx, compact
from operations.tasks import Beat, Kept, Task

Outcome = Literal["completed", "review_pending", "escalated"]
"""What a drone may say of a task that it has done; the latter two need somebody's decision."""

MOST_LOG_ROWS: Final = 1000  # of a task; older ones go
LOST: Final = "The lease ran out: the drone died, hung, or lost its connection."

_AT = bindparam("at", type_=BigInteger)
_TASK = select(tasks).where(tasks.c.id == bindparam("id")).with_for_update()
# The usual end, in one statement: none changes where the claim does not hold.
_COMPLETE = (
    update(tasks)
    .where(
        tasks.c.id == bindparam("of"),
        tasks.c.fence == bindparam("by_fence"),
        tasks.c.token == bindparam("by_token"),
        tasks.c.tenant == func.coalesce(bindparam("of_tenant", type_=Text), tasks.c.tenant),
        is_(LEASED),
        tasks.c.lease_until > _AT,
    )
    .values(
        state=DONE,
        status="completed",
        result=bindparam("with_result"),
        error=None,
        progress=1.0,
        lease_until=None,
        finished_at=_AT,
        updated_at=_AT,
    )
    .returning(tasks)
)
_LAST_LINES = (
    select(logs.c.fence, logs.c.text)
    .where(logs.c.task == bindparam("of"))
    .order_by(logs.c.seq.desc())
    .limit(1)
)
_LOG = insert(logs)
_TOO_OLD = (
    select(logs.c.seq)
    .where(logs.c.task == bindparam("of"))
    .order_by(logs.c.seq.desc())
    .offset(MOST_LOG_ROWS)
    .limit(1)
)
_FORGET_LINES = delete(logs).where(
    logs.c.task == bindparam("of"), logs.c.seq <= bindparam("oldest")
)


def beat(tx: Tx, claim: ClaimId, said: Beat, *, lease_s: float | None = None) -> Kept:
    """The drone is alive: the lease begins anew, and the task is in progress.

    The same lines twice in a row are kept once: an answer that got lost has the call sent again.

    :param lease_s: how long it holds now; None: as long as before
    :raises Conflict: the claim is stale
    :raises TooLarge: the task has no room for more metadata
    """
    row = _held(tx, claim)
    lease_ms = row["claim_ms"] if lease_s is None else int(lease_s * MS)
    values: dict[str, Any] = {
        "status": "in_progress",
        "lease_until": tx.now + lease_ms,
        "claim_ms": lease_ms,
        "updated_at": tx.now,
    }
    if said.progress is not None:
        values["progress"] = said.progress
    if said.metadata:
        values["metadata"] = with_metadata(row, said.metadata)
    write(tx, row, values)
    _log(tx, row, said.logs)
    after = {**row, **values}
    if row["status"] != "in_progress":
        told(tx, after, "started", drone_id=row["drone_id"])
    elif said.progress is not None and said.progress != row["progress"]:
        told(tx, after, "progress", progress=said.progress)
    return Kept(lease_s=lease_ms / MS, cancel=bool(row["cancel_requested"]))


def complete(
    tx: Tx,
    claim: ClaimId,
    result: JsonValue = None,
    *,
    status: Outcome = "completed",
    said: Beat | None = None,
) -> Task:
    """It is done.

    :raises Conflict: the claim is stale, or said something else before
    """
    text = None if result is None else bounded("result", compact(result))
    done = status == "completed"
    if done and said is None and (ended := _completed(tx, claim, text)) is not None:
        return ended
    row = _row(tx, claim)
    same = row["status"] == status and row["result"] == text and row["state"] in (DONE, HELD)
    if _is(row, claim) and (same or (not done and row["status"] == "cancelled")):
        return task_of(row)
    _check(tx, row, claim)
    if row["cancel_requested"] and not done:
        return _cancelled(tx, row, said)  # nobody wants to decide about it
    values: dict[str, Any] = {
        "state": DONE if done else HELD,
        "status": status,
        "result": text,
        "error": None,
        "finished_at": tx.now if done else None,
    }
    if done:
        values["progress"] = 1.0
    return _end(tx, row, values, status, said)


def _completed(tx: Tx, claim: ClaimId, result: str | None) -> Task | None:
    """None: the claim does not hold."""
    held = {
        "of": claim.task,
        "by_fence": claim.fence,
        "by_token": claim.token,
        "of_tenant": claim.tenant,
        "at": tx.now,
    }
    row = tx.conn.execute(_COMPLETE, {**held, "with_result": result}).mappings().first()
    if row is None:
        return None
    unpark(tx, row)
    told(tx, row, "completed")
    return task_of(row)


def fail(
    tx: Tx,
    claim: ClaimId,
    message: str,
    *,
    code: str = "drone_failed",
    retryable: bool = True,
    said: Beat | None = None,
) -> Task:
    """It could not be done: again later, if there are attempts left; else it is dead.

    :raises Conflict: the claim is stale, or completed the task before
    """
    error = {"message": message, "code": code}
    row = _row(tx, claim)
    if _is(row, claim) and _failed_before(row, error):
        return task_of(row)
    _check(tx, row, claim)
    return fell(tx, row, error, retryable=retryable, said=said)


def release(tx: Tx, claim: ClaimId) -> Task:
    """Give it back: it was not begun, and that counts as no attempt.

    :raises Conflict: the claim is stale
    """
    row = _row(tx, claim)
    if _is(row, claim) and row["state"] in (READY, DELAYED, PARKED) and row["status"] == "queued":
        return task_of(row)
    _check(tx, row, claim)
    forget(tx, row)
    if row["cancel_requested"]:
        return _cancelled(tx, row)
    values = {"state": READY, "status": "queued", "attempts": max(0, row["attempts"] - 1)}
    return _end(tx, row, values, "released")


def fell(
    tx: Tx,
    row: Row,
    error: dict[str, Any],
    *,
    retryable: bool = True,
    said: Beat | None = None,
) -> Task:
    """A leased task has failed, by its drone's word or by its silence."""
    if row["cancel_requested"]:
        return _cancelled(tx, row, said)
    if retryable and row["attempts"] < row["max_attempts"]:
        pause = pause_ms(tx, row)
        values = {
            "state": DELAYED,
            "status": "queued",
            "due": tx.now + pause,
            "error": compact(error),
            "progress": None,
        }
        return _end(
            tx, row, values, "retrying", said, attempt=row["attempts"], in_s=pause / MS, error=error
        )
    values = {"state": DONE, "status": "failed", "error": compact(error), "finished_at": tx.now}
    return _end(tx, row, values, "failed", said, error=error)


def pause_ms(tx: Tx, row: Row) -> int:
    """Before the next attempt: doubled each time, up to the most; its upper half is by chance."""
    retry = retry_of(json.loads(row["body"]))
    doubled = retry.backoff_s * 2.0 ** min(row["attempts"] - 1, 40)
    return int(min(doubled, retry.backoff_max_s) * tx.between(0.5, 1.0) * MS)


def _cancelled(tx: Tx, row: Row, said: Beat | None = None) -> Task:
    values = {"state": DONE, "status": "cancelled", "finished_at": tx.now}
    return _end(tx, row, values, "cancelled", said)


def _end(
    tx: Tx,
    row: Row,
    values: dict[str, Any],
    topic: str,
    said: Beat | None = None,
    **data: Any,
) -> Task:
    """The claim ends. Fence and token stay, so that its last call can be known again."""
    values = {"lease_until": None, "updated_at": tx.now, **values}
    if said is not None and said.metadata:
        values["metadata"] = with_metadata(row, said.metadata)
    write(tx, row, values)
    if said is not None:
        _log(tx, row, said.logs)
    if values["state"] == READY:
        tx.made_ready()
    unpark(tx, row)
    after = {**row, **values}
    told(tx, after, topic, **data)
    return task_of(after)


def _row(tx: Tx, claim: ClaimId) -> Row:
    row: Row | None = tx.conn.execute(_TASK, {"id": claim.task}).mappings().first()
    if row is None or claim.fence > row["fence"] or claim.tenant not in (None, row["tenant"]):
        raise unknown(claim.task)
    return row


def _is(row: Row, claim: ClaimId) -> bool:
    """Whether this was the last claim of the task."""
    return bool(row["fence"] == claim.fence and row["token"] == claim.token)


def _check(tx: Tx, row: Row, claim: ClaimId) -> None:
    """:raises Conflict: the claim does not hold, by the database's clock"""
    if not _is(row, claim) or row["state"] != LEASED or row["lease_until"] <= tx.now:
        raise stale(claim.task)


def _held(tx: Tx, claim: ClaimId) -> Row:
    row = _row(tx, claim)
    _check(tx, row, claim)
    return row


def _failed_before(row: Row, error: dict[str, Any]) -> bool:
    """Whether it ended by this call; what a lease that ran out has ended is another thing."""
    if row["state"] == LEASED or row["status"] not in ("queued", "failed", "cancelled"):
        return False
    return bool(row["status"] == "cancelled" or row["error"] == compact(error))


def _log(tx: Tx, row: Row, lines: str | None) -> None:
    if not lines:
        return
    last = tx.conn.execute(_LAST_LINES, {"of": row["id"]}).first()
    if last is not None and tuple(last) == (row["fence"], lines):
        return  # the same heartbeat, sent again
    said = {"task": row["id"], "fence": row["fence"], "at": tx.now, "text": lines}
    tx.conn.execute(_LOG, said)
    oldest = tx.conn.execute(_TOO_OLD, {"of": row["id"]}).scalar()
    if oldest is not None:
        tx.conn.execute(_FORGET_LINES, {"of": row["id"], "oldest": oldest})
