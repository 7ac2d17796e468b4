"""The relay processes, as process 0 has them.

Each has a listening socket of its own at the queen's port. Process 0 keeps all of them open, and
answers itself at one whose process is not up: no caller waits for a start, and none is lost.

What all processes must agree on stays in process 0. A relay process asks it where each request
goes, and holds a lease meanwhile, which counts like a request of process 0's own; whatever ends the
process ends its leases.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, assert_never

from operations.errors import HiveError
from queen import channel as frames
from queen.channel import Channel, FromRelay, ToRelay, queens_channel
from queen.handover import arrive
from wire.door import Front
from wire.keys import Caller
from wire.log import outcome
from wire.metrics import Seen
from wire.serve import CLOSE_S, Listening
from wire.trunk.messages import error_payload

if TYPE_CHECKING:
    from queen.queen import Queen

log = logging.getLogger(__name__)

MODULE: Final = "queen.relay_process"
LAST_PAUSE_S: Final = 30.0
STAYED_S: Final = 10.0  # one that dies sooner, twice in a row, is started anew with a pause
END_S: Final = CLOSE_S + 3.0
DIES_S: Final = 1.0  # one that has closed its channel ends by then
PING_S: Final = 3.0
HANGS: Final = 5  # pings that one leaves without an answer; it is killed then
STARTS: Final = 20  # the same of one that is not ready yet, which takes its time on a busy machine


class Processes:
    """All of them. Lives in process 0's event loop."""

    def __init__(self, queen: Queen, listening: Listening) -> None:
        self._queen = queen
        self._listening = listening
        self._tasks: list[asyncio.Task[None]] = []
        self._running: set[_Relay] = set()
        self._heard: dict[str, tuple[str, tuple[str, str, str] | None]] = {}
        """By URL: the hives that every relay process knows; with their ways, but of those that have
        been lost sight of."""
        self._stopped = asyncio.Event()

    @property
    def _closing(self) -> bool:
        return self._stopped.is_set()

    @property
    def ready(self) -> int:
        """How many answer at their sockets."""
        return sum(relay.ready.is_set() for relay in self._running)

    def start(self, front: Front) -> None:
        """Start them, and keep them running until :meth:`close`."""
        self._queen.trust.revocations.added = self._revoked
        for number, listener in enumerate(self._listening.others, 1):
            keeping = self._keep(number, listener, front)
            self._tasks.append(asyncio.create_task(keeping, name=f"relay process {number}"))

    def heard(self, url: str, hive_id: str) -> None:
        """A hive has been heard from; costs nothing while it is the same one."""
        now = hive_id, self._queen.registry.peer(url).way
        known = self._heard.get(url)
        if known == now or self._closing:
            return
        self._heard[url] = now
        if known is None:
            self._queen.registry.watch(url, partial(self._gone, url))
        self._tell(frames.HiveHeard(url, hive_id))

    def doubted(self, url: str) -> None:
        """It has been lost sight of."""
        known = self._heard.get(url)
        if known is not None and known[1] is not None and not self._closing:
            self._heard[url] = known[0], None
            self._tell(frames.HiveDoubted(url))

    def stop(self) -> None:
        """Tell them to end, and what still runs there. Fine to call twice."""
        if not self._closing:
            self._tell(frames.Close())
        self._stopped.set()

    async def close(self) -> None:
        """Wait until they have ended. Fine to call twice."""
        self.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=END_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for listener in self._listening.others:
            listener.close()

    def _tell(self, frame: ToRelay) -> None:
        for relay in self._running:
            relay.channel.send(frame)

    def _gone(self, url: str) -> None:
        self._heard.pop(url, None)
        if not self._closing:
            self._tell(frames.HiveGone(url))

    def _revoked(self, key_ids: list[str]) -> None:
        if not self._closing:
            self._tell(frames.Revoked(key_ids))

    async def _keep(self, number: int, listener: socket.socket, front: Front) -> None:
        """Have one run, and start it anew whenever it ends."""
        loop = asyncio.get_running_loop()
        pause, short_lives = 0.0, 0
        while not self._closing:
            began = loop.time() + pause
            try:
                with closing(await front.listen(listener.dup())) as standing_in:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._stopped.wait()
                    if self._closing:
                        return
                    why = await self._one(number, listener, front, standing_in)
            except OSError as error:
                why = f"it cannot be started: {error.strerror}"
            except Exception:  # it is tried again, and does not stay away in silence
                log.exception("relay process %d cannot be started", number)
                why = "it cannot be started"
            if self._closing:
                return
            short_lives = 0 if loop.time() - began > STAYED_S else short_lives + 1
            pause = 0.0 if short_lives < 2 else min(2.0 ** (short_lives - 3), LAST_PAUSE_S)
            outcome(
                "daemon",
                level=logging.WARNING,
                status="died",
                role="relay",
                id=f"{self._queen.name}/{number}",
                why=why,
                again_in_s=pause,
            )

    async def _one(
        self,
        number: int,
        listener: socket.socket,
        front: Front,
        standing_in: asyncio.AbstractServer,
    ) -> str:
        """Run one until it ends; how it did. :raises OSError: it cannot be started"""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", MODULE, str(theirs.fileno()), str(listener.fileno())),
                    pass_fds=(theirs.fileno(), listener.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    env={**os.environ, "PYTHONSAFEPATH": "1"},
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        relay = _Relay(self._queen, ours, front)
        if self._closing:  # meanwhile
            relay.close()
        self._running.add(relay)
        hangs = asyncio.create_task(relay.hangs())
        try:
            relay.channel.send(self._begin(number))
            for url, (hive_id, way) in self._heard.items():
                if way is not None:
                    relay.channel.send(frames.HiveHeard(url, hive_id))
            over = asyncio.create_task(relay.channel.over.wait())
            ready = asyncio.create_task(relay.ready.wait())
            await asyncio.wait([over, ready, hangs], return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if relay.ready.is_set():
                standing_in.close()
            await asyncio.wait([over, hangs], return_when=asyncio.FIRST_COMPLETED)
            if killed := not over.done():
                with suppress(ProcessLookupError):
                    process.kill()
        finally:
            hangs.cancel()
            self._running.discard(relay)
            relay.close()
            await self._ended(process)
        if killed:
            return "it had answered nothing for too long, and was killed"
        return f"exit status {process.returncode}"

    async def _ended(self, process: asyncio.subprocess.Process) -> None:
        """Its channel is closed, and with that it ends."""
        try:
            async with asyncio.timeout(END_S if self._closing else DIES_S):
                await process.wait()
        except (TimeoutError, asyncio.CancelledError):
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _begin(self, number: int) -> frames.Begin:
        settings, trust = self._queen.settings, self._queen.trust
        shown = self._listening.certificate
        return frames.Begin(
            number=number,
            queen_id=self._queen.name,
            secret=None if trust.secret is None else trust.secret.text,
            listens_openly=trust.listens_openly,
            certificate=(str(shown.path), str(shown.key_path), shown.fingerprint)
            if shown
            else None,
            max_body=settings.max_body,
            trunks=settings.trunks,
            state_dir=str(settings.state_dir),
            log_level=settings.log_level,
            revoked=trust.revocations.listed,
        )


class _Relay:
    """One relay process that runs."""

    def __init__(self, queen: Queen, end: socket.socket, front: Front) -> None:
        self.ready = asyncio.Event()
        self._queen = queen
        self._front = front
        self._leases: dict[int, Callable[[], None]] = {}
        self._unanswered = 0
        self._arriving: set[asyncio.Task[None]] = set()
        self.channel: Channel[FromRelay] = queens_channel(end, self._take)

    def close(self) -> None:
        """It has ended: so have its leases."""
        self.ready.clear()
        self.channel.close()
        for end in self._leases.values():
            end()
        self._leases.clear()

    async def hangs(self) -> None:
        """Return when it has left too many pings without an answer.

        These are counted, not seconds: process 0 may have stood still itself.
        """
        while self._unanswered < (HANGS if self.ready.is_set() else STARTS):
            self._unanswered += 1
            self.channel.send(frames.Ping())
            await asyncio.sleep(PING_S)

    def _take(self, frame: FromRelay) -> None:
        self._unanswered = 0
        match frame:
            case frames.Lease():
                self._lease(frame)
            case frames.Count():
                self._count(frame)
            case frames.Released():
                if (end := self._leases.pop(frame.id, None)) is not None:
                    end()
            case frames.Ended():
                seen = Seen(frame.status, frame.ttft_s, frame.model, frame.tokens)
                self._queen.metrics.request_ended(frame.path, seen)
            case frames.Told():
                refused = HiveError("", code=frame.code)
                self._queen.trust.refusals.tell(frame.who, refused, **frame.fields)
            case frames.HandOver():
                self._arrive(frame)
            case frames.Ready():
                self.ready.set()
            case frames.Pong():
                pass
            case _:
                assert_never(frame)

    def _lease(self, asked: frames.Lease) -> None:
        try:
            chosen, end = self._queen.placed(asked.model, asked.task, asked.failed)
        except HiveError as error:
            self._refuse(asked.id, error)
            return
        self._leases[asked.id] = end
        self.channel.send(frames.Leased(asked.id, chosen.hive_url, chosen.hive_id, chosen.model))

    def _count(self, asked: frames.Count) -> None:
        try:
            self._queen.trust.count(Caller("key", asked.key_id, rpm=asked.rpm))
        except HiveError as error:
            self._refuse(asked.id, error)
        else:
            self.channel.send(frames.Counted(asked.id))

    def _refuse(self, asked: int, error: HiveError) -> None:
        error.hop = error.hop or "queen"
        self.channel.send(frames.Refused(asked, error_payload(error, "")))

    def _arrive(self, came: frames.HandOver) -> None:
        descriptor = self.channel.descriptor(came.inode)
        if descriptor is None:  # no descriptor was left for it here
            log.error("a connection from a relay process was lost on its way; raise 'ulimit -n'")
            return
        task = asyncio.create_task(self._welcome(came, descriptor))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def _welcome(self, came: frames.HandOver, descriptor: int) -> None:
        try:
            await arrive(self._front.door(), came, descriptor)
        except HiveError as error:
            log.debug("%s", error.message)
