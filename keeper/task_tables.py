"""What the queue tells, as tables. Pure: models in, rows of text out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from keeper import words
from keeper.output import Column, Fields, Table
from operations.tasks import Drone, QueueEvent, RoleInfo, Task

NO_ROLE = "(none)"
TOPIC_WIDTH = 19  # "task.review_pending"


def tasks(found: Sequence[Task]) -> Table:
    now = time.time()
    return Table(
        [
            Column("TASK", "id"),
            Column("STATUS", "state"),
            Column("PRIO", "number", if_differs=True),
            Column("AGE", "number"),
            Column("WHAT"),
        ],
        [
            [
                task.id,
                task.status,
                str(task.priority),
                words.age(now - task.created_at),
                _what(task),
            ]
            for task in found
        ],
        "No such tasks. Queue one with 'hive tasks add TYPE'.",
    )


def task(found: Task) -> Fields:
    now = time.time()
    return Fields(
        [
            ("task", found.id),
            ("status", found.status),
            ("cancel", "asked for" if found.cancel_requested else ""),
            ("type", found.type),
            ("title", found.title if found.title != found.type else ""),
            ("description", found.description),
            ("role", found.role),
            ("needs", ", ".join(found.capabilities)),
            ("tags", ", ".join(found.tags)),
            ("tenant", found.tenant),
            ("priority", str(found.priority)),
            ("attempts", f"{found.attempts} of {found.max_attempts}"),
            ("progress", "" if found.progress is None else f"{found.progress:.0%}"),
            ("drone", found.drone_id or ""),
            ("lease", _left(found.lease_until, now)),
            ("begins", _left(found.not_before, now)),
            ("deadline", _left(found.deadline, now)),
            ("payload", _json(found.payload)),
            ("metadata", _json(found.metadata)),
            ("result", "" if found.result is None else json.dumps(found.result)),
            ("error", _error(found.error)),
            ("key", found.idempotency_key or ""),
            ("unique", found.unique_key or ""),
            ("parent", found.parent or ""),
            ("callback", found.callback_url or ""),
            ("queued", _ago(found.created_at, now)),
            ("started", _ago(found.started_at, now)),
            ("ended", _ago(found.finished_at, now)),
        ]
    )


def roles(found: Sequence[RoleInfo]) -> Table:
    return Table(
        [
            Column("ROLE", "id"),
            Column("STATE", "state"),
            Column("QUEUED", "number"),
            Column("DELAYED", "number"),
            Column("AT WORK", "number"),
            Column("OLDEST", "number"),
        ],
        [
            [
                role.role or NO_ROLE,
                "paused" if role.paused else "open",
                str(role.queued),
                str(role.delayed),
                str(role.leased),
                "" if role.oldest_s is None else words.age(role.oldest_s),
            ]
            for role in found
        ],
        "Nothing waits, nothing is worked on, and no role is paused.",
    )


def drones(found: Sequence[Drone]) -> Table:
    now = time.time()
    return Table(
        [
            Column("DRONE", "id"),
            Column("ROLE"),
            Column("STATUS", "state"),
            Column("HEARD", "number"),
            Column("TENANT", if_differs=True),
            Column("CAN"),
        ],
        [
            [
                drone.id,
                drone.role,
                drone.status,
                words.age(now - drone.heartbeat_at),
                drone.tenant,
                ", ".join(drone.capabilities),
            ]
            for drone in found
        ],
        "No drones have registered. Tasks may be claimed without; 'hive tasks ls' shows them.",
    )


def event(found: QueueEvent) -> str:
    """One line: number, time here, topic, subject, and what is said of it."""
    at = datetime.fromtimestamp(found.at).strftime("%H:%M:%S")
    said = {k: v for k, v in found.data.items() if k not in ("type", "status")}
    more = [str(found.data.get("type", "")), *(f"{k}={_bare(v)}" for k, v in said.items())]
    head = f"{found.seq} {at} {found.topic:<{TOPIC_WIDTH}} {found.subject}"
    return " ".join([head, *filter(None, more)])


def _what(task: Task) -> str:
    """Type, title where it says more, and role."""
    title = f": {task.title}" if task.title != task.type else ""
    role = f" ({task.role})" if task.role else ""
    return f"{task.type}{title}{role}"


def _left(until: float | None, now: float) -> str:
    if until is None:
        return ""
    if until < now:
        return f"{words.age(now - until)} ago"
    return f"in {words.duration(until - now)}"


def _ago(at: float | None, now: float) -> str:
    return "" if at is None else f"{words.age(now - at)} ago"


def _error(error: dict[str, Any] | None) -> str:
    return "" if error is None else f"{error.get('message', '')} ({error.get('code', '?')})"


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
