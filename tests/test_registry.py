"""What the queen makes of heartbeats: states, loads, and hives that come and go."""

from __future__ import annotations

import asyncio
import time

import pytest

from operations.errors import Conflict
from operations.hosts import Heartbeat, WorkerInfo
from queen.known import GONE_S, SUSPECT_S, KnownHive, Load
from queen.registry import MAX_RUMOURS, AlreadyHeard, Registry
from wire.addresses import checked_url
from wire.peer import Peer, literal
from wire.secret import Secret
from wire.trust import Refusals


def beat(**more: object) -> Heartbeat:
    fields = {"hive_id": "gpu-0", "version": "1", "hostname": "h", "timestamp": 0.0}
    return Heartbeat.model_validate({**fields, "operational_status": "ready", **more})


@pytest.fixture
async def hive() -> KnownHive:
    peer = Peer("http://127.0.0.1:1", None, role="queen", id="q", roles=("hive",))
    return KnownHive(peer, "mdns", None, None, 0.0)


def heard(hive: KnownHive, now: float, **more: object) -> None:
    hive.heard(beat(**more), now, lambda: None)


async def test_a_hive_is_online_then_suspect_then_gone(hive: KnownHive) -> None:
    assert hive.state(0) == "gone"
    heard(hive, 10)
    assert hive.state(10) == hive.state(10 + SUSPECT_S - 0.01) == "online"
    assert hive.state(10 + SUSPECT_S) == hive.state(10 + GONE_S - 0.01) == "suspect"
    assert hive.state(10 + GONE_S) == "gone"
    await hive.close()


async def test_a_hive_whose_connection_ends_is_suspect_at_once(hive: KnownHive) -> None:
    heard(hive, 10)
    assert hive.lost(10.1)
    assert not hive.lost(10.2)
    assert hive.state(10.2) == "suspect"
    heard(hive, 10.5)
    assert hive.state(10.5) == "online"
    await hive.close()


async def test_a_hive_that_keeps_coming_and_going_waits_a_moment(hive: KnownHive) -> None:
    now = 10.0
    waited = []
    for _ in range(6):
        heard(hive, now)
        held = 0.0
        while hive.state(now + held) != "online":
            held += 0.25
            assert "coming and going" in (hive.info(now + held - 0.25).problem or "")
        waited.append(held)
        hive.lost(now + 2.9)
        now += 3
    assert waited == [0, 0, 0, 0.5, 1, 1]  # never so long that it is away for 3 s
    heard(hive, now + 60)
    assert hive.state(now + 60) == "online"
    await hive.close()


async def test_a_hive_that_stops_gets_no_work(hive: KnownHive) -> None:
    heard(hive, 10, operational_status="stopping")
    assert hive.state(10) == "suspect"
    await hive.close()
    assert hive.gone.is_set()


async def known_at(*urls: str) -> tuple[Registry, list[KnownHive]]:
    """A registry with addresses that nobody listens at: what it makes of them is what is tried."""
    registry = Registry("queen-1", Secret.new(), Refusals())
    return registry, [registry.add(url, "mdns") for url in urls]


async def test_two_addresses_of_one_hive_never_hide_each_other() -> None:
    registry, (one, other) = await known_at("http://127.0.0.1:2", "http://127.0.0.1:3")
    registry._heard(one, beat(instance="aa"))
    with pytest.raises(AlreadyHeard):
        registry._heard(other, beat(instance="aa"))
    assert [hive.hive_url for hive in registry.hives()] == [one.url]
    one.lost(time.monotonic())
    registry._heard(other, beat(instance="aa"))
    assert [hive.hive_url for hive in registry.hives()] == [other.url]
    other.lost(time.monotonic())
    registry._heard(one, beat(instance="aa"))
    assert [hive.hive_url for hive in registry.hives()] == [one.url]
    await registry.close()


async def test_a_spare_address_is_used_when_another_hive_answers_at_the_first() -> None:
    registry, (one, other) = await known_at("http://127.0.0.1:2", "http://127.0.0.1:3")
    registry._heard(one, beat(instance="aa"))
    with pytest.raises(AlreadyHeard):
        registry._heard(other, beat(instance="aa"))
    assert other.leads_elsewhere(time.monotonic())
    registry._heard(one, beat(hive_id="gpu-1", instance="bb"))
    assert not other.leads_elsewhere(time.monotonic())
    registry._heard(other, beat(instance="aa"))
    assert [hive.hive_id for hive in registry.hives()] == ["gpu-0", "gpu-1"]
    await registry.close()


async def test_who_watches_a_hive_that_is_gone_is_told_soon_unless_he_stops() -> None:
    registry, (one,) = await known_at("http://127.0.0.1:2")
    one.gone.set()
    told: list[str] = []
    registry.watch(one.url, lambda: told.append("stopped"))()
    registry.watch("http://127.0.0.1:9", lambda: told.append("unknown"))
    registry.watch(one.url, lambda: told.append("gone"))
    assert told == []
    await asyncio.sleep(0)
    assert told == ["unknown", "gone"]
    await registry.close()


async def test_a_second_hive_with_the_same_id_is_refused() -> None:
    registry, (one, other) = await known_at("http://127.0.0.1:2", "http://127.0.0.1:3")
    registry._heard(one, beat(instance="aa"))
    with pytest.raises(Conflict, match="another --hive-id"):
        registry._heard(other, beat(instance="bb"))
    assert [hive.hive_url for hive in registry.hives()] == [one.url]
    await registry.close()


async def test_rumours_do_not_take_the_place_of_hives() -> None:
    registry, _ = await known_at()
    for number in range(2000):
        registry.add(f"http://127.0.{number // 250}.{number % 250}:9", "mdns")
    assert len(registry._hives) == MAX_RUMOURS
    hive = registry.add("http://127.0.0.1:2", "ready", "gpu-0")
    registry._heard(hive, beat(instance="aa"))
    for number in range(500):
        registry.add(f"http://127.1.{number // 250}.{number % 250}:9", "mdns")
    assert [hive.hive_id for hive in registry.hives()] == ["gpu-0"]
    await registry.close()


async def test_a_goodbye_does_not_end_what_is_heard_from_or_was_named_by_hand() -> None:
    registry, _ = await known_at()
    named = registry.add("http://127.0.0.1:2", "flag", "gpu-0", "gpu-0._hive")
    found = registry.add("http://127.0.0.1:3", "mdns", "gpu-1", "gpu-1._hive")
    registry._heard(named, beat(instance="aa"))
    registry._heard(found, beat(hive_id="gpu-1", instance="bb"))
    for known in (named, found):
        known.lost(time.monotonic())
        assert known.service is not None
        registry.withdrawn(known.service)
        assert not known.gone.is_set()
    assert [hive.hive_id for hive in registry.hives()] == ["gpu-0", "gpu-1"]
    await registry.close()


def worker(in_flight: int, name: str = "w") -> WorkerInfo:
    return WorkerInfo(
        worker_id=name,
        model="m",
        digest="sha256:m",
        engine="scripted",
        device="cpu",
        state="ready",
        slots=4,
        in_flight=in_flight,
        started_at=0,
    )


def test_a_load_is_what_the_queen_has_placed_and_what_others_have() -> None:
    load = Load()
    load.told([worker(3)])
    assert [w.in_flight for w in load.loaded([worker(3)])] == [3]
    load.begin("w")
    load.begin("w")
    assert [w.in_flight for w in load.loaded([worker(3)])] == [5]
    load.told([worker(5)])  # the heartbeat knows of both now
    assert [w.in_flight for w in load.loaded([worker(5)])] == [5]
    load.end("w")
    assert [w.in_flight for w in load.loaded([worker(5)])] == [4]
    load.end("w")
    load.told([worker(1)])  # one of the others has ended, and a heartbeat may be behind
    assert [w.in_flight for w in load.loaded([worker(1)])] == [1]


def test_a_load_never_falls_below_nothing() -> None:
    load = Load()
    load.begin("w")
    load.told([worker(0)])  # placed, and not yet arrived
    assert [w.in_flight for w in load.loaded([worker(0)])] == [1]
    load.end("w")
    load.end("w")
    assert [w.in_flight for w in load.loaded([worker(0)])] == [0]


@pytest.mark.parametrize(
    ("url", "known", "place"),
    [
        ("http://127.0.0.1:7835", "", "http://127.0.0.1:7835"),
        ("http://localhost:7835", "", "http://127.0.0.1:7835"),
        ("http://[::1]:7835", "", "http://[::1]:7835"),
        ("https://127.0.0.1", "", "https://127.0.0.1:443"),
        ("http://localhost:7835", "http://10.0.0.1:7835", "http://127.0.0.1:7835"),
    ],
)
async def test_a_url_is_dialled_by_address(url: str, known: str, place: str) -> None:
    assert await literal(url, known) == place


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("http://gpu-0:7835/", "http://gpu-0:7835"),
        ("http://localhost", "http://127.0.0.1:80"),
        ("https://[::1]", "https://[::1]:443"),
        ("http://GPU-0:7835", "http://gpu-0:7835"),
    ],
)
def test_a_url_has_one_spelling(url: str, same: str) -> None:
    assert checked_url(url) == same


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gpu-0",
        "ftp://gpu-0",
        "http://",
        "http://gpu-0:99999",
        "http://gpu-0:0",
        "http://gpu..lan:7835",
        "http://me@gpu-0:7835",
        "http://gpu-0:7835/v1",
        "http://gpu-0:7835?x=1",
        "http://gpu 0:7835",
        "http://gpü-0:7835",
        "http://[::1",
    ],
)
def test_what_is_no_daemons_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        checked_url(url)
