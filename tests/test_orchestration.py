"""The older package's calls, on a file of this process and through a queen; its examples as they
stand in its README."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import hive_orchestration as orchestration
from hive_orchestration.embedded import background
from job_client.tasks import TaskClient
from operations.errors import Conflict, HiveError, InvalidRequest
from operations.tasks import ClaimRequest
from tests.cluster import Cluster, clean_env

RUN_S = 60.0

# Runs a text as a module, or, where it awaits, in an event loop, as a notebook does.
RUN = """
import ast, asyncio, inspect, sys
code = compile(sys.stdin.read(), "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
names = {}
async def run():
    await eval(code, names)
if code.co_flags & inspect.CO_COROUTINE:
    asyncio.run(run())
else:
    exec(code, names)
"""

TASK_OPERATIONS = """
from hive_orchestration import (
    create_task,
    get_task,
    update_task_status,
    get_tasks_by_status,
    get_queued_tasks,
)

# Create a task
task_id = await create_task(
    task_type="deployment",
    payload={"script": "deploy.sh", "env": "production"},
    priority=5,
)

# Get task by ID
task = await get_task(task_id)

# Update task status
await update_task_status(task_id, "running")

# Get tasks by status
pending_tasks = await get_tasks_by_status("pending")
"""

WORKER_OPERATIONS = """
from hive_orchestration import (
    register_worker,
    update_worker_heartbeat,
    get_active_workers,
)

# Register a worker
worker_id = await register_worker(
    worker_type="executor",
    capabilities=["python", "bash"],
)

# Update worker heartbeat
await update_worker_heartbeat(worker_id)

# Get active workers
workers = await get_active_workers()
"""

CLIENT = """
from hive_orchestration import get_client

# Get client instance
client = get_client()

# Register worker
client.register_worker("worker-1", role="executor", capabilities=["python", "bash"])

# Create task
task_id = client.create_task(
    title="Run analysis",
    task_type="analysis",
    payload={"script": "analyze.py"},
    priority=5,
)

# Get pending tasks
pending_tasks = client.get_pending_tasks(task_type="analysis")

# Process task
client.update_task_status(task_id, "running")

# Send worker heartbeat
client.heartbeat("worker-1", status="active")

# Complete task
client.update_task_status(task_id, "completed")
"""

DIRECT = """
from hive_orchestration import (
    create_task,
    register_worker,
    get_queued_tasks,
    update_task_status,
)

# Register worker
register_worker("worker-1", "executor", ["python"])

# Create task
task_id = create_task("python_script", payload={"script": "analyze.py"})

# Get queued tasks
tasks = get_queued_tasks()

# Process task
update_task_status(task_id, "running")
update_task_status(task_id, "completed")
"""


# -- the examples --------------------------------------------------------------------------------


@pytest.fixture(params=["file", "queen"])
async def env(
    request: pytest.FixtureRequest, fresh: Cluster, tmp_path: Path
) -> AsyncIterator[dict[str, str]]:
    """The environment of a program, with a queue of its own."""
    if request.param == "file":
        yield environment(tmp_path)
    else:
        queen = await fresh.queen()
        yield {**environment(tmp_path), "HIVE_QUEEN_URL": queen.url}


def environment(folder: Path) -> dict[str, str]:
    return {**clean_env(), "XDG_STATE_HOME": str(folder)}


async def ran(text: str, env: dict[str, str], *names: str) -> list[Any]:
    """Run an example; what these names are at its end. Nothing may be said on the way."""
    said = f"\nimport json; print(json.dumps([{', '.join(names)}]))\n"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", RUN),
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(RUN_S):
        out, err = await process.communicate((text + said).encode())
    assert (process.returncode, err.decode()) == (0, "")
    return list(json.loads(out))


async def test_the_example_of_task_operations(env: dict[str, str]) -> None:
    task_id, task, pending = await ran(TASK_OPERATIONS, env, "task_id", "task", "pending_tasks")
    assert task["id"] == task_id
    assert task["task_type"] == task["type"] == task["title"] == "deployment"
    assert task["payload"] == {"script": "deploy.sh", "env": "production"}
    assert (task["priority"], task["status"]) == (5, "queued")
    assert pending == []
    now = "from hive_orchestration import get_tasks_by_status as by; found = by('running')"
    [[found]] = await ran(now, env, "found")
    assert (found["id"], found["status"]) == (task_id, "in_progress")


async def test_the_example_of_worker_operations(env: dict[str, str]) -> None:
    worker_id, workers = await ran(WORKER_OPERATIONS, env, "worker_id", "workers")
    [worker] = workers
    assert (worker["id"], worker["role"], worker["status"]) == (worker_id, "executor", "active")
    assert sorted(worker["capabilities"]) == ["bash", "python"]


async def test_the_example_of_the_client(env: dict[str, str]) -> None:
    more = "task, workers = client.get_task(task_id), client.get_available_workers('executor')"
    names = ("task_id", "pending_tasks", "task", "workers")
    task_id, pending, task, workers = await ran(CLIENT + more, env, *names)
    assert [one["id"] for one in pending] == [task_id]
    assert (task["title"], task["task_type"]) == ("Run analysis", "analysis")
    assert task["status"] == "completed"
    assert [one["id"] for one in workers] == ["worker-1"]


async def test_the_example_of_direct_operations(env: dict[str, str]) -> None:
    more = "from hive_orchestration import get_task, get_worker\n"
    more += "task, worker = get_task(task_id), get_worker('worker-1')"
    names = ("task_id", "tasks", "task", "worker")
    task_id, tasks, task, worker = await ran(DIRECT + more, env, *names)
    assert [one["id"] for one in tasks] == [task_id]
    assert (task["task_type"], task["status"]) == ("python_script", "completed")
    assert (worker["role"], worker["capabilities"]) == ("executor", ["python"])


async def test_the_client_says_what_is_refused(env: dict[str, str]) -> None:
    text = """
from hive_orchestration import get_client
client = get_client()
task_id = client.create_task(task_type="t")
refused = []
for status in ("approved", "nonsense"):
    try:
        client.update_task_status(task_id, status)
    except Exception as error:
        refused.append([type(error).__name__, str(error)])
found = [client.update_task_status("nobody", "completed"), client.get_task("nobody"),
         client.heartbeat("nobody"), client.delete_task("nobody"), client.delete_task(task_id)]
"""
    refused, found = await ran(text, env, "refused", "found")
    assert [kind for kind, _ in refused] == ["Conflict", "InvalidRequest"]
    assert "cannot become approved; it can become" in refused[0][1]
    assert "There is no status 'nonsense'" in refused[1][1]
    assert found == [False, None, False, False, True]


async def test_the_readmes_programs_run(fresh: Cluster, tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.partition("## Durable work")[2].partition("\n## ")[0]
    client, library = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    queen = await fresh.queen()
    env = environment(tmp_path)
    await ran(client.replace("http://127.0.0.1:7833", queen.url), env)
    async with TaskClient(queen.url) as tasks:
        [task] = (await tasks.page(type="greet")).tasks
    assert (task.status, task.result) == ("completed", "Hello, Ann!")
    alone = library.replace("print(", "queued = (")
    [queued] = await ran(alone, env, "queued")
    assert [task["task_type"] for task in queued] == ["python_script"]


# -- in this process -----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process's state folder, for a while."""
    for name in ("HIVE_QUEEN_URL", "HIVE_STATE_DIR", "HIVE_SECRET", "HIVE_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    yield tmp_path / "hive"
    background.close()


async def test_calls_that_nobody_awaits_are_made_in_order(home: Path) -> None:
    task_id = await orchestration.create_task("t")
    for status in ("running", "review_pending", "rework_needed", "running", "completed"):
        orchestration.update_task_status(task_id, status)
    assert (await orchestration.get_task(task_id))["status"] == "completed"


async def test_the_client_is_done_when_it_returns_in_a_loop_too(home: Path) -> None:
    client = orchestration.get_client()
    task = client.get_task(client.create_task("Title", "kind"))
    assert task is not None
    assert (task["title"], task["task_type"]) == ("Title", "kind")


async def test_many_calls_at_once(home: Path) -> None:
    made = await asyncio.gather(*(orchestration.create_task("t") for _ in range(50)))
    queued = await orchestration.get_queued_tasks(limit=100)
    assert [task["id"] for task in queued] == made


async def test_queued_tasks_come_by_priority_then_age(home: Path) -> None:
    create = orchestration.create_task
    made = [await create("t", priority=priority) for priority in (1, 5, 1, 5)]
    other = await create("other", priority=9)
    queued = [task["id"] for task in await orchestration.get_queued_tasks(4)]
    assert queued == [other, made[1], made[3], made[0]]
    typed = await orchestration.get_queued_tasks(task_type="t")
    assert [task["id"] for task in typed] == [made[1], made[3], made[0], made[2]]


async def test_what_older_code_says_of_a_task_is_told_again(home: Path) -> None:
    task_id = await orchestration.create_task(
        "Title",
        "kind",
        "what it is",
        {"steps": ["a"]},
        {"n": None},
        7,
        ["x", "y"],
        max_retries=4,
        current_phase="start",
        role="builder",
    )
    task = await orchestration.get_task(task_id)
    assert task["description"] == "what it is"
    assert task["workflow"] == {"steps": ["a"]}
    assert task["payload"] == {"n": None}
    assert (task["priority"], task["tags"], task["max_retries"]) == (7, ["x", "y"], 4)
    assert (task["current_phase"], task["role"]) == ("start", "builder")
    said = {"assigned_worker": "w", "current_phase": "test"}
    assert await orchestration.update_task_status(task_id, "in_progress", said)
    task = await orchestration.get_task(task_id)
    assert (task["assigned_worker"], task["current_phase"]) == ("w", "test")


async def test_wrong_arguments_are_named(home: Path) -> None:
    for wrong, said in (
        ({"task_type": "t", "priority": 10_000}, "priority"),
        ({"task_type": "t", "payload": {"x": {1, 2}}}, "payload"),
        ({"task_type": "t", "colour": "red"}, "colour"),
        ({"payload": {}}, "type"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            await orchestration.create_task(**wrong)
    with pytest.raises(InvalidRequest, match="register_worker: field 'id'"):
        await orchestration.register_worker("no such id", "executor")
    with pytest.raises(InvalidRequest, match="active, idle, offline, error"):
        await orchestration.update_worker_heartbeat("worker-1", "asleep")


async def test_workers_are_registered_described_anew_and_forgotten(home: Path) -> None:
    register, get_worker = orchestration.register_worker, orchestration.get_worker
    assert await register("worker-1", "executor", ["python"])
    assert await register("worker-1", "tester", ["bash"], {"rack": 3})
    worker = await get_worker("worker-1")
    assert (worker["role"], worker["capabilities"]) == ("tester", ["bash"])
    assert worker["metadata"] == {"rack": 3}
    assert await orchestration.get_active_workers("executor") == []
    assert await orchestration.update_worker_heartbeat("worker-1", "idle")
    assert await orchestration.get_active_workers("tester") == []
    assert await orchestration.update_worker_heartbeat("worker-1", "active")
    [active] = await orchestration.get_active_workers("tester")
    assert active["last_heartbeat"] >= worker["last_heartbeat"]
    assert await orchestration.unregister_worker("worker-1")
    assert not await orchestration.unregister_worker("worker-1")
    assert await get_worker("worker-1") is None


async def test_a_worker_that_is_silent_is_no_active_one(home: Path) -> None:
    await orchestration.register_worker("worker-1", "executor")
    with sqlite3.connect(home / "queue.db") as db:
        db.execute("UPDATE drones SET heartbeat_at = heartbeat_at - 700000")
    assert await orchestration.get_active_workers() == []
    assert await orchestration.update_worker_heartbeat("worker-1")
    assert len(await orchestration.get_active_workers()) == 1


async def test_a_folder_that_cannot_be_used_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HIVE_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(HiveError, match="HIVE_STATE_DIR"):
        await orchestration.create_task("t")
    monkeypatch.delenv("HIVE_STATE_DIR")
    assert await orchestration.create_task("t")
    assert (home.stat().st_mode & 0o777, (home / "queue.key").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )


def test_many_threads_ask_at_once(home: Path) -> None:
    made: list[str] = []

    def create() -> None:
        made.extend(orchestration.create_task("t") for _ in range(20))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queued = orchestration.get_client().get_pending_tasks()
    assert sorted(task["id"] for task in queued) == sorted(made)
    assert len(set(made)) == 160


# -- beside a queen ------------------------------------------------------------------------------


async def test_a_queen_and_a_program_work_on_one_file(home: Path, fresh: Cluster) -> None:
    """Each sees at once what the other has done, and none moves what a claim holds."""
    task_id = await orchestration.create_task("t", secrets={"token": "hush"})
    queen = await fresh.start("queen", "--port=0", state_dir=home)
    async with TaskClient(queen.url) as tasks:
        waiting = asyncio.create_task(tasks.claim(ClaimRequest(drone_id="d", n=2)))
        [claim] = await waiting
        assert (claim.task.id, claim.secrets) == (task_id, {"token": "hush"})
        assert (await orchestration.get_task(task_id))["assigned_worker"] == "d"
        with pytest.raises(Conflict, match="worked on by d"):
            await orchestration.update_task_status(task_id, "completed")
        await tasks.complete(claim.claim_id, {"ok": True})
        task = await orchestration.get_task(task_id)
        assert (task["status"], task["result"]) == ("completed", {"ok": True})

        async def here() -> list[str]:
            return [await orchestration.create_task("t") for _ in range(50)]

        async def there() -> list[str]:
            claims: list[str] = []
            while len(claims) < 50:
                found = await tasks.claim(ClaimRequest(drone_id="d", n=10, wait=10))
                claims += [claim.task.id for claim in found]
                await tasks.complete_all([(claim.claim_id, None) for claim in found])
            return claims

        made, done = await asyncio.gather(here(), there())
        assert sorted(done) == sorted(made)


# -- processes -----------------------------------------------------------------------------------


async def test_a_fork_works_on_the_same_queue(env: dict[str, str]) -> None:
    text = """
import os, threading
from hive_orchestration import create_task, get_client
create_task("t")
stop = threading.Event()
def on():
    while not stop.is_set():
        create_task("busy")
busy = threading.Thread(target=on)
busy.start()
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        for _ in range(10):
            create_task("child")
        os._exit(0)
    children.append(child)
    create_task("t")
ended = [os.waitpid(child, 0)[1] for child in children]
stop.set()
busy.join()
client = get_client()
mine = len(client.get_pending_tasks("t"))
theirs = len(client.get_pending_tasks("child"))
"""
    assert await ran(text, env, "ended", "mine", "theirs") == [[0] * 4, 5, 40]
    if "HIVE_QUEEN_URL" not in env:
        with sqlite3.connect(Path(env["XDG_STATE_HOME"]) / "hive" / "queue.db") as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_the_end_of_a_program_loses_nothing_and_says_nothing(env: dict[str, str]) -> None:
    text = """
import asyncio
from hive_orchestration import create_task, update_task_status
task_id = create_task("t")
async def main():
    update_task_status(task_id, "running")
    update_task_status(task_id, "completed")
asyncio.run(main())
"""
    began = time.monotonic()
    [task_id] = await ran(text, env, "task_id")
    assert time.monotonic() - began < RUN_S / 2
    look = f"from hive_orchestration import get_task; task = get_task('{task_id}')"
    [task] = await ran(look, env, "task")
    assert task["status"] == "completed"


async def test_a_thread_that_outlives_the_main_one_is_told_so(tmp_path: Path) -> None:
    text = """
import os, pathlib, threading
from hive_orchestration import create_task
create_task("t")
def late():
    threading.main_thread().join()
    try:
        create_task("t")
    except Exception as error:
        pathlib.Path(os.environ["XDG_STATE_HOME"], "said").write_text(str(error))
threading.Thread(target=late).start()
"""
    await ran(text, environment(tmp_path))
    assert "thread.join()" in (tmp_path / "said").read_text()


async def test_to_import_it_opens_and_loads_nothing(tmp_path: Path) -> None:
    text = """
import sys, threading
import hive_orchestration
heavy = [name for name in ("sqlalchemy", "alembic", "aiohttp") if name in sys.modules]
threads = threading.active_count()
"""
    assert await ran(text, environment(tmp_path), "heavy", "threads") == [[], 1]
    assert list(tmp_path.iterdir()) == []
