"""An answer's body as it is passed on: the bytes that came, cut only where more may be added.

Who passes a stream on may have to end it with something of its own, an error event. That can only
follow a whole chunk, and in a stream of events a whole event. Both bodies here hold back what is
not whole yet, and end with the body's last byte: what comes behind it is no part of it.

An engine that sends each event as a chunk, as engines do, has its bytes passed on as they came,
without a copy where a read ends with a chunk. Where chunks and events do not fall together, or a
chunk is large, the payload is taken out and framed anew: the caller gets each event as soon as it
is whole, however it was cut; chunk extensions and trailers are dropped then, as RFC 9112 §7.1 lets
every recipient do.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from wire.http1.body import LAST_CHUNK, Chunked, chunk

EVENT_BYTES: Final = 1024 * 1024  # of an event that are held; a longer one is passed on in parts
CHUNK_BYTES: Final = 16 * 1024  # of a chunk that are held; a longer one is framed anew

BAD_ANSWER: Final = 502

_CR: Final = ord("\r")
_EVENT_ENDS: Final = (b"\n\n", b"\n\r\n", b"\r\r")
_EVENT_AND_CHUNK_END: Final = b"\n\n\r\n"
_TWO_BYTES_LONG: Final = re.compile(rb"0*2(?:;.*)?").fullmatch


class Body(Protocol):
    """One answer's body."""

    ended: bool
    surplus: bool
    """Whether more came than belongs to it; its connection cannot be used again."""

    @property
    def whole(self) -> bool:
        """Whether what was passed on ends where an event ends; True where there are none."""

    def feed(self, data: bytes) -> bytes:
        """What may be passed on now that ``data`` came; empty for nothing.

        Must not be called when it has ended. Raises :class:`~wire.http1.head.Malformed`.
        """

    def close(self) -> bytes | None:
        """The connection has ended: what was held back; None if that cuts the body short."""


class Plain:
    """A body without chunks.

    :param length: in bytes; None for one that ends with its connection
    :param events: whether it is a stream of events
    """

    __slots__ = ("_events", "_left", "ended", "surplus")

    def __init__(self, length: int | None, *, events: bool) -> None:
        self._left = length
        self._events = _Events() if events else None
        self.ended = length == 0
        self.surplus = False

    @property
    def whole(self) -> bool:
        return self._events is None or self._events.whole

    def feed(self, data: bytes) -> bytes:
        if self._left is not None:
            if len(data) > self._left:
                data, self.surplus = data[: self._left], True
            self._left -= len(data)
            self.ended = not self._left
        if self._events is None:
            return data
        passed = self._events.feed(data)
        return passed + self._events.rest() if self.ended else passed

    def close(self) -> bytes | None:
        if self._left is not None:
            return None
        self.ended = True
        return b"" if self._events is None else self._events.rest()


class Chunks:
    """A chunked body; what is passed on is whole chunks.

    :param events: whether it is a stream of events
    """

    __slots__ = ("_events", "_reframing", "_rest", "_scanner", "ended", "surplus")

    def __init__(self, *, events: bool) -> None:
        self._scanner = Chunked(BAD_ANSWER)
        self._events = _Events() if events else None
        self._rest = b""  # the beginning of a chunk, where the chunks are passed on as they came
        self._reframing = False
        self.ended = False
        self.surplus = False

    @property
    def whole(self) -> bool:
        return self._events is None or self._events.whole

    def feed(self, data: bytes) -> bytes:
        if self._reframing:
            return self._reframe(data)
        end = self._scanner.feed(data)
        if end == len(data) and not self._rest:
            if data.endswith(_EVENT_AND_CHUNK_END) and data[-5] != _CR:
                return data
            if self._may_cut(data, end):
                self.ended = self._scanner.ended
                return data
        return self._hold(data, end)

    def close(self) -> bytes | None:
        return None

    def _may_cut(self, raw: bytes, end: int) -> bool:
        return self._events is None or self._scanner.ended or _event_ends(raw, end)

    def _hold(self, data: bytes, end: int) -> bytes:
        """The rare case: this read does not end with a chunk, or its last chunk with an event."""
        raw = self._rest + data
        if end:
            end += len(self._rest)
            if self._may_cut(raw, end):
                self.ended = self._scanner.ended
                self.surplus = self.ended and end < len(raw)
                self._rest = raw[end:]
                return raw[:end]
        elif len(raw) <= CHUNK_BYTES:
            self._rest = raw
            return b""
        self._rest = b""
        self._reframing = True
        self._scanner = Chunked(BAD_ANSWER)  # raw begins where a chunk does
        return self._reframe(raw)

    def _reframe(self, raw: bytes) -> bytes:
        pieces: list[bytes] = []
        end = self._scanner.feed(raw, 0, pieces)
        payload = b"".join(pieces)
        if self._events is not None:
            payload = self._events.feed(payload)
        if self._scanner.ended:
            self.ended = True
            self.surplus = end < len(raw)
            if self._events is not None:
                payload += self._events.rest()
            return (chunk(payload) if payload else b"") + LAST_CHUNK
        between = self._events is None or (self._events.empty and self._events.whole)
        self._reframing = not (self._scanner.whole and between)
        return chunk(payload) if payload else b""


class _Events:
    """The payload of a stream of events, cut where an event ends (WHATWG HTML, section 9.2)."""

    __slots__ = ("_held", "whole")

    def __init__(self) -> None:
        self._held = bytearray()
        self.whole = True  # what was passed on ends with an event

    @property
    def empty(self) -> bool:
        return not self._held

    def feed(self, payload: bytes) -> bytes:
        """All events that are whole now. One over 1 MiB is passed on in parts."""
        held = self._held
        if not held and payload.endswith(b"\n\n"):
            self.whole = True
            return payload
        searched = max(0, len(held) - 2)  # no end of an event was found before it
        held += payload
        ends = (at + len(mark) for mark in _EVENT_ENDS if (at := held.rfind(mark, searched)) >= 0)
        end = max(ends, default=0)
        if not end and len(held) > EVENT_BYTES:
            self.whole = False
            return self.rest()
        if not end:
            return b""
        self.whole = True
        passed = bytes(held[:end])
        del held[:end]
        return passed

    def rest(self) -> bytes:
        """What is held, with nothing to come behind it."""
        passed = bytes(self._held)
        self._held.clear()
        return passed


def _event_ends(raw: bytes, end: int) -> bool:
    """Whether the payload of ``raw[:end]``, which are whole chunks, surely ends with an event.

    False where it takes the payload to know: a chunk's own line breaks look like those of an
    event where its payload is one line break alone.
    """
    if raw.endswith(_EVENT_AND_CHUNK_END, 0, end):
        return raw[end - 5] != _CR
    if raw.endswith(b"\r\n\r\n\r\n", 0, end):
        line = raw[raw.rfind(b"\n", 0, end - 6) + 1 : end - 6]
        return _TWO_BYTES_LONG(line) is None
    return False
