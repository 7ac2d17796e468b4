"""Concurrency and rates: how many tasks with the same key are worked on, and how many begin.

A task whose concurrency key is taken is parked, and brought back when there is room: by whatever
takes a task with that key from where it could have been begun, or was worked on. Of each lane one
is brought back, for nobody may be there who may claim those of the others.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Final

from sqlalchemy import bindparam, exists, func, select, update
from sqlalchemy.dialects.postgresql import insert

from hive_orchestration.connection import Row
from hive_orchestration.machine.rows import MS
from hive_orchestration.schema import DELAYED, LEASED, PARKED, READY, is_, lanes, rates, tasks
from hive_orchestration.transaction import Tx
from operations.tasks import RateLimit

US: Final = 1000  # in a ms
MOST_PUT_ASIDE: Final = 200  # tasks that a claim finds not to be due yet, before it gives up
SPREAD_S: Final = 30
"""Over this time those that wait for a rate come back; should all before them be cancelled, they
are that late at worst."""

_OF_KEY = (
    tasks.c.tenant == bindparam("tenant"),
    tasks.c.concurrency_key == bindparam("key"),
)
_AT_WORK = select(func.count()).select_from(tasks).where(*_OF_KEY, is_(LEASED))
_PARKED = (*_OF_KEY, is_(PARKED), tasks.c.concurrency_limit > bindparam("at_work"))
_PARKED_LANES = select(lanes.c.id).where(
    lanes.c.tenant == bindparam("tenant"), exists().where(*_PARKED, tasks.c.lane == lanes.c.id)
)
_NEXT_PARKED = (
    select(tasks.c.seq)
    .where(*_PARKED, tasks.c.lane == bindparam("in_lane"))
    .order_by(tasks.c.rank, tasks.c.seq)
    .limit(1)
    # Waits for whoever has a row in hand, and goes on to the next should that be parked no more.
    .with_for_update()
)
_SET_STATE = (
    update(tasks)
    .where(tasks.c.seq == bindparam("of"))
    .values(state=bindparam("to"), due=bindparam("until"))
)
_RATE = select(rates.c.tat).where(
    rates.c.tenant == bindparam("tenant"), rates.c.key == bindparam("key")
)
_NEW_RATE = insert(rates)
_SET_RATE = _NEW_RATE.on_conflict_do_update(
    index_elements=("tenant", "key"), set_={"tat": _NEW_RATE.excluded.tat}
)


def is_limited(row: Row) -> bool:
    """Whether others may keep a task from being begun."""
    return row["concurrency_key"] is not None or '"rate"' in row["body"]


def may_begin(tx: Tx, row: Row, behind: Counter[str]) -> bool:
    """Whether its limits let a task begin now; otherwise it is put aside until they may.

    Of many that wait for one rate each is put aside until its own turn might come: were it until
    the next turn of all, each turn would bring all of them back, for one to begin.

    :param behind: how many this claim has put aside, by their rates' keys
    """
    if row["concurrency_key"] is not None and _at_work(tx, row) >= row["concurrency_limit"]:
        tx.conn.execute(_SET_STATE, {"of": row["seq"], "to": PARKED, "until": None})
        return False
    rate = json.loads(row["body"]).get("rate")
    if rate is not None:
        limit = RateLimit.model_validate(rate)
        key = f"{row['tenant']} {limit.key}"
        until = _next_at(tx, row["tenant"], limit, behind[key])
        if until is not None:
            behind[key] += 1
            tx.conn.execute(_SET_STATE, {"of": row["seq"], "to": DELAYED, "until": until})
            unpark(tx, row)
            return False
    return True


def unpark(tx: Tx, row: Row) -> None:
    """A task is neither worked on nor claimable any more: others with its key may be."""
    if row["concurrency_key"] is None:
        return
    key = {"tenant": row["tenant"], "key": row["concurrency_key"], "at_work": _at_work(tx, row)}
    for lane in tx.conn.execute(_PARKED_LANES, key).scalars():
        seq = tx.conn.execute(_NEXT_PARKED, {**key, "in_lane": lane}).scalar()
        if seq is not None:
            tx.conn.execute(_SET_STATE, {"of": seq, "to": READY, "until": None})
            tx.made_ready()


def _at_work(tx: Tx, row: Row) -> int:
    tx.limit()
    key = {"tenant": row["tenant"], "key": row["concurrency_key"]}
    return int(tx.conn.execute(_AT_WORK, key).scalar())


def _next_at(tx: Tx, tenant: str, rate: RateLimit, behind: int) -> int | None:
    """Count one begin, and return None; or when one may be that has ``behind`` before it, ms.

    Those are not waited for longer than :data:`SPREAD_S`, for they may be cancelled; all that one
    claim puts aside are spread over that time.

    The generic cell rate algorithm (ITU-T I.371): a burst of ``limit``, then one each
    ``per_s / limit``.
    """
    tx.limit()
    now = tx.now * US
    each = max(1, int(rate.per_s * MS * US / rate.limit))
    key = {"tenant": tenant, "key": rate.key}
    tat = max(tx.conn.execute(_RATE, key).scalar() or 0, now)
    first = tat - each * (rate.limit - 1)
    if first > now:
        return -(-first // US) + min(each // US, SPREAD_S * MS // MOST_PUT_ASIDE) * behind
    tx.conn.execute(_SET_RATE, {**key, "tat": tat + each})
    return None
