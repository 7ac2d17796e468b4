"""A large body in pieces, which are never joined."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterator
from typing import Final

PIECE_BYTES: Final = 1024 * 1024
PART_BYTES: Final = 256 * 1024
"""Of a body that are written at a time; up to so much is held in one object, as small ones are."""


class Pieces:
    """Bytes in their order; ``size`` is that of all.

    Pieces are memory of their own from the system: what the C library has given out it may keep
    when it is freed, and a daemon that passed on a gigabyte once would hold it for ever.

    Who lets the last reference go frees one piece in each turn of the running event loop: giving a
    gigabyte back at once holds everybody else up for a long moment.
    """

    __slots__ = ("_few", "_kept", "_room", "size")

    def __init__(self) -> None:
        self._few = bytearray()  # all of it, while that is little
        self._kept: list[memoryview] = []
        self._room = 0  # bytes of the last piece that are free
        self.size = 0

    def __iter__(self) -> Iterator[memoryview]:
        """Parts of at most :data:`PART_BYTES`."""
        if self._few:
            yield memoryview(self._few)
        for piece in self._filled():
            for at in range(0, len(piece), PART_BYTES):
                yield piece[at : at + PART_BYTES]

    def add(self, data: bytes) -> None:
        """More bytes."""
        self.size += len(data)
        if self._kept:
            self._fill(memoryview(data))
            return
        self._few += data
        if len(self._few) > PART_BYTES:
            few, self._few = self._few, bytearray()
            self._fill(memoryview(few))

    def part(self, at: int, count: int) -> bytes:
        """``count`` bytes from ``at``, or those that the piece has which they begin in."""
        index, begin = divmod(at, PIECE_BYTES)
        piece = self._kept[index] if self._kept else memoryview(self._few)
        return bytes(piece[begin : min(begin + count, self.size - index * PIECE_BYTES)])

    def tail(self, count: int) -> bytes:
        """The last bytes, at most ``count``."""
        last: list[memoryview] = []
        for piece in reversed([memoryview(self._few), *self._filled()]):
            if count > 0:
                last.insert(0, piece[-count:])
                count -= len(piece)
        return b"".join(last)

    def spliced(self, begin: int, end: int, between: bytes) -> Pieces:
        """The same with other bytes from ``begin`` to ``end``, sharing what is before and behind.

        No more can be added to it.
        """
        made = Pieces()
        at = 0
        for piece in [memoryview(self._few), *self._filled()]:
            first, last = begin - at, end - at
            at += len(piece)
            if first >= len(piece) or last <= 0:
                made._kept.append(piece)
                continue
            made._kept.append(piece[: max(0, first)])
            if first >= 0:
                made._kept.append(memoryview(between))
            made._kept.append(piece[last:])
        made.size = self.size - (end - begin) + len(between)
        return made

    def _fill(self, data: memoryview) -> None:
        while data:
            if not self._room:
                private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                self._kept.append(memoryview(mmap.mmap(-1, PIECE_BYTES, flags=private)))
                self._room = PIECE_BYTES
            begin = PIECE_BYTES - self._room
            count = min(self._room, len(data))
            self._kept[-1][begin : begin + count] = data[:count]
            self._room -= count
            data = data[count:]

    def _filled(self) -> list[memoryview]:
        """The pieces without what is free in the last."""
        if not self._room:
            return self._kept
        return [*self._kept[:-1], self._kept[-1][: PIECE_BYTES - self._room]]

    def __del__(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # nobody is held up
        _free_one(loop, self._kept)


def _free_one(loop: asyncio.AbstractEventLoop, kept: list[memoryview]) -> None:
    del kept[-1:]
    if kept and not loop.is_closed():
        loop.call_soon(_free_one, loop, kept)
