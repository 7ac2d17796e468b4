"""Workers that die, hang or cannot start, and the agent that notices."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from hive_agent.workers.launch import scripted_model
from hive_agent.workers.pool import WorkerPool
from hive_agent.workers.records import end_group
from hive_agent.workers.spec import WorkerSpec
from job_client.client import JobFailed
from operations.errors import HiveError, Unavailable
from operations.operations import WorkerOptions
from tests.cluster import Cluster, Daemon, alive, served, spawn, spawn_scripted, until


def infer(model: str, **options: Any) -> dict[str, Any]:
    return {"operation": "infer", "model": model, "prompt": "hello", **options}


async def only_worker(hive: Daemon) -> dict[str, Any]:
    (worker,) = (await hive.client.run({"operation": "worker_list"}))["workers"]
    return dict(worker)


@pytest.mark.parametrize("through", ["hive", "queen"])
async def test_kill_9_in_mid_stream_is_an_error_a_respawn_and_an_answer(
    fresh: Cluster, through: str, large_model: Path
) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    door = queen if through == "queen" else hive
    worker = await spawn(hive, f"file:{large_model}", context_length=4096)
    await served(queen.client, worker["model"])
    job = await door.client.submit(infer("large", max_tokens=4000))
    lines: list[str] = []
    async with aclosing(door.client.stream(job.job_id)) as source:
        async for event in source:
            lines.append(event.data)
            if len(lines) == 5:
                os.kill(worker["pid"], signal.SIGKILL)
    assert lines[-1].startswith("[ERROR] Worker ")
    assert "died before the answer was whole" in lines[-1]
    assert sum(line.startswith("[ERROR]") for line in lines) == 1

    answer = await door.client.run(infer("large", max_tokens=3))
    assert answer["tokens_out"] == 3
    again = await only_worker(hive)
    assert again["worker_id"] == worker["worker_id"]
    assert again["pid"] != worker["pid"]
    assert again["restarts"] == 1


async def test_requests_right_after_a_death_are_all_served(fresh: Cluster) -> None:
    hive = await fresh.hive()
    worker = await spawn(hive)
    for _ in range(3):
        os.kill((await only_worker(hive))["pid"], signal.SIGKILL)
        answers = await asyncio.gather(
            *(hive.client.run(infer("hive-tiny", max_tokens=5)) for _ in range(8))
        )
        assert {answer["tokens_out"] for answer in answers} == {5}
    assert (await only_worker(hive))["worker_id"] == worker["worker_id"]


async def test_tokens_before_the_death_have_reached_the_caller(fresh: Cluster) -> None:
    hive = await fresh.hive()
    await spawn_scripted(hive, crash_after_tokens=10, tokens_per_second=200)
    lines: list[str] = []
    outcome = await hive.client.submit_and_stream(infer("parrot", max_tokens=50), lines.append)
    assert outcome.status == "failed"
    assert sum('"token"' in line for line in lines) >= 9
    with pytest.raises(JobFailed):
        outcome.value()


async def test_every_stream_of_a_dead_worker_ends_in_an_error(fresh: Cluster) -> None:
    hive = await fresh.hive()
    worker = await spawn_scripted(hive, slots=64, hang_after_tokens=3)
    jobs = [await hive.client.submit(infer("parrot")) for _ in range(32)]

    async def all_begun() -> bool:
        listed = (await hive.client.get("/v1/jobs"))["jobs"]
        return sum(job["operation"] == "infer" and job["events"] >= 4 for job in listed) == 32

    await until(all_begun, "all answers to begin")
    os.kill(worker["pid"], signal.SIGKILL)
    outcomes = await asyncio.gather(*(hive.client.follow(job.job_id) for job in jobs))
    assert {outcome.status for outcome in outcomes} == {"failed"}

    async def settled() -> bool:
        again = await only_worker(hive)
        return again["state"] == "ready" and again["in_flight"] == 0

    await until(settled, "the worker to be ready again with no request")


async def test_a_worker_that_dies_again_and_again_is_given_up_and_says_so(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    await spawn_scripted(hive, crash_after_tokens=0)
    await served(queen.client, "parrot")

    async def failed() -> bool:
        with suppress(JobFailed, Unavailable):
            await hive.client.run(infer("parrot"))
        return str((await only_worker(hive))["state"]) == "failed"

    await until(failed, "the worker to be given up", within_s=30)

    async def known() -> bool:
        workers = (await queen.client.run({"operation": "worker_list"}))["workers"]
        return [worker["state"] for worker in workers] == ["failed"]

    await until(known, "the queen to know")
    for door in (hive, queen):
        with pytest.raises(Unavailable) as refused:
            await door.client.submit(infer("parrot"))
        assert "ended by SIGKILL" in refused.value.message


async def test_a_hung_engine_is_ended_and_started_again(fresh: Cluster) -> None:
    hive = await fresh.hive(env={"HIVE_HEALTH_SECONDS": "0.2"})
    worker = await spawn_scripted(hive)
    os.kill(worker["pid"], signal.SIGSTOP)

    async def respawned() -> bool:
        again = await only_worker(hive)
        return again["state"] == "ready" and again["pid"] != worker["pid"]

    await until(respawned, "the worker to be replaced", within_s=30)
    assert not alive(worker["pid"])


async def test_stopping_a_worker_ends_its_whole_group(fresh: Cluster) -> None:
    hive = await fresh.hive()
    worker = await spawn_scripted(hive)
    await hive.client.run({"operation": "worker_stop", "worker_id": worker["worker_id"]})
    assert not alive(worker["pid"])
    assert not Path(worker["socket"]).exists()
    assert (await hive.client.run({"operation": "worker_list"}))["workers"] == []


async def test_a_worker_that_ignores_sigterm_is_killed_however_often_it_is_stopped(
    fresh: Cluster,
) -> None:
    hive = await fresh.hive()
    worker = await spawn_scripted(hive)
    os.kill(worker["pid"], signal.SIGSTOP)
    stop = {"operation": "worker_stop", "worker_id": worker["worker_id"]}
    first, second = [await hive.client.submit(stop) for _ in range(2)]
    await hive.client.cancel(first.job_id)
    assert (await hive.client.follow(second.job_id)).status == "completed"
    assert not alive(worker["pid"])


async def test_a_stop_whose_job_is_cancelled_goes_on(fresh: Cluster) -> None:
    hive = await fresh.hive()
    worker = await spawn_scripted(hive, tokens_per_second=100)
    answer = await hive.client.submit(infer("parrot", max_tokens=100))

    async def begun() -> bool:
        return int((await only_worker(hive))["in_flight"]) == 1

    await until(begun, "the request to reach the worker")
    stop = await hive.client.submit({"operation": "worker_stop", "pid": worker["pid"]})
    assert await hive.client.cancel(stop.job_id) == "cancelled"
    assert (await hive.client.follow(answer.job_id)).value()["tokens_out"] == 100

    async def forgotten() -> bool:
        return not (await hive.client.run({"operation": "worker_list"}))["workers"]

    await until(forgotten, "the worker to be forgotten")
    assert not alive(worker["pid"])


async def test_stopping_a_worker_lets_its_answers_finish(fresh: Cluster) -> None:
    hive = await fresh.hive()
    worker = await spawn_scripted(hive, tokens_per_second=100)
    job = await hive.client.submit(infer("parrot", max_tokens=100))
    follow = asyncio.create_task(hive.client.follow(job.job_id))

    async def begun() -> bool:
        return int((await only_worker(hive))["in_flight"]) == 1

    await until(begun, "the request to reach the worker")
    stop = asyncio.create_task(
        hive.client.run({"operation": "worker_stop", "worker_id": worker["worker_id"]})
    )
    assert (await follow).value()["tokens_out"] == 100
    await stop
    assert not alive(worker["pid"])


def parrot(python: str = sys.executable, **script: Any) -> WorkerSpec:
    options = WorkerOptions(engine="scripted", script=script)
    return WorkerSpec(
        worker_id="w-1",
        model=scripted_model("parrot", options),
        engine="scripted",
        devices=("cpu",),
        slots=1,
        context_length=1024,
        threads=1,
        options=options,
        python=python,
    )


@asynccontextmanager
async def pool_in(folder: Path) -> AsyncIterator[WorkerPool]:
    (folder / "run").mkdir()
    pool = WorkerPool(hive_id="h", state=folder, runtime=folder / "run", cores=1, health_s=5)
    try:
        yield pool
    finally:
        await pool.close(0)


async def test_a_worker_that_is_given_up_while_its_process_starts_leaves_none(
    tmp_path: Path,
) -> None:
    async with pool_in(tmp_path) as pool:
        worker = pool.spawn(parrot(load_seconds=600))
        await asyncio.sleep(0)  # its owner gets as far as it does without waiting
        assert (worker.state, worker.pid) == ("starting", None)
        (owner,) = (task for task in asyncio.all_tasks() if task.get_name() == "w-1")
        worker.give_up("its device is lost")  # type: ignore[attr-defined]
        with pytest.raises(HiveError, match="its device is lost"):
            await worker.came_up
        async with asyncio.timeout(30):
            await owner
        assert (worker.state, worker.pid, pool.records.all()) == ("failed", None, [])


async def test_a_worker_whose_interpreter_is_gone_says_so(tmp_path: Path) -> None:
    async with pool_in(tmp_path) as pool:
        worker = pool.spawn(parrot(python="/no/such/python"))
        with pytest.raises(HiveError, match=r"/no/such/python.*'hive engines install'") as failed:
            await worker.came_up
        assert failed.value.code == "engine_broken"
        assert worker.state == "failed"


async def test_a_doubted_engine_that_says_it_is_lost_is_started_again_at_once(
    tmp_path: Path,
) -> None:
    async with pool_in(tmp_path) as pool:
        worker = pool.spawn(parrot(unhealthy=True))  # 15 s pass until it is noticed by the clock
        await worker.came_up
        assert worker.restarts == 0
        worker.doubt()
        await until(lambda: worker.restarts == 1, "it to be started again", within_s=8)


async def test_a_doubted_engine_that_is_well_goes_on(tmp_path: Path) -> None:
    async with pool_in(tmp_path) as pool:
        worker = pool.spawn(parrot())
        await worker.came_up
        pid = worker.pid
        for _ in range(5):
            worker.doubt()
            async with worker.http.get("http://worker/health") as answer:
                assert answer.status == 200
        assert (worker.state, worker.pid, worker.restarts) == ("ready", pid, 0)


async def test_the_rest_of_a_group_may_clean_up_after_its_leader(tmp_path: Path) -> None:
    """The leader of this group ends at once; its child needs longer for what it has to remove."""
    left, begun = tmp_path / "shared", tmp_path / "begun"
    child = (
        f"trap 'sleep 0.5; rm {left}; exit' TERM; touch {left} {begun}; while :; do sleep 0.1; done"
    )
    leader = await asyncio.create_subprocess_exec(
        *("sh", "-c", '(eval "$0") & exec sleep 600', child), start_new_session=True
    )
    await until(begun.exists, "the child to begin")
    family = psutil.Process(leader.pid).children(recursive=True)
    await asyncio.to_thread(end_group, psutil.Process(leader.pid))
    assert not left.exists()
    assert not any(alive(one.pid) for one in family)
    await leader.wait()
