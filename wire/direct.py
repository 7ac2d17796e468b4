"""Direct mode: a caller that asks for it (``Prefer: hive-direct``) is sent to the hive itself.

The queen decides, and gives the caller a URL of the hive with a *grant*: her signed word that one
request, which she has looked at, may be sent there. It lies in the query, because programs that
follow a redirect leave their keys behind. ``docs/trust.md`` says what a grant is bound to.

Who makes and who checks a grant both derive the key from the cluster's secret. Its time is that of
the hive's own clock, so no two clocks are compared.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from operations.errors import Unauthorized, Unavailable
from wire.keys import Caller, Scope
from wire.prefer import preferences
from wire.secret import Secret

PREFERENCE: Final = "hive-direct"
PARAMETER: Final = "hive-grant"
LIVES_S: Final = 30.0
MAX_USED: Final = 100_000
MAX_CHARS: Final = 16 * 1024

_FIELD: Final = PARAMETER.encode() + b"="
_AGAIN: Final = f"Ask the queen again, with 'Prefer: {PREFERENCE}'; each request has its own."
_WHY: Final = {
    "malformed_grant": "What this URL has as a grant is none.",
    "bad_grant": "The grant in this URL was not made in this cluster, or was altered.",
    "grant_of_other_hive": "The grant in this URL is for another hive, or for an earlier start of "
    "this one.",
    "grant_of_other_request": "The grant in this URL is for another method or path.",
    "grant_of_other_body": "The grant in this URL is for another body.",
    "grant_expired": "The grant in this URL has expired.",
    "grant_used": "The grant in this URL has been used.",
}


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """What a caller may do, once.

    :param instance: of the hive: new at each of its starts
    :param target: path and query without the grant, as they stand in the request line
    :param digest: SHA-256 that the body must have, in hex
    :param kind: the caller, with the three that follow
    :param expires: on the hive's clock, seconds since the epoch
    """

    hive_id: str
    instance: str
    method: str
    target: str
    digest: str
    kind: Literal["local", "daemon", "key"]
    id: str
    scopes: tuple[Scope, ...]
    tenant: str
    expires: float
    nonce: str

    @property
    def caller(self) -> Caller:
        """Without the limits of his key, which the queen has counted this request under."""
        return Caller(self.kind, self.id, frozenset(self.scopes), self.tenant)


_encode = msgspec.json.Encoder().encode
_GRANT = msgspec.json.Decoder(Grant)


def key_of(secret: Secret) -> bytes:
    """The key that signs grants."""
    return secret.derive("direct")


def grant_for(
    caller: Caller,
    *,
    hive_id: str,
    instance: str,
    method: str,
    target: str,
    digest: str,
    now: float,
) -> Grant:
    """A new grant. :param now: on the hive's clock. :raises ValueError: a stranger gets none"""
    if caller.kind == "stranger":
        raise ValueError("a stranger gets no grant")
    return Grant(
        hive_id=hive_id,
        instance=instance,
        method=method,
        target=target,
        digest=digest,
        kind=caller.kind,
        id=caller.id,
        scopes=tuple(sorted(caller.scopes)),
        tenant=caller.tenant,
        expires=now + LIVES_S,
        nonce=secrets.token_urlsafe(12),
    )


def token_of(key: bytes, grant: Grant) -> str:
    """A grant as it stands in a URL: ``<claims>.<HMAC-SHA256>``, both in base64url."""
    claims = _encode(grant)
    return f"{_text(claims)}.{_text(hmac.digest(key, claims, 'sha256'))}"


def grant_of(key: bytes, token: str) -> Grant:
    """:raises Unauthorized: it is no grant, or not one of this cluster"""
    said, _, mac = token.partition(".")
    try:
        if len(token) > MAX_CHARS:
            raise ValueError
        claims, signed = _bytes(said), _bytes(mac)
    except (ValueError, binascii.Error):
        raise refused("malformed_grant") from None
    if not hmac.compare_digest(signed, hmac.digest(key, claims, "sha256")):
        raise refused("bad_grant")
    try:
        return _GRANT.decode(claims)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise refused("malformed_grant") from None


def check(
    grant: Grant, *, hive_id: str, instance: str, method: str, target: str, now: float
) -> None:
    """:raises Unauthorized: it does not fit this hive, this request or this moment"""
    if (grant.hive_id, grant.instance) != (hive_id, instance):
        raise refused("grant_of_other_hive")
    if (grant.method, grant.target) != (method, target):
        raise refused("grant_of_other_request")
    if not now < grant.expires <= now + 2 * LIVES_S:  # the hive's clock may have been set
        raise refused("grant_expired")


class Grants:
    """A daemon's memory of the grants that were used here."""

    def __init__(
        self,
        secret: Secret,
        *,
        id: str,
        instance: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._key = key_of(secret)
        self._id = id
        self._instance = instance
        self._clock = clock
        self._used: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Nonces, when they were used on the monotonic clock, and when they expire."""
        self._forgotten = float("-inf")
        """When the last of those expired that are forgotten."""

    def take(self, token: str, method: str, target: str) -> Grant:
        """Use up a grant.

        :param target: path and query without the grant
        :raises Unauthorized: it does not hold, or was used
        :raises Unavailable: more were used lately than can be remembered, or the clock was set back
            and nobody knows any more whether this one was used
        """
        grant = grant_of(self._key, token)
        now = self._clock()
        check(
            grant,
            hive_id=self._id,
            instance=self._instance,
            method=method,
            target=target,
            now=now,
        )
        self._forget()
        if grant.nonce in self._used:
            raise refused("grant_used")
        if grant.expires <= self._forgotten:
            raise Unavailable(
                "This hive's clock was set back, and it takes no grants until it shows what it has "
                "shown before. Ask through the queen.",
                code="clock_set_back",
            )
        if len(self._used) >= MAX_USED:
            raise Unavailable(
                "This hive has taken too many grants within a minute. Ask through the queen.",
                code="too_many_grants",
            )
        self._used[grant.nonce] = time.monotonic(), grant.expires
        return grant

    def _forget(self) -> None:
        """Forget those used over a minute ago: they have expired, or the clock was set back."""
        over = time.monotonic() - 2 * LIVES_S
        while self._used:
            used_at, expires = next(iter(self._used.values()))
            if used_at >= over:
                return
            self._forgotten = max(self._forgotten, expires)
            self._used.popitem(last=False)


def refused(code: str) -> Unauthorized:
    """Why a grant is not taken."""
    return Unauthorized(f"{_WHY[code]} {_AGAIN}", code=code)


def split_grant(query: bytes) -> tuple[str | None, bytes]:
    """The grant of a query, None without one; and the query without it."""
    if _FIELD not in query:
        return None, query
    fields = query.split(b"&")
    found = [field for field in fields if field.startswith(_FIELD)]
    if not found:
        return None, query
    rest = b"&".join(field for field in fields if not field.startswith(_FIELD))
    token = found[0].removeprefix(_FIELD) if len(found) == 1 else b""
    return token.decode("latin-1"), rest


def url_with_grant(base_url: str, target: str, token: str | None) -> str:
    """The URL of a hive to which a caller is sent."""
    if token is None:
        return base_url + target
    return f"{base_url}{target}{'&' if '?' in target else '?'}{PARAMETER}={token}"


def preferred(headers: Mapping[str, str]) -> bool:
    """Whether a request asks for direct mode (RFC 7240)."""
    return PREFERENCE in preferences(headers.get("prefer", ""))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    padded = text + "=" * (-len(text) % 4)
    return base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)
