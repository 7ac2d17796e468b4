"""Frames of the trunk between a queen and a hive, as bytes; ``docs/trunk.md`` describes them.

A frame is a header of 9 bytes, big-endian ``u32 length, u8 kind, u32 stream``, and a payload of
``length`` bytes. Streams are numbered from 1; what concerns the whole trunk says 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

VERSION: Final = 1
PROTOCOL: Final = "hive-trunk/1"
LAST_STREAM: Final = 2**32 - 1

HELLO: Final = 1
OPEN: Final = 2
HEAD: Final = 3
DATA: Final = 4
PART: Final = 5
END: Final = 6
ERROR: Final = 7
CANCEL: Final = 8
CREDIT: Final = 9
PING: Final = 10
PONG: Final = 11
GOAWAY: Final = 12

MAX_DATA: Final = 64 * 1024
MAX_BODY: Final = 256 * 1024
"""Bytes of a request's body; a larger one goes another way."""
WINDOW: Final = 256 * 1024
"""Bytes of an answer that may be under way before its reader has passed any on."""
MIN_WINDOW: Final = 2 * MAX_DATA
GRANT: Final = 64 * 1024
"""So many bytes are passed on before new credit is given: ``MIN_WINDOW - GRANT`` holds a frame."""

Frame = tuple[int, int, bytes]
"""kind, stream, payload"""


class TrunkError(Exception):
    """The other end broke the rules; the trunk is closed with this reason, and nothing else is."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Shape:
    """What a frame of one kind must look like.

    :param least, most: bytes of payload
    :param streamed: it belongs to a stream, and not to the whole trunk
    """

    name: str
    sender: Literal["queen", "hive", "both"]
    streamed: bool
    least: int
    most: int


SHAPES: Final = {
    HELLO: Shape("HELLO", "both", False, 2, 4096),
    OPEN: Shape("OPEN", "queen", True, 2, 2 + 0xFFFF + MAX_BODY),
    HEAD: Shape("HEAD", "hive", True, 2, 64 * 1024),
    DATA: Shape("DATA", "hive", True, 1, MAX_DATA),
    PART: Shape("PART", "hive", True, 1, MAX_DATA),
    END: Shape("END", "hive", True, 0, 0),
    ERROR: Shape("ERROR", "hive", True, 2, 64 * 1024),
    CANCEL: Shape("CANCEL", "queen", True, 0, 0),
    CREDIT: Shape("CREDIT", "queen", True, 4, 4),
    PING: Shape("PING", "both", False, 0, 0),
    PONG: Shape("PONG", "both", False, 0, 0),
    GOAWAY: Shape("GOAWAY", "both", False, 2, 1024),
}

_HEADER = struct.Struct("!IBI")
_HEADER_BYTES = _HEADER.size
_CREDIT = struct.Struct("!I")
_unpack = _HEADER.unpack_from
header = _HEADER.pack
"""``header(length, kind, stream)``: the first 9 bytes of a frame."""

# The same as SHAPES, by kind, for the loop that sees every token.
_ROWS = [SHAPES.get(kind) for kind in range(256)]
_LEAST = tuple(row.least if row else 1 for row in _ROWS)
_MOST = tuple(row.most if row else 0 for row in _ROWS)
_STREAMED = tuple(row.streamed if row else False for row in _ROWS)


def frame(kind: int, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame."""
    return header(len(payload), kind, stream) + payload


def credit(more: int) -> bytes:
    """The payload of CREDIT."""
    return _CREDIT.pack(more)


def credited(payload: bytes) -> int:
    """How many bytes more a CREDIT allows."""
    more: int = _CREDIT.unpack(payload)[0]
    return more


class Decoder:
    """Cuts what is read into frames."""

    __slots__ = ("_need", "_rest")

    def __init__(self) -> None:
        self._rest = bytearray()
        self._need = _HEADER_BYTES

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that end within ``data``; iterate to the end before feeding more.

        A header is judged as soon as it is there: nothing is kept for a frame that is refused.

        :raises TrunkError: an unknown kind, a length or a stream that its kind does not have;
            the frames before it have been given
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._need:
                return
            data = bytes(self._rest)
            self._rest.clear()
        at, size = 0, len(data)
        self._need = _HEADER_BYTES
        while size - at >= _HEADER_BYTES:
            length, kind, stream = _unpack(data, at)
            if not _LEAST[kind] <= length <= _MOST[kind] or (stream > 0) is not _STREAMED[kind]:
                raise _refused(length, kind, stream)
            begin = at + _HEADER_BYTES
            end = begin + length
            if end > size:
                self._need = end - at
                break
            yield kind, stream, data[begin:end]
            at = end
        if at < size:
            self._rest += data[at:]


def _refused(length: int, kind: int, stream: int) -> TrunkError:
    shape = SHAPES.get(kind)
    if shape is None:
        return TrunkError(f"a frame of unknown kind {kind}")
    if not shape.least <= length <= shape.most:
        return TrunkError(
            f"{shape.name} of {length} bytes, which has {shape.least} to {shape.most}"
        )
    what = "no stream" if shape.streamed else f"stream {stream}"
    return TrunkError(f"{shape.name} for {what}")
