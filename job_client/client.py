"""The one client of the jobs API: submit an operation, stream it, resume it, cancel it.

The queen forwards with it, the agent announces itself with it, ``hive`` is made of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
from pydantic_core import from_json

from operations import events
from operations.errors import HiveError, Hop, Unavailable, WorkerBroke, from_envelope
from operations.operations import Operation
from wire import sse
from wire.headers import JOB_ID_HEADER
from wire.log import REQUEST_ID
from wire.peer import Peer

CONNECT_S = 5.0
ADMISSION_S = 600.0  # a large file is hashed, and a hub asked, before a job is admitted
RESUME_S = 30.0  # how long a dropped stream is tried again without any event
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 2.0
SILENCE_S = 45.0  # three missed keep-alive comments
BROKEN = (aiohttp.ClientError, TimeoutError, OSError, ValueError, RuntimeError)
"""How a connection ends; aiohttp has a ValueError for a bad URL, a RuntimeError for a session that
was closed meanwhile."""


class JobFailed(HiveError):
    """The job ended with ``[ERROR]``; the message is the job's."""

    code = "job_failed"


class JobCancelled(HiveError):
    """The job ended with ``[CANCELLED]``."""

    code = "job_cancelled"


@dataclass(frozen=True)
class Submitted:
    """A job that has begun."""

    job_id: str
    sse_url: str


@dataclass(frozen=True)
class Outcome:
    """How a job ended. ``result`` is its last line of JSON, decoded; None if it gave none."""

    job_id: str
    status: str
    result: Any = None
    message: str | None = None

    def value(self) -> Any:
        """The result.

        :raises JobFailed: it ended with ``[ERROR]``
        :raises JobCancelled: it ended with ``[CANCELLED]``
        """
        if self.status == "failed":
            raise JobFailed(self.message or "the job failed")
        if self.status == "cancelled":
            raise JobCancelled(f"{self.job_id} was cancelled.")
        return self.result


class JobClient:
    """Speaks to one daemon, queen or hive agent alike.

    :param base_url: e.g. ``http://127.0.0.1:7833``
    :param api_key: sent as a bearer token
    :param session: shared with others; a session of its own is made, and closed, otherwise
    :param peer: speaks with the cluster's proof instead of a key; closed with the client
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        session: aiohttp.ClientSession | None = None,
        peer: Peer | None = None,
        hop: Hop = "queen",
        resume_s: float = RESUME_S,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = session
        self._owns_session = session is None
        self._peer = peer
        self._hop: Hop = hop
        self._resume_s = resume_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the client's own session. Fine to call twice."""
        if self._owns_session and self._session is not None:
            await self._session.close()
            self._session = None
        if self._peer is not None:
            await self._peer.close()

    async def get(self, path: str, *, timeout_s: float = 30) -> Any:
        """A JSON answer. :raises HiveError: as the daemon said it, or it cannot be reached"""
        return await self._json("GET", path, timeout_s=timeout_s)

    async def post(
        self,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30,
    ) -> Any:
        """A JSON answer to a JSON body (a pydantic model, or plain values; None sends no body)."""
        return await self._json("POST", path, body, headers=headers, timeout_s=timeout_s)

    async def delete(self, path: str, *, timeout_s: float = 30) -> Any:
        """A JSON answer."""
        return await self._json("DELETE", path, timeout_s=timeout_s)

    async def connect(
        self, path: str, last_event_id: str | None = None
    ) -> aiohttp.ClientResponse | None:
        """A stream of events, once; None if its end has been seen already. The caller closes it.

        :raises HiveError: the daemon refuses, or cannot be reached
        """
        headers = {**self._headers, "accept": "text/event-stream"}
        if last_event_id is not None:
            headers["last-event-id"] = last_event_id
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        try:
            http = await self._http()
            response = await http.get(
                self.base_url + path, headers=headers, timeout=timeout, allow_redirects=False
            )
        except BROKEN as error:
            raise self._lost(error) from None
        if response.status == 200:
            return response
        async with response:
            if response.status == 204:
                return None
            raw = await response.read()
        raise from_envelope(response.status, _maybe_json(raw), hop=self._hop, where=self.base_url)

    async def submit(
        self, operation: Operation | Mapping[str, Any], *, job_id: str | None = None
    ) -> Submitted:
        """Start a job.

        :param job_id: minted by the caller, which makes a repeated submit harmless
        :raises HiveError: the daemon refused it, with the daemon's own words
        """
        headers = {JOB_ID_HEADER: job_id} if job_id else None
        answer = await self.post("/v1/jobs", operation, headers=headers, timeout_s=ADMISSION_S)
        try:
            found = str(answer["job_id"])
        except (KeyError, TypeError):
            raise WorkerBroke(f"{self.base_url} answered a job without an id.") from None
        return Submitted(found, str(answer.get("sse_url") or f"/v1/jobs/{found}/stream"))

    async def cancel(self, job_id: str) -> str:
        """Cancel a job; what became of it (``cancelled``, or what it already was)."""
        answer = await self.delete(f"/v1/jobs/{job_id}")
        return str(answer["status"])

    async def open(
        self, job_id: str, last_event_id: str | None = None
    ) -> AsyncGenerator[sse.Event, None] | None:
        """Open a job's stream, and read it to its end however often the connection drops.

        :param last_event_id: go on after this event
        :returns: the events, the terminal one last; None if the end has been seen already
        :raises HiveError: the daemon refuses (404, 410) or cannot be reached
        """
        response = await self.connect(_stream(job_id), last_event_id)
        return None if response is None else self._events(job_id, last_event_id, response)

    async def stream(
        self, job_id: str, last_event_id: str | None = None
    ) -> AsyncGenerator[sse.Event, None]:
        """:meth:`open` as one generator; a stream whose end has been seen is empty."""
        source = await self.open(job_id, last_event_id)
        if source is not None:
            async with aclosing(source):
                async for event in source:
                    yield event

    async def submit_and_stream(
        self,
        operation: Operation | Mapping[str, Any],
        line_handler: Callable[[str], object],
    ) -> Outcome:
        """Submit, and hand every line of the stream to ``line_handler``, the terminal one too.

        :raises HiveError: the daemon refused the operation, or was lost on the way
        """
        submitted = await self.submit(operation)
        return await self.follow(submitted.job_id, line_handler)

    async def follow(
        self,
        job_id: str,
        line_handler: Callable[[str], object] = lambda line: None,
        *,
        last_event_id: str | None = None,
    ) -> Outcome:
        """Stream a job that runs already to its end; see :meth:`submit_and_stream`."""
        result: Any = None
        async with aclosing(self.stream(job_id, last_event_id)) as source:
            async for event in source:
                line = event.data
                line_handler(line)
                if line == events.DONE:
                    return Outcome(job_id, "completed", _decoded(result))
                if line == events.CANCELLED:
                    return Outcome(job_id, "cancelled")
                if line.startswith(events.ERROR):
                    message = line.removeprefix(events.ERROR).strip()
                    return Outcome(job_id, "failed", None, message)
                if line.startswith(("{", "[")):
                    result = line
        info = await self.get(f"/v1/jobs/{job_id}")
        return Outcome(job_id, str(info["status"]), None, info.get("message"))

    async def run(self, operation: Operation | Mapping[str, Any]) -> Any:
        """Submit, wait, return the result.

        :raises JobFailed, JobCancelled, HiveError: it did not complete
        """
        return (await self.submit_and_stream(operation, lambda line: None)).value()

    # -- inside ------------------------------------------------------------------------------

    async def _http(self) -> aiohttp.ClientSession:
        if self._peer is not None:
            if not self._peer.opened:
                await self._peer.open()
            self.base_url = self._peer.base_url
            return self._peer.http
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session

    async def _json(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30,
    ) -> Any:
        sent = {**self._headers, **(headers or {})}
        if request_id := REQUEST_ID.get():
            sent["x-request-id"] = request_id
        data = None
        if body is not None:
            sent["content-type"] = "application/json"
            data = encode_operation(body)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
        try:
            http = await self._http()
            async with http.request(
                method,
                self.base_url + path,
                data=data,
                headers=sent,
                skip_auto_headers=("content-type",),  # it is signed: none but ours is to be sent
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                raw = await response.read()
        except BROKEN as error:
            raise self._lost(error) from None
        payload = _maybe_json(raw)
        if response.status >= 400:
            refused = from_envelope(response.status, payload, hop=self._hop, where=self.base_url)
            refused.retry_after = _seconds(response.headers.get("retry-after"))
            raise refused
        return payload

    async def _events(
        self, job_id: str, last_event_id: str | None, response: aiohttp.ClientResponse
    ) -> AsyncGenerator[sse.Event, None]:
        """Read; on a dropped connection go on after the last numbered event, with backoff."""
        loop = asyncio.get_running_loop()
        current: aiohttp.ClientResponse | None = response
        heard_at, pause = loop.time(), FIRST_PAUSE_S
        while current is not None:
            async with current, aclosing(sse.decode(current.content.iter_any())) as decoded:
                try:
                    async for event in decoded:
                        heard_at, pause = loop.time(), FIRST_PAUSE_S
                        last_event_id = event.id or last_event_id
                        yield event
                        if events.is_terminal(event.data):
                            return
                except BROKEN:
                    pass  # resumed below
            current = None
            while current is None:
                if loop.time() - heard_at > self._resume_s:
                    raise self._lost(TimeoutError())
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, LAST_PAUSE_S)
                try:
                    current = await self.connect(_stream(job_id), last_event_id)
                    if current is None:
                        return
                except Unavailable:
                    pass  # tried again until resume_s have passed without an event

    def _lost(self, error: Exception) -> Unavailable:
        host = urlsplit(self.base_url).netloc or self.base_url
        reason = "no answer in time" if isinstance(error, TimeoutError) else _reason(error)
        return Unavailable(
            f"Cannot reach the daemon at {host}: {reason}. Is it running? Start one with "
            "'hive up', or name another with --url.",
            code="daemon_unreachable",
            hop=self._hop,
        )


def encode_operation(body: Any) -> bytes:
    """An operation, or plain values, as JSON."""
    if hasattr(body, "model_dump"):
        body = body.model_dump(mode="json", exclude_none=True)
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def _stream(job_id: str) -> str:
    return f"/v1/jobs/{job_id}/stream"


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return os.strerror(error.errno) if error.errno else str(error.os_error)
    return str(error) or type(error).__name__


def _maybe_json(raw: bytes) -> Any:
    try:
        return from_json(raw)
    except ValueError:
        return None


def _decoded(line: str | None) -> Any:
    return None if line is None else from_json(line)
