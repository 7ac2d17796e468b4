"""API keys: signed tokens that every daemon of the cluster can check by itself.

A key is a JSON Web Token (RFC 7519) under HS256, with a prefix by which scanners of repositories
can find it: ``hk-<header>.<claims>.<signature>``. The signing key is derived from the cluster's
secret, so hives check keys without the queen, and another cluster's keys fit nowhere here.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, get_args

from operations.errors import Forbidden, TooManyRequests, Unauthorized
from wire.secret import Secret

Scope = Literal["infer", "queue", "drone", "admin"]
"""What a key may do; ``admin`` may do everything."""

SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "hk-"
MAX_CHARS = 2048
KEY_ID = re.compile(r"[a-z0-9]{12}")
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
REMEMBERED = 10_000
CHECKED = 1024  # keys whose signature need not be looked at again


@dataclass(frozen=True)
class Caller:
    """Who sends a request.

    :param kind: ``local`` on a daemon that only listens on loopback, ``daemon`` proven by the
        secret, ``key`` by an API key, ``stranger`` by nothing
    :param id: the key's id, or a daemon's role and id
    :param rpm: requests a minute at each daemon; None has no limit
    :param until: when the key expires, seconds since the epoch
    """

    kind: Literal["local", "daemon", "key", "stranger"]
    id: str
    scopes: frozenset[Scope] = frozenset()
    tenant: str = "default"
    rpm: int | None = None
    until: float = math.inf

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def must(self, scope: Scope) -> None:
        """:raises Forbidden: the caller has not this scope"""
        if not self.may(scope):
            raise Forbidden(
                f"This key may not do that: it lacks the scope '{scope}'. Ask whoever runs the "
                f"cluster for one made with '--scope {scope}'.",
                code="scope_missing",
            )


LOCAL = Caller("local", "local", frozenset(SCOPES))
STRANGER = Caller("stranger", "stranger")


class Keys:
    """Makes and checks the API keys of one cluster."""

    def __init__(self, secret: Secret) -> None:
        self._key = secret.derive("api keys")
        self._cluster_id = secret.cluster_id
        self._good: OrderedDict[str, Caller] = OrderedDict()
        """Keys that were found good."""

    def make(
        self,
        *,
        scopes: tuple[Scope, ...],
        tenant: str = "default",
        rpm: int | None = None,
        seconds: float | None = None,
    ) -> tuple[str, str]:
        """A new key, and its id, which is no secret.

        :param seconds: how long it holds; None holds until it is revoked
        """
        import jwt  # loaded by whoever meets a key; a daemon at rest does without

        now = int(time.time())
        key_id = secrets.token_hex(6)
        claims: dict[str, Any] = {
            "jti": key_id,
            "iss": self._cluster_id,
            "iat": now,
            "sub": tenant,
            "scopes": list(scopes),
        }
        if rpm is not None:
            claims["rpm"] = rpm
        if seconds is not None:
            claims["exp"] = now + int(seconds)
        return PREFIX + jwt.encode(claims, self._key, algorithm="HS256"), key_id

    def check(self, key: str) -> Caller:
        """:raises Unauthorized: forged, altered, expired, or another cluster's"""
        good = self._good.get(key)
        if good is not None and time.time() < good.until:
            return good
        caller = self._good[key] = self._checked(key)
        while len(self._good) > CHECKED:
            self._good.popitem(last=False)
        return caller

    def _checked(self, key: str) -> Caller:
        import jwt

        if len(key) > MAX_CHARS or not key.startswith(PREFIX) or not key.isascii():
            raise refused_key("malformed_key")
        try:
            claims = jwt.decode(
                key.removeprefix(PREFIX),
                self._key,
                algorithms=["HS256"],
                issuer=self._cluster_id,
                options={"require": ["jti", "iss", "sub", "scopes"], "verify_iat": False},
            )
            return _caller(claims)
        except jwt.ExpiredSignatureError:
            raise refused_key("expired_key", "The API key has expired.") from None
        except (jwt.InvalidTokenError, ValueError, TypeError):
            raise refused_key("invalid_key") from None


def refused_key(code: str, what: str = "The API key does not hold here.") -> Unauthorized:
    return Unauthorized(
        f"{what} Ask whoever runs the cluster for one ('hive keys new'), and send it as "
        "'Authorization: Bearer …'; the hive command takes it from HIVE_API_KEY.",
        code=code,
    )


def _caller(claims: dict[str, Any]) -> Caller:
    """:raises ValueError, TypeError: a claim has not the form that :meth:`Keys.make` gives it"""
    rpm = claims.get("rpm")
    if not (
        KEY_ID.fullmatch(claims["jti"])
        and TENANT.fullmatch(claims["sub"])
        and (rpm is None or (type(rpm) is int and rpm > 0))
    ):
        raise ValueError
    scopes = frozenset(scope for scope in SCOPES if scope in claims["scopes"])
    until = float(claims.get("exp", math.inf))
    return Caller("key", claims["jti"], scopes, claims["sub"], rpm, until)


class Limits:
    """Requests a minute, by key: the generic cell rate algorithm (ITU-T I.371) with a burst of
    one minute's worth."""

    def __init__(self) -> None:
        self._due: OrderedDict[str, float] = OrderedDict()
        """When a key's bucket will be empty again, on the monotonic clock."""

    def take(self, caller: Caller, now: float) -> None:
        """Count one request. :raises TooManyRequests: over the limit; says when to come again"""
        if caller.rpm is None:
            return
        each = 60 / caller.rpm
        due = max(self._due.get(caller.id, now), now) + each
        if due - now > 60 + 1e-9:
            raise TooManyRequests(
                f"This key may send {caller.rpm} requests a minute. Wait, and send it again.",
                retry_after=due - now - 60,
            )
        self._due[caller.id] = due
        self._due.move_to_end(caller.id)
        while len(self._due) > REMEMBERED:
            self._due.popitem(last=False)
