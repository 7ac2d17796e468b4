"""What tickets of the dispatcher need beside what tasks do: a bound, and callbacks with words."""

from __future__ import annotations

import json
from typing import Final

from sqlalchemy import bindparam, func, literal, select

from hive_orchestration.machine import enqueue, lease
from hive_orchestration.machine.enqueue import Queued, Wanted
from hive_orchestration.machine.rows import ClaimId
from hive_orchestration.schema import READY, is_, lanes, tasks
from hive_orchestration.transaction import Tx
from operations.errors import QueueFull
from operations.tasks import TICKET_TYPES, Beat, Kept

RETRY_AFTER_S: Final = 5.0

_WAITING = select(func.count()).select_from(
    select(tasks.c.seq)
    .where(
        tasks.c.lane.in_(
            select(lanes.c.id).where(
                lanes.c.tenant == bindparam("tenant"),
                lanes.c.type.in_([literal(type) for type in TICKET_TYPES]),
            )
        ),
        is_(READY),
    )
    .limit(bindparam("most"))
    .subquery()
)
_TOLD = select(tasks.c.tenant, tasks.c.type, tasks.c.status, tasks.c.body).where(
    tasks.c.id == bindparam("id")
)


def queue(tx: Tx, tenant: str, wanted: Wanted, most: int) -> tuple[Queued, int]:
    """Queue a ticket, and count those of the tenant that wait, itself among them.

    :param most: that may
    :raises QueueFull: as many wait already
    :raises Conflict: its id came before with another body
    """
    waiting = tx.conn.execute(_WAITING, {"tenant": tenant, "most": most}).scalar()
    # Before anything is written: a refusal after that has all in the transaction run again.
    if waiting >= most and enqueue.there(tx, tenant, wanted.new, {}) is None:
        if wanted.id is not None:
            enqueue.check_id(tx, wanted.id, {})
        raise QueueFull(
            f"{most} tickets wait already, and the queue takes no more. Send it again later, or "
            "start the queen with a larger HIVE_MAX_QUEUE.",
            retry_after=RETRY_AFTER_S,
        )
    [queued] = enqueue.enqueue(tx, tenant, [wanted])
    return queued, waiting + queued.created


def running(tx: Tx, claim: ClaimId, said: Beat, lease_s: float) -> Kept:
    """A heartbeat whose words go on to the ticket's callback.

    :raises Conflict: the claim is stale
    """
    kept = lease.beat(tx, claim, said, lease_s=lease_s)
    row = tx.conn.execute(_TOLD, {"id": claim.task}).one()
    url = json.loads(row["body"]).get("callback_url")
    if url and (said.logs or said.metadata):
        words = said.model_dump(mode="json", include={"logs", "metadata"})
        about = {"jobId": claim.task, "tenant": row["tenant"], "type": row["type"]}
        told = {name: value for name, value in words.items() if value}
        tx.deliver(claim.task, url, {**about, "status": row["status"], **told})
    return kept
