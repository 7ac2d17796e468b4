"""Stopping: what finishes, what is cut, and that nothing is left running."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from hive_agent.workers.pool import KEPT_LOGS
from operations.errors import Unavailable
from tests.cluster import Cluster, Daemon, alive, clean_env, hive_command, spawn_scripted, until
from tests.terminal import hive as command
from wire.secret import Secret


async def gone(*pids: int) -> None:
    await until(lambda: not any(alive(pid) for pid in pids), f"processes {pids} to end")


async def begun(hive: Daemon, count: int = 1) -> None:
    async def reached() -> bool:
        workers = (await hive.client.run({"operation": "worker_list"}))["workers"]
        return sum(worker["in_flight"] for worker in workers) == count

    await until(reached, f"{count} requests to reach a worker")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_an_agent_and_its_workers(fresh: Cluster, signum: int) -> None:
    hive = await fresh.hive()
    worker = await spawn_scripted(hive)
    assert await hive.stop(signum) == 0
    await gone(worker["pid"])
    assert not Path(worker["socket"]).parent.exists()
    assert "ERROR" not in hive.log
    assert "WARNING" not in hive.log


async def test_a_worker_stops_whatever_lies_among_the_old_logs(fresh: Cluster) -> None:
    hive = await fresh.hive()
    worker = await spawn_scripted(hive)
    logs = Path(worker["log"]).parent
    for number in range(KEPT_LOGS + 9):
        (logs / f"w-{number}.log").mkdir()
    await hive.client.run({"operation": "worker_process_delete", "worker_id": worker["worker_id"]})
    assert (await hive.client.run({"operation": "worker_list"}))["workers"] == []
    assert "old logs of workers are not removed" in hive.log
    assert await hive.stop() == 0
    assert "ERROR" not in hive.log


async def test_an_agent_stops_when_its_starter_dies(fresh: Cluster) -> None:
    hive = await fresh.hive()
    worker = await spawn_scripted(hive)
    assert hive.process.stdin is not None
    hive.process.stdin.close()
    await asyncio.wait_for(hive.process.wait(), 20)
    await gone(worker["pid"])


async def test_shutdown_at_the_queen_reaches_hives_and_workers(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hives = [await fresh.hive(f"gpu-{i}", queen=queen) for i in range(2)]
    workers = [await spawn_scripted(hive) for hive in hives]
    assert await queen.client.post("/v1/shutdown") == {"status": "stopping"}
    for daemon in (queen, *hives):
        assert await asyncio.wait_for(daemon.process.wait(), 20) == 0
    await gone(*(worker["pid"] for worker in workers))


async def test_shutdown_is_proven_where_the_cluster_has_a_secret(fresh: Cluster) -> None:
    fresh.env = {"HIVE_SECRET": Secret.new().text}
    queen = await fresh.queen()
    daemons = [queen, await fresh.hive("gpu-0", queen=queen)]
    ran = await command("shutdown", "--json", url=queen.url, env=fresh.env)
    assert ran.code == 0, ran
    for daemon in daemons:
        assert await asyncio.wait_for(daemon.process.wait(), 20) == 0


async def test_sigterm_at_the_queen_leaves_the_hives_alone(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    worker = await spawn_scripted(hive)
    assert await queen.stop() == 0
    answer = await hive.client.run({"operation": "infer", "model": "parrot", "prompt": "x"})
    assert answer["text"]
    assert alive(worker["pid"])


@pytest.mark.parametrize("through", ["hive", "queen"])
async def test_answers_finish_before_the_stop_and_nothing_new_begins(
    fresh: Cluster, through: str
) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    await spawn_scripted(hive, tokens_per_second=100)
    door = queen if through == "queen" else hive
    job = await door.client.submit(
        {"operation": "infer", "model": "parrot", "prompt": "x", "max_tokens": 150}
    )
    answer = asyncio.create_task(door.client.follow(job.job_id))
    await begun(hive)
    await door.client.post("/v1/shutdown")
    with pytest.raises(Unavailable):
        await door.client.submit({"operation": "infer", "model": "parrot", "prompt": "x"})
    assert (await answer).value()["tokens_out"] == 150
    assert await asyncio.wait_for(door.process.wait(), 20) == 0


async def test_the_deadline_cuts_what_does_not_finish(fresh: Cluster) -> None:
    hive = await fresh.hive("gpu-0", "--drain-seconds=0.3")
    worker = await spawn_scripted(hive, hang_after_tokens=1)
    job = await hive.client.submit({"operation": "infer", "model": "parrot", "prompt": "x"})
    answer = asyncio.create_task(hive.client.follow(job.job_id))
    await begun(hive)
    hive.process.send_signal(signal.SIGTERM)
    assert (await answer).status == "cancelled"
    assert await asyncio.wait_for(hive.process.wait(), 20) == 0
    await gone(worker["pid"])


async def test_an_agent_that_stops_ends_a_worker_that_is_still_loading(fresh: Cluster) -> None:
    hive = await fresh.hive()
    job = await hive.client.submit(
        {
            "operation": "worker_spawn",
            "model": "slow",
            "worker": "cpu",
            "options": {"engine": "scripted", "script": {"load_seconds": 600}},
        }
    )

    async def process() -> int | None:
        workers = (await hive.client.run({"operation": "worker_list"}))["workers"]
        return workers[0].get("pid") if workers else None

    pid = await until(process, "the worker's process")
    os.kill(pid, signal.SIGSTOP)  # it will not obey SIGTERM
    follow = asyncio.create_task(hive.client.follow(job.job_id))
    hive.process.send_signal(signal.SIGTERM)
    assert (await follow).status == "cancelled"
    assert await asyncio.wait_for(hive.process.wait(), 20) == 0
    assert not alive(pid)


async def test_the_deadline_reaches_a_reader_at_the_queen(fresh: Cluster) -> None:
    queen = await fresh.queen("--drain-seconds=0.3")
    hive = await fresh.hive("gpu-0", "--drain-seconds=0.3", queen=queen)
    await spawn_scripted(hive, hang_after_tokens=1)
    job = await queen.client.submit({"operation": "infer", "model": "parrot", "prompt": "x"})
    answer = asyncio.create_task(queen.client.follow(job.job_id))
    await begun(hive)
    await queen.client.post("/v1/shutdown")
    assert (await answer).status in ("cancelled", "failed")
    for daemon in (queen, hive):
        assert await asyncio.wait_for(daemon.process.wait(), 20) == 0
        assert "ERROR" not in daemon.log


async def test_a_starter_that_dies_after_a_signal_does_not_end_the_draining(
    fresh: Cluster,
) -> None:
    hive = await fresh.hive()
    await spawn_scripted(hive, tokens_per_second=100)
    job = await hive.client.submit(
        {"operation": "infer", "model": "parrot", "prompt": "x", "max_tokens": 100}
    )
    answer = asyncio.create_task(hive.client.follow(job.job_id))
    await begun(hive)
    hive.process.send_signal(signal.SIGTERM)
    assert hive.process.stdin is not None
    hive.process.stdin.close()
    assert (await answer).value()["tokens_out"] == 100


async def test_a_second_signal_ends_the_draining(fresh: Cluster) -> None:
    hive = await fresh.hive("gpu-0", "--drain-seconds=600")
    await spawn_scripted(hive, hang_after_tokens=1)
    await hive.client.submit({"operation": "infer", "model": "parrot", "prompt": "x"})
    await begun(hive)
    hive.process.send_signal(signal.SIGTERM)
    await until(lambda: "status=stopping" in hive.log, "the agent to drain")
    hive.process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(hive.process.wait(), 20) == 0


async def test_an_agent_ends_the_workers_that_a_killed_one_left(fresh: Cluster) -> None:
    first = await fresh.hive()
    worker = await spawn_scripted(first)
    first.process.kill()
    await first.process.wait()
    assert alive(worker["pid"])
    second = await fresh.hive()
    assert not alive(worker["pid"])
    assert (await second.client.run({"operation": "worker_list"}))["workers"] == []


async def test_a_record_of_another_process_harms_nobody(fresh: Cluster) -> None:
    """After a reboot a recorded process id may belong to anybody."""
    first = await fresh.hive()
    worker = await spawn_scripted(first)
    first.process.kill()
    await first.process.wait()
    bystander = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
    record = fresh.folder / "gpu-0" / "agent" / "workers" / f"{worker['worker_id']}.json"
    record.write_text(record.read_text().replace(str(worker["pid"]), str(bystander.pid)))
    await fresh.hive()
    assert alive(bystander.pid)
    assert not record.exists()
    bystander.kill()
    await bystander.wait()
    os.killpg(worker["pid"], signal.SIGKILL)  # its record is gone, so the cluster cannot end it


async def refused_start(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *hive_command(),
        *arguments,
        env=clean_env(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    return said.decode()


async def test_two_agents_do_not_share_a_state_folder(fresh: Cluster) -> None:
    await fresh.hive()
    said = await refused_start("agent", "--port=0", f"--state-dir={fresh.folder / 'gpu-0'}")
    assert "Another hive agent uses the state folder" in said
    assert "--state-dir" in said


async def test_a_taken_port_is_said_so(fresh: Cluster) -> None:
    queen = await fresh.queen()
    port = queen.url.rpartition(":")[2]
    said = await refused_start("queen", f"--port={port}")
    assert "the port is in use" in said
    assert "--port" in said


async def test_a_state_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = await refused_start("agent", "--port=0", f"--state-dir={tmp_path / 'file'}")
    assert "--state-dir" in said
    assert "output" not in said


@pytest.mark.parametrize("command", ["queen", "agent"])
async def test_a_daemon_without_a_secret_does_not_listen_to_others(
    command: str, tmp_path: Path
) -> None:
    said = await refused_start(command, "--port=0", "--host=0.0.0.0", f"--state-dir={tmp_path}")
    assert "hive secret new" in said


async def test_a_secret_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(Secret.new().text)
    secret.chmod(0o644)
    said = await refused_start("queen", "--port=0", f"--secret-file={secret}")
    assert f"chmod 600 {secret}" in said
    assert secret.read_text() not in said


async def test_a_wrong_secret_is_refused_and_not_quoted(tmp_path: Path) -> None:
    env = {**clean_env(), "HIVE_SECRET": "hunter2-hunter2"}
    process = await asyncio.create_subprocess_exec(
        *hive_command(), "queen", "--port=0", env=env, stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert b"HIVE_SECRET" in said
    assert b"hunter2" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("queen", "--port=70000"),
        ("agent", "--port=0", "--hive-id=../etc"),
        ("agent", "--port=0", "--queen-url=nowhere"),
        ("queen", "--port=0", "--hive=gpu-0"),
        ("queen", "--port=0", "--hive=http://10.1.2.3:7835"),
        ("agent", "--port=0", "--hive-id=localhost"),
    ],
)
async def test_a_wrong_setting_is_named(arguments: tuple[str, ...]) -> None:
    flag = arguments[-1].partition("=")[0]
    process = await asyncio.create_subprocess_exec(
        *hive_command(), *arguments, env=clean_env(), stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode in (1, 2)
    assert flag in said.decode()
