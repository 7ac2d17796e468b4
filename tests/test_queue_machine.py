"""All calls of the queue in any order, against a model of it that fits on two pages."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, func, select

from hive_orchestration import schema
from operations.errors import Conflict, NotFound
from operations.tasks import (
    FINAL,
    TRANSITIONS,
    Beat,
    ClaimRequest,
    Concurrency,
    NewTask,
    Retry,
    TaskStatus,
)
from tests.queues import KINDS, Durable, durable_queue

# Times are far apart, so that it does not matter how long the test itself takes.
LEASE_S = 1000.0
DELAY_S = 1500.0
DEADLINE_S = 5000.0
PASSES_S = (600.0, 1200.0)

KEYS = {"one": 1, "two": 2}
DECIDED = ("review_pending", "approved")  # the work is done: no deadline ends them

times = st.sampled_from([1, 1, 2, 3])
some = st.integers(0, 1_000_000)  # one of those that there are


@dataclass
class Known:
    """A task as the model has it; ``place`` is the machine's state, ready and parked in one."""

    id: str
    tenant: str
    role: str
    unique: str | None
    key: str | None
    most: int
    place: str
    due: float = 0.0
    deadline: float | None = None
    status: TaskStatus = "queued"
    attempts: int = 0
    lease: float = 0.0
    claim: str = ""
    cancel: bool = False
    ended: tuple[str, str] = ("", "")  # the claim whose call ended it last, and which call
    claims: list[str] = field(default_factory=list)

    def put(self, place: str, status: TaskStatus) -> None:
        self.place, self.status = place, status

    def fall(self, kind: str, *, retryable: bool = True) -> None:
        """A leased one has failed."""
        self.ended = (self.claim, kind)
        if self.cancel:
            self.put("done", "cancelled")
        elif retryable and self.attempts < self.most:
            self.put("delayed", "queued")
            self.due = 0.0
        else:
            self.put("done", "failed")

    def anew(self) -> None:
        self.put("ready", "queued")
        self.attempts, self.cancel = 0, False
        if self.deadline is not None and self.deadline <= 0:
            self.deadline = DEADLINE_S


class QueueMachine(RuleBasedStateMachine):
    """Of one database, which each run begins by emptying."""

    durable: ClassVar[Durable]
    runner: ClassVar[asyncio.Runner]

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, Known] = {}
        self.idempotent: dict[tuple[str, str], str] = {}
        self.claimed: dict[tuple[str | None, str], list[str]] = {}
        self.paused = False
        self.claims: list[tuple[str, str]] = []  # of all time: task, claim
        self.begun = self.do(self._empty())

    def do(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(call)

    async def _empty(self) -> int:
        def step(tx: Any) -> None:
            for table in reversed(schema.metadata.sorted_tables):
                if table not in (schema.events, schema.lanes):
                    tx.conn.execute(delete(table))
            # The last one stays: its number is where the next run begins.
            last = select(func.max(schema.events.c.seq)).scalar_subquery()
            tx.conn.execute(delete(schema.events).where(schema.events.c.seq < last))

        await self.durable.store.write(step)
        return await self.durable.last_event()

    def refused(self, call: Coroutine[Any, Any, Any]) -> bool:
        try:
            self.do(call)
        except (Conflict, NotFound):
            return True
        return False

    # -- calls -------------------------------------------------------------------------------

    @rule(
        tenant=st.sampled_from(["a", "a", "a", "b"]),
        role=st.sampled_from(["", "", "r"]),
        unique=st.sampled_from([None, None, "u"]),
        idempotency=st.sampled_from([None, None, "i"]),
        key=st.sampled_from([None, "one", "one", "two", "two"]),
        most=st.integers(1, 2),
        delayed=st.sampled_from([False, False, False, True]),
        deadline=st.sampled_from([None, None, None, DEADLINE_S]),
        times=times,
    )
    def enqueue(
        self,
        tenant: str,
        role: str,
        unique: str | None,
        idempotency: str | None,
        key: str | None,
        most: int,
        delayed: bool,
        deadline: float | None,
        times: int,
    ) -> None:
        new = NewTask(
            type="t",
            role=role,
            unique_key=unique,
            # The body is of the key, so that it is never another one.
            idempotency_key=idempotency
            and repr((role, unique, key, most, delayed, deadline, idempotency)),
            concurrency=None if key is None else Concurrency(key=key, limit=KEYS[key]),
            retry=Retry(attempts=most, backoff_s=0.0),
            not_before=DELAY_S if delayed else 0.0,
            deadline=deadline,
            lease_s=LEASE_S,
        )
        for _ in range(times):
            [queued] = self.do(self.durable.queue.enqueue(tenant, [new]))
            there = self._there(tenant, new)
            assert queued.created == (there is None)
            if there is not None:
                assert queued.task.id == there
                continue
            id = queued.task.id
            place = "delayed" if delayed else "ready"
            self.tasks[id] = Known(*(id, tenant, role, unique, key, most, place, DELAY_S, deadline))
            if new.idempotency_key is not None:
                self.idempotent[tenant, new.idempotency_key] = id
            if unique is None and idempotency is None:
                break  # the same again is another one

    def _there(self, tenant: str, new: NewTask) -> str | None:
        known = self.idempotent.get((tenant, new.idempotency_key or ""))
        if known is not None and known in self.tasks:
            return known
        for task in self.tasks.values():
            same = task.tenant == tenant and task.unique == new.unique_key is not None
            if same and task.place != "done":
                return task.id
        return None

    @rule(
        tenant=st.sampled_from([None, None, "a"]),
        role=st.sampled_from(["", "r", "r"]),
        n=st.integers(1, 4),
        key=st.sampled_from([None, None, "k"]),
        times=times,
    )
    def claim(self, tenant: str | None, role: str, n: int, key: str | None, times: int) -> None:
        request = ClaimRequest(role=role, n=n, key=key)
        for _ in range(times):
            given = self.do(self.durable.queue.claim(tenant, request))
            before = self.claimed.get((tenant, key)) if key is not None else None
            if before is not None:
                held = {task.claim for task in self.tasks.values() if task.place == "leased"}
                assert {one.claim_id for one in given} == held & set(before)
                continue
            for one in given:
                task = self.tasks[one.task.id]
                assert task.place == "ready"
                assert task.role in ("", role)
                assert not (task.role == "r" and self.paused)
                assert tenant in (None, task.tenant)
                task.put("leased", "assigned")
                task.attempts += 1
                task.lease, task.claim = LEASE_S, one.claim_id
                assert task.claim not in task.claims
                task.claims.append(task.claim)
                self.claims.append((task.id, task.claim))
            assert len(given) <= n
            if len(given) < n:
                assert not self._claimable(tenant, role)
            if key is not None and given:
                self.claimed[tenant, key] = [one.claim_id for one in given]

    def _claimable(self, tenant: str | None, role: str) -> list[Known]:
        """What a claim could have been given still."""
        at_work = Counter(
            (task.tenant, task.key) for task in self.tasks.values() if task.place == "leased"
        )
        return [
            task
            for task in self.tasks.values()
            if task.place == "ready"
            and tenant in (None, task.tenant)
            and task.role in ("", role)
            and not (task.role == "r" and self.paused)
            and (task.key is None or at_work[task.tenant, task.key] < KEYS[task.key])
        ]

    @precondition(lambda self: self.claims)
    @rule(
        which=some,
        newest=st.sampled_from([True, True, True, False]),
        kind=st.sampled_from(["beat", "complete", "review", "fail", "give_up", "release"]),
        times=times,
    )
    def of_claim(self, which: int, newest: bool, kind: str, times: int) -> None:
        if newest:
            held = [(task.id, task.claim) for task in self.tasks.values() if task.place == "leased"]
        else:
            held = self.claims
        if not held:
            return
        id, claim = held[which % len(held)]
        queue = self.durable.queue
        call: Callable[[], Coroutine[Any, Any, Any]] = {
            "beat": lambda: queue.beat(claim, Beat(progress=0.5, logs="l")),
            "complete": lambda: queue.complete(claim, id),
            "review": lambda: queue.complete(claim, id, status="review_pending"),
            "fail": lambda: queue.fail(claim, "failed"),
            "give_up": lambda: queue.fail(claim, "given up", retryable=False),
            "release": lambda: queue.release(claim),
        }[kind]
        for _ in range(times):
            task = self.tasks.get(id)
            refused = self.refused(call())
            if task is None:
                assert refused
            elif task.place == "leased" and task.claim == claim:
                assert not refused
                self._end(task, kind)
            elif not refused:  # as it was said before, and of the last claim
                assert task.claim == claim
                assert (
                    kind == "release" or task.status == "cancelled" or task.ended == (claim, kind)
                )

    def _end(self, task: Known, kind: str) -> None:
        if kind == "beat":
            task.status, task.lease = "in_progress", LEASE_S
            return
        if kind in ("fail", "give_up"):
            task.fall(kind, retryable=kind == "fail")
            return
        task.ended = (task.claim, kind)
        if kind == "complete":
            task.put("done", "completed")
        elif kind == "review" and not task.cancel:
            task.put("held", "review_pending")
        elif task.cancel:
            task.put("done", "cancelled")
        else:
            task.put("ready", "queued")
            task.attempts -= 1
        if kind == "release":
            for key, claims in list(self.claimed.items()):
                token = task.claim.rpartition("~")[2]
                if any(one.endswith(token) for one in claims):
                    del self.claimed[key]

    @precondition(lambda self: self.tasks)
    @rule(
        which=some,
        kind=st.sampled_from(["cancel", "replay", "retry", "remove"]),
        times=times,
    )
    def of_task(self, which: int, kind: str, times: int) -> None:
        task = list(self.tasks.values())[which % len(self.tasks)]
        queue = self.durable.queue
        for _ in range(times):
            if kind == "remove":
                refused = self.refused(queue.remove(None, task.id))
                assert refused == (task.place == "leased")
                if not refused:
                    self.tasks.pop(task.id, None)
                continue
            refused = self.refused(getattr(queue, kind)(None, task.id))
            if kind == "cancel":
                assert not refused
                if task.place == "leased":
                    task.cancel = True
                elif task.place != "done":
                    task.put("done", "cancelled")
            elif kind == "retry" and task.place == "delayed":
                assert not refused
                task.place = "ready"
            elif task.status == "failed":
                assert refused == self._taken(task)
                if not refused:
                    task.anew()
            else:
                assert refused == (task.status != "queued")

    def _taken(self, task: Known) -> bool:
        """Whether another one has its uniqueness key now."""
        return any(
            other.unique == task.unique is not None
            and other.tenant == task.tenant
            and other.place != "done"
            for other in self.tasks.values()
        )

    @precondition(lambda self: self.tasks)
    @rule(which=some, to=st.sampled_from(list(TRANSITIONS)), times=times)
    def move(self, which: int, to: TaskStatus, times: int) -> None:
        task = list(self.tasks.values())[which % len(self.tasks)]
        for _ in range(times):
            refused = self.refused(self.durable.queue.move(None, task.id, to))
            if task.place == "leased":
                assert refused
            elif to == task.status:
                assert not refused
            elif to not in TRANSITIONS[task.status]:
                assert refused
            elif to == "queued":
                assert refused == (task.place == "done" and self._taken(task))
                if not refused:
                    task.anew()
            else:
                assert not refused
                task.put("done" if to in FINAL else "held", to)

    @rule(pause=st.booleans(), times=times)
    def pause(self, pause: bool, times: int) -> None:
        for _ in range(times):
            queue = self.durable.queue
            changed = self.do(queue.pause("r") if pause else queue.resume("r"))
            assert changed == (self.paused != pause)
            self.paused = pause

    @rule(seconds=st.sampled_from((0.0, *PASSES_S)))
    def pass_time(self, seconds: float) -> None:
        self.do(self.durable.pass_time(seconds))
        for task in self.tasks.values():
            task.due -= seconds
            task.lease -= seconds
            if task.deadline is not None:
                task.deadline -= seconds
            if task.place == "done" or task.status in DECIDED:
                continue
            if task.deadline is not None and task.deadline <= 0:
                task.put("done", "failed")
                task.ended = ("", "")
            if task.place == "leased" and task.lease <= 0:
                task.fall("expired")
            if task.place == "delayed" and task.due <= 0:
                task.place = "ready"

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def is_as_the_model_says(self) -> None:
        rows = {row["id"]: row for row in self.do(self.durable.rows(schema.tasks))}
        assert set(rows) == set(self.tasks)
        for id, row in rows.items():
            task = self.tasks[id]
            place = "ready" if row["state"] == "parked" else row["state"]
            assert (place, row["status"]) == (task.place, task.status), id
            assert row["attempts"] == task.attempts <= row["max_attempts"]
            assert row["cancel_requested"] == task.cancel
            assert (row["state"] == "done") == (row["status"] in FINAL)
            assert (row["finished_at"] is not None) == (row["state"] == "done")
            assert (row["lease_until"] is not None) == (row["state"] == "leased")
            assert (row["due"] is not None) == (row["state"] == "delayed")
        self._limits_hold(list(rows.values()))

    def _limits_hold(self, rows: list[dict[str, Any]]) -> None:
        keyed = [row for row in rows if row["concurrency_key"] is not None]

        def counted(*states: str) -> Counter[tuple[str, str]]:
            return Counter(
                (row["tenant"], row["concurrency_key"]) for row in keyed if row["state"] in states
            )

        for (_, key), count in counted("leased").items():
            assert count <= KEYS[key]
        for where in counted("parked"):
            assert where in counted("leased", "ready"), f"{where} is parked behind nobody"
        unfinished = [
            (row["tenant"], row["unique_key"])
            for row in rows
            if row["unique_key"] is not None and row["state"] != "done"
        ]
        assert len(unfinished) == len(set(unfinished))

    def teardown(self) -> None:
        """Events of each subject come in order, and lead to where it is."""
        events = self.do(self.durable.events(after=self.begun))
        now: dict[str, Any] = {}
        for event in events:
            if event.topic == "task.deleted":
                del now[event.subject]
            elif event.topic.startswith("task."):
                status = event.data["status"]
                if event.topic == "task.queued" and event.subject not in now:
                    assert status == "queued"
                else:
                    before = now[event.subject]
                    assert status == before or status in TRANSITIONS[before]
                now[event.subject] = status
        assert now == {task.id: task.status for task in self.tasks.values()}


@pytest.fixture(params=KINDS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[type[QueueMachine]]:
    server = request.getfixturevalue("postgres") if request.param == "postgres" else None
    with asyncio.Runner() as runner:
        made = durable_queue(request.param, tmp_path, server)
        durable = runner.run(made.__aenter__())
        try:
            yield type("Machine", (QueueMachine,), {"durable": durable, "runner": runner})
        finally:
            runner.run(made.__aexit__(None, None, None))


def _run(machine: type[QueueMachine], runs: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=30,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("part", range(4))
def test_no_order_of_calls_breaks_the_queue(machine: type[QueueMachine], part: int) -> None:
    """200 runs in all."""
    _run(seed(part)(machine), 25)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_no_order_of_calls_breaks_the_queue_in_2000_runs(machine: type[QueueMachine]) -> None:
    _run(machine, 1000)
