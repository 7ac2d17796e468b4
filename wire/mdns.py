"""Hives announce themselves on the LAN, and queens find them there: ``_hive._tcp.local.``.

Multicast DNS (RFC 6762) and DNS-SD (RFC 6763), spoken by zeroconf on the interfaces that
:mod:`wire.lan` chooses. What is heard is only a hint where to dial: anybody on the LAN can say
anything, so a sighting proves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import logging
import math
import re
import secrets
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import zeroconf
from zeroconf import (  # type: ignore[attr-defined]  # the first two are not in its __all__
    DNSOutgoing,
    DNSQuestion,
    DNSQuestionType,
    IPVersion,
    ServiceStateChange,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from wire import lan
from wire.lan import Interface

log = logging.getLogger(__name__)

SERVICE = "_hive._tcp.local."
PROTOCOL = "1"
GROUP = ("224.0.0.251", 5353)

KNOWN_MAX = 1000  # services
URLS_MAX = 16  # of one service
RESOLVING_MAX = 32  # services asked for at a time, because an announcement was incomplete
RESOLVE_MS = 3000
COMPLAINTS_MAX = 100
LABEL_MAX = 63  # bytes (RFC 1035, section 2.3.4)
TTL_S = 1200  # of a service; zeroconf takes anything below 1125 for 1125
# After zeroconf's own, which are sent within 0.5 s (announcements) and 15 s (queries). RFC 6762
# would have the pause between queries grow up to an hour; joined networks should meet sooner.
ANNOUNCE_AGAIN_S = (10.0, 20.0, 40.0, 80.0)
ASK_AGAIN_S = (30.0, 60.0, 120.0)
UNHEARD_S = 20.0  # what is not heard again so long after the interfaces changed is lost
LOOP_S = 1.0

_QUERY = 0  # flags (RFC 1035, section 4.1.1)
_PTR = 12
_IN = 1

_HIVE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_CLUSTER_ID = re.compile(r"[0-9a-f]{1,64}")
_INSTANCE = re.compile(r"[0-9a-f]{1,32}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")
_TLS = re.compile(r"[01]")

_REFUSALS = {
    errno.ENETUNREACH: "there is no route for multicast from it",
    errno.EHOSTUNREACH: "there is no route for multicast from it",
    errno.EPERM: "sending is not permitted: a firewall, perhaps",
    errno.EACCES: "sending is not permitted: a firewall, perhaps",
    errno.EADDRNOTAVAIL: "it no longer has its address",
    errno.ENODEV: "it no longer has its address",
    errno.ENETDOWN: "it is down",
    errno.EADDRINUSE: "port 5353 is taken by a program that does not share it",
    errno.ENOBUFS: "it can join no more multicast groups (net.ipv4.igmp_max_memberships)",
}


@dataclass(frozen=True)
class Sighting:
    """A hive that announces itself.

    :param service: the name of its announcement, by which it is reported lost
    :param instance: hex, another one at each start of the agent
    :param urls: one an address, IPv4, those in a network of this machine first; at least one
    """

    service: str
    hive_id: str
    cluster_id: str
    instance: str
    version: str
    urls: tuple[str, ...]


class Foreign(ValueError):
    """An announcement that no hive of this protocol makes; the message says what is wrong."""


def sighting(
    service: str,
    txt: Mapping[bytes, bytes | None],
    addresses: Sequence[str],
    port: int | None,
    own: Sequence[Interface] = (),
) -> Sighting:
    """Read an announcement, which may come from anybody.

    :param addresses: IPv4
    :param own: the interfaces that it was heard on; if one is the loopback, so may the address be
    :raises Foreign: it is incomplete or malformed, or of another protocol version
    """
    if (protocol := _value(txt, b"v", _VERSION)) != PROTOCOL:
        raise Foreign(f"it speaks version {protocol} of the protocol, this is version {PROTOCOL}")
    tls = _value(txt, b"tls", _TLS)
    if not port:
        raise Foreign("it has no port")
    usable = _dialable(addresses, own)
    if not usable:
        raise Foreign("it has no address that could be dialled")
    scheme = "https" if tls == "1" else "http"
    return Sighting(
        service,
        _value(txt, b"id", _HIVE_ID),
        _value(txt, b"cluster", _CLUSTER_ID),
        _value(txt, b"instance", _INSTANCE),
        _value(txt, b"version", _VERSION),
        tuple(f"{scheme}://{address}:{port}" for address in usable[:URLS_MAX]),
    )


def _value(txt: Mapping[bytes, bytes | None], key: bytes, form: re.Pattern[str]) -> str:
    text = (txt.get(key) or b"").decode("ascii", errors="replace")
    if not form.fullmatch(text):
        raise Foreign(f"its {key.decode()} is {text[:80]!r}")
    return text


def _dialable(addresses: Sequence[str], own: Sequence[Interface]) -> list[str]:
    """Without what leads nowhere, each once, the nearest first."""
    loopback = any(interface.kind == "loopback" for interface in own)

    def leads_somewhere(address: ipaddress.IPv4Address) -> bool:
        if address.is_loopback:
            return loopback
        return not (address.is_multicast or address.is_unspecified or address.is_reserved)

    def far(address: ipaddress.IPv4Address) -> tuple[bool, ipaddress.IPv4Address]:
        return not any(interface.reaches(str(address)) for interface in own), address

    parsed = {ipaddress.IPv4Address(address) for address in addresses}
    return [str(address) for address in sorted(filter(leads_somewhere, parsed), key=far)]


class _Presence(ABC):
    """What is spoken on the chosen interfaces, begun anew whenever these change.

    It outlives everything that a network does: without an interface it waits for one; after an
    error it tries again at the next change, or in 10 s. Start and stop may come in any order and
    number; ``stop`` returns when all is closed.
    """

    def __init__(self, wanted: Sequence[str]) -> None:
        self._wanted = tuple(wanted)
        self._task: asyncio.Task[None] | None = None
        self._complaints: set[str] = set()

    async def start(self) -> None:
        """Begin; returns at once."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End, and say so on the network, which takes 0.3 s."""
        if (task := self._task) is None:
            return
        if not task.cancelling():  # a second request must not cut the goodbye short
            task.cancel()
        await asyncio.wait((task,))

    async def _run(self) -> None:
        async with contextlib.aclosing(lan.changes()) as changes:
            await anext(changes)
            while True:
                try:
                    await self._speak(changes)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                    self._complain(f"mDNS does not work: {error or type(error).__name__}")
                    await anext(changes)

    async def _speak(self, changes: AsyncIterator[None]) -> None:
        """Speak on the interfaces that are chosen now, until they change."""
        present = lan.interfaces()
        for name in lan.missing(present, self._wanted):
            there = ", ".join(sorted({interface.name for interface in present}))
            self._complain(f"--interface {name}: there is none; this machine has {there}")
        chosen = lan.chosen(present, self._wanted)
        if not chosen:
            self._complain("there is no network interface to speak mDNS on; waiting for one")
            await anext(changes)
            return
        async with _opened(chosen) as speaker, self._speaking(speaker, chosen) as tick:
            async for _ in changes:
                if lan.chosen(lan.interfaces(), self._wanted) != chosen:
                    return
                tick()

    @abstractmethod
    def _speaking(
        self, speaker: AsyncZeroconf, chosen: Sequence[Interface]
    ) -> AbstractAsyncContextManager[Callable[[], None]]:
        """What is done on these interfaces; gives what is to be called at least every 10 s.

        Left without an exception it goes on elsewhere; cancelled, it ends for good.
        """

    def _complain(self, what: str) -> None:
        """Log it, the first time only."""
        if what not in self._complaints:
            self._complaints.add(what)
            log.warning("%s", what)


@contextlib.asynccontextmanager
async def _opened(chosen: Sequence[Interface]) -> AsyncIterator[AsyncZeroconf]:
    """zeroconf on these interfaces; when left it says goodbye for what is still registered.

    :raises OSError: its sockets cannot be opened
    :raises zeroconf.Error: it does not start
    """
    # The group is joined once on each interface, whatever addresses it has.
    addresses = {interface.index: interface.address for interface in reversed(chosen)}
    speaker = AsyncZeroconf(interfaces=sorted(addresses.values()), ip_version=IPVersion.V4Only)
    # Shielded: a cancelled wait would cancel what closing waits for, and leave the sockets open.
    started = asyncio.ensure_future(speaker.zeroconf.async_wait_for_start())
    try:
        await asyncio.shield(started)
        if not speaker.zeroconf.engine.senders:
            raise OSError(f"no socket could be opened on {', '.join(addresses.values())}")
        yield speaker
    finally:
        await asyncio.gather(started, return_exceptions=True)
        await speaker.async_close()


class _Repetition:
    """When to do something again: after each of ``pauses``, in seconds, and then no more."""

    def __init__(self, pauses: Iterable[float]) -> None:
        self._pauses = iter(pauses)
        self._at = self._after(time.monotonic())

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._at:
            return False
        self._at = self._after(now)
        return True

    def _after(self, now: float) -> float:
        return now + next(self._pauses, math.inf)


class Announcement(_Presence):
    """Tells the LAN of a hive until it is stopped; follows the addresses of this machine."""

    def __init__(
        self,
        hive_id: str,
        cluster_id: str,
        instance: str,
        version: str,
        port: int,
        *,
        tls: bool = False,
        bound: str | None = None,
        wanted: Sequence[str] = (),
    ) -> None:
        """Nothing is sent before :meth:`start`.

        :param cluster_id: hex
        :param instance: hex, new at each start of the agent
        :param bound: the IPv4 address that the agent listens on, if it is a single one
        :param wanted: interfaces, by name or address, instead of the chosen ones
        :raises Foreign: no browser would believe this announcement
        """
        self._bound = None if bound == "0.0.0.0" else bound
        super().__init__(tuple(wanted) or ((self._bound,) if self._bound else ()))
        self._txt = {
            b"v": PROTOCOL.encode(),
            b"cluster": cluster_id.encode(),
            b"id": hive_id.encode(),
            b"version": version.encode(),
            b"instance": instance.encode(),
            b"tls": b"1" if tls else b"0",
        }
        sighting("", self._txt, ["192.0.2.1"], port)
        self._label = _label(hive_id, instance)
        self._hosts = (f"hive-{instance}-{number}.local." for number in itertools.count())
        self._port = port

    @contextlib.asynccontextmanager
    async def _speaking(
        self, speaker: AsyncZeroconf, chosen: Sequence[Interface]
    ) -> AsyncIterator[Callable[[], None]]:
        info = self._info([self._bound] if self._bound else [i.address for i in chosen])
        # The name has the instance in it, so it needs no probing (RFC 6762, section 8.1).
        await (await speaker.async_register_service(info, cooperating_responders=True))
        again = _Repetition(ANNOUNCE_AGAIN_S)

        def tick() -> None:
            if again.due():
                announcement = speaker.zeroconf.generate_service_broadcast(info, None)
                speaker.zeroconf.async_send(announcement)

        yield tick
        # The service goes on with other addresses: a goodbye would make browsers drop the hive.
        speaker.zeroconf.registry.async_remove(info)

    def _info(self, addresses: list[str]) -> AsyncServiceInfo:
        """The host has another name each time, so that no cache mixes old addresses with new."""
        return AsyncServiceInfo(
            SERVICE,
            f"{self._label}.{SERVICE}",
            port=self._port,
            properties=self._txt,
            server=next(self._hosts),
            parsed_addresses=addresses,
            other_ttl=TTL_S,
        )


def _label(hive_id: str, instance: str) -> str:
    """Unique on the LAN even if two hives claim one id; a single label, so without dots."""
    return f"{hive_id.replace('.', '-')[: LABEL_MAX - 1 - len(instance)]}-{instance}"


class Browser(_Presence):
    """Reports the hives of the LAN until it is stopped, those of other clusters included.

    ``found`` is called for each new one, again when its announcement changes, and again, though
    nothing else changed, when it is heard after a link came back, its own or one of this machine.
    ``lost`` is called with the ``service`` of one that said goodbye or expired, which takes 20
    minutes: whether a hive is alive is told by its heartbeats, not by mDNS.
    """

    def __init__(
        self,
        found: Callable[[Sighting], None],
        lost: Callable[[str], None],
        wanted: Sequence[str] = (),
    ) -> None:
        super().__init__(wanted)
        self._found = found
        self._lost = lost
        self._known: dict[str, tuple[Sighting, str | None]] = {}  # with the name of its host
        self._heard: set[str] = set()  # of those known, since the interfaces last changed
        self._own: Sequence[Interface] = ()
        self._resolving: dict[str, asyncio.Task[None]] = {}

    @contextlib.asynccontextmanager
    async def _speaking(
        self, speaker: AsyncZeroconf, chosen: Sequence[Interface]
    ) -> AsyncIterator[Callable[[], None]]:
        self._own = chosen
        self._heard.clear()
        again = _Repetition(itertools.chain(ASK_AGAIN_S, itertools.repeat(ASK_AGAIN_S[-1])))
        settled = _Repetition((UNHEARD_S,))

        def tick() -> None:
            if again.due():
                _ask(speaker.zeroconf)
            if settled.due():
                for key in self._known.keys() - self._heard:
                    self._forget(key)

        # QM: the answer to a QU question is unicast, and reaches only one of the processes that
        # share the port, perhaps not this one.
        browser = AsyncServiceBrowser(
            speaker.zeroconf, SERVICE, handlers=[self._changed], question_type=DNSQuestionType.QM
        )
        try:
            yield tick
        finally:
            await browser.async_cancel()
            await self._end_resolving()

    def _changed(
        self,
        zeroconf: zeroconf.Zeroconf,
        service_type: str,
        name: str,
        state_change: ServiceStateChange,
    ) -> None:
        """zeroconf calls this, by these names, for every record of the service type."""
        if state_change is ServiceStateChange.Removed:
            self._forget(name.lower())
        else:
            self._look(zeroconf, name)

    def _look(self, speaker: zeroconf.Zeroconf, name: str) -> None:
        """Judge what is known of a service; ask for the rest if it is not all there."""
        try:
            info = AsyncServiceInfo(SERVICE, name)
        except zeroconf.Error:
            self._ignore(name, "it is no name of a hive")
            return
        if info.load_from_cache(speaker):
            self._judge(info)
        elif name.lower() not in self._resolving and len(self._resolving) < RESOLVING_MAX:
            self._resolving[name.lower()] = asyncio.create_task(self._resolve(speaker, info))

    async def _resolve(self, speaker: zeroconf.Zeroconf, info: AsyncServiceInfo) -> None:
        try:
            if await info.async_request(speaker, RESOLVE_MS, question_type=DNSQuestionType.QM):
                self._judge(info)
        finally:
            self._resolving.pop(info.name.lower(), None)

    async def _end_resolving(self) -> None:
        tasks = list(self._resolving.values())
        self._resolving.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _judge(self, info: AsyncServiceInfo) -> None:
        addresses = info.parsed_addresses(IPVersion.V4Only)
        try:
            seen = sighting(info.name, info.properties, addresses, info.port, self._own)
        except Foreign as error:
            self._ignore(info.name, str(error))
            return
        key = seen.service.lower()
        if key not in self._known and len(self._known) >= KNOWN_MAX:
            self._complain(f"more than {KNOWN_MAX} hives announce themselves; ignored the rest")
            return
        # Announcements that were begun anew have another host: its link may have come back.
        if self._known.get(key) == (seen, info.server) and key in self._heard:
            return
        self._known[key] = seen, info.server
        self._heard.add(key)
        self._found(seen)

    def _ignore(self, name: str, why: str) -> None:
        """Strangers can cause any number of these, so only the first are logged."""
        if len(self._complaints) < COMPLAINTS_MAX:
            self._complain(f"ignored {name[:80]!r}: {why}")

    def _forget(self, key: str) -> None:
        self._heard.discard(key)
        if known := self._known.pop(key, None):
            self._lost(known[0].service)


def _ask(speaker: zeroconf.Zeroconf) -> None:
    """Ask the LAN for its hives; those that are known need not answer.

    zeroconf does so for 15 s and then only listens, which is too little where a switch passes
    nothing for the first half minute of a link, or where two halves of a network are joined.
    """
    query = DNSOutgoing(_QUERY)
    query.add_question(DNSQuestion(SERVICE, _PTR, _IN))
    now = zeroconf.current_time_millis()
    for record in speaker.cache.get_all_by_details(SERVICE, _PTR, _IN):
        if not record.is_stale(now):
            query.add_answer_at_time(record, now)
    speaker.async_send(query)


async def loops(interface: Interface) -> str | None:
    """Whether mDNS leaves this interface and is heard on it: a query is sent, its copy awaited.

    :returns: None if it is heard within a second, else in words why not
    """
    try:
        return await _loops(interface)
    except OSError as error:
        return _REFUSALS.get(error.errno or 0, str(error))


async def _loops(interface: Interface) -> str | None:
    query = _own_query()
    with _group_socket(interface) as speaker:
        listener = _Listener(query)
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: listener, sock=speaker
        )
        try:
            speaker.sendto(query, GROUP)
            async with asyncio.timeout(LOOP_S):
                await listener.heard.wait()
        except TimeoutError:
            return f"its own query was not heard back within {LOOP_S:g} s: a firewall, perhaps"
        finally:
            transport.close()
    return None


class _Listener(asyncio.DatagramProtocol):
    """Waits for one datagram among others."""

    def __init__(self, expected: bytes) -> None:
        self.heard = asyncio.Event()
        self._expected = expected

    def datagram_received(self, data: bytes, addr: object) -> None:
        if data == self._expected:
            self.heard.set()


def _own_query() -> bytes:
    """A query that nobody else sends and nobody answers."""
    query = DNSOutgoing(_QUERY)
    name = f"hive-doctor-{secrets.token_hex(8)}.{SERVICE}"
    query.add_question(DNSQuestion(name, _PTR, _IN))
    return query.packets()[0]


def _group_socket(interface: Interface) -> socket.socket:
    """In the group of mDNS on this interface. :raises OSError: it cannot be"""
    address = socket.inet_aton(interface.address)
    speaker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        speaker.setblocking(False)
        speaker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        speaker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        speaker.bind(("", GROUP[1]))
        membership = socket.inet_aton(GROUP[0]) + address
        speaker.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        speaker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, address)
        speaker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        speaker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    except OSError:
        speaker.close()
        raise
    return speaker
