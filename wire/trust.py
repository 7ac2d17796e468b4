"""Whom a daemon lets in, and to what.

========= ================================ ===========================================
caller    known by                         may
========= ================================ ===========================================
daemon    a session of :mod:`wire.proof`   everything
key       ``Authorization: Bearer hk-…``   what its scopes say
any       a grant of :mod:`wire.direct`    the one request that it is for
key       a token of the dispatcher's,       the dispatcher's routes
          :class:`Tokens`
local     nothing; on a daemon that only   everything
          listens on loopback
stranger  nothing                          ``/health`` (only ``ok``) and the hello
========= ================================ ===========================================
"""

from __future__ import annotations

import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, Literal, NamedTuple

from starlette.types import Scope as AsgiScope

from operations.errors import HiveError, TooManyRequests, Unauthorized
from wire.addresses import url_at
from wire.direct import Grants, split_grant
from wire.headers import SESSION_HEADER
from wire.keys import LOCAL, PREFIX, STRANGER, Caller, Keys, Limits, Scope, refused_key
from wire.log import outcome
from wire.proof import HELLO, Acceptor, Answer, Hello, Role
from wire.revocations import Revocations
from wire.secret import Secret

CALLER = "hive.caller"  # key in the ASGI scope
TOLD_S = 600.0
MAX_TOLD = 4096
MAX_LINES = 200

_PUBLIC = ("/health", HELLO)
_ANY_KEY = ("/v1/models", "/v1/info", "/metrics")
_INFER = (
    "/v1/chat",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/rerank",
    "/v1/jobs",
)
_QUEUE = ("/v1/tasks", "/v1/events")
_DRONE = ("/v1/claims", "/v1/drones")
_DISPATCHER: Final[Mapping[str, Scope]] = {
    "/enqueue": "queue",
    "/claim": "drone",
    "/callback": "drone",
}
"""The routes of the dispatcher, which has no version in its paths."""


@lru_cache(maxsize=256)
def needed(method: str, path: str) -> Scope | Literal["public", "any"]:
    """The scope that a route asks for; a route that is not named here asks for ``admin``.

    ``POST /v1/jobs`` looks at its operation itself (:func:`wire.jobs_api.scope_of`).
    """
    if path in _PUBLIC:
        return "public"
    if _below(path, _ANY_KEY) or (method, path) == ("POST", "/v1/jobs"):
        return "any"
    if _below(path, _INFER) and path != "/v1/jobs":
        return "infer"
    if _below(path, _QUEUE) or (method, path) == ("GET", "/v1/roles"):
        return "queue"
    if _below(path, _DRONE):
        return "drone"
    if method == "POST" and path in _DISPATCHER:
        return _DISPATCHER[path]
    return "admin"


def _below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


class Known(NamedTuple):
    """Who sends a request.

    :param digest: SHA-256 that its body must have, in hex; None where nobody has signed it
    :param granted: a queen has, for him
    """

    caller: Caller
    digest: str | None = None
    granted: bool = False


class Tokens:
    """The dispatcher's shared words, as its SDK sends them; they hold on its routes alone.

    On loopback, where nobody else is asked for anything, these are asked for where they are set:
    the internal token on ``/enqueue``, the callback secret on ``/callback``.
    """

    def __init__(self, internal: str | None, callback: str | None) -> None:
        """:param callback: what opens ``/callback``, as ``x-callback-secret``"""
        self._internal = internal
        self._callback = callback

    def caller(self, path: str, headers: Mapping[str, str]) -> Caller | None:
        """Who has said one of them. :raises Unauthorized: a callback secret came, and is wrong"""
        if path == "/callback" and self._callback is not None:
            said = headers.get("x-callback-secret") or headers.get("x-ci-callback-secret")
            if said is not None:
                if not _same(said, self._callback):
                    raise _refused_word("The callback secret does not hold here.")
                return Caller("key", "callback-secret", frozenset(("drone",)))
        key = presented_key(headers)
        if key is not None and self._internal is not None and _same(key, self._internal):
            return Caller("key", "internal-token", frozenset(("queue", "drone")))
        return None

    def demanded(self, path: str) -> Unauthorized | None:
        """What somebody is refused with who has said none of them, and has no key either."""
        if path == "/enqueue" and self._internal is not None:
            return _refused_word("The internal token did not come, or does not hold here.")
        if path == "/callback" and self._callback is not None:
            return _refused_word("The callback secret did not come.")
        return None


def _same(said: str, word: str) -> bool:
    return hmac.compare_digest(said.encode(), word.encode())


def _refused_word(what: str) -> Unauthorized:
    return Unauthorized(
        f"{what} Send HIVE_INTERNAL_TOKEN as 'Authorization: Bearer …', and "
        "HIVE_CALLBACK_SECRET as 'x-callback-secret', as the queen has them.",
        code="wrong_token",
    )


class Trust:
    """What one daemon knows of its cluster's secret, keys and sessions."""

    def __init__(
        self,
        secret: Secret | None,
        revocations: Revocations,
        *,
        role: Role,
        id: str,
        instance: str,
        listens_openly: bool,
        fingerprint: str = "",
        advertised: Iterable[str] = (),
        counts: bool = True,
    ) -> None:
        """
        :param listens_openly: others than this machine can reach it, so nobody is let in unproven
        :param fingerprint: of the daemon's own certificate; empty without TLS
        :param advertised: URLs under which others reach it, besides the address that is dialled
        :param counts: whether :meth:`admit` counts the requests of keys that have a limit; else
            somebody else does, once for several processes
        """
        self.secret = secret
        self.revocations = revocations
        self.listens_openly = listens_openly
        self.scheme = "https" if fingerprint else "http"
        self._advertised = tuple(advertised)
        self._keys = Keys(secret) if secret else None
        self._limits = Limits()
        self._counts = counts
        self._acceptor = (
            Acceptor(secret, role=role, id=id, instance=instance, fingerprint=fingerprint)
            if secret
            else None
        )
        self._grants = Grants(secret, id=id, instance=instance) if secret else None
        self.refusals = Refusals()
        self.tokens: Tokens | None = None
        """A queen's, for the routes of her dispatcher."""

    def admit(self, scope: AsgiScope, headers: Mapping[str, str]) -> Known:
        """Who calls, and, for a signed request, the digest that its body must have.

        A grant is taken out of the scope's query, so that nobody behind this sees it.

        :raises Unauthorized: a key, a proof or a grant came, and does not hold; or one is needed
        :raises Forbidden: the caller may not use this route
        :raises TooManyRequests: a key is over its limit
        """
        known = self._identify(scope, headers)
        caller = scope[CALLER] = known.caller
        need = needed(scope["method"], scope["path"])
        if need == "public":
            return known
        if caller is STRANGER:
            raise refused_key("no_key", "This daemon listens to others, and no API key came.")
        if need != "any":
            caller.must(need)
        if scope["method"] == "POST" and self._counts:
            self.count(caller)
        return known

    def signed(self, method: str, target: str, headers: Mapping[str, str]) -> str | None:
        """The digest that the body of a daemon's request must have, which by its signature may do
        everything; None where it is not signed, or nobody could check it.

        :raises Unauthorized: the signature does not hold
        """
        mark = headers.get(SESSION_HEADER)
        if not mark or self._acceptor is None:
            return None
        return self._acceptor.check(mark, method, target, headers)[1]

    def admits_again(self, caller: Caller) -> bool:
        """Whether a POST that says what an admitted one of this caller said would be admitted now;
        counts it if so. False, too, where only :meth:`admit` can tell."""
        if caller.kind == "local":
            return True
        if caller.kind != "key" or time.time() >= caller.until or caller.id in self.revocations:
            return False
        if caller.rpm is not None and self._counts:
            try:
                self.count(caller)
            except TooManyRequests:
                return False
        return True

    def count(self, caller: Caller) -> None:
        """Count one request. :raises TooManyRequests: his key is over its limit"""
        self._limits.take(caller, time.monotonic())

    def tell(self, scope: AsgiScope, error: HiveError) -> None:
        """Log, once, that a request was refused for what its caller is."""
        who = scope["client"][0] if scope.get("client") else "unknown"
        caller: Caller | None = scope.get(CALLER)
        key = caller.id if caller is not None and caller.kind == "key" else None
        self.refusals.tell(key or who, error, key=key, address=who, path=scope["path"][:128])

    def greet(self, hello: Hello, scope: AsgiScope) -> Answer:
        """Prove this daemon to another one; see :mod:`wire.proof`.

        :raises Unauthorized: this daemon has no secret
        """
        if self._acceptor is None:
            raise Unauthorized(
                "This daemon has no cluster secret, so it can prove nothing. Give its machine one "
                "('hive secret set') and start it again.",
                code="no_secret",
            )
        host, port = scope["server"]
        own = (url_at(self.scheme, host, port), *self._advertised)
        return self._acceptor.greet(hello, own, scope["client"][0] if scope.get("client") else "")

    def _identify(self, scope: AsgiScope, headers: Mapping[str, str]) -> Known:
        if self.tokens is not None and scope["path"] in _DISPATCHER:
            return self._at_dispatcher(self.tokens, scope, headers)
        return self._known(scope, headers)

    def _at_dispatcher(self, tokens: Tokens, scope: AsgiScope, headers: Mapping[str, str]) -> Known:
        scope[CALLER] = STRANGER
        if (caller := tokens.caller(scope["path"], headers)) is not None:
            return Known(caller)
        known = self._known(scope, headers)
        if known.caller.kind in ("local", "stranger") and (
            refusal := tokens.demanded(scope["path"])
        ):
            raise refusal
        return known

    def _known(self, scope: AsgiScope, headers: Mapping[str, str]) -> Known:
        query = scope["query_string"]
        token, scope["query_string"] = split_grant(query)
        if (signed := headers.get(SESSION_HEADER)) and self._acceptor is not None:
            target = _joined(scope["raw_path"], query)
            return Known(*self._acceptor.check(signed, scope["method"], target, headers))
        if token is not None and self._grants is not None:
            grant = self._grants.take(token, scope["method"], target_of(scope))
            if grant.kind == "key":
                self.revocations.check(grant.id)
            return Known(grant.caller, grant.digest, granted=True)
        key = presented_key(headers)
        if key is not None and self._keys is not None:
            try:
                scope[CALLER] = caller = self._keys.check(key)
                self.revocations.check(caller.id)
                return Known(caller)
            except Unauthorized:
                if self.listens_openly or key.startswith(PREFIX):
                    raise  # on loopback other clients' made-up keys do no harm
        return Known(STRANGER if self.listens_openly else LOCAL)


def target_of(scope: AsgiScope) -> str:
    """Path and query of a request, as they stand in its first line."""
    return _joined(scope["raw_path"], scope["query_string"])


def _joined(path: bytes, query: bytes) -> str:
    return (path + b"?" + query if query else path).decode("latin-1")


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key that came as a bearer token or, as Anthropic's clients send it, ``x-api-key``."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key")


class Refusals:
    """Says each refusal once: who, and why. A flood of them does not flood the log: of more than
    two hundred within ten minutes only that is said."""

    def __init__(self) -> None:
        self._told: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._window = (float("-inf"), 0)

    def tell(self, who: str, error: HiveError, **fields: object) -> None:
        """Log a refusal, unless the same was logged within ten minutes."""
        if not self._is_news(who, error.code):
            return
        now = time.monotonic()
        began, count = self._window
        if now - began > TOLD_S:
            began, count = now, 0
        self._window = (began, count + 1)
        if count < MAX_LINES:
            outcome("refused", level=logging.WARNING, who=who, why=error.code, **fields)
        elif count == MAX_LINES:
            outcome("refused", level=logging.WARNING, why="too many to tell for ten minutes")

    def _is_news(self, who: str, code: str) -> bool:
        """Whether the same has not been asked within ten minutes."""
        now = time.monotonic()
        known = (who, code)
        if now - self._told.get(known, float("-inf")) < TOLD_S:
            return False
        self._told[known] = now
        self._told.move_to_end(known)
        while len(self._told) > MAX_TOLD:
            self._told.popitem(last=False)
        return True
