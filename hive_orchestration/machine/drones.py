"""Who works through tasks: what drones say of themselves."""

from __future__ import annotations

import json
from typing import Any, Final

from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql

from hive_orchestration.connection import Row
from hive_orchestration.machine.rows import MS
from hive_orchestration.schema import drones
from hive_orchestration.transaction import Tx, compact
from operations.errors import NotFound
from operations.tasks import Drone, DroneStatus, NewDrone

SILENT_S: Final = 600.0  # a drone that says nothing for so long is no active one
MOST: Final = 1000


def register(tx: Tx, tenant: str, new: NewDrone) -> Drone:
    """Known from now on, or described anew."""
    known = _row(tx, tenant, new.id)
    said: dict[str, Any] = {
        "role": new.role,
        "capabilities": compact(sorted(set(new.capabilities))),
        "status": "active",
        "metadata": compact(new.metadata),
        "heartbeat_at": tx.now,
    }
    tx.conn.execute(
        postgresql.insert(drones)
        .values(tenant=tenant, id=new.id, registered_at=tx.now, **said)
        .on_conflict_do_update(index_elements=("tenant", "id"), set_=said)
    )
    if known is None:
        tx.event("drone.joined", new.id, tenant, {"role": new.role})
    return get(tx, tenant, new.id)


def heard(tx: Tx, tenant: str | None, id: str, status: DroneStatus | None = None) -> Drone:
    """It lives. :raises NotFound: it is not registered"""
    drone = get(tx, tenant, id)
    values: dict[str, Any] = {"heartbeat_at": tx.now}
    if status is not None:
        values["status"] = status
    tx.conn.execute(
        update(drones).where(drones.c.tenant == drone.tenant, drones.c.id == id).values(values)
    )
    if status is not None and status != drone.status:
        tx.event(f"drone.{status}", id, drone.tenant, {"role": drone.role})
    return get(tx, drone.tenant, id)


def get(tx: Tx, tenant: str | None, id: str) -> Drone:
    """:raises NotFound: it is not registered"""
    row = _row(tx, tenant, id)
    if row is None:
        raise NotFound(f"There is no drone '{id}'. Register it: POST /v1/drones.", code="no_drone")
    return _drone(row)


def listing(
    tx: Tx, tenant: str | None, role: str | None = None, *, active: bool = False
) -> list[Drone]:
    """Those that are registered; ``active``: that call themselves so and were heard of lately."""
    statement = select(drones).order_by(drones.c.tenant, drones.c.id).limit(MOST)
    if tenant is not None:
        statement = statement.where(drones.c.tenant == tenant)
    if role is not None:
        statement = statement.where(drones.c.role == role)
    if active:
        since = tx.now - int(SILENT_S * MS)
        statement = statement.where(drones.c.status == "active", drones.c.heartbeat_at > since)
    return [_drone(row) for row in tx.conn.execute(statement)]


def unregister(tx: Tx, tenant: str | None, id: str) -> bool:
    """False where it was not registered. What it has claimed it keeps."""
    row = _row(tx, tenant, id)
    if row is None:
        return False
    tx.conn.execute(
        delete(drones).where(drones.c.tenant == row["tenant"], drones.c.id == row["id"])
    )
    tx.event("drone.left", id, row["tenant"], {"role": row["role"]})
    return True


def _row(tx: Tx, tenant: str | None, id: str) -> Row | None:
    statement = select(drones).where(drones.c.id == id).order_by(drones.c.tenant).limit(1)
    if tenant is not None:
        statement = statement.where(drones.c.tenant == tenant)
    row: Row | None = tx.conn.execute(statement).first()
    return row


def _drone(row: Row) -> Drone:
    return Drone(
        id=row["id"],
        tenant=row["tenant"],
        role=row["role"],
        capabilities=tuple(json.loads(row["capabilities"])),
        status=row["status"],
        metadata=json.loads(row["metadata"]),
        registered_at=row["registered_at"] / MS,
        heartbeat_at=row["heartbeat_at"] / MS,
    )
