"""Tasks of the durable queue: what is asked of them, what they are, who works through them."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from operations import patterns
from operations.errors import InvalidRequest

TaskStatus = Literal[
    "queued",
    "assigned",
    "in_progress",
    "review_pending",
    "approved",
    "rejected",
    "rework_needed",
    "escalated",
    "completed",
    "failed",
    "cancelled",
]

ALIASES: Final[dict[str, TaskStatus]] = {"pending": "queued", "running": "in_progress"}
"""Names that older callers use."""

FINAL: Final[frozenset[TaskStatus]] = frozenset(("completed", "failed", "cancelled"))
"""Nothing is done about these any more; a failed one may be replayed."""

TRANSITIONS: Final[dict[TaskStatus, frozenset[TaskStatus]]] = {
    "queued": frozenset(
        ("assigned", "in_progress", "escalated", "completed", "failed", "cancelled")
    ),
    "assigned": frozenset(
        ("queued", "in_progress", "review_pending", "escalated", "completed", "failed", "cancelled")
    ),
    "in_progress": frozenset(
        ("queued", "review_pending", "escalated", "completed", "failed", "cancelled")
    ),
    "review_pending": frozenset(
        ("approved", "rejected", "rework_needed", "escalated", "cancelled")
    ),
    "approved": frozenset(("completed", "cancelled")),
    "rejected": frozenset(("rework_needed", "failed", "cancelled")),
    "rework_needed": frozenset(("queued", "in_progress", "escalated", "failed", "cancelled")),
    "escalated": frozenset(
        ("queued", "approved", "rejected", "rework_needed", "completed", "failed", "cancelled")
    ),
    "completed": frozenset(),
    "failed": frozenset(("queued",)),
    "cancelled": frozenset(),
}
"""What may follow what, where somebody sets the status by hand."""


def status_of(name: str) -> TaskStatus:
    """A status by its name or alias. :raises InvalidRequest: no status has this name"""
    status = ALIASES.get(name, name)
    for known in TRANSITIONS:
        if status == known:
            return known
    raise InvalidRequest(
        f"There is no status '{name[:64]}'. There are {', '.join((*TRANSITIONS, *ALIASES))}.",
        code="unknown_status",
        param="status",
    )


QUEUE_FILE: Final = "queue.db"
"""The queue, in a state folder; of a queen, of the library, and for the command."""
QUEUE_KEY_FILE: Final = "queue.key"
"""What secrets are encrypted with where there is no cluster secret, beside it."""

MIN_PRIORITY, MAX_PRIORITY = -100, 100
DAY_S: Final = 86_400.0
MOST_BYTES: Final = 1024 * 1024  # of a task, of its metadata, of its result, as JSON
MOST_LOG_CHARS: Final = 65_536  # at once

TicketType = Literal["agent", "script", "custom"]
TICKET_TYPES: Final[tuple[TicketType, ...]] = get_args(TicketType)
"""The types of tasks that the dispatcher's tickets are."""

Word = Annotated[str, Field(min_length=1, max_length=128, pattern=patterns.ONE_LINE)]
RoleName = Annotated[str, Field(max_length=128, pattern=r"^[^\x00-\x1f\x7f/]*$")]
TaskId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
DroneId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$")]
Seconds = Annotated[float, Field(ge=0, le=366 * DAY_S)]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Retry(_Closed):
    """How often, and how long after a failure; the pause doubles each time.

    :param attempts: in all, the first included
    :param backoff_s: before the second attempt; each pause is cut by chance to between half and all
    :param backoff_max_s: no pause is longer
    """

    attempts: int = Field(default=3, ge=1, le=1000)
    backoff_s: Seconds = 1.0
    backoff_max_s: Seconds = 300.0


class RateLimit(_Closed):
    """At most ``limit`` tasks with this key begin in ``per_s`` seconds, evenly after a burst."""

    key: Word
    limit: int = Field(ge=1, le=1_000_000)
    per_s: float = Field(gt=0, le=DAY_S)


class Concurrency(_Closed):
    """At most ``limit`` tasks with this key are worked on at a time."""

    key: Word
    limit: int = Field(default=1, ge=1, le=1_000_000)


class NewTask(_Closed):
    """A task to be queued.

    :param role: of the drones that may claim it; empty: any
    :param capabilities: that a drone must have, all of them
    :param not_before: seconds from now
    :param deadline: seconds from now by which it must have been done; a review may take longer
    :param lease_s: how long a claim holds without a heartbeat
    :param idempotency_key: the same key again gives the same task; with another body it is refused
    :param unique_key: while an unfinished task has it, that one is given instead of a new one
    :param secrets: kept encrypted, given to who claims the task, shown to nobody else
    """

    type: Word
    title: Annotated[str, Field(max_length=1024)] = ""
    description: Annotated[str, Field(max_length=65_536)] = ""
    payload: dict[str, JsonValue] = Field(default_factory=dict)  # {} would be deep-copied
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    priority: int = Field(default=1, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    role: RoleName = ""
    capabilities: Annotated[tuple[Word, ...], Field(max_length=32)] = ()
    tags: Annotated[tuple[Word, ...], Field(max_length=32)] = ()
    not_before: Seconds = 0.0
    deadline: Annotated[float, Field(gt=0, le=366 * DAY_S)] | None = None
    retry: Retry = Retry()
    lease_s: float = Field(default=60.0, ge=1, le=DAY_S)
    idempotency_key: Word | None = None
    unique_key: Word | None = None
    concurrency: Concurrency | None = None
    rate: RateLimit | None = None
    callback_url: Annotated[str, Field(max_length=2048)] | None = None
    parent: TaskId | None = None
    secrets: dict[str, str] = Field(default_factory=dict)

    @field_validator("capabilities", "tags", mode="before")
    @classmethod
    def _lists_are_fine(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _can_be_done_in_time(self) -> Self:
        if self.deadline is not None and self.deadline <= self.not_before:
            raise ValueError("its deadline would pass before it may begin")
        return self


class Task(BaseModel):
    """A task as it stands. Times are seconds since the epoch, by the database's clock."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    tenant: str
    type: str
    title: str
    description: str
    payload: dict[str, JsonValue]
    metadata: dict[str, JsonValue]
    status: TaskStatus
    priority: int
    role: str
    capabilities: tuple[str, ...]
    tags: tuple[str, ...]
    attempts: int
    max_attempts: int
    progress: float | None = None
    result: JsonValue = None
    error: dict[str, JsonValue] | None = None
    drone_id: str | None = None
    lease_until: float | None = None
    cancel_requested: bool = False
    not_before: float | None = None
    deadline: float | None = None
    idempotency_key: str | None = None
    unique_key: str | None = None
    callback_url: str | None = None
    parent: str | None = None
    created_at: float
    updated_at: float
    started_at: float | None = None
    finished_at: float | None = None


class ClaimRequest(_Closed):
    """Ask for work.

    :param types: only tasks of these types; empty: of all
    :param wait: seconds to wait for one, where there is none
    :param n: tasks at most
    :param lease_s: instead of each task's own
    :param key: the same key again, from the same drone, gives the same tasks
    """

    drone_id: DroneId = "anonymous"
    role: RoleName = ""
    capabilities: Annotated[tuple[Word, ...], Field(max_length=128)] = ()
    types: Annotated[tuple[Word, ...], Field(max_length=32)] = ()
    wait: float = Field(default=0.0, ge=0, le=60)
    n: int = Field(default=1, ge=1, le=100)
    lease_s: float | None = Field(default=None, ge=1, le=DAY_S)
    key: Word | None = None

    @field_validator("capabilities", "types", mode="before")
    @classmethod
    def _lists_are_fine(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class Claim(BaseModel):
    """A task that somebody works on now.

    :param claim_id: proves it; with each claim of a task there is a new one, and the old is stale
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    claim_id: str
    task: Task
    secrets: dict[str, str] = {}
    lease_s: float


class Beat(_Closed):
    """A heartbeat of a claim.

    :param progress: share that is done, 0 to 1
    :param logs: more lines
    """

    progress: float | None = Field(default=None, ge=0, le=1)
    logs: Annotated[str, Field(max_length=MOST_LOG_CHARS)] | None = None
    metadata: dict[str, JsonValue] | None = None

    @field_validator("logs")
    @classmethod
    def _without_nul(cls, logs: str | None) -> str | None:
        """PostgreSQL keeps none, and tools that drones run write some."""
        return None if logs is None else logs.replace("\0", "\ufffd")


class Kept(BaseModel):
    """What a heartbeat is answered with. ``cancel``: somebody wants the task to be stopped."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    lease_s: float
    cancel: bool


class NewDrone(_Closed):
    """Somebody who works through tasks."""

    id: DroneId
    role: RoleName = ""
    capabilities: Annotated[tuple[Word, ...], Field(max_length=128)] = ()
    metadata: dict[str, JsonValue] = {}

    @field_validator("capabilities", mode="before")
    @classmethod
    def _lists_are_fine(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


DroneStatus = Literal["active", "idle", "offline", "error"]


class Drone(BaseModel):
    """A drone as it last said of itself; times as in :class:`Task`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    tenant: str
    role: str
    capabilities: tuple[str, ...]
    status: DroneStatus
    metadata: dict[str, JsonValue]
    registered_at: float
    heartbeat_at: float


class QueueEvent(BaseModel):
    """Something that happened, written together with it.

    :param seq: grows with each event in the order in which they were committed
    :param topic: as ``task.queued``, ``task.completed``, ``drone.joined``, ``hive.joined``
    :param subject: the id of the task, drone or hive; its events come in order
    :param at: seconds since the epoch
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    seq: int
    topic: str
    subject: str
    tenant: str
    at: float
    data: dict[str, JsonValue]


class EventPage(BaseModel):
    """Events of the past, in order.

    :param next: the place after these, where the following page begins
    :param last: the number of the newest event there is; nothing follows where ``next`` is it
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    events: tuple[QueueEvent, ...]
    next: int
    last: int


class TaskPage(BaseModel):
    """Tasks, the newest first; ``next`` is the cursor of the following page, if there is one."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    tasks: tuple[Task, ...]
    next: str | None = None


class RoleInfo(BaseModel):
    """What waits and runs in a role."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    role: str
    paused: bool
    queued: int
    delayed: int
    leased: int
    oldest_s: float | None = None
