"""Ways to whoever answers, all alike to the relay: an HTTP connection of a pool, or a stream of the
trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Final, Protocol

from wire.door.body import Body
from wire.door.door import Request
from wire.headers import SESSION_HEADER
from wire.http1.client import Pool, Sink
from wire.http1.head import Header
from wire.proof import Digested

FORWARDED: Final = (
    "content-type",
    "accept",
    "last-event-id",
    "anthropic-version",
    "anthropic-beta",
)

OPENINGS: Final = 64
SHORT: Final = 1024  # characters of the headers of one that is remembered
"""Beginnings of heads that a line remembers."""

Sign = Callable[[str, str, bytes | Digested, Mapping[str, str]], str | None]
"""Method, target, body, headers → the signature of a request; None where nobody signs."""


class Way(Protocol):
    """A request that is on its way, as the relay holds it."""

    @property
    def whole(self) -> bool:
        """Whether the answer so far ends where an event may be added."""

    def flow(self, wanted: bool) -> None:
        """Let no more of the answer come for now, or let it come again."""

    def passed(self, count: int) -> None:
        """So many bytes of the answer have been taken by the caller."""

    def cancel(self) -> None:
        """Nobody wants the answer any more. Fine when it has ended."""


class Line(Protocol):
    """A way to somebody who answers."""

    def send(self, request: Request, body: Body, sink: Sink) -> Way:
        """:raises HiveError: the request cannot be sent"""


class HttpLine:
    """Requests by HTTP, over connections that are kept."""

    def __init__(
        self,
        pool: Pool,
        headers: Iterable[Header] = (),
        sign: Sign | None = None,
        prefix: str = "",
    ) -> None:
        """
        :param headers: that every request gets
        :param prefix: of the path there
        """
        self.pool = pool
        self._prefix = prefix
        self._headers = tuple(headers)
        self._sign = sign
        self._opening = lru_cache(maxsize=OPENINGS)(self._opening_of)

    def send(self, request: Request, body: Body, sink: Sink) -> Way:
        known = request.known
        opening = None if known is None else known.openings.get(self)
        if opening is None:
            opening = self._opening_for(request)
            if known is not None:
                known.openings = {self: opening}
        opening = b"%bx-request-id: %b\r\n" % (opening, request.request_id.encode())
        if self._sign is not None:
            signed = self._sign(request.method, request.target, body, forwarded(request))
            if signed is not None:
                opening += f"{SESSION_HEADER}: {signed}\r\n".encode()
        sent = body if isinstance(body, bytes) else body.pieces
        return self.pool.send(request.method, opening, sent, sink)

    def _opening_for(self, request: Request) -> bytes:
        told = [request.headers.get(name) for name in FORWARDED]
        # A query may hold a secret, and what is long is not to be held 64 times.
        remembered = "?" not in request.target and sum(map(len, filter(None, told))) <= SHORT
        opening_of = self._opening if remembered else self._opening_of
        return opening_of(request.method, request.target, *told)

    def _opening_of(self, method: str, target: str, *told: str | None) -> bytes:
        """What the heads of many requests begin with. :param told: of :data:`FORWARDED`"""
        fields = [
            (name.encode(), value.encode("latin-1"))
            for name, value in zip(FORWARDED, told, strict=True)
            if value is not None
        ]
        raw_target = (self._prefix + target).encode("latin-1")
        return self.pool.opening(method, raw_target, (*fields, *self._headers))


def forwarded(request: Request) -> Mapping[str, str]:
    """What an upstream is told of a request's headers."""
    known = request.known
    if known is not None and known.forwarded is not None:
        return known.forwarded
    came = request.headers
    headers = {name: came[name] for name in FORWARDED if name in came}
    if known is not None:
        known.forwarded = headers
    return headers
