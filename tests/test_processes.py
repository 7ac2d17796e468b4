"""A queen of several processes: they share a port, and agree on all that a caller can see."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psutil
import pytest
import uvloop

from keeper.tls import make
from operations.errors import HiveError
from queen import channel as frames
from queen.handover import ProcessZero
from queen.processes import MODULE
from queen.relay_process import _Hive, _Refused
from tests.cluster import (
    Cluster,
    Daemon,
    alive,
    clean_env,
    cluster,
    hive_command,
    served,
    spawn_scripted,
    until,
    with_constants,
)
from tests.test_door import CHAT, Caller, chat, chunked, get, post
from wire.keys import Keys
from wire.peer import Peer
from wire.proof import HELLO
from wire.secret import Secret

EVENTS = (
    *(f'data: {{"n":{n},"text":"{"é" * n}"}}\n\n' for n in range(40)),
    "data: [DONE]\n\n",
)
TRIES = 300
HALF = 4_000_000  # bytes


def relays(queen: Daemon) -> list[int]:
    """The process ids of the relay processes."""
    found = []
    for child in psutil.Process(queen.pid).children():
        with suppress(psutil.Error):  # it has just ended
            if "queen.relay_process" in child.cmdline():
                found.append(child.pid)
    return found


def holder(queen: Daemon, caller: Caller) -> int | None:
    """Which process of the queen has this connection."""
    ours = tuple(caller.writer.get_extra_info("sockname")[:2])
    for pid in (*relays(queen), queen.pid):
        with suppress(psutil.Error):
            connections = psutil.Process(pid).net_connections("tcp")
            if any(one.raddr and tuple(one.raddr) == ours for one in connections):
                return pid
    return None


async def text(queen: Daemon, path: str, **how: Any) -> str:
    async with calling(queen, **how) as caller:
        caller.send(get(path))
        status, _, body = await caller.answer()
        assert status == 200
        return body.decode()


async def all_up(queen: Daemon, count: int, **how: Any) -> None:
    """Wait until so many processes answer."""

    async def up() -> bool:
        return f"hive_queen_processes {count}.0" in await text(queen, "/metrics", **how)

    await until(up, f"{count} processes to answer", within_s=40)


@asynccontextmanager
async def calling(
    queen: Daemon, tls: ssl.SSLContext | None = None, receive_bytes: int | None = None
) -> AsyncIterator[Caller]:
    parts = urlsplit(queen.url)
    made = socket.socket()
    if receive_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, (parts.hostname, parts.port))
    reader, writer = await asyncio.open_connection(
        sock=made, ssl=tls, server_hostname="" if tls else None
    )
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def one_at_each(
    queen: Daemon, *pids: int, refusal: int = 404, **how: Any
) -> AsyncIterator[dict[int, Caller]]:
    """A connection to each of the queen's processes, by process id; process 0 comes last.

    :param refusal: of a model that nobody has; 503 where the queen knows no hive
    """
    wanted = pids or (*relays(queen), queen.pid)
    found: dict[int, Caller] = {}
    async with AsyncExitStack() as kept:
        for _ in range(TRIES):
            if set(found) >= set(wanted):
                break
            caller = await kept.enter_async_context(calling(queen, **how))
            caller.send(post(b'{"model": "nobody-has-it"}'))
            assert (await caller.answer())[0] == refusal
            pid = holder(queen, caller)
            if pid in wanted and pid not in found:
                found[pid] = caller
            else:
                caller.writer.close()
        assert set(found) == set(wanted)
        yield {pid: found[pid] for pid in wanted}


async def in_flight(queen: Daemon) -> int:
    hives = json.loads(await text(queen, "/v1/hives"))["hives"]
    return sum(hive["in_flight"] for hive in hives)


async def none_in_flight(queen: Daemon) -> None:
    async def none() -> bool:
        return await in_flight(queen) == 0

    await until(none, "no request to be counted any more")


async def some_in_flight(queen: Daemon, count: int) -> None:
    async def some() -> bool:
        return await in_flight(queen) == count

    await until(some, f"{count} requests to be counted")


def error_in(body: bytes) -> dict[str, Any]:
    """The error that a stream ends with, without what tells requests apart."""
    events = [event for event in body.decode().split("\n\n") if '"error"' in event]
    (event,) = events
    data = next(line for line in event.split("\n") if line.startswith("data: "))
    error: dict[str, Any] = json.loads(data.removeprefix("data: "))["error"]
    return {key: value for key, value in error.items() if key != "request_id"}


@dataclass(frozen=True)
class Several:
    """A queen of three processes and the hives ``gpu-0`` and ``gpu-1``, with the workers
    ``parrot``, ``late`` and ``stuck`` each, and ``verbatim`` on the first."""

    queen: Daemon
    hives: tuple[Daemon, Daemon]
    secret: Secret

    def key(self, **limits: Any) -> tuple[str, str]:
        return Keys(self.secret).make(scopes=("infer",), **limits)


@pytest.fixture(scope="module")
async def several() -> AsyncIterator[Several]:
    async with cluster() as made:
        secret = Secret.new()
        made.env = {"HIVE_SECRET": secret.text}
        queen = await made.queen("--processes=3")
        first, second = [await made.hive(f"gpu-{n}", queen=queen) for n in range(2)]
        for hive in (first, second):
            await spawn_scripted(hive, slots=200)
            await spawn_scripted(hive, "late", slots=200, first_token_seconds=2)
            await spawn_scripted(hive, "stuck", slots=200, hang_after_tokens=1)
        await spawn_scripted(first, "verbatim", raw_events=EVENTS)
        await served(queen.client, "parrot", "late", "stuck", "verbatim")
        await all_up(queen, 3)
        yield Several(queen, (first, second), secret)


async def test_frames_and_descriptors_arrive_in_order() -> None:
    ends = socket.socketpair()
    came: list[frames.FromRelay] = []
    zero = frames.queens_channel(ends[0], came.append)
    relay = frames.relay_channel(ends[1], lambda frame: None)
    pipes = [os.pipe() for _ in range(40)]
    sent: list[frames.FromRelay] = []
    for number, (read, _) in enumerate(pipes):
        inode = os.fstat(read).st_ino
        size = 3_000_000 if number == 7 else number
        sent += [
            frames.Released(number),
            frames.HandOver(inode, os.urandom(size), (("::1", 1), ("é", 2))),
            frames.Ended("/", 200, None, "m", number),
        ]
        relay.send(sent[-3])
        relay.send(sent[-2], read)
        relay.send(sent[-1])
    try:
        await until(lambda: len(came) == len(sent), "all frames to come")
        assert came == sent
        for one, (_, write) in zip(came[1::3], pipes, strict=True):
            assert isinstance(one, frames.HandOver)
            descriptor = zero.descriptor(one.inode)
            assert descriptor is not None
            os.write(write, b"x")
            assert os.read(descriptor, 9) == b"x"
            os.close(descriptor)
        relay.close()
        await zero.over.wait()
    finally:
        zero.close()
        relay.close()
        for _, write in pipes:
            os.close(write)


@pytest.mark.parametrize("wrong", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\0"])
async def test_what_is_no_frame_ends_the_channel(wrong: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = frames.queens_channel(ours, lambda frame: None)
    with theirs:
        theirs.sendall(wrong)
        async with asyncio.timeout(10):
            await channel.over.wait()


async def test_a_frame_that_cannot_be_taken_ends_the_channel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def take(frame: frames.FromRelay) -> None:
        raise OSError("no room")

    ends = socket.socketpair()
    zero, relay = frames.queens_channel(ends[0], take), frames.relay_channel(ends[1], print)
    relay.send(frames.Ready())
    async with asyncio.timeout(10):
        await zero.over.wait()
        await relay.over.wait()
    assert "could not be taken" in caplog.text


async def test_a_relay_process_that_cannot_begin_ends(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs, socket.create_server(("127.0.0.1", 0)) as listener:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULE, str(theirs.fileno()), str(listener.fileno())),
            pass_fds=(theirs.fileno(), listener.fileno()),
            env=clean_env(),
            stderr=asyncio.subprocess.PIPE,
        )
    zero = frames.queens_channel(ours, print)
    lost = str(tmp_path / "taken")
    Path(lost).write_bytes(b"a file, where a folder is wanted")
    zero.send(frames.Begin(1, "queen-1", None, False, None, 1024, False, lost, "INFO", []))
    try:
        _, said = await asyncio.wait_for(process.communicate(), 30)
    finally:
        zero.close()
    assert process.returncode == 1
    assert b"could not be taken" in said


async def test_the_same_refusal_is_sent_to_process_zero_once() -> None:
    ends = socket.socketpair()
    came: list[frames.FromRelay] = []
    zero = frames.queens_channel(ends[0], came.append)
    relay = frames.relay_channel(ends[1], print)
    refusals = _Refused(relay)
    for who in ("one", "one", "other", "one"):
        refusals.tell(who, HiveError("no", code="no_key"), path="/")
    refusals.tell("one", HiveError("no", code="bad_key"), path=None)
    relay.send(frames.Ready())
    await until(lambda: frames.Ready() in came, "all frames to come")
    assert came == [
        frames.Told("one", "no_key", {"path": "/"}),
        frames.Told("other", "no_key", {"path": "/"}),
        frames.Told("one", "bad_key", {"path": None}),
        frames.Ready(),
    ]
    zero.close()
    relay.close()


async def test_who_watches_a_hive_that_is_gone_is_told_soon_unless_he_stops() -> None:
    peer = Peer("http://127.0.0.1:1", None, role="queen", id="q", roles=("hive",))
    hive = _Hive(peer, "gpu-0", None)
    told: list[str] = []
    hive.watch(lambda: told.append("unwatched"))()
    hive.watch(lambda: told.append("before"))
    hive.go()
    hive.watch(lambda: told.append("stopped"))()
    hive.watch(lambda: told.append("after"))
    assert told == ["before"]
    await asyncio.sleep(0)
    assert told == ["before", "after"]
    await hive.close()


class FirstAnswer(asyncio.Protocol):
    """Writes more than a connection takes at once, and has it moved to process 0."""

    def __init__(self, zero: ProcessZero, said: bytes) -> None:
        self._zero = zero
        self._said = said

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        for half in (self._said[:HALF], self._said[HALF:]):  # one waits below TLS, one above it
            self.transport.write(half)
        self._zero.take(self.transport, b"")


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_under_tls_changes_process_when_all_earlier_answers_are_taken(
    tmp_path: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    said = b"x" * 2 * HALF
    pair = make(["localhost"], 1, datetime.now(UTC))
    (tmp_path / "cert.pem").write_bytes(pair.cert)
    (tmp_path / "key.pem").write_bytes(pair.key)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    blind = ssl.create_default_context()
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE

    async def run() -> None:
        loop = asyncio.get_running_loop()
        ends = socket.socketpair()
        unsent: list[int] = []
        accepted: list[FirstAnswer] = []

        def take(frame: frames.FromRelay) -> None:
            unsent.append(accepted[0].transport.get_write_buffer_size())

        def accept() -> FirstAnswer:
            accepted.append(FirstAnswer(moving, said))
            return accepted[0]

        zero = frames.queens_channel(ends[0], take)
        relay = frames.relay_channel(ends[1], print)
        moving = ProcessZero(relay, ())
        server = await loop.create_server(accept, "127.0.0.1", 0, ssl=tls)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=blind)
        try:
            assert await reader.readexactly(len(said)) == said
            await until(lambda: unsent, "the connection to be moved")
            assert unsent == [0]
            await until(lambda: moving.splices, "it to be passed on")
            moving.close()
            assert await reader.read() == b""
            await until(lambda: not moving.splices, "both ends to be closed")
        finally:
            accepted[0].transport.abort()
            writer.close()
            server.close()
            zero.close()
            relay.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(run())


async def test_every_process_streams_the_engines_bytes(several: Several) -> None:
    async with one_at_each(several.queen) as callers:
        assert len(callers) == 3
        for caller in callers.values():
            caller.send(post(chat(model="verbatim", stream=True)))
            status, headers, body = await caller.answer()
            assert status == 200
            assert body == "".join(EVENTS).encode()
            assert headers["x-hive-id"] == "gpu-0"
    state = several.queen.log_path.parent / "queen"
    for name in ("queen.log", "queen-1.log", "queen-2.log"):
        log = state / name
        await until(lambda log=log: "action=request" in log.read_text(), f"a line in {name}")


async def test_one_process_counts_the_requests_of_all(several: Several) -> None:
    async def counted() -> float:
        lines = (await text(several.queen, "/metrics")).splitlines()
        route = f'hive_requests_total{{route="{CHAT}",status="200"}} '
        return sum(float(line.removeprefix(route)) for line in lines if line.startswith(route))

    async with one_at_each(several.queen) as callers:
        before = await counted()
        for caller in callers.values():
            for _ in range(4):
                caller.send(post(chat()))
                assert (await caller.answer())[0] == 200

        async def all_counted() -> bool:
            return await counted() == before + 12

        await until(all_counted, "the requests of all processes to be counted")


async def test_a_connection_changes_process_for_what_is_not_inference(several: Several) -> None:
    queen = several.queen
    async with one_at_each(queen) as callers:
        for pid, caller in callers.items():
            caller.send(post(chat(stream=True)))
            assert (await caller.answer())[2].endswith(b"data: [DONE]\n\n")
            assert holder(queen, caller) == pid
            for _ in range(3):
                caller.send(get("/health"))
                status, _, body = await caller.answer()
                assert status == 200
                assert json.loads(body)["role"] == "queen"
                caller.send(post(chat()))
                assert (await caller.answer())[0] == 200
            assert holder(queen, caller) == queen.pid


@pytest.mark.parametrize(
    ("prefers", "stays"), [("return=minimal", True), ("respond-async, Hive-Direct", False)]
)
async def test_a_connection_changes_process_for_one_preference_alone(
    several: Several, prefers: str, stays: bool
) -> None:
    queen = several.queen
    async with one_at_each(queen, *relays(queen)) as callers:
        for pid, caller in callers.items():
            caller.send(post(chat(), f"Prefer: {prefers}"))
            assert (await caller.answer())[0] in (200, 307)
            assert (holder(queen, caller) == pid) is stays


async def test_pipelined_requests_are_answered_in_order_while_the_process_changes(
    several: Several,
) -> None:
    operation = json.dumps({"operation": "infer", "model": "parrot", "prompt": "x" * 200_000})
    async with one_at_each(several.queen) as callers:
        for caller in callers.values():
            caller.send(
                post(chat(stream=True)),
                get("/health"),
                post(chat()),
                post(
                    chunked(operation.encode(), 9),
                    "Transfer-Encoding: chunked",
                    path="/v1/jobs",
                    length=False,
                ),
                get("/v1/models"),
            )
            answers = [await caller.answer() for _ in range(5)]
            assert [status for status, _, _ in answers] == [200, 200, 200, 201, 200]
            assert answers[0][2].endswith(b"data: [DONE]\n\n")
            assert b'"role"' in answers[1][2]
            assert b'"choices"' in answers[2][2]
            assert b'"job_id"' in answers[3][2]
            assert b'"data"' in answers[4][2]


async def test_a_slow_reader_gets_the_whole_answer_before_his_connection_changes_process(
    several: Several,
) -> None:
    async with one_at_each(several.queen, receive_bytes=4096) as callers:
        for caller in callers.values():
            caller.send(post(chat(stream=True, max_tokens=4000)), get("/health"))
        for caller in callers.values():
            _, _, body = await caller.answer()
            assert body.endswith(b"data: [DONE]\n\n")
            assert body.count(b"\n\n") > 4000
            assert b'"role"' in (await caller.answer())[2]


async def test_what_is_malformed_is_refused_by_every_process(several: Several) -> None:
    async with one_at_each(several.queen) as callers:
        for caller in callers.values():
            caller.send(post(b"{"))
            assert (await caller.answer())[0] == 400
            caller.send(b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
            assert (await caller.closed()).startswith(b"HTTP/1.1 400 ")


async def test_daemons_prove_themselves_and_sign_whichever_process_they_reach(
    several: Several,
) -> None:
    for _ in range(12):
        peer = Peer(several.queen.url, several.secret, role="queen", id="other", roles=("queen",))
        try:
            assert await peer.open() is not None
            body = json.loads(chat())
            async with peer.http.post(f"{several.queen.url}{CHAT}", json=body) as answer:
                assert answer.status == 200
        finally:
            await peer.close()


async def test_a_revoked_key_holds_at_no_process(several: Several) -> None:
    key, key_id = several.key()
    sent = post(chat(), f"Authorization: Bearer {key}")
    async with one_at_each(several.queen) as callers:
        for caller in callers.values():
            caller.send(sent)
            assert (await caller.answer())[0] == 200
        await several.queen.client.post("/v1/keys/revoked", {"key_ids": [key_id]})
        for caller in callers.values():

            async def refused(caller: Caller = caller) -> bool:
                caller.send(sent)
                status, _, body = await caller.answer()
                return status == 401 and b"revoked_key" in body

            await until(refused, "the key to be refused", within_s=5)


async def test_a_refusal_is_logged_once_for_all_processes(several: Several) -> None:
    async with one_at_each(several.queen) as callers:
        for caller in callers.values():
            caller.send(post(chat(), "Authorization: Bearer hk-nonsense"))
            assert (await caller.answer())[0] == 401
    line = "action=refused who=127.0.0.1 why=invalid_key"
    await until(lambda: line in several.queen.log, "the refusal to be logged")
    await text(several.queen, "/health")
    assert several.queen.log.count(line) == 1


async def test_a_process_that_starts_later_knows_the_revoked_keys(several: Several) -> None:
    key, key_id = several.key()
    await several.queen.client.post("/v1/keys/revoked", {"key_ids": [key_id]})
    old = relays(several.queen)
    os.kill(old[0], signal.SIGKILL)
    await until(lambda: len({*relays(several.queen)} - {*old}) == 1, "another one to start")
    await all_up(several.queen, 3)
    async with one_at_each(several.queen) as callers:
        assert len(callers) == 3
        for caller in callers.values():
            caller.send(post(chat(), f"Authorization: Bearer {key}"))
            assert (await caller.answer())[0] == 401


async def test_a_keys_limit_holds_for_all_processes_together(several: Several) -> None:
    key, _ = several.key(rpm=6)
    statuses: Counter[int] = Counter()
    async with one_at_each(several.queen) as callers:
        for _ in range(4):
            for caller in callers.values():
                if caller.reader.at_eof():
                    continue
                caller.send(post(chat(), f"Authorization: Bearer {key}"))
                status, headers, _ = await caller.answer()
                statuses[status] += 1
                if status == 429:
                    assert int(headers["retry-after"]) > 0
    assert statuses[200] == 6
    assert statuses[429] >= 3


async def test_the_load_of_all_processes_is_spread(several: Several) -> None:
    async def ask(caller: Caller) -> str:
        caller.send(post(chat(model="late")))
        status, headers, _ = await caller.answer()
        assert status == 200
        return headers["x-hive-id"]

    async with AsyncExitStack() as kept:
        callers = [await kept.enter_async_context(calling(several.queen)) for _ in range(100)]
        spread = Counter(await asyncio.gather(*map(ask, callers)))
        used = Counter(holder(several.queen, caller) for caller in callers)
    assert sum(spread.values()) == 100
    assert max(spread.values()) <= 60
    assert len(used) == 3
    await none_in_flight(several.queen)


async def test_a_killed_process_takes_only_its_own_callers_along(several: Several) -> None:
    queen = several.queen
    await none_in_flight(queen)
    async with one_at_each(queen) as callers:
        for caller in callers.values():
            caller.send(post(chat(model="stuck", stream=True)))
        await some_in_flight(queen, 3)
        victim, *others = callers
        os.kill(victim, signal.SIGKILL)
        broken = await callers[victim].closed()
        assert b"[DONE]" not in broken
        await some_in_flight(queen, 2)
        async with one_at_each(queen, *others) as still:
            for caller in still.values():
                caller.send(post(chat()))
                assert (await caller.answer())[0] == 200
    await none_in_flight(queen)
    await all_up(queen, 3)
    assert victim not in relays(queen)
    async with one_at_each(queen) as callers:
        for caller in callers.values():
            caller.send(post(chat()))
            assert (await caller.answer())[0] == 200
    assert "status=died role=relay" in queen.log


async def test_no_waiting_connection_is_lost_with_a_process(several: Several) -> None:
    queen = several.queen
    victim = relays(queen)[0]
    os.kill(victim, signal.SIGSTOP)
    async with AsyncExitStack() as kept:
        callers = [await kept.enter_async_context(calling(queen)) for _ in range(40)]
        for caller in callers:
            caller.send(post(chat()))
        os.kill(victim, signal.SIGKILL)
        answers = await asyncio.gather(*(caller.answer() for caller in callers))
    assert [status for status, _, _ in answers] == [200] * 40
    await all_up(queen, 3)


async def test_a_process_that_hangs_is_replaced(fresh: Cluster) -> None:
    queen = await fresh.start(
        *("queen", "--port=0", "--processes=2"),
        prefix=with_constants("queen.processes", PING_S=0.4),
    )
    await all_up(queen, 2)
    async with one_at_each(queen, refusal=503) as callers:
        victim, _ = callers
        os.kill(victim, signal.SIGSTOP)
        await callers[victim].closed()
    await until(lambda: not alive(victim), "the process that hangs to be killed")
    await all_up(queen, 2)
    assert victim not in relays(queen)
    assert "answered nothing for too long" in queen.log
    async with one_at_each(queen, refusal=503) as callers:
        assert len(callers) == 2


async def test_callers_that_hang_up_are_counted_no_more(several: Several) -> None:
    await none_in_flight(several.queen)
    async with one_at_each(several.queen) as callers:
        for caller in callers.values():
            caller.send(post(chat(model="stuck", stream=True)))
        await some_in_flight(several.queen, 3)
    await none_in_flight(several.queen)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_hive_ends_its_streams_alike_at_every_process(
    fresh: Cluster, signum: int
) -> None:
    queen = await fresh.queen("--processes=2")
    hive = await fresh.hive("gpu-0", queen=queen)
    await spawn_scripted(hive, "stuck", slots=4, hang_after_tokens=2)
    await served(queen.client, "stuck")
    await all_up(queen, 2)
    async with one_at_each(queen) as callers:
        for caller in callers.values():
            caller.send(post(chat(model="stuck", stream=True)))
            await caller.reader.readuntil(b"\n\n")
        hive.process.send_signal(signum)
        try:
            ends = [await asyncio.wait_for(body_of(caller), 30) for caller in callers.values()]
        finally:
            await hive.stop(signal.SIGKILL)
        errors = [error_in(body) for body in ends]
        assert errors[0] == errors[1]
        assert errors[0]["hop"] == "hive"
        await none_in_flight(queen)
        for caller in callers.values():
            caller.send(post(chat(model="stuck")))
            assert (await caller.answer())[0] in (404, 503)


async def body_of(caller: Caller) -> bytes:
    """The rest of a chunked answer, its framing included."""
    return await caller.reader.readuntil(b"0\r\n\r\n")


async def test_a_hive_that_comes_back_is_used_by_every_process(fresh: Cluster) -> None:
    fresh.env = {"HIVE_SECRET": Secret.new().text}
    queen = await fresh.queen("--processes=2")
    hive = await fresh.hive("gpu-0", queen=queen)
    await spawn_scripted(hive)
    await served(queen.client, "parrot")
    await all_up(queen, 2)
    async with one_at_each(queen) as callers:
        for caller in callers.values():
            caller.send(post(chat()))
            assert (await caller.answer())[0] == 200
        port = urlsplit(hive.url).port or 0
        assert await hive.stop() == 0
        hive = await fresh.hive("gpu-0", queen=queen, port=port)
        await spawn_scripted(hive)
        await served(queen.client, "parrot")
        for caller in callers.values():
            caller.send(post(chat()))
            assert (await caller.answer())[0] == 200


async def test_a_rogue_in_the_place_of_a_dead_hive_is_only_greeted(fresh: Cluster) -> None:
    fresh.env = {"HIVE_SECRET": Secret.new().text}
    queen = await fresh.queen("--processes=2")
    hive = await fresh.hive("gpu-0", queen=queen)
    await spawn_scripted(hive)
    await served(queen.client, "parrot")
    await all_up(queen, 2)
    asked: list[bytes] = []

    async def rogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).split(b" ")[1])
        writer.close()

    async with one_at_each(queen) as callers:
        for caller in callers.values():
            caller.send(post(chat()))
            assert (await caller.answer())[0] == 200
        await hive.stop(signal.SIGKILL)
        server = await asyncio.start_server(rogue, "127.0.0.1", urlsplit(hive.url).port)
        async with server:
            for _ in range(4):
                for caller in callers.values():
                    caller.send(post(chat()))
                    assert (await caller.answer())[0] in (502, 503)
            await until(lambda: len(asked) > 4, "the rogue to be greeted")
    assert {path.decode() for path in asked} == {HELLO}


async def test_streams_of_all_processes_finish_before_the_stop(fresh: Cluster) -> None:
    queen = await fresh.queen("--processes=3")
    hive = await fresh.hive("gpu-0", queen=queen)
    await spawn_scripted(hive, tokens_per_second=40)
    await served(queen.client, "parrot")
    await all_up(queen, 3)
    pids = relays(queen)
    assert len(pids) == 2
    async with one_at_each(queen) as callers, one_at_each(queen) as late:
        for caller in callers.values():
            caller.send(post(chat(stream=True, max_tokens=120)))
            await caller.reader.readuntil(b"\n\n")
        queen.process.send_signal(signal.SIGTERM)
        await until(lambda: "status=stopping" in queen.log, "the queen to stop")
        for caller in late.values():
            caller.send(post(chat()))
            status, _, body = await caller.answer()
            assert status == 503
            assert json.loads(body)["error"]["hop"] == "queen"
        for caller in callers.values():
            assert b"data: [DONE]\n\n" in await body_of(caller)
        assert await asyncio.wait_for(queen.process.wait(), 20) == 0
    await until(lambda: not any(map(alive, pids)), "all processes to end")
    assert "ERROR" not in queen.log
    assert "WARNING" not in queen.log


async def test_the_deadline_cuts_the_streams_of_all_processes_alike(fresh: Cluster) -> None:
    queen = await fresh.queen("--processes=2", "--drain-seconds=0")
    hive = await fresh.hive("gpu-0", queen=queen)
    await spawn_scripted(hive, "stuck", hang_after_tokens=2)
    await served(queen.client, "stuck")
    await all_up(queen, 2)
    async with one_at_each(queen) as callers:
        for caller in callers.values():
            caller.send(post(chat(model="stuck", stream=True)))
            await caller.reader.readuntil(b"\n\n")
        queen.process.send_signal(signal.SIGTERM)
        errors = [error_in(await body_of(caller)) for caller in callers.values()]
        assert errors[0] == errors[1]
        assert await asyncio.wait_for(queen.process.wait(), 20) == 0


async def test_relay_processes_end_with_process_zero_and_say_so(fresh: Cluster) -> None:
    queen = await fresh.queen("--processes=3")
    hive = await fresh.hive("gpu-0", queen=queen)
    await spawn_scripted(hive, "stuck", hang_after_tokens=2)
    await served(queen.client, "stuck")
    await all_up(queen, 3)
    pids = relays(queen)
    async with one_at_each(queen, *pids) as callers:
        assert len(callers) == 2
        for caller in callers.values():
            caller.send(post(chat(model="stuck", stream=True)))
            await caller.reader.readuntil(b"\n\n")
        await queen.stop(signal.SIGKILL)
        for caller in callers.values():
            assert error_in(await body_of(caller))["retryable"]
    await until(lambda: not any(map(alive, pids)), "all processes to end")


async def test_one_process_is_alone(fresh: Cluster) -> None:
    queen = await fresh.queen("--processes=1")
    assert await text(queen, "/metrics")
    assert psutil.Process(queen.pid).children() == []


async def test_a_port_is_not_shared_with_another_queen(fresh: Cluster) -> None:
    queen = await fresh.queen("--processes=2")
    port = urlsplit(queen.url).port
    for count in (1, 2):
        code, err = await cannot_start(fresh, f"--port={port}", f"--processes={count}")
        assert code == 1
        assert "the port is in use" in err


@pytest.mark.parametrize("count", [0, 65])
async def test_a_senseless_number_of_processes_is_refused(fresh: Cluster, count: int) -> None:
    code, err = await cannot_start(fresh, "--port=0", f"--processes={count}")
    assert code == 1
    assert "--processes (or HIVE_PROCESSES) is wrong" in err


async def cannot_start(made: Cluster, *flags: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(*hive_command(), "queen", f"--state-dir={made.folder / 'other'}", *flags),
        env=clean_env(),
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, " ".join(err.decode().split())


async def test_the_same_under_tls(fresh: Cluster, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(*hive_command(), "--json", "tls", "new", "--out", str(tmp_path)),
        env=clean_env(),
        stdout=asyncio.subprocess.PIPE,
    )
    await process.communicate()
    secret = Secret.new()
    fresh.env = {"HIVE_SECRET": secret.text}
    hive = await fresh.hive("gpu-0")
    await spawn_scripted(hive)
    queen = await fresh.queen(
        "--processes=3",
        f"--hive={hive.url}",
        f"--tls-cert={tmp_path / 'tls-cert.pem'}",
        f"--tls-key={tmp_path / 'tls-key.pem'}",
    )
    assert queen.url.startswith("https://")
    blind = ssl.create_default_context()
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    await all_up(queen, 3, tls=blind)

    async def serves() -> bool:
        return '"parrot"' in await text(queen, "/v1/models", tls=blind)

    await until(serves, "the queen to know the model")
    async with one_at_each(queen, tls=blind) as callers:
        for pid, caller in callers.items():
            for _ in range(2):
                caller.send(post(chat(stream=True)), get("/health"))
                assert (await caller.answer())[2].endswith(b"data: [DONE]\n\n")
                assert b'"role"' in (await caller.answer())[2]
            assert holder(queen, caller) == pid
        gone = callers[queen.pid]
        gone.send(get("/v1/heartbeats/stream"))
        await gone.reader.readuntil(b"\n\n")
    for _ in range(12):
        peer = Peer(queen.url, secret, role="queen", id="other", roles=("queen",))
        try:
            assert await peer.open() is not None
            async with peer.http.get(f"{queen.url}/v1/hives") as answer:
                assert answer.status == 200
        finally:
            await peer.close()
    assert await queen.stop() == 0
