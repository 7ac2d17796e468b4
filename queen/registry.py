"""The hives that the queen knows, from their heartbeats alone.

A hive is learnt of by mDNS, by ``--hive`` or because it says ``ready``. Whatever is said of it
there is a rumour: what counts is what it says itself, once it has proven that it belongs here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

import aiohttp
from pydantic import ValidationError

from job_client.client import JobClient
from operations.errors import (
    Conflict,
    Forbidden,
    HiveError,
    InvalidRequest,
    Unauthorized,
    Unavailable,
    WorkerBroke,
)
from operations.hosts import Heartbeat, HiveInfo, Ready
from queen.known import RETRY_S, SUSPECT_S, FoundBy, KnownHive
from queen.scheduler import Placement
from wire import sse
from wire.addresses import checked_url, hostname, is_loopback
from wire.headers import QUEEN_HEADER
from wire.keys import Caller
from wire.log import outcome
from wire.mdns import Sighting
from wire.peer import Peer
from wire.secret import Secret
from wire.trust import Refusals

log = logging.getLogger(__name__)

FORGOTTEN_S = 3600.0
NEVER_HEARD_S = 60.0
MAX_HIVES = 1000
MAX_RUMOURS = 256
MAX_ADDRESSES = 4  # of one announced hive
LAST_RETRY_S = 5.0
CONNECT_S = 1.0  # a packet lost on a link that was down is not waited for
RESUME_S = 5.0  # as long as a silent hive is not yet gone
HEARTBEATS = "/v1/heartbeats/stream"


class AlreadyHeard(Exception):
    """The hive at this address is heard from at another one."""


class Registry:
    """All hives, by URL."""

    def __init__(
        self,
        queen_id: str,
        secret: Secret | None,
        refusals: Refusals,
        heard: Callable[[HiveInfo, Heartbeat], None] = lambda hive, beat: None,
        doubted: Callable[[str], None] = lambda url: None,
    ) -> None:
        """
        :param queen_id: new at each start: hives tell queens apart by it
        :param heard: told of each heartbeat
        :param doubted: told at which URL a hive has been lost sight of
        """
        self.queen_id = queen_id
        self._secret = secret
        self._refusals = refusals
        self._heard_from = heard
        self._doubted = doubted
        self.forgotten: Callable[[str], None] = lambda url: None
        """Told which URL leads to no hive that is known any more."""
        self._hives: dict[str, KnownHive] = {}
        self.changes = 0
        """Counts what may change where a request can go; but for hives that fall silent."""
        self._closing: set[asyncio.Task[None]] = set()

    def add(
        self,
        url: str,
        found_by: FoundBy,
        hive_id: str | None = None,
        service: str | None = None,
    ) -> KnownHive:
        """Listen to the hive at ``url`` from now on; a known one is left as it is.

        :raises Conflict: there are too many already
        """
        known = self._hives.get(url)
        if known is None:
            self._make_room(found_by)
            peer = Peer(
                url,
                self._secret,
                role="queen",
                id=self.queen_id,
                roles=("hive",),
                connect_s=CONNECT_S,
            )
            known = KnownHive(peer, found_by, hive_id, service, time.monotonic())
            self._hives[url] = known
            known.task = asyncio.create_task(self._listen(known), name=f"listen {url}")
        elif service is not None:
            known.service, known.withdrawn = service, False
            known.hurry()
        return known

    def _make_room(self, found_by: FoundBy) -> None:
        """Rumours, which anybody on the LAN can spread, have a place of their own.

        :raises Conflict: there is none left
        """
        rumours = [k for k in self._hives.values() if k.rumour]
        if found_by != "mdns":
            if len(self._hives) - len(rumours) >= MAX_HIVES:
                raise Conflict(f"The queen knows {MAX_HIVES} hives already and takes no more.")
        elif len(rumours) >= MAX_RUMOURS:
            # The oldest has been tried often enough to be none of ours.
            self._forget(min(rumours, key=lambda known: known.added_at))

    def ready(self, hello: Ready, caller: Caller) -> None:
        """A hive announces itself.

        :raises Conflict: another live hive has that id
        :raises Forbidden: it has proven nothing, and is not on this machine
        """
        try:
            url = checked_url(hello.hive_url)
        except ValueError as error:
            raise InvalidRequest(f"ready: {error}.", param="hive_url") from None
        if caller.kind != "daemon" and not is_loopback(hostname(url)):
            raise Forbidden(
                "A hive on another machine must prove that it belongs to this cluster. Give the "
                "queen and the hive one secret: 'hive secret new' here, 'hive secret set' there.",
                code="hive_not_proven",
            )
        now = time.monotonic()
        for other in self._hives.values():
            if other.hive_id != hello.hive_id or other.url == url or other.state(now) == "gone":
                continue
            if hello.instance and other.beat and other.beat.instance == hello.instance:
                continue  # itself, at another of its addresses
            raise Conflict(
                f"There is already a hive '{hello.hive_id}' at {other.url}. Start this one "
                "with another --hive-id.",
                code="duplicate_hive_id",
                param="hive_id",
            )
        known = self.add(url, "ready", hello.hive_id)
        if known.hive_id != hello.hive_id and known.state(now) == "gone":
            known.hive_id = hello.hive_id

    def sighted(self, sighting: Sighting) -> None:
        """mDNS tells of a hive; only the own cluster's count."""
        if self._secret is None or sighting.cluster_id != self._secret.cluster_id:
            stranger = Forbidden("of another cluster", code="foreign_cluster")
            who = f"cluster {sighting.cluster_id}"
            self._refusals.tell(who, stranger, hive=sighting.hive_id, urls=sighting.urls)
            return
        for known in self._of(sighting.service):
            known.withdrawn = known.url not in sighting.urls
        for url in sighting.urls[:MAX_ADDRESSES]:
            try:
                self.add(url, "mdns", sighting.hive_id, sighting.service)
            except Conflict as error:
                self._refusals.tell(sighting.service, error)

    def withdrawn(self, service: str) -> None:
        """mDNS says that a hive has left; what is still heard from stays until it is silent."""
        now = time.monotonic()
        for known in self._of(service):
            known.withdrawn = True
            if known.found_by == "mdns" and known.state(now) == "gone":
                self._forget(known)

    def hives(self) -> list[HiveInfo]:
        """Every hive as it is now, by id; forgets those that have been gone for an hour."""
        now = time.monotonic()
        for known in list(self._hives.values()):
            last = known.heard_at or known.added_at
            limit = FORGOTTEN_S if known.heard_at else NEVER_HEARD_S
            if known.found_by == "ready" and now - last > limit:
                self._forget(known)
        shown = [known for known in self._hives.values() if self._shown(known)]
        return sorted((known.info(now) for known in shown), key=lambda hive: hive.hive_id)

    def unheard(self) -> list[dict[str, str]]:
        """What was found and is no hive of hers, ``{"url", "hive_id"?, "found_by", "why"}``."""
        return [
            {"url": k.url, "found_by": k.found_by, "why": k.problem}
            | ({"hive_id": k.hive_id} if k.hive_id else {})
            for k in self._hives.values()
            if k.problem is not None and k.heard_at is None
        ]

    def where(self, hive_id: str) -> str | None:
        """The URL at which a hive is heard from now."""
        now = time.monotonic()
        for known in self._hives.values():
            here = known.state(now) != "gone" and not known.leads_elsewhere(now)
            if here and known.hive_id == hive_id:
                return known.url
        return None

    def peer(self, url: str) -> Peer:
        """What speaks to the hive at this URL, proven and signed.

        :raises Unavailable: it is known no more
        """
        if known := self._hives.get(url):
            return known.peer
        raise Unavailable(f"The hive at {url} has left. Send the request again.", hop="queen")

    def clock(self, url: str) -> float | None:
        """What the clock of the hive at this URL shows now, as its last heartbeat has it, seconds
        since the epoch; None when it was never heard."""
        known = self._hives.get(url)
        if known is None or known.heard_at is None:
            return None
        return time.monotonic() + known.ahead_s

    def client(self, url: str, *, resume_s: float = RESUME_S) -> JobClient:
        """The jobs of the hive at this URL. :raises Unavailable: it is known no more"""
        return JobClient(url, peer=self.peer(url), hop="hive", resume_s=resume_s)

    async def lost(self, url: str) -> None:
        """Return when the hive at this URL is gone."""
        if known := self._hives.get(url):
            await known.gone.wait()

    def watch(self, url: str, gone: Callable[[], None]) -> Callable[[], None]:
        """Have ``gone`` called when the hive at this URL is gone; what ends that. Costs less than
        a task for :meth:`lost`."""
        known = self._hives.get(url)
        if known is None or known.gone.is_set():
            return asyncio.get_running_loop().call_soon(gone).cancel
        known.when_gone.add(gone)
        return partial(known.when_gone.discard, gone)

    def in_flight(self, url: str, worker_id: str) -> int:
        """How many requests run on a worker of the hive at this URL now."""
        known = self._hives.get(url)
        return 0 if known is None else known.load.on(worker_id)

    def load(self, placement: Placement) -> Callable[[], None]:
        """Count a request as a load of its worker; what ends that, once."""
        known = self._hives.get(placement.hive_url)
        if known is None:
            return _nothing
        known.load.begin(placement.worker_id)
        return partial(known.load.end, placement.worker_id)

    @contextmanager
    def loaded(self, placement: Placement) -> Iterator[None]:
        """Count a request as a load of its worker, for exactly as long as it runs."""
        end = self.load(placement)
        try:
            yield
        finally:
            end()

    async def close(self) -> None:
        await asyncio.gather(*(known.close() for known in self._hives.values()), *self._closing)

    # -- listening ---------------------------------------------------------------------------

    async def _listen(self, known: KnownHive) -> None:
        while True:
            if known.leads_elsewhere(time.monotonic()):
                known.pause_s = RETRY_S
            else:
                await self._try(known)
            self.changes += 1
            now = time.monotonic()
            if known.lost(now):
                outcome("hive", hive=known.hive_id, status="lost", why=known.problem)
            stopped = known.beat is not None and known.beat.operational_status == "stopping"
            leaves = known.withdrawn and known.found_by == "mdns"
            leaves = leaves or (stopped and known.found_by == "ready")
            if leaves and known.state(now) == "gone":
                self._forget(known)
            await known.rest()

    async def _try(self, known: KnownHive) -> None:
        """Listen until that ends, and say why it did."""
        # An address where nobody was ever heard is tried more and more seldom.
        again = RETRY_S if known.heard_at else min(2 * known.pause_s, LAST_RETRY_S)
        try:
            await self._subscribe(known)
            known.problem = "its heartbeat stream ended"
        except AlreadyHeard:
            known.problem = None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            known.problem = why_unheard(known.url, error)
        except (Forbidden, Unauthorized, Conflict) as error:
            known.problem = error.message
            again = min(2 * known.pause_s, LAST_RETRY_S)
            self._refusals.tell(known.url, error, hive=known.hive_id, message=error.message)
        except HiveError as error:
            known.problem = error.message
        except ValidationError:
            known.problem = "what it sends is no heartbeat of this version of Hive"
        except Exception:  # the hive is tried again, whatever it sends
            log.exception("listening to %s broke", known.url)
            known.problem = "listening to it broke; the queen's log has the details"
        known.peer.doubt()
        self._doubted(known.url)
        known.pause_s = again

    async def _subscribe(self, known: KnownHive) -> None:
        answer = await known.peer.open()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SUSPECT_S)
        headers = {QUEEN_HEADER: self.queen_id, "accept": "text/event-stream"}
        async with known.peer.http.get(
            known.peer.base_url + HEARTBEATS, headers=headers, timeout=timeout
        ) as got:
            if got.status != 200:
                raise WorkerBroke(f"{known.url} answered {got.status} instead of heartbeats.")
            async with aclosing(sse.decode(got.content.iter_any())) as events:
                async for event in events:
                    if event.event == "heartbeat":
                        beat = Heartbeat.model_validate_json(event.data)
                        if answer is not None and beat.hive_id != answer.id:
                            raise WorkerBroke(
                                f"{known.url} proved to be {answer.id} and says {beat.hive_id}."
                            )
                        self._heard(known, beat)

    def _heard(self, known: KnownHive, beat: Heartbeat) -> None:
        now = time.monotonic()
        for other in list(self._hives.values()):
            if other is not known and other.hive_id == beat.hive_id:
                self._settle(known, beat, other, now)
        known.primary = None
        self.changes += 1
        joined = not known.connected
        known.heard(beat, now, lambda: self._went(known))
        if joined:
            outcome("hive", hive=known.hive_id, status="joined", url=known.url, by=known.found_by)
        self._heard_from(known.info(now), beat)

    def _settle(self, known: KnownHive, beat: Heartbeat, other: KnownHive, now: float) -> None:
        """Two addresses bear one id: are they one hive, a hive that has moved, or two?

        :raises AlreadyHeard: one, and the other address is in use
        :raises Conflict: two
        """
        if other.beat is None or other.leads_elsewhere(now):
            return  # nobody has been heard there yet, or not lately
        same = bool(beat.instance) and other.beat.instance == beat.instance
        if other.state(now) == "gone":
            other.hive_id = None  # its old address no longer bears its name
            if other.found_by != "flag" and not same:
                self._forget(other)
        elif same and other.connected:
            known.follow(other, beat.instance)
            raise AlreadyHeard
        elif same:
            other.follow(known, beat.instance)
        elif not same:
            raise Conflict(
                f"{known.url} calls itself {other.hive_id}, which is the hive at {other.url}; it "
                "gets no work. Start it with another --hive-id.",
                code="duplicate_hive_id",
            )

    def _went(self, known: KnownHive) -> None:
        self.changes += 1
        outcome("hive", hive=known.hive_id, status="gone", why=known.problem)

    def _shown(self, known: KnownHive) -> bool:
        """Whether people see it: what was heard from, or what they named themselves."""
        if known.leads_elsewhere(time.monotonic()):
            return False
        heard = known.heard_at is not None and known.hive_id is not None
        return heard or known.found_by == "flag"

    def _of(self, service: str) -> list[KnownHive]:
        return [known for known in self._hives.values() if known.service == service]

    def _forget(self, known: KnownHive) -> None:
        """Listen no more; a hive that announces itself again is a new one."""
        self._hives.pop(known.url, None)
        self.changes += 1
        self.forgotten(known.url)
        known.closed = True
        task = asyncio.create_task(known.close(), name=f"forget {known.url}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _nothing() -> None:
    pass


def why_unheard(url: str, error: Exception) -> str:
    """A sentence for people."""
    if isinstance(error, aiohttp.ClientConnectorError | ConnectionRefusedError):
        return f"nobody answers at {url}"
    if isinstance(error, TimeoutError):
        return f"what listens at {url} is silent"
    return f"its heartbeats broke off ({type(error).__name__})"


def gathered(hives: Iterable[HiveInfo], kind: str) -> list[dict[str, Any]]:
    """The workers, models or devices of all hives, each with its hive's id."""
    return [
        {**item.model_dump(exclude_none=True), "hive_id": hive.hive_id}
        for hive in hives
        if hive.state != "gone"
        for item in getattr(hive, kind)
    ]
