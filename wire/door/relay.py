"""Passing an inference request on, and its answer back, bytes untouched.

The queen relays to a hive and a hive to an engine with the same code. What it adds: the headers
that say who answered, one envelope for the errors of engines, and an error event when an answer
breaks in the middle. When the caller hangs up, the request upstream is cancelled at once, which
makes the engine free its slot.

A coroutine decides, once a request; the bytes of an answer go through callbacks alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final

from operations.errors import (
    CallerGone,
    HiveError,
    Hop,
    Unauthorized,
    Unavailable,
    WorkerBroke,
)
from operations.hosts import Task
from wire import errors
from wire.door.answer import LAST_CHUNK
from wire.door.door import Answering, Request, Serve, error_headers
from wire.door.lines import Line, Way
from wire.http1.body import Chunked
from wire.http1.client import NoAnswer
from wire.http1.head import Header
from wire.log import REQUEST_ID, outcome
from wire.metrics import Metrics, Seen
from wire.openai import TASKS, renamed, routed_model
from wire.relayed import completion_tokens, engine_is_dead, error_event, refusal
from wire.retry import until_answered

log = logging.getLogger(__name__)

FORWARDED: Final = frozenset((b"content-type", b"cache-control", b"retry-after"))
TAGS: Final = frozenset((b"x-hive-id", b"x-worker-id"))
WHOLE_BYTES: Final = 256 * 1024 * 1024  # of an answer that is not streamed
ERROR_BYTES: Final = 1024 * 1024

Lease = Callable[[frozenset[str]], AbstractAsyncContextManager["Upstream"]]
"""Chooses an upstream and holds it for exactly the life of a request; those of the given names
have just failed, and are taken only if there is no other."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a request goes.

    :param hop: who answers there
    :param name: how messages call it (``worker w-3f9a1c``, ``hive gpu-0``)
    :param model: the model's own name there
    :param tags: headers that the answer carries (``x-hive-id``, ``x-worker-id``)
    :param served_as: what the body must call the model there; None where any name will do
    :param renew: proves ourselves again to one that has forgotten us
    :param watch: has what it is given called when it is known that no answer will come any more;
        returns what ends that
    """

    line: Line
    hop: Hop
    name: str
    model: str
    tags: dict[str, str] = field(default_factory=dict)
    served_as: str | None = None
    watch: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    renew: Callable[[], Awaitable[object]] | None = None


Find = Callable[[str, Task, frozenset[str]], AbstractAsyncContextManager[Upstream]]


def relaying(find: Find, hop: Hop, metrics: Metrics) -> Serve:
    """Who serves inference: finds an upstream for the model that the body names, and relays.

    :param find: model, task, and names of upstreams that have just failed → who answers
    """

    async def serve(request: Request, answer: Answering) -> None:
        REQUEST_ID.set(request.request_id)
        model = routed_model(request.body)
        task = TASKS.get(request.path, "generate")
        passing = _Passing(request, answer, hop)
        try:
            await passing.run(lambda failed: find(model, task, failed))
        finally:
            metrics.request_ended(request.path, passing.seen())
            passing.log()

    return serve


class _Passing:
    """One request, through all its attempts; takes the answer of each."""

    __slots__ = (
        "_answer",
        "_began",
        "_chunked",
        "_done",
        "_failed",
        "_head",
        "_hop",
        "_kept",
        "_loop",
        "_request",
        "_status",
        "_streams",
        "_tags",
        "_tokens",
        "_ttft",
        "_unpassed",
        "_upstream",
        "_way",
    )

    def __init__(self, request: Request, answer: Answering, hop: Hop) -> None:
        self._request = request
        self._answer = answer
        self._hop: Hop = hop
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._status = CallerGone.status
        self._ttft: float | None = None
        self._tokens = 0
        self._upstream: Upstream | None = None
        self._failed: set[str] = set()
        self._tags: dict[bytes, bytes] = {}
        self._way: Way
        self._done: asyncio.Future[None]
        self._head: tuple[int, list[Header]] = (0, [])
        self._kept = bytearray()
        self._chunked = False
        self._streams = False
        self._unpassed = 0

    async def run(self, lease: Lease) -> None:
        """Ask until there is an answer, and pass it on."""

        async def attempt() -> None:
            async with lease(frozenset(self._failed)) as upstream:
                await self._exchange(upstream)

        try:
            await until_answered(attempt)
        except HiveError as error:
            self._refuse(error)
        finally:
            self._answer.on_writable = _ignore

    def seen(self) -> Seen:
        """What is counted of it."""
        model = self._upstream.model if self._upstream else None
        return Seen(self._status, self._ttft, model, self._tokens)

    def log(self) -> None:
        """The one line about it."""
        outcome(
            "request",
            request=self._request.request_id,
            path=self._request.path,
            status=self._status,
            hive=_text(self._tags.get(b"x-hive-id")),
            worker=_text(self._tags.get(b"x-worker-id")),
            ttft_ms=None if self._ttft is None else int(self._ttft * 1000),
            ms=int((self._loop.time() - self._began) * 1000),
        )

    async def _exchange(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._tags = {n.encode(): v.encode("latin-1") for n, v in upstream.tags.items()}
        self._failed.add(upstream.name)
        self._done = self._loop.create_future()
        self._kept.clear()
        body = self._request.body
        if upstream.served_as is not None:
            body = renamed(body, upstream.served_as)
        self._way = way = upstream.line.send(self._request, body, self)
        self._answer.on_writable = self._flow
        unwatch = _nothing if upstream.watch is None else upstream.watch(self._is_lost)
        try:
            await self._done
        finally:
            unwatch()
            way.cancel()
        if self._streams:
            return
        try:
            self._pass_whole(upstream)
        except Unauthorized as error:
            if error.code != "unknown_session" or upstream.renew is None:
                raise
            await upstream.renew()  # it was started anew since
            raise NoAnswer(error.message, hop=upstream.hop) from None

    def _is_lost(self) -> None:
        """End the exchange when its upstream is lost, which a silent one never would."""
        assert self._upstream is not None
        upstream = self._upstream
        why = f"The {upstream.name} has fallen silent. Send the request again."
        if self._answer.started:
            self.failed(Unavailable(why, hop=upstream.hop), started=True)
        else:
            self.failed(NoAnswer(why, hop=upstream.hop, retryable=True), started=False)

    # -- the answer, as it comes -------------------------------------------------------------

    def head(self, status: int, headers: list[Header], chunked: bool) -> None:
        if self._upstream is not None and self._upstream.hop == "hive":
            self._tags |= {name: value for name, value in headers if name in TAGS}
        self._head = (status, [header for header in headers if header[0] in FORWARDED])
        self._chunked = chunked
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        self._streams = status < 400 and kind.startswith(b"text/event-stream")
        if self._streams:
            self._status = status
            length = next((int(v) for n, v in headers if n == b"content-length"), None)
            self._answer.head(status, self._headers(), length=length)

    def data(self, data: bytes) -> None:
        if not self._streams:
            self._keep(data)
            return
        if self._ttft is None:
            self._ttft = self._loop.time() - self._began
        self._tokens += data.count(b"\n\n")
        answer = self._answer
        if self._chunked == answer.chunked:
            answer.write(data)
        else:
            answer.chunk(self._unframed(data))
        if answer.writable:
            self._way.passed(len(data))
        else:
            self._unpassed += len(data)

    def end(self) -> None:
        if self._streams:
            if self._answer.chunked and not self._chunked:
                self._answer.write(LAST_CHUNK)
            self._answer.end()
        if not self._done.done():
            self._done.set_result(None)

    def failed(self, error: HiveError, started: bool) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def _flow(self, writable: bool) -> None:
        self._way.flow(writable)
        if writable and self._unpassed:
            passed, self._unpassed = self._unpassed, 0
            self._way.passed(passed)

    def _keep(self, data: bytes) -> None:
        """Read whole first: an answer that breaks can still become a clean error."""
        self._kept += data
        self._way.passed(len(data))
        status, _ = self._head
        if len(self._kept) > (ERROR_BYTES if status >= 400 else WHOLE_BYTES):
            assert self._upstream is not None
            self._way.cancel()
            too_long = WorkerBroke(
                f"The {self._upstream.name} answered more than anybody can use. Ask it for less.",
                hop=self._upstream.hop,
                retryable=False,
            )
            self.failed(too_long, started=False)

    def _pass_whole(self, upstream: Upstream) -> None:
        status, headers = self._head
        body = bytes(self._kept)
        if self._chunked:
            pieces: list[bytes] = []
            Chunked(502).feed(body, 0, pieces)
            body = b"".join(pieces)
        if status >= 400:
            after = next((v for n, v in headers if n == b"retry-after"), b"")
            error = refusal(status, body, after.decode("latin-1"), upstream.hop, upstream.name)
            if upstream.hop == "worker" and status >= 500 and engine_is_dead(error.message):
                raise NoAnswer(f"The {upstream.name} broke.", hop=upstream.hop)
            raise error
        self._ttft = self._loop.time() - self._began
        self._status = status
        self._tokens = completion_tokens(body)
        self._answer.whole(status, self._headers(), body)

    def _unframed(self, data: bytes) -> bytes:
        """The payload of whole chunks, for a caller who takes none (HTTP/1.0)."""
        if not self._chunked:
            return data
        pieces: list[bytes] = []
        Chunked(502).feed(data, 0, pieces)
        return b"".join(pieces)

    def _headers(self) -> list[Header]:
        request_id = (b"x-request-id", self._request.request_id.encode("latin-1"))
        return [*self._head[1], *self._tags.items(), request_id]

    def _refuse(self, error: HiveError) -> None:
        """The error as the answer, or, when the answer has begun, as its last event."""
        self._status = error.status
        request_id = self._request.request_id
        if not self._answer.started:
            body = errors.envelope(error, self._hop, request_id)
            headers = [*error_headers(error, request_id), *self._tags.items()]
            self._answer.whole(error.status, headers, body)
        elif self._way.whole:
            self._answer.chunk(error_event(error, self._hop, request_id, self._request.path))
            if self._answer.chunked:
                self._answer.write(LAST_CHUNK)
            self._answer.end()
        else:
            self._answer.abort()


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _nothing() -> None:
    pass


def _ignore(writable: bool) -> None:
    pass
