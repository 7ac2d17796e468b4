"""Logs: one line an outcome, ``key=value``, never a prompt, an answer or a secret."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections import deque
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

FILE_BYTES = 16 * 1024 * 1024
TOGETHER_S = 0.05
MOST_WAITING = 10_000  # lines; who says more waits for those who read them

_LEVELS = {level: f"{logging.getLevelName(level):7}" for level in range(10, 60, 10)}
_QUOTED = re.compile(r'[ "=]')

Action = Literal["job", "request", "worker", "hive", "daemon", "download", "engine", "refused"]

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that is being answered; what is asked of other daemons for it carries its id."""

_outcomes = logging.getLogger("hive")


def configure(level: str, file: Path) -> None:
    """Log to stderr and to a file, one line a record, with the time in UTC.

    :param file: grows to 16 MiB, then becomes ``<file>.1``
    :raises OSError: it cannot be written
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # What no line shows need not be found out for each: see "Optimization" in the logging HOWTO.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    global _lines
    _lines = _Lines(file)
    logging.basicConfig(level=level.upper(), handlers=[_lines], force=True)
    for noisy in ("httpx", "huggingface_hub", "filelock", "asyncio", "zeroconf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Lines(logging.Handler):
    """Writes lines at once while few come, and many of them together: a line that follows another
    within 50 ms waits until these are over, or until a warning takes it along."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.setFormatter(_Line("%(asctime)sZ %(levelname)-7s %(name)s %(message)s"))
        self._file = RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8")
        self._waiting: deque[str] = deque()  # which needs no lock
        self._written_at = float("-inf")
        self._writing = False
        self._soon = False  # whether what waits is going to be written without another line
        self._late = threading.Event()
        threading.Thread(target=self._write_late, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(record.levelno, self.format(record))
        except (TypeError, ValueError):  # words and arguments that do not fit
            self.handleError(record)

    def write(self, level: int, line: str) -> None:
        """Write a line, now or soon."""
        self._waiting.append(line)
        if self._soon and level < logging.WARNING and len(self._waiting) < MOST_WAITING:
            return
        if level >= logging.WARNING or time.monotonic() - self._written_at >= TOGETHER_S:
            self.flush()
        else:
            self._soon = True
            self._late.set()

    def flush(self) -> None:
        """Write what waits."""
        with self.lock or nullcontext():
            if self._writing:
                return  # a finalizer logs, in the middle of this: its line goes along
            self._writing = True
            try:
                while count := len(self._waiting):
                    self._write("\n".join([self._waiting.popleft() for _ in range(count)]))
            finally:
                self._writing = False

    def _write(self, text: str) -> None:
        self._written_at = time.monotonic()
        self._file.handle(logging.makeLogRecord({"msg": text}))
        with suppress(OSError, ValueError):  # nobody reads it any more
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _write_late(self) -> None:
        while True:
            self._late.wait()
            self._late.clear()
            time.sleep(TOGETHER_S)
            self._soon = False
            self.flush()


class _Line(logging.Formatter):
    """With the time to the millisecond in UTC."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return _time(record.created)


@lru_cache(maxsize=2)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


@lru_cache(maxsize=2)
def _millisecond(ms: int) -> str:
    return f"{_second(ms // 1000)}.{ms % 1000:03d}"


def _time(created: float) -> str:
    return _millisecond(int(created * 1000))


_lines: _Lines | None = None


def outcome(action: Action, *, level: int = logging.INFO, **fields: object) -> None:
    """What became of something, as ``action=job status=completed ms=12``; None is left out."""
    pairs = [
        f"{key}={value if type(value) is int else quoted(str(value))}"
        for key, value in fields.items()
        if value is not None
    ]
    told(" ".join((f"action={action}", *pairs)), level)


def told(said: str, level: int = logging.INFO) -> None:
    """An outcome in words that are put together already, foreign ones :func:`quoted`."""
    if not _outcomes.isEnabledFor(level):
        return
    if _lines is None:
        _outcomes.log(level, "%s", said)
    else:  # without a record, which would cost as much again as all the rest
        _lines.write(level, f"{_time(time.time())}Z {_LEVELS[level]} hive {said}")


@lru_cache(maxsize=256)  # models, hives and paths come again and again
def quoted(text: str) -> str:
    """As one word: in quotation marks, and escaped, where it is none."""
    if text and text.isprintable() and not _QUOTED.search(text):
        return text
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'
