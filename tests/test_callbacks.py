"""Callbacks of tickets: signed, in order, tried again, and only where they may go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest
from aiohttp import web
from standardwebhooks.webhooks import Webhook

from keeper.exits import Exit
from operations.errors import InvalidRequest
from queen.callbacks import CheckedResolver
from queen.targets import Targets
from tests.cluster import WAIT_S, Cluster, Daemon, clean_env, cluster, until, with_constants
from tests.postgres import binaries, running
from tests.terminal import hive
from wire.secret import Secret

MANUAL = Path(__file__).resolve().parent.parent / "docs" / "queue.md"

SECRET = "the-callback-secret"
SOON = with_constants("queen.callbacks", FIRST_PAUSE_S=0.05, LAST_PAUSE_S=0.2)


class Backend:
    """Receives callbacks; answers as it is told to."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answers: Callable[[web.Request], web.Response] = lambda request: web.Response()

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._receive)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _receive(self, request: web.Request) -> web.Response:
        raw = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        Webhook(SECRET.encode()).verify(raw, headers)
        answer = self.answers(request)
        if answer.status == 200:
            self.got.append((request.path, headers, json.loads(raw)))
        return answer

    def said(self, job_id: str) -> list[str]:
        return [body["status"] for _, _, body in self.got if body["jobId"] == job_id]


@pytest.fixture
async def made() -> AsyncIterator[Cluster]:
    async with cluster() as one:
        one.env = {"HIVE_CALLBACK_SECRET": SECRET}
        yield one


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    async with Backend() as one:
        yield one


async def post(queen: Daemon, path: str, body: Any = None) -> dict[str, Any]:
    headers = {"x-callback-secret": SECRET}
    return dict(await queen.client.post(path, body, headers=headers))


async def enqueue(queen: Daemon, job_id: str, **more: Any) -> None:
    await post(queen, "/enqueue", {"jobId": job_id, "task": "script", "instructions": "x", **more})


async def finish(queen: Daemon, *progress: str, status: str = "succeeded") -> str:
    """Claim the next ticket and work through it; its id."""
    job = (await post(queen, "/claim"))["job"]
    for logs in progress:
        said = {"claimId": job["claimId"], "workerId": "w", "status": "running", "logs": logs}
        await post(queen, "/callback", said)
    said = {"claimId": job["claimId"], "workerId": "w", "status": status, "logs": "the end"}
    await post(queen, "/callback", {**said, "metadata": {"pr": 7}})
    return str(job["jobId"])


async def test_progress_and_end_are_told_in_order_and_signed(
    made: Cluster, backend: Backend
) -> None:
    made.env["HIVE_CALLBACK_ALLOW"] = "127.0.0.0/8"
    queen = await made.queen()
    await enqueue(queen, "a", callbackUrl=f"{backend.url}/mine?x=1")
    await finish(queen, "one", "two")
    await until(lambda: "succeeded" in backend.said("a"), "the end to be told")
    assert [body.get("logs") for _, _, body in backend.got] == [None, "one", "two", "the end"]
    assert backend.said("a") == ["running", "running", "running", "succeeded"]
    path, headers, last = backend.got[-1]
    assert (path, last["metadata"], last["tenant"]) == ("/mine", {"pr": 7}, "default")
    assert "x-callback-secret" not in headers  # it would open /callback to whom a ticket names
    assert len({headers["webhook-id"] for _, headers, _ in backend.got}) == 4


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"HIVE_SECRET": Secret.new().text},
        {"HIVE_CALLBACK_SECRET": "chosen by hand"},
        {"CALLBACK_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"},
    ],
    ids=["own key", "cluster", "plain", "whsec"],
)
async def test_the_receiver_in_the_manual_verifies_with_the_key_that_the_command_prints(
    made: Cluster, tmp_path: Path, env: dict[str, str]
) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", MANUAL.read_text(), re.M | re.S)
    [example] = [one for one in examples if "standardwebhooks" in one]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    made.env = {**env, "HIVE_CALLBACK_ALLOW": "127.0.0.1"}
    queen = await made.start("queen", "--port=0", state_dir=tmp_path, prefix=SOON)
    new = {"type": "t", "callback_url": f"http://127.0.0.1:{port}/"}
    id = (await queen.client.post("/v1/tasks", new))["id"]
    printed = await hive("queue", "callback-key", "--state-dir", str(tmp_path), env=env)
    assert (printed.code, printed.err) == (0, "")
    assert printed.out.startswith("whsec_")
    receiver = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", example, str(port)),
        env={**clean_env(), "HIVE_CALLBACK_KEY": printed.out.strip()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        [claim] = (await queen.client.post("/v1/claims", {}))["claims"]
        done = f"/v1/claims/{claim['claim_id']}/complete"
        await queen.client.post(done, {"result": 1})
        assert receiver.stdout is not None
        async with asyncio.timeout(WAIT_S):
            told = await receiver.stdout.readline()
    finally:
        receiver.kill()
        await receiver.wait()
    assert told.decode().split() == [id, "completed"]


async def test_the_key_of_callbacks_is_printed_only_where_there_is_one(tmp_path: Path) -> None:
    nothing = await hive("queue", "callback-key", "--state-dir", str(tmp_path))
    assert nothing.code == Exit.REFUSED
    assert "--state-dir" in nothing.err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "queue.key").write_bytes(b"short")
    broken = await hive("queue", "callback-key", "--state-dir", str(tmp_path))
    assert broken.code == Exit.FAILED
    assert "queue.key" in broken.err


async def test_the_default_target_is_told_what_no_ticket_has_its_own_for(
    made: Cluster, backend: Backend
) -> None:
    made.env["HIVE_CALLBACK_URL"] = f"http://localhost:{backend.port}/default"
    queen = await made.queen()
    await enqueue(queen, "a")
    await finish(queen, status="failed")
    await until(lambda: "failed" in backend.said("a"), "the end to be told")
    assert {path for path, _, _ in backend.got} == {"/default"}
    assert backend.got[-1][1]["x-callback-secret"] == SECRET
    assert backend.got[-1][2]["error"]["code"] == "drone_failed"
    with pytest.raises(InvalidRequest, match="not allowed"):
        await enqueue(queen, "b", callbackUrl=f"http://localhost:{backend.port}/other")


async def test_a_callback_that_fails_is_tried_again_before_what_follows(
    made: Cluster, backend: Backend
) -> None:
    made.env["HIVE_CALLBACK_ALLOW"] = f"127.0.0.1:{backend.port}"
    queen = await made.start("queen", "--port=0", prefix=SOON)
    refused: list[str] = []

    def answers(request: web.Request) -> web.Response:
        if request.path == "/slow" and len(refused) < 3:
            refused.append(request.headers["webhook-id"])
            return web.Response(status=500)
        return web.Response()

    backend.answers = answers
    await enqueue(queen, "slow", callbackUrl=f"{backend.url}/slow")
    await finish(queen, "one")
    await enqueue(queen, "quick", callbackUrl=f"{backend.url}/quick")
    await finish(queen, "one")
    await until(lambda: "succeeded" in backend.said("slow"), "the end to be told")
    await until(lambda: "succeeded" in backend.said("quick"), "the end to be told")
    assert backend.said("slow") == backend.said("quick") == ["running", "running", "succeeded"]
    first = next(headers for _, headers, body in backend.got if body["jobId"] == "slow")
    assert set(refused) == {first["webhook-id"]}


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_a_host_that_never_answers_holds_up_no_other(
    made: Cluster, backend: Backend, kind: str
) -> None:
    if kind == "postgres" and binaries() is None:
        pytest.skip("there is no PostgreSQL here")
    open_now: list[int] = [0]
    most: list[int] = [0]

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        await reader.read()  # until the caller gives up
        open_now[0] -= 1
        writer.close()

    silent = await asyncio.start_server(accept, "127.0.0.1", 0)
    silent_url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    made.env["HIVE_CALLBACK_ALLOW"] = "127.0.0.1"
    few = with_constants("queen.callbacks", AT_ONCE=8, OF_HOST=2, ANSWER_S=600.0, LEASE_S=900.0)
    with contextlib.ExitStack() as stack:
        stack.callback(silent.close)
        if kind == "postgres":
            made.env["HIVE_DATABASE"] = stack.enter_context(running()).create("q")
        queen = await made.start("queen", "--port=0", prefix=few)
        for n in range(20):
            await enqueue(queen, f"dead-{n}", callbackUrl=f"{silent_url}/{n}?x#")
            await finish(queen)
        await until(lambda: open_now[0] == 2, "the silent host to be called")
        for n in range(5):
            await enqueue(queen, f"good-{n}", callbackUrl=f"{backend.url}/{n}")
            await finish(queen, "one")
        good = [f"good-{n}" for n in range(5)]
        await until(lambda: all("succeeded" in backend.said(id) for id in good), "them to be told")
        assert all(backend.said(id) == ["running", "running", "succeeded"] for id in good)
        assert most == [2]
        await queen.stop()


async def test_what_was_not_delivered_is_after_a_kill(made: Cluster, backend: Backend) -> None:
    made.env["HIVE_CALLBACK_ALLOW"] = "127.0.0.1"
    made.env["HIVE_CALLBACK_URL"] = f"{backend.url}/x"
    backend.answers = lambda request: web.Response(status=503)
    prefix = with_constants("queen.callbacks", FIRST_PAUSE_S=0.5, LEASE_S=1.0)
    queen = await made.start("queen", "--port=0", prefix=prefix)
    await enqueue(queen, "a")
    await finish(queen, "one")
    await queen.stop(signal.SIGKILL)
    backend.answers = lambda request: web.Response()
    await made.start("queen", "--port=0", prefix=prefix)
    await until(lambda: "succeeded" in backend.said("a"), "the end to be told")
    assert backend.said("a") == ["running", "running", "succeeded"]


async def test_what_cannot_be_delivered_is_given_up(made: Cluster, backend: Backend) -> None:
    made.env["HIVE_CALLBACK_ALLOW"] = "127.0.0.1"
    backend.answers = lambda request: web.Response(status=500)
    prefix = with_constants("queen.callbacks", FIRST_PAUSE_S=0.02, LAST_PAUSE_S=0.02, TRIED_S=0.1)
    queen = await made.start("queen", "--port=0", prefix=prefix)
    await enqueue(queen, "a", callbackUrl=f"{backend.url}/x?token=hidden")
    await finish(queen)
    await until(lambda: "are given up" in queen.log, "it to be given up")
    assert "hidden" not in queen.log


async def test_progress_that_piles_up_is_thinned_and_the_end_is_told(
    made: Cluster, backend: Backend
) -> None:
    made.env["HIVE_CALLBACK_URL"] = f"{backend.url}/x"
    backend.answers = lambda request: web.Response(status=503)
    prefix = with_constants("hive_orchestration.machine.deliveries", MOST_BEHIND=5)
    pauses = "import queen.callbacks as c; c.FIRST_PAUSE_S = c.LAST_PAUSE_S = 0.5\n"
    prefix[2] = pauses + prefix[2]
    queen = await made.start("queen", "--port=0", prefix=prefix)
    await enqueue(queen, "a")
    await finish(queen, *map(str, range(20)))
    refused = queen.log.count("answered 503")
    await until(lambda: queen.log.count("answered 503") > refused + 1, "it to be refused again")
    backend.answers = lambda request: web.Response()
    await until(lambda: "succeeded" in backend.said("a"), "the end to be told")
    logs = [body.get("logs") for _, _, body in backend.got]
    assert logs[-2:] == ["19", "the end"]
    assert len(logs) < 12


async def test_no_redirect_is_followed(made: Cluster, backend: Backend) -> None:
    made.env["HIVE_CALLBACK_ALLOW"] = f"127.0.0.1:{backend.port}"
    called: list[str] = []

    def answers(request: web.Request) -> web.Response:
        called.append(request.path)
        return web.Response(status=307, headers={"location": f"{backend.url}/inner"})

    backend.answers = answers
    queen = await made.start("queen", "--port=0", prefix=SOON)
    await enqueue(queen, "a", callbackUrl=f"{backend.url}/outer")
    await finish(queen)
    await until(lambda: len(called) >= 3, "it to be tried again")
    assert set(called) == {"/outer"}


async def test_a_name_that_means_an_inner_address_is_not_called(
    made: Cluster, backend: Backend
) -> None:
    """As DNS rebinding has it: the name is allowed, what it means by now is not."""
    name = "inner.test"
    made.env["HIVE_CALLBACK_ALLOW"] = f"{name},*.example.com"
    names = made.folder / "names.py"
    names.write_text(
        "import runpy, sys\n"
        "from aiohttp import ThreadedResolver\n"
        "real = ThreadedResolver.resolve\n"
        "async def rebound(self, host, *more, **named):\n"
        f"    return await real(self, '127.0.0.1' if host == {name!r} else host, *more, **named)\n"
        "ThreadedResolver.resolve = rebound\n"
        "sys.argv = sys.argv[3:]\n"
        "runpy.run_module('keeper', run_name='__main__', alter_sys=True)\n"
    )
    queen = await made.start("queen", "--port=0", prefix=[sys.executable, str(names)])
    called: list[str] = []
    backend.answers = lambda request: (called.append(request.path), web.Response())[1]
    await enqueue(queen, "a", callbackUrl=f"http://{name}:{backend.port}/x")
    await finish(queen)
    await until(lambda: "may not be called" in queen.log, "it to be refused")
    assert not called


@pytest.mark.skipif(binaries() is None, reason="there is no PostgreSQL here")
async def test_two_queens_on_one_database_deliver_each_callback_once(
    made: Cluster, backend: Backend
) -> None:
    made.env["HIVE_CALLBACK_URL"] = f"{backend.url}/x"
    with running() as postgres:
        made.env["HIVE_DATABASE"] = postgres.create("q")
        queens = [await made.start("queen", "--port=0", folder=f"queen{n}") for n in range(2)]
        await asyncio.gather(*(enqueue(queens[n % 2], f"t-{n}") for n in range(20)))
        await asyncio.gather(*(finish(queens[n % 2], "one", "two") for n in range(20)))
        names = [f"t-{n}" for n in range(20)]
        await until(
            lambda: all("succeeded" in backend.said(name) for name in names), "all to be told"
        )
        for name in names:
            assert backend.said(name) == ["running", "running", "running", "succeeded"]
        await asyncio.gather(*(queen.stop() for queen in queens))


REFUSED = [
    "http://127.0.0.1/",
    "http://127.0.0.1:8080/x",
    "http://localhost/",
    "http://LOCALHOST./",
    "http://a.localhost/",
    "http://[::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://0.0.0.0/",
    "http://0/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://017700000001/",
    "http://127.0.0.1./",
    "http://169.254.169.254/latest/meta-data",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fd00:ec2::254]/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[::]/",
    "http://user@example.com/",
    "http://user:password@example.com/",
    "http://example.com\\@127.0.0.1/",
    "http://example.com#@127.0.0.1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://exam ple.com/",
    "http://example.com/\r\nx: y",
    "http://example.com:0/",
    "http://example.com:99999/",
    "http:///x",
    "http:example.com",
    "//example.com/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "javascript:alert(1)",
    "x",
    "",
    "http://example.com/" + "x" * 3000,
]


@pytest.mark.parametrize("url", REFUSED)
def test_no_inner_address_is_called_though_every_host_is_allowed(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Targets(("*",)).check(url)
    assert refused.value.code == "callback_refused"


@pytest.mark.parametrize(
    ("words", "url", "allowed"),
    [
        ((), "https://example.com/", False),
        (("example.com",), "https://example.com/x?y=1", True),
        (("example.com",), "https://EXAMPLE.com./x", True),
        (("example.com",), "http://example.com:8080/", True),
        (("example.com",), "https://a.example.com/", False),
        (("example.com",), "https://notexample.com/", False),
        (("example.com:8443",), "https://example.com/", False),
        (("example.com:8443",), "https://example.com:8443/", True),
        (("*.example.com",), "https://a.b.example.com/", True),
        (("*.example.com",), "https://example.com/", False),
        (("*.example.com",), "https://evilexample.com/", False),
        (("*",), "https://93.184.216.34/", True),
        (("example.com",), "https://93.184.216.34/", False),
        (("10.1.0.0/16",), "http://10.1.2.3/", True),
        (("10.1.0.0/16",), "http://10.2.2.3/", False),
        (("10.1.0.0/16:80",), "http://10.1.2.3:81/", False),
        (("10.1.2.3:8080",), "http://10.1.2.3:8080/", True),
        (("[::1]:8080",), "http://[::1]:8080/", True),
        (("::1",), "http://[::1]/", True),
        (("127.0.0.0/8",), "http://[::ffff:127.0.0.1]/", True),
        (("localhost",), "http://localhost:3000/", True),
        (("localhost",), "http://127.0.0.1/", False),
        (("127.0.0.1",), "http://localhost/", False),
    ],
)
def test_the_operators_list_says_who_may_be_called(
    words: tuple[str, ...], url: str, allowed: bool
) -> None:
    if allowed:
        Targets(words).check(url)
    else:
        with pytest.raises(InvalidRequest):
            Targets(words).check(url)


@pytest.mark.parametrize(
    ("words", "default", "host", "address", "may"),
    [
        (("*",), None, "example.com", "93.184.216.34", True),
        (("*",), None, "example.com", "127.0.0.1", False),
        (("*",), None, "example.com", "169.254.169.254", False),
        (("*",), None, "example.com", "::ffff:10.0.0.1", False),
        (("*",), None, "example.com", "2606:2800:220:1::1", True),
        (("*",), None, "example.com", "fe80::1%eth0", False),
        (("*",), None, "example.com", "nonsense", False),
        (("backend", "10.0.0.0/8"), None, "backend", "10.0.0.5", True),
        (("backend",), None, "backend", "10.0.0.5", False),
        (("localhost",), None, "localhost", "127.0.0.1", True),
        (("localhost",), None, "localhost", "::1", True),
        (("localhost",), None, "localhost", "10.0.0.1", False),
        ((), "http://backend:80/x", "backend", "10.0.0.5", True),
        ((), "http://backend:80/x", "backend", "127.0.0.1", True),
        ((), "http://backend:80/x", "backend", "169.254.169.254", False),
        ((), "http://backend:80/x", "other", "10.0.0.5", False),
    ],
)
def test_what_a_name_means_must_be_allowed_as_well(
    words: tuple[str, ...], default: str | None, host: str, address: str, may: bool
) -> None:
    assert Targets(words, default).permits(host, 80, address) is may


async def test_the_resolver_finds_no_inner_address() -> None:
    resolver = CheckedResolver(Targets(("*",)))
    with pytest.raises(OSError, match="may not be called"):
        await resolver.resolve("localhost", 80)
    await resolver.close()


@pytest.mark.parametrize("word", ["", "http://example.com", "a b", "10.1.2.3/8", "1.2.3", "x:0"])
def test_a_list_that_says_nothing_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"neither|no port|address"):
        Targets((word,))


async def test_tickets_with_refused_targets_leave_nothing_behind(made: Cluster) -> None:
    made.env["HIVE_CALLBACK_ALLOW"] = "*"
    queen = await made.queen()
    async with aiohttp.ClientSession(queen.url) as http:
        for number, url in enumerate(REFUSED):
            ticket = {"jobId": f"t-{number}", "task": "agent", "instructions": "x"}
            task = {"type": "t", "callback_url": url}
            for path, body, param in (
                ("/enqueue", {**ticket, "callbackUrl": url}, "callbackUrl"),
                ("/v1/tasks", task, "callback_url"),
            ):
                if not url and path == "/enqueue":
                    continue
                async with http.post(path, json=body) as answer:
                    error = (await answer.json())["error"]
                    assert (answer.status, error["param"]) == (400, param), url
    assert (await queen.client.get("/v1/tasks"))["tasks"] == []
