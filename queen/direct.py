"""The queen's part in direct mode: whom she sends to a hive, and with which URL."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request as Posted

from operations.errors import HiveError
from operations.hosts import Task
from queen.jobs import Forward
from queen.registry import Registry
from queen.scheduler import Placement
from wire.addresses import hostname
from wire.answering import Answering
from wire.direct import PREFERENCE, grant_for, key_of, preferred, token_of, url_with_grant
from wire.door.body import digest_of, model_of
from wire.door.door import Request, Serve
from wire.jobs import stream_path
from wire.log import REQUEST_ID, outcome
from wire.metrics import Metrics, Seen
from wire.openai import TASKS
from wire.secret import Secret
from wire.trust_api import caller_of

HELD_S: Final = 2.0  # the hive's heartbeats tell of a request by then
REDIRECT: Final = 307
APPLIED: Final = {"preference-applied": PREFERENCE, "vary": "prefer", "cache-control": "no-store"}
_GATEWAY: Final = ("forwarded", "x-forwarded-for", "via")

Choose = Callable[[str, Task], Placement]
"""Model and task → who would serve it. Raises HiveError."""


class Direct:
    """Sends callers to hives."""

    def __init__(
        self,
        secret: Secret | None,
        registry: Registry,
        placed: Callable[[str], Forward | None],
    ) -> None:
        """
        :param secret: without one, everybody is on this machine, and no grant is needed
        :param placed: the id of a job → the hive that has it
        """
        self._key = key_of(secret) if secret else None
        self._registry = registry
        self._placed = placed

    def url(self, hive_url: str, hive_id: str, request: Request) -> str | None:
        """Where a caller may send a request himself, once, within 30 s.

        :param request: as it is to come to the hive; its headers are those with which he asks
        :returns: None where he would not reach the hive, or the hive has proven nothing lately
        """
        now = self._registry.clock(hive_url)
        if now is None or any(name in request.headers for name in _GATEWAY):
            return None
        way = self._registry.peer(hive_url).way
        if way is None or not reachable(way[0], request.address):
            return None
        base_url, _, instance = way
        if self._key is None:
            return url_with_grant(base_url, request.target, None)
        grant = grant_for(
            request.caller,
            hive_id=hive_id,
            instance=instance,
            method=request.method,
            target=request.target,
            digest=digest_of(request.body),
            now=now,
        )
        return url_with_grant(base_url, request.target, token_of(self._key, grant))

    def job_stream(self, posted: Posted, job_id: str) -> tuple[str, dict[str, str]] | None:
        """The URL of a job's stream at its hive, for a caller who prefers it and can follow, and
        the headers that say so. :param posted: the request that has brought the job"""
        target = self._placed(job_id)
        if target is None or not preferred(posted.headers):
            return None
        path = stream_path(job_id)
        address = posted.client.host if posted.client else ""
        caller = caller_of(posted)
        reading = Request("GET", path, path, posted.headers, b"", job_id, caller, address)
        url = self.url(target.hive_url, target.hive_id, reading)
        return None if url is None else (url, {**APPLIED, "x-hive-id": target.hive_id})

    def before(self, relay: Serve, choose: Choose, metrics: Metrics) -> Serve:
        """Who serves inference: redirects those who prefer that and can follow, relays all else."""

        def serve(request: Request, answer: Answering) -> Awaitable[None] | None:
            if preferred(request.headers) and self._redirected(request, answer, choose, metrics):
                return None
            return relay(request, answer)

        return serve

    def _redirected(
        self, request: Request, answer: Answering, choose: Choose, metrics: Metrics
    ) -> bool:
        """Answer with a redirect; False where there is none, and why is the relay's to say."""
        try:
            model = model_of(request.body)
            chosen = choose(model, TASKS.get(request.path, "generate"))
            url = self.url(chosen.hive_url, chosen.hive_id, request)
        except HiveError:
            return False
        if url is None:
            return False
        self._count(chosen)
        headers = {**APPLIED, "location": url, "x-hive-id": chosen.hive_id}
        fields = [(n.encode(), v.encode("latin-1")) for n, v in headers.items()]
        answer.whole(REDIRECT, fields, b"")
        metrics.placed("openai", chosen.reason)
        metrics.request_ended(request.path, Seen(REDIRECT, None, None, 0))
        REQUEST_ID.set(request.request_id)
        outcome(
            "request",
            request=request.request_id,
            path=request.path,
            status=REDIRECT,
            hive=chosen.hive_id,
        )
        return True

    def _count(self, chosen: Placement) -> None:
        """Let it count as a load until the hive's own count has it."""
        asyncio.get_running_loop().call_later(HELD_S, self._registry.load(chosen))


def reachable(base_url: str, address: str) -> bool:
    """Whether a caller can be thought to reach a hive.

    Who asks from the queen's own machine reaches what she reaches. Others reach no loopback or
    link-local address of hers, none of a family that they do not use, and no private one from
    beyond a gateway.

    :param base_url: of the hive, with an address as its host
    :param address: from which the caller asks the queen
    """
    try:
        hive, caller = _address(hostname(base_url) or ""), _address(address)
    except ValueError:
        return False
    if caller.is_loopback:
        return True
    if hive.is_loopback or hive.is_link_local or hive.is_unspecified:
        return False
    return hive.version == caller.version and not (hive.is_private and caller.is_global)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address
