"""Callbacks go out: in order for each task, at least once, only where they may.

They are signed as Standard Webhooks has it (https://www.standardwebhooks.com). What cannot be
delivered is tried again for about a day.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from standardwebhooks.webhooks import Webhook

from hive_orchestration.machine import deliveries
from hive_orchestration.machine.deliveries import Delivery
from hive_orchestration.store import Store
from hive_orchestration.transaction import Step
from operations.errors import HiveError, InvalidRequest
from operations.hosts import VERSION
from queen.queue_house import any_of
from queen.targets import Targets, origin

AT_ONCE: Final = 256
OF_HOST: Final = 32  # of these
CONNECT_S: Final = 5.0
ANSWER_S: Final = 15.0
LEASE_S: Final = 60.0  # more than an attempt takes
LOOK_S: Final = 1.0  # for what another queen has left
TOGETHER_S: Final = 0.05  # what comes within it is looked for once
REST: Final = 10  # times what a look took, before the next
FIRST_PAUSE_S: Final = 5.0
LAST_PAUSE_S: Final = 3600.0
TRIED_S: Final = 86_400.0
AFTER_TROUBLE_S: Final = 1.0

log = logging.getLogger(__name__)


class NotDelivered(Exception):
    """A callback did not come through; the message says why."""


class CheckedResolver(AbstractResolver):
    """Finds only addresses that may be called; the connection goes to what it has found."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """:raises OSError: it has no such address"""
        found = await self._resolver.resolve(host, port, family)
        may = [one for one in found if self._targets.permits(host, port, one["host"])]
        if not may:
            raise OSError(f"{host} means an address that may not be called")
        return may

    async def close(self) -> None:
        await self._resolver.close()


class Deliverer:
    """Delivers what the queue has for others. Belongs to the queen's event loop."""

    def __init__(
        self,
        store: Store,
        targets: Targets,
        *,
        secret: str | None,
        key: bytes,
    ) -> None:
        """
        :param secret: told to the default target, as the dispatcher's SDK expects it
        :param key: signs callbacks
        """
        self._store = store
        self._targets = targets
        self._webhook = Webhook(key)
        self._secret = secret
        self._http: aiohttp.ClientSession | None = None
        self._running: dict[asyncio.Task[None], str] = {}  # and the host that each is to reach
        self._ended = asyncio.Event()
        self._together_s = TOGETHER_S
        self._task = asyncio.get_running_loop().create_task(self._deliver_on())

    async def drain(self, deadline_s: float) -> None:
        """What is on its way may arrive. What is not, is delivered by the next queen."""

    async def close(self) -> None:
        tasks = [self._task, *self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        http, self._http = self._http, None
        if http is not None:
            await http.close()

    async def _deliver_on(self) -> None:
        while True:
            changed = self._store.changes.next()
            self._ended.clear()
            try:
                wait_s = await self._deliver_due()
            except HiveError as error:
                log.warning("callbacks could not be looked for: %s", error.message)
                wait_s = AFTER_TROUBLE_S
            except Exception:  # others' callbacks must not wait for a mend
                log.exception("callbacks could not be looked for")
                wait_s = AFTER_TROUBLE_S
            if wait_s:
                await any_of(wait_s, changed, self._ended)
                await asyncio.sleep(self._together_s)

    async def _deliver_due(self) -> float:
        """Begin what is due; seconds until there may be more."""
        room = AT_ONCE - len(self._running)
        if room <= 0:
            return LOOK_S
        next_s = await self._store.read(deliveries.next_s)
        if next_s is None or next_s > 0:
            return min(LOOK_S, next_s or LOOK_S)
        at_work = Counter(self._running.values())
        began = time.perf_counter()
        taken = await self._store.write(
            partial(deliveries.take, most=room, lease_s=LEASE_S, of_host=OF_HOST, at_work=at_work)
        )
        # It passes by all that waits for a host that has enough: much, if that one is dead.
        took_s = time.perf_counter() - began
        self._together_s = min(max(TOGETHER_S, REST * took_s), LOOK_S)
        for one in taken:
            task = asyncio.get_running_loop().create_task(self._deliver(one))
            self._running[task] = deliveries.host_of(one.url)
            task.add_done_callback(self._done)
        return 0.0 if len(taken) == room else LOOK_S

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._ended.set()

    async def _deliver(self, one: Delivery) -> None:
        try:
            await self._send(one)
        except NotDelivered as error:
            step: Step[None] = self._after(one, str(error))
        else:
            step = partial(deliveries.delivered, one=one)
        try:
            await self._store.write(step)
        except HiveError as error:  # it is taken up again when its time is over
            log.warning("what became of a callback could not be noted: %s", error.message)

    def _after(self, one: Delivery, why: str) -> Step[None]:
        tried_s = sum(pause_after(n) for n in range(one.attempts + 1))
        say = log.warning if one.attempts == 0 or tried_s >= TRIED_S else log.info
        say("callback of task %s to %s: %s", one.task, origin(one.url), why)
        if tried_s >= TRIED_S:
            log.warning("callbacks of task %s are given up", one.task)
            return partial(deliveries.given_up, one=one, tried_s=TRIED_S)
        pause_s = pause_after(one.attempts) * random.uniform(0.9, 1.1)
        return partial(deliveries.failed, one=one, why=why, pause_s=pause_s)

    async def _send(self, one: Delivery) -> None:
        """:raises NotDelivered: it did not come through"""
        try:
            url = self._targets.check(one.url)
        except InvalidRequest as error:
            raise NotDelivered(error.message) from None
        data = json.dumps(one.body, separators=(",", ":"))
        headers = {
            "content-type": "application/json",
            "user-agent": f"hive/{VERSION}",
            **signature(self._webhook, one, data),
        }
        if self._secret is not None and one.url == self._targets.default:
            headers["x-callback-secret"] = self._secret
        try:
            async with self._session().post(
                url, data=data.encode(), headers=headers, allow_redirects=False
            ) as answer:
                if not 200 <= answer.status < 300:
                    raise NotDelivered(f"answered {answer.status}")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise NotDelivered(_why(error)) from None

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=CheckedResolver(self._targets),
                    use_dns_cache=False,
                    force_close=True,  # each is resolved, and looked at, anew
                    limit=AT_ONCE,
                ),
                timeout=aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
            )
        return self._http


def pause_after(attempts: int) -> float:
    """Seconds before the next attempt, after so many and one more that have failed."""
    return min(FIRST_PAUSE_S * 2.0 ** min(attempts, 30), LAST_PAUSE_S)


def signature(signs: Webhook, one: Delivery, data: str) -> Mapping[str, str]:
    """The headers of Standard Webhooks; each attempt at one callback has the same id."""
    digest = hashlib.sha256(f"{one.task}/{one.seq}".encode()).hexdigest()
    id, now = f"msg_{digest[:24]}", datetime.now(UTC)
    return {
        "webhook-id": id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signs.sign(id, now, data),
    }


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return str(error.os_error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return "nobody answers"
    return f"broke off ({type(error).__name__})"
