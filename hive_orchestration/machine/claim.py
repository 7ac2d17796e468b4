"""Tasks are given out: who is served next, and what with.

Tenants take turns: whoever waited longest for one is served first, however much another has queued.
Within a tenant the task of the least rank comes first (priority and waiting time in one), and of
those the one that came first.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import RowMapping, bindparam, exists, func, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from hive_orchestration.machine.rows import MS, ClaimId, new_token, task_of, told
from hive_orchestration.schema import (
    DELAYED,
    LEASED,
    PARKED,
    READY,
    claims,
    lanes,
    pauses,
    rates,
    tasks,
    turns,
)
from hive_orchestration.transaction import Tx
from operations.tasks import ClaimRequest, RateLimit, Task

US: Final = 1000  # in a ms
MOST_PUT_ASIDE: Final = 200  # tasks that a claim finds not to be due yet, before it gives up

_LANES = select(lanes.c.id, lanes.c.tenant, lanes.c.type, lanes.c.capabilities).where(
    lanes.c.role.in_((bindparam("role"), "")),
    exists().where(tasks.c.lane == lanes.c.id, tasks.c.state == READY),
    ~exists().where(pauses.c.role == lanes.c.role),
)
_LANES_OF = _LANES.where(lanes.c.tenant == bindparam("tenant"))
_FIRST = (
    select(tasks)
    .where(tasks.c.lane == bindparam("lane"), tasks.c.state == READY)
    .order_by(tasks.c.rank, tasks.c.seq)
    .limit(bindparam("most"))
)
_FIRST_LOCKED = _FIRST.with_for_update(skip_locked=True)
_TURNS = select(turns.c.tenant, turns.c.served)
_AT_WORK = select(func.count()).where(
    tasks.c.tenant == bindparam("tenant"),
    tasks.c.concurrency_key == bindparam("key"),
    tasks.c.state == LEASED,
)
_RATE = select(rates.c.tat).where(
    rates.c.tenant == bindparam("tenant"), rates.c.key == bindparam("key")
)
_PARK = update(tasks).where(tasks.c.seq == bindparam("of")).values(state=PARKED)
_PUT_OFF = (
    update(tasks)
    .where(tasks.c.seq == bindparam("of"))
    .values(state=DELAYED, due=bindparam("until"))
)
_LEASE = (
    update(tasks)
    .where(tasks.c.seq == bindparam("of"))
    .values(
        state=LEASED,
        status="assigned",
        attempts=tasks.c.attempts + 1,
        fence=tasks.c.fence + 1,
        token=bindparam("by"),
        drone_id=bindparam("drone"),
        lease_until=bindparam("until"),
        due=None,
        started_at=func.coalesce(tasks.c.started_at, bindparam("now")),
        updated_at=bindparam("now"),
    )
)
_KNOWN = select(claims.c.token).where(
    claims.c.drone_id == bindparam("drone_id"), claims.c.key == bindparam("key")
)
_OF_CLAIM = select(tasks).where(tasks.c.token == bindparam("by"), tasks.c.state == LEASED)


class Given(NamedTuple):
    """A task that was given out.

    :param secrets: encrypted
    """

    claim_id: ClaimId
    task: Task
    secrets: str | None
    lease_s: float


def claim(tx: Tx, tenant: str | None, request: ClaimRequest) -> list[Given]:
    """Give out what there is, ``n`` tasks at most.

    :param tenant: only this one's tasks; None: everybody's
    """
    token = new_token()
    if request.key is not None:
        known = tx.conn.execute(_KNOWN, {"drone_id": request.drone_id, "key": request.key}).scalar()
        if known is not None:
            rows = tx.conn.execute(_OF_CLAIM, {"by": known}).mappings().all()
            return [_given(row, row["lease_until"] - tx.now) for row in rows]
    given: list[Given] = []
    for row in _due(tx, tenant, request):
        lease_ms = row["lease_ms"] if request.lease_s is None else int(request.lease_s * MS)
        tx.conn.execute(
            _LEASE,
            {
                "of": row["seq"],
                "by": token,
                "drone": request.drone_id,
                "until": tx.now + lease_ms,
                "now": tx.now,
            },
        )
        taken: dict[str, Any] = {
            **row,
            "state": LEASED,
            "status": "assigned",
            "attempts": row["attempts"] + 1,
            "fence": row["fence"] + 1,
            "token": token,
            "drone_id": request.drone_id,
            "lease_until": tx.now + lease_ms,
            "due": None,
            "started_at": row["started_at"] or tx.now,
            "updated_at": tx.now,
        }
        told(tx, taken, "assigned", drone_id=request.drone_id, attempt=taken["attempts"])
        given.append(_given(taken, lease_ms))  # type: ignore[arg-type]
        if len(given) == request.n:
            break
    if given and request.key is not None:
        said = {"drone_id": request.drone_id, "key": request.key, "token": token, "at": tx.now}
        tx.conn.execute(insert(claims), said)
    return given


def _given(row: RowMapping, lease_ms: int) -> Given:
    id = ClaimId(row["id"], row["fence"], row["token"])
    return Given(id, task_of(row), row["secrets"], lease_ms / MS)


def _due(tx: Tx, tenant: str | None, request: ClaimRequest) -> Iterator[RowMapping]:
    """Tasks that may be begun now, in the order in which they are to be given out."""
    waiting = _waiting(tx, tenant, request)
    served = dict(tx.conn.execute(_TURNS).tuples().all()) if len(waiting) > 1 else {}
    turn = sorted(waiting, key=lambda of: (served.get(of, 0), of))
    queues = {of: _of_tenant(tx, waiting[of], request.n) for of in turn}
    last = max(served.values(), default=0)
    aside = 0
    while queues:
        for of in turn:
            if of not in queues:
                continue
            for row in queues[of]:
                if _may_begin(tx, row):
                    if len(waiting) > 1:
                        last += 1
                        _has_had(tx, of, last)
                    yield row
                    break
                aside += 1
                if aside >= MOST_PUT_ASIDE:
                    tx.ready = True  # there may be others behind them
                    return
            else:
                del queues[of]


def _waiting(tx: Tx, tenant: str | None, request: ClaimRequest) -> dict[str, list[int]]:
    """By tenant, the lanes that this claim may take from and that have something."""
    params: dict[str, Any] = {"role": request.role}
    if tenant is not None:
        params["tenant"] = tenant
    able = frozenset(request.capabilities)
    found: dict[str, list[int]] = defaultdict(list)
    for id, of, type, capabilities in tx.conn.execute(
        _LANES if tenant is None else _LANES_OF, params
    ):
        wanted = not request.types or type in request.types
        if wanted and able.issuperset(json.loads(capabilities)):
            found[of].append(id)
    return found


def _of_tenant(tx: Tx, lanes: Sequence[int], most: int) -> Iterator[RowMapping]:
    """What one tenant has ready, the first first."""
    first = _FIRST_LOCKED if tx.postgres else _FIRST
    while True:
        rows = [
            row
            for lane in lanes
            for row in tx.conn.execute(first, {"lane": lane, "most": most}).mappings()
        ]
        if not rows:
            return
        # No more than this many are known to be the first of all lanes.
        yield from sorted(rows, key=lambda row: (row["rank"], row["seq"]))[:most]


def _has_had(tx: Tx, tenant: str, number: int) -> None:
    dialect = postgresql if tx.postgres else sqlite
    tx.conn.execute(
        dialect.insert(turns)
        .values(tenant=tenant, served=number)
        .on_conflict_do_update(index_elements=("tenant",), set_={"served": number})
    )


def _may_begin(tx: Tx, row: RowMapping) -> bool:
    """Whether its limits let a task begin now; otherwise it is put aside until they do."""
    if row["concurrency_key"] is not None:
        lock(tx, row["tenant"], row["concurrency_key"])
        key = {"tenant": row["tenant"], "key": row["concurrency_key"]}
        if tx.conn.execute(_AT_WORK, key).scalar_one() >= row["concurrency_limit"]:
            tx.conn.execute(_PARK, {"of": row["seq"]})
            return False
    rate = json.loads(row["body"]).get("rate")
    if rate is not None:
        until = _next_at(tx, row["tenant"], RateLimit.model_validate(rate))
        if until is not None:
            tx.conn.execute(_PUT_OFF, {"of": row["seq"], "until": until})
            return False
    return True


def _next_at(tx: Tx, tenant: str, rate: RateLimit) -> int | None:
    """Count one begin, and return None; or when the next may be, ms.

    The generic cell rate algorithm (ITU-T I.371): a burst of ``limit``, then one each
    ``per_s / limit``.
    """
    lock(tx, tenant, rate.key)
    now = tx.now * US
    each = int(rate.per_s * MS * US / rate.limit)
    key = {"tenant": tenant, "key": rate.key}
    tat = max(tx.conn.execute(_RATE, key).scalar() or 0, now)
    first = tat - each * (rate.limit - 1)
    if first > now:
        return -(-first // US)
    dialect = postgresql if tx.postgres else sqlite
    tx.conn.execute(
        dialect.insert(rates)
        .values(**key, tat=tat + each)
        .on_conflict_do_update(index_elements=("tenant", "key"), set_={"tat": tat + each})
    )
    return None


def lock(tx: Tx, tenant: str, key: str) -> None:
    """One transaction at a time counts what has this key. SQLite has one at a time anyway."""
    if tx.postgres:
        digest = hashlib.blake2b(f"{tenant}\0{key}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "big", signed=True)
        tx.conn.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
