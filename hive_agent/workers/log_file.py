"""The file that an engine's output goes to: one for each worker, through all its starts."""

from __future__ import annotations

import os
from pathlib import Path

LIMIT_BYTES = 16 * 1024 * 1024
LAST_START_BYTES = 512 * 1024  # as much of the last start is looked at for why it failed
NEWS_BYTES = 16 * 1024  # what was written before that is old news
LINE_BYTES = 512  # a guess, for how far back so many lines begin


class LogFile:
    """:param path: in a folder that is there"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = 0
        self._read = 0

    def begin(self) -> None:
        """An engine is about to start: a file that has grown too large is set aside."""
        if self._size() > LIMIT_BYTES:
            self.path.replace(self.path.with_suffix(".log.1"))
        self._started = self._read = self._size()

    def news(self) -> str:
        """What was written since this was last asked, or since the start; whole lines.

        Of much, the last: it is for telling how far an engine has come, again and again.
        """
        self._read = max(self._read, self._size() - NEWS_BYTES)
        data = self._bytes(self._read)
        whole = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        self._read += whole
        return data[:whole].decode("utf-8", "replace")

    def of_last_start(self) -> list[str]:
        """The lines since the last start, the last of them where they are many."""
        start = max(self._started, self._size() - LAST_START_BYTES)
        return self._bytes(start).decode("utf-8", "replace").splitlines()

    def tail(self, lines: int) -> list[str]:
        """The last lines, through all starts."""
        if not lines:
            return []
        start = max(0, self._size() - LINE_BYTES * lines)
        return self._bytes(start).decode("utf-8", "replace").splitlines()[-lines:]

    def _bytes(self, start: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(LIMIT_BYTES)
        except OSError:
            return b""

    def _size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0
