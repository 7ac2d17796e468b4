"""One address of a hive, and what is known of the hive there.

======= ================================================= =========================
state   meaning                                           work
======= ================================================= =========================
online  heard from within 3 s                             yes
suspect silent for 3 s, or its heartbeat stream ended,    none new
        or back again and not yet trusted to stay
gone    silent for 5 s                                    none; shown for a while
======= ================================================= =========================
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from operations.hosts import Heartbeat, HiveInfo, HiveState, WorkerInfo
from wire.peer import Peer

SUSPECT_S = 3.0
GONE_S = 5.0
RETRY_S = 0.5
FLAPPING_S = 60.0  # losses within this time are one story
FREE_LOSSES = 2  # so many are nothing unusual
HOLD_S, MAX_HOLD_S = 0.5, 1.0  # for each further loss a returned hive must stay so much longer

FoundBy = Literal["flag", "ready", "mdns"]


class KnownHive:
    """Where it is, its last heartbeat, and the task that listens to it. Times are monotonic."""

    def __init__(
        self, peer: Peer, found_by: FoundBy, hive_id: str | None, service: str | None, now: float
    ) -> None:
        """:param service: the name under which mDNS has it"""
        self.peer = peer
        self.url = peer.url
        self.found_by: FoundBy = found_by
        self.hive_id = hive_id
        self.service = service
        self.beat: Heartbeat | None = None
        self.heard_at: float | None = None
        self.connected = False
        self.problem: str | None = None
        self.added_at = now
        self.pause_s = RETRY_S
        """Until the next try to listen."""
        self.primary: KnownHive | None = None
        self._instance = ""
        self._hurry = asyncio.Event()
        self.closed = False
        self.withdrawn = False
        """mDNS has said goodbye for it; it is forgotten when it is silent."""
        self.task: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()
        """Set when it is gone; what waits for its answer need wait no longer."""
        self.when_gone: set[Callable[[], None]] = set()
        """Called then, once; whoever runs no more takes himself out."""
        self.load = Load()
        self.ahead_s = 0.0
        """The hive's clock less the monotonic one here."""
        self._timer: asyncio.TimerHandle | None = None
        self._losses: deque[float] = deque(maxlen=16)
        self._trusted_at = 0.0

    def state(self, now: float) -> HiveState:
        if self.heard_at is None or now - self.heard_at >= GONE_S:
            return "gone"
        stopping = self.beat is not None and self.beat.operational_status == "stopping"
        silent = not self.connected or now - self.heard_at >= SUSPECT_S
        if silent or stopping or now < self._trusted_at:
            return "suspect"
        return "online"

    @property
    def rumour(self) -> bool:
        """Announced on the LAN, and never heard from: anybody may have said it."""
        return self.found_by == "mdns" and self.heard_at is None

    def follow(self, other: KnownHive, instance: str) -> None:
        """The same hive is heard from at another of its addresses; this one is spare."""
        self.primary, self._instance = other, instance

    def leads_elsewhere(self, now: float) -> bool:
        """Whether this is a spare address of a hive that is heard from at another one."""
        other = self.primary
        return (
            other is not None
            and not other.closed
            and other.primary is not self
            and other.state(now) != "gone"
            and other.beat is not None
            and other.beat.instance == self._instance
        )

    def hurry(self) -> None:
        """Something was heard of it: what was a hive before is tried again at once."""
        if self.heard_at is not None:
            self._hurry.set()

    async def rest(self) -> None:
        """Wait for the next try."""
        # Not asyncio.wait_for: in Python 3.11 it loses a cancellation that comes with the news.
        with suppress(TimeoutError):
            async with asyncio.timeout(self.pause_s):
                await self._hurry.wait()
        self._hurry.clear()

    def heard(self, beat: Heartbeat, now: float, went: Callable[[], None]) -> None:
        """Take in a heartbeat. :param went: called when none has followed for 5 s"""
        if not self.connected:
            self.connected = True
            self._trusted_at = now + self._hold(now)
        self.beat, self.hive_id, self.heard_at, self.problem = beat, beat.hive_id, now, None
        self.ahead_s = beat.timestamp - now
        self.load.told(beat.workers)
        if self.gone.is_set():
            self.gone = asyncio.Event()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(GONE_S, self._went, went)

    def lost(self, now: float) -> bool:
        """Its heartbeats ended; whether that is news."""
        was = self.connected
        self.connected = False
        if was:
            self._losses.append(now)
        return was

    async def close(self) -> None:
        """Listen no more; what waits for an answer from here need wait no longer."""
        self.closed = True
        self._is_gone()
        if self._timer is not None:
            self._timer.cancel()
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
        await self.peer.close()

    def info(self, now: float) -> HiveInfo:
        beat = self.beat
        state = self.state(now)
        workers = self.load.loaded(beat.workers) if beat else []
        return HiveInfo(
            hive_id=self.hive_id or self.url,
            hive_url=self.url,
            state=state,
            found_by=self.found_by,
            last_heard_s=None if self.heard_at is None else round(now - self.heard_at, 3),
            version=beat.version if beat else None,
            problem=None if state == "online" else self.problem or self._why(now),
            devices=beat.devices if beat else [],
            models=beat.models if beat else [],
            workers=workers,
            in_flight=sum(worker.in_flight for worker in workers),
        )

    def _why(self, now: float) -> str:
        if self.connected and now < self._trusted_at:
            return "it keeps coming and going; it gets work again when it has stayed a moment"
        return "it is stopping" if self.connected else "it has not been heard from yet"

    def _hold(self, now: float) -> float:
        recent = sum(1 for at in self._losses if now - at < FLAPPING_S)
        return min(MAX_HOLD_S, HOLD_S * max(0, recent - FREE_LOSSES))

    def _went(self, went: Callable[[], None]) -> None:
        self._is_gone()
        went()

    def _is_gone(self) -> None:
        self.gone.set()
        told = list(self.when_gone)
        self.when_gone.clear()
        for tell in told:
            tell()


class Load:
    """How busy a hive's workers are, counted between its heartbeats.

    A heartbeat is up to a second old, and a hundred requests may come within it. So the queen
    counts what she herself has placed, and takes from the heartbeat only what others have.
    """

    def __init__(self) -> None:
        self._own: Counter[str] = Counter()
        self._others: dict[str, int] = {}

    def told(self, workers: list[WorkerInfo]) -> None:
        self._others = {w.worker_id: max(0, w.in_flight - self._own[w.worker_id]) for w in workers}

    def begin(self, worker_id: str) -> None:
        self._own[worker_id] += 1

    def end(self, worker_id: str) -> None:
        self._own[worker_id] -= 1
        if self._own[worker_id] <= 0:
            del self._own[worker_id]

    def on(self, worker_id: str) -> int:
        """How many requests run on a worker now."""
        return self._own[worker_id] + self._others.get(worker_id, 0)

    def loaded(self, workers: list[WorkerInfo]) -> list[WorkerInfo]:
        """The workers with what runs on them now."""
        found = []
        for worker in workers:
            now = self.on(worker.worker_id)
            same = now == worker.in_flight
            found.append(worker if same else worker.model_copy(update={"in_flight": now}))
        return found
