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

from sqlalchemy import insert, text
from sqlalchemy.dialects import postgresql

from hive_orchestration.connection import Connection
from hive_orchestration.schema import deliveries, events, turns
from operations.errors import HiveError, InvalidRequest

T = TypeVar("T")
Step = Callable[["Tx"], T]
LaneKey = tuple[str, str, str, str]
"""Tenant, type, role, capabilities."""

EVENTS_LOCK: Final = 0x68697665  # PostgreSQL's advisory lock of those who write events
LIMITS_LOCK: Final = 0x68696C69  # and of those who count what has a key; taken before the other
CHANNEL: Final = "hive_queue"  # on which PostgreSQL tells the other queens of it

_LIMITS = text("SELECT pg_advisory_xact_lock(:lock)")
_EVENT = ("at", "topic", "subject", "tenant", "data")
_EVENTS = insert(events)
# The lock, the word to the others and the events, in one round trip.
_TELL_EVENTS = text(
    "WITH locked AS MATERIALIZED (SELECT pg_advisory_xact_lock(:lock)), "
    "told AS MATERIALIZED (SELECT pg_notify(:channel, :said) FROM locked) "
    "INSERT INTO events (at, topic, subject, tenant, data) "
    "SELECT e.at, e.topic, e.subject, e.tenant, e.data FROM told, "
    "unnest(CAST(:at AS bigint[]), CAST(:topic AS text[]), CAST(:subject AS text[]), "
    "CAST(:tenant AS text[]), CAST(:data AS text[])) "
    "WITH ORDINALITY AS e(at, topic, subject, tenant, data, nr) ORDER BY e.nr"
)
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
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
        self.conn.wrote = False
        try:
            return step(self)
        except HiveError as error:
            if self.conn.wrote:
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
            self.conn.execute(_DELIVERIES, self._deliveries)
        if self._served and self.turns is not None:
            turned = [{"tenant": of, "served": self.turns[of]} for of in sorted(self._served)]
            self.conn.execute(_SET_TURN, turned)
        if not self.conn.postgres:
            self.conn.execute(_EVENTS, self._events)
            return
        word = {"channel": CHANNEL, "said": f"{who} {'ready' if self.ready else ''}"}
        if self._events:
            columns = {name: [one[name] for one in self._events] for name in _EVENT}
            self.conn.execute(_TELL_EVENTS, {"lock": EVENTS_LOCK, **word, **columns})
        elif self.ready:
            self.conn.execute(_TELL_READY, word)


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
    tx.finish(who)
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
