"""What every request is asked before anything of it is done: who it is from, and what it brings.

The same for the routes of the control plane (:mod:`wire.guard`) and those of inference
(:mod:`wire.door`).
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Mapping
from functools import lru_cache

import msgspec
from starlette.types import Scope

from operations.errors import (
    Forbidden,
    HiveError,
    InvalidRequest,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from wire.addresses import hostname, is_loopback
from wire.direct import refused
from wire.keys import Caller
from wire.proof import refused_signature
from wire.trust import Trust

MAX_BODY_BYTES = 64 * 1024 * 1024
STRANGERS_BODY_BYTES = 16 * 1024

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_RUN = secrets.token_hex(10)  # this process's; the numbers make each of its ids its own
_numbers = itertools.count(1)


class Admitted(msgspec.Struct, frozen=True):
    """:param digest: of a signed request: SHA-256 that its body must have, in hex
    :param max_body: bytes
    :param granted: it has come by a grant (:mod:`wire.direct`)
    """

    caller: Caller
    digest: str | None
    max_body: int
    granted: bool = False

    @property
    def lasting(self) -> bool:
        """Whether the same head would be let in again, as long as its caller is: it is not signed
        for this request alone."""
        return self.digest is None and not self.granted and self.caller.kind in ("local", "key")

    def other_body(self) -> Unauthorized:
        """What a body of another digest is refused with."""
        if self.granted:
            return refused("grant_of_other_body")
        return refused_signature("bad_signature")


class Gate:
    """Lets requests in.

    - on a daemon that only listens on loopback: only under a loopback ``Host``, so that no web page
      can drive it (DNS rebinding); an open one asks everybody for a key
    - none from a foreign ``Origin``, and none that a queen's callbacks make
    - only from whom :mod:`wire.trust` lets in
    - bodies only as ``application/json`` and only up to ``max_body`` bytes
    """

    def __init__(self, trust: Trust, max_body: int = MAX_BODY_BYTES) -> None:
        self.trust = trust
        self.max_body = max_body

    def admit(self, scope: Scope, headers: Mapping[str, str]) -> Admitted:
        """Check a request's head; ``scope`` gets its caller.

        :raises HiveError: it is not let in, and why; who is refused for what he is, is logged
        """
        try:
            if not self.trust.listens_openly:
                check_host(headers)
            check_origin(headers)
            check_callback(headers)
            known = self.trust.admit(scope, headers)
            limit = self.limit(known.caller)
            check_body(headers, limit)
        except HiveError as error:
            if isinstance(error, Unauthorized | Forbidden):
                self.trust.tell(scope, error)
            raise
        return Admitted(known.caller, known.digest, limit, known.granted)

    def limit(self, caller: Caller) -> int:
        """How large a body of his may be, bytes."""
        return STRANGERS_BODY_BYTES if caller.kind == "stranger" else self.max_body


def request_id_of(headers: Mapping[str, str]) -> str:
    """The caller's ``x-request-id``, if it is a sane one, else a new one."""
    request_id = headers.get("x-request-id", "")
    if request_id and _REQUEST_ID.fullmatch(request_id):
        return request_id
    return f"req-{_RUN}{next(_numbers):012x}"


def check_host(headers: Mapping[str, str]) -> None:
    """:raises Forbidden: the ``Host`` is not a name of this machine's loopback"""
    if not _names_loopback(headers.get("host", "")):
        raise Forbidden(
            "This daemon listens on loopback only and answers only to 'localhost' and 127.0.0.1. "
            "Use one of these as the host.",
            code="host_not_allowed",
        )


@lru_cache(maxsize=256)
def _names_loopback(host: str) -> bool:
    return is_loopback(hostname(f"//{host}"))


def check_origin(headers: Mapping[str, str]) -> None:
    """:raises Forbidden: the request comes from a web page of another origin"""
    origin = headers.get("origin")
    if origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower():
        raise Forbidden(
            "Requests from web pages of another origin are not taken. Call from a program, "
            "without an Origin header.",
            code="origin_not_allowed",
        )


def check_callback(headers: Mapping[str, str]) -> None:
    """:raises Forbidden: it is a callback of the queue, whose target anybody may have chosen"""
    if "webhook-signature" in headers:
        raise Forbidden(
            "This is a callback, and no daemon takes any. Name another callback_url.",
            code="callback_not_taken",
        )


def check_body(headers: Mapping[str, str], max_body: int) -> None:
    """:raises TooLarge: a declared length over the limit
    :raises UnsupportedMediaType: a body that is not declared as JSON
    """
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) <= 20):
        raise InvalidRequest("The Content-Length is not a number.")
    if int(length) > max_body:
        raise too_large(max_body)
    if int(length) or "transfer-encoding" in headers:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMediaType(
                "A body is taken only as JSON. Send 'Content-Type: application/json'."
            )


def too_large(max_body: int) -> TooLarge:
    return TooLarge(
        f"The body is larger than {max_body} bytes. Send less, or start the daemon with a larger "
        "--max-body."
    )
