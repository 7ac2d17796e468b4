"""The hive's end of a trunk: takes requests, and sends their answers as far as credit goes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import unquote

from starlette.types import Scope

from operations.errors import Forbidden, HiveError, Unauthorized, Unavailable, WorkerBroke
from wire import errors
from wire.answering import Answering
from wire.gate import Gate
from wire.http1.head import Header
from wire.keys import Caller
from wire.proof import refused_signature
from wire.trunk.frames import (
    CANCEL,
    CREDIT,
    DATA,
    END,
    ERROR,
    HEAD,
    MAX_DATA,
    OPEN,
    PART,
    PROTOCOL,
    TrunkError,
    credited,
)
from wire.trunk.link import PING_S, SILENT_S, Counters, Link
from wire.trunk.messages import Open, error_payload, head_payload, open_of, open_parts

log = logging.getLogger(__name__)

PATH: Final = "/v1/trunk"
SWITCHING: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\n"
    b"connection: Upgrade\r\n"
    b"upgrade: " + PROTOCOL.encode() + b"\r\n\r\n"
)
MAX_STREAMS = 10_000
MAX_CREDIT = 2**31 - 1


class Answer(Answering):
    """The answer to one request.

    Bytes of the body come cut where a chunk ends. What has no credit is held; ``writable`` then
    says to write no more for now. After the end, and when the caller has gone, nothing is sent.
    """

    __slots__ = ("_credit", "_held", "_last", "_limit", "_number", "_trunk", "held", "request_id")

    def __init__(self, trunk: ServedTrunk, number: int, window: int, limit: int) -> None:
        """
        :param window: bytes that may be sent before any are granted again
        :param limit: bytes of one frame
        """
        super().__init__()
        self._trunk = trunk
        self._number = number
        self._credit = window
        self._limit = limit
        self._held: deque[tuple[int, bytes]] = deque()
        self._last: tuple[int, bytes] | None = None
        self.held = 0
        """Bytes that wait."""
        self.request_id = ""

    @property
    def writable(self) -> bool:
        return not self._held

    def head(self, status: int, headers: Sequence[Header], *, length: int | None) -> None:
        """Begin. :param length: of the body, bytes; None for one whose chunks follow

        :raises WorkerBroke: the headers are too large
        """
        if self.gone or self.ended:
            return
        fields = tuple(headers)
        if length is not None:
            fields += ((b"content-length", b"%d" % length),)
        payload = head_payload(status, fields, length is None)
        self.started = True
        self.chunked = length is None
        self._trunk.send(HEAD, self._number, payload)

    def write(self, data: bytes) -> None:
        """More of the body."""
        size = len(data)
        if not size or self.gone or self.ended:
            return
        if self._held or size > self._credit or size > self._limit or self._trunk.paused:
            self._hold(data)
        else:
            self._credit -= size
            self._trunk.send(DATA, self._number, data)

    def whole(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        """All of it."""
        self.head(status, headers, length=len(body))
        self.write(body)
        self.end()

    def end(self) -> None:
        """It is complete."""
        self._finish(END, b"")

    def fail(self, error: HiveError) -> None:
        """It ends here in an error, instead of a head or after what was written."""
        if not self.ended:
            self._finish(ERROR, error_payload(error, self.request_id))

    def abort(self) -> None:
        """It cannot be completed, and nobody can say why."""
        self.fail(WorkerBroke("The worker ended before its answer did. Send the request again."))

    # -- for the trunk -------------------------------------------------------------------------

    def granted(self, more: int) -> None:
        """:raises TrunkError: it is more than anybody can mean"""
        self._credit += more
        if not more or self._credit > MAX_CREDIT:
            raise TrunkError(f"CREDIT of {more} bytes for stream {self._number}")
        self.go_on()

    def go_on(self) -> None:
        """Send what waits, as far as credit and connection go."""
        if not self._held:
            return
        while self._held and not self._trunk.paused:
            kind, piece = self._held[0]
            if len(piece) > self._credit:
                return
            self._held.popleft()
            self._credit -= len(piece)
            self.held -= len(piece)
            self._trunk.send(kind, self._number, piece)
        if self._held:
            return
        self._trunk.waits(self._number, False)
        if self._last is not None:
            self._trunk.end_of(self._number, *self._last)
        else:
            self.on_writable(True)

    def lost(self) -> None:
        """Nobody waits for it any more."""
        self._held.clear()
        self.held = 0
        self.gone = True
        if not self.ended:
            self.on_gone()

    def _hold(self, data: bytes) -> None:
        was_writable = self.writable
        pieces = [data[at : at + self._limit] for at in range(0, len(data), self._limit)]
        self._held.extend((PART, piece) for piece in pieces[:-1])
        self._held.append((DATA, pieces[-1]))
        self.held += len(data)
        self._trunk.waits(self._number, True)
        if was_writable:
            self.on_writable(False)
            self.go_on()

    def _finish(self, kind: int, payload: bytes) -> None:
        if self.ended or self.gone:
            return
        if kind == END and not self.started:
            self.abort()  # there is no answer without a head
            return
        self.ended = True
        if self._held:
            self._last = (kind, payload)
        else:
            self._trunk.end_of(self._number, kind, payload)


Serve = Callable[[Open, bytes, Answer], None]
"""Begins to serve a request, head and body, and returns at once."""

Verify = Callable[[Open, bytes], None]
"""Lets a request in. Raises HiveError: it is refused."""


class ServedTrunk(Link):
    """One connection of a queen."""

    __slots__ = ("_answers", "_highest", "_serve", "_verify", "_waiting")

    def __init__(
        self,
        name: str,
        serve: Serve,
        verify: Verify,
        *,
        ping_s: float = PING_S,
        silent_s: float = SILENT_S,
    ) -> None:
        """:param name: how messages call the other end (``queen queen-1f3a``)"""
        super().__init__("hive", name, ping_s=ping_s, silent_s=silent_s)
        self._serve = serve
        self._verify = verify
        self._answers: dict[int, Answer] = {}
        self._waiting: dict[int, Answer] = {}
        self._highest = 0

    def counters(self) -> Counters:
        return Counters(
            streams=len(self._answers),
            held=sum(answer.held for answer in self._answers.values()),
            frames_in=self.frames_in,
            frames_out=self.frames_out,
        )

    def end_of(self, number: int, kind: int, payload: bytes) -> None:
        """The last frame of a stream."""
        if self._answers.pop(number, None) is not None:
            self.send(kind, number, payload)

    def waits(self, number: int, waiting: bool) -> None:
        """Whether a stream holds what could not be sent yet."""
        if not waiting:
            self._waiting.pop(number, None)
        elif number in self._answers:
            self._waiting[number] = self._answers[number]

    def _take(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == OPEN:
            self._opened(stream, payload)
            return
        if kind != CREDIT and kind != CANCEL:
            raise self.misplaced(kind, stream)
        if stream > self._highest:
            raise self.misplaced(kind, stream)
        answer = self._answers.get(stream)
        if answer is None:
            return  # it ended while this was under way
        if kind == CANCEL:
            self._forget(stream, answer)
            self.send(END, stream)
            return
        self._guarded(answer, lambda: answer.granted(credited(payload)))

    def _guarded(self, answer: Answer, do: Callable[[], None]) -> None:
        """What serves one stream may break; the others have no part in it."""
        try:
            do()
        except TrunkError:
            raise
        except HiveError as error:
            answer.fail(error)
        except Exception:  # whoever waits for this answer is told
            log.exception("serving a request of the %s broke", self.name)
            answer.fail(HiveError(errors.BROKEN))

    def _opened(self, number: int, payload: bytes) -> None:
        if number <= self._highest:
            raise TrunkError(f"OPEN of stream {number} after {self._highest}")
        self._highest = number
        assert self.theirs is not None
        limit = min(MAX_DATA, self.theirs.frame)
        answer = self._answers[number] = Answer(self, number, self.theirs.credit, limit)
        said, body = open_parts(payload)

        def serve() -> None:
            head = open_of(said, body)
            answer.request_id = head.request_id
            self._room()
            self._verify(head, body)
            self._serve(head, body, answer)

        self._guarded(answer, serve)

    def _room(self) -> None:
        """:raises Unavailable: this trunk takes no more"""
        if self._goodbye or len(self._answers) > MAX_STREAMS:
            why = "is stopping" if self._goodbye else f"serves {MAX_STREAMS} requests at once"
            raise Unavailable(f"The hive {why}. Send the request again.", code="trunk_not_ready")

    def _resumed(self) -> None:
        for number in list(self._waiting):
            if self.paused:
                return
            if (answer := self._waiting.pop(number, None)) is not None:
                self._waiting[number] = answer  # whoever still waits then, waits behind the others
                self._guarded(answer, answer.go_on)

    def _forget(self, number: int, answer: Answer) -> None:
        self._answers.pop(number, None)
        self._waiting.pop(number, None)
        self._guarded(answer, answer.lost)

    def _lost(self, reason: str) -> None:
        for number, answer in list(self._answers.items()):
            self._forget(number, answer)


class TrunkServer:
    """The trunks of a hive."""

    def __init__(
        self, gate: Gate, serve: Serve, *, ping_s: float = PING_S, silent_s: float = SILENT_S
    ) -> None:
        """:param gate: lets each request in, as it does those that come by HTTP"""
        self._gate = gate
        self._serve = serve
        self._ping_s = ping_s
        self._silent_s = silent_s
        self._trunks: set[ServedTrunk] = set()
        self._stopping = False

    def take(
        self, caller: Caller, host: str, transport: asyncio.Transport, rest: bytes = b""
    ) -> ServedTrunk:
        """Answer ``101`` to a request for :data:`PATH` that was let in, and speak frames then.

        :param caller: who has sent it
        :param host: its ``Host``
        :param rest: what has been read behind its head
        :raises Forbidden: it is no daemon's
        :raises Unavailable: this hive is stopping
        """
        if caller.kind not in ("daemon", "local"):
            raise Forbidden(
                "A trunk is for queens, which prove themselves. Send requests to the routes that "
                "the README lists.",
                code="not_a_daemon",
            )
        if self._stopping:
            raise Unavailable("This hive is stopping. Ask another one.")
        self._trunks = {trunk for trunk in self._trunks if not trunk.closed}
        trunk = ServedTrunk(
            caller.id.replace(":", " ", 1) or "queen",
            self._serve,
            self._verify(transport, host),
            ping_s=self._ping_s,
            silent_s=self._silent_s,
        )
        self._trunks.add(trunk)
        transport.write(SWITCHING)
        trunk.take_over(transport, rest)
        return trunk

    def drain(self) -> None:
        """Take no new requests; those that run go on."""
        self._stopping = True
        for trunk in self._trunks:
            trunk.go_away("this hive is stopping")

    def close(self) -> None:
        """End what is left. Fine to call twice."""
        self._stopping = True
        for trunk in self._trunks:
            trunk.close("this hive has stopped")

    def counters(self) -> list[Counters]:
        """Of each trunk that is open."""
        return [trunk.counters() for trunk in self._trunks if not trunk.closed]

    def _verify(self, transport: asyncio.Transport, host: str) -> Verify:
        """A request on a trunk is signed like any other; so whoever breaks into the connection
        cannot add any."""
        trust = self._gate.trust
        addresses = {
            "client": transport.get_extra_info("peername"),
            "server": transport.get_extra_info("sockname"),
        }

        def scope_of(head: Open) -> Scope:
            return {
                **addresses,
                "type": "http",
                "method": head.method,
                "path": unquote(head.path),
                "raw_path": head.path.encode(),
                "query_string": head.query.encode(),
            }

        def verify(head: Open, body: bytes) -> None:
            try:
                digest = trust.signed(head.method, head.target, head.headers)
            except Unauthorized as error:
                trust.tell(scope_of(head), error)
                raise
            if digest is None:
                admitted = self._gate.admit(scope_of(head), {**head.headers, "host": host})
                digest = admitted.digest
                if admitted.granted or admitted.caller.kind not in ("daemon", "local"):
                    raise refused_signature("bad_signature")
            if digest not in (None, hashlib.sha256(body).hexdigest()):
                raise refused_signature("bad_signature")

        return verify
