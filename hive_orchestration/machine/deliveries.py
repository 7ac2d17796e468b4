"""Callbacks that are still to be delivered: each task's one after the other.

A queen that delivers one has it for a while, by its ``due``: should she die, another takes it up
then. So one may be delivered twice, and none is lost.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import Select, bindparam, delete, exists, func, select, update

from hive_orchestration.connection import Row
from hive_orchestration.machine.rows import MS
from hive_orchestration.schema import deliveries, logs, tasks
from hive_orchestration.transaction import Tx
from operations.tasks import FINAL, TICKET_TYPES

SDK_STATUSES: Final = {"in_progress": "running", "completed": "succeeded"}
"""What the dispatcher's SDK calls them."""
AT_ONCE: Final = 5000  # values of a statement have their bounds
MOST_BEHIND: Final = 500  # callbacks of one task that wait for one that does not come through
_AFTER_HOST: Final = "/?#"  # and its port, in a URL
_HOST = re.compile(rb"[^:]*://[^/?#]*")

_earlier = deliveries.alias("earlier")
_DUE = (
    select(deliveries)
    .where(
        deliveries.c.due <= bindparam("now"),
        ~exists().where(_earlier.c.task == deliveries.c.task, _earlier.c.seq < deliveries.c.seq),
    )
    .order_by(deliveries.c.due, deliveries.c.seq)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True, of=deliveries)
)
_URL = func.lower(deliveries.c.url)
_NEXT = select(func.min(deliveries.c.due))
_BEHIND = select(func.count()).where(
    deliveries.c.task == bindparam("task"), deliveries.c.seq > bindparam("first")
)
_OLDEST_BEHIND = (
    select(deliveries.c.seq, deliveries.c.body)
    .where(deliveries.c.task == bindparam("task"), deliveries.c.seq > bindparam("first"))
    .order_by(deliveries.c.seq)
    .limit(bindparam("most"))
)
_TASK = select(tasks.c.result, tasks.c.error, tasks.c.metadata, tasks.c.finished_at).where(
    tasks.c.id == bindparam("id")
)
_LAST_WORDS = (
    select(logs.c.text)
    .where(logs.c.task == bindparam("id"), logs.c.at == bindparam("at"))
    .order_by(logs.c.seq.desc())
    .limit(1)
)


class Delivery(NamedTuple):
    """One callback.

    :param attempts: that have failed
    :param until: until when it is this queen's, ms; with ``seq`` what proves it
    """

    seq: int
    task: str
    url: str
    body: dict[str, Any]
    attempts: int
    until: int


def next_s(tx: Tx) -> float | None:
    """Seconds until some may be due, 0 where some are; None where there is none."""
    due = tx.conn.execute(_NEXT).scalar()
    return None if due is None else max(0, due - tx.now) / MS


def take(
    tx: Tx, most: int, lease_s: float, *, of_host: int, at_work: Mapping[str, int]
) -> list[Delivery]:
    """What is due, at most one of each task; nobody else is given it for ``lease_s`` seconds.

    :param of_host: how many callbacks to one host may be on their way
    :param at_work: how many are, by :func:`host_of`; what waits for these is passed by
    """
    until = tx.now + int(lease_s * MS)
    on_way = Counter(at_work)
    full = {host for host, count in on_way.items() if count >= of_host}
    rows: list[Row] = []
    while len(rows) < most:
        due = {"now": tx.now, "most": most - len(rows)}
        found = tx.conn.execute(_due_beside(full), due).mappings().all()
        fit = []
        for row in found:
            host = host_of(row["url"])
            if host not in full:
                fit.append(row)
                on_way[host] += 1
                if on_way[host] >= of_host:
                    full.add(host)
        if fit:
            taken = deliveries.c.seq.in_([row["seq"] for row in fit])
            tx.conn.execute(update(deliveries).where(taken).values(due=until))
        rows += fit
        if not fit or len(fit) == len(found):  # nobody's was passed by, so there is no more
            break
    return [
        Delivery(
            row["seq"],
            row["task"],
            row["url"],
            _told(tx, row["task"], json.loads(row["body"])),
            row["attempts"],
            until,
        )
        for row in rows
    ]


def host_of(url: str) -> str:
    """Scheme, host and port of a URL, as they are written: ``http://example.com:8080``."""
    found = _HOST.match(url.encode(errors="replace").lower())  # ASCII's letters, as SQLite does
    return "" if found is None else found[0].decode()


def _due_beside(hosts: Collection[str]) -> Select[Any]:
    """What is due at other hosts than these."""
    if not hosts:
        return _DUE
    return _DUE.where(
        *(
            func.substr(_URL, 1, len(host) + 1) != f"{host}{mark}"
            for host in sorted(hosts)
            for mark in ("", *_AFTER_HOST)
        )
    )


def delivered(tx: Tx, one: Delivery) -> None:
    """It has come through; the task's next one may follow."""
    tx.conn.execute(delete(deliveries).where(deliveries.c.seq == one.seq))


def failed(tx: Tx, one: Delivery, why: str, pause_s: float) -> None:
    """It is tried again after a pause. Of the progress that piles up behind it the oldest goes."""
    tx.conn.execute(
        update(deliveries)
        .where(deliveries.c.seq == one.seq, deliveries.c.due == one.until)
        .values(attempts=one.attempts + 1, error=why, due=tx.now + int(pause_s * MS))
    )
    behind = tx.conn.execute(_BEHIND, {"task": one.task, "first": one.seq}).scalar()
    if behind > MOST_BEHIND:
        oldest = {"task": one.task, "first": one.seq, "most": min(behind - MOST_BEHIND, AT_ONCE)}
        progress = [
            seq
            for seq, body in tx.conn.execute(_OLDEST_BEHIND, oldest)
            if json.loads(body)["status"] not in FINAL
        ]
        tx.conn.execute(delete(deliveries).where(deliveries.c.seq.in_(progress)))


def given_up(tx: Tx, one: Delivery, tried_s: float) -> None:
    """It is not tried again, and none of this task that has waited as long."""
    before = tx.now - int(tried_s * MS)
    tx.conn.execute(
        delete(deliveries).where(
            deliveries.c.task == one.task,
            (deliveries.c.seq == one.seq)
            | ((deliveries.c.attempts == 0) & (deliveries.c.due <= before)),
        )
    )


def _told(tx: Tx, task: str, body: dict[str, Any]) -> dict[str, Any]:
    """What is said of a task: of one that has ended, also how."""
    if body["status"] in FINAL:
        row = tx.conn.execute(_TASK, {"id": task}).first()
        if row is not None and row["finished_at"] is not None:
            last = tx.conn.execute(_LAST_WORDS, {"id": task, "at": row["finished_at"]}).scalar()
            ended = {
                "result": row["result"] and json.loads(row["result"]),
                "error": row["error"] and json.loads(row["error"]),
                "metadata": json.loads(row["metadata"]),
                "logs": last,
            }
            body = {**body, **{name: value for name, value in ended.items() if value is not None}}
    if body["type"] in TICKET_TYPES:
        body = {**body, "status": SDK_STATUSES.get(body["status"], body["status"])}
    return body
