"""Announces or browses until its standard input closes; says what happens, a JSON object a line.

``python -m tests.speaker announce '{"hive_id": …}'``, ``… browse '{"wanted": […]}'``, or
``… loops '{}'``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
from typing import Any

import uvloop

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
        case "loops":
            await loops()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], json.loads(sys.argv[2])))
