"""Tasks come in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

from sqlalchemy import bindparam, select
from sqlalchemy.dialects import postgresql

from hive_orchestration.connection import Row
from hive_orchestration.machine.rows import MS, body_of, bounded, new_id, rank, task_of
from hive_orchestration.schema import DELAYED, DONE, READY, is_not, lanes, tasks
from hive_orchestration.transaction import LaneKey, Tx, compact
from operations.errors import Conflict, NotFound
from operations.tasks import NewTask, Task

# What the table gives a new row, which is not read back.
_BLANK: Final[dict[str, Any]] = {
    **dict.fromkeys(column.name for column in tasks.columns if column.name != "seq"),
    "attempts": 0,
    "fence": 0,
    "cancel_requested": False,
}
_LANE = select(lanes.c.id).where(
    lanes.c.tenant == bindparam("tenant"),
    lanes.c.type == bindparam("type"),
    lanes.c.role == bindparam("role"),
    lanes.c.capabilities == bindparam("capabilities"),
)
_BY_IDEMPOTENCY = select(tasks).where(
    tasks.c.tenant == bindparam("tenant"), tasks.c.idempotency_key == bindparam("key")
)
_BY_ID = select(tasks.c.id).where(tasks.c.id == bindparam("id"))
_BY_UNIQUENESS = select(tasks).where(
    tasks.c.tenant == bindparam("tenant"),
    tasks.c.unique_key == bindparam("key"),
    is_not(DONE),
)
_PARENT = select(tasks.c.id).where(
    tasks.c.id == bindparam("id"), tasks.c.tenant == bindparam("tenant")
)
_NEW_LANE = postgresql.insert(lanes).on_conflict_do_nothing()


class Wanted(NamedTuple):
    """A task that is to be queued.

    :param secrets: encrypted
    :param id: that somebody has chosen; otherwise it is made here
    """

    new: NewTask
    secrets: str | None = None
    id: str | None = None


class Queued:
    """What became of a wish for a task.

    :ivar created: False where it was there already
    """

    def __init__(self, row: Row, created: bool) -> None:
        self._row = row
        self.created = created

    @property
    def id(self) -> str:
        return str(self._row["id"])

    @cached_property
    def task(self) -> Task:
        """Made when it is asked for: of many that are queued at once, nobody asks."""
        return task_of({**_BLANK, **self._row})


def enqueue(tx: Tx, tenant: str, wanted: Sequence[Wanted]) -> list[Queued]:
    """Queue tasks, all of them or none.

    :raises Conflict: the same idempotency key came with another body before
    :raises NotFound: there is no such parent
    """
    said: list[Queued] = []
    made: dict[str, dict[str, Any]] = {}
    for one in wanted:
        new = one.new
        found = there(tx, tenant, new, made)
        if found is None:
            if new.parent is not None and new.parent not in made:
                _check_parent(tx, tenant, new.parent)
            if one.id is not None:
                check_id(tx, one.id, made)
            row = _row(tx, tenant, one)
            made[row["id"]] = row
            found = Queued(row, True)
        said.append(found)
    if made:
        for row in made.values():
            tx.queue(row)
        tx.made_ready()
    return said


def check_id(tx: Tx, id: str, made: dict[str, dict[str, Any]]) -> None:
    if id in made or tx.conn.execute(_BY_ID, {"id": id}).first() is not None:
        raise Conflict(
            f"There is a task '{id}' already. Choose another id.", code="not_unique", param="id"
        )


def _check_parent(tx: Tx, tenant: str, id: str) -> None:
    if tx.conn.execute(_PARENT, {"id": id, "tenant": tenant}).first() is None:
        raise NotFound(
            f"There is no task '{id}' to be the parent. Queue that first.",
            code="no_task",
            param="parent",
        )


def there(tx: Tx, tenant: str, new: NewTask, made: dict[str, dict[str, Any]]) -> Queued | None:
    """The task that a key stands for already, be it one that is made in the same call."""
    if (key := new.idempotency_key) is not None:
        for row in made.values():
            if row["idempotency_key"] == key:
                return _same(row, new)
        found = tx.conn.execute(_BY_IDEMPOTENCY, {"tenant": tenant, "key": key}).mappings().first()
        if found is not None:
            return _same(found, new)
    if (key := new.unique_key) is not None:
        for row in made.values():
            if row["unique_key"] == key:
                return Queued(row, False)
        found = tx.conn.execute(_BY_UNIQUENESS, {"tenant": tenant, "key": key}).mappings().first()
        if found is not None:
            return Queued(found, False)
    return None


def _same(found: Row, new: NewTask) -> Queued:
    if found["digest"] != digest_of(new):
        raise Conflict(
            f"The key '{new.idempotency_key}' came before with another body. Send another key for "
            "another task.",
            code="idempotency_conflict",
            param="idempotency_key",
        )
    return Queued(found, False)


def digest_of(new: NewTask) -> str:
    """SHA-256 of what a task asks for, in hex, in whatever order that was written."""
    said = json.dumps(new.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _row(tx: Tx, tenant: str, one: Wanted) -> dict[str, Any]:
    new = one.new
    delayed = new.not_before > 0
    return {
        "id": one.id or new_id(tx.now),
        "tenant": tenant,
        "lane": _lane(tx, tenant, new),
        "type": new.type,
        "role": new.role,
        "title": new.title or new.type,
        "state": DELAYED if delayed else READY,
        "status": "queued",
        "priority": new.priority,
        "rank": rank(tx.now, new.priority),
        "due": tx.now + int(new.not_before * MS) if delayed else None,
        "deadline": None if new.deadline is None else tx.now + int(new.deadline * MS),
        "max_attempts": new.retry.attempts,
        "lease_ms": int(new.lease_s * MS),
        "concurrency_key": new.concurrency and new.concurrency.key,
        "concurrency_limit": new.concurrency and new.concurrency.limit,
        "idempotency_key": new.idempotency_key,
        "digest": digest_of(new) if new.idempotency_key is not None else None,
        "unique_key": new.unique_key,
        "parent": new.parent,
        "created_at": tx.now,
        "updated_at": tx.now,
        "body": bounded("payload", compact(body_of(new))),
        "metadata": bounded("metadata", compact(new.metadata)),
        "secrets": one.secrets,
    }


def _lane(tx: Tx, tenant: str, new: NewTask) -> int:
    wanted = compact(sorted(set(new.capabilities))) if new.capabilities else "[]"
    key: LaneKey = (tenant, new.type, new.role, wanted)
    if (known := tx.lane(key)) is not None:
        return known
    values = dict(zip(("tenant", "type", "role", "capabilities"), key, strict=True))
    found = tx.conn.execute(_LANE, values).scalar()
    if found is None:
        tx.conn.execute(_NEW_LANE, values)
        found = tx.conn.execute(_LANE, values).scalar()
    tx.lanes[key] = int(found)
    return int(found)
