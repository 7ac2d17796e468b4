"""Hives find each other: which interfaces are used, and what crosses a network by mDNS alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster import clean_env
from tests.lan import Lan, unavailable
from wire import lan, mdns
from wire.lan import Interface, Kind
from wire.mdns import Announcement, Browser, Foreign, Sighting, sighting

FOUND_S = 3.0  # from the start of a hive until a browser has found it
PROGRAM_S = 10.0  # what a Python program may take to start or to stop on a busy machine

on_a_lan = pytest.mark.skipif(bool(unavailable()), reason=str(unavailable()))


# Which interfaces: made folders in the place of /sys/class/net, and tables.


@dataclass(frozen=True)
class Sysfs:
    """Describes interfaces as the kernel does."""

    root: Path

    def add(
        self,
        name: str,
        *parts: str,
        lower: tuple[str, ...] = (),
        arphrd: int = 1,
        flags: int = 0x1003,
        operstate: str = "up",
        devtype: str = "",
    ) -> None:
        """:param parts: what else there is in its folder: device, bridge, tun_flags"""
        folder = self.root / name
        folder.mkdir()
        for part in (*parts, *(f"lower_{below}" for below in lower)):
            (folder / part).mkdir()
        (folder / "type").write_text(f"{arphrd}\n")
        (folder / "flags").write_text(f"{flags:#x}\n")
        (folder / "operstate").write_text(f"{operstate}\n")
        (folder / "uevent").write_text(f"DEVTYPE={devtype}\nINTERFACE={name}\n")


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    """Of a machine with a bit of everything."""
    made = Sysfs(tmp_path)
    made.add("lo", arphrd=772, flags=0x9, operstate="unknown")
    made.add("eth0", "device")
    made.add("wlan0", "device", devtype="wlan")
    made.add("bond0", "bonding", lower=("eth0",), devtype="bond")
    made.add("vlan7", lower=("bond0",), devtype="vlan")
    made.add("br0", "bridge", lower=("vlan7", "veth1"), devtype="bridge")
    made.add("veth1", lower=())
    made.add("docker0", "bridge", lower=("veth1",), devtype="bridge")
    made.add("loop0", "bridge", lower=("loop1",), devtype="bridge")
    made.add("loop1", lower=("loop0",))
    made.add("tun0", "tun_flags", arphrd=65534, flags=0x1091)
    made.add("tap0", "tun_flags")
    made.add("wg0", arphrd=65534, devtype="wireguard", flags=0x91)
    made.add("flannel.1", lower=("eth0",), devtype="vxlan")
    made.add("ppp0", arphrd=512, devtype="ppp")
    return made


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lo", "loopback"),
        ("eth0", "real"),
        ("wlan0", "real"),
        ("bond0", "real"),
        ("vlan7", "real"),
        ("br0", "real"),
        ("veth1", "virtual"),
        ("docker0", "bridge"),
        ("loop0", "bridge"),
        ("tun0", "tunnel"),
        ("tap0", "tunnel"),
        ("wg0", "tunnel"),
        ("flannel.1", "tunnel"),
        ("ppp0", "tunnel"),
        ("gone0", "virtual"),
    ],
)
def test_an_interface_is_what_it_leads_to(sysfs: Sysfs, name: str, kind: Kind) -> None:
    assert lan.kind_of(name, sysfs.root) == kind


def test_without_sysfs_all_but_the_loopback_are_virtual_and_up(tmp_path: Path) -> None:
    kinds = {i.address: (i.kind, i.up, i.multicast) for i in lan.interfaces(tmp_path / "none")}
    assert kinds.pop("127.0.0.1")[0] == "loopback"
    assert set(kinds.values()) <= {("virtual", True, True)}


def made(name: str, address: str, kind: Kind = "real", **changes: Any) -> Interface:
    return dataclasses.replace(Interface(name, 2, address, 24, kind), **changes)


ETH = made("eth0", "10.0.1.1")
WLAN = made("wlan0", "10.0.2.1")
VETH = made("veth1", "10.0.3.1", "virtual")
DOCKER = made("docker0", "10.0.4.1", "bridge")
TUN = made("tun0", "10.0.5.1", "tunnel")
TUN_SILENT = made("wg0", "10.0.6.1", "tunnel", multicast=False)
LO = made("lo", "127.0.0.1", "loopback", prefix=8, multicast=False)
UNPLUGGED = made("eth1", "10.0.7.1", up=False)
NOTHING: list[Interface] = []


@pytest.mark.parametrize(
    ("present", "wanted", "expected"),
    [
        ([LO, ETH, WLAN, VETH, DOCKER, TUN], (), [ETH, WLAN]),
        ([LO, VETH, DOCKER, TUN], (), [VETH]),
        ([LO, DOCKER, TUN], (), [DOCKER]),
        ([LO, TUN, TUN_SILENT], (), [TUN]),
        ([LO, TUN_SILENT], (), NOTHING),
        ([LO], (), NOTHING),
        (NOTHING, (), NOTHING),
        ([LO, ETH, UNPLUGGED], (), [ETH]),
        ([LO, UNPLUGGED, DOCKER, VETH], (), NOTHING),
        ([LO, ETH, WLAN, DOCKER], ("docker0", "lo"), [LO, DOCKER]),
        ([LO, ETH, WLAN], (WLAN.address,), [WLAN]),
        ([LO, ETH, UNPLUGGED], ("eth1",), [UNPLUGGED]),
        ([LO, ETH], ("eth7",), NOTHING),
    ],
)
def test_the_interfaces_that_lead_to_the_lan_are_chosen(
    present: list[Interface], wanted: tuple[str, ...], expected: list[Interface]
) -> None:
    assert lan.chosen(present, wanted) == expected
    rest = [interface for interface, _ in lan.left_out(present, wanted)]
    assert rest == [interface for interface in present if interface not in expected]


def test_every_interface_that_is_left_out_is_told_why() -> None:
    present = [LO, ETH, UNPLUGGED, VETH, DOCKER, TUN, TUN_SILENT]
    assert {interface.name: why for interface, why in lan.left_out(present)} == {
        "lo": "the loopback, which no other machine reaches",
        "eth1": "it is down, or its cable is not plugged in",
        "veth1": "an interface without hardware, and this machine has a real one",
        "docker0": "a bridge without a physical port (docker's, for instance)",
        "tun0": "a tunnel",
        "wg0": "it does not carry multicast",
    }
    assert lan.missing(present, ("eth0", "eth7", TUN.address)) == ["eth7"]


# What an announcement may say: anybody on the LAN may say anything.

TXT: dict[bytes, bytes | None] = {
    b"v": b"1",
    b"cluster": b"ab12",
    b"id": b"gpu-0",
    b"version": b"0.2.0",
    b"instance": b"0f0f",
    b"tls": b"0",
}


def test_urls_in_our_own_networks_come_first() -> None:
    seen = sighting("x", TXT, ["10.9.0.1", "10.0.2.7", "10.2.0.1", "10.0.1.7"], 80, [ETH, WLAN])
    hosts = [url.removeprefix("http://") for url in seen.urls]
    assert hosts == ["10.0.1.7:80", "10.0.2.7:80", "10.2.0.1:80", "10.9.0.1:80"]


def test_tls_and_fields_of_a_newer_hive_are_understood() -> None:
    seen = sighting("x", {**TXT, b"tls": b"1", b"more": b"\xff"}, ["10.9.0.1"], 443)
    assert seen == Sighting("x", "gpu-0", "ab12", "0f0f", "0.2.0", ("https://10.9.0.1:443",))


@pytest.mark.parametrize(
    "change",
    [
        *({key: None} for key in TXT),
        *({key: b""} for key in TXT),
        *({key: b"\xff\xfe"} for key in TXT),
        *({key: b"9" * 200} for key in TXT),
        {b"id": b"-gpu"},
        {b"id": b"gpu 0"},
        {b"id": b"gpu-0\n"},
        {b"id": "größe".encode()},
        {b"cluster": b"xyz"},
        {b"tls": b"2"},
        {b"v": b"2"},
    ],
)
def test_a_malformed_txt_record_is_no_hive(change: dict[bytes, bytes | None]) -> None:
    with pytest.raises(Foreign):
        sighting("x", TXT | change, ["10.9.0.1"], 7835)


@pytest.mark.parametrize("address", ["127.0.0.1", "224.0.0.251", "0.0.0.0", "255.255.255.255"])
def test_an_address_that_leads_nowhere_is_left_out(address: str) -> None:
    assert sighting("x", TXT, [address, "10.9.0.1"], 1).urls == ("http://10.9.0.1:1",)
    with pytest.raises(Foreign):
        sighting("x", TXT, [address], 7835, [ETH])


def test_a_hive_without_a_port_is_none_and_a_thousand_addresses_are_too_many() -> None:
    with pytest.raises(Foreign):
        sighting("x", TXT, ["10.9.0.1"], 0)
    many = [str(IPv4Address("10.9.0.0") + n) for n in range(1000)]
    assert len(sighting("x", TXT, many, 7835).urls) == mdns.URLS_MAX


@given(
    st.dictionaries(st.sampled_from(sorted(TXT)), st.none() | st.binary(max_size=255)),
    st.lists(st.ip_addresses(v=4).map(str)),
    st.none() | st.integers(0, 65535),
)
def test_whatever_is_announced_is_a_sighting_or_foreign(
    change: dict[bytes, bytes | None], addresses: list[str], port: int | None
) -> None:
    with contextlib.suppress(Foreign):
        assert sighting("x", TXT | change, addresses, port).urls


def test_what_no_browser_would_believe_cannot_be_announced() -> None:
    with pytest.raises(Foreign):
        Announcement("no id", "ab12", "0f", "0.1", 7835)


# Start and stop, on the loopback of this machine.


class Heard:
    """What a browser reports."""

    def __init__(self) -> None:
        self.hives: asyncio.Queue[Sighting] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        self.browser = Browser(self.hives.put_nowait, self.lost.put_nowait, ("lo",))

    async def hive(self, hive_id: str) -> Sighting:
        """That hive; other tests may announce theirs here at the same time."""
        async with asyncio.timeout(FOUND_S):
            while (seen := await self.hives.get()).hive_id != hive_id:
                pass
        return seen


def an_announcement() -> tuple[str, Announcement]:
    hive_id = f"gpu-{secrets.token_hex(4)}"
    instance = secrets.token_hex(8)
    return hive_id, Announcement(hive_id, "ab12", instance, "0.1", 7835, wanted=["127.0.0.1"])


async def test_a_hive_is_found_and_lost_and_found_on_the_loopback_when_asked_for() -> None:
    heard = Heard()
    hive_id, announcement = an_announcement()
    await heard.browser.start()
    for _ in range(2):
        await announcement.start()
        seen = await heard.hive(hive_id)
        assert seen.urls == ("http://127.0.0.1:7835",)
        await announcement.stop()
        async with asyncio.timeout(FOUND_S):
            while await heard.lost.get() != seen.service:
                pass
    await heard.browser.stop()


@pytest.mark.parametrize("kind", ["announcement", "browser"])
async def test_start_and_stop_come_in_any_order_and_number(kind: str) -> None:
    presence = an_announcement()[1] if kind == "announcement" else Heard().browser
    await presence.stop()
    await presence.start()
    await presence.start()
    await presence.stop()
    await presence.start()
    await asyncio.sleep(0)  # it has begun to open, and is stopped in the middle of it
    await asyncio.gather(presence.stop(), presence.stop())
    await presence.stop()


async def test_mdns_loops_on_the_loopback_and_says_why_where_it_does_not() -> None:
    assert await mdns.loops(LO) is None
    assert await mdns.loops(ETH) == "it no longer has its address"


# Across a network: every speaker is a process on a host of its own.


@dataclass
class Speaker:
    """A process of ``tests/speaker.py``, and what it said that was not read yet."""

    process: asyncio.subprocess.Process
    said: list[dict[str, Any]] = field(default_factory=list)

    async def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line: dict[str, Any] = json.loads(await self.process.stdout.readline())
        self.said.append(line)
        return line

    async def until(self, within: float = FOUND_S, **expected: object) -> dict[str, Any]:
        """Its next line that has these fields."""
        async with asyncio.timeout(within):
            while not expected.items() <= (line := await self.line()).items():
                pass
        return line

    async def silent(self, seconds: float) -> None:
        """:raises AssertionError: it says something within that time"""
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(self.line(), seconds)
            raise AssertionError(f"it said {line}")

    async def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        async with asyncio.timeout(PROGRAM_S):
            await self.process.communicate()


class Hosts:
    """Three hosts, ``a``, ``b`` and ``q``, at 10.77.0.1, .2 and .3, and what speaks on them."""

    def __init__(self, lan: Lan) -> None:
        self.lan = lan
        self._speakers: list[Speaker] = []
        self._instances = itertools.count(10)
        for number, name in enumerate("abq", start=1):
            lan.host(name, f"10.77.0.{number}")

    async def run(self, host: str, role: str, **fields: object) -> Speaker:
        argv = [sys.executable, "-m", "tests.speaker", role, json.dumps(fields)]
        process = await asyncio.create_subprocess_exec(
            *self.lan.command(host, argv),
            env=clean_env(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        speaker = Speaker(process)
        self._speakers.append(speaker)
        return speaker

    async def browse(self) -> Speaker:
        """On ``q``; it has started."""
        speaker = await self.run("q", "browse")
        await speaker.until(PROGRAM_S, event="started")
        return speaker

    async def announce(self, host: str, **changes: object) -> Speaker:
        """``gpu-<host>`` on port 7835; it has started."""
        fields = {
            "hive_id": f"gpu-{host}",
            "cluster_id": "ab12",
            "instance": f"{next(self._instances)}",
            "version": "0.1",
            "port": 7835,
        }
        speaker = await self.run(host, "announce", **{**fields, **changes})
        await speaker.until(PROGRAM_S, event="started")
        return speaker

    async def close(self) -> None:
        running = [one for one in self._speakers if one.process.returncode is None]
        await asyncio.gather(*(speaker.stop() for speaker in running))


@pytest.fixture
def network() -> Iterator[Lan]:
    with Lan() as made:
        yield made


@pytest.fixture
async def hosts(network: Lan) -> AsyncIterator[Hosts]:
    made = Hosts(network)
    yield made
    await made.close()


@on_a_lan
async def test_two_hives_are_found_by_mdns_alone(hosts: Hosts) -> None:
    browser = await hosts.browse()
    await hosts.announce("a")
    found = await browser.until(event="found", hive_id="gpu-a", urls=["http://10.77.0.1:7835"])
    assert (found["cluster_id"], found["version"]) == ("ab12", "0.1")
    await hosts.announce("b", tls=True, bound="10.77.0.2")
    await browser.until(event="found", hive_id="gpu-b", urls=["https://10.77.0.2:7835"])


@on_a_lan
async def test_a_browser_that_comes_later_finds_them_too(hosts: Hosts) -> None:
    await asyncio.gather(hosts.announce("a"), hosts.announce("b"))
    browser = await hosts.browse()
    found = {(await browser.until(event="found"))["hive_id"] for _ in range(2)}
    assert found == {"gpu-a", "gpu-b"}


@on_a_lan
async def test_two_hives_of_one_id_are_both_found(hosts: Hosts) -> None:
    browser = await hosts.browse()
    await asyncio.gather(*(hosts.announce(host, hive_id="lab.gpu-0") for host in "ab"))
    found = [await browser.until(event="found", hive_id="lab.gpu-0") for _ in range(2)]
    assert {url for one in found for url in one["urls"]} == {
        "http://10.77.0.1:7835",
        "http://10.77.0.2:7835",
    }


@on_a_lan
async def test_a_hive_that_says_goodbye_is_lost_at_once(hosts: Hosts) -> None:
    browser = await hosts.browse()
    hive = await hosts.announce("a")
    found = await browser.until(event="found")
    lost = asyncio.create_task(browser.until(1, event="lost", service=found["service"]))
    await hive.stop()
    await lost


@on_a_lan
async def test_a_changed_address_is_followed(hosts: Hosts) -> None:
    browser = await hosts.browse()
    await hosts.announce("a")
    await browser.until(event="found", urls=["http://10.77.0.1:7835"])
    hosts.lan.readdress("a", "10.77.0.9")
    await browser.until(event="found", urls=["http://10.77.0.9:7835"])
    assert not any(line["event"] == "lost" for line in browser.said)


@on_a_lan
async def test_hives_are_found_again_when_a_link_comes_back(hosts: Hosts) -> None:
    browser = await hosts.browse()
    await hosts.announce("a")
    await browser.until(event="found", hive_id="gpu-a")
    for pulled in "qa":
        hosts.lan.down(pulled)
        await browser.silent(0.6)
        hosts.lan.up(pulled)
        await browser.until(2, event="found", hive_id="gpu-a")


@on_a_lan
async def test_a_hive_and_a_queen_without_a_network_meet_when_they_get_one(hosts: Hosts) -> None:
    hosts.lan.down("a")
    hosts.lan.down("q")
    browser = await hosts.browse()
    await hosts.announce("a")
    await browser.silent(0.5)
    hosts.lan.up("q")
    hosts.lan.up("a")
    await browser.until(event="found", hive_id="gpu-a")


@on_a_lan
async def test_a_network_that_blocks_multicast_hides_a_hive(hosts: Hosts) -> None:
    browser = await hosts.browse()
    hosts.lan.block_multicast("a")
    await hosts.announce("a")
    await browser.silent(2)
    hosts.lan.unblock_multicast("a")
    await hosts.announce("b")
    await browser.until(event="found", hive_id="gpu-b")


@on_a_lan
async def test_foreign_and_hostile_announcements_are_ignored(hosts: Hosts) -> None:
    browser = await hosts.browse()
    hostile = await hosts.run("b", "disturb")
    await hostile.until(PROGRAM_S, event="disturbed")
    await hosts.announce("a")
    await browser.until(event="found", hive_id="gpu-a")
    assert [line["event"] for line in browser.said] == ["started", "found"]


@on_a_lan
async def test_no_more_than_a_thousand_hives_are_remembered(hosts: Hosts) -> None:
    browser = await hosts.browse()
    await hosts.run("b", "flood", number=mdns.KNOWN_MAX + 100)
    for _ in range(mdns.KNOWN_MAX):
        await browser.until(PROGRAM_S, event="found")
    await browser.silent(1)
