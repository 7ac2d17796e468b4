"""The job table: replay, readers, ends, cancellation, what is kept."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from operations.errors import Conflict, Gone, InvalidRequest, NotFound, Unavailable
from operations.operations import Infer, ModelFit, Status
from wire import jobs
from wire.jobs import Job, JobTable, new_job_id

STATUS = Status()
INFER = Infer(model="m", prompt="hello")


@pytest.fixture
async def table() -> AsyncIterator[JobTable]:
    made = JobTable("gpu-0", disconnect_grace_s=0.02)
    yield made
    await made.close(0)


async def lines_of(table: JobTable, job: Job, last_event_id: str | None = None) -> list[str]:
    source = await table.events(job.id, last_event_id)
    return [] if source is None else [event.data async for event in source]


async def talk(job: Job) -> dict[str, int]:
    job.info("one")
    job.info("two")
    return {"answer": 42}


async def test_a_job_runs_without_any_reader(table: JobTable) -> None:
    job = table.start(STATUS, talk)
    await jobs_done(job)
    assert job.status == "completed"
    assert await lines_of(table, job) == ["[INFO] one", "[INFO] two", '{"answer":42}', "[DONE]"]


async def test_ten_readers_get_every_line_in_order(table: JobTable) -> None:
    go = asyncio.Event()

    async def counted(job: Job) -> None:
        await go.wait()
        for i in range(500):
            job.info(str(i))
            if i % 50 == 0:
                await asyncio.sleep(0)

    job = table.start(STATUS, counted)
    readers = [asyncio.create_task(lines_of(table, job)) for _ in range(10)]
    go.set()
    for got in await asyncio.gather(*readers):
        assert got == [f"[INFO] {i}" for i in range(500)] + ["[DONE]"]


async def test_a_reader_goes_on_after_the_event_it_names(table: JobTable) -> None:
    job = table.start(STATUS, talk)
    await jobs_done(job)
    assert await lines_of(table, job, f"{table.epoch}:2") == ['{"answer":42}', "[DONE]"]


async def test_a_reader_that_has_seen_the_end_gets_nothing(table: JobTable) -> None:
    job = table.start(STATUS, talk)
    await jobs_done(job)
    assert await table.events(job.id, f"{table.epoch}:4") is None


@pytest.mark.parametrize("foreign", ["nonsense", "deadbeef:1", ":", "", "x:-1"])
async def test_an_event_id_of_another_run_is_gone(table: JobTable, foreign: str) -> None:
    job = table.start(STATUS, talk)
    with pytest.raises(Gone):
        await table.events(job.id, foreign)


async def test_lines_older_than_the_buffer_are_gone(
    table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "REPLAY_BYTES", 3_000)

    async def long(job: Job) -> None:
        for _ in range(100):
            job.info("x" * 100)

    job = table.start(STATUS, long)
    await jobs_done(job)
    with pytest.raises(Gone):
        await table.events(job.id, f"{table.epoch}:1")
    assert (await lines_of(table, job, f"{table.epoch}:{job.last - 1}")) == ["[DONE]"]
    first, *_, end = await lines_of(table, job)
    assert first.startswith("[WARN] The first ")
    assert end == "[DONE]"


async def test_a_finished_job_does_not_keep_its_prompt(table: JobTable) -> None:
    operation = Infer(model="m", prompt="a long prompt")
    kept = weakref.ref(operation)
    job = table.start(operation, talk)
    await jobs_done(job)
    del operation
    gc.collect()
    assert kept() is None
    assert (await table.describe(job.id)).model == "m"


async def test_looking_around_does_not_push_out_what_was_done(table: JobTable) -> None:
    job = table.start(INFER, talk)
    for _ in range(2 * jobs.KEPT_LOOKS):
        await jobs_done(table.start(STATUS, talk))
        await jobs_done(table.start(ModelFit(model="m"), talk))
    assert len(await table.listing()) <= jobs.KEPT_LOOKS + 2
    assert table.get(job.id) is job


async def test_a_failure_is_one_error_line(table: JobTable) -> None:
    async def fail(job: Job) -> None:
        raise Unavailable("no\nluck")

    job = table.start(STATUS, fail)
    await jobs_done(job)
    assert await lines_of(table, job) == ["[ERROR] no luck"]
    assert (await table.describe(job.id)).status == "failed"


async def test_an_unforeseen_failure_tells_no_details(table: JobTable) -> None:
    async def broken(job: Job) -> None:
        raise RuntimeError("the secret")

    job = table.start(STATUS, broken)
    await jobs_done(job)
    (line,) = await lines_of(table, job)
    assert line.startswith("[ERROR] ")
    assert "secret" not in line


async def test_nothing_follows_the_terminal_line(table: JobTable) -> None:
    job = table.start(STATUS, talk)
    await jobs_done(job)
    job.info("too late")
    assert (await lines_of(table, job))[-1] == "[DONE]"


async def test_cancel_ends_the_job_and_may_be_repeated(table: JobTable) -> None:
    job = table.start(STATUS, forever)
    assert await table.cancel(job.id) == "cancelled"
    assert await table.cancel(job.id) == "cancelled"
    assert await lines_of(table, job) == ["[CANCELLED]"]


async def test_cancelling_a_finished_job_says_what_it_became(table: JobTable) -> None:
    job = table.start(STATUS, talk)
    await jobs_done(job)
    assert await table.cancel(job.id) == "completed"


async def test_a_forwarded_post_is_idempotent(table: JobTable) -> None:
    job_id = new_job_id()
    first = table.start(STATUS, forever, job_id)
    assert table.start(STATUS, forever, job_id) is first
    with pytest.raises(Conflict):
        table.start(INFER, forever, job_id)


async def test_infer_is_cancelled_when_its_last_reader_stays_away(table: JobTable) -> None:
    job = table.start(INFER, chatter)
    await leave_after_one_line(table, job)
    await jobs_done(job)
    assert job.status == "cancelled"


async def test_a_reader_that_comes_back_in_time_keeps_the_job(table: JobTable) -> None:
    go = asyncio.Event()

    async def patient(job: Job) -> None:
        job.info("begun")
        await go.wait()

    slow = JobTable("gpu-0", disconnect_grace_s=3600)
    job = slow.start(INFER, patient)
    await leave_after_one_line(slow, job)
    back = asyncio.create_task(lines_of(slow, job))
    go.set()
    assert await back == ["[INFO] begun", "[DONE]"]


async def test_other_jobs_go_on_without_readers(table: JobTable) -> None:
    go = asyncio.Event()

    async def patient(job: Job) -> None:
        job.info("begun")
        await go.wait()

    job = table.start(STATUS, patient)
    await leave_after_one_line(table, job)
    await asyncio.sleep(0.06)  # three times the grace: nothing may have happened
    go.set()
    await jobs_done(job)
    assert job.status == "completed"


async def test_old_jobs_are_forgotten_and_running_ones_are_not(
    table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "KEPT_JOBS", 5)
    running = table.start(INFER, forever)
    for _ in range(20):
        await jobs_done(table.start(INFER, talk))
    assert len(await table.listing()) <= 6
    assert table.get(running.id) is running
    with pytest.raises(NotFound):
        table.get(new_job_id())


async def test_a_closing_table_takes_nothing_and_ends_what_runs(table: JobTable) -> None:
    job = table.start(STATUS, forever)
    await table.close(0)
    await table.close(0)
    assert job.status == "cancelled"
    with pytest.raises(Unavailable):
        table.start(STATUS, talk)


@pytest.mark.parametrize("bad", ["", "job-1", "job-../../etc/passwd", "JOB-" + "0" * 36])
def test_a_job_id_is_checked(bad: str) -> None:
    with pytest.raises(InvalidRequest):
        jobs.check_job_id(bad)


async def forever(job: Job) -> Any:
    await asyncio.Event().wait()


async def chatter(job: Job) -> Any:
    job.info("begun")
    await asyncio.Event().wait()


async def leave_after_one_line(table: JobTable, job: Job) -> None:
    source = await table.events(job.id, None)
    assert source is not None
    await anext(source)
    await source.aclose()


async def jobs_done(job: Job) -> None:
    assert job.task is not None
    await asyncio.wait([job.task])
