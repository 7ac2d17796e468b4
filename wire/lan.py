"""The network interfaces of this machine: which of them lead to the LAN, and when they change.

The kernel's view of an interface is read from ``/sys/class/net`` (Linux:
Documentation/ABI/testing/sysfs-class-net). Elsewhere an interface is *virtual*, and so used.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Literal

import ifaddr

SYSFS = Path("/sys/class/net")
POLL_S = 10.0  # where the kernel tells nothing, and lest it once told nothing
SETTLE_S = 0.2  # a link that comes up tells several things within this time

Kind = Literal["real", "virtual", "bridge", "tunnel", "loopback"]

_IFF_UP = 0x1
_IFF_LOOPBACK = 0x8
_IFF_MULTICAST = 0x1000
# linux/if_arp.h: PPP, IPIP, IP6 in IP, SIT, GRE, GRE over IPv6, and NONE (WireGuard, tun)
_TUNNEL_TYPES = {512, 768, 769, 776, 778, 823, 65534}
_TUNNEL_DEVTYPES = {"wireguard", "vxlan", "geneve", "ppp"}
_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_IFADDR = 0x10

_PREFERENCE: tuple[Kind, ...] = ("real", "virtual", "bridge", "tunnel")
_NOT_BEST: dict[Kind, str] = {
    "virtual": "an interface without hardware, and this machine has a real one",
    "bridge": "a bridge without a physical port (docker's, for instance)",
    "tunnel": "a tunnel",
    "loopback": "the loopback, which no other machine reaches",
}


@dataclass(frozen=True)
class Interface:
    """One IPv4 address of a network interface; an interface with two addresses is there twice.

    :param index: the kernel's; an interface that is made again under its name has another
    :param prefix: length of the network's prefix, bits
    :param kind: *real* if it leads to hardware, be it through a bond, a VLAN or a bridge
    :param up: it is enabled and has a carrier
    """

    name: str
    index: int
    address: str
    prefix: int
    kind: Kind
    up: bool = True
    multicast: bool = True

    def reaches(self, address: str) -> bool:
        """Whether an IPv4 address is in this interface's own network."""
        return IPv4Interface(address).ip in IPv4Interface(f"{self.address}/{self.prefix}").network


def interfaces(sysfs: Path = SYSFS) -> list[Interface]:
    """All that have an IPv4 address, in the kernel's order.

    :raises OSError: the kernel does not list them
    """
    found = [
        _read(adapter.name, adapter.index or 0, str(ip.ip), ip.network_prefix, sysfs)
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if ip.is_IPv4
    ]
    return sorted(found, key=lambda interface: (interface.index, IPv4Interface(interface.address)))


def _read(label: str, index: int, address: str, prefix: int, sysfs: Path) -> Interface:
    name = label.partition(":")[0]  # a further address may have a label, eth0:1
    folder = sysfs / name
    if not folder.is_dir():
        loopback = address.startswith("127.")
        return Interface(name, index, address, prefix, "loopback" if loopback else "virtual")
    flags = int(_text(folder / "flags") or "0x1001", 16)
    carrier = _text(folder / "operstate") not in ("down", "lowerlayerdown", "notpresent", "dormant")
    return Interface(
        name,
        index,
        address,
        prefix,
        kind_of(name, sysfs),
        up=bool(flags & _IFF_UP) and carrier,
        multicast=bool(flags & _IFF_MULTICAST),
    )


def kind_of(name: str, sysfs: Path = SYSFS) -> Kind:
    """What an interface leads to, by the kernel's description of it; unknown is virtual."""
    folder = sysfs / name
    if int(_text(folder / "flags") or "0", 16) & _IFF_LOOPBACK:
        return "loopback"
    if _is_tunnel(folder):
        return "tunnel"
    if _is_real(folder, set()):
        return "real"
    return "bridge" if (folder / "bridge").exists() else "virtual"


def _is_tunnel(folder: Path) -> bool:
    devtype = dict(
        line.split("=", 1) for line in _text(folder / "uevent").splitlines() if "=" in line
    ).get("DEVTYPE")
    return (
        (folder / "tun_flags").exists()
        or devtype in _TUNNEL_DEVTYPES
        or int(_text(folder / "type") or "0") in _TUNNEL_TYPES
    )


def _is_real(folder: Path, seen: set[str]) -> bool:
    """It has a device, or something below it has one that is no end of a tunnel."""
    if folder.name in seen or _is_tunnel(folder):
        return False
    seen.add(folder.name)
    if (folder / "device").exists():
        return True
    below = (path.name.removeprefix("lower_") for path in folder.glob("lower_*"))
    return any(_is_real(folder.parent / name, seen) for name in below)


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing if it is not there, or gone meanwhile."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def chosen(present: Sequence[Interface], wanted: Sequence[str] = ()) -> list[Interface]:
    """Those that mDNS is spoken on.

    Of the kinds that there are the best one: real, then virtual (in a container), then bridges,
    then tunnels. A machine whose cable is pulled waits for it rather than speak to its containers.

    :param wanted: names or addresses; they alone decide, and may name the loopback, too
    """
    return [interface for interface, why_not in _judged(present, wanted) if why_not is None]


def left_out(
    present: Sequence[Interface], wanted: Sequence[str] = ()
) -> list[tuple[Interface, str]]:
    """Those that :func:`chosen` does not choose, each with the reason in words."""
    return [
        (interface, why_not)
        for interface, why_not in _judged(present, wanted)
        if why_not is not None
    ]


def missing(present: Sequence[Interface], wanted: Sequence[str]) -> list[str]:
    """Those wanted that this machine does not have (at present)."""
    here = {known for interface in present for known in (interface.name, interface.address)}
    return [name for name in wanted if name not in here]


def _judged(
    present: Sequence[Interface], wanted: Sequence[str]
) -> list[tuple[Interface, str | None]]:
    if wanted:
        return [
            (interface, None if _is_wanted(interface, wanted) else "not among those asked for")
            for interface in present
        ]
    able = {interface.kind for interface in present if interface.multicast}
    best = next((kind for kind in _PREFERENCE if kind in able), None)
    return [(interface, _why_not(interface, best)) for interface in present]


def _is_wanted(interface: Interface, wanted: Sequence[str]) -> bool:
    return interface.name in wanted or interface.address in wanted


def _why_not(interface: Interface, best: Kind | None) -> str | None:
    if interface.kind != best and (interface.multicast or interface.kind == "loopback"):
        return _NOT_BEST[interface.kind]
    if not interface.multicast:
        return "it does not carry multicast"
    return None if interface.up else "it is down, or its cable is not plugged in"


async def changes(poll_s: float = POLL_S) -> AsyncGenerator[None, None]:
    """Yields when addresses or links may have changed; close it with ``aclose()``.

    First when it has begun to listen, so that a look taken after that step misses nothing; then
    where the kernel tells of a change (rtnetlink(7)), and every ``poll_s`` seconds in any case.
    What happens while nobody waits is told by the next step.
    """
    told = asyncio.Event()
    with _netlink(told.set):
        yield
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(poll_s):
                    await told.wait()
                await asyncio.sleep(SETTLE_S)
            told.clear()
            yield


@contextlib.contextmanager
def _netlink(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` whenever the kernel reports a link or an IPv4 address, if it can be asked."""
    try:
        listener = _netlink_socket()
    except OSError:
        listener = None  # a sandbox that forbids it: there remains the polling
    if listener is None:
        yield
        return

    def readable() -> None:
        with contextlib.suppress(OSError):  # ENOBUFS, more than fitted, is news like any other
            while True:
                listener.recv(65536)
        tell()

    loop = asyncio.get_running_loop()
    with listener:
        loop.add_reader(listener.fileno(), readable)
        try:
            yield
        finally:
            loop.remove_reader(listener.fileno())


def _netlink_socket() -> socket.socket | None:
    """Bound to the kernel's reports; None on other systems. :raises OSError: it is forbidden"""
    if sys.platform != "linux":
        return None
    listener = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
    )
    try:
        listener.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR))
    except OSError:
        listener.close()
        raise
    return listener
