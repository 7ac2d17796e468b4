"""The queen's trunks: one to each hive that has proven itself, while it can be had.

No request waits for one: where there is none, it goes by plain HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from dataclasses import dataclass

from operations.errors import HiveError
from wire.peer import Peer
from wire.trunk.caller import Trunk
from wire.trunk.dial import NoTrunk, dial
from wire.trunk.link import Counters

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
REFUSED_PAUSE_S = 30.0  # an older hive knows no trunk, and may be upgraded
STAYED_S = 10.0  # a trunk that has lived so long was a good one
LOOK_S = 2.0
DOUBT_S = 5.0  # as long as a silent hive is not yet gone


@dataclass(eq=False)
class _Kept:
    """A hive, and the trunk to it that takes requests now."""

    peer: Peer
    name: str
    trunk: Trunk | None = None
    way: tuple[str, str, str] | None = None
    task: asyncio.Task[None] | None = None


class Trunks:
    """By the hives' URLs."""

    def __init__(self, *, first_pause_s: float = FIRST_PAUSE_S, look_s: float = LOOK_S) -> None:
        """
        :param first_pause_s: before a lost trunk is dialled again; each further one is longer
        :param look_s: how often it is asked whether the hive is still the one that was dialled
        """
        self._first_pause_s = first_pause_s
        self._look_s = look_s
        self._kept: dict[str, _Kept] = {}
        self._made: set[Trunk] = set()
        self._closed = False

    def keep(self, peer: Peer, hive_id: str) -> None:
        """Have a trunk to this hive from now on, until it is lost sight of.

        Costs nothing for one that is kept already: call it with each heartbeat.
        """
        known = self._kept.get(peer.url)
        if self._closed or (known is not None and known.peer is peer):
            return
        if known is not None and known.task is not None:
            known.task.cancel()
        kept = self._kept[peer.url] = _Kept(peer, f"hive {hive_id}")
        kept.task = asyncio.create_task(self._keep(kept), name=f"trunk {peer.url}")

    def to(self, url: str) -> Trunk | None:
        """The trunk that takes requests to the hive at this URL now, if there is one."""
        kept = self._kept.get(url)
        if kept is None or kept.trunk is None or not kept.trunk.ready:
            return None
        return kept.trunk if kept.peer.way == kept.way else None

    def counters(self) -> list[Counters]:
        """Of each trunk that is open."""
        return [trunk.counters() for trunk in self._made if not trunk.closed]

    async def close(self) -> None:
        """Close every trunk; what runs on them ends. Fine to call twice."""
        self._closed = True
        tasks = [kept.task for kept in self._kept.values() if kept.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for trunk in list(self._made):
            trunk.close("this queen has stopped")

    async def _keep(self, kept: _Kept) -> None:
        """Dial, and dial again, while the hive is one that has proven itself."""
        pause = self._first_pause_s
        loop = asyncio.get_running_loop()
        try:
            while kept.peer.opened:
                began = loop.time()
                try:
                    await self._one(kept)
                    lived = loop.time() - began > STAYED_S
                    pause = self._first_pause_s if lived else min(2 * pause, LAST_PAUSE_S)
                except NoTrunk as error:
                    log.info("%s", error.message)
                    pause = REFUSED_PAUSE_S if error.lasting else min(2 * pause, LAST_PAUSE_S)
                    if error.forgotten:
                        with suppress(HiveError):  # whoever listens to the hive hears of it, too
                            await kept.peer.renew()
                except (OSError, TimeoutError, HiveError) as error:
                    log.info("no trunk to the %s: %s", kept.name, type(error).__name__)
                    pause = min(2 * pause, LAST_PAUSE_S)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        finally:
            if self._kept.get(kept.peer.url) is kept:
                del self._kept[kept.peer.url]

    async def _one(self, kept: _Kept) -> None:
        """Have one trunk, until it takes no new requests."""
        way = kept.peer.way
        trunk = await dial(kept.peer, kept.name)
        self._made = {one for one in self._made if not one.closed} | {trunk}
        kept.trunk, kept.way = trunk, way
        log.info("a trunk leads to the %s", kept.name)
        try:
            await self._until_over(kept, trunk)
        finally:
            kept.trunk = None
            trunk.retire("this queen opens no more streams here")

    async def _until_over(self, kept: _Kept, trunk: Trunk) -> None:
        doubted = 0.0
        while not trunk.over.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await trunk.over.wait()
            now = kept.peer.way
            if now is not None and now != kept.way:
                trunk.close("the hive has another address, certificate or life now")
                return
            doubted = doubted + self._look_s if now is None else 0.0
            if doubted > DOUBT_S:
                return
