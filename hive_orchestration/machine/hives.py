"""Hives come and go. Several queens on one database see each do so: the first one tells it."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import bindparam, delete
from sqlalchemy.dialects import postgresql

from hive_orchestration.machine.roles import CLUSTER
from hive_orchestration.schema import facts
from hive_orchestration.transaction import Tx

Topic = Literal["hive.joined", "hive.left"]

_NEW = postgresql.insert(facts)
_JOINED = _NEW.on_conflict_do_update(
    index_elements=("name",),
    set_={"value": _NEW.excluded.value},
    where=facts.c.value != _NEW.excluded.value,
)
_LEFT = delete(facts).where(facts.c.name == bindparam("name"), facts.c.value == bindparam("value"))


def seen(tx: Tx, topic: Topic, hive_id: str, instance: str) -> None:
    """Tell that a hive has joined or left, unless that was told before.

    :param instance: new at each start of the hive
    """
    statement = _JOINED if topic == "hive.joined" else _LEFT
    if tx.conn.execute(statement, {"name": f"hive:{hive_id}", "value": instance}).rowcount:
        tx.event(topic, hive_id, CLUSTER, {})
