"""Heads that come again. Who keeps a connection sends the same one with each message, but for the
length of the body; what was found out about the first then holds for the others, too."""

from __future__ import annotations

import re
from typing import Final, Self

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*+([0-9]++)", re.IGNORECASE)
_MAX_DIGITS = 9  # a body in one read is never so long
_CRLF = b"\r\n"
MAX_BYTES: Final = 4096


class Template:
    """A well-formed head with its ``Content-Length`` left open."""

    __slots__ = ("_before", "_behind")

    def __init__(self, before: bytes, behind: bytes) -> None:
        self._before = before
        self._behind = behind

    @classmethod
    def of(cls, head: bytes) -> Self | None:
        """:param head: one that has been read, whole; None where it tells no length, or is so long
        that every kept connection would hold much for it"""
        if len(head) > MAX_BYTES:
            return None
        found = _LENGTH.search(head)
        return None if found is None else cls(head[: found.start(1)], head[found.end(1) :])

    def match(self, data: bytes) -> tuple[int, int] | None:
        """The length of the body, and where it begins, if ``data`` begins with the same head; None
        if it does not, or that takes a closer look."""
        if not data.startswith(self._before):
            return None
        begin = len(self._before)
        end = data.find(_CRLF, begin, begin + _MAX_DIGITS + 2)
        digits = data[begin:end]
        if not (digits.isdigit() and data.startswith(self._behind, end)):
            return None
        return int(digits), end + len(self._behind)
