"""Announces or browses until its standard input closes; says what happens, a JSON object a line.

``python -m tests.speaker announce '{"hive_id": …}'`` or ``… browse '{"wanted": […]}'``. Others:
``disturb`` announces what no hive does, ``flood`` any number of hives, ``loops`` checks multicast.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
from typing import Any

import uvloop
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from wire import lan, mdns


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


async def speak(presence: mdns.Announcement | mdns.Browser) -> None:
    await presence.start()
    say("started")
    await asyncio.to_thread(sys.stdin.read)
    await presence.stop()
    say("stopped")


def browser(**fields: Any) -> mdns.Browser:
    return mdns.Browser(
        lambda seen: say("found", **dataclasses.asdict(seen)),
        lambda service: say("lost", service=service),
        **fields,
    )


GOOD = {"v": "1", "cluster": "ab12", "id": "rogue", "version": "0.1", "instance": "0f", "tls": "0"}
ADDRESS = "10.77.0.250"
HOSTILE: list[dict[str, Any]] = [
    {"properties": {}},
    {"properties": b"\xff"},
    {"properties": b"\x05v=1\xff\xfe\x00\x00\x03=x="},
    {"properties": {**GOOD, "id": b"\xff\xfe"}},
    {"properties": {**GOOD, "id": "../../etc"}},
    {"properties": {**GOOD, "id": "x" * 200}},
    {"properties": {**GOOD, "cluster": ""}},
    {"properties": {**GOOD, "v": "99"}},
    {"port": 0},
    {"parsed_addresses": []},
    {"parsed_addresses": ["127.0.0.1"]},
    {"parsed_addresses": ["224.0.0.251", "0.0.0.0"]},
    {"parsed_addresses": ["fe80::1"]},
]
GARBAGE = [
    b"",
    b"\0" * 12,
    b"\xff" * 1400,
    b"\0\0\x84\0\0\0\xff\xff\0\0\0\0\xc0\x0c",
    # A pointer to a service whose name is not UTF-8, and to one of another type
    b"\0\0\x84\0\0\0\0\1\0\0\0\0\5_hive\4_tcp\5local\0\0\x0c\0\1\0\0\x11\x94\0\5\2\xff\xfe\xc0\x0c",
    b"\0\0\x84\0\0\0\0\1\0\0\0\0\5_hive\4_tcp\5local\0\0\x0c\0\1\0\0\x11\x94\0\4\2ab\0",
]


def rogue(number: int, **changes: Any) -> AsyncServiceInfo:
    fields = {"port": 7835, "parsed_addresses": [ADDRESS], "properties": GOOD, **changes}
    name = f"rogue-{number}"
    return AsyncServiceInfo(
        mdns.SERVICE, f"{name}.{mdns.SERVICE}", server=f"{name}.local.", **fields
    )


async def disturb() -> None:
    (own,) = lan.chosen(lan.interfaces())
    async with AsyncZeroconf(interfaces=[own.address]) as speaker:
        await speaker.zeroconf.async_wait_for_start()
        for number, changes in enumerate(HOSTILE):
            info = rogue(number, **changes)
            await speaker.async_register_service(info, cooperating_responders=True)
        for datagram in GARBAGE:
            for sender in speaker.zeroconf.engine.senders:
                sender.transport.sendto(datagram, mdns.GROUP)
        # The last of the registered ones is announced for the third time.
        await asyncio.sleep(0.5)
        say("disturbed")
        await asyncio.to_thread(sys.stdin.read)


async def flood(number: int) -> None:
    """Announces each of them once, at a pace that a socket's buffer bears."""
    (own,) = lan.chosen(lan.interfaces())
    async with AsyncZeroconf(interfaces=[own.address]) as speaker:
        await speaker.zeroconf.async_wait_for_start()
        for index in range(number):
            announcement = speaker.zeroconf.generate_service_broadcast(rogue(index), None)
            speaker.zeroconf.async_send(announcement)
            if index % 20 == 0:
                await asyncio.sleep(0.03)
        say("flooded")
        await asyncio.to_thread(sys.stdin.read)


async def loops() -> None:
    for interface in lan.interfaces():
        say("loops", name=interface.name, why_not=await mdns.loops(interface))


async def main(role: str, fields: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.WARNING)
    match role:
        case "announce":
            await speak(mdns.Announcement(**fields))
        case "browse":
            await speak(browser(**fields))
        case "disturb":
            await disturb()
        case "flood":
            await flood(**fields)
        case "loops":
            await loops()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], json.loads(sys.argv[2])))
