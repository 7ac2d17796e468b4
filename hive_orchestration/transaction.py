"""What a step of the state machine is given: a connection within a transaction, and the time.

Steps are plain functions of a :class:`Tx`. Their only effects are on the database and on the
:class:`Tx`, so that they can be run again where a transaction could not be committed. Many of them
share one transaction, each in a savepoint of its own; their events are written last, all at once,
so that the order of the events is the order of the commits, on PostgreSQL too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from hive_orchestration.schema import deliveries, events
from operations.errors import Conflict

T = TypeVar("T")
Step = Callable[["Tx"], T]

EVENTS_LOCK: Final = 0x68697665  # PostgreSQL's advisory lock of those who write events
CHANNEL: Final = "hive_queue"  # on which PostgreSQL tells the other queens of it


class Tx:
    """One transaction.

    :ivar conn: the connection; a step neither commits nor rolls back
    :ivar now: when the transaction began, ms since the epoch, by the database's clock
    :ivar postgres: the dialect, where the two databases need other words
    :ivar ready: whether a step has made something claimable
    """

    def __init__(self, conn: Connection, now: int, *, postgres: bool) -> None:
        self.conn = conn
        self.now = now
        self.postgres = postgres
        self.ready = False
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

    def between(self, low: float, high: float) -> float:
        """By chance."""
        return random.uniform(low, high)

    def run(self, step: Step[T]) -> T:
        """A step in its own savepoint: where it fails, nothing of it stays.

        :raises HiveError: what the step raises
        """
        events, deliveries = len(self._events), len(self._deliveries)
        nested = self.conn.begin_nested()
        try:
            result = step(self)
        except BaseException:
            del self._events[events:], self._deliveries[deliveries:]
            if nested.is_active:
                nested.rollback()
            raise
        nested.commit()
        return result

    def finish(self) -> None:
        """Write what the steps have told. Nothing may follow but the commit."""
        if self._deliveries:
            self.conn.execute(insert(deliveries), self._deliveries)
        if not self._events and not self.ready:
            return
        if self.postgres:
            if self._events:
                self.conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": EVENTS_LOCK})
            self.conn.execute(text("SELECT pg_notify(:channel, '')"), {"channel": CHANNEL})
        if self._events:
            self.conn.execute(insert(events), self._events)


def together(tx: Tx, steps: Sequence[Step[Any]]) -> list[Any]:
    """Run steps, each in a savepoint; its result, or the exception that it raised.

    :raises DBAPIError: the database is out of order, not the step
    """
    said: list[Any] = []
    for step in steps:
        try:
            said.append(_tried(tx, step))
        except DBAPIError:
            raise
        except Exception as error:  # noqa: BLE001  # the caller's own; others are not to suffer
            said.append(error)
    tx.finish()
    return said


def _tried(tx: Tx, step: Step[T]) -> T:
    try:
        return tx.run(step)
    except IntegrityError:  # another queen was first
        try:
            return tx.run(step)  # now it sees what she wrote
        except IntegrityError as error:
            raise Conflict(
                "Something else has what this asks for: a key that may be there once. Look what "
                "has it, and end that first.",
                code="not_unique",
            ) from error


def compact(value: Any) -> str:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
