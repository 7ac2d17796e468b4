"""A request through its attempts: one answer, one count, and every lease given back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from operations.errors import HiveError, Unauthorized
from operations.hosts import Task
from tests.test_trunk import Tape
from wire import errors
from wire.door.answer import Answer
from wire.door.door import Request
from wire.door.relay import Lease, Upstream, relaying
from wire.http1.client import NoAnswer, Sink, Unreachable
from wire.http1.head import Header
from wire.http1.outbox import Outbox
from wire.keys import STRANGER
from wire.metrics import Seen
from wire.trunk.frames import DATA, END, HEAD, Decoder
from wire.trunk.server import Answer as TrunkAnswer
from wire.trunk.server import ServedTrunk

JSON: list[Header] = [(b"content-type", b"application/json")]
EVENTS: list[Header] = [(b"content-type", b"text/event-stream")]
BODY = b'{"model": "m"}'

Do = Callable[[Sink], None]


@dataclass
class Room:
    """Upstreams that do as they are told, attempt by attempt, and what came of it."""

    script: list[Do]
    renew: Callable[[], Awaitable[object]] | None = None
    taken: int = 0
    ended: int = 0
    asked: list[frozenset[str]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    watching: set[Callable[[], None]] = field(default_factory=set)
    sinks: list[Sink] = field(default_factory=list)
    cancelled: int = 0

    whole = True

    def __post_init__(self) -> None:
        self.tape = Tape()
        self.over = asyncio.Event()
        self.outbox = Outbox()
        self.answer = Answer(self.tape, self._ended, True, outbox=self.outbox, request_id="r")

    def _ended(self, keep_alive: bool) -> None:
        self.outbox.flush()
        self.over.set()

    def send(self, request: Request, body: Any, sink: Sink) -> Room:
        self.sinks.append(sink)
        asyncio.get_running_loop().call_soon(self.script.pop(0), sink)
        return self

    def flow(self, wanted: bool) -> None: ...

    def passed(self, count: int) -> None: ...

    def cancel(self) -> None:
        self.cancelled += 1

    def watch(self, gone: Callable[[], None]) -> Callable[[], None]:
        self.watching.add(gone)
        return lambda: self.watching.discard(gone)

    def request_ended(self, route: str, seen: Seen) -> None:
        self.seen.append(seen)

    def find(self, model: str, task: Task, failed: frozenset[str]) -> Lease:
        self.asked.append(failed)
        self.taken += 1
        upstream = Upstream(
            line=self,
            hop="hive",
            name=f"hive h{self.taken}",
            model=model,
            watch=self.watch,
            renew=self.renew,
        )
        return Lease(upstream, self._end)

    def _end(self, error: HiveError | None) -> None:
        self.ended += 1

    def begin(self, answer: Answer | TrunkAnswer | None = None) -> None:
        request = Request(
            "POST", "/v1/chat/completions", "/v1/chat/completions", {}, BODY, "req-1", STRANGER
        )
        assert relaying(self.find, "queen", self)(request, answer or self.answer) is None

    async def answered(self) -> str:
        """The status line, once the answer has ended."""
        async with asyncio.timeout(10):
            await self.over.wait()
        assert self.tape.written.count(b"HTTP/1.1 ") == 1
        return self.tape.written.partition(b"\r\n")[0].decode()

    def settled(self, status: int) -> None:
        """Counted once, and nothing held, watched or heard any more."""
        assert [seen.status for seen in self.seen] == [status]
        assert self.taken == self.ended
        assert not self.watching


def says(status: int, body: bytes, headers: list[Header] = JSON) -> Do:
    def do(sink: Sink) -> None:
        sink.head(status, [*headers, (b"content-length", b"%d" % len(body))], False)
        if body:
            sink.data(body)
        sink.end()

    return do


def fails(error: HiveError) -> Do:
    return lambda sink: sink.failed(error, False)


def nothing(sink: Sink) -> None:
    """It takes the request, and is silent."""


def forgotten() -> Unauthorized:
    return Unauthorized("Prove yourself anew.", code="unknown_session", hop="hive")


@pytest.mark.parametrize("hangs_up", [False, True])
async def test_a_request_that_is_over_goes_without_a_collection(hangs_up: bool) -> None:
    """It may hold megabytes, which are not to wait for cycles to be looked for."""
    gc.collect()
    gc.disable()
    try:
        room = Room([nothing if hangs_up else says(200, b"{}")])
        room.begin()
        if hangs_up:
            await asyncio.sleep(0)
            room.answer.lost()
        else:
            await room.answered()
        room.sinks.clear()
        await asyncio.sleep(0)
        kept = [type(one).__name__ for one in gc.get_objects()]
        assert not {"_Passing", "_Attempt"}.intersection(kept)
    finally:
        gc.enable()


async def test_who_was_forgotten_proves_itself_and_asks_again() -> None:
    async def renew() -> None:
        renewed.append(room.ended)

    renewed: list[int] = []
    room = Room([fails(forgotten()), says(200, b"{}")], renew)
    room.begin()
    assert await room.answered() == "HTTP/1.1 200 OK"
    assert renewed == [1]  # the first attempt was let go before
    room.settled(200)


async def test_a_refusal_of_the_proof_by_http_is_treated_alike() -> None:
    async def renew() -> None: ...

    room = Room([says(401, errors.envelope(forgotten(), "hive", "req-1")), says(200, b"{}")], renew)
    room.begin()
    assert await room.answered() == "HTTP/1.1 200 OK"
    room.settled(200)


async def test_a_hive_that_is_lost_while_it_is_renewed_gives_one_answer() -> None:
    async def renew() -> None:
        for gone in list(room.watching):
            gone()
        raise Unreachable("It has left.", hop="queen")

    room = Room([fails(forgotten()), says(200, b"{}"), says(200, b"{}")], renew)
    room.begin()
    assert await room.answered() == "HTTP/1.1 200 OK"
    assert len(room.sinks) == 2
    assert room.asked[1] == {"hive h1"}
    room.settled(200)


@pytest.mark.parametrize("code", ["bad_signature", "proof_refused"])
async def test_a_proof_that_does_not_hold_is_not_the_callers_401(code: str) -> None:
    room = Room([fails(Unauthorized("It does not hold.", code=code, hop="hive"))])
    room.begin()
    assert await room.answered() == "HTTP/1.1 503 Service Unavailable"
    assert b'"code":"proof_refused"' in room.tape.written
    room.settled(503)


async def test_a_signature_that_was_overtaken_is_made_anew() -> None:
    room = Room([fails(Unauthorized("Old.", code="replayed", hop="hive")), says(200, b"{}")])
    room.begin()
    assert await room.answered() == "HTTP/1.1 200 OK"
    room.settled(200)


async def test_what_kills_two_is_not_passed_on() -> None:
    room = Room([fails(NoAnswer("gone", hop="hive")) for _ in range(3)])
    room.begin()
    assert await room.answered() == "HTTP/1.1 502 Bad Gateway"
    assert len(room.sinks) == 2
    room.settled(502)


async def test_a_lost_hive_ends_a_silent_exchange_and_the_next_answers() -> None:
    room = Room([nothing, says(200, b"{}")])
    room.begin()
    await asyncio.sleep(0)
    for gone in list(room.watching):
        gone()
    assert await room.answered() == "HTTP/1.1 200 OK"
    room.settled(200)


async def test_a_caller_who_goes_while_a_proof_is_renewed_is_forgotten() -> None:
    async def renew() -> None:
        asked.set()
        await asyncio.Event().wait()

    asked = asyncio.Event()
    room = Room([fails(forgotten())], renew)
    room.begin()
    await asked.wait()
    room.answer.lost()
    await asyncio.sleep(0)
    assert len(room.sinks) == 1
    room.settled(499)


async def test_a_caller_who_goes_before_the_next_try_is_not_asked_for() -> None:
    room = Room([fails(Unreachable("no", hop="queen"))])
    room.begin()
    await asyncio.sleep(0)  # it has failed, and the next try waits
    assert room.ended == 1
    room.answer.lost()
    await asyncio.sleep(0.1)  # the pause before it is 20 ms
    assert len(room.sinks) == 1
    room.settled(499)


async def test_a_stream_that_its_caller_leaves_is_counted_as_left() -> None:
    def stream(sink: Sink) -> None:
        sink.head(200, EVENTS, True)
        sink.data(b"9\r\ndata: 1\n\n\r\n")

    room = Room([stream])
    room.begin()
    await asyncio.sleep(0)
    room.answer.lost()
    assert room.cancelled
    room.settled(499)


async def test_headers_that_no_trunk_carries_are_an_error_and_not_silence() -> None:
    tape = Tape()
    trunk = ServedTrunk("queen queen-1", lambda *served: None, lambda *asked: None)
    trunk.take_over(tape)
    answer = TrunkAnswer(trunk, 1, 2**20, 2**16)
    trunk._answers[1] = answer
    room = Room([says(200, b"{}", [(b"content-type", b"\xe9" * 40_000)])])
    room.begin(answer)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    trunk.flush()
    kinds = [kind for kind, stream, _ in Decoder().feed(bytes(tape.written)) if stream]
    assert kinds == [HEAD, DATA, END]  # the error, as a whole answer
    assert answer.ended
    room.settled(502)
    trunk.close("the test is over")


async def test_an_answer_without_a_body_has_none() -> None:
    room = Room([says(204, b"", EVENTS)])
    room.begin()
    assert await room.answered() == "HTTP/1.1 204 No Content"
    assert room.tape.written.endswith(b"\r\n\r\n")
    assert b"transfer-encoding" not in room.tape.written
    room.settled(204)


async def test_a_large_answer_counts_until_its_caller_has_it() -> None:
    room = Room([says(200, b" " * 3 * 2**20)])
    room.answer.flow(False)
    room.begin()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (room.taken, room.ended) == (1, 0)
    room.answer.flow(True)
    assert await room.answered() == "HTTP/1.1 200 OK"
    assert room.tape.written.endswith(b" " * 3 * 2**20)
    room.settled(200)


async def test_a_caller_who_leaves_a_large_answer_ends_it() -> None:
    room = Room([says(200, b" " * 3 * 2**20)])
    room.answer.flow(False)
    room.begin()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    room.answer.lost()
    await asyncio.sleep(0)
    room.settled(499)
