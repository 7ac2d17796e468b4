"""``hive tasks``, ``drones`` and ``events`` against a real queen, in a pipe and on a terminal."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from job_client.tasks import TaskClient
from keeper import task_tables
from keeper.exits import Exit
from keeper.output import Output
from operations.tasks import Beat, ClaimRequest, NewDrone, NewTask, QueueEvent, Retry
from tests.cluster import Cluster, Daemon, cluster, until
from tests.terminal import COLUMNS, Ran, hive, start, terminal


@pytest.fixture(scope="module")
async def queen() -> AsyncIterator[Daemon]:
    async with cluster() as made:
        yield await made.queen()


@pytest.fixture
async def tasks(queen: Daemon) -> AsyncIterator[TaskClient]:
    async with TaskClient(queen.url) as client:
        yield client


@pytest.fixture
def kind() -> str:
    """A type that no other test uses."""
    return f"kind-{uuid.uuid4().hex[:8]}"


async def run(queen: Daemon, *arguments: str, stdin: bytes = b"") -> Ran:
    return await hive(*arguments, url=queen.url, stdin=stdin)


async def claimed(tasks: TaskClient, kind: str, **more: Any) -> str:
    """A claim of the next task of this type."""
    [claim] = await tasks.claim(ClaimRequest(drone_id="drone-1", types=(kind,), **more))
    return claim.claim_id


# -- tasks ---------------------------------------------------------------------------------------


async def test_a_task_is_added_with_all_that_it_asks_for(
    queen: Daemon, tasks: TaskClient, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "payload.json").write_text('{"suite": "mmlu", "none": null}')
    ran = await run(
        queen,
        *("tasks", "add", kind, "--title", "Nightly", "--payload", f"@{tmp_path}/payload.json"),
        *("--priority", "7", "--role", "evaluator", "--capability", "gpu", "--capability", "bash"),
        *("--tag", "night", "--delay", "10m", "--deadline", "2h", "--lease", "5m"),
        *("--attempts", "4", "--key", f"{kind}-key", "--json"),
    )
    assert (ran.code, ran.err) == (0, "")
    task = await tasks.get(ran.json["id"])
    assert (task.type, task.title, task.role) == (kind, "Nightly", "evaluator")
    assert task.payload == {"suite": "mmlu", "none": None}
    assert (task.priority, task.max_attempts, task.tags) == (7, 4, ("night",))
    assert set(task.capabilities) == {"gpu", "bash"}
    assert task.not_before is not None
    assert task.deadline is not None
    assert round((task.not_before - task.created_at) / 60) == 10
    assert round((task.deadline - task.created_at) / 3600) == 2


async def test_limits_hold_and_secrets_are_given_to_who_claims(
    queen: Daemon, tasks: TaskClient, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("from a file\n")
    add = (*("tasks", "add", kind), "--secret", "TOKEN", "--secret", f"KEY=@{tmp_path}/key")
    env = {"TOKEN": "from the environment"}
    for limit in (("--concurrency", kind), ("--rate", f"{kind}=1/1h")):
        for _ in range(2):
            ran = await hive(*add, *limit, url=queen.url, env=env)
            assert (ran.code, ran.err) == (0, "")
        [claim] = await tasks.claim(ClaimRequest(types=(kind,), n=2))
        assert claim.secrets == {"TOKEN": "from the environment", "KEY": "from a file"}
        for left in await tasks.waiting(type=kind):
            await tasks.cancel(left.id)
        await tasks.complete(claim.claim_id)
    ran = await run(queen, *add[:3], "--secret", "PIPED=@-", "--concurrency", "k=2", stdin=b"x")
    assert ran.code == 0
    [claim] = await tasks.claim(ClaimRequest(types=(kind,)))
    assert claim.secrets == {"PIPED": "x"}
    await tasks.complete(claim.claim_id)


async def test_the_same_key_again_is_the_same_task(queen: Daemon, kind: str) -> None:
    add = ("tasks", "add", kind, "--payload", "@-", "--key", f"{kind}-key")
    first = await run(queen, *add, stdin=b'{"a": 1}')
    second = await run(queen, *add, stdin=b'{"a": 1}')
    other = await run(queen, *add, stdin=b'{"a": 2}')
    id = first.out.split()[0]
    assert first.out == f"{id} is queued.\n"
    assert second.out == f"{id} was there already, and is queued.\n"
    assert other.code == Exit.REFUSED
    assert "another body" in other.err


async def test_ls_chooses(queen: Daemon, tasks: TaskClient, kind: str) -> None:
    made = await tasks.enqueue_all([NewTask(type=kind, role=kind), NewTask(type=kind)])
    await tasks.cancel(made[0].id)
    every, gone, of_role, one = await asyncio.gather(
        run(queen, "tasks", "ls", "--type", kind),
        run(queen, "tasks", "ls", "--type", kind, "--status", "cancelled,failed", "--json"),
        run(queen, "tasks", "ls", "--role", kind, "--json"),
        run(queen, "tasks", "ls", "--type", kind, "-n", "1"),
    )
    heading, *rows = every.out.splitlines()
    assert heading.split() == ["TASK", "STATUS", "PRIO", "AGE", "WHAT"]
    assert [row.split()[:2] for row in rows] == [
        [made[1].id, "queued"],
        [made[0].id, "cancelled"],
    ]
    assert [task["id"] for task in gone.json["tasks"]] == [made[0].id]
    assert [task["id"] for task in of_role.json["tasks"]] == [made[0].id]
    assert made[1].id in one.out
    assert made[0].id not in one.out
    assert "--limit" in one.err
    none = await run(queen, "tasks", "ls", "--type", f"{kind}-none")
    assert (none.code, none.out) == (0, "")
    assert "hive tasks add" in none.err


async def test_show_tells_what_became_of_a_task(
    queen: Daemon, tasks: TaskClient, kind: str
) -> None:
    task = await tasks.enqueue(NewTask(type=kind, title="T", payload={"a": 1}))
    claim = await claimed(tasks, kind)
    await tasks.beat(claim, Beat(progress=0.25, logs="one\ntwo"))
    ran = await run(queen, "tasks", "show", task.id, "--logs")
    shown = dict(line.split(maxsplit=1) for line in ran.out.splitlines()[:-2])
    assert (shown["status"], shown["progress"]) == ("in_progress", "25%")
    assert (shown["drone"], shown["payload"]) == ("drone-1", '{"a": 1}')
    assert shown["lease"].startswith("in ")
    assert ran.out.endswith("\none\ntwo\n")
    await tasks.fail(claim, "it broke", retryable=False)
    failed = await run(queen, "tasks", "show", task.id)
    assert "it broke (drone_failed)" in failed.out
    as_json = (await run(queen, "tasks", "show", task.id, "--logs", "--json")).json
    assert as_json["error"]["message"] == "it broke"
    assert [line["text"] for line in as_json["logs"]] == ["one\ntwo"]


async def test_cancel_retry_replay_and_rm(queen: Daemon, tasks: TaskClient, kind: str) -> None:
    retry = Retry(attempts=2, backoff_s=3600, backoff_max_s=3600)
    task = await tasks.enqueue(NewTask(type=kind, retry=retry))
    await tasks.fail(await claimed(tasks, kind), "once")
    assert (await run(queen, "tasks", "retry", task.id)).out == f"{task.id} is queued.\n"
    await tasks.fail(await claimed(tasks, kind), "twice")
    assert (await run(queen, "tasks", "replay", task.id)).out == f"{task.id} is queued.\n"
    claim = await claimed(tasks, kind)
    cancelling = await run(queen, "tasks", "cancel", task.id)
    assert "is being cancelled: its drone is told at its next heartbeat" in cancelling.out
    held = await run(queen, "tasks", "rm", task.id)
    assert held.code == Exit.REFUSED
    assert "Cancel it first" in held.err
    await tasks.release(claim)
    again = await run(queen, "tasks", "cancel", task.id)
    assert again.out == f"{task.id} was already cancelled.\n"
    refused = await run(queen, "tasks", "replay", task.id, "--json")
    assert (refused.code, refused.error["code"]) == (Exit.REFUSED, "not_failed")
    assert (await run(queen, "tasks", "rm", task.id)).out == f"{task.id} is deleted.\n"
    gone = await run(queen, "tasks", "rm", task.id)
    assert (gone.code, gone.out) == (Exit.REFUSED, "")
    fresh = await tasks.enqueue(NewTask(type=kind))
    assert (await run(queen, "tasks", "cancel", fresh.id)).out == f"{fresh.id} is cancelled.\n"


async def test_roles_are_paused_and_resumed(queen: Daemon, tasks: TaskClient, kind: str) -> None:
    await tasks.enqueue(NewTask(type=kind, role=kind))
    paused = await run(queen, "tasks", "pause", kind)
    assert paused.out == f"Tasks of role {kind} are paused.\n"
    assert "paused already" in (await run(queen, "tasks", "pause", kind)).out
    roles = await run(queen, "tasks", "roles")
    [row] = [line.split() for line in roles.out.splitlines() if line.startswith(kind)]
    assert row[1:5] == ["paused", "1", "0", "0"]
    resumed = await run(queen, "tasks", "resume", kind, "--json")
    assert resumed.json == {"role": kind, "changed": True}
    assert "not paused" in (await run(queen, "tasks", "resume", kind)).out


async def test_drones_are_listed(queen: Daemon, tasks: TaskClient, kind: str) -> None:
    await tasks.register(NewDrone(id=f"{kind}-1", role=kind, capabilities=("bash", "python")))
    await tasks.register(NewDrone(id=f"{kind}-2", role=kind))
    await tasks.heard(f"{kind}-2", "offline")
    ran = await run(queen, "drones", "ls", "--role", kind)
    heading, *rows = ran.out.splitlines()
    assert heading.split() == ["DRONE", "ROLE", "STATUS", "HEARD", "TENANT", "CAN"]
    assert [row.split()[0] for row in rows] == [f"{kind}-1", f"{kind}-2"]
    assert rows[0].endswith("bash, python")
    active = await run(queen, "drones", "ls", "--role", kind, "--active", "--json")
    assert [drone["id"] for drone in active.json["drones"]] == [f"{kind}-1"]


# -- a wrong command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ls", "--status", "nonsense"), "There is no status 'nonsense'. There are queued,"),
        (("ls", "--limit", "0"), "greater than or equal to 1"),
        (("add",), "Missing argument 'TYPE'"),
        (("add", "x" * 200), "'type': it"),
        (("add", "t", "--payload", "{"), "The payload is no JSON"),
        (("add", "t", "--payload", "[1]"), "The payload must be a JSON object"),
        (("add", "t", "--payload", "@/no/such/file"), "cannot be read from /no/such/file: No such"),
        (("add", "t", "--delay", "soon"), "--delay takes a time such as 30 (seconds), 10m"),
        (("add", "t", "--deadline", "0"), "'deadline': it must be greater than 0"),
        (("add", "t", "--lease", "9d"), "'lease_s': it must be less than"),
        (("add", "t", "--concurrency", "=2"), "--concurrency takes a key"),
        (("add", "t", "--concurrency", "gpu=many"), "--concurrency takes a key"),
        (("add", "t", "--concurrency", "gpu=0"), "'limit': it must be greater than"),
        (("add", "t", "--rate", "api=60"), "--rate takes a key, a number and a time"),
        (("add", "t", "--rate", "api=60/soon"), "--rate takes a time such as"),
        (("add", "t", "--secret", "TOKEN=hunter2"), "--secret takes the name of a variable"),
        (("add", "t", "--secret", "NO_SUCH"), "There is no variable NO_SUCH"),
        (("add", "t", "--secret", "A=@/no/such"), "The secret cannot be read from /no/such"),
        (("add", "t", "--priority", "1000"), "less than or equal to 100"),
        (("show", "a/b"), "'a/b' is no id of a task. 'hive tasks ls' lists them."),
    ],
)
async def test_a_wrong_command_line_is_told_in_a_sentence(
    queen: Daemon, arguments: tuple[str, ...], said: str
) -> None:
    ran = await run(queen, "tasks", *arguments)
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.err


async def test_an_unknown_task_is_refused_and_a_hive_keeps_none(
    queen: Daemon, fresh: Cluster
) -> None:
    ran = await run(queen, "tasks", "show", "nobody")
    assert (ran.code, ran.out) == (Exit.REFUSED, "")
    assert "There is no task 'nobody'" in ran.err
    agent = await fresh.hive()
    asked = await hive("tasks", "ls", url=agent.url)
    assert asked.code == Exit.USAGE
    assert "Name the queen with --url" in asked.err


# -- events --------------------------------------------------------------------------------------


async def test_events_that_were_are_printed_in_order(
    queen: Daemon, tasks: TaskClient, kind: str
) -> None:
    task = await tasks.enqueue(NewTask(type=kind))
    await tasks.cancel(task.id)
    ran = await run(queen, "events")
    assert (ran.code, ran.err) == (0, "")
    ours = [line.split() for line in ran.out.splitlines() if task.id in line]
    assert [line[2] for line in ours] == ["task.queued", "task.cancelled"]
    numbers = [int(line.split()[0]) for line in ran.out.splitlines()]
    assert numbers == sorted(numbers)
    after = ours[0][0]
    later = await run(queen, "events", "--after", after, "--topic", "task.*", "--json")
    [event] = [json.loads(line) for line in later.out.splitlines()]
    assert (event["topic"], event["subject"]) == ("task.cancelled", task.id)


async def test_events_are_followed_until_ctrl_c(
    queen: Daemon, tasks: TaskClient, kind: str
) -> None:
    before = await tasks.enqueue(NewTask(type=kind))
    [seq] = [
        line.split()[0]
        for line in (await run(queen, "events", "--topic", "task.queued")).out.splitlines()
        if before.id in line
    ]
    process = await start("events", "-f", "--topic", "task.q*", "--after", seq, url=queen.url)
    assert process.stdout is not None
    task = await tasks.enqueue(NewTask(type=kind))
    async with asyncio.timeout(20):
        line = (await process.stdout.readline()).decode().split()
    assert (line[2], line[3]) == ("task.queued", task.id)
    process.send_signal(2)
    async with asyncio.timeout(20):
        _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (Exit.CANCELLED, "cancelled\n")


async def test_bad_topics_and_places_are_refused(queen: Daemon) -> None:
    topic, place = await asyncio.gather(
        run(queen, "events", "--topic", "No Topic"),
        run(queen, "events", "--after", "999999999"),
    )
    assert [topic.code, place.code] == [Exit.REFUSED] * 2
    assert "task.*" in topic.err
    assert "not kept" in place.err


# -- on a terminal of 80 columns -----------------------------------------------------------------


async def test_tables_fit_a_terminal(queen: Daemon, tasks: TaskClient, kind: str) -> None:
    long = "a title that is far longer than what is left of a line, and then some"
    made = await tasks.enqueue_all(
        [NewTask(type=kind, title=long, role="evaluator", priority=n) for n in (-100, 100)]
    )
    await tasks.move(made[0].id, "in_progress")
    await tasks.move(made[0].id, "review_pending")
    capabilities = tuple(f"capability-{n}" for n in range(9))
    await tasks.register(NewDrone(id=f"{kind}/1", role=kind, capabilities=capabilities))
    for arguments, parts in (
        (("tasks", "ls", "--type", kind), (made[0].id, made[1].id, "review_pending", "-100")),
        (("tasks", "show", made[0].id), (made[0].id, long)),
        (("tasks", "roles"), ("evaluator", "open")),
        (("drones", "ls", "--role", kind), (f"{kind}/1", "capability-8")),
    ):
        async with terminal(*arguments, url=queen.url) as shown:
            assert await shown.ends() == 0
            for part in parts:
                assert part in shown.words
            if arguments[1] != "show":  # whose values are for copying
                assert max(map(len, shown.text.splitlines())) <= COLUMNS
            assert "\x1b[" in shown.raw


async def test_events_are_followed_on_a_terminal(
    queen: Daemon, tasks: TaskClient, kind: str
) -> None:
    async with terminal("events", "--follow", "--topic", "drone.*", url=queen.url) as shown:

        async def heard() -> bool:  # it may not listen yet
            await tasks.register(NewDrone(id=f"{kind}-{uuid.uuid4().hex}"))
            return "drone.joined" in shown.words

        await until(heard, "an event on the terminal", every_s=0.2)
        shown.types("\x03")
        assert await shown.ends() == Exit.CANCELLED
        assert shown.words.endswith("cancelled")


async def test_help_fits_and_names_every_command() -> None:
    for group, names in (
        ("tasks", ("ls", "add", "show", "cancel", "retry", "replay", "rm", "pause", "roles")),
        ("drones", ("ls",)),
        ("queue", ("migrate", "callback-key")),
    ):
        shown = await hive(group, "--help")
        assert shown.code == 0
        assert all(f" {name} " in shown.out for name in names)
        assert max(map(len, shown.out.splitlines())) <= COLUMNS
    for command in ("tasks add", "tasks ls", "events"):
        shown = await hive(*command.split(), "--help")
        assert max(map(len, shown.out.splitlines())) <= COLUMNS


def test_an_event_of_a_stranger_cannot_drive_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    event = QueueEvent(
        seq=1,
        topic="task.failed",
        subject="t-1",
        tenant="default",
        at=0,
        data={"error": {"message": "\x1b[2Jgone"}},
    )
    out = Output()
    out.rich_out = True
    out.say(task_tables.event(event))
    assert "\x1b[2J" not in capsys.readouterr().out


async def test_what_drones_and_callers_say_cannot_drive_a_terminal_nor_break_a_table(
    queen: Daemon, tasks: TaskClient, kind: str
) -> None:
    evil = "a\x1b[2J\x9b31m\nstatus  completed\tb"
    task = await tasks.enqueue(NewTask(type=kind, title=evil, payload={"a": evil}))
    claim = await claimed(tasks, kind)
    await tasks.beat(claim, Beat(progress=0.5, logs=f"{evil}\rdone"))
    await tasks.fail(claim, evil, retryable=False)
    await tasks.register(NewDrone(id=f"{kind}/1", role=kind, metadata={"a": evil}))
    for arguments in (
        ("tasks", "ls", "--type", kind),
        ("tasks", "show", task.id, "--logs"),
        ("tasks", "show", task.id, "--logs", "--json"),
        ("events", "--topic", "task.*"),
        ("drones", "ls", "--role", kind),
        ("drones", "ls", "--role", kind, "--json"),
    ):
        ran = await run(queen, *arguments)
        assert (ran.code, ran.err) == (0, "")
        assert {c for c in ran.out if not c.isprintable()} <= {"\n", "\t"}, arguments
        async with terminal(*arguments, url=queen.url) as shown:
            assert await shown.ends() == 0
            assert "\x1b[2J" not in shown.raw
            assert "\x9b" not in shown.raw
    listed = (await run(queen, "tasks", "ls", "--type", kind)).out.splitlines()
    assert len(listed) == 2
    assert r"a\x1b[2J\x9b31m\nstatus completed\tb" in listed[1]
    lines = (await run(queen, "tasks", "show", task.id)).out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("status ")] == ["failed"]
    assert any(line.startswith("   ") and "status  completed" in line for line in lines)
    logs = (await run(queen, "tasks", "show", task.id, "--logs")).out
    assert logs.endswith("a\\x1b[2J\\x9b31m\nstatus  completed\tb\\rdone\n")
    as_json = (await run(queen, "tasks", "show", task.id, "--logs", "--json")).json
    assert as_json["title"] == as_json["payload"]["a"] == as_json["error"]["message"] == evil
