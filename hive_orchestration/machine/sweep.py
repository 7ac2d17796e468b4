"""What time does: leases run out, pauses and deadlines pass, what is old goes."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import bindparam, delete, exists, func, literal_column, select, update
from sqlalchemy.dialects import postgresql

from hive_orchestration.machine.lease import LOST, fell
from hive_orchestration.machine.limits import unpark
from hive_orchestration.machine.reading import FORGOTTEN
from hive_orchestration.machine.rows import MS, told, write
from hive_orchestration.schema import (
    DELAYED,
    DONE,
    LEASED,
    READY,
    claims,
    deliveries,
    drones,
    events,
    facts,
    is_,
    is_not,
    logs,
    rates,
    tasks,
)
from hive_orchestration.transaction import Tx, compact

AT_ONCE: Final = 500
RETAIN_S: Final = 7 * 86_400.0
MOST_EVENTS: Final = 10_000  # deleted at once
CLAIMS_KEPT_S: Final = 3600.0

WORKED: Final = ("review_pending", "approved")
"""The work is done, and somebody is to decide about it: no deadline takes it away."""

# Only rows that no other transaction has in hand, and these locked.
_MINE: Final[dict[str, Any]] = {"skip_locked": True, "of": tasks}
_DUE = (
    select(tasks.c.seq)
    .where(is_(DELAYED), tasks.c.due <= bindparam("now"))
    .order_by(tasks.c.due)
    .limit(AT_ONCE)
    .with_for_update(**_MINE)
)
_EXPIRED = (
    select(tasks)
    .where(is_(LEASED), tasks.c.lease_until <= bindparam("now"))
    .order_by(tasks.c.lease_until)
    .limit(AT_ONCE)
    .with_for_update(**_MINE)
)
_first_events = (
    select(events.c.seq, events.c.at)
    .where(events.c.seq < select(func.max(events.c.seq)).scalar_subquery())
    .order_by(events.c.seq)
    .limit(MOST_EVENTS)
    .subquery()
)
_OLD_EVENTS = select(func.max(_first_events.c.seq)).where(_first_events.c.at <= bindparam("before"))
_LATE = (
    select(tasks)
    .where(
        tasks.c.deadline.is_not(None),
        is_not(DONE),
        tasks.c.deadline <= bindparam("now"),
        *(tasks.c.status != literal_column(f"'{status}'") for status in WORKED),
    )
    .order_by(tasks.c.deadline)
    .limit(AT_ONCE)
    .with_for_update(**_MINE)
)


def sweep(tx: Tx) -> bool:
    """Do what is due; whether there may be more of it."""
    late = deadlines(tx)
    expired = leases(tx)
    due = promote(tx)
    return AT_ONCE in (late, expired, due)


def promote(tx: Tx) -> int:
    """What was to wait until now may be claimed."""
    due = [seq for (seq,) in tx.conn.execute(_DUE, {"now": tx.now})]
    if due:
        tx.conn.execute(update(tasks).where(tasks.c.seq.in_(due)).values(state=READY, due=None))
        tx.made_ready()
    return len(due)


def leases(tx: Tx) -> int:
    """Whose lease ran out is taken to have failed."""
    expired = tx.conn.execute(_EXPIRED, {"now": tx.now}).mappings().all()
    for row in expired:
        fell(tx, row, {"message": LOST, "code": "lease_expired"})
    return len(expired)


def deadlines(tx: Tx) -> int:
    """What has not been done by its deadline has failed, whoever works on it."""
    late = tx.conn.execute(_LATE, {"now": tx.now}).mappings().all()
    for row in late:
        error = {"message": "It had not ended by its deadline.", "code": "deadline_exceeded"}
        values: dict[str, Any] = {
            "state": DONE,
            "status": "failed",
            "error": compact(error),
            "due": None,
            "lease_until": None,
            "finished_at": tx.now,
            "updated_at": tx.now,
        }
        write(tx, row, values)
        if row["state"] in (LEASED, READY):
            unpark(tx, row)
        told(tx, {**row, **values}, "failed", error=error)
    return len(late)


def retain(tx: Tx, retain_s: float = RETAIN_S) -> int:
    """Delete what ended, or was heard of, longer ago, a part at a time; how many rows that were.

    A task stays as long as a callback of it is still to be delivered, and the last event for ever.
    """
    before = tx.now - int(retain_s * MS)
    old = (
        select(tasks.c.seq, tasks.c.id)
        .where(
            is_(DONE),
            tasks.c.finished_at <= before,
            ~exists().where(deliveries.c.task == tasks.c.id),
        )
        .order_by(tasks.c.finished_at)
        .limit(AT_ONCE)
        .with_for_update(**_MINE)
    )
    found = tx.conn.execute(old).all()
    if found:
        tx.conn.execute(delete(logs).where(logs.c.task.in_([id for _, id in found])))
        tx.conn.execute(delete(tasks).where(tasks.c.seq.in_([seq for seq, _ in found])))
    forgotten = _forget_events(tx, before)
    tx.conn.execute(delete(claims).where(claims.c.at <= tx.now - int(CLAIMS_KEPT_S * MS)))
    tx.conn.execute(delete(drones).where(drones.c.heartbeat_at <= before))
    tx.conn.execute(delete(rates).where(rates.c.tat <= tx.now * 1000))
    return len(found) + forgotten


def _forget_events(tx: Tx, before: int) -> int:
    """The last one stays, for its number is where who follows begins."""
    upto = tx.conn.execute(_OLD_EVENTS, {"before": before}).scalar()
    if upto is None:
        return 0
    # The beginning, without gaps: a clock set back does not leave the earlier ones behind.
    forgotten = tx.conn.execute(delete(events).where(events.c.seq <= upto)).rowcount
    tx.conn.execute(
        postgresql.insert(facts)
        .values(name=FORGOTTEN, value=str(upto))
        .on_conflict_do_update(index_elements=("name",), set_={"value": str(upto)})
    )
    return forgotten
