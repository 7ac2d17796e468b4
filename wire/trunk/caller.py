"""The queen's end of a trunk: opens streams, and passes on what comes back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from operations.errors import HiveError, WorkerBroke
from wire import errors
from wire.headers import SESSION_HEADER
from wire.http1.client import NoAnswer, Sink, Unreachable
from wire.trunk.frames import (
    CANCEL,
    CREDIT,
    DATA,
    END,
    ERROR,
    GRANT,
    HEAD,
    LAST_STREAM,
    MAX_BODY,
    OPEN,
    PART,
    TrunkError,
    credit,
)
from wire.trunk.link import PING_S, SILENT_S, Counters, Link
from wire.trunk.messages import OURS, Open, error_of, head_of, open_payload

log = logging.getLogger(__name__)


Sign = Callable[[str, str, bytes, Mapping[str, str]], str | None]
"""Makes the signature of a request: method, target, body, headers. None where nobody signs."""


class Stream:
    """One request on the trunk, and its answer.

    It ends in exactly one of the sink's ``end`` and ``failed``, or in :meth:`cancel`; the sink
    is called no more then.
    """

    __slots__ = ("_left", "_number", "_sink", "_spent", "_trunk", "started", "whole")

    def __init__(self, trunk: Trunk, number: int, sink: Sink) -> None:
        self._trunk = trunk
        self._number = number
        self._sink = sink
        self._left = OURS.credit
        self._spent = 0
        self.started = False
        """The head of the answer has come."""
        self.whole = True
        """Whether the data given so far ends where an event may be added."""

    def flow(self, wanted: bool) -> None:
        """What is not told to have passed is not granted again: the window is enough."""

    def passed(self, count: int) -> None:
        """So many bytes of the answer were passed on: the hive may send as many more.

        Bytes that a slow caller has not taken yet are not to be told.
        """
        self._spent += count
        if self._spent >= GRANT:
            granted, self._spent = self._spent, 0
            self._left += granted
            self._trunk.grant(self._number, granted)

    def cancel(self) -> None:
        """Nobody wants the answer any more. Fine when it has ended."""
        self._trunk.cancel(self._number)

    # -- what the trunk tells ------------------------------------------------------------------

    def takes(self, kind: int, payload: bytes) -> None:
        """Pass a frame on. :raises TrunkError: it must not come now"""
        if DATA <= kind <= PART:
            self._left -= len(payload)
            if self._left < 0:
                raise TrunkError(f"stream {self._number} sent more than its credit")
            if not self.started:
                raise TrunkError(f"data of stream {self._number} before its HEAD")
            self.whole = kind == DATA
            self._sink.data(payload)
        elif kind == HEAD:
            if self.started:
                raise TrunkError(f"a second HEAD of stream {self._number}")
            self._began(payload)
        elif kind == END:
            if not (self.started and self.whole):
                raise TrunkError(f"END of stream {self._number} before its answer's")
            self._trunk.ended(self._number)
            self._sink.end()
        elif kind == ERROR:
            self._trunk.ended(self._number)
            self.failed(error_of(payload, self._trunk.name))
        else:
            raise self._trunk.misplaced(kind, self._number)

    def failed(self, error: HiveError) -> None:
        self._sink.failed(error, self.started)

    @property
    def owed(self) -> int:
        return OURS.credit - self._left

    def _began(self, payload: bytes) -> None:
        try:
            status, headers, chunked = head_of(payload)
        except ValueError:
            self.cancel()
            self.failed(
                WorkerBroke(
                    f"The {self._trunk.name} answered with headers that HTTP does not know. "
                    "Look at its log.",
                    hop="hive",
                )
            )
            return
        self.started = True
        self._sink.head(status, headers, chunked)


class Trunk(Link):
    """One connection to a hive, for many requests."""

    __slots__ = ("_cancelled", "_next", "_sign", "_streams")

    def __init__(
        self,
        name: str,
        sign: Sign | None = None,
        *,
        ping_s: float = PING_S,
        silent_s: float = SILENT_S,
    ) -> None:
        """
        :param name: how messages call the hive (``hive gpu-0``)
        :param sign: signs each request, as those that go by HTTP
        """
        super().__init__("queen", name, ping_s=ping_s, silent_s=silent_s)
        self._sign = sign
        self._streams: dict[int, Stream] = {}
        self._cancelled: set[int] = set()
        self._next = 1

    @property
    def ready(self) -> bool:
        """Whether a request may go this way now: greeted, not leaving, and not congested."""
        return self.theirs is not None and not (self.over.is_set() or self.paused)

    def takes(self, body: bytes) -> bool:
        """Whether a request with this body may go this way."""
        return self.theirs is not None and len(body) <= min(MAX_BODY, self.theirs.body)

    def open(self, head: Open, body: bytes, sink: Sink) -> Stream:
        """Send a request; ``sink`` is told of the answer, and never within this call.

        :raises Unavailable: none can go this way now, and this one has not
        :raises InvalidRequest, TooLarge: this one cannot
        """
        if not self.ready:
            raise Unreachable(
                f"The trunk to the {self.name} takes no request now. Send it by HTTP, or again.",
                hop="queen",
            )
        if self._sign is not None:
            signed = self._sign(head.method, head.target, body, head.headers)
            if signed is not None:
                headers = {**head.headers, SESSION_HEADER: signed}
                head = Open(head.path, head.request_id, headers, head.query, head.method)
        payload = open_payload(head, body)
        number, self._next = self._next, self._next + 1
        stream = self._streams[number] = Stream(self, number, sink)
        self.send(OPEN, number, payload)
        if self._next > LAST_STREAM:
            self.retire("its numbers are used up")
        return stream

    def retire(self, reason: str) -> None:
        """Open no more streams; close when the last one has ended."""
        self.go_away(reason)
        self.over.set()
        self._close_if_idle()

    def cancel(self, number: int) -> None:
        if self._streams.pop(number, None) is not None and not self.closed:
            self._cancelled.add(number)
            self.send(CANCEL, number)

    def ended(self, number: int) -> None:
        del self._streams[number]
        self._close_if_idle()

    def grant(self, number: int, more: int) -> None:
        if number in self._streams:
            self.send(CREDIT, number, credit(more))

    def counters(self) -> Counters:
        return Counters(
            streams=len(self._streams) + len(self._cancelled),
            owed=sum(stream.owed for stream in self._streams.values()),
            frames_in=self.frames_in,
            frames_out=self.frames_out,
        )

    def _take(self, kind: int, stream: int, payload: bytes) -> None:
        found = self._streams.get(stream)
        if found is None:
            self._stray(kind, stream)
            return
        try:
            found.takes(kind, payload)
        except TrunkError:
            raise
        except Exception:  # the others on this trunk have no part in it
            log.exception("what waits for an answer of the %s broke", self.name)
            found.cancel()
            self._fail(found, HiveError(errors.BROKEN))

    def _stray(self, kind: int, stream: int) -> None:
        """A frame of a stream that runs no more; a cancelled one may not know that yet."""
        if stream not in self._cancelled or kind in (OPEN, CANCEL, CREDIT):
            raise self.misplaced(kind, stream)
        if kind in (END, ERROR):
            self._cancelled.discard(stream)
            self._close_if_idle()

    def _leaves(self) -> None:
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self.over.is_set() and not (self._streams or self._cancelled):
            self.close("nothing runs on it any more")

    def _lost(self, reason: str) -> None:
        streams = list(self._streams.values())
        self._streams.clear()
        self._cancelled.clear()
        for stream in streams:
            broke = WorkerBroke if stream.started else NoAnswer
            what = f"The connection to the {self.name} ended before its answer did"
            self._fail(stream, broke(f"{what}. Send the request again.", hop="hive"))

    def _fail(self, stream: Stream, error: HiveError) -> None:
        try:
            stream.failed(error)
        except Exception:  # the others are to be told, too
            log.exception("what waits for an answer of the %s broke", self.name)
