"""A relay process: answers at the queen's port beside process 0, and only relays inference.

``python -m queen.relay_process CHANNEL LISTENER``, two descriptors that it inherits; all else it is
told over the channel (:mod:`queen.channel`). It asks process 0 for each request where it goes, and
hands connections with other requests over to it. When process 0 is gone, it ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final, assert_never

import aiohttp
from starlette.types import Receive, Scope, Send

from operations.errors import HiveError, Unavailable
from operations.hosts import Task
from queen import channel as frames
from queen.channel import Channel, ToRelay, relay_channel
from queen.handover import ProcessZero
from queen.lines import HiveLines
from queen.registry import CONNECT_S
from queen.trunks import Trunks
from wire import log as logs
from wire.door import Doorway
from wire.door.relay import Lease, Upstream, relaying
from wire.gate import Gate
from wire.http1.client import Unreachable
from wire.keys import Caller
from wire.metrics import Seen
from wire.openai import RELAYED
from wire.peer import Peer
from wire.revocations import Revocations
from wire.secret import Secret
from wire.serve import Certificate, Server, raise_file_limit
from wire.trunk.messages import error_of
from wire.trust import Refusals, Trust

log = logging.getLogger(__name__)

ASK_S: Final = 10.0  # for an answer of process 0, which takes no time unless it hangs
PASSED_ON_S: Final = 0.2
"""What connections that are only passed on get to end with process 0's last words."""


class RelayProcess:
    """What one relay process owns."""

    def __init__(self, begin: frames.Begin, channel: Channel[ToRelay]) -> None:
        self.name = f"{begin.queen_id}/{begin.number}"
        self.closing = asyncio.Event()
        self._channel = channel
        self._queen_id = begin.queen_id
        self._secret = None if begin.secret is None else Secret.parse(begin.secret)
        self._revocations = Revocations(None)
        self._revocations.add(begin.revoked)
        trust = Trust(
            self._secret,
            self._revocations,
            role="queen",
            id=begin.queen_id,
            instance="",  # it lets no daemon prove itself
            listens_openly=begin.listens_openly,
            fingerprint=begin.certificate[2] if begin.certificate else "",
            counts=False,
        )
        trust.refusals = _Refused(channel)
        self._trunks = Trunks() if begin.trunks else None
        self._lines = HiveLines(self._trunks)
        self._hives: dict[str, _Hive] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._asked: dict[int, asyncio.Future[frames.Leased | frames.Counted]] = {}
        self._numbers = itertools.count(1)
        relay = relaying(self._lease, "queen", self, self._limit)
        self._zero = ProcessZero(channel, RELAYED)
        self.doorway = Doorway(
            Gate(trust, begin.max_body),
            "queen",
            dict.fromkeys(RELAYED, relay),
            elsewhere=self._zero,
            refused=lambda path, status: self.request_ended(path, Seen(status, None, None, 0)),
        )

    def take(self, frame: ToRelay) -> None:
        """What process 0 says."""
        match frame:
            case frames.Leased() | frames.Counted():
                if (asked := self._asked.get(frame.id)) is not None and not asked.done():
                    asked.set_result(frame)
            case frames.Refused():
                if (asked := self._asked.get(frame.id)) is not None and not asked.done():
                    asked.set_exception(error_of(frame.error, "queen"))
            case frames.HiveHeard():
                self._heard(frame.url, frame.hive_id)
            case frames.HiveDoubted():
                if (hive := self._hives.get(frame.url)) is not None:
                    hive.peer.doubt()
            case frames.HiveGone():
                self._gone(frame.url)
            case frames.Revoked():
                self._revocations.add(frame.key_ids)
            case frames.Ping():
                self._channel.send(frames.Pong())
            case frames.Close():
                self.closing.set()
            case frames.Begin():
                raise ValueError("it has begun")
            case _:
                assert_never(frame)

    @property
    def passes_on(self) -> bool:
        """Whether process 0 has connections by way of this process."""
        return self._zero.splices

    def request_ended(self, route: str, seen: Seen) -> None:
        """See :class:`wire.door.relay.Counts`: process 0 counts."""
        ended = frames.Ended(route, seen.status, seen.ttft_s, seen.model, seen.tokens)
        self._channel.send(ended)

    async def cut(self) -> None:
        """End the streams that still pass, as process 0 does."""
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(
                    Unavailable("This queen has stopped. Send the request again.", hop="queen")
                )
        if self._trunks is not None:
            await self._trunks.close()
        for url in list(self._hives):
            self._gone(url)
        self._lines.close()
        await asyncio.gather(*self._leaving)

    def close(self) -> None:
        """End the connections that process 0 has by way of this process."""
        self._zero.close()

    # -- requests ----------------------------------------------------------------------------

    def _limit(self, caller: Caller) -> Awaitable[None] | None:
        if caller.rpm is None:
            return None
        return self._count(caller.id, caller.rpm)

    async def _count(self, key_id: str, rpm: int) -> None:
        await self._ask(lambda number: frames.Count(number, key_id, rpm))

    async def _lease(self, model: str, task: Task, failed: frozenset[str]) -> Lease:
        leased, hive = await self._leased(model, task, set(failed))
        upstream = Upstream(
            line=self._lines.to(hive.peer, leased.hive_id),
            hop="hive",
            name=hive.name,
            model=leased.model,
            tags={b"x-hive-id": leased.hive_id.encode()},
            watch=hive.watch,
            renew=hive.renew,
        )
        return Lease(upstream, lambda error: self._channel.send(frames.Released(leased.id)))

    async def _leased(
        self, model: str, task: Task, failed: set[str]
    ) -> tuple[frames.Leased, _Hive]:
        """A lease of a hive that has proven itself to this process, too."""
        while True:
            avoid = sorted(name.removeprefix("hive ") for name in failed)
            leased = await self._ask(partial(frames.Lease, model=model, task=task, failed=avoid))
            assert isinstance(leased, frames.Leased)
            name = f"hive {leased.hive_id}"
            try:
                hive = self._hives.get(leased.url)
                if hive is None:
                    raise Unreachable(f"The {name} has left. Send the request again.", hop="queen")
                await hive.proven()
                return leased, hive
            except BaseException as error:
                self._channel.send(frames.Released(leased.id))
                if not isinstance(error, Unreachable) or name in failed:
                    raise
                failed.add(name)

    async def _ask(
        self, question: Callable[[int], frames.Lease | frames.Count]
    ) -> frames.Leased | frames.Counted:
        """Ask process 0. :raises HiveError: it says no"""
        number = next(self._numbers)
        answer: asyncio.Future[frames.Leased | frames.Counted]
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        self._channel.send(question(number))
        try:
            async with asyncio.timeout(ASK_S):
                return await answer
        except TimeoutError:
            self._channel.send(frames.Released(number))
            raise Unavailable(
                "The queen's first process is silent. Send the request again; if that lasts, "
                "restart the queen.",
                hop="queen",
            ) from None
        except asyncio.CancelledError:
            self._channel.send(frames.Released(number))
            raise
        finally:
            del self._asked[number]

    # -- hives -------------------------------------------------------------------------------

    def _heard(self, url: str, hive_id: str) -> None:
        hive = self._hives.get(url)
        if hive is None or hive.name != f"hive {hive_id}":
            self._gone(url)
            peer = Peer(
                url,
                self._secret,
                role="queen",
                id=self._queen_id,
                roles=("hive",),
                connect_s=CONNECT_S,
            )
            hive = self._hives[url] = _Hive(peer, hive_id, self._trunks)
        hive.prove()

    def _gone(self, url: str) -> None:
        hive = self._hives.pop(url, None)
        if hive is not None:
            hive.go()
            self._lines.forget(url)
            task = asyncio.get_running_loop().create_task(hive.close())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)


class _Refused(Refusals):
    """Has process 0 say each refusal, once for all processes. The same again is not sent."""

    def __init__(self, channel: Channel[ToRelay]) -> None:
        super().__init__()
        self._channel = channel

    def tell(self, who: str, error: HiveError, **fields: object) -> None:
        if not self._is_news(who, error.code):
            return
        said = {name: None if value is None else str(value) for name, value in fields.items()}
        self._channel.send(frames.Told(who, error.code, said))


class _Hive:
    """A hive that process 0 hears from."""

    def __init__(self, peer: Peer, hive_id: str, trunks: Trunks | None) -> None:
        self.peer = peer
        self.name = f"hive {hive_id}"
        self._hive_id = hive_id
        self._trunks = trunks
        self._is_gone = False
        self._when_gone: set[Callable[[], None]] = set()
        self._greeting: asyncio.Task[None] | None = None
        self._again = False

    def prove(self) -> asyncio.Task[None]:
        """Have it prove itself, anew if it has before; those who ask meanwhile wait together."""
        self._again = True
        if self._greeting is None:
            self._greeting = asyncio.get_running_loop().create_task(self._greet())
            self._greeting.add_done_callback(self._greeted)
        return self._greeting

    async def proven(self) -> None:
        """Wait until it has. :raises Unreachable: it has not"""
        if not self.peer.opened:
            await self._settled(self._greeting or self.prove())

    async def renew(self) -> None:
        """It has forgotten us. :raises Unreachable: it does not prove itself again"""
        await self._settled(self.prove())

    def watch(self, gone: Callable[[], None]) -> Callable[[], None]:
        """See :class:`wire.door.relay.Upstream`."""
        if self._is_gone:
            return asyncio.get_running_loop().call_soon(gone).cancel
        self._when_gone.add(gone)

        def unwatch() -> None:
            self._when_gone.discard(gone)

        return unwatch

    def go(self) -> None:
        """No answer will come from it any more."""
        self._is_gone = True
        self.peer.doubt()
        told = list(self._when_gone)
        self._when_gone.clear()
        for tell in told:
            tell()

    async def close(self) -> None:
        if self._greeting is not None:
            self._greeting.cancel()
            await asyncio.wait([self._greeting])
        await self.peer.close()

    async def _settled(self, greeting: asyncio.Task[None]) -> None:
        await asyncio.wait([greeting])
        if greeting.cancelled():
            raise Unreachable(f"The {self.name} has left. Send the request again.", hop="queen")
        greeting.result()

    async def _greet(self) -> None:
        try:
            while self._again:
                self._again = False
                await self.peer.open()
        except (aiohttp.ClientError, OSError, TimeoutError, HiveError) as error:
            raise Unreachable(
                f"The {self.name} does not prove itself to this process of the queen "
                f"({type(error).__name__}). Send the request again.",
                hop="queen",
            ) from None
        if self._trunks is not None and not self._is_gone:
            self._trunks.keep(self.peer, self._hive_id)

    def _greeted(self, task: asyncio.Task[None]) -> None:
        self._greeting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("%s", error)


async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a process that has none: its door hands such requests over."""
    raise AssertionError("a request was not handed over")


def main() -> int:
    import uvloop

    # Process 0 is told to stop, and tells this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise_file_limit()
    end, listener = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:3])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(end, listener))


async def _run(end: socket.socket, listener: socket.socket) -> int:
    begun: asyncio.Future[tuple[frames.Begin, RelayProcess]]
    begun = asyncio.get_running_loop().create_future()

    def begin(frame: ToRelay) -> None:
        if not isinstance(frame, frames.Begin):
            raise ValueError("it has not begun")
        logs.configure(frame.log_level, Path(frame.state_dir) / f"queen-{frame.number}.log")
        relay = RelayProcess(frame, channel)
        channel.take = relay.take
        begun.set_result((frame, relay))

    channel = relay_channel(end, begin)
    over = asyncio.create_task(channel.over.wait())
    await asyncio.wait((asyncio.ensure_future(begun), over), return_when=asyncio.FIRST_COMPLETED)
    if not begun.done():
        return 1
    said, relay = begun.result()
    certificate = None
    if said.certificate is not None:
        path, key_path, fingerprint = said.certificate
        certificate = Certificate(Path(path), Path(key_path), fingerprint)
    server = Server(elsewhere, relay.doorway, certificate)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait((ready, serving, over), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        log.error("relay process %s cannot serve", relay.name, exc_info=serving.exception())
        return 1
    logs.outcome("daemon", status="started", role="relay", id=relay.name)
    channel.send(frames.Ready())
    closing = asyncio.create_task(relay.closing.wait())
    await asyncio.wait([closing, over], return_when=asyncio.FIRST_COMPLETED)
    reason = None if relay.closing.is_set() else "process 0 is gone"
    await relay.cut()
    server.should_exit = True
    await serving
    if relay.passes_on:
        await asyncio.sleep(PASSED_ON_S)
    relay.close()
    logs.outcome("daemon", status="stopped", role="relay", id=relay.name, reason=reason)
    channel.close()
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
