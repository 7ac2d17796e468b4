"""What can be looked at."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

from sqlalchemy import func, literal_column, or_, select

from hive_orchestration.machine.moves import find
from hive_orchestration.machine.rows import MS, task_of
from hive_orchestration.schema import (
    DELAYED,
    DONE,
    LEASED,
    NOT_DONE_WELL,
    PARKED,
    READY,
    events,
    facts,
    is_,
    is_not,
    logs,
    pauses,
    tasks,
)
from hive_orchestration.transaction import Tx
from operations.errors import Gone, InvalidRequest
from operations.tasks import FINAL, EventPage, QueueEvent, RoleInfo, Task, TaskPage, TaskStatus

MOST: Final = 1000
MOST_PAGE: Final = 16 * 1024 * 1024  # characters; a page of large tasks, or logs, ends before
FORGOTTEN: Final = "events_forgotten"  # the number of the last event that was deleted

# Counting a column of the partial index has SQLite use that, not a whole larger one.
_HOW_MANY_WAIT = select(func.count(tasks.c.rank)).where(literal_column("status = 'queued'"))
_SIZE = (
    func.length(tasks.c.body)
    + func.length(tasks.c.metadata)
    + func.coalesce(func.length(tasks.c.result), 0)
    + func.coalesce(func.length(tasks.c.error), 0)
)
_FORGOTTEN = select(facts.c.value).where(facts.c.name == FORGOTTEN)
_LAST = select(func.max(events.c.seq))


def get(tx: Tx, tenant: str | None, id: str) -> Task:
    """:raises NotFound: there is none, or it is another tenant's"""
    return task_of(find(tx, tenant, id))


def page(
    tx: Tx,
    tenant: str | None,
    *,
    statuses: Sequence[TaskStatus] = (),
    type: str | None = None,
    role: str | None = None,
    parent: str | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> TaskPage:
    """Tasks that fit, the newest first; fewer than ``limit`` where they are large.

    :raises InvalidRequest: the cursor is none
    """
    limit = max(1, min(limit, MOST))
    statement = select(tasks).order_by(tasks.c.seq.desc()).limit(limit + 1)
    if tenant is not None:
        statement = statement.where(tasks.c.tenant == tenant)
    if statuses:
        statement = statement.where(tasks.c.status.in_(statuses))
        if FINAL.isdisjoint(statuses):
            statement = statement.where(is_not(DONE))
        elif {"failed", "cancelled"}.issuperset(statuses):
            statement = statement.where(literal_column(NOT_DONE_WELL))
    for column, value in ((tasks.c.type, type), (tasks.c.role, role), (tasks.c.parent, parent)):
        if value is not None:
            statement = statement.where(column == value)
    if cursor is not None:
        if not cursor.isdecimal() or len(cursor) > 18:
            raise InvalidRequest(
                "This is no cursor. Send the 'next' of the page before.", param="cursor"
            )
        statement = statement.where(tasks.c.seq < int(cursor))
    sizes = tx.conn.execute(statement.with_only_columns(_SIZE)).scalars()
    rows = tx.conn.execute(statement.limit(_fit(sizes[:limit]))).mappings().all()
    more = 0 < len(rows) < len(sizes)
    return TaskPage(
        tasks=tuple(task_of(row) for row in rows), next=str(rows[-1]["seq"]) if more else None
    )


def waiting(tx: Tx, tenant: str | None, *, type: str | None = None, limit: int = 10) -> list[Task]:
    """What is queued, in the order in which it would be given out but for the tenants' turns: what
    may not be begun yet comes last, the first that will be before the others.

    Fewer than ``limit`` where they are large.
    """
    limit = max(1, min(limit, MOST))
    queued = select(tasks).where(literal_column("status = 'queued'")).limit(limit)  # as the index
    if tenant is not None:
        queued = queued.where(tasks.c.tenant == tenant)
    if type is not None:
        queued = queued.where(tasks.c.type == type)
    now = queued.where(is_not(DELAYED)).order_by(tasks.c.rank, tasks.c.seq)
    later = queued.where(is_(DELAYED)).order_by(tasks.c.due, tasks.c.seq)
    sizes: list[int] = []
    for part in (now, later):
        sizes += tx.conn.execute(part.with_only_columns(_SIZE)).scalars()
    fit = _fit(sizes[:limit])
    rows = [*tx.conn.execute(now.limit(fit))]
    rows += tx.conn.execute(later.limit(fit - len(rows)))
    return [task_of(row) for row in rows]


def how_many_wait(tx: Tx) -> int:
    """What is queued, of all tenants."""
    return int(tx.conn.execute(_HOW_MANY_WAIT).scalar())


def lines(tx: Tx, tenant: str | None, id: str) -> list[dict[str, Any]]:
    """What a task's drones have logged: attempt's number, time, text; of much, the newest.

    :raises NotFound: there is no such task
    """
    find(tx, tenant, id)
    statement = select(logs).where(logs.c.task == id).order_by(logs.c.seq.desc())
    sizes = tx.conn.execute(statement.with_only_columns(func.length(logs.c.text))).scalars()
    found = tx.conn.execute(statement.limit(_fit(sizes))).all()
    return [
        {"claim": row["fence"], "at": row["at"] / MS, "text": row["text"]}
        for row in reversed(found)
    ]


def _fit(sizes: Sequence[int]) -> int:
    """How many of these, but one at least, a page has room for."""
    return max(1, bisect_right(list(accumulate(sizes)), MOST_PAGE))


def happened(
    tx: Tx, tenant: str | None, after: int, topics: Sequence[str] = (), limit: int = 500
) -> tuple[list[QueueEvent], int]:
    """Events after a place, in the order in which they were committed; and the place after them.

    :param topics: exact ones, and beginnings as ``task.*``; none: all
    :raises Gone: what came after that place is not kept any more
    """
    last = bounds(tx)[1]
    after = max(0, after)
    if after >= last:
        return [], after
    statement = (
        select(events)
        .where(events.c.seq > after, events.c.seq <= last)
        .order_by(events.c.seq)
        .limit(limit)
    )
    if tenant is not None:
        statement = statement.where(events.c.tenant == tenant)
    if topics and "*" not in topics:
        statement = statement.where(
            or_(
                *(
                    events.c.topic.startswith(topic[:-1], autoescape=True)
                    if topic.endswith("*")
                    else events.c.topic == topic
                    for topic in topics
                )
            )
        )
    found = [
        QueueEvent(
            seq=row["seq"],
            topic=row["topic"],
            subject=row["subject"],
            tenant=row["tenant"],
            at=row["at"] / MS,
            data=json.loads(row["data"]),
        )
        for row in tx.conn.execute(statement)
    ]
    if after < bounds(tx)[0]:  # looked at last: some may have gone meanwhile
        raise _gone(after)
    return found, found[-1].seq if len(found) == limit else last


def past(tx: Tx, tenant: str | None, after: int, topics: Sequence[str] = ()) -> EventPage:
    """What has happened after a place. Raises as :func:`place`."""
    found, following = happened(tx, tenant, place(tx, after), topics)
    return EventPage(events=tuple(found), next=following, last=bounds(tx)[1])


def place(tx: Tx, after: int | None) -> int:
    """Where a reader of events begins.

    :param after: the number of an event; 0: with the first that is kept, None: from now on
    :raises Gone: what came after that is not kept any more, or there was none of this number
    """
    forgotten, last = bounds(tx)
    if after is None:
        return last
    if after and not forgotten <= after <= last:
        raise _gone(after)
    return after or forgotten


def bounds(tx: Tx) -> tuple[int, int]:
    """The numbers of the last event that is kept no more, and of the last one; 0: there is none."""
    forgotten = tx.conn.execute(_FORGOTTEN).scalar()
    last = tx.conn.execute(_LAST).scalar()
    return int(forgotten or 0), last or 0


def _gone(after: int) -> Gone:
    return Gone(
        f"The events after {after} are not kept, or there was none of this number. Begin without "
        "a place, or with after=0.",
        param="after",
    )


def roles(tx: Tx, tenant: str | None) -> list[RoleInfo]:
    """What waits and runs in each role that has something, or is paused."""
    paused = set(tx.conn.execute(select(pauses.c.role)).scalars())
    statement = (
        select(tasks.c.role, tasks.c.state, func.count(), func.min(tasks.c.created_at))
        .where(is_not(DONE), tasks.c.state.in_((READY, DELAYED, PARKED, LEASED)))
        .group_by(tasks.c.role, tasks.c.state)
    )
    if tenant is not None:
        statement = statement.where(tasks.c.tenant == tenant)
    counted: dict[str, dict[str, int]] = {role: {} for role in paused}
    oldest: dict[str, int] = {}
    for role, state, count, first in tx.conn.execute(statement):
        counted.setdefault(role, {})[state] = count
        if state != LEASED:
            oldest[role] = min(first, oldest.get(role, first))
    return [
        RoleInfo(
            role=role,
            paused=role in paused,
            queued=counts.get(READY, 0) + counts.get(PARKED, 0),
            delayed=counts.get(DELAYED, 0),
            leased=counts.get(LEASED, 0),
            oldest_s=(tx.now - oldest[role]) / MS if role in oldest else None,
        )
        for role, counts in sorted(counted.items())
    ]
