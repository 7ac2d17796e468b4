"""Tasks moved by those who queued them, or who look after the queue: by hand, without a claim."""

from __future__ import annotations

from typing import Any

from sqlalchemy import bindparam, delete, select

from hive_orchestration.connection import Row
from hive_orchestration.machine.limits import unpark
from hive_orchestration.machine.rows import rank, task_of, told, unknown, with_metadata, write
from hive_orchestration.schema import (
    DELAYED,
    DONE,
    HELD,
    LEASED,
    READY,
    deliveries,
    is_not,
    logs,
    tasks,
)
from hive_orchestration.transaction import Tx
from operations.errors import Conflict
from operations.tasks import FINAL, TRANSITIONS, Task, TaskStatus

_TASK = select(tasks).where(tasks.c.id == bindparam("id"))
_TASK_LOCKED = _TASK.with_for_update()
_UNFINISHED = select(tasks.c.id).where(
    tasks.c.tenant == bindparam("tenant"), tasks.c.unique_key == bindparam("key"), is_not(DONE)
)

_TOPICS: dict[TaskStatus, str] = {"in_progress": "started"}


def move(
    tx: Tx,
    tenant: str | None,
    id: str,
    status: TaskStatus,
    metadata: dict[str, Any] | None = None,
) -> Task:
    """Set the status of a task that nobody holds through a claim. To where it is already: nothing.

    :raises Conflict: it is leased, or what it is cannot become this
    """
    row = find(tx, tenant, id, to_change=True)
    if row["state"] == LEASED:
        raise Conflict(
            f"Task '{id}' is worked on by {row['drone_id']}, who alone may say what becomes of it. "
            "Cancel it, or wait.",
            code="leased",
        )
    values: dict[str, Any] = {"updated_at": tx.now}
    if metadata:
        values["metadata"] = with_metadata(row, metadata)
    if status == row["status"]:
        known = values.get("metadata", row["metadata"]) == row["metadata"]
        return task_of(row) if known else _changed(tx, row, values)
    if status not in TRANSITIONS[row["status"]]:
        following = ", ".join(sorted(TRANSITIONS[row["status"]])) or "nothing"
        raise Conflict(
            f"Task '{id}' is {row['status']}, and cannot become {status}; it can become "
            f"{following}.",
            code="impossible_transition",
            param="status",
        )
    if status == "queued":
        values |= _anew(tx, row)
    else:
        final = status in FINAL
        values |= {
            "state": DONE if final else HELD,
            "status": status,
            "due": None,
            "finished_at": tx.now if final else None,
            "token": None,  # what its last claim has said stands no more
        }
        if status == "in_progress" and row["started_at"] is None:
            values["started_at"] = tx.now
    return _changed(tx, row, values, _TOPICS.get(status, status))


def cancel(tx: Tx, tenant: str | None, id: str) -> Task:
    """Cancel a task; one that is worked on is cancelled as soon as its drone hears of it.

    One that has ended stays as it is.
    """
    row = find(tx, tenant, id, to_change=True)
    if row["state"] == DONE or (row["state"] == LEASED and row["cancel_requested"]):
        return task_of(row)
    if row["state"] == LEASED:
        said = {"cancel_requested": True, "updated_at": tx.now}
        return _changed(tx, row, said, "cancel_requested")
    values: dict[str, Any] = {
        "state": DONE,
        "status": "cancelled",
        "due": None,
        "finished_at": tx.now,
        "updated_at": tx.now,
    }
    return _changed(tx, row, values, "cancelled")


def replay(tx: Tx, tenant: str | None, id: str) -> Task:
    """Queue a task that has failed for good once more, with all of its attempts.

    :raises Conflict: it has not failed
    """
    row = find(tx, tenant, id, to_change=True)
    if row["status"] == "queued":
        return task_of(row)
    if row["status"] != "failed":
        raise Conflict(
            f"Task '{id}' is {row['status']}; only a failed one can be replayed.", code="not_failed"
        )
    return _changed(tx, row, {"updated_at": tx.now, **_anew(tx, row)}, "queued")


def retry_now(tx: Tx, tenant: str | None, id: str) -> Task:
    """Let a task that waits for its next attempt begin at once; replay one that has failed.

    :raises Conflict: it is neither
    """
    row = find(tx, tenant, id, to_change=True)
    if row["state"] == DELAYED:
        values = {"state": READY, "due": None, "updated_at": tx.now}
        return _changed(tx, row, values, "queued")
    if row["status"] not in ("queued", "failed"):
        raise Conflict(
            f"Task '{id}' is {row['status']}. Only one that waits for its next attempt, or has "
            "failed, can be tried again.",
            code="not_failed",
        )
    return replay(tx, tenant, id)


def remove(tx: Tx, tenant: str | None, id: str) -> bool:
    """Delete a task and what belongs to it; False where there is none.

    :raises Conflict: somebody works on it
    """
    row = _row(tx, tenant, id, to_change=True)
    if row is None:
        return False
    if row["state"] == LEASED:
        raise Conflict(
            f"Task '{id}' is worked on by {row['drone_id']}. Cancel it first.", code="leased"
        )
    for table in (logs, deliveries):
        tx.conn.execute(delete(table).where(table.c.task == id))
    tx.conn.execute(delete(tasks).where(tasks.c.seq == row["seq"]))
    if row["state"] == READY:
        unpark(tx, row)
    tx.event("task.deleted", id, row["tenant"], {"type": row["type"], "status": row["status"]})
    return True


def find(tx: Tx, tenant: str | None, id: str, *, to_change: bool = False) -> Row:
    """:raises NotFound: there is none, or it is another tenant's"""
    row = _row(tx, tenant, id, to_change=to_change)
    if row is None:
        raise unknown(id)
    return row


def _row(tx: Tx, tenant: str | None, id: str, *, to_change: bool) -> Row | None:
    row: Row | None = (
        tx.conn.execute(_TASK_LOCKED if to_change else _TASK, {"id": id}).mappings().first()
    )
    return None if row is None or (tenant is not None and row["tenant"] != tenant) else row


def _anew(tx: Tx, row: Row) -> dict[str, Any]:
    """Queued as if it had just come, but for what is known of it.

    :raises Conflict: another one with its uniqueness key was queued since
    """
    if row["state"] == DONE and row["unique_key"] is not None:
        params = {"tenant": row["tenant"], "key": row["unique_key"]}
        other = tx.conn.execute(_UNFINISHED, params).scalar()
        if other is not None:
            raise Conflict(
                f"Task '{other}' has the uniqueness key of task '{row['id']}', and is not "
                "finished. Wait for it, or cancel it.",
                code="not_unique",
            )
    deadline = row["deadline"]
    if deadline is not None and deadline <= tx.now:  # as much time as it had
        deadline = tx.now + (deadline - row["created_at"])
    return {
        "state": READY,
        "status": "queued",
        "attempts": 0,
        "due": None,
        "deadline": deadline,
        "rank": rank(tx.now, row["priority"]),
        "cancel_requested": False,
        "progress": None,
        "finished_at": None,
    }


def _changed(tx: Tx, row: Row, values: dict[str, Any], topic: str | None = None) -> Task:
    write(tx, row, values)
    after = {**row, **values}
    if topic is not None:
        told(tx, after, topic)
    if after["state"] == READY:
        tx.made_ready()
    elif row["state"] == READY:
        unpark(tx, row)
    return task_of(after)
