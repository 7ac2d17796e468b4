"""The hives that the queen knows, from their heartbeats alone.

======= ================================================= =========================
state   meaning                                           work
======= ================================================= =========================
online  heard from within 3 s                             yes
suspect silent for 3 s, or its heartbeat stream ended     none new
gone    silent for 5 s                                    none; shown for a while
======= ================================================= =========================
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any, Literal

import aiohttp
from pydantic import ValidationError

from operations.errors import Conflict, Forbidden, HiveError, InvalidRequest, WorkerBroke
from operations.hosts import Heartbeat, HiveInfo, HiveState, Ready, WorkerInfo
from queen.scheduler import Placement
from wire import sse
from wire.guard import hostname, is_loopback
from wire.headers import QUEEN_HEADER
from wire.log import outcome

log = logging.getLogger(__name__)

SUSPECT_S = 3.0
GONE_S = 5.0
FORGOTTEN_S = 3600.0
NEVER_HEARD_S = 60.0
MAX_HIVES = 1000
RETRY_S = 0.5
HEARTBEATS = "/v1/heartbeats/stream"

FoundBy = Literal["flag", "ready", "mdns"]


class KnownHive:
    """One hive: where it is, its last heartbeat, and the task that listens to it."""

    def __init__(self, url: str, found_by: FoundBy, hive_id: str | None) -> None:
        self.url = url
        self.found_by: FoundBy = found_by
        self.hive_id = hive_id
        self.beat: Heartbeat | None = None
        self.heard_at: float | None = None  # monotonic
        self.connected = False
        self.problem: str | None = None
        self.added_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()
        """Set when it is gone; what waits for its answer need wait no longer."""
        self.placed: Counter[str] = Counter()
        """Requests placed on each worker since the last heartbeat, which cannot know of them."""

    def state(self, now: float) -> HiveState:
        if self.heard_at is None or now - self.heard_at >= GONE_S:
            return "gone"
        stopping = self.beat is not None and self.beat.operational_status == "stopping"
        if not self.connected or stopping or now - self.heard_at >= SUSPECT_S:
            return "suspect"
        return "online"

    def info(self, now: float) -> HiveInfo:
        beat = self.beat
        state = self.state(now)
        workers = [self._worker(worker) for worker in beat.workers] if beat else []
        return HiveInfo(
            hive_id=self.hive_id or self.url,
            hive_url=self.url,
            state=state,
            found_by=self.found_by,
            last_heard_s=None if self.heard_at is None else round(now - self.heard_at, 3),
            version=beat.version if beat else None,
            problem=None if state == "online" else self.problem or "it is stopping",
            devices=beat.devices if beat else [],
            models=beat.models if beat else [],
            workers=workers,
            in_flight=sum(worker.in_flight for worker in workers),
        )

    def _worker(self, worker: WorkerInfo) -> WorkerInfo:
        more = self.placed[worker.worker_id]
        return worker.model_copy(update={"in_flight": worker.in_flight + more}) if more else worker


class Registry:
    """All hives, by URL. ``queen_id`` is new at each start: hives tell queens apart by it."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.queen_id = f"queen-{secrets.token_hex(4)}"
        self._http = http
        self._hives: dict[str, KnownHive] = {}

    def add(self, url: str, found_by: FoundBy, hive_id: str | None = None) -> KnownHive:
        """Listen to the hive at ``url`` from now on; a known one is left as it is."""
        url = canonical(url)
        known = self._hives.get(url)
        if known is None:
            if len(self._hives) >= MAX_HIVES:
                raise Conflict(f"The queen knows {MAX_HIVES} hives already and takes no more.")
            known = self._hives[url] = KnownHive(url, found_by, hive_id)
            known.task = asyncio.create_task(self._listen(known), name=f"listen {url}")
        return known

    def ready(self, hello: Ready) -> None:
        """A hive announces itself.

        :raises Conflict: another live hive has that id
        :raises Forbidden: its address is not on this machine, and nothing proves who it is
        """
        url = canonical(hello.hive_url)
        if hostname(url) is None:
            raise InvalidRequest(f"ready: '{url}' is no URL.", param="hive_url")
        if not is_loopback(hostname(url)):
            raise Forbidden(
                "A hive on another machine cannot prove yet that it belongs here. "
                "Start the agent on the queen's machine.",
                code="hive_not_local",
            )
        now = time.monotonic()
        for other in self._hives.values():
            if other.hive_id == hello.hive_id and other.url != url and other.state(now) != "gone":
                raise Conflict(
                    f"There is already a hive '{hello.hive_id}' at {other.url}. Start this one "
                    "with another --hive-id.",
                    code="duplicate_hive_id",
                    param="hive_id",
                )
        known = self.add(url, "ready", hello.hive_id)
        if known.hive_id != hello.hive_id and known.state(now) == "gone":
            known.hive_id = hello.hive_id

    def hives(self) -> list[HiveInfo]:
        """Every hive as it is now, by id; forgets those that have been gone for an hour."""
        now = time.monotonic()
        for known in list(self._hives.values()):
            last = known.heard_at or known.added_at
            limit = FORGOTTEN_S if known.heard_at else NEVER_HEARD_S
            if known.found_by != "flag" and now - last > limit:
                self._forget(known)
        shown = [k for k in self._hives.values() if k.heard_at or k.found_by == "flag"]
        return sorted((known.info(now) for known in shown), key=lambda hive: hive.hive_id)

    async def lost(self, url: str) -> None:
        """Return when the hive at this URL is gone."""
        if known := self._hives.get(url):
            await known.gone.wait()

    def placed(self, placement: Placement) -> None:
        """Count a request as a load of its worker until the hive itself does."""
        if known := self._hives.get(placement.hive_url):
            known.placed[placement.worker_id] += 1

    async def close(self) -> None:
        tasks = [known.task for known in self._hives.values() if known.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- listening ---------------------------------------------------------------------------

    async def _listen(self, known: KnownHive) -> None:
        while True:
            try:
                await self._subscribe(known)
                known.problem = "its heartbeat stream ended"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                known.problem = why_unheard(known.url, error)
            except (HiveError, ValidationError) as error:
                known.problem = f"what it sends is no heartbeat: {type(error).__name__}"
            if known.connected:
                known.connected = False
                outcome("hive", hive=known.hive_id, status="lost", why=known.problem)
            if known.state(time.monotonic()) == "gone":
                known.gone.set()
                stopped = known.beat and known.beat.operational_status == "stopping"
                if stopped and known.found_by != "flag":
                    self._forget(known)
            await asyncio.sleep(RETRY_S)

    def _forget(self, known: KnownHive) -> None:
        """Listen no more; a hive that announces itself again is a new one."""
        known.gone.set()
        self._hives.pop(known.url, None)
        if known.task is not None:
            known.task.cancel()

    async def _subscribe(self, known: KnownHive) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=GONE_S, sock_read=GONE_S)
        headers = {QUEEN_HEADER: self.queen_id, "accept": "text/event-stream"}
        async with self._http.get(known.url + HEARTBEATS, headers=headers, timeout=timeout) as got:
            if got.status != 200:
                raise WorkerBroke(f"{known.url} answered {got.status} instead of heartbeats.")
            async with aclosing(sse.decode(got.content.iter_any())) as events:
                async for event in events:
                    if event.event == "heartbeat":
                        self._heard(known, Heartbeat.model_validate_json(event.data))

    def _heard(self, known: KnownHive, beat: Heartbeat) -> None:
        now = time.monotonic()
        for other in list(self._hives.values()):
            if other is known or other.hive_id != beat.hive_id:
                continue
            if other.state(now) != "gone":
                self._refuse_duplicate(known, other)
            other.hive_id = None  # it has moved: its old address no longer bears its name
            if other.found_by != "flag":
                self._forget(other)
        if known.hive_id is not None and known.hive_id != beat.hive_id and known.beat is None:
            log.warning("%s calls itself %s, not %s", known.url, beat.hive_id, known.hive_id)
        known.beat, known.hive_id, known.heard_at = beat, beat.hive_id, now
        known.placed.clear()
        known.problem = None
        if known.gone.is_set():
            known.gone = asyncio.Event()
        if not known.connected:
            known.connected = True
            outcome("hive", hive=known.hive_id, status="joined", url=known.url, by=known.found_by)

    def _refuse_duplicate(self, known: KnownHive, other: KnownHive) -> None:
        if known.problem is None:
            log.error(
                "%s calls itself %s, which is the hive at %s; it gets no work. Start it with "
                "another --hive-id.",
                known.url,
                other.hive_id,
                other.url,
            )
        raise WorkerBroke(f"{known.url} has the id of another hive.")


def why_unheard(url: str, error: Exception) -> str:
    """A sentence for people."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"nobody answers at {url}"
    if isinstance(error, TimeoutError):
        return f"what listens at {url} is silent"
    return f"its heartbeats broke off ({type(error).__name__})"


def canonical(url: str) -> str:
    """One spelling for one address: no trailing slash, and loopback by number."""
    url = url.rstrip("/")
    return url.replace("//localhost:", "//127.0.0.1:", 1)


def gathered(hives: Iterable[HiveInfo], kind: str) -> list[dict[str, Any]]:
    """The workers, models or devices of all hives, each with its hive's id."""
    return [
        {**item.model_dump(exclude_none=True), "hive_id": hive.hive_id}
        for hive in hives
        if hive.state != "gone"
        for item in getattr(hive, kind)
    ]
