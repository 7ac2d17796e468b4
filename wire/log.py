"""Logs: one line an outcome, ``key=value``, never a prompt, an answer or a secret."""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

FILE_BYTES = 16 * 1024 * 1024

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
    kept = RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=1, encoding="utf-8")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr), kept]
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    for noisy in ("httpx", "huggingface_hub", "filelock", "asyncio", "zeroconf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def outcome(action: Action, *, level: int = logging.INFO, **fields: object) -> None:
    """What became of something, as ``action=job status=completed ms=12``; None is left out."""
    pairs = (f"{key}={_quote(value)}" for key, value in fields.items() if value is not None)
    _outcomes.log(level, "%s", " ".join((f"action={action}", *pairs)))


def _quote(value: object) -> str:
    text = str(value)
    if text and not any(c in ' "=\n\r\t' or not c.isprintable() for c in text):
        return text
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'
