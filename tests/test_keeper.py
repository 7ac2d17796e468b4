"""The ``hive`` command against real daemons, in a pipe and on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from keeper import chat, connect, place, words, workers
from keeper.exits import Cancelled, Exit, WrongUsage, exit_for
from keeper.output import Column, Table, aligned
from keeper.progress import Download, parse_download
from operations.errors import Conflict, HiveError, NotFound, Unavailable
from operations.hosts import HiveInfo, together
from queen.settings import QueenSettings
from tests.cluster import Cluster, alive, clean_env, spawn_scripted, until
from tests.conftest import Room
from tests.gguf_files import write_gguf
from tests.hub import Gate, HubServer
from tests.terminal import COLUMNS, hive, start, terminal
from wire.serve import CannotStart

BORDERS = re.compile("[─│╭╰━\x1b]")
COLOURS = re.compile(r"\x1b\[(\d+;)*3\dm")
WORKER_ID = re.compile(r"w-[0-9a-f]{6}")


@pytest.fixture(scope="session")
async def slow(room: Room) -> AsyncIterator[str]:
    """The name of a model that answers ten tokens a second."""
    worker = await spawn_scripted(room.hive, "slow", tokens_per_second=10)
    yield "slow"
    await room.hive.client.run(
        {"operation": "worker_process_delete", "worker_id": worker["worker_id"]}
    )


async def job_of(room: Room, model: str) -> dict[str, Any]:
    """The newest job that asked this model."""
    listed = (await room.queen.client.get("/v1/jobs"))["jobs"]
    return next(dict(job) for job in listed if job.get("model") == model)


# -- the command line --------------------------------------------------------------------------


async def test_help_is_enough_to_get_going() -> None:
    shown = await hive("--help")
    assert shown.code == 0
    for part in ("Start here", "Models and workers", "Ask", "Look", "First steps", "Exit codes"):
        assert part in shown.out
    for command in ("hive demo", "hive up", "hive workers spawn", "hive infer", "HIVE_QUEEN_URL"):
        assert command in shown.out
    assert max(map(len, shown.out.splitlines())) <= COLUMNS


async def test_help_waits_for_no_http_client_and_no_server() -> None:
    heavy = "print([m for m in ('aiohttp', 'uvicorn', 'queen', 'hive_agent') if m in sys.modules])"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"import sys, keeper.main as m; m.build(); {heavy}"),
        env=clean_env(),
        stdout=asyncio.subprocess.PIPE,
    )
    assert (await process.communicate())[0] == b"[]\n"


async def test_version_is_told() -> None:
    assert re.fullmatch(r"hive \d+\.\d+\.\d+\n", (await hive("--version")).out)


async def test_a_wrong_command_line_exits_2_and_says_where_help_is() -> None:
    wrong = (
        ("modles", "ls"),
        ("infer",),
        ("status", "--url", "not a url"),
        ("models",),
    )
    ended = await asyncio.gather(*(hive(*arguments) for arguments in wrong))
    for ran in ended:
        assert ran.code == Exit.USAGE
        assert ran.err.count("\n") == (0 if "Usage" in ran.out else 1)
    assert "Did you mean 'models'?" in ended[0].err


async def test_values_that_no_operation_takes_exit_2_before_anything_is_sent(room: Room) -> None:
    ran = await hive("infer", "hive-tiny", "hi", "--temperature", "9", url=room.queen.url)
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert "'temperature': it must be less than or equal to 2. See 'hive" in ran.err
    ran = await hive("engines", "install", "vllm", "--version", "latest", url=room.queen.url)
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert ran.err.startswith("error: 'version': it must begin with a digit, such as '0.32.0'")


async def test_no_daemon_exits_3_and_says_how_to_start_one() -> None:
    ran, ran_json = await asyncio.gather(hive("status"), hive("models", "ls", "--json"))
    assert ran.code == ran_json.code == Exit.UNREACHABLE
    assert ran.err.startswith("error: ")
    assert "hive up" in ran.err
    assert ran.err.count("\n") == 1
    assert ran_json.error["code"] == "daemon_unreachable"
    assert ran_json.error["exit_code"] == 3


async def test_a_server_that_is_no_daemon_exits_3() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        ran = await hive("status", url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert ran.code == Exit.UNREACHABLE
    assert "no Hive daemon" in ran.err


async def test_a_refusal_exits_4_in_the_daemons_own_words(room: Room) -> None:
    ran, ran_json, job = await asyncio.gather(
        hive("infer", "nobody", "hi", url=room.queen.url),
        hive("workers", "show", "w-000000", "--json", url=room.hive.url),
        hive("jobs", "tail", "job-00000000-0000-0000-0000-000000000000", url=room.queen.url),
    )
    assert [ran.code, ran_json.code, job.code] == [Exit.REFUSED] * 3
    assert "hive-tiny" in ran.err  # what there is
    assert re.search(r"\((queen|hive), request req-\w+\)$", ran.err.strip())
    assert ran_json.out == ""
    assert ran_json.error["hop"] == "hive"
    assert ran_json.error["request_id"].startswith("req-")


# -- looking -----------------------------------------------------------------------------------


async def test_in_a_pipe_a_look_is_plain_text(room: Room) -> None:
    looks = (("status",), ("models", "show", "hive-tiny"), ("workers", "ls"), ("check",))
    shown = await asyncio.gather(*(hive(*look, url=room.hive.url) for look in looks))
    for look, ran in zip(looks, shown, strict=True):
        assert ran.code == 0, (look, ran.err)
        assert ran.out.strip()
        assert not BORDERS.search(ran.out + ran.err), look


async def test_with_json_a_look_is_one_document(room: Room) -> None:
    looks = (("status",), ("models", "ls"), ("devices",), ("jobs", "ls"), ("check",))
    shown = await asyncio.gather(*(hive(*look, "--json", url=room.queen.url) for look in looks))
    for look, ran in zip(looks, shown, strict=True):
        assert (ran.code, ran.err) == (0, ""), look
        assert isinstance(ran.json, dict)


async def test_json_and_url_are_taken_before_the_command_too(room: Room) -> None:
    before, after = await asyncio.gather(
        hive("--json", "--url", room.hive.url, "workers", "ls"),
        hive("workers", "ls", "--json", "--url", room.hive.url),
    )
    assert [w["worker_id"] for w in before.json["workers"]] == [
        w["worker_id"] for w in after.json["workers"]
    ]


async def test_tables_fit_a_terminal_and_keep_ids_whole(room: Room) -> None:
    await room.queen.client.run({"operation": "infer", "model": "parrot", "prompt": "hello"})
    job = await job_of(room, "parrot")
    for look in (("status",), ("devices",), ("jobs", "ls")):
        async with terminal(*look, url=room.queen.url) as shown:
            assert await shown.ends() == 0
            assert max(map(len, shown.text.splitlines())) <= COLUMNS
            if look == ("jobs", "ls"):
                assert job["job_id"] in shown.text
            if look == ("status",):
                assert COLOURS.search(shown.raw)
                assert str(room.tiny["worker_id"]) in shown.text


async def test_no_color_is_honoured(room: Room) -> None:
    async with terminal("workers", "ls", url=room.queen.url, env={"NO_COLOR": "1"}) as shown:
        await shown.ends()
        assert "ready" in shown.text
        assert not COLOURS.search(shown.raw)


async def test_a_reader_that_leaves_ends_it_quietly(room: Room, slow: str) -> None:
    command = f"{sys.executable} -m keeper infer {slow} go --max-tokens 500 | head -c 5"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"set -o pipefail; {command}"),
        env={**clean_env(), "HIVE_QUEEN_URL": room.queen.url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert (len(out), err, process.returncode) == (5, b"", Exit.BROKEN_PIPE)
    assert (await job_of(room, slow))["status"] == "cancelled"


async def test_an_output_that_cannot_be_written_is_one_line_and_exits_1(room: Room) -> None:
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"{sys.executable} -m keeper workers ls > /dev/full"),
        env={**clean_env(), "HIVE_QUEEN_URL": room.queen.url},
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == Exit.FAILED
    assert err.startswith(b"error: The output cannot be written: No space left")
    assert err.count(b"\n") == 1


# -- asking ------------------------------------------------------------------------------------


async def test_an_answer_comes_on_stdout_and_nothing_else(room: Room) -> None:
    question = ("hive-tiny", "What is Hive?", "--temperature", "0")
    ran = await hive("infer", *question, url=room.queen.url)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Hive")
    assert ran.out.endswith("\n")
    whole, piped = await asyncio.gather(
        hive("infer", *question, "--no-stream", url=room.hive.url),
        hive("infer", question[0], "-", *question[2:], url=room.queen.url, stdin=b"What is Hive?"),
    )
    assert whole.out == piped.out == ran.out


async def test_json_of_an_answer_is_its_end_event(room: Room) -> None:
    ran = await hive("infer", "parrot", "hi", "--max-tokens", "3", "--json", url=room.queen.url)
    assert ran.json["type"] == "end"
    assert ran.json["tokens_out"] == 3
    assert ran.json["text"] == "the queen sends"


async def test_tokens_are_written_as_they_come(room: Room, slow: str) -> None:
    process = await start("infer", slow, "go", "--max-tokens", "20", url=room.queen.url)
    assert process.stdout is not None
    first = await process.stdout.read(4)
    assert first.startswith(b"the")
    assert process.returncode is None
    rest, _ = await process.communicate()
    assert process.returncode == 0
    assert len((first + rest).split()) == 20


async def test_a_terminal_is_told_who_answered_and_how_fast(room: Room) -> None:
    async with terminal("infer", "parrot", "hi", "--max-tokens", "3", url=room.queen.url) as shown:
        assert await shown.ends() == 0
        assert f"{room.parrot['worker_id']} on gpu-0, first token after" in shown.words
        assert "3 tokens" in shown.words


async def test_an_empty_or_broken_prompt_on_stdin_is_refused_at_once(room: Room) -> None:
    for text in (b" \n", b"\xff\xfe"):
        ran = await hive("infer", "parrot", "-", stdin=text, url=room.queen.url)
        assert (ran.code, ran.out) == (Exit.USAGE, "")


async def test_ctrl_c_cancels_the_job_and_exits_130(room: Room, slow: str) -> None:
    process = await start("infer", slow, "go", "--max-tokens", "500", url=room.queen.url)
    assert process.stdout is not None
    await process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == Exit.CANCELLED
    assert err == b"cancelled\n"
    assert (await job_of(room, slow))["status"] == "cancelled"


def history(home: Path) -> tuple[str, int]:
    """What a chat has kept under this state folder, and who may read it."""
    path = home / "hive" / "chat_history"
    return path.read_text(), path.stat().st_mode


async def test_ctrl_c_in_a_chat_cancels_that_answer_only(room: Room, slow: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        env = {"XDG_STATE_HOME": home}
        async with terminal("chat", slow, url=room.queen.url, env=env) as shown:
            await shown.shows(">>>")
            shown.types("first question\r")
            await shown.shows("the queen sends")
            shown.types("\x03")
            await shown.shows("cancelled; this turn is forgotten >>>")
            assert (await job_of(room, slow))["status"] == "cancelled"
            shown.types("/clear\r")
            await shown.shows("Forgotten. >>>")
            shown.types("/bye\r")
            assert await shown.ends() == 0
        kept, mode = history(Path(home))
        assert "first question" in kept
        assert mode & 0o077 == 0


async def test_a_chat_in_a_pipe_answers_line_by_line_and_remembers(room: Room) -> None:
    lines = b"What is Hive?\n\nWhat is a queen?\n/bye\nnot asked\n"
    flags = ("--max-tokens", "4", "--temperature", "0")
    plain, as_json = await asyncio.gather(
        hive("chat", "hive-tiny", *flags, stdin=lines, url=room.queen.url),
        hive("chat", "hive-tiny", *flags, "--json", stdin=lines, url=room.hive.url),
    )
    assert (plain.code, plain.err) == (0, "")
    ends = [json.loads(line) for line in as_json.out.splitlines()]
    assert [end["text"].strip() for end in ends] == [x.strip() for x in plain.out.splitlines()]
    first, second = (end["usage"]["prompt_tokens"] for end in ends)
    assert second > first + 4  # the first turn went along


async def test_a_chat_in_a_pipe_ends_at_the_first_refusal(room: Room) -> None:
    ran = await hive("chat", "nobody", stdin=b"hello?\nstill there?\n", url=room.hive.url)
    assert (ran.code, ran.out) == (Exit.REFUSED, "")
    assert ran.err.count("error: ") == 1


# -- workers, models, jobs ---------------------------------------------------------------------


async def test_a_worker_is_spawned_shown_and_stopped_in_both_forms(room: Room) -> None:
    short = await hive("workers", "spawn", "hive-tiny", url=room.queen.url)
    assert short.code == 0, short.err
    assert "is ready: hive-tiny on cpu of gpu-0" in short.out
    assert "Loading" in short.err  # progress stays beside the result
    address = room.hive.url.removeprefix("http://")
    older = await hive(
        *("workers", "spawn", "--hive", address, "--model", "hive-tiny"),
        *("--worker-type", "cpu", "--device", "0", "--json"),
    )
    assert older.code == 0, older.err
    first, second = WORKER_ID.search(short.out), older.json["worker_id"]
    assert first is not None
    removed, removed_too = await asyncio.gather(
        hive("workers", "rm", first[0], url=room.queen.url),
        hive("workers", "rm", second, "--hive", room.hive.url),
    )
    assert (removed.code, removed_too.code) == (0, 0)
    left = (await hive("workers", "ls", "--json", url=room.queen.url)).json["workers"]
    assert not {first[0], second} & {worker["worker_id"] for worker in left}


async def test_a_worker_is_shown_with_its_log(room: Room) -> None:
    worker = str(room.tiny["worker_id"])
    shown, log, as_json = await asyncio.gather(
        hive("workers", "show", worker, "--hive", "gpu-0", url=room.queen.url),
        hive("workers", "logs", worker, url=room.queen.url),
        hive("workers", "logs", worker, "--json", url=room.hive.url),
    )
    assert re.search(r"^state +ready$", shown.out, re.MULTILINE)
    assert log.out.strip()
    assert as_json.json["log_tail"] == log.out.splitlines()


async def test_an_unknown_hive_is_named_with_those_that_are_known(room: Room) -> None:
    ran = await hive("status", "--hive", "gpu-9.invalid", url=room.queen.url)
    assert ran.code == Exit.UNREACHABLE
    assert "knows gpu-0" in ran.err


async def test_a_device_that_is_not_there_is_refused_by_the_hive(room: Room) -> None:
    ran = await hive("workers", "spawn", "hive-tiny", "--device", "vulkan:7", url=room.hive.url)
    assert ran.code == Exit.REFUSED
    assert "cpu" in ran.err


async def test_a_download_is_a_live_bar_that_ctrl_c_cancels_and_lines_in_a_pipe(
    fresh: Cluster, tmp_path: Path
) -> None:
    data = write_gguf(tmp_path / "m.gguf", elements=4096).read_bytes()
    gate = Gate()

    async def trickle() -> None:
        while True:
            await gate.allow(len(data) // 200)
            await asyncio.sleep(0.1)

    async with HubServer() as hub, asyncio.TaskGroup() as tasks:
        hub.add("org/tiny-GGUF", {"tiny-Q8_0.gguf": data})
        hub.fault("tiny-Q8_0.gguf", gate)
        slowly = tasks.create_task(trickle())
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        agent = await fresh.hive("gpu-0", env=env)
        pull = ("models", "pull", "org/tiny-GGUF")
        async with terminal(*pull, url=agent.url) as shown:
            await shown.shows("tiny-Q8_0.gguf")
            assert "━" in shown.text
            shown.types("\x03")
            assert await shown.ends() == Exit.CANCELLED
        job = (await agent.client.get("/v1/jobs"))["jobs"][0]
        assert (job["operation"], job["status"]) == ("model_download", "cancelled")
        ran = await hive(*pull, url=agent.url)
        assert ran.code == 0, ran.err
        assert ran.out == "org/tiny-GGUF:Q8_0 is here on gpu-0.\n"
        assert re.search(r"^tiny-Q8_0.gguf 100 % \(", ran.err, re.MULTILINE)
        removed = await hive("models", "rm", "tiny", url=agent.url)
        assert removed.code == 0, removed.err
        slowly.cancel()


async def test_a_job_is_followed_and_goes_on_when_the_follower_leaves(
    room: Room, slow: str
) -> None:
    submitted = await room.queen.client.submit(
        {
            "operation": "infer",
            "model": slow,
            "prompt": "go",
            "max_tokens": 500,
            "on_disconnect": "detach",
        }
    )
    process = await start("jobs", "tail", submitted.job_id, url=room.queen.url)
    assert process.stdout is not None
    await process.stdout.readuntil(b"the queen")
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == Exit.CANCELLED
    assert b"goes on" in err
    assert (await room.queen.client.get(f"/v1/jobs/{submitted.job_id}"))["status"] == "running"

    follower = await start("jobs", "tail", submitted.job_id, "--json", url=room.queen.url)
    assert follower.stdout is not None
    await follower.stdout.readline()
    cancelled = await hive("jobs", "cancel", submitted.job_id, url=room.queen.url)
    assert cancelled.out == f"{submitted.job_id} is cancelled.\n"
    out, _ = await follower.communicate()
    assert follower.returncode == Exit.CANCELLED
    assert json.loads(out.splitlines()[-1])["type"] == "cancelled"
    again = await hive("jobs", "cancel", submitted.job_id, "--json", url=room.queen.url)
    assert (again.code, again.json["status"]) == (0, "cancelled")


async def test_a_job_that_fails_exits_1_with_its_message(room: Room) -> None:
    submitted = await room.hive.client.submit(
        {
            "operation": "worker_spawn",
            "model": "doomed",
            "worker": "cpu",
            "options": {"engine": "scripted", "script": {"fail_load": "no such luck"}},
        }
    )
    ran = await hive("jobs", "tail", submitted.job_id, url=room.hive.url)
    assert ran.code == Exit.FAILED
    assert ran.err.startswith("error: ")


async def test_the_shell_completes_what_the_daemon_knows(room: Room) -> None:
    async def completes(line: str, url: str) -> list[str]:
        env = {
            "_HIVE_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        ran = await hive(url=url, env=env)
        assert (ran.code, ran.err) == (0, "")
        return ran.out.split()

    named, worker, hives, nothing = await asyncio.gather(
        completes("hive infer hive-", room.queen.url),
        completes("hive workers rm w-", room.queen.url),
        completes("hive status --hive g", room.queen.url),
        completes("hive infer ", "http://127.0.0.1:9"),
    )
    assert named == ["hive-tiny"]
    assert str(room.tiny["worker_id"]) in worker
    assert hives == ["gpu-0"]
    assert nothing == []


# -- starting and stopping ---------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and everything that it has started."""
    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


async def all_gone(pids: list[int]) -> None:
    await until(lambda: not any(map(alive, pids)), f"{pids} to end", within_s=20)


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder whose path leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield folder


async def test_demo_answers_and_leaves_nothing(short_folder: str) -> None:
    env = {"TMPDIR": short_folder, "HIVE_PORT": "1"}  # settings of others must not matter
    process = await start("demo", env=env)
    assert process.stdout is not None
    first = await process.stdout.readline()
    pids = family(process.pid)
    out, err = await process.communicate()
    shown = (first + out).decode()
    assert process.returncode == 0, err.decode()
    assert "> What is Hive?" in shown
    assert re.search(r"first token after \d+ ms, \d+ tokens", shown)
    assert "hive up" in shown
    assert len(pids) >= 3
    await all_gone(pids)
    assert os.listdir(short_folder) == []


async def test_demo_cleans_up_after_ctrl_c(short_folder: str) -> None:
    process = await start("demo", env={"TMPDIR": short_folder})
    assert process.stdout is not None
    await process.stdout.readline()
    pids = family(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == Exit.CANCELLED
    assert b"has been stopped" in err
    await all_gone(pids)
    assert os.listdir(short_folder) == []


async def test_up_says_what_to_try_and_stops_everything_on_ctrl_c(tmp_path: Path) -> None:
    flags = ("--queen-port=0", "--agent-port=0", f"--state-dir={tmp_path}", "--hive-id=box")
    async with terminal("up", *flags) as shown:
        await shown.shows("Ctrl-C stops both.")
        assert "hive workers spawn hive-tiny" in shown.words
        url = re.search(r"export HIVE_QUEEN_URL=(\S+)", shown.words)
        assert url is not None
        spawned = await hive("workers", "spawn", "hive-tiny", "--json", url=url[1])
        assert spawned.code == 0, spawned.err
        pids = [*family(shown.pid), spawned.json["pid"]]
        shown.types("\x03")
        assert await shown.ends() == 0
        await shown.shows("Stopped.")
    await all_gone(pids)


async def test_killing_up_leaves_nothing_running(tmp_path: Path) -> None:
    process, told = await _up(tmp_path)
    spawned = await hive("workers", "spawn", "hive-tiny", "--json", url=told["queen"]["url"])
    assert spawned.code == 0, spawned.err
    pids = [*family(process.pid), spawned.json["pid"]]
    process.kill()
    await process.wait()
    await all_gone(pids)


async def test_up_says_so_when_a_daemon_dies_and_stops_the_other(tmp_path: Path) -> None:
    process, _ = await _up(tmp_path)
    pids = family(process.pid)
    agent = next(pid for pid in pids[1:] if "agent" in psutil.Process(pid).cmdline())
    os.kill(agent, signal.SIGKILL)
    _, err = await process.communicate()
    assert process.returncode == Exit.FAILED
    assert "The agent ended (SIGKILL)" in err.decode()
    await all_gone(pids)


async def test_up_names_the_flag_for_a_port_that_is_taken(room: Room, tmp_path: Path) -> None:
    port = room.queen.url.rpartition(":")[2]
    ran = await hive(
        "up", f"--queen-port={port}", "--agent-port=0", f"--state-dir={tmp_path}", "--hive-id=x"
    )
    assert ran.code == Exit.FAILED
    assert "--queen-port" in ran.err
    assert ran.err.count("\n") == 1


async def test_a_daemon_that_cannot_start_exits_1(room: Room, tmp_path: Path) -> None:
    port = room.queen.url.rpartition(":")[2]
    taken, wrong = await asyncio.gather(
        hive("queen", f"--port={port}", f"--state-dir={tmp_path}"),
        hive("agent", "--hive-id=no spaces", f"--state-dir={tmp_path}"),
    )
    assert (taken.code, wrong.code) == (Exit.FAILED, Exit.FAILED)
    assert "--port" in taken.err
    assert "--hive-id" in wrong.err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HIVE_TRUNKS", "maybe", "HIVE_TRUNKS is wrong: it must be true or false."),
        ("HIVE_TASK_JOBS", "1.5", "HIVE_TASK_JOBS is wrong: it must be a whole number."),
        ("HIVE_PORT", "x", "--port (or HIVE_PORT) is wrong: it must be a whole number."),
        ("HIVE_DRAIN_SECONDS", "soon", "HIVE_DRAIN_SECONDS is wrong: it must be a number."),
        ("HIVE_MAX_BODY", "5Q", "HIVE_MAX_BODY is wrong: it must be a size, such as 64MiB or 1G."),
        (
            "HIVE_LOG_LEVEL",
            "x",
            "HIVE_LOG_LEVEL is wrong: it must be 'debug', 'info', 'warning' or 'error'.",
        ),
    ],
)
def test_a_wrong_setting_is_told_in_words_by_the_names_that_it_has(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(CannotStart) as refused:
        QueenSettings.load(port=None)
    assert str(refused.value) == message


async def test_shutdown_stops_the_queen_and_her_hives(fresh: Cluster) -> None:
    queen = await fresh.queen()
    agent = await fresh.hive("gpu-1", queen=queen)
    async with terminal("shutdown", url=queen.url) as shown:
        await shown.shows("[y/N]")
        shown.types("n\r")
        assert await shown.ends() == Exit.FAILED
    assert alive(queen.pid)
    ran = await hive("shutdown", "--json", url=queen.url)
    assert (ran.code, ran.json["status"]) == (0, "stopped")
    await all_gone([queen.pid, agent.pid])


async def test_up_hands_the_queens_own_flags_to_her(tmp_path: Path) -> None:
    nowhere = "postgresql://nobody@127.0.0.1:9/none"
    process, told = await _up(tmp_path, "--processes=2", f"--database={nowhere}")
    pids = family(process.pid)
    started = [" ".join(psutil.Process(pid).cmdline()) for pid in pids]
    assert sum("queen.relay_process" in line for line in started) == 1
    ran = await hive("tasks", "ls", "--json", url=told["queen"]["url"])
    assert (ran.code, ran.error["code"]) == (Exit.FAILED, "queue_unavailable")
    process.send_signal(signal.SIGINT)
    await process.communicate()
    await all_gone(pids)
    assert not (tmp_path / "queue.db").exists()


async def _up(folder: Path, *flags: str) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    """``hive up`` on free ports, and what it told."""
    process = await start(
        *("up", "--queen-port=0", "--agent-port=0", f"--state-dir={folder}", "--hive-id=box"),
        *("--json", *flags),
    )
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line, (await process.communicate())[1].decode()
    return process, json.loads(line)


# -- what is decided apart from doing -----------------------------------------------------------


def test_exit_codes_follow_from_what_went_wrong() -> None:
    assert exit_for(NotFound("x")) == exit_for(Conflict("x")) == Exit.REFUSED
    assert exit_for(HiveError("x")) == exit_for(Unavailable("x")) == Exit.FAILED
    assert exit_for(Unavailable("x", code="daemon_unreachable")) == Exit.UNREACHABLE
    assert exit_for(HiveError("x", code="job_failed")) == Exit.FAILED
    assert exit_for(Cancelled("x")) == Exit.CANCELLED
    assert exit_for(WrongUsage("x")) == Exit.USAGE


def test_download_lines_are_told_from_others() -> None:
    line = "Qwen3-0.6B-Q8_0.gguf 45 % (287.3 of 639.4 MB, 21.4 MB/s, 16 s left)"
    assert parse_download(line) == Download(
        "Qwen3-0.6B-Q8_0.gguf", 45, "287.3 of 639.4 MB, 21.4 MB/s, 16 s left"
    )
    for other in ("Loading hive-tiny (3.4 MB)", "45 %", "", "a 5 %"):
        assert parse_download(other) is None


@pytest.mark.parametrize(
    ("kind", "devices", "gpus", "expected"),
    [
        (None, [], None, place.Place(None)),
        (None, [], 2, place.Place(None)),
        ("cpu", [], None, place.Place("cpu")),
        ("cuda", [], 2, place.Place("cuda")),
        ("cuda", ["0"], None, place.Place("cuda", (0,))),
        (None, ["cuda:0"], None, place.Place("cuda", (0,))),
        (None, ["1"], None, place.Place("cuda", (1,))),
        (None, ["cpu"], None, place.Place("cpu")),
        (None, ["cuda"], 4, place.Place("cuda")),
        ("cuda", ["0", "cuda:1"], None, place.Place("cuda", (0, 1))),
        (None, ["0", "3"], None, place.Place("cuda", (0, 3))),
    ],
)
def test_what_is_not_named_is_left_to_the_hive(
    kind: str | None, devices: list[str], gpus: int | None, expected: place.Place
) -> None:
    assert place.decide(kind, devices, gpus) == expected


def test_one_device_and_several_go_into_fields_of_their_own() -> None:
    assert (place.Place("cuda", (3,)).device, place.Place("cuda", (3,)).devices) == (3, None)
    assert (place.Place("cuda", (0, 1)).device, place.Place("cuda", (0, 1)).devices) == (
        None,
        [0, 1],
    )


@pytest.mark.parametrize(
    ("kind", "devices", "gpus"),
    [
        ("tpu", [], None),
        ("cuda", ["cpu"], None),
        (None, ["cuda:x"], None),
        (None, ["0", "cuda:0"], None),
        (None, ["0"], 2),
        ("cpu", [], 2),
    ],
)
def test_a_place_that_cannot_be_is_wrong_usage(
    kind: str | None, devices: list[str], gpus: int | None
) -> None:
    with pytest.raises(WrongUsage):
        place.decide(kind, devices, gpus)


def test_devices_of_one_worker_are_named_together() -> None:
    assert together(("cpu",)) == "cpu"
    assert together(("cuda:0", "cuda:1", "cuda:12")) == "cuda:0,1,12"


def _known(hive_id: str, url: str) -> HiveInfo:
    return HiveInfo(
        hive_id=hive_id, hive_url=url, state="online", found_by="ready", last_heard_s=0.1
    )


LOCAL_QUEEN = connect.Daemon("http://127.0.0.1:7833", "queen")
FAR_QUEEN = connect.Daemon("http://10.0.0.1:7833", "queen")


@pytest.mark.parametrize(
    ("hive_name", "found", "known_url", "expected"),
    [
        ("a", LOCAL_QUEEN, "http://10.0.0.5:7835", ("http://10.0.0.5:7835", "a")),
        ("a", LOCAL_QUEEN, "http://127.0.0.1:41000", ("http://127.0.0.1:41000", "a")),
        ("a", FAR_QUEEN, "http://127.0.0.1:7835", (FAR_QUEEN.url, "a")),
        ("gpu-9", LOCAL_QUEEN, "http://10.0.0.5:7835", ("http://gpu-9:7835", None)),
        ("gpu-9:99", None, "", ("http://gpu-9:99", None)),
        ("localhost", FAR_QUEEN, "http://10.0.0.5:7835", ("http://127.0.0.1:7835", None)),
        ("fe80::1", None, "", ("http://[fe80::1]:7835", None)),
        ("[::1]:99", None, "", ("http://[::1]:99", None)),
    ],
)
def test_a_hive_is_found_by_id_then_by_host(
    hive_name: str,
    found: connect.Daemon | None,
    known_url: str,
    expected: tuple[str, str | None],
) -> None:
    hives = [_known("a", known_url)] if known_url else []
    target = connect.decide(hive_name, found, hives)
    assert (target.url, target.hive_id) == expected


def test_followed_logs_show_each_line_once() -> None:
    assert workers.newer(["a", "b"], ["a", "b", "c"]) == ["c"]
    assert workers.newer(["x", "x"], ["x", "x", "x"]) == ["x"]
    assert workers.newer([], ["a"]) == ["a"]
    assert workers.newer(["a", "b", "c"], ["b", "c", "d"]) == ["d"]  # the window has moved
    assert workers.newer(["a", "b"], ["y", "z"]) == ["y", "z"]  # the log was begun anew


def test_chat_commands_are_told_from_questions() -> None:
    assert chat.parse_command("what is /clear?") is None
    assert chat.parse_command("/system be brief") == chat.Command("system", "be brief")
    assert chat.parse_command("/quit") == chat.Command("bye")
    assert chat.parse_command("/frob now") == chat.Command("unknown", "/frob")


def test_figures_read_well() -> None:
    assert [words.size(n) for n in (0, 999, 3_374_240, 639_400_000, 1_500_000_000_000)] == [
        *("0 B", "999 B", "3.4 MB", "639.4 MB", "1.5 TB")
    ]
    assert [words.age(s) for s in (0.2, 59, 120, 7200, 200_000)] == [
        *("0 s", "59 s", "2 min", "2 h", "2 days")
    ]


def test_what_others_have_said_is_shown_with_its_control_characters_escaped() -> None:
    said = "a\x1b[31mb\x07\r\n\tc\x9b\u202e\ud83dé😀\r"
    assert words.printable(said) == r"a\x1b[31mb\x07\r\n\tc\x9b\u202e\ud83dé😀\r"
    assert words.printable(said, block=True) == "a\\x1b[31mb\\x07\n\tc\\x9b\\u202e\\ud83dé😀\\r"
    as_json = words.printable_json(json.dumps([said], ensure_ascii=False, indent=2))
    assert as_json.isprintable() or set(filter(lambda c: not c.isprintable(), as_json)) == {"\n"}
    assert json.loads(as_json) == [said]


def test_plain_tables_line_up_and_name_what_is_missing() -> None:
    table = Table([Column("NAME", "id"), Column("N", "number")], [["a b", "1"], ["", "22"]], "none")
    assert aligned(table) == ["NAME   N", "a b    1", "-     22"]
