"""Four hosts on a LAN: a queen, two hives, a caller; found by mDNS alone, entered with a key."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests import lan
from tests.cluster import Daemon, cluster, online, spawn_scripted, until
from tests.hosts import Room
from tests.netdemo import play
from wire.keys import Keys

pytestmark = pytest.mark.skipif(
    lan.unavailable() is not None, reason=f"no LAN can be made here: {lan.unavailable()}"
)

ANSWER = {"model": "parrot", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    with lan.Lan() as made:
        async with cluster() as daemons:
            room = Room(made, daemons)
            yield room
            await room.close()


def key_of(room: Room, *scopes: Any, **limits: Any) -> str:
    return Keys(room.secret).make(scopes=scopes or ("admin",), **limits)[0]


async def test_hives_are_found_by_mdns_alone_and_a_caller_with_a_key_gets_answers(
    room: Room,
) -> None:
    room.add("queen", "gpu-0", "gpu-1", "caller")
    queen, first, second = await asyncio.gather(
        room.queen("queen"), room.hive("gpu-0"), room.hive("gpu-1")
    )
    admin = room.client("caller", queen, key_of(room))
    await online(admin, "gpu-0", "gpu-1")
    hives = (await admin.get("/v1/hives"))["hives"]
    assert {hive["hive_id"]: hive["found_by"] for hive in hives} == dict.fromkeys(
        ("gpu-0", "gpu-1"), "mdns"
    )

    for daemon in (first, second):
        straight = room.client("caller", daemon, key_of(room))
        await spawn_scripted(straight_daemon(daemon, straight), daemon.name)
    key = key_of(room, "infer")
    async with room.session("caller") as http:
        for model in ("gpu-0", "gpu-1"):

            async def answered(model: str = model) -> bool:
                async with http.post(
                    f"{queen.url}/v1/chat/completions",
                    json={**ANSWER, "model": model},
                    headers={"authorization": f"Bearer {key}"},
                ) as got:
                    return got.status == 200 and got.headers["x-hive-id"] == model

            await until(answered, f"an answer from {model}")


async def test_the_tour_of_the_readme_works_as_it_stands() -> None:
    said: list[str] = []
    answer = json.loads(await play(said.append))
    assert "one inference service" in answer["choices"][0]["message"]["content"]
    assert any(line.startswith("second  online") for line in "\n".join(said).splitlines())


async def test_a_hive_that_starts_later_is_found_within_three_seconds(room: Room) -> None:
    room.add("queen", "gpu-0")
    queen = await room.queen("queen")
    admin = room.client("queen", queen, key_of(room))
    await room.hive("gpu-0")
    listening = time.monotonic()
    await online(admin, "gpu-0")
    assert time.monotonic() - listening < 3


async def test_a_pulled_cable_makes_a_hive_suspect_and_gone_and_it_comes_back(room: Room) -> None:
    room.add("queen", "gpu-0")
    queen = await room.queen("queen")
    await room.hive("gpu-0")
    admin = room.client("queen", queen, key_of(room))
    await online(admin, "gpu-0")

    async def state() -> str:
        return str((await admin.get("/v1/hives"))["hives"][0]["state"])

    async def reaches(wanted: str, within_s: float) -> float:
        began = time.monotonic()

        async def there() -> bool:
            return await state() == wanted

        await until(there, f"gpu-0 to be {wanted}", within_s=within_s)
        return time.monotonic() - began

    for _ in range(2):
        room.lan.down("gpu-0")
        silent = await reaches("suspect", 5)
        assert 1.9 < silent < 4  # the last heartbeat may be a second old
        assert silent + await reaches("gone", 4) < 6
        room.lan.up("gpu-0")
        assert await reaches("online", 10) < 3


async def test_where_multicast_is_blocked_the_flag_works_and_the_doctor_says_why(
    room: Room,
) -> None:
    room.add("queen", "gpu-0")
    room.lan.block_multicast("gpu-0")
    await room.hive("gpu-0")
    queen = await room.queen("queen", f"--hive=http://{room.hosts['gpu-0']}:7835")
    admin = room.client("queen", queen, key_of(room))
    await online(admin, "gpu-0")
    assert (await admin.get("/v1/hives"))["hives"][0]["found_by"] == "flag"
    secret = {"HIVE_SECRET": room.secret.text}
    code, out, err = await room.run("queen", "--json", "doctor", "net", env=secret)
    report = json.loads(out)
    assert report["hives"]["gpu-0"]["heard"] is False, err
    assert report["hives"]["gpu-0"]["answers"] is True
    assert "multicast" in " ".join(report["problems"])
    assert code == 1


async def test_where_multicast_is_blocked_a_hive_announces_itself(room: Room) -> None:
    room.add("queen", "gpu-0")
    room.lan.block_multicast("gpu-0")
    queen = await room.queen("queen")
    await room.hive("gpu-0", f"--queen-url={queen.url}")
    admin = room.client("queen", queen, key_of(room))
    await online(admin, "gpu-0")
    hive = (await admin.get("/v1/hives"))["hives"][0]
    assert (hive["found_by"], hive["hive_url"]) == ("ready", "http://10.77.0.2:7835")


async def test_a_new_address_is_followed(room: Room) -> None:
    room.add("queen", "gpu-0")
    queen = await room.queen("queen")
    await room.hive("gpu-0")
    admin = room.client("queen", queen, key_of(room))
    await online(admin, "gpu-0")
    room.lan.readdress("gpu-0", "10.77.0.99")

    async def moved() -> bool:
        hives = (await admin.get("/v1/hives"))["hives"]
        return [h["hive_url"] for h in hives if h["state"] == "online"] == [
            "http://10.77.0.99:7835"
        ]

    await until(moved, "gpu-0 at its new address")


async def test_a_hive_with_two_addresses_is_one_hive_and_is_reached_by_the_other(
    room: Room,
) -> None:
    room.add("queen", "gpu-0")
    room.lan.address("gpu-0", "10.77.0.50")
    queen = await room.queen("queen", "--hive=http://10.77.0.50:7835")
    await room.hive("gpu-0")
    admin = room.client("queen", queen, key_of(room))
    await online(admin, "gpu-0")

    async def at() -> list[str]:
        hives = (await admin.get("/v1/hives"))["hives"]
        return [hive["hive_url"] for hive in hives if hive["state"] == "online"]

    (first,) = await at()
    room.lan.remove_address("gpu-0", first.split("//")[1].split(":")[0])
    (other,) = {"http://10.77.0.2:7835", "http://10.77.0.50:7835"} - {first}

    async def moved() -> bool:
        return await at() == [other]

    await until(moved, "the hive at its other address")


async def test_two_queens_serve_the_same_hives_and_one_that_dies_is_not_missed(
    room: Room,
) -> None:
    room.add("queen", "second", "gpu-0", "caller")
    queens = [await room.queen("queen"), await room.queen("second")]
    hive = await room.hive("gpu-0")
    clients = [room.client("caller", queen, key_of(room)) for queen in queens]
    for client in clients:
        await online(client, "gpu-0")
    straight = room.client("caller", hive, key_of(room))
    await spawn_scripted(straight_daemon(hive, straight), "parrot")
    infer = {"operation": "infer", "model": "parrot", "prompt": "hello", "max_tokens": 3}
    for client in clients:
        assert (await client.run(infer))["tokens_out"] == 3
    await queens[0].stop(9)
    assert (await clients[1].run(infer))["tokens_out"] == 3
    again = await room.queen("queen")
    began = time.monotonic()
    await online(clients[0], "gpu-0")
    assert time.monotonic() - began < 3
    assert (await clients[0].run(infer))["tokens_out"] == 3
    assert again.pid != queens[0].pid


def straight_daemon(daemon: Daemon, client: Any) -> Daemon:
    """The daemon, asked by this client."""
    return Daemon(daemon.name, daemon.url, daemon.process, daemon.log_path, client)
