"""Passing a request on and its answer back, bytes untouched.

The queen relays to a hive and a hive to an engine with the same code. What a relay adds: the
headers that say who answered, one envelope for the errors of engines, and an error event when
an answer breaks in the middle. When the caller hangs up, the connection upstream closes at once,
which makes the engine free its slot.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from operations.errors import (
    CallerGone,
    HiveError,
    Hop,
    InvalidRequest,
    Unavailable,
    WorkerBroke,
)
from wire import errors, relayed
from wire.log import outcome
from wire.relayed import completion_tokens, engine_is_dead, error_event
from wire.retry import NoAnswer, head, until_answered
from wire.sse import MAX_EVENT_BYTES

log = logging.getLogger(__name__)

FORWARDED_REQUEST = ("content-type", "accept", "anthropic-version", "anthropic-beta")
FORWARDED_ANSWER = ("content-type", "content-encoding", "cache-control", "retry-after")
TAGS = ("x-hive-id", "x-worker-id")
ERROR_BODY_LIMIT = 1024 * 1024
WHOLE_BYTES = 256 * 1024 * 1024  # of an answer that is not streamed


@dataclass(frozen=True)
class Seen:
    """What is counted of one request.

    :param ttft_s: seconds to the first byte of the answer; None if none came
    :param model: the model's own name; None if nobody had it
    :param tokens: generated; of a stream, its events
    """

    status: int
    ttft_s: float | None
    model: str | None
    tokens: int


Observe = Callable[[Seen], None]
"""Told once a request, when it has ended."""

Lease = Callable[[frozenset[str]], AbstractAsyncContextManager["Upstream"]]
"""Chooses an upstream and holds it for exactly the life of a request; those of the given names
have just failed, and are taken only if there is no other."""


@dataclass(frozen=True)
class Upstream:
    """Where a request goes.

    :param hop: who answers there
    :param name: how messages call it (``worker w-3f9a1c``, ``hive gpu-0``)
    :param model: the model's own name there
    :param served_as: what the body must name as its ``model`` there; None leaves the body as it is
    :param tags: headers that the answer carries (``x-hive-id``, ``x-worker-id``)
    :param lost: returns when it is known that no answer will come any more
    """

    http: aiohttp.ClientSession
    base_url: str
    hop: Hop
    name: str
    model: str
    served_as: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    lost: Callable[[], Awaitable[None]] | None = None


class Lost(Unavailable):
    """Who was asked has fallen silent."""


class Relay(Response):
    """A response that is another server's."""

    def __init__(
        self,
        request: Request,
        body: bytes,
        lease: Lease,
        *,
        hop: Hop,
        observe: Observe,
    ) -> None:
        super().__init__()
        self._request = request
        self._body = body
        self._lease = lease
        self._hop: Hop = hop
        self._observe = observe
        self._started = False
        self._status = 499
        self._ttft: float | None = None
        self._tokens = 0
        self._upstream: Upstream | None = None
        self._tags: dict[str, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        passing = asyncio.create_task(self._pass_on(send, began))
        watching = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait((passing, watching), return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                self._status = CallerGone.status
        finally:
            for task in (passing, watching):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            try:
                with suppress(asyncio.CancelledError):
                    await passing
            finally:
                model = self._upstream.model if self._upstream else None
                self._observe(Seen(self._status, self._ttft, model, self._tokens))
                outcome(
                    "request",
                    request=scope.get(errors.REQUEST_ID),
                    path=scope["path"],
                    status=self._status,
                    hive=self._tags.get("x-hive-id"),
                    worker=self._tags.get("x-worker-id"),
                    ttft_ms=None if self._ttft is None else int(self._ttft * 1000),
                    ms=int((time.monotonic() - began) * 1000),
                )

    async def _pass_on(self, send: Send, began: float) -> None:
        failed: set[str] = set()

        async def attempt() -> None:
            async with self._lease(frozenset(failed)) as upstream:
                self._upstream = upstream
                self._tags = dict(upstream.tags)
                failed.add(upstream.name)
                try:
                    async with cut_when_lost(upstream):
                        await self._exchange(upstream, send, began)
                except Lost as error:
                    if self._started:
                        raise
                    raise NoAnswer(error.message) from None

        try:
            await until_answered(attempt)
        except HiveError as error:
            await self._refuse(error, send)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await self._refuse(self._broken_off(error), send)

    async def _exchange(self, upstream: Upstream, send: Send, began: float) -> None:
        request = self._request
        headers = {h: request.headers[h] for h in FORWARDED_REQUEST if h in request.headers}
        headers["x-request-id"] = request.scope.get(errors.REQUEST_ID, "")
        query = f"?{request.url.query}" if request.url.query else ""
        url = upstream.base_url + request.url.path + query
        body = self._body
        if upstream.served_as is not None:
            body = renamed(body, upstream.served_as)
        async with await head(
            upstream.http, request.method, url, data=body, headers=headers
        ) as answer:
            if upstream.hop == "hive":  # nobody else may say who answered
                self._tags |= {tag: answer.headers[tag] for tag in TAGS if tag in answer.headers}
            if answer.status >= 400:
                raise await refusal(answer, upstream)
            media_type = answer.headers.get("content-type", "")
            if media_type.startswith("text/event-stream"):
                await self._stream(answer, upstream, send, began)
            else:
                # Read whole first: an answer that breaks can still become a clean error.
                whole = await read_whole(answer, upstream)
                self._ttft = time.monotonic() - began
                self._tokens = completion_tokens(whole)
                await self._head(answer, upstream, send, length=len(whole))
                await send({"type": "http.response.body", "body": whole})

    def _broken_off(self, error: Exception) -> HiveError:
        upstream = self._upstream
        if upstream is None:
            raise error
        log.info("%s broke off: %s", upstream.name, type(error).__name__)
        return WorkerBroke(
            f"The {upstream.name} ended before its answer did. Send the request again.",
            hop=upstream.hop,
        )

    async def _stream(
        self, answer: aiohttp.ClientResponse, upstream: Upstream, send: Send, began: float
    ) -> None:
        await self._head(answer, upstream, send)
        async for chunk in whole_events(answer.content.iter_any()):
            if self._ttft is None:
                self._ttft = time.monotonic() - began
            self._tokens += chunk.count(b"\n\n")
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _head(
        self,
        answer: aiohttp.ClientResponse,
        upstream: Upstream,
        send: Send,
        length: int | None = None,
    ) -> None:
        headers = {h: answer.headers[h] for h in FORWARDED_ANSWER if h in answer.headers}
        headers |= self._tags
        if length is not None:
            headers["content-length"] = str(length)
        self._started, self._status = True, answer.status
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})

    async def _refuse(self, error: HiveError, send: Send) -> None:
        """The error as the answer, or, when the answer has begun, as its last event."""
        self._status = error.status
        scope = self._request.scope
        request_id = scope.get(errors.REQUEST_ID, "")
        if not self._started:
            response = errors.answer(error, self._hop, request_id)
            response.headers.update(self._tags)
            await response(scope, self._request.receive, send)
            return
        event = error_event(error, self._hop, request_id, scope["path"])
        await send({"type": "http.response.body", "body": event})


@asynccontextmanager
async def cut_when_lost(upstream: Upstream) -> AsyncIterator[None]:
    """Around an exchange: end it when the upstream is lost, which a silent one never would.

    :raises Lost: it was lost
    """
    if upstream.lost is None:
        yield
        return
    lost, task = upstream.lost, asyncio.current_task()
    assert task is not None
    cut = False

    async def watch() -> None:
        nonlocal cut
        await lost()
        cut = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if cut and task.uncancel() == 0:
            raise Lost(
                f"The {upstream.name} has fallen silent. Send the request again.", hop=upstream.hop
            ) from None
        raise
    finally:
        watching.cancel()


async def whole_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, cut only between events, so that an error event can follow any chunk.

    :raises WorkerBroke: an event does not end
    """
    rest = b""
    async for chunk in chunks:
        if not rest and chunk.endswith(b"\n\n"):
            yield chunk
            continue
        rest += chunk
        cut = max(rest.rfind(b"\n\n") + 2, rest.rfind(b"\r\n\r\n") + 4)
        if cut > 3 or rest.startswith(b"\n\n"):
            yield rest[:cut]
            rest = rest[cut:]
        if len(rest) > MAX_EVENT_BYTES:
            raise WorkerBroke(
                f"The engine sent an event of more than {MAX_EVENT_BYTES >> 20} MiB. Look at it; "
                "is it an OpenAI-compatible server?",
                code="answer_too_large",
                retryable=False,
            )
    if rest:
        yield rest


async def refusal(answer: aiohttp.ClientResponse, upstream: Upstream) -> HiveError:
    """An upstream's error as ours.

    :raises NoAnswer: it is that of an engine that has died
    """
    raw = b""
    async for chunk in answer.content.iter_any():
        raw += chunk
        if len(raw) > ERROR_BODY_LIMIT:
            break
    after = answer.headers.get("retry-after", "")
    error = relayed.refusal(answer.status, raw, after, upstream.hop, upstream.name)
    if upstream.hop == "worker" and error.status >= 500 and engine_is_dead(error.message):
        raise NoAnswer(f"The {upstream.name} broke.")
    return error


async def read_whole(answer: aiohttp.ClientResponse, upstream: Upstream) -> bytes:
    """An answer that is not streamed.

    :raises WorkerBroke: it is longer than anybody can use
    """
    whole = bytearray()
    async for chunk in answer.content.iter_any():
        whole += chunk
        if len(whole) > WHOLE_BYTES:
            answer.close()
            raise WorkerBroke(
                f"The {upstream.name} answers with more than {WHOLE_BYTES >> 20} MiB. Ask it for "
                "less.",
                hop=upstream.hop,
                retryable=False,
            )
    return bytes(whole)


_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def renamed(body: bytes, model: str) -> bytes:
    """A request's body with another ``model``, and every other field's bytes as they are.

    The order of the fields stays; of one that stands there twice, the last is kept.

    :raises InvalidRequest: it is no JSON object
    """
    try:
        fields = _FIELDS.decode(body)
        if msgspec.json.decode(fields.get("model", b"null")) == model:
            return body
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}.", code="invalid_json") from None
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
