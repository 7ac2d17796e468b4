"""What is read of an answer on its way back: errors, and how much was generated."""

from __future__ import annotations

import re

import msgspec
from pydantic_core import from_json

from operations.errors import (
    Forbidden,
    HiveError,
    Hop,
    InvalidRequest,
    Unauthorized,
    WorkerBroke,
    from_envelope,
)
from wire import errors

CALLERS_FAULT = re.compile(
    r"failed to parse|is required|not support|json\.exception|unknown|must be|invalid",
    re.IGNORECASE,
)
"""llama.cpp answers 500 or 501 to some requests that are simply wrong; these words tell them."""


_DEAD = re.compile(r"\bEngineCore encountered an issue\b")
"""What vLLM's server answers to every request once the process that computes has died
(``EngineDeadError`` in vllm/v1/engine/exceptions.py)."""


def engine_is_dead(message: str) -> bool:
    """Whether an engine's error means that the engine is lost, not that one request failed."""
    return _DEAD.search(message) is not None


def refusal(status: int, raw: bytes, retry_after: str, hop: Hop, name: str) -> HiveError:
    """An upstream's error as ours: a daemon's envelope keeps its fields, an engine's gets them.

    :param raw: the body, or the beginning of it
    :param retry_after: the header, empty where there is none
    :param hop: who answered
    :param name: how messages call it
    """
    try:
        payload = from_json(raw)
    except ValueError:
        payload = None
    error = from_envelope(status, payload, hop=hop, where=name)
    if hop == "worker":
        error = unless_about_the_key(error, name)
    if hop == "worker" and status >= 500 and CALLERS_FAULT.search(error.message):
        message = f"{error.message.rstrip('.')}. Correct the request and send it again."
        error = InvalidRequest(message, hop="worker", param=error.param)
    elif type(error) is HiveError:  # a bare 500 of an engine
        error = WorkerBroke(error.message, hop=hop, code=error.code, param=error.param)
    if retry_after.isdigit():
        error.retry_after = float(retry_after)
    return error


def unless_about_the_key(error: HiveError, name: str) -> HiveError:
    """An engine's error, unless it refuses a key: that is Hive's own, and the caller has no part
    in it. Nothing of what the engine says is passed on then, for it may quote the key.

    :param name: how messages call the engine
    """
    if error.status not in (Unauthorized.status, Forbidden.status):
        return error
    return WorkerBroke(
        f"The {name} refuses the key with which Hive asks it ({error.status}). Whoever runs this "
        "hive must detach it, and attach it with a key that holds.",
        hop="worker",
        code="engine_key_refused",
        retryable=False,
    )


def redirects(status: int, hop: Hop, name: str) -> WorkerBroke:
    """What an answer of 3xx is to the caller: nobody could follow it.

    :param name: how messages call who answered
    """
    return WorkerBroke(
        f"The {name} answered with a redirect ({status}), which Hive does not follow. Whoever runs "
        "this hive must attach it by the URL at which it answers itself.",
        hop=hop,
        code="engine_redirects",
        retryable=False,
    )


def error_event(error: HiveError, hop: Hop, request_id: str, path: str) -> bytes:
    """An error in the middle of a stream, as the clients of that route expect it."""
    body = errors.envelope(error, hop, request_id)
    if path.endswith("/messages"):
        return b'event: error\ndata: {"type":"error",' + body[1:] + b"\n\n"
    return b"data: " + body + b"\n\n"


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Whole(msgspec.Struct):
    usage: _Usage | None = None


_WHOLE = msgspec.json.Decoder(_Whole)


_GENERATED = re.compile(rb'"completion_tokens"\s*+:\s*+([0-9]{1,12})')


def completion_tokens_at_end(tail: bytes) -> int:
    """The same of an answer too large to be decoded, by its last bytes, where engines say it."""
    found = _GENERATED.findall(tail)
    return int(found[-1]) if found else 0


def completion_tokens(answer: bytes) -> int:
    """What an engine's whole answer says that it generated; 0 if it does not say."""
    try:
        usage = _WHOLE.decode(answer).usage
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return 0
    return usage.completion_tokens if usage else 0
