"""Logs: one line an outcome, ``key=value``, never a prompt, an answer or a secret."""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from typing import Literal

Action = Literal["job", "request", "worker", "hive", "daemon", "download"]

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that is being answered; what is asked of other daemons for it carries its id."""

_outcomes = logging.getLogger("hive")


def configure(level: str = "info") -> None:
    """Log to stderr, one line a record, with the time in UTC."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "huggingface_hub", "filelock", "asyncio"):
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
