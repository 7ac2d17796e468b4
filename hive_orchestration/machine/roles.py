"""Roles can be paused: what is queued for them is given to nobody, what is begun goes on."""

from __future__ import annotations

from sqlalchemy import delete, insert, select

from hive_orchestration.schema import pauses
from hive_orchestration.transaction import Tx

CLUSTER = ""  # the tenant of events that are nobody's own


def pause(tx: Tx, role: str) -> bool:
    """False where it was paused already."""
    if tx.conn.execute(select(pauses.c.role).where(pauses.c.role == role)).first() is not None:
        return False
    tx.conn.execute(insert(pauses), {"role": role, "at": tx.now})
    tx.open_lanes.clear()
    tx.event("role.paused", role, CLUSTER, {})
    return True


def resume(tx: Tx, role: str) -> bool:
    """False where it was not paused."""
    done = tx.conn.execute(delete(pauses).where(pauses.c.role == role))
    if not done.rowcount:
        return False
    tx.made_ready()
    tx.event("role.resumed", role, CLUSTER, {})
    return True
