"""What can go wrong, once for all rooms.

The tree, with the HTTP status each class answers::

    HiveError                       500
    ├── InvalidRequest              400   the request itself is wrong
    ├── Unauthorized                401   no key, or a bad one
    ├── Forbidden                   403   a good key, or an origin, that may not do this
    ├── NotFound                    404   unknown model, job, worker, hive or route
    ├── MethodNotAllowed            405
    ├── RequestTimeout              408   the request did not come in time
    ├── Conflict                    409   stale, ambiguous or conflicting
    ├── Gone                        410   was known, is no longer kept
    ├── TooLarge                    413
    ├── UnsupportedMediaType        415
    ├── QueueFull                   429   retry later
    ├── TooManyRequests             429   over this key's limit
    ├── CallerGone                  499   nobody is waiting for the answer
    ├── WorkerBroke                 502   the engine died or answered nonsense
    ├── Unavailable                 503   nobody can serve it now
    ├── DeadlineExceeded            504
    └── WontFit                     507   not enough memory or disk

A message says what happened and ends with what to do next; ``hop`` says where.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from operations.patterns import IN_WORDS

Hop = Literal["queen", "hive", "worker"]

_EXPECTED = re.compile(r"^[A-Z][a-z]+ should")
"""Begins pydantic's "Input should be …", "String should have …"."""

_TYPES: Final = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "be true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "be a number"),
    **dict.fromkeys(("byte_size", "byte_size_unit"), "be a size, such as 64MiB or 1G"),
}
"""What is said instead of pydantic's own words, by its types of errors."""


class ErrorBody(BaseModel):
    """The inside of the envelope: an OpenAI error object with three fields more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    message: str
    type: str
    code: str
    param: str | None = None
    hop: Hop
    retryable: bool
    request_id: str


class HiveError(Exception):
    """Something failed inside; the log of the daemon named by ``hop`` has the details."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: str = "internal_error"
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        hop: Hop | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        """``retry_after`` is in seconds; ``hop`` is filled in by the daemon that answers."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.hop = hop
        self.retry_after = retry_after
        self.request_id = request_id
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable

    def body(self, hop: Hop, request_id: str) -> ErrorBody:
        """The error object, with the hop and request id of the daemon that answers as defaults."""
        return ErrorBody(
            message=self.message,
            type=self.type,
            code=self.code,
            param=self.param,
            hop=self.hop or hop,
            retryable=self.retryable,
            request_id=self.request_id or request_id,
        )


class InvalidRequest(HiveError):
    """The request is wrong and will stay so; correct it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class Unauthorized(HiveError):
    """No API key came, or one that does not hold."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(HiveError):
    """The caller is known, or stands on a foreign web page, and may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(HiveError):
    """There is no such model, job, worker, hive or route."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class MethodNotAllowed(HiveError):
    """The route exists; it does not take this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(HiveError):
    """The caller took too long to send his request."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    retryable = True


class Conflict(HiveError):
    """The name is ambiguous, or somebody else holds what was asked for."""

    status = 409
    type = "conflict_error"
    code = "conflict"


class Gone(HiveError):
    """It was here and is no longer kept."""

    status = 410
    type = "gone_error"
    code = "gone"


class TooLarge(HiveError):
    """The body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaType(HiveError):
    """JSON is taken only as ``application/json``, so that no web form can post it."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class QueueFull(HiveError):
    """No room in the queue at the moment."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retryable = True


class TooManyRequests(HiveError):
    """The caller's key is over its limit."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class CallerGone(HiveError):
    """The caller hung up."""

    status = 499
    type = "caller_gone"
    code = "caller_gone"


class WorkerBroke(HiveError):
    """The engine died, or answered what cannot be understood."""

    status = 502
    type = "worker_error"
    code = "worker_broke"
    retryable = True


class Unavailable(HiveError):
    """Nobody can serve this now."""

    status = 503
    type = "unavailable_error"
    code = "unavailable"
    retryable = True


class DeadlineExceeded(HiveError):
    """It took longer than was allowed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    retryable = True


class WontFit(HiveError):
    """Not enough memory or disk; the message says how much is missing."""

    status = 507
    type = "capacity_error"
    code = "wont_fit"


BY_STATUS: dict[int, type[HiveError]] = {
    cls.status: cls
    for cls in (
        InvalidRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        Conflict,
        Gone,
        TooLarge,
        UnsupportedMediaType,
        QueueFull,
        CallerGone,
        WorkerBroke,
        Unavailable,
        DeadlineExceeded,
        WontFit,
        HiveError,
    )
}


def from_envelope(status: int, payload: object, *, hop: Hop, where: str) -> HiveError:
    """Rebuild the error that another daemon or an engine answered with.

    :param status: its HTTP status, 400 and above
    :param payload: its decoded JSON body, or whatever came instead
    :param hop: who is taken to have answered if the body does not say
    :param where: the address asked, for a message when the body has none
    """
    cls = BY_STATUS.get(status) or (InvalidRequest if status < 500 else HiveError)
    raw = payload.get("error", _detail(payload)) if isinstance(payload, Mapping) else None
    if isinstance(raw, str) and raw:
        return cls(f"{where} answered {status}: {raw}", hop=hop)
    if not isinstance(raw, Mapping):
        return cls(f"{where} answered {status} without saying why; see its log.", hop=hop)
    message = str(raw.get("message") or f"{where} answered {status} without saying why.")
    if hop == "worker" and status < 500:  # engines say what is wrong, not what to do
        what = "Wait, and send it" if status == 429 else "Correct the request and send it"
        message = f"{message.rstrip('.')}. {what} again."
    try:
        body = ErrorBody.model_validate({**raw, "message": message})
    except ValidationError:  # an engine's own, smaller error object
        return cls(message, hop=hop, param=_text(raw.get("param")))
    return cls(
        body.message,
        code=body.code,
        param=body.param,
        hop=body.hop,
        retryable=body.retryable,
        request_id=body.request_id,
    )


def _detail(payload: Mapping[str, Any]) -> str | None:
    """What FastAPI says of a refusal; of several the first, without the input, which it quotes."""
    said = payload.get("detail")
    if isinstance(said, list) and said and isinstance(said[0], Mapping):
        first = said[0]
        place = ".".join(map(str, first["loc"])) if isinstance(first.get("loc"), list) else ""
        said = f"{place}: {first.get('msg')}" if place else first.get("msg")
    return _text(said)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def from_validation(error: ValidationError, what: str = "") -> InvalidRequest:
    """One sentence for the first thing that a caller's JSON, or command line, has wrong.

    Inputs are never quoted: they may hold prompts or secrets.

    :param what: the operation; without it, the sentence begins with the field's own name
    """
    first = error.errors(include_url=False, include_input=False)[0]
    loc = first["loc"]
    if loc and loc[0] == what:  # a union's tag says nothing that ``what`` does not
        loc = loc[1:]
    where = ".".join(str(part) for part in loc)
    more = error.error_count() - 1
    tail = f" ({more} more problem{'s' if more > 1 else ''})" if more else ""
    field = f"field '{where}'" if what else f"'{where}'"
    said = [what, f"{field}: {reason(first)}" if where else reason(first)]
    return InvalidRequest(f"{': '.join(filter(None, said))}{tail}.", param=where or None)


def reason(problem: ErrorDetails) -> str:
    """What is wrong, in words, without a full stop; a pattern that is missed is described."""
    pattern = problem.get("ctx", {}).get("pattern")
    if pattern in IN_WORDS:
        return f"it must {IN_WORDS[pattern]}"
    if problem["type"] in _TYPES:
        return f"it must {_TYPES[problem['type']]}"
    said = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return _EXPECTED.sub("it must", said)
