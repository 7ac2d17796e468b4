"""What both ends of a trunk share: greeting, liveness, writing, and the end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Literal, cast

from wire.trunk.frames import (
    DATA,
    GOAWAY,
    HELLO,
    PART,
    PING,
    PONG,
    SHAPES,
    Decoder,
    TrunkError,
    header,
)
from wire.trunk.messages import (
    OURS,
    Hello,
    goaway_payload,
    hello_of,
    hello_payload,
    reason_of,
)

log = logging.getLogger(__name__)

PING_S = 5.0
SILENT_S = 15.0
LINGER_S = 1.0  # the last frame, which says why, may take so long to leave
JOINED_BYTES = 64 * 1024
"""So much is joined into one write before the loop's iteration ends."""
TOGETHER_S = 0.003
MANY = 1000  # frames of data a second; fewer leave at once, each by itself
HIGH_WATER = 1024 * 1024


@dataclass(frozen=True)
class Counters:
    """What a trunk holds; all but the frames are zero when nothing runs.

    :param streams: opened, and not yet ended by the hive
    :param owed: bytes of answers that have come and are not granted again
    :param held: bytes of answers that wait for credit, or for the connection
    """

    streams: int = 0
    owed: int = 0
    held: int = 0
    frames_in: int = 0
    frames_out: int = 0


class Link(asyncio.Protocol):
    """One end of a trunk, on a connection that has been HTTP until now.

    Frames of one iteration of the loop leave in one write. Whatever the other end does wrong
    closes the trunk: the streams end, each in its own error, and nothing is raised.
    """

    __slots__ = (
        "_data",
        "_data_at",
        "_decoder",
        "_goodbye",
        "_heard_at",
        "_later",
        "_left_together",
        "_linger",
        "_loop",
        "_out",
        "_owes_pong",
        "_ping_s",
        "_silent_s",
        "_tick",
        "_transport",
        "_unsent",
        "closed",
        "frames_in",
        "frames_out",
        "going",
        "greeted",
        "name",
        "over",
        "paused",
        "reason",
        "role",
        "theirs",
    )

    def __init__(
        self,
        role: Literal["queen", "hive"],
        name: str,
        *,
        ping_s: float = PING_S,
        silent_s: float = SILENT_S,
    ) -> None:
        """
        :param role: of this end
        :param name: how messages call the other one (``hive gpu-0``)
        """
        self.role = role
        self.name = name
        self.theirs: Hello | None = None
        self.greeted = asyncio.Event()
        """The other end's HELLO is here, or never will be."""
        self.over = asyncio.Event()
        """No new streams: the trunk is closed, or the other end is going."""
        self.closed = False
        self.going = False
        self.paused = False
        """The connection takes no more for now."""
        self.reason = ""
        """Why it closed."""
        self.frames_in = 0
        self.frames_out = 0
        self._ping_s = ping_s
        self._silent_s = silent_s
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._unsent = 0
        self._later: asyncio.TimerHandle | None = None
        self._data = 0  # frames of it in what waits
        self._left_together = 0  # so many were in the last write that had any
        self._data_at = float("-inf")  # and when that was
        self._owes_pong = False
        self._heard_at = self._loop.time()
        self._tick: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._goodbye = False

    def take_over(self, transport: asyncio.Transport, data: bytes = b"") -> None:
        """Speak frames on this connection from now on.

        :param data: what has been read already and belongs to the trunk
        """
        transport.set_protocol(self)
        self.connection_made(transport)
        if data:
            self.data_received(data)

    def send(self, kind: int, stream: int = 0, payload: bytes = b"") -> None:
        """Send a frame, with others of this iteration of the loop; nothing on a closed trunk.

        Where data comes by the thousand a second it waits for three milliseconds, and leaves with
        what has come meanwhile: to be woken for each costs the other end more than the rest of it.
        """
        if self.closed:
            return
        out = self._out
        token = DATA <= kind <= PART
        if not out or (not token and self._later is not None):
            self._soon(token)
        if token:
            self._data += 1
        out.append(header(len(payload), kind, stream))
        out.append(payload)
        self.frames_out += 1
        self._unsent += len(payload)
        if self._unsent > JOINED_BYTES:
            self.flush()

    def _soon(self, token: bool) -> None:
        """Have what is sent now written."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if token and (self._loop.time() - self._data_at) * MANY < self._left_together:
            self._later = self._loop.call_later(TOGETHER_S, self.flush)
        else:
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what has been sent so far."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._out and self._transport is not None:
            if self._data:
                self._left_together, self._data = self._data, 0
                self._data_at = self._loop.time()
            data = b"".join(self._out)
            self._out.clear()
            self._unsent = 0
            self._transport.write(data)

    def go_away(self, reason: str) -> None:
        """Ask for no new streams; those that run go on, and then the queen closes the trunk."""
        if not self.closed and not self._goodbye:
            self._goodbye = True
            self.send(GOAWAY, 0, goaway_payload(reason))

    def close(self, reason: str) -> None:
        """Close now, and tell the other end why; fine to call twice."""
        if self.closed:
            return
        self.send(GOAWAY, 0, goaway_payload(reason))
        self.flush()
        self._end(reason)
        if self._transport is not None:
            self._transport.close()
            self._linger = self._loop.call_later(LINGER_S, self._transport.abort)

    # -- the connection ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(HIGH_WATER)
        self._heard_at = self._loop.time()
        self._tick = self._loop.call_later(self._ping_s, self._ticks)
        self.send(HELLO, 0, hello_payload(OURS))

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        count = 0
        try:
            for kind, stream, payload in self._decoder.feed(data):
                if self.closed:
                    return
                count += 1
                if stream and self.theirs is not None:
                    self._take(kind, stream, payload)
                else:
                    self._take_own(kind, payload)
        except TrunkError as error:
            self.close(error.reason)
        finally:
            self.frames_in += count
        if self._owes_pong and not self.paused:
            self._owes_pong = False
            self.send(PONG)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._resumed()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._linger is not None:
            self._linger.cancel()
        if not self.closed:
            self._end("the connection ended")
        self._transport = None

    # -- what an end does with what it is told -------------------------------------------------

    def _take(self, kind: int, stream: int, payload: bytes) -> None:
        """A frame of a stream. :raises TrunkError: it must not come now"""
        raise NotImplementedError

    def _resumed(self) -> None:
        """The connection takes more again."""

    def _lost(self, reason: str) -> None:
        """The trunk is closed; end what runs on it."""
        raise NotImplementedError

    def _leaves(self) -> None:
        """The other end goes away."""

    def misplaced(self, kind: int, stream: int) -> TrunkError:
        """A frame that this end does not get, or not for this stream."""
        return TrunkError(f"{SHAPES[kind].name} that does not belong to stream {stream}")

    def _take_own(self, kind: int, payload: bytes) -> None:
        if (kind == HELLO) is (self.theirs is not None):
            name = SHAPES[kind].name
            raise TrunkError("a second HELLO" if self.theirs else f"{name} before HELLO")
        if kind == HELLO:
            self.theirs = hello_of(payload)
            self.greeted.set()
        elif kind == PING:
            self._owes_pong = True  # one answers all that have come together
        elif kind == GOAWAY:
            log.info("the trunk to the %s: it goes away: %s", self.name, reason_of(payload))
            self.going = True
            self.over.set()
            self._leaves()

    def _ticks(self) -> None:
        silent = self._loop.time() - self._heard_at
        if silent >= self._silent_s:
            self.close(f"nothing was heard for {silent:.0f} s")
            return
        self._tick = self._loop.call_later(self._ping_s, self._ticks)
        if not self.paused:
            self.send(PING)

    def _end(self, reason: str) -> None:
        self.closed = True
        self.reason = reason
        self._out.clear()
        for timer in (self._tick, self._later):
            if timer is not None:
                timer.cancel()
        log.info("the trunk to the %s is closed: %s", self.name, reason)
        self._lost(reason)
        self.greeted.set()
        self.over.set()
