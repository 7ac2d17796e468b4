"""The tables of the queue, the same on SQLite and PostgreSQL.

Times are integers: milliseconds since the epoch by the database's clock (:attr:`Tx.now`).
JSON is kept as text, written and read by the state machine alone.

``state`` is what the machine goes by, ``status`` what people see::

    state     meaning                                              statuses
    ready     may be claimed                                       queued
    delayed   may be from ``due`` on                               queued
    parked    its concurrency key is taken                         queued
    leased    somebody has it, until ``lease_until``               assigned, in_progress
    held      moved by hand; nobody has it through a claim         all that are not final
    done      ended                                                completed, failed, cancelled
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)

from operations.errors import InvalidRequest

metadata = MetaData()


class Unstorable(InvalidRequest):
    """A text that PostgreSQL cannot keep; SQLite is not to keep it either."""


def check_text(value: str) -> None:
    """:raises Unstorable: there is a NUL character in it, or half of a surrogate pair"""
    try:
        value.encode()
    except UnicodeEncodeError:
        broken = True
    else:
        broken = "\0" in value
    if broken:
        raise Unstorable(
            "There is a NUL character, or half a character (a lone surrogate), in a text. Send "
            "it without.",
            code="unstorable_text",
        )


_Big = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only INTEGER keys

READY: Final = "ready"
DELAYED: Final = "delayed"
PARKED: Final = "parked"
LEASED: Final = "leased"
HELD: Final = "held"
DONE: Final = "done"


def is_(state: str) -> ColumnElement[bool]:
    """Tasks in a state, written as the partial indexes have it: a parameter would not use them."""
    return tasks.c.state == literal_column(f"'{state}'")


def is_not(state: str) -> ColumnElement[bool]:
    """The contrary."""
    return tasks.c.state != literal_column(f"'{state}'")


NOT_DONE_WELL: Final = "status IN ('failed', 'cancelled')"
"""What people look for among many that were completed; written as its partial index has it."""

lanes = Table(
    "lanes",
    metadata,
    Column("id", _Big, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("capabilities", Text, nullable=False),  # a sorted JSON list
    UniqueConstraint("tenant", "type", "role", "capabilities", name="lanes_once"),
)
"""What a claim must match: there are few, and each task is in one."""

turns = Table(
    "turns",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("served", BigInteger, nullable=False, server_default="0"),
)
"""When each tenant was served last, as a running number: the one that waited longest is next."""

tasks = Table(
    "tasks",
    metadata,
    Column("seq", _Big, primary_key=True),  # in the order of arrival
    Column("id", Text, nullable=False, unique=True),
    Column("tenant", Text, nullable=False),
    Column("lane", _Big, ForeignKey("lanes.id"), nullable=False),
    Column("type", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("title", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("rank", BigInteger, nullable=False),  # priority and age in one; the least comes first
    Column("due", BigInteger),  # of a delayed one
    Column("deadline", BigInteger),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("max_attempts", Integer, nullable=False),
    Column("fence", Integer, nullable=False, server_default="0"),
    Column("token", Text),  # with the fence, what makes a claim's id
    Column("drone_id", Text),
    Column("lease_until", BigInteger),
    Column("lease_ms", BigInteger, nullable=False),  # of each claim, unless that says otherwise
    Column("claim_ms", BigInteger),  # of the present claim
    Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("concurrency_key", Text),
    Column("concurrency_limit", Integer),
    Column("idempotency_key", Text),
    Column("digest", Text),  # of the body that came with the idempotency key
    Column("unique_key", Text),
    Column("parent", Text),
    Column("progress", Float),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("body", Text, nullable=False),  # what never changes: payload, tags, retry, rate, …
    Column("result", Text),
    Column("error", Text),
    Column("metadata", Text, nullable=False, server_default="{}"),
    Column("secrets", Text),  # encrypted
    Index(
        "tasks_ready",
        "lane",
        "rank",
        "seq",
        sqlite_where=text("state = 'ready'"),
        postgresql_where=text("state = 'ready'"),
    ),
    Index(
        "tasks_queued",
        "rank",
        "seq",
        sqlite_where=text("status = 'queued'"),
        postgresql_where=text("status = 'queued'"),
    ),
    Index(
        "tasks_unfinished",
        "seq",
        sqlite_where=text("state != 'done'"),
        postgresql_where=text("state != 'done'"),
    ),
    Index(
        "tasks_due",
        "due",
        sqlite_where=text("state = 'delayed'"),
        postgresql_where=text("state = 'delayed'"),
    ),
    Index(
        "tasks_leases",
        "lease_until",
        sqlite_where=text("state = 'leased'"),
        postgresql_where=text("state = 'leased'"),
    ),
    Index(
        "tasks_concurrency",
        "tenant",
        "concurrency_key",
        "state",
        "lane",
        "rank",
        "seq",
        sqlite_where=text("concurrency_key IS NOT NULL"),
        postgresql_where=text("concurrency_key IS NOT NULL"),
    ),
    Index(
        "tasks_deadlines",
        "deadline",
        sqlite_where=text("deadline IS NOT NULL AND state != 'done'"),
        postgresql_where=text("deadline IS NOT NULL AND state != 'done'"),
    ),
    Index(
        "tasks_finished",
        "finished_at",
        sqlite_where=text("state = 'done'"),
        postgresql_where=text("state = 'done'"),
    ),
    Index(
        "tasks_idempotent",
        "tenant",
        "idempotency_key",
        unique=True,
        sqlite_where=text("idempotency_key IS NOT NULL"),
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index(
        "tasks_unique",
        "tenant",
        "unique_key",
        unique=True,
        sqlite_where=text("unique_key IS NOT NULL AND state != 'done'"),
        postgresql_where=text("unique_key IS NOT NULL AND state != 'done'"),
    ),
    Index(
        "tasks_tokens",
        "token",
        sqlite_where=text("state = 'leased'"),
        postgresql_where=text("state = 'leased'"),
    ),
    Index("tasks_status", "tenant", "status", "seq"),
    Index(
        "tasks_not_done_well",
        "seq",
        sqlite_where=text(NOT_DONE_WELL),
        postgresql_where=text(NOT_DONE_WELL),
    ),
    Index(
        "tasks_parent",
        "parent",
        sqlite_where=text("parent IS NOT NULL"),
        postgresql_where=text("parent IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
)

claims = Table(
    "claims",
    metadata,
    Column("drone_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("tenant", Text, primary_key=True),  # of the claimer; "" where he has none
    Column("token", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("claims_at", "at"),
)
"""Claims that may be sent again, by the key that the claimer gave them."""

rates = Table(
    "rates",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("tat", BigInteger, nullable=False),  # µs; theoretical arrival time, as GCRA has it
)

logs = Table(
    "task_logs",
    metadata,
    Column("seq", _Big, primary_key=True),
    Column("task", Text, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("text", Text, nullable=False),
    Index("task_logs_of", "task", "seq"),
    sqlite_autoincrement=True,
)

pauses = Table(
    "pauses",
    metadata,
    Column("role", Text, primary_key=True),
    Column("at", BigInteger, nullable=False),
)

drones = Table(
    "drones",
    metadata,
    Column("tenant", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("capabilities", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("registered_at", BigInteger, nullable=False),
    Column("heartbeat_at", BigInteger, nullable=False),
    Index("drones_heard", "heartbeat_at"),
)

events = Table(
    "events",
    metadata,
    Column("seq", _Big, primary_key=True),  # in the order of commits
    Column("at", BigInteger, nullable=False),
    Column("topic", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("data", Text, nullable=False),
    sqlite_autoincrement=True,
)
"""The outbox: written with what happened, in one transaction."""

deliveries = Table(
    "deliveries",
    metadata,
    Column("seq", _Big, primary_key=True),
    Column("task", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due", BigInteger, nullable=False),
    Column("error", Text),
    Index("deliveries_due", "due"),
    Index("deliveries_of", "task", "seq"),
    sqlite_autoincrement=True,
)
"""Callbacks that are still to be delivered, each task's in order."""

facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
"""What the queues on one database must agree on."""
