"""The lines of a job's stream: progress, a result, and exactly one end.

Progress is ``[INFO] text`` or ``[WARN] text``; a result is one line of JSON; the last line is
``[DONE]``, ``[ERROR] message`` or ``[CANCELLED]``. An ``infer`` streams :class:`Started`,
:class:`Token` (or :class:`Reasoning`) and :class:`End` as lines of JSON.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json, to_json

DONE = "[DONE]"
CANCELLED = "[CANCELLED]"
ERROR = "[ERROR]"
INFO = "[INFO]"
WARN = "[WARN]"


class Event(BaseModel):
    """Base of the JSON lines of an ``infer``; a newer daemon may add fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def line(self) -> str:
        return to_json(self, exclude_none=True).decode()


class Started(Event):
    """The engine has taken the request."""

    type: Literal["started"] = "started"
    job_id: str
    model: str
    hive_id: str
    worker_id: str
    started_at: float


class Token(Event):
    """A piece of the answer; ``i`` counts pieces from 0."""

    type: Literal["token"] = "token"
    t: str
    i: int


class Reasoning(Event):
    """A piece of what a reasoning model thinks before it answers; ``i`` counts from 0."""

    type: Literal["reasoning"] = "reasoning"
    t: str
    i: int


class End(Event):
    """The whole answer. Times are milliseconds, counts are tokens.

    ``stop_reason`` is the engine's ``finish_reason``: ``stop`` or ``length`` as a rule.
    """

    type: Literal["end"] = "end"
    text: str
    tokens_out: int
    decode_time_ms: int
    ttft_ms: int
    stop_reason: str
    usage: dict[str, Any]


class Line(Event):
    """A progress line, or one of the three ends."""

    type: Literal["info", "warn", "done", "error", "cancelled"]
    text: str = ""

    @property
    def terminal(self) -> bool:
        return self.type in ("done", "error", "cancelled")


class Result(Event):
    """The result of any operation but ``infer``: an arbitrary line of JSON."""

    type: Literal["result"] = "result"
    value: Any


JobEvent = Started | Token | Reasoning | End | Line | Result


def info(text: str) -> str:
    """A progress line. Line breaks are folded: one event, one line."""
    return f"{INFO} {_one_line(text)}"


def warn(text: str) -> str:
    """A progress line that deserves attention."""
    return f"{WARN} {_one_line(text)}"


def error(message: str) -> str:
    """The terminal line of a job that failed."""
    return f"{ERROR} {_one_line(message)}"


def result(value: Any) -> str:
    """A result as one line of JSON. ``value`` is JSON-able or a pydantic model."""
    return to_json(value, exclude_none=True).decode()


def is_terminal(line: str) -> bool:
    """Whether this line ends a job."""
    return line in (DONE, CANCELLED) or line.startswith(ERROR)


def parse_line(line: str) -> JobEvent:
    """What a line of a job's stream means. A line that is neither progress nor JSON is progress."""
    match line:
        case "[DONE]":
            return Line(type="done")
        case "[CANCELLED]":
            return Line(type="cancelled")
    for prefix, kind in ((ERROR, "error"), (INFO, "info"), (WARN, "warn")):
        if line.startswith(prefix):
            return Line.model_validate({"type": kind, "text": line[len(prefix) :].strip()})
    try:
        value = from_json(line)
    except ValueError:
        return Line(type="info", text=line)
    if isinstance(value, dict):
        for model in (Token, Reasoning, Started, End):
            if value.get("type") == model.model_fields["type"].default:
                return model.model_validate(value)
    return Result(value=value)


def _one_line(text: str) -> str:
    return " ".join(text.split("\n")).replace("\r", " ")
