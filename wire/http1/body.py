"""Chunked bodies (RFC 9112 §7.1): where they end, without copying them; and what they carry."""

from __future__ import annotations

import re

from wire.http1.head import MAX_LENGTH, Malformed, fields

MAX_EXTENSIONS = 8 * 1024  # bytes of chunk extensions in one body
MAX_TRAILERS = 8 * 1024  # bytes of the trailer section

LAST_CHUNK = b"0\r\n\r\n"

_MAX_LINE = 512  # bytes of a chunk's first line: its size, and extensions that nobody reads
_EXTENSION = rb";[\t\x20-\x7e\x80-\xff]*+"
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16}+)\r\n").match
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16}+)(%b)?+\r\n" % _EXTENSION).fullmatch
_SIZE_BEGINNING = re.compile(rb"[0-9A-Fa-f]{1,16}+(?:%b)?+\r?" % _EXTENSION).fullmatch
_NOT_IN_TRAILERS = frozenset((b"content-length", b"transfer-encoding", b"host", b"trailer"))


class Chunked:
    """Scans one chunked body as it comes; every byte is fed once, in any cut."""

    __slots__ = ("_extensions", "_held", "_left", "_status", "_trailing", "ended")

    ended: bool
    """Whether the last chunk and the trailers were read."""

    def __init__(self, status: int = 400) -> None:
        """``status`` is that of the :class:`Malformed` it raises: 502 for an answer's body."""
        self.ended = False
        self._status = status
        self._left = 0  # bytes of the present chunk that are to come, its CRLF included
        self._held = b""  # the beginning of a size line, or of the trailer section
        self._trailing = False
        self._extensions = 0

    @property
    def whole(self) -> bool:
        """Whether what was fed ends where a chunk ends."""
        return not (self._left or self._held or self._trailing) or self.ended

    def feed(self, data: bytes, start: int = 0, pieces: list[bytes] | None = None) -> int:
        """Scan ``data[start:]``; return the offset behind the last chunk that ends in it.

        The offset is ``start`` where none does. All bytes are taken in: those behind the offset
        are the beginning of a chunk that the next feed goes on with. To pass the body on cut only
        where chunks end, hold them, and send them before the next feed's ``data[start:offset]``.
        Once :attr:`ended`, they are no part of the body but what follows it, and the offset is the
        body's end. ``pieces`` receives the payload, also that of a chunk which is not whole yet.

        Raises :class:`Malformed`; then nothing more may be fed, nor after the end.
        """
        size = len(data)
        at = whole = start
        if self._left or self._held or self._trailing:
            at = self._go_on(data, at, pieces)
            if not self.whole:
                return whole
            whole = at
        while at < size and not self.ended:
            line = _SIZE(data, at)
            if line is None:
                at = self._size_line(data, at)
            else:
                begin = line.end()
                length = int(line[1], 16)
                end = begin + length + 2
                if length and end <= size:
                    if data[end - 2 : end] != b"\r\n":
                        raise self._malformed(_NO_CRLF)
                    if pieces is not None:
                        pieces.append(data[begin : end - 2])
                    at = whole = end
                    continue
                at = self._begin(begin, length)
            at = self._go_on(data, at, pieces)
            if self.whole:
                whole = at
        return whole

    def _go_on(self, data: bytes, at: int, pieces: list[bytes] | None) -> int:
        """Take in more of the chunk, size line or trailers that were begun; where that ends."""
        if self._trailing:
            return self._trailers(data, at)
        if self._held:
            at = self._size_line(data, at)
        if self._left:
            at = self._chunk(data, at, pieces)
        return self._trailers(data, at) if self._trailing else at

    def _begin(self, at: int, length: int) -> int:
        """A size line said ``length``, and ended at ``at``."""
        if length > MAX_LENGTH:
            raise self._malformed(f"A chunk is over {MAX_LENGTH} bytes; send shorter ones.")
        if length:
            self._left = length + 2
        else:
            self._trailing = True
        return at

    def _size_line(self, data: bytes, at: int) -> int:
        end = data.find(b"\n", at, at + _MAX_LINE) + 1
        if not end:
            self._held += data[at : at + _MAX_LINE]
            if len(self._held) >= _MAX_LINE or not _SIZE_BEGINNING(self._held):
                raise self._malformed(_NO_SIZE)
            return len(data)
        whole_line = self._held + data[at:end]
        line = _SIZE_LINE(whole_line)
        self._held = b""
        if line is None or len(whole_line) > _MAX_LINE:
            raise self._malformed(_NO_SIZE)
        self._extensions += len(line[2] or b"")
        if self._extensions > MAX_EXTENSIONS:
            raise self._malformed("The chunks have too long extensions; send none.")
        return self._begin(end, int(line[1], 16))

    def _chunk(self, data: bytes, at: int, pieces: list[bytes] | None) -> int:
        end = at + self._left
        payload = max(end - 2, at)
        if not b"\r\n"[-self._left :].startswith(data[payload:end]):
            raise self._malformed(_NO_CRLF)
        if pieces is not None and at < min(payload, len(data)):
            pieces.append(data[at:payload])
        self._left = max(end - len(data), 0)
        return min(end, len(data))

    def _trailers(self, data: bytes, at: int) -> int:
        while not self.ended and at < len(data):
            end = data.find(b"\n", at, at + MAX_TRAILERS) + 1
            self._held += data[at : end or at + MAX_TRAILERS]
            if len(self._held) >= MAX_TRAILERS:
                raise self._malformed(f"The trailers reach {MAX_TRAILERS} bytes; send less.")
            if not end:
                return len(data)
            at = end
            if not self._held.endswith(b"\r\n"):
                raise self._malformed("A trailer's line ends in a bare LF; end each with CRLF.")
            if self._held == b"\r\n" or self._held.endswith(b"\r\n\r\n"):
                self._end(self._held[:-2])
        return at

    def _end(self, trailers: bytes) -> None:
        self._held = b""
        self.ended = True
        if not trailers:
            return
        try:
            names = {name for name, _ in fields(trailers)}
        except ValueError:
            raise self._malformed("The trailers are no fields; send 'Name: value' lines.") from None
        if names & _NOT_IN_TRAILERS:
            raise self._malformed("A trailer says what only a head may; send it there.")

    def _malformed(self, message: str) -> Malformed:
        return Malformed(self._status, message)


_NO_SIZE = "A chunk does not begin with its size in hexadecimal digits and CRLF; send that."
_NO_CRLF = "A chunk is not followed by CRLF where its size says that it ends; send its true size."


def chunk(payload: bytes) -> bytes:
    """One chunk of ``payload``, which must not be empty: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
