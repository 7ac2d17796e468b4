"""What the queen makes of heartbeats: states, loads, and hives that come and go."""

from __future__ import annotations

import pytest

from operations.hosts import Heartbeat, WorkerInfo
from queen.known import GONE_S, SUSPECT_S, KnownHive, Load
from wire.peer import Peer, literal


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
