"""What a queen needs for the tasks that she runs herself."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import bindparam, exists, select, update

from hive_orchestration.machine import lease
from hive_orchestration.machine.rows import MS, ClaimId
from hive_orchestration.schema import DELAYED, READY, is_, lanes, tasks
from hive_orchestration.transaction import Tx, compact
from operations.tasks import Task

_READY: Final = (
    select(lanes.c.id)
    .where(
        lanes.c.type == bindparam("type"), exists().where(tasks.c.lane == lanes.c.id, is_(READY))
    )
    .limit(1)
)


def any_ready(tx: Tx, type: str) -> bool:
    """Whether there may be something to claim; costs less than a claim."""
    return tx.conn.execute(_READY, {"type": type}).first() is not None


def put_off(tx: Tx, claim: ClaimId, pause_s: float, error: dict[str, Any]) -> Task:
    """Give a claimed task back for a while; as a release, that counts as no attempt.

    :param error: what is missing, for people to see
    :raises Conflict: the claim is stale
    """
    task = lease.release(tx, claim)
    tx.conn.execute(
        update(tasks)
        .where(tasks.c.id == claim.task, is_(READY), tasks.c.fence == claim.fence)
        .values(state=DELAYED, due=tx.now + int(pause_s * MS), error=compact(error))
    )
    return task
