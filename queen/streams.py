"""The stream of a job on a hive, spliced through to its reader.

The hive's bytes are passed on as they come. Only when they break off is it looked at which event
was the last one; the hive is then asked for what follows it. The queen's own lines, before the
first event and at a loss, carry no id.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from msgspec.structs import replace

from operations import events
from operations.errors import (
    Gone,
    HiveError,
    NotFound,
    Unauthorized,
    Unavailable,
    WorkerBroke,
)
from wire import sse
from wire.answering import Answering
from wire.door.door import Request
from wire.door.job_streams import STREAM_HEADERS, finish, seen_to_the_end
from wire.door.lines import Line, Way
from wire.http1.body import LAST_CHUNK, Chunked
from wire.http1.client import Unreachable
from wire.http1.head import Header
from wire.relayed import refusal

RESUME_S: Final = 5.0  # a stream that broke off is asked for again; a silent hive is gone by then
SILENCE_S: Final = 45.0  # three missed comments
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 1.0
ERROR_BYTES: Final = 64 * 1024
_ID: Final = b"\nid: "
_DATA: Final = b"\ndata: "


class Spliced:
    """One reader's stream, through all its connections to the hive; takes the answer of each."""

    def __init__(
        self,
        request: Request,
        answer: Answering,
        line: Line,
        renew: Callable[[], Awaitable[object]],
        *,
        hive_id: str,
        greeting: str,
    ) -> None:
        """
        :param request: the reader's
        :param renew: proves ourselves again to a hive that has forgotten us
        :param greeting: the queen's first line, for a reader that begins at the beginning
        """
        self._request = request
        self._answer = answer
        self._line = line
        self._renew = renew
        self._hive_id = hive_id
        self._greeting = greeting
        self._loop = asyncio.get_running_loop()
        self._cut: asyncio.Future[HiveError] = self._loop.create_future()
        self._tail = b""
        """The last bytes in which an event's id stands."""
        answer.between = lambda: self._whole
        self._begin()

    def _begin(self) -> None:
        """Nothing of the next answer has come."""
        self._done: asyncio.Future[HiveError | None] = self._loop.create_future()
        self._way: Way | None = None
        self._status = 0
        self._retry_after = ""
        self._chunked = False
        self._scanner = Chunked(502)
        self._kept = bytearray()
        self._unpassed = 0
        self._heard = self._stirred = False

    def cut(self, error: HiveError) -> None:
        """Nothing more will come, and why. Fine to call twice."""
        if not self._cut.done():
            self._cut.set_result(error)

    async def run(self) -> None:
        """Pass the stream on to its end, which is a terminal line, but for a reader too slow.

        :raises HiveError: there is no stream, and nothing was written
        """
        try:
            await self._until_ended()
        except HiveError as error:
            if not self._answer.started:
                raise
            if not self._whole:
                self._answer.abort()  # within an event: the reader may ask for it again
                return
            if not isinstance(error, Gone):  # the job goes on, and may be asked for
                self._answer.chunk(sse.encoded(events.error(_last_word(self._hive_id, error))))
        finally:
            self._answer.unwatched()
        if self._answer.started:
            finish(self._answer)
        else:
            seen_to_the_end(self._answer)

    # -- asking the hive -----------------------------------------------------------------------

    async def _until_ended(self) -> None:
        pause, since = FIRST_PAUSE_S, self._loop.time()
        while True:
            try:
                await self._exchange()
                if self._status == 204 or _ended(self._tail):
                    return
                failure: HiveError = Unavailable("its answer ended too early", hop="hive")
            except (Unauthorized, Unavailable, WorkerBroke) as error:
                if _ended(self._tail):
                    return
                if self._cut.done() or not self._whole:
                    raise
                failure = error
                if isinstance(error, Unauthorized):
                    failure = await self._proven(error)
            if self._heard:
                pause, since = FIRST_PAUSE_S, self._loop.time()
            if self._loop.time() - since > RESUME_S:
                raise failure
            await asyncio.wait((self._cut,), timeout=pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LAST_PAUSE_S)

    async def _exchange(self) -> None:
        """Ask for what follows, and pass it on until it ends. :raises HiveError: it broke off"""
        self._begin()
        if self._cut.done():
            raise self._cut.result()
        last_event_id = _last_id(self._tail)
        request = self._request
        if last_event_id is not None:
            headers = {**request.headers, "last-event-id": last_event_id}
            request = replace(request, headers=headers)
        self._way = self._line.send(request, b"", self)
        self._answer.on_writable = self._flow
        if not self._answer.writable:
            self._way.flow(False)
        self._silence = self._loop.call_later(SILENCE_S, self._listen)
        try:
            await asyncio.wait((self._done, self._cut), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._silence.cancel()
            self._way.cancel()
        failure = self._cut.result() if self._cut.done() else self._done.result()
        if failure is not None:
            raise failure
        if self._status >= 300:
            name = f"hive {self._hive_id}"
            raise refusal(self._status, self._payload(), self._retry_after, "hive", name)

    async def _proven(self, error: Unauthorized) -> HiveError:
        """Prove ourselves anew to a hive that was started anew; why the stream broke off.

        :raises Unavailable: it refuses us for good
        """
        if error.code != "unknown_session":
            raise Unavailable(
                f"Hive {self._hive_id} does not accept this queen's proof ({error.code}). "
                "Look at its log.",
                code="proof_refused",
                hop="hive",
            )
        try:
            await self._renew()
        except Unreachable as refused:
            return refused  # it is asked again for a while
        return error

    def _listen(self) -> None:
        """A connection may have died without a word."""
        if not self._stirred and self._answer.writable:
            self.failed(Unavailable("it has said nothing for too long", hop="hive"), True)
        self._stirred = False
        self._silence = self._loop.call_later(SILENCE_S, self._listen)

    @property
    def _whole(self) -> bool:
        """Whether what was passed on ends where an event ends."""
        return self._way is None or self._way.whole

    # -- the answer, as it comes ---------------------------------------------------------------

    def head(self, status: int, headers: Sequence[Header], chunked: bool) -> None:
        self._status = status
        self._chunked = chunked
        self._retry_after = next((v for n, v in headers if n == b"retry-after"), b"").decode(
            "latin-1"
        )
        if status == 200 and not self._answer.started:
            self._answer.head(200, STREAM_HEADERS, length=None)
            if self._greeting:
                self._answer.chunk(sse.encoded(self._greeting))

    def data(self, data: bytes) -> None:
        self._stirred = True
        if self._status != 200:
            self._keep(data)
            return
        if _ID in data:
            self._tail = data
            self._heard = True
        answer = self._answer
        passed = data.removesuffix(LAST_CHUNK) if self._chunked else data
        if not (self._chunked and answer.chunked):
            if payload := self._unframed(passed):
                answer.chunk(payload)
        elif passed:
            answer.write(passed)
        if answer.writable:
            self._passed(len(data))
        else:
            self._unpassed += len(data)

    def end(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def whole(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        self.head(status, headers, False)
        if body:
            self.data(body)
        self.end()

    def failed(self, error: HiveError, started: bool) -> None:
        if not self._done.done():
            self._done.set_result(error)

    def _flow(self, writable: bool) -> None:
        if self._way is None:
            return
        self._way.flow(writable)
        if writable and self._unpassed:
            passed, self._unpassed = self._unpassed, 0
            self._passed(passed)

    def _passed(self, count: int) -> None:
        if self._way is not None:
            self._way.passed(count)

    def _keep(self, data: bytes) -> None:
        self._kept += data[: ERROR_BYTES - len(self._kept)]
        self._passed(len(data))

    def _payload(self) -> bytes:
        """The body of a refusal, or the beginning of it."""
        return self._unframed(bytes(self._kept))

    def _unframed(self, data: bytes) -> bytes:
        if not self._chunked:
            return data
        pieces: list[bytes] = []
        self._scanner.feed(data, 0, pieces)
        return b"".join(pieces)


def _last_id(tail: bytes) -> str | None:
    """The id of the last event in these bytes."""
    at = tail.rfind(_ID)
    if at < 0:
        return None
    begin = at + len(_ID)
    return tail[begin : tail.find(b"\n", begin)].decode("latin-1")


def _ended(tail: bytes) -> bool:
    """Whether the last event in these bytes ends a job."""
    at = tail.find(_DATA, max(0, tail.rfind(_ID)))
    if at < 0:
        return False
    line, _, _ = tail[at + len(_DATA) :].partition(b"\n")
    return events.is_terminal(line.decode("utf-8", "replace"))


def _last_word(hive_id: str, error: HiveError) -> str:
    if isinstance(error, NotFound):
        return f"Hive {hive_id} was started again and the job is lost. Send it again."
    why = {"hive_lost": "it has fallen silent", "queen_stops": "the queen is stopping"}
    return f"Hive {hive_id} was lost on the way: {why.get(error.code, error.message)}"
