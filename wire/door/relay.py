"""Passing an inference request on, and its answer back, bytes untouched.

The queen relays to a hive and a hive to an engine with the same code. What it adds: the headers
that say who answered, one envelope for the errors of engines, and an error event when an answer
breaks in the middle. When the caller hangs up, the request upstream is cancelled at once, which
makes the engine free its slot.

All of it happens in callbacks; a task is made only where somebody has to be waited for before the
request can be sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final, Protocol

import msgspec

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
from wire.door.body import model_of, with_model
from wire.door.door import Answering, Request, Serve, error_headers
from wire.door.lines import Line, Way
from wire.http1.body import Chunked
from wire.http1.client import NoAnswer, Unreachable
from wire.http1.head import Header
from wire.http1.pieces import Pieces
from wire.keys import Caller
from wire.log import REQUEST_ID, outcome
from wire.metrics import Seen
from wire.openai import TASKS
from wire.relayed import (
    completion_tokens,
    completion_tokens_at_end,
    engine_is_dead,
    error_event,
    redirects,
    refusal,
)
from wire.retry import FIRST_PAUSE_S, LAST_PAUSE_S, TRIES

log = logging.getLogger(__name__)

FORWARDED: Final = frozenset((b"content-type", b"cache-control", b"retry-after"))
TAGS: Final = frozenset((b"x-hive-id", b"x-worker-id"))
WHOLE_BYTES: Final = 256 * 1024 * 1024  # of an answer that is not streamed
ERROR_BYTES: Final = 1024 * 1024
LARGE_BYTES: Final = 1024 * 1024  # of an answer; a larger one is passed on piece by piece
TAIL_BYTES: Final = 16 * 1024  # of a large answer, in which its usage is looked for
NONE_FAILED: Final[frozenset[str]] = frozenset()


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
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
    tags: dict[bytes, bytes] = {}
    served_as: str | None = None
    watch: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    renew: Callable[[], Awaitable[object]] | None = None


class Lease(msgspec.Struct, frozen=True):
    """An upstream, held for exactly the life of a request.

    :param end: lets go of it; told what went wrong there, if anything did
    """

    upstream: Upstream
    end: Callable[[HiveError | None], None]


class Counts(Protocol):
    """Who counts requests: :class:`wire.metrics.Metrics`, or whoever passes it on to one."""

    def request_ended(self, route: str, seen: Seen) -> None: ...


Find = Callable[[str, Task, frozenset[str]], Lease | Awaitable[Lease]]
"""Model, task, names of upstreams that have just failed (taken only if there is no other) → who
answers; an awaitable where that is not known yet. Either raises HiveError: nobody does."""


Limit = Callable[[Caller], Awaitable[None] | None]
"""Counts one request under its caller's limit, elsewhere. Raises HiveError: he is over it."""


def relaying(find: Find, hop: Hop, metrics: Counts, limit: Limit = lambda caller: None) -> Serve:
    """Who serves inference: finds an upstream for the model that the body names, and relays."""

    def serve(request: Request, answer: Answering) -> None:
        _Passing(find, request, answer, hop, metrics).begin(limit)

    return serve


class _Passing:
    """One request, through all its attempts; takes the answer of each.

    It is asked again while no answer has begun: as often as nobody could be reached, and once when
    somebody took it and gave no answer. A request that kills whoever takes it is not passed on for
    ever.
    """

    __slots__ = (
        "_answer",
        "_began",
        "_chunked",
        "_failed",
        "_find",
        "_head",
        "_hop",
        "_kept",
        "_large",
        "_lease",
        "_loop",
        "_metrics",
        "_model",
        "_over",
        "_pause",
        "_request",
        "_scanner",
        "_size",
        "_status",
        "_streams",
        "_tags",
        "_timer",
        "_tokens",
        "_tries",
        "_ttft",
        "_unanswered",
        "_unpassed",
        "_unwatch",
        "_upstream",
        "_waiting",
        "_way",
    )

    def __init__(
        self, find: Find, request: Request, answer: Answering, hop: Hop, metrics: Counts
    ) -> None:
        self._find = find
        self._request = request
        self._answer = answer
        self._hop: Hop = hop
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._model = ""
        self._status = CallerGone.status
        self._ttft: float | None = None
        self._tokens = 0
        self._upstream: Upstream | None = None
        self._lease: Lease | None = None
        self._failed = NONE_FAILED
        self._tags: dict[bytes, bytes] = {}
        self._way: Way = _NO_WAY
        self._unwatch: Callable[[], None] | None = None
        self._head: tuple[int, list[Header]] = (0, [])
        self._kept: list[bytes] = []
        self._large: Pieces | None = None
        self._size = 0
        self._chunked = False
        self._scanner: Chunked
        self._streams = False
        self._unpassed = 0
        self._tries = 0
        self._pause = FIRST_PAUSE_S
        self._unanswered = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._over = False

    def begin(self, limit: Limit) -> None:
        """Ask until there is an answer, and pass it on."""
        self._answer.on_gone = self._gone
        counted = limit(self._request.caller)
        if counted is None:
            self._start()
        else:
            self._wait(self._start_after(counted))

    async def _start_after(self, counted: Awaitable[None]) -> None:
        await counted
        self._start()

    def _start(self) -> None:
        try:
            self._model = model_of(self._request.body)
        except HiveError as error:
            self._refuse(error)
        else:
            self._attempt()

    # -- attempts ----------------------------------------------------------------------------

    def _attempt(self) -> None:
        self._timer = None
        task = TASKS.get(self._request.path, "generate")
        try:
            found = self._find(self._model, task, self._failed)
            if not isinstance(found, Lease):
                self._wait(self._exchange_with(found))
            else:
                self._exchange(found)
        except HiveError as error:
            self._attempt_failed(error)
        except Exception:  # the caller is told, and the connection goes on
            log.exception("serving %s broke", self._request.path)
            self._attempt_failed(HiveError(errors.BROKEN))

    async def _exchange_with(self, found: Awaitable[Lease]) -> None:
        self._exchange(await found)

    def _wait(self, waits: Coroutine[None, None, None]) -> None:
        """Go on with what must wait; it is cancelled when the caller goes."""

        async def run() -> None:
            REQUEST_ID.set(self._request.request_id)
            try:
                await waits
            except HiveError as error:
                self._attempt_failed(error)
            except Exception:  # the caller is told
                log.exception("serving %s broke", self._request.path)
                self._attempt_failed(HiveError(errors.BROKEN))

        self._waiting = self._loop.create_task(run())

    def _exchange(self, lease: Lease) -> None:
        self._lease = lease
        self._upstream = upstream = lease.upstream
        self._tags = upstream.tags
        self._kept = []
        self._large = None
        self._size = self._unpassed = 0
        body = self._request.body
        if upstream.served_as is not None:
            body = with_model(body, upstream.served_as)
        self._way = upstream.line.send(self._request, body, self)
        self._answer.on_writable = self._flow
        if upstream.watch is not None:
            self._unwatch = upstream.watch(self._is_lost)

    def _let_go(self, error: HiveError | None) -> None:
        """End the attempt: nothing of it is heard any more."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        self._way.cancel()
        if self._lease is not None:
            lease, self._lease = self._lease, None
            lease.end(error)

    def _attempt_failed(self, error: HiveError) -> None:
        """Ask again, or say why not."""
        if self._upstream is not None:
            self._failed |= {self._upstream.name}
        self._let_go(error)
        if self._over:
            return
        self._tries += 1
        again = isinstance(error, Unreachable)
        if isinstance(error, NoAnswer):
            again = not self._unanswered
            self._unanswered = True
        if not again or self._answer.started or self._tries >= TRIES:
            self._refuse(error)
            return
        self._timer = self._loop.call_later(self._pause, self._attempt)
        self._pause = min(2 * self._pause, LAST_PAUSE_S)

    def _is_lost(self) -> None:
        """End the exchange when its upstream is lost, which a silent one never would."""
        assert self._upstream is not None
        upstream = self._upstream
        why = f"The {upstream.name} has fallen silent. Send the request again."
        if self._answer.started:
            self.failed(Unavailable(why, hop=upstream.hop), started=True)
        else:
            self.failed(NoAnswer(why, hop=upstream.hop, retryable=True), started=False)

    def _gone(self) -> None:
        """The caller has hung up."""
        if self._timer is not None:
            self._timer.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
        self._finish()

    # -- the end -----------------------------------------------------------------------------

    def _finish(self) -> None:
        """Once, whatever became of it: count it, and say it in one line."""
        if self._over:
            return
        self._over = True
        self._let_go(None)
        # Nothing that it has made refers back to it any more, so it goes without a collection.
        self._way = _NO_WAY
        self._answer.on_gone = _nothing
        self._answer.on_writable = _ignore
        model = self._upstream.model if self._upstream else None
        seen = Seen(self._status, self._ttft, model, self._tokens)
        self._metrics.request_ended(self._request.path, seen)
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

    # -- the answer, as it comes -------------------------------------------------------------

    def head(self, status: int, headers: list[Header], chunked: bool) -> None:
        if self._upstream is not None and self._upstream.hop == "hive":
            self._tags = self._tags | {n: value for n, value in headers if n in TAGS}
        self._head = (status, [header for header in headers if header[0] in FORWARDED])
        self._chunked = chunked
        if chunked:
            self._scanner = Chunked(502)
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        self._streams = status < 300 and kind.startswith(b"text/event-stream")
        if self._streams:
            if not isinstance(self._request.body, bytes):
                self._request.body = b""  # it is large, and is not sent again
            self._status = status
            # Of no length, even where the upstream tells one: an error event may have to follow.
            self._answer.head(status, self._headers(), length=None)

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
        assert self._upstream is not None
        try:
            if not self._streams:
                self._pass_whole(self._upstream)
                return
        except Unauthorized as error:
            if error.code == "unknown_session" and self._upstream.renew is not None:
                self._wait(self._renewed(error))  # it was started anew since
            else:
                self._attempt_failed(error)
            return
        except HiveError as error:
            self._attempt_failed(error)
            return
        if self._answer.chunked and not self._chunked:
            self._answer.write(LAST_CHUNK)
        self._finish()
        self._answer.end()

    async def _renewed(self, error: HiveError) -> None:
        assert self._upstream is not None
        assert self._upstream.renew is not None
        await self._upstream.renew()
        raise NoAnswer(error.message, hop=self._upstream.hop)

    def failed(self, error: HiveError, started: bool) -> None:
        self._attempt_failed(error)

    def _flow(self, writable: bool) -> None:
        self._way.flow(writable)
        if writable and self._unpassed:
            passed, self._unpassed = self._unpassed, 0
            self._way.passed(passed)

    def _keep(self, data: bytes) -> None:
        """Read whole first: an answer that breaks can still become a clean error."""
        self._way.passed(len(data))
        payload = self._unframed(data)
        self._size += len(payload)
        status, _ = self._head
        if self._large is not None:
            self._large.add(payload)
        else:
            self._kept.append(payload)
            if self._size > LARGE_BYTES:
                self._large = Pieces()
                for piece in self._kept:
                    self._large.add(piece)
                self._kept = []
        if self._size > (ERROR_BYTES if status >= 300 else WHOLE_BYTES):
            assert self._upstream is not None
            too_long = WorkerBroke(
                f"The {self._upstream.name} answered more than anybody can use. Ask it for less.",
                hop=self._upstream.hop,
                retryable=False,
            )
            self.failed(too_long, started=False)

    def _pass_whole(self, upstream: Upstream) -> None:
        status, headers = self._head
        if 300 <= status < 400:
            raise redirects(status, upstream.hop, upstream.name)
        body = self._kept[0] if len(self._kept) == 1 else b"".join(self._kept)
        if status >= 400:
            after = next((v for n, v in headers if n == b"retry-after"), b"")
            error = refusal(status, body, after.decode("latin-1"), upstream.hop, upstream.name)
            if upstream.hop == "worker" and status >= 500 and engine_is_dead(error.message):
                raise NoAnswer(f"The {upstream.name} broke.", hop=upstream.hop)
            raise error
        self._ttft = self._loop.time() - self._began
        self._status = status
        if self._large is not None:
            self._tokens = completion_tokens_at_end(self._large.tail(TAIL_BYTES))
            self._finish()  # the upstream is let go before the caller has taken it all
            self._waiting = self._loop.create_task(self._pass_large(self._large))
            self._answer.on_gone = self._gone
            return
        self._tokens = completion_tokens(body)
        self._finish()
        self._answer.whole(status, self._headers(), body)

    async def _pass_large(self, body: Pieces) -> None:
        """Write a large answer as far as the caller takes it, and others on the loop have time."""
        answer = self._answer
        resumed = asyncio.Event()
        answer.on_writable = lambda writable: resumed.set() if writable else resumed.clear()
        answer.head(self._status, self._headers(), length=body.size)
        for piece in body:
            answer.write(bytes(piece))
            await (asyncio.sleep(0) if answer.writable else resumed.wait())
        answer.end()

    def _unframed(self, data: bytes) -> bytes:
        """The payload of what came, chunks if it is chunked, cut anywhere."""
        if not self._chunked:
            return data
        pieces: list[bytes] = []
        self._scanner.feed(data, 0, pieces)
        return b"".join(pieces)

    def _headers(self) -> list[Header]:
        request_id = (b"x-request-id", self._request.request_id.encode("latin-1"))
        return [*self._head[1], *self._tags.items(), request_id]

    def _refuse(self, error: HiveError) -> None:
        """The error as the answer, or, when the answer has begun, as its last event."""
        if self._over:
            return
        self._status = error.status
        whole = self._way.whole
        self._finish()
        request_id = self._request.request_id
        if not self._answer.started:
            body = errors.envelope(error, self._hop, request_id)
            headers = [*error_headers(error, request_id), *self._tags.items()]
            self._answer.whole(error.status, headers, body)
        elif whole:
            self._answer.chunk(error_event(error, self._hop, request_id, self._request.path))
            if self._answer.chunked:
                self._answer.write(LAST_CHUNK)
            self._answer.end()
        else:
            self._answer.abort()


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


class _NoWay:
    """Before a request is on its way."""

    whole = True

    def flow(self, wanted: bool) -> None: ...

    def passed(self, count: int) -> None: ...

    def cancel(self) -> None: ...


_NO_WAY: Final = _NoWay()


def _nothing() -> None: ...


def _ignore(writable: bool) -> None:
    pass
