"""What a step of the state machine is given: a connection within a transaction, and the time.

Steps are plain functions of a :class:`Tx`. Their only effects are on the database and on the
:class:`Tx`, so that they can be run again where a transaction could not be committed. Many of them
share one transaction. One that fails before it has written anything costs the others nothing; where
one fails later, all is rolled back and each is run by itself: savepoints, which would do the same,
cost two round trips a step. Events are written last, all at once, so that the order of the events
is the order of the commits, on PostgreSQL too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, event, insert, text
from sqlalchemy.dialects import postgresql, sqlite

from hive_orchestration.schema import deliveries, events, turns
from operations.errors import HiveError, InvalidRequest

T = TypeVar("T")
Step = Callable[["Tx"], T]
LaneKey = tuple[str, str, str, str]
"""Tenant, type, role, capabilities."""

EVENTS_LOCK: Final = 0x68697665  # PostgreSQL's advisory lock of those who write events
LIMITS_LOCK: Final = 0x68696C69  # and of those who count what has a key; taken before the other
CHANNEL: Final = "hive_queue"  # on which PostgreSQL tells the other queens of it
_WROTE: Final = "wrote"

_LIMITS = text("SELECT pg_advisory_xact_lock(:lock)")
_TELL = text("SELECT pg_advisory_xact_lock(:lock), pg_notify(:channel, :said)")
_TELL_READY = text("SELECT pg_notify(:channel, :said)")


class Tx:
    """One transaction.

    :ivar conn: the connection; a step neither commits nor rolls back
    :ivar now: when the transaction began, ms since the epoch, by the database's clock
    :ivar postgres: the dialect, where the two databases need other words
    :ivar ready: whether a step has made something claimable
    :ivar lanes: the numbers of lanes that were looked up or made in it
    :ivar open_lanes: what claims in it know of the lanes that have something
    :ivar turns: by tenant, when it was served last, once a claim has looked
    """

    def __init__(
        self, conn: Connection, now: int, *, postgres: bool, lanes: dict[LaneKey, int]
    ) -> None:
        """:param lanes: those that are known already"""
        self.conn = conn
        self.now = now
        self.postgres = postgres
        self.ready = False
        self.lanes: dict[LaneKey, int] = {}
        self.open_lanes: dict[Any, Any] = {}
        self.turns: dict[str, int] | None = None
        self._known_lanes = lanes
        self._served: set[str] = set()
        self._limits = False
        self._events: list[dict[str, Any]] = []
        self._deliveries: list[dict[str, Any]] = []

    @property
    def wrote_events(self) -> bool:
        return bool(self._events)

    def event(self, topic: str, subject: str, tenant: str, data: dict[str, Any]) -> None:
        """Something has happened. It is told in the order in which transactions are committed."""
        self._events.append(
            {
                "at": self.now,
                "topic": topic,
                "subject": subject,
                "tenant": tenant,
                "data": compact(data),
            }
        )

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
        if self.postgres and not self._limits:
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
        self.conn.info[_WROTE] = False
        try:
            return step(self)
        except HiveError as error:
            if self.conn.info[_WROTE]:
                raise Spoilt(error) from error
            del self._events[events:], self._deliveries[deliveries:]
            raise
        except Exception as error:
            raise Spoilt(error) from error

    def finish(self, who: str = "") -> None:
        """Write what the steps have told. Nothing may follow but the commit.

        :param who: is told to the other queens
        """
        if self._deliveries:
            self.conn.execute(insert(deliveries), self._deliveries)
        if not self._events and not self.ready:
            return
        if self.postgres:
            said = {"channel": CHANNEL, "said": f"{who} {'ready' if self.ready else ''}"}
            if self._events:
                self.conn.execute(_TELL, {"lock": EVENTS_LOCK, **said})
            else:
                self.conn.execute(_TELL_READY, said)
        if self._events:
            self.conn.execute(insert(events), self._events)
        if self._served and self.turns is not None:
            dialect = postgresql if self.postgres else sqlite
            statement = dialect.insert(turns)
            self.conn.execute(
                statement.on_conflict_do_update(
                    index_elements=("tenant",), set_={"served": statement.excluded.served}
                ),
                [{"tenant": of, "served": self.turns[of]} for of in sorted(self._served)],
            )


class Spoilt(Exception):
    """A transaction must be rolled back: a step of it failed after it had begun to write."""

    def __init__(self, why: Exception) -> None:
        super().__init__(str(why))
        self.why = why


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
    tx.finish(who)
    return said


def watch(engine: Engine) -> None:
    """Note on each connection whether something was written: :meth:`Tx.run` looks."""

    @event.listens_for(engine, "before_cursor_execute")
    def seen(conn: Connection, _cursor: Any, _sql: str, _values: Any, context: Any, _: Any) -> None:
        if context is not None and (context.isinsert or context.isupdate or context.isdelete):
            conn.info[_WROTE] = True


def compact(value: Any) -> str:
    """JSON without blanks.

    :raises InvalidRequest: it cannot be written as JSON
    """
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"This cannot be written as JSON ({str(error)[:200]}). Send plain values, finite "
            "numbers, and nothing nested more than 200 deep.",
            code="not_json",
        ) from error
