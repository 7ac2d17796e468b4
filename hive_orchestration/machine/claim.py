"""Tasks are given out: who is served next, and what with.

Tenants take turns: whoever waited longest for one is served first, however much another has queued.
Within a tenant the task of the least rank comes first (priority and waiting time in one), and of
those the one that came first.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import BigInteger, bindparam, delete, exists, func, insert, select, update

from hive_orchestration.connection import Row
from hive_orchestration.machine.limits import MOST_PUT_ASIDE, is_limited, may_begin
from hive_orchestration.machine.rows import MS, ClaimId, new_token, task_of, told
from hive_orchestration.schema import LEASED, READY, claims, is_, lanes, pauses, tasks, turns
from hive_orchestration.transaction import Tx
from operations.tasks import ClaimRequest, Task

_LANES = select(lanes.c.id, lanes.c.tenant, lanes.c.type, lanes.c.capabilities).where(
    lanes.c.role.in_((bindparam("role"), "")),
    exists().where(tasks.c.lane == lanes.c.id, is_(READY)),
    ~exists().where(pauses.c.role == lanes.c.role),
)
_LANES_OF = _LANES.where(lanes.c.tenant == bindparam("tenant"))
_FIRST = (
    select(tasks)
    .where(tasks.c.lane == bindparam("lane"), is_(READY))
    .order_by(tasks.c.rank, tasks.c.seq)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)
_TURNS = select(turns.c.tenant, turns.c.served)
_AT = bindparam("at", type_=BigInteger)
_OTHER_LEASE = bindparam("lease", type_=BigInteger)
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
        lease_until=_AT + func.coalesce(_OTHER_LEASE, tasks.c.lease_ms),
        claim_ms=func.coalesce(_OTHER_LEASE, tasks.c.lease_ms),
        due=None,
        started_at=func.coalesce(tasks.c.started_at, _AT),
        updated_at=_AT,
    )
)
_KNOWN = select(claims.c.token).where(
    claims.c.drone_id == bindparam("drone_id"),
    claims.c.key == bindparam("key"),
    claims.c.tenant == bindparam("tenant"),
)
_KEEP = insert(claims)
_OF_CLAIM = (
    select(tasks)
    .where(tasks.c.token == bindparam("by"), is_(LEASED), tasks.c.lease_until > bindparam("at"))
    .order_by(tasks.c.seq)
)
_FORGET = delete(claims).where(
    claims.c.drone_id == bindparam("drone_id"), claims.c.token == bindparam("token")
)


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
    # Under a key of his own a claimer finds nothing of another tenant's claimer.
    known_as = {"drone_id": request.drone_id, "key": request.key, "tenant": tenant or ""}
    if request.key is not None:
        known = tx.conn.execute(_KNOWN, known_as).scalar()
        if known is not None:
            rows = tx.conn.execute(_OF_CLAIM, {"by": known, "at": tx.now}).mappings().all()
            return [_given(row, row["lease_until"] - tx.now) for row in rows]
    taking = _Taking(tx, request, new_token())
    for row in _due(tx, tenant, taking):
        taking.take(row)
        if len(taking.given) == request.n:
            break
    taking.write()
    if taking.given and request.key is not None:
        tx.conn.execute(_KEEP, {**known_as, "token": taking.token, "at": tx.now})
    return taking.given


def forget(tx: Tx, row: Row) -> None:
    """A claim was given back: its key stands for it no more."""
    tx.conn.execute(_FORGET, {"drone_id": row["drone_id"], "token": row["token"]})


class _Taking:
    """One claim's tasks: leased together, when somebody has to see that they are."""

    def __init__(self, tx: Tx, request: ClaimRequest, token: str) -> None:
        self.request = request
        self.token = token
        self.given: list[Given] = []
        self._tx = tx
        self._lease_ms = None if request.lease_s is None else int(request.lease_s * MS)
        self._unwritten: list[int] = []

    def take(self, row: Row) -> None:
        now, drone = self._tx.now, self.request.drone_id
        lease_ms = row["lease_ms"] if self._lease_ms is None else self._lease_ms
        taken = {
            **row,
            "state": LEASED,
            "status": "assigned",
            "attempts": row["attempts"] + 1,
            "fence": row["fence"] + 1,
            "token": self.token,
            "drone_id": drone,
            "lease_until": now + lease_ms,
            "due": None,
            "started_at": row["started_at"] or now,
            "updated_at": now,
        }
        self._unwritten.append(row["seq"])
        told(self._tx, taken, "assigned", drone_id=drone, attempt=taken["attempts"])
        self.given.append(_given(taken, lease_ms))

    def write(self) -> None:
        if self._unwritten:
            lease = {
                "by": self.token,
                "drone": self.request.drone_id,
                "lease": self._lease_ms,
                "at": self._tx.now,
            }
            self._tx.conn.execute(_LEASE, [{"of": seq, **lease} for seq in self._unwritten])
            self._unwritten = []


def _given(row: Row, lease_ms: int) -> Given:
    id = ClaimId(row["id"], row["fence"], row["token"])
    return Given(id, task_of(row), row["secrets"], lease_ms / MS)


def _due(tx: Tx, tenant: str | None, taking: _Taking) -> Iterator[Row]:
    """Tasks that may be begun now, in the order in which they are to be given out."""
    waiting = _waiting(tx, tenant, taking.request)
    several = len(waiting) > 1
    if several and tx.turns is None:
        tx.turns = dict(tx.conn.execute(_TURNS).all())
    served = tx.turns or {}
    turn = sorted(waiting, key=lambda of: (served.get(of, 0), of))
    queues = {of: _of_tenant(tx, waiting[of], taking) for of in turn}
    aside = 0
    behind: Counter[str] = Counter()
    while queues:
        for of in turn:
            if of not in queues:
                continue
            for row in queues[of]:
                if is_limited(row):
                    taking.write()  # for them to be counted
                if not is_limited(row) or may_begin(tx, row, behind):
                    if several:
                        tx.served(of)
                    yield row
                    break
                aside += 1
                if aside >= MOST_PUT_ASIDE:
                    tx.made_ready()  # there may be others behind them
                    return
            else:
                del queues[of]


def _waiting(tx: Tx, tenant: str | None, request: ClaimRequest) -> dict[str, list[int]]:
    """By tenant, the lanes that this claim may take from and that have something."""
    known = (request.role, tenant)
    if known not in tx.open_lanes:
        params = {"role": request.role} | ({} if tenant is None else {"tenant": tenant})
        found = tx.conn.execute(_LANES if tenant is None else _LANES_OF, params)
        tx.open_lanes[known] = {
            id: (of, type, frozenset(json.loads(capabilities)))
            for id, of, type, capabilities in found
        }
    able = frozenset(request.capabilities)
    fit: dict[str, list[int]] = defaultdict(list)
    for id, (of, type, wanted) in tx.open_lanes[known].items():
        if (not request.types or type in request.types) and able >= wanted:
            fit[of].append(id)
    return fit


def _of_tenant(tx: Tx, lanes: list[int], taking: _Taking) -> Iterator[Row]:
    """What one tenant has ready, the first first."""
    most = taking.request.n
    while True:
        taking.write()
        rows: list[Row] = []
        for lane in tuple(lanes):
            found = tx.conn.execute(_FIRST, {"lane": lane, "most": most}).mappings().all()
            if not found:
                lanes.remove(lane)
                for known in tx.open_lanes.values():
                    known.pop(lane, None)
            rows += found
        if not rows:
            return
        # No more than this many are known to be the first of all lanes.
        yield from sorted(rows, key=lambda row: (row["rank"], row["seq"]))[:most]
