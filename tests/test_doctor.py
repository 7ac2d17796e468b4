"""``hive doctor``: what it makes of what it sees, as tables, and what it says of real hosts."""

from __future__ import annotations

import asyncio
import errno
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import aiohttp
import pytest

from keeper import connect, tls
from keeper.doctor import machine
from keeper.doctor.dial import Met, Trouble, dial, told_by, unreached, why
from keeper.doctor.net import Hive, Known, Link, Queen, Seen, hives, read_hives, to_dial
from keeper.doctor.verdict import document, judge, judge_foreign, judge_hive, why_unheard
from operations.errors import Forbidden, HiveError, NotFound, Unauthorized
from operations.hosts import VERSION
from tests import lan
from tests.cluster import Daemon, cluster, online
from tests.hosts import Room
from tests.terminal import COLUMNS, hive, terminal
from wire.keys import Keys
from wire.lan import Interface
from wire.mdns import Sighting
from wire.proof import Unproven
from wire.secret import Secret, save

on_a_lan = pytest.mark.skipif(bool(lan.unavailable()), reason=str(lan.unavailable()))

LISTEN_S = 2.5  # answers on the LAN are up to 1.2 s late, so that they can be joined
NOW = datetime(2030, 1, 1, tzinfo=UTC)

ETH = Link(Interface("eth0", 2, "10.77.0.1", 24, "real"))
DEAF = replace(ETH, deaf="sending is not permitted: a firewall, perhaps")
DOCKER = Link(Interface("docker0", 3, "172.17.0.1", 16, "bridge"), left_out="a bridge")
LINKS = (ETH, DOCKER)
CLUSTER, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
HERE, FAR = "http://10.77.0.2:7835", "http://10.78.0.9:7835"


def met(url: str = HERE, hive_id: str = "gpu-0", instance: str = "1", **more: Any) -> Met:
    address = url.partition("://")[2].rpartition(":")[0].strip("[]")
    return Met(url, address, "hive", hive_id, instance, "0.1.0", **more)


def silent(url: str = HERE, trouble: Trouble = "refused") -> Met:
    return Met(url, "10.77.0.2", trouble=trouble)


def sighting(
    hive_id: str = "gpu-0", *urls: str, instance: str = "1", cluster: str = CLUSTER
) -> Any:
    service = f"{hive_id}-{instance}._hive._tcp.local."
    return Sighting(service, hive_id, cluster, instance, "0.1.0", urls or (HERE,))


def known(url: str = HERE, hive_id: str = "gpu-0", *, by: str = "flag", **more: Any) -> Known:
    return Known(url, hive_id, by, **{"online": True, **more})


def queen(*hers: Known, url: str = "http://127.0.0.1:7833", trouble: str = "") -> Queen:
    return Queen(url, hers, trouble)


def seen(**more: Any) -> Seen:
    return Seen(**{"links": LINKS, "cluster_id": CLUSTER, **more})


def problems(looked: Seen) -> list[str]:
    return [f.text for _, findings in judge(looked) for f in findings if not f.well]


# -- deciding: why a hive is not heard -------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "links", "reason"),
    [
        ("10.77.0.2", [ETH, DOCKER], "not_carried"),
        ("10.77.0.2", [DEAF, DOCKER], "deaf"),
        ("10.77.0.2", [DEAF, ETH], "not_carried"),
        ("10.77.0.1", [ETH], "this_machine"),
        ("172.17.0.2", [ETH, DOCKER], "left_out"),
        ("10.78.0.9", [ETH, DOCKER], "other_network"),
        ("10.78.0.9", [], "other_network"),
        ("127.0.0.1", [ETH], "loopback"),
        ("fd00::2", [ETH], "ipv6"),
    ],
)
def test_the_reason_for_silence_follows_from_the_interfaces(
    address: str, links: Sequence[Link], reason: str
) -> None:
    assert why_unheard(address, links)[0] == reason


HIVES = [
    # what is known of the hive, what the queen says, and words of each problem
    ("heard and hers", Hive("gpu-0", [met()], [sighting()], [known()]), queen(known()), []),
    ("heard, no queen", Hive("gpu-0", [met()], [sighting()]), None, []),
    ("not carried", Hive("gpu-0", [met()], [], [known()]), queen(known()), ["IGMP snooping"]),
    ("far and hers", Hive("gpu-0", [met(FAR)], [], [known(FAR)]), queen(known(FAR)), []),
    ("far and nobody's", Hive("gpu-0", [met(FAR)]), None, ["does not cross routers"]),
    ("loopback", Hive("gpu-0", [met("http://127.0.0.1:7835")]), None, []),
    ("off", Hive("gpu-0", [silent()], [], [known()]), queen(known()), ["Nobody listens"]),
    ("off, announced", Hive("gpu-0", [silent()], [sighting()]), None, ["announces itself, though"]),
    (
        "heard, and refused by the queen",
        Hive("gpu-0", [met()], [sighting()], [known(online=False, why="twice there")]),
        queen(),
        ["no work: twice there."],
    ),
    ("unknown to her", Hive("gpu-0", [met()], [sighting()]), queen(), [f"'--hive {HERE}'"]),
    ("unknown and unheard", Hive("gpu-0", [met()]), queen(), ["'hive queen --hive"]),
    (
        "foreign, and meant",
        Hive(HERE, [silent(HERE, "foreign_cluster")]),
        None,
        ["answers, but cannot be used. It belongs to another cluster"],
    ),
    ("she does not tell", Hive("gpu-0", [met()], [sighting()]), queen(trouble="No."), []),
    (
        "on her loopback",
        Hive("gpu-0", [Met("http://127.0.0.1:7835", trouble="through_queen")], [], [known()]),
        queen(url="http://10.77.0.9:7833"),
        [],
    ),
    ("a queen", Hive("q", [replace(met(), role="queen")]), None, ["is a queen, not a hive"]),
]


@pytest.mark.parametrize(
    ("hive", "queen", "words"), [h[1:] for h in HIVES], ids=[h[0] for h in HIVES]
)
def test_a_hive_has_the_problems_that_it_has_and_no_others(
    hive: Hive, queen: Queen | None, words: list[str]
) -> None:
    found = [f.text for f in judge_hive(hive, LINKS, queen) if not f.well]
    assert len(found) == len(words)
    for text, part in zip(found, words, strict=True):
        assert part in text


@pytest.mark.parametrize(
    ("found_by", "words"),
    [("flag", "by --hive"), ("ready", "told her itself"), ("mdns", "nevertheless.")],
)
def test_how_the_queen_has_a_hive_that_is_not_heard_is_said(found_by: str, words: str) -> None:
    has = known(by=found_by)
    text = judge_hive(Hive("gpu-0", [met()], [], [has]), LINKS, queen(has))[0].text
    assert words in text


def test_without_a_hive_or_an_interface_there_are_problems() -> None:
    assert len(problems(seen())) == 1
    assert "no cluster secret" in problems(seen(cluster_id=None))[0]
    looked = seen(links=(DOCKER,), sightings=[sighting()], met={HERE: met()}, missing=["eth7"])
    assert ["no interface 'eth7'" in p or "uses no interface" in p for p in problems(looked)] == [
        True,
        True,
    ]


def test_an_interface_without_multicast_is_a_problem_of_its_own() -> None:
    looked = seen(links=(DEAF,), sightings=[sighting()], met={HERE: met()})
    assert ["not permitted" in text for text in problems(looked)] == [True]


@pytest.mark.parametrize(
    ("url", "is_known", "well"),
    [(HERE, True, True), (HERE, False, True), ("http://10.77.0.1:7835", True, False)],
)
def test_a_foreign_hive_is_a_problem_only_on_this_machine(
    url: str, is_known: bool, well: bool
) -> None:
    stranger = sighting("gpu-9", url, cluster=OTHER)
    assert judge_foreign(stranger, LINKS, known=is_known).well is well


# -- deciding: which hives there are ---------------------------------------------------------------


def test_two_addresses_of_one_agent_are_one_hive() -> None:
    other = "http://10.9.0.2:7835"
    looked = seen(
        sightings=[sighting("gpu-0", HERE, other)],
        met={HERE: silent(HERE), other: met(other)},
    )
    (one,) = hives(looked)
    assert (one.name, one.best.url, one.heard, len(one.met)) == ("gpu-0", other, True, 2)


def test_two_agents_with_one_id_are_two_hives_and_a_problem() -> None:
    looked = seen(
        sightings=[sighting(), sighting("gpu-0", FAR, instance="2")],
        met={HERE: met(), FAR: met(FAR, instance="2")},
    )
    assert {hive.name for hive in hives(looked)} == {"gpu-0", FAR}
    assert ["another --hive-id" in text for text in problems(looked)] == [True]


def test_a_hive_is_heard_by_the_start_of_its_agent_whatever_its_url() -> None:
    looked = seen(
        sightings=[sighting("gpu-0", "http://10.77.0.3:7835")],
        met={HERE: met(), "http://10.77.0.3:7835": silent("http://10.77.0.3:7835")},
    )
    assert [hive.heard for hive in hives(looked)] == [True]


def test_the_loopback_of_another_machine_is_not_dialled() -> None:
    local = known("http://127.0.0.1:7835", "inner")
    far, near = queen(local, url="http://10.77.0.9:7833"), queen(local)
    assert to_dial(seen(queen=far)) == []
    assert to_dial(seen(queen=near)) == ["http://127.0.0.1:7835"]
    (one,) = hives(seen(queen=far))
    assert (one.name, one.answers) == ("inner", True)


def test_foreign_hives_are_not_dialled() -> None:
    looked = seen(sightings=[sighting(), sighting("gpu-9", FAR, cluster=OTHER)])
    assert to_dial(looked) == [HERE]
    assert [f["hive_id"] for f in document(looked)["foreign"]] == ["gpu-9"]


def test_what_the_queen_has_not_heard_is_read_with_her_reason() -> None:
    answer = {"hives": [], "unheard": [{"url": HERE, "found_by": "mdns", "why": "refused"}]}
    assert read_hives(answer) == [Known(HERE, "", "mdns", False, "refused")]
    with pytest.raises(HiveError):
        read_hives({"unheard": []})


# -- deciding: why a URL cannot be used ------------------------------------------------------------


@pytest.mark.parametrize("trouble", [one for part in get_args(Trouble) for one in get_args(part)])
def test_every_trouble_has_words(trouble: Trouble) -> None:
    text = why(Met(HERE, "10.77.0.2", trouble=trouble, detail="It said so."))
    assert text.endswith(".")


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (TimeoutError(), "timeout"),
        (ConnectionRefusedError(errno.ECONNREFUSED, ""), "refused"),
        (OSError(errno.EHOSTUNREACH, ""), "no_route"),
        (OSError(errno.ENETUNREACH, ""), "no_route"),
        (PermissionError(errno.EPERM, ""), "forbidden"),
    ],
)
def test_a_connection_fails_for_a_reason(error: OSError, trouble: Trouble) -> None:
    assert unreached(error) == trouble


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (Forbidden("no", code="foreign_cluster", request_id="r"), "foreign_cluster"),
        (Forbidden("no", code="not_my_url", request_id="r"), "not_my_url"),
        (Unauthorized("no", code="no_secret", request_id="r"), "no_secret"),
        (Unauthorized("no", code="key_revoked", request_id="r"), "refusal"),
        (NotFound("no such page"), "not_hive"),
        (Unproven("somebody else"), "unproven"),
        (ssl.SSLError(1, "wrong version number"), "no_tls"),
        (TimeoutError(), "silent"),
        (aiohttp.ServerDisconnectedError(), "not_hive"),
    ],
)
def test_an_answer_that_is_none_has_a_reason(error: Exception, trouble: Trouble) -> None:
    assert told_by(error)[0] == trouble


# -- deciding: this machine ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "well"),
    [
        (machine.SecretSeen("/s/secret"), True),
        (machine.SecretSeen("/s/secret", Secret.new()), True),
        (machine.SecretSeen("/s/secret", error="It is open."), False),
    ],
)
def test_a_secret_that_cannot_be_used_is_a_problem(found: machine.SecretSeen, well: bool) -> None:
    assert machine.judge_secret(found).well is well


def test_a_folder_is_looked_at_and_judged(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    looked = {
        name: machine.look_at_folder(tmp_path / name) for name in (".", "a/b", "file", "file/b")
    }
    assert looked == {
        ".": "writable",
        "a/b": "creatable",
        "file": "no_folder",
        "file/b": "not_creatable",
    }
    well = [f for f in get_args(machine.Folder) if machine.judge_folder(tmp_path, f).well]
    assert well == ["writable", "creatable"]


QUEEN, AGENT = connect.LOOPBACK


@pytest.mark.parametrize(
    ("daemons", "words"),
    [
        ([silent(QUEEN), silent(AGENT)], ["'hive up'"]),
        ([replace(met(QUEEN), role="queen"), silent(AGENT)], []),
        ([silent(QUEEN), met(AGENT)], []),
        ([silent(QUEEN, "not_hive"), met(AGENT)], ["no Hive daemon"]),
        (
            [silent(QUEEN, "foreign_cluster"), silent(AGENT, "no_secret")],
            ["another cluster", "without"],
        ),
    ],
)
def test_daemons_of_this_machine_are_judged(daemons: list[Met], words: list[str]) -> None:
    found = machine.judge_daemons(machine.DaemonsSeen(False, daemons), CLUSTER)
    amiss = [finding.text for finding in found if not finding.well]
    assert len(amiss) == len(words)
    assert all(part in text for part, text in zip(words, amiss, strict=True))


def test_a_daemon_that_was_named_must_answer_and_take_the_key() -> None:
    off = machine.DaemonsSeen(True, [silent(HERE)])
    refused = machine.DaemonsSeen(
        True, [met()], [replace(met(), trouble="refusal", detail="It was revoked.")]
    )
    assert [f.well for f in machine.judge_daemons(off, None)] == [False]
    (good, bad) = machine.judge_daemons(refused, CLUSTER)
    assert good.well
    assert "HIVE_API_KEY. It was revoked." in bad.text


@pytest.mark.parametrize(
    ("versions", "well"),
    [({}, True), ({"gpu-0": VERSION}, True), ({"gpu-0": "0.0.9", "gpu-1": "9"}, False)],
)
def test_versions_that_differ_are_a_problem(versions: dict[str, str], well: bool) -> None:
    finding = machine.judge_versions(versions)
    assert finding.well is well
    assert all(who in finding.text for who in versions) or well


@pytest.mark.parametrize(
    ("days", "mode", "words"),
    [
        (365, 0o600, []),
        (10, 0o600, ["valid for 9 days more"]),
        (-1, 0o600, ["has expired"]),
        (365, 0o640, ["chmod 600"]),
        (365, None, ["is not there"]),
    ],
)
def test_a_certificate_is_looked_at_and_judged(
    tmp_path: Path, days: int, mode: int | None, words: list[str]
) -> None:
    pair = tls.make(["localhost"], 400, NOW - timedelta(days=400 - days))
    (tmp_path / tls.CERT_FILE).write_bytes(pair.cert)
    if mode is not None:
        (tmp_path / tls.KEY_FILE).write_bytes(pair.key)
        (tmp_path / tls.KEY_FILE).chmod(mode)
    findings = machine.judge_tls(machine.look_at_tls(tmp_path, NOW))
    amiss = [finding.text for finding in findings if not finding.well]
    assert len(amiss) == len(words)
    assert all(part in text for part, text in zip(words, amiss, strict=True))


def test_a_certificate_that_is_none_is_a_problem_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert [f.well for f in machine.judge_tls(machine.look_at_tls(tmp_path, NOW))] == [True]
    (tmp_path / tls.CERT_FILE).write_text("hello")
    assert not machine.judge_tls(machine.look_at_tls(tmp_path, NOW))[0].well


# -- dialling --------------------------------------------------------------------------------------


@asynccontextmanager
async def served(answer: bytes, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Something that answers everybody in one way; its port on loopback."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("secret", [None, Secret.new()])
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno",
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ntrue",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
    ],
)
async def test_what_is_no_daemon_is_seen_as_such(answer: bytes, secret: Secret | None) -> None:
    async with served(answer) as port:
        found = await dial(f"http://127.0.0.1:{port}", secret)
    assert found.trouble in ("not_hive", "unproven")
    assert "no Hive daemon" in why(found)


async def test_tls_that_is_wanted_or_not_there_is_seen(tmp_path: Path) -> None:
    pair = tls.make(["localhost"], 9, datetime.now(UTC))
    (tmp_path / "pem").write_bytes(pair.key + pair.cert)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "pem")
    async with served(b"", context) as port:
        assert (await dial(f"http://127.0.0.1:{port}", Secret.new())).trouble == "wants_tls"
        assert (await dial(f"https://127.0.0.1:{port}", None)).trouble == "untrusted"
    async with served(b"HTTP/1.1 400 Bad\r\n\r\n") as port:
        assert (await dial(f"https://127.0.0.1:{port}", Secret.new())).trouble == "no_tls"
    assert (await dial(f"http://127.0.0.1:{port}", None)).trouble == "refused"
    assert (await dial("http://no-such-host.invalid:7835", None)).trouble == "unresolved"


# -- on this machine -------------------------------------------------------------------------------


async def test_without_a_secret_or_a_daemon_it_says_what_to_do(tmp_path: Path) -> None:
    ran = await hive("--json", "doctor", env={"HIVE_STATE_DIR": str(tmp_path)})
    assert ran.code == 1
    assert ran.json["secret"]["cluster_id"] is None
    assert "interfaces" not in ran.json
    assert [d["url"] for d in ran.json["daemons"]] == ["http://127.0.0.1:9"]
    assert len(ran.json["problems"]) == 1


async def test_a_secret_that_others_can_read_is_said_and_not_used(tmp_path: Path) -> None:
    save(Secret.new(), tmp_path / "secret")
    (tmp_path / "secret").chmod(0o644)
    ran = await hive("--json", "doctor", env={"HIVE_STATE_DIR": str(tmp_path)})
    assert any("chmod 600" in problem for problem in ran.json["problems"])
    assert ran.json["secret"]["cluster_id"] is None
    assert (await hive("doctor", "net", env={"HIVE_STATE_DIR": str(tmp_path)})).code == 2


async def test_it_fits_a_terminal_and_is_read_in_paragraphs(tmp_path: Path) -> None:
    env = {"HIVE_STATE_DIR": str(tmp_path), "HIVE_SECRET": Secret.new().text}
    async with terminal("doctor", "--seconds=0.1", env=env) as shown:
        assert await shown.ends() == 1
    assert max(map(len, shown.text.splitlines())) <= COLUMNS
    for part in ("This machine", "Network", "Hives", "! http://127.0.0.1:9 cannot be used."):
        assert part in shown.words


async def test_wrong_names_are_refused_before_anything_is_dialled() -> None:
    ran = await hive("doctor", "net", "gpu 0")
    assert ran.code == 2


# -- on a LAN --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ward:
    """A room with a queen, a hive that is well, and hives each with a trouble of its own.

    ``gpu-0`` well; ``mute`` behind a switch without multicast, known by ``--hive``; ``far`` in
    another network; ``inner`` on the loopback of the queen's host; ``stranger`` of another
    cluster; ``caller`` and ``outsider`` have no daemon.
    """

    room: Room
    from_queen: Any
    """What ``hive doctor net`` says on the queen's host."""
    from_caller: Any
    """What it says on the caller's, who names ``far``, ``stranger`` and the queen's host, too."""


async def net(room: Room, host: str, *arguments: str, secret: str | None = None) -> Any:
    """What ``hive doctor net`` says on a host, as JSON."""
    env = {"HIVE_SECRET": room.secret.text if secret is None else secret}
    command = ("--json", "doctor", "net", f"--seconds={LISTEN_S}", *arguments)
    code, out, err = await room.run(host, *command, env=env)
    assert out, err
    report = json.loads(out)
    assert (code, report["ok"]) == ((1, False) if report["problems"] else (0, True))
    return report


@pytest.fixture(scope="module")
async def ward() -> AsyncIterator[Ward]:
    with lan.Lan() as made:
        async with cluster() as daemons:
            room = Room(made, daemons)
            try:
                queen = await furnished(room)
                named = (room.hosts["far"], "stranger", f"http://{room.hosts['queen']}:7835")
                here, there = await asyncio.gather(
                    net(room, "queen"), net(room, "caller", f"--url={queen.url}", *named)
                )
                yield Ward(room, here, there)
            finally:
                await room.close()


async def furnished(room: Room) -> Daemon:
    """Its queen, when she hears her hives."""
    room.add("queen", "gpu-0", "mute", "stranger", "caller", "outsider")
    room.hosts["far"] = "10.78.0.9"
    room.lan.host("far", "10.78.0.9")
    for host in ("mute", "far"):
        room.lan.block_multicast(host)
    await execute(room, "far", "ip", "route", "add", "10.77.0.0/24", "dev", "eth0")
    await execute(room, "caller", "ip", "route", "add", "10.78.0.0/24", "dev", "eth0")
    queen, *_ = await asyncio.gather(
        room.queen("queen", f"--hive=http://{room.hosts['mute']}:7835"),
        room.hive("gpu-0"),
        room.hive("mute"),
        room.hive("far"),
        room.hive("stranger", secret=Secret.new()),
        room.start("agent", "queen", "--host=127.0.0.1", "--hive-id=inner"),
    )
    key = Keys(room.secret).make(scopes=("admin",))[0]
    await online(room.client("queen", queen, key), "gpu-0", "mute", "inner")
    return queen


async def execute(room: Room, host: str, *argv: str) -> None:
    code, _, err = await room.execute(host, *argv)
    assert code == 0, err


@on_a_lan
async def test_a_hive_that_is_heard_and_answers_is_well(ward: Ward) -> None:
    for report in (ward.from_queen, ward.from_caller):
        well = report["hives"]["gpu-0"]
        assert (well["heard"], well["answers"], well["found_by"]) == (True, True, "mdns")
        assert "why" not in well
        assert [i["multicast"] for i in report["interfaces"] if i["used"]] == ["loops"]


@on_a_lan
async def test_a_switch_that_keeps_multicast_back_is_named(ward: Ward) -> None:
    mute = ward.from_queen["hives"]["mute"]
    assert (mute["heard"], mute["answers"], mute["found_by"]) == (False, True, "flag")
    assert "IGMP snooping" in mute["why"]
    assert ward.from_queen["problems"] == [mute["why"]]


@on_a_lan
async def test_a_hive_in_another_network_is_known_to_be_there(ward: Ward) -> None:
    far = ward.from_caller["hives"]["far"]
    assert (far["heard"], far["answers"]) == (False, True)
    assert "does not cross routers" in far["why"]


@on_a_lan
async def test_a_machine_without_an_open_agent_is_told_to_open_one(ward: Ward) -> None:
    closed = ward.from_caller["hives"][f"http://{ward.room.hosts['queen']}:7835"]
    assert closed["answers"] is False
    assert "--host 0.0.0.0" in closed["why"]


@on_a_lan
async def test_a_hive_on_the_queens_loopback_is_reached_through_her(ward: Ward) -> None:
    assert ward.from_queen["hives"]["inner"]["url"] == "http://127.0.0.1:7835"
    for report in (ward.from_queen, ward.from_caller):
        assert report["hives"]["inner"]["answers"] is True
        assert "why" not in report["hives"]["inner"]


@on_a_lan
async def test_a_foreign_hive_is_listed_and_a_problem_only_when_it_is_meant(ward: Ward) -> None:
    for report in (ward.from_queen, ward.from_caller):
        listed = [(hive["hive_id"], hive["interface"]) for hive in report["foreign"]]
        assert listed == [("stranger", "eth0")]
    assert "another cluster" not in " ".join(ward.from_queen["problems"])
    assert "another cluster" in " ".join(ward.from_caller["problems"])


@on_a_lan
async def test_a_machine_with_another_secret_or_none_hears_only_foreigners(ward: Ward) -> None:
    other = Secret.new().text
    wrong, none, doctor = await asyncio.gather(
        net(ward.room, "queen", secret=other),
        net(ward.room, "outsider", "gpu-0", secret=""),
        ward.room.run("queen", "--json", "doctor", env={"HIVE_SECRET": other}),
    )
    for report in (wrong, none):
        assert {hive["hive_id"] for hive in report["foreign"]} == {"gpu-0", "stranger"}
    assert wrong["hives"] == {}
    assert "'hive secret set' here" in " ".join(none["problems"])
    daemons = json.loads(doctor[1])["daemons"]
    assert ["another cluster" in daemon["why"] for daemon in daemons] == [True, True]


@on_a_lan
async def test_a_key_that_is_refused_is_said(ward: Ward) -> None:
    named = {"HIVE_QUEEN_URL": f"http://{ward.room.hosts['queen']}:7833", "HIVE_API_KEY": "hk-no"}
    code, out, _ = await ward.room.run("outsider", "--json", "doctor", env=named)
    (problem,) = json.loads(out)["problems"]
    assert code == 1
    assert "key" in problem
    assert "lets in only" not in problem


@on_a_lan
async def test_multicast_that_this_machine_does_not_do_is_blamed_on_it(ward: Ward) -> None:
    # What a route forbids does not matter: the kernel asks none for 224.0.0.0/24.
    limit = "/proc/sys/net/ipv4/igmp_max_memberships"
    await execute(ward.room, "outsider", "sh", "-c", f"echo 0 > {limit}")
    try:
        report = await net(ward.room, "outsider", ward.room.hosts["gpu-0"])
    finally:
        await execute(ward.room, "outsider", "sh", "-c", f"echo 20 > {limit}")
    (eth0,) = [interface for interface in report["interfaces"] if interface["used"]]
    assert "igmp_max_memberships" in eth0["multicast"]
    assert "multicast does not work on eth0 here" in report["hives"]["gpu-0"]["why"]


@on_a_lan
async def test_a_room_that_is_well_has_no_problem() -> None:
    with lan.Lan() as made:
        async with cluster() as daemons:
            room = Room(made, daemons)
            room.add("queen", "gpu-0")
            queen, _ = await asyncio.gather(room.queen("queen"), room.hive("gpu-0"))
            env = {"HIVE_SECRET": room.secret.text}
            said = await asyncio.gather(
                room.run("queen", "doctor", env=env),
                room.run("gpu-0", "doctor", f"--url={queen.url}", env=env),
            )
            for code, out, err in said:
                assert (code, err) == (0, ""), out
                assert "All is well." in out
