"""What a step of the state machine is given: a connection within a transaction, and the time.

Steps are plain functions of a :class:`Tx`. Their only effects are on the database and on the
:class:`Tx`, so that they can be run again where a transaction could not be committed. Many of them
share one transaction. One that fails before it has written anything costs the others nothing; where
one fails later, all is rolled back and each is run by itself: savepoints, which would do the same,
cost two round trips a step. Events are written last, all at once, so that the order of the events
is the order of the commits, on PostgreSQL too. New tasks wait for them, unless a statement comes
that might look for the tasks: so a transaction that only queues is one statement there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, TypeVar

from sqlalchemy import Table, Text, TextClause, insert, text
from sqlalchemy.dialects import postgresql

from hive_orchestration.connection import Connection
from hive_orchestration.schema import check_text, deliveries, events, tasks, turns
from operations.errors import HiveError, InvalidRequest

T = TypeVar("T")
Step = Callable[["Tx"], T]
Values = tuple[Any, ...]
LaneKey = tuple[str, str, str, str]
"""Tenant, type, role, capabilities."""

EVENTS_LOCK: Final = 0x68697665  # PostgreSQL's advisory lock of those who write events
LIMITS_LOCK: Final = 0x68696C69  # and of those who count what has a key; taken before the other
MOST_WAITING: Final = 1024 * 1024  # characters of tasks that wait to be written
CHANNEL: Final = "hive_queue"  # on which PostgreSQL tells the other queens of it

_LIMITS = text("SELECT pg_advisory_xact_lock(:lock)")


class _New:
    """New rows of a table: some columns' values, in the table's order.

    :ivar insert: the statement for :meth:`Connection.put`
    """

    def __init__(self, table: Table, without: Iterable[str]) -> None:
        """:param without: columns in which they have what the table has for new rows"""
        self._table = table
        of = [column for column in table.columns if column.name not in without]
        self.insert = insert(table)
        self.columns = tuple(column.name for column in of)
        self.values = itemgetter(*self.columns)
        self.texts = itemgetter(*(column.name for column in of if isinstance(column.type, Text)))
        self._params = tuple(f"{table.name}_{name}" for name in self.columns)

    def sql(self, *, one: bool, source: str = "") -> str:
        """An INSERT of the rows, or of one, which takes PostgreSQL less, with :meth:`params`.

        :param source: one row, after which they come
        """
        dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
        types = [self._table.c[name].type.compile(dialect) for name in self.columns]
        params = zip(self._params, types, strict=True)
        values = ", ".join(f"CAST(:{name} AS {type}{'' if one else '[]'})" for name, type in params)
        rows = f"(VALUES ({values}, 1))" if one else f"unnest({values}) WITH ORDINALITY"
        columns = ", ".join(self.columns)
        return (
            f"INSERT INTO {self._table.name} ({columns}) "
            f"SELECT {', '.join(f'new.{name}' for name in self.columns)} "
            f"FROM {source}{rows} AS new({columns}, nr) ORDER BY new.nr"
        )

    def params(self, rows: Sequence[Values], *, one: bool) -> dict[str, Any]:
        if one:
            return dict(zip(self._params, rows[0], strict=True))
        nothing = (None,) * len(rows)
        columns = zip(*rows, strict=True)
        said = zip(self._params, columns, strict=True)
        return {name: None if values == nothing else values for name, values in said}


_TASKS: Final = _New(
    tasks,
    without={
        *("seq", "attempts", "fence", "token", "drone_id", "lease_until", "claim_ms"),
        *("cancel_requested", "progress", "started_at", "finished_at", "result", "error"),
    },
)
_EVENTS: Final = _New(events, without={"seq"})


def _telling(*, queues: bool, one: bool) -> TextClause:
    """The lock, the word to the others and the events, in one round trip.

    :param queues: and before that the tasks: who has the lock is not to wait for another's commit,
        as who inserts a key does that another has inserted
    :param one: event, and task
    """
    tasks = f"queued AS ({_TASKS.sql(one=one)} RETURNING 1), " if queues else ""
    after = " FROM (SELECT count(*) FROM queued) AS before" if queues else ""
    return text(
        f"WITH {tasks}locked AS MATERIALIZED (SELECT pg_advisory_xact_lock(:lock){after}), "
        "told AS MATERIALIZED (SELECT pg_notify(:channel, :said) FROM locked) "
        + _EVENTS.sql(one=one, source="told, ")
    )


_TELLING: Final = {
    (queues, one): _telling(queues=queues, one=one)
    for queues in (False, True)
    for one in (False, True)
}
_ENCODER: Final = json.JSONEncoder(
    separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False
)
_TELL_READY = text("SELECT pg_notify(:channel, :said)")
_DELIVERIES = insert(deliveries)
_NEW_TURN = postgresql.insert(turns)
_SET_TURN = _NEW_TURN.on_conflict_do_update(
    index_elements=("tenant",), set_={"served": _NEW_TURN.excluded.served}
)


class Tx:
    """One transaction.

    :ivar conn: the connection; a step neither commits nor rolls back
    :ivar now: when the transaction began, ms since the epoch, by the database's clock
    :ivar ready: whether a step has made something claimable
    :ivar lanes: the numbers of lanes that were looked up or made in it
    :ivar open_lanes: what claims in it know of the lanes that have something
    :ivar turns: by tenant, when it was served last, once a claim has looked
    """

    def __init__(self, conn: Connection, now: int, lanes: dict[LaneKey, int]) -> None:
        """:param lanes: those that are known already"""
        self.conn = conn
        self.now = now
        self.ready = False
        self.lanes: dict[LaneKey, int] = {}
        self.open_lanes: dict[Any, Any] = {}
        self.turns: dict[str, int] | None = None
        self._known_lanes = lanes
        self._served: set[str] = set()
        self._limits = False
        self._tasks: list[Values] = []
        self._size = 0  # of these, in characters
        self._others = 0  # of these, before the step that is run
        self._events: list[Values] = []
        self._deliveries: list[dict[str, Any]] = []

    @property
    def wrote_events(self) -> bool:
        return bool(self._events)

    def event(self, topic: str, subject: str, tenant: str, data: dict[str, Any]) -> None:
        """Something has happened. It is told in the order in which transactions are committed."""
        said = (topic, subject, tenant, compact(data))
        _check_texts(said)
        self._events.append((self.now, *said))

    def queue(self, row: Mapping[str, Any]) -> None:
        """A task comes in, and that is an event.

        :param row: of ``tasks``; only what a new one can have is written
        :raises Unstorable: there is a text in it that cannot be kept
        """
        _check_texts(_TASKS.texts(row))
        self._tasks.append(_TASKS.values(row))
        self.conn.first = self._write_tasks
        self._size += len(row["body"]) + len(row["metadata"])
        if self._size > MOST_WAITING:
            self._write_tasks()
        said = _queued(row["type"], row["status"])
        self._events.append((self.now, "task.queued", row["id"], row["tenant"], said))

    def _write_tasks(self) -> None:
        rows, self._tasks, self._size = self._tasks, [], 0
        wrote = self.conn.wrote or len(rows) > self._others  # those of the step that is run
        self._others = 0
        self.conn.first = None
        self.conn.put(_TASKS.insert, _TASKS.columns, rows)
        self.conn.wrote = wrote

    def deliver(self, task: str, url: str, body: dict[str, Any]) -> None:
        """A callback is to be delivered, after those of this task that are still to be."""
        self._deliveries.append(
            {"task": task, "url": url, "body": compact(body), "due": self.now, "attempts": 0}
        )

    def made_ready(self) -> None:
        """Something may be claimed that could not be before."""
        self.ready = True
        self.open_lanes.clear()

    def lane(self, key: LaneKey) -> int | None:
        """A lane's number, if it is known."""
        return self._known_lanes.get(key) or self.lanes.get(key)

    def served(self, tenant: str) -> None:
        """A tenant had its turn."""
        assert self.turns is not None
        self.turns[tenant] = max(self.turns.values(), default=0) + 1
        self._served.add(tenant)

    def limit(self) -> None:
        """From here to the commit nobody else counts what is begun under a key.

        One lock for all keys: with one for each, two queens would wait for each other.
        """
        if self.conn.postgres and not self._limits:
            self.conn.execute(_LIMITS, {"lock": LIMITS_LOCK})
        self._limits = True

    def between(self, low: float, high: float) -> float:
        """By chance."""
        return random.uniform(low, high)

    def run(self, step: Step[T]) -> T:
        """A step that leaves nothing where it is refused.

        :raises HiveError: what the step raises, having written nothing
        :raises Spoilt: it broke half way, or the database did
        """
        events, deliveries = len(self._events), len(self._deliveries)
        self._others = len(self._tasks)
        self.conn.wrote = False
        try:
            return step(self)
        except HiveError as error:
            if self.conn.wrote:
                raise Spoilt(error) from error
            del self._events[events:], self._deliveries[deliveries:], self._tasks[self._others :]
            raise
        except Exception as error:
            raise Spoilt(error) from error

    def finish(self, who: str = "") -> None:
        """Write what the steps have told. Nothing may follow but the commit.

        :param who: is told to the other queens
        """
        self.conn.first = None
        if self._deliveries:
            self.conn.execute(_DELIVERIES, self._deliveries)
        if self._served and self.turns is not None:
            turned = [{"tenant": of, "served": self.turns[of]} for of in sorted(self._served)]
            self.conn.execute(_SET_TURN, turned)
        if not self.conn.postgres:
            self.conn.put(_TASKS.insert, _TASKS.columns, self._tasks)
            self.conn.put(_EVENTS.insert, _EVENTS.columns, self._events)
            return
        word: dict[str, Any] = {
            "channel": CHANNEL,
            "said": f"{who} {'ready' if self.ready else ''}",
        }
        if self._events:
            queues, one = bool(self._tasks), len(self._events) == 1
            word |= {"lock": EVENTS_LOCK} | _EVENTS.params(self._events, one=one)
            if queues:  # each with an event
                word |= _TASKS.params(self._tasks, one=one)
            self.conn.last(_TELLING[queues, one], word)
        elif self.ready:
            self.conn.last(_TELL_READY, word)


@lru_cache
def _queued(type: str, status: str) -> str:
    return compact({"type": type, "status": status})


def _check_texts(texts: Sequence[str | None]) -> None:
    """:raises Unstorable: one of them cannot be kept"""
    together = "".join(filter(None, texts))
    if not together.isascii() or "\0" in together:
        for one in filter(None, texts):
            check_text(one)


class Spoilt(Exception):
    """A transaction must be rolled back: a step of it failed after it had begun to write."""

    def __init__(self, why: Exception) -> None:
        super().__init__(str(why))
        self.why = why


def cause_of(error: Exception) -> Exception:
    """What spoilt a transaction, or the error itself."""
    return error.why if isinstance(error, Spoilt) else error


def together(tx: Tx, steps: Sequence[Step[Any]], who: str = "") -> list[Any]:
    """Run steps one after the other; what each returned, or why it was refused.

    :raises Spoilt: one of them failed in a way that spoils it for all
    """
    said: list[Any] = []
    for step in steps:
        try:
            said.append(tx.run(step))
        except HiveError as error:
            said.append(error)
    try:
        tx.finish(who)
    except Exception as error:
        raise Spoilt(error) from error
    return said


def compact(value: Any) -> str:
    """JSON without blanks.

    :raises InvalidRequest: it cannot be written as JSON
    """
    if value == {}:
        return "{}"
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"This cannot be written as JSON ({str(error)[:200]}). Send plain values, finite "
            "numbers, and nothing nested more than 200 deep.",
            code="not_json",
        ) from error
