"""Exit codes, and how a failure is told. Deciding only; nothing is printed here.

===== =========== =================================================================
code  name        when
===== =========== =================================================================
0     OK          done
1     FAILED      the job failed, a check found problems, or something cannot start
2     USAGE       the command line is wrong
3     UNREACHABLE no daemon answers, or it was lost on the way
4     REFUSED     a daemon refused the request: unknown, ambiguous, not allowed (4xx)
130   CANCELLED   Ctrl-C, or somebody else cancelled the job
141   BROKEN_PIPE whoever read the output has left; as the shell reports SIGPIPE
===== =========== =================================================================
"""

from __future__ import annotations

from enum import IntEnum

from operations.errors import HiveError


class Exit(IntEnum):
    """What ``hive`` returns to the shell; the table above says when."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    CANCELLED = 130
    BROKEN_PIPE = 141


MEANINGS = {
    Exit.OK: "done",
    Exit.FAILED: "it failed or could not start",
    Exit.USAGE: "wrong command line",
    Exit.UNREACHABLE: "no daemon reached",
    Exit.REFUSED: "a daemon refused it (4xx)",
    Exit.CANCELLED: "cancelled",
}


class WrongUsage(HiveError):
    """The command line asks for something that cannot be; answered before any daemon is."""

    status = 400
    type = "usage_error"
    code = "usage"


class Cancelled(HiveError):
    """Ctrl-C ended the job."""

    type = "cancelled"
    code = "job_cancelled"


def exit_for(error: HiveError) -> Exit:
    """The exit code that a failure ends in."""
    match error.code:
        case "usage":
            return Exit.USAGE
        case "daemon_unreachable":
            return Exit.UNREACHABLE
        case "job_cancelled":
            return Exit.CANCELLED
        case "job_failed":
            return Exit.FAILED
    return Exit.REFUSED if 400 <= error.status < 500 else Exit.FAILED


def where(error: HiveError) -> str:
    """Who said it, as ``queen, request req-…``; empty if nobody did or nobody was reached."""
    said_by_daemon = error.request_id is not None
    parts = [
        error.hop if said_by_daemon else None,
        error.request_id and f"request {error.request_id}",
    ]
    return ", ".join(part for part in parts if part)


def as_json(error: HiveError) -> dict[str, object]:
    """The error as ``--json`` prints it: the envelope that daemons use, without what is unknown."""
    said_by_daemon = error.request_id is not None
    body = {
        "message": error.message,
        "type": error.type,
        "code": error.code,
        "param": error.param,
        "hop": error.hop if said_by_daemon else None,
        "retryable": error.retryable,
        "request_id": error.request_id,
        "exit_code": int(exit_for(error)),
    }
    return {"error": {name: value for name, value in body.items() if value is not None}}
