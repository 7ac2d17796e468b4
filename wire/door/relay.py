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
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import lru_cache
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
from wire.answering import Answering
from wire.door.body import model_of, with_model
from wire.door.door import Request, Serve, error_headers
from wire.door.lines import Line, Way
from wire.http1.body import LAST_CHUNK, Chunked
from wire.http1.client import NoAnswer, Unreachable
from wire.http1.head import Header
from wire.http1.pieces import Pieces
from wire.keys import Caller
from wire.log import REQUEST_ID, quoted, told
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

FORWARDED: Final = frozenset(
    (b"content-type", b"content-encoding", b"cache-control", b"retry-after")
)
NO_BODY: Final = (204, 205)
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
    """One request, through all its attempts.

    It is asked again while no answer has begun: as often as nobody could be reached, and once when
    somebody took it and gave no answer. A request that kills whoever takes it is not passed on for
    ever.
    """

    __slots__ = (
        "_attempt",
        "_began",
        "_failed",
        "_find",
        "_metrics",
        "_over",
        "_pause",
        "_task",
        "_timer",
        "_tries",
        "_unanswered",
        "_waiting",
        "answer",
        "hop",
        "model",
        "request",
    )

    def __init__(
        self, find: Find, request: Request, answer: Answering, hop: Hop, metrics: Counts
    ) -> None:
        self.request = request
        self.answer = answer
        self.hop: Hop = hop
        self._find = find
        self._metrics = metrics
        self._began = time.monotonic()
        self.model = ""
        self._task: Task = TASKS.get(request.path, "generate")
        self._attempt: _Attempt | None = None
        self._failed = NONE_FAILED
        self._tries = 0
        self._pause = FIRST_PAUSE_S
        self._unanswered = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._over = False

    def begin(self, limit: Limit) -> None:
        """Ask until there is an answer, and pass it on."""
        self.answer.on_gone = self._gone
        counted = limit(self.request.caller)
        if counted is None:
            self._start()
        else:
            self.wait(self._start_after, counted)

    async def _start_after(self, counted: Awaitable[None]) -> None:
        await counted
        self._start()

    def _start(self) -> None:
        try:
            self.model = model_of(self.request.body)
        except HiveError as error:
            self._refuse(error)
        else:
            self._ask()

    def wait(self, step: Callable[..., Coroutine[None, None, None]], *args: object) -> None:
        """Go on with what has to wait; it is cancelled when the caller goes."""

        async def run() -> None:
            REQUEST_ID.set(self.request.request_id)
            try:
                await step(*args)
            except HiveError as error:
                self.failed(error)
            except Exception:  # the caller is told
                log.exception("serving %s broke", self.request.path)
                self.failed(HiveError(errors.BROKEN))

        self._waiting = asyncio.get_running_loop().create_task(run())

    # -- attempts ----------------------------------------------------------------------------

    def _ask(self) -> None:
        self._timer = None
        if self._over:
            return
        try:
            found = self._find(self.model, self._task, self._failed)
            if isinstance(found, Lease):
                self._exchange(found)
            else:
                self.wait(self._exchange_with, found)
        except HiveError as error:
            self.failed(error)
        except Exception:  # the caller is told, and the connection goes on
            log.exception("serving %s broke", self.request.path)
            self.failed(HiveError(errors.BROKEN))

    async def _exchange_with(self, found: Awaitable[Lease]) -> None:
        self._exchange(await found)

    def _exchange(self, lease: Lease) -> None:
        self._attempt = attempt = _Attempt(self, lease)
        attempt.begin()

    def failed(self, error: HiveError) -> None:
        """The attempt has failed: ask again, or say why not."""
        attempt = self._attempt
        if attempt is not None:
            self._failed |= {attempt.upstream.name}
            attempt.let_go(error)
            error = self._about_us(error, attempt.upstream)
        if self._over:
            return
        self._tries += 1
        again = isinstance(error, Unreachable)
        if isinstance(error, NoAnswer):
            again = not self._unanswered
            self._unanswered = True
        if not again or self.answer.started or self._tries >= TRIES:
            self._refuse(error)
        elif isinstance(error, _Forgotten):
            self.wait(self._renewed, error.renew)
        else:
            self._again()

    def _again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._ask)
        self._pause = min(2 * self._pause, LAST_PAUSE_S)

    def _about_us(self, error: HiveError, upstream: Upstream) -> HiveError:
        """What a daemon says of our own proof is not the caller's business."""
        if upstream.hop != "hive" or not isinstance(error, Unauthorized):
            return error
        if error.code == "unknown_session" and upstream.renew is not None:
            return _Forgotten(upstream.renew)  # it was started anew since
        if error.code == "replayed":  # others have overtaken it: it is signed anew
            return NoAnswer(error.message, hop=upstream.hop)
        return Unavailable(
            f"The {upstream.name} does not accept this queen's proof ({error.code}). "
            "Look at its log.",
            code="proof_refused",
            hop=upstream.hop,
        )

    async def _renewed(self, renew: Callable[[], Awaitable[object]]) -> None:
        await renew()
        self._again()

    # -- the end -----------------------------------------------------------------------------

    def passed(self) -> None:
        """The answer has ended as it should."""
        assert self._attempt is not None
        self._finish(self._attempt.status)

    def _gone(self) -> None:
        """The caller has hung up."""
        self._finish(CallerGone.status)

    def _refuse(self, error: HiveError) -> None:
        """The error as the answer, or, when the answer has begun, as its last event."""
        if self._over:
            return
        answer, request_id = self.answer, self.request.request_id
        tags = self._attempt.tags if self._attempt is not None else {}
        eventful = self._attempt is not None and self._attempt.takes_event
        self._finish(error.status)
        if not answer.started:
            body = errors.envelope(error, self.hop, request_id)
            answer.whole(error.status, [*error_headers(error), *tags.items()], body)
        elif eventful:
            answer.chunk(error_event(error, self.hop, request_id, self.request.path))
            if answer.chunked:
                answer.write(LAST_CHUNK)
            answer.end()
        else:
            answer.abort()

    def _finish(self, status: int) -> None:
        """Once, whatever became of it: count it, and say it in one line."""
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
        self.answer.unheard()
        ttft = model = None
        tags: dict[bytes, bytes] = {}
        tokens = 0
        # Nothing that it has made refers back to it any more, so it goes without a collection.
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.let_go(None)
            model, tokens, tags = attempt.upstream.model, attempt.tokens, attempt.tags
            if attempt.first is not None:
                ttft = attempt.first - self._began
        self._metrics.request_ended(self.request.path, Seen(status, ttft, model, tokens))
        request = self.request
        about = _about(request.path, status, tags.get(b"x-hive-id"), tags.get(b"x-worker-id"))
        begun = "" if ttft is None else f" ttft_ms={int(ttft * 1000)}"
        took = int((time.monotonic() - self._began) * 1000)
        told(f"action=request request={request.request_id}{about}{begun} ms={took}")


class _Forgotten(NoAnswer):
    """A daemon does not know us any more; nothing was done."""

    def __init__(self, renew: Callable[[], Awaitable[object]]) -> None:
        super().__init__("It has forgotten who we are. Send the request again.", hop="hive")
        self.renew = renew


class _Attempt:
    """One exchange with one upstream; takes its answer, and passes it on."""

    __slots__ = (
        "_answer",
        "_chunked",
        "_headers",
        "_kept",
        "_large",
        "_lease",
        "_passing",
        "_scanner",
        "_size",
        "_streams",
        "_unpassed",
        "_unwatch",
        "_way",
        "first",
        "status",
        "tags",
        "tokens",
        "upstream",
    )

    def __init__(self, passing: _Passing, lease: Lease) -> None:
        self._passing = passing
        self._answer = passing.answer
        self._lease: Lease | None = lease
        self.upstream = lease.upstream
        self.tags = lease.upstream.tags
        self.status = 0
        self.tokens = 0
        self.first: float | None = None
        """When the answer began to be passed on, on the monotonic clock."""
        self._way: Way = _NO_WAY
        self._unwatch: Callable[[], None] | None = None
        self._headers: tuple[Header, ...] = ()
        self._chunked = False
        self._scanner: Chunked
        self._streams = False
        self._kept: list[bytes] = []
        self._large: Pieces | None = None
        self._size = 0
        self._unpassed = 0

    @property
    def takes_event(self) -> bool:
        """Whether an event may be added to what was passed on."""
        return self._streams and self._way.whole

    def begin(self) -> None:
        """Send the request. :raises HiveError: it cannot be"""
        upstream, request = self.upstream, self._passing.request
        body = request.body
        if upstream.served_as is not None and upstream.served_as != self._passing.model:
            body = with_model(body, upstream.served_as)
        self._way = upstream.line.send(request, body, self)
        self._answer.on_writable = self._flow
        if not self._answer.writable:
            self._way.flow(False)
        if upstream.watch is not None:
            self._unwatch = upstream.watch(self._is_lost)

    def _is_whole(self) -> bool:
        return self._way.whole

    def let_go(self, error: HiveError | None) -> None:
        """Nothing of it is heard any more. Fine to call twice."""
        self._hush()
        if self._lease is not None:
            lease, self._lease = self._lease, None
            lease.end(error)

    def _hush(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        self._answer.unwatched()
        self._way.cancel()
        self._way = _NO_WAY if self._way.whole else _BROKEN_OFF

    def _is_lost(self) -> None:
        """It is known that no answer will come any more, which a silent one would never tell."""
        name, hop = self.upstream.name, self.upstream.hop
        why = f"The {name} has fallen silent. Send the request again."
        if self._answer.started:
            self._passing.failed(Unavailable(why, hop=hop))
        else:
            self._passing.failed(NoAnswer(why, hop=hop, retryable=True))

    # -- the answer, as it comes -------------------------------------------------------------

    def whole(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        self._begins(status, headers)
        self._pass_whole(body)

    def _begins(self, status: int, headers: Sequence[Header]) -> bool:
        """Take in an answer's head; whether events follow."""
        self.status = status
        self._headers, tags, eventful = _read(tuple(headers))
        if tags and self.upstream.hop == "hive":
            self.tags = self.tags | tags
        return eventful

    def head(self, status: int, headers: Sequence[Header], chunked: bool) -> None:
        eventful = self._begins(status, headers)
        self._chunked = chunked
        if chunked:
            self._scanner = Chunked(502)
        self._streams = eventful and 200 <= status < 300 and status not in NO_BODY
        if self._streams:
            self._answer.between = self._is_whole
            request = self._passing.request
            # Of no length, even where the upstream tells one: an error event may have to follow.
            self._answer.head(status, self._fields(), length=None)
            # The request is not sent again, so a long stream need not hold it.
            request.forget()
            self._headers = ()

    def data(self, data: bytes) -> None:
        if not self._streams:
            self._keep(data)
            return
        if self.first is None:
            self.first = time.monotonic()
        self.tokens += data.count(b"\n\n")
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
        if not self._streams:
            self._pass_whole(b"".join(self._kept))
            return
        answer = self._answer
        if answer.chunked and not self._chunked:
            answer.write(LAST_CHUNK)
        self._passing.passed()
        answer.end()

    def failed(self, error: HiveError, started: bool) -> None:
        self._passing.failed(error)

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
        if self._large is not None:
            self._large.add(payload)
        else:
            self._kept.append(payload)
            if self._size > LARGE_BYTES:
                self._large = Pieces()
                for piece in self._kept:
                    self._large.add(piece)
                self._kept = []
        if self._size > (ERROR_BYTES if self.status >= 300 else WHOLE_BYTES):
            name, hop = self.upstream.name, self.upstream.hop
            too_long = f"The {name} answered more than anybody can use. Ask it for less."
            self._passing.failed(WorkerBroke(too_long, hop=hop, retryable=False))

    def _pass_whole(self, body: bytes) -> None:
        """Pass an answer on that is not streamed. :param body: all of it, but for a large one's"""
        if self.status >= 300:
            self._passing.failed(self._refusal(body))
            return
        self.first = time.monotonic()
        try:
            if self._large is None:
                self.tokens = completion_tokens(body)
                self._answer.whole(self.status, self._fields(), body)
                self._passing.passed()
            else:
                self.tokens = completion_tokens_at_end(self._large.tail(TAIL_BYTES))
                self._hush()  # what it answered is all here
                self._answer.head(self.status, self._fields(), length=self._large.size)
                self._passing.wait(self._pass_large, self._large)
        except HiveError as error:  # a trunk takes no head so large
            self._passing.failed(error)

    def _refusal(self, body: bytes) -> HiveError:
        """What the upstream answers in place of what it was asked for."""
        status, hop, name = self.status, self.upstream.hop, self.upstream.name
        if status < 400:
            return redirects(status, hop, name)
        after = next((v for n, v in self._headers if n == b"retry-after"), b"")
        error = refusal(status, body, after.decode("latin-1"), hop, name)
        if hop == "worker" and status >= 500 and engine_is_dead(error.message):
            return NoAnswer(f"The {name} broke.", hop=hop)
        return error

    async def _pass_large(self, body: Pieces) -> None:
        """Write a large answer as far as the caller takes it, and others on the loop have time."""
        answer = self._answer
        resumed = asyncio.Event()
        answer.on_writable = lambda writable: resumed.set() if writable else resumed.clear()
        for piece in body:
            answer.write(bytes(piece))
            await (asyncio.sleep(0) if answer.writable else resumed.wait())
        self._passing.passed()
        answer.end()

    def _unframed(self, data: bytes) -> bytes:
        """The payload of what came, chunks if it is chunked, cut anywhere."""
        if not self._chunked:
            return data
        pieces: list[bytes] = []
        self._scanner.feed(data, 0, pieces)
        return b"".join(pieces)

    def _fields(self) -> tuple[Header, ...]:
        return (*self._headers, *self.tags.items())


@lru_cache(maxsize=256)
def _read(
    headers: tuple[Header, ...],
) -> tuple[tuple[Header, ...], dict[bytes, bytes], bool]:
    """Of an answer's headers: those that are passed on, the tags, and whether it is events."""
    passed = tuple(header for header in headers if header[0] in FORWARDED)
    tags = {name: value for name, value in headers if name in TAGS}
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    return passed, tags, kind.startswith(b"text/event-stream")


@lru_cache(maxsize=256)
def _about(path: str, status: int, hive: bytes | None, worker: bytes | None) -> str:
    """What was asked, what became of it, and who answered, in words for the log."""
    whom = (("hive", hive), ("worker", worker))
    said = "".join(f" {key}={quoted(v.decode('latin-1'))}" for key, v in whom if v is not None)
    return f" path={quoted(path)} status={status}{said}"


class _OffWay:
    """Where nothing is under way, or no more."""

    __slots__ = ("whole",)

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def flow(self, wanted: bool) -> None: ...

    def passed(self, count: int) -> None: ...

    def cancel(self) -> None: ...


_NO_WAY: Final = _OffWay(whole=True)
_BROKEN_OFF: Final = _OffWay(whole=False)
