"""Direct mode: callers who ask for it are sent to the hive itself, with a grant for one request."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import msgspec
import pytest
from openai import AsyncOpenAI

from operations.errors import Unauthorized, Unavailable
from operations.hosts import Heartbeat
from queen.direct import reachable
from queen.known import KnownHive
from tests.cluster import Cluster, Daemon, clean_env, cluster, hive_command, served, spawn_scripted
from tests.test_external import attach, running
from wire import direct
from wire.direct import LIVES_S, PARAMETER, Grant, Grants, grant_for, grant_of, key_of, token_of
from wire.keys import Caller, Keys
from wire.peer import Peer
from wire.secret import Secret

CHAT = "/v1/chat/completions"
PREFER = {"prefer": "hive-direct"}
INFER = {"operation": "infer", "model": "parrot", "prompt": "hello", "max_tokens": 5}


def chat(**more: Any) -> bytes:
    messages = [{"role": "user", "content": "hello"}]
    return json.dumps({"model": "parrot", "messages": messages, "max_tokens": 5, **more}).encode()


@dataclass
class Sent:
    """An answer: status, headers and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    through: list[int] = field(default_factory=list)

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])

    @property
    def location(self) -> str:
        return self.headers["location"]


async def send(
    method: str, url: str, body: bytes | None = None, *, follow: bool = False, **headers: str
) -> Sent:
    if body is not None:
        headers["content-type"] = "application/json"
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as http:
        async with http.request(
            method, url, data=body, headers=sent, allow_redirects=follow
        ) as got:
            through = [answer.status for answer in got.history]
            told = {name.lower(): value for name, value in got.headers.items()}
            return Sent(got.status, told, await got.read(), through)


async def ask(url: str, body: bytes, *, follow: bool = False, **headers: str) -> Sent:
    return await send("POST", url, body, follow=follow, **headers)


@dataclass(frozen=True)
class DirectRoom:
    """A queen on loopback, and two hives that listen to others, so that nobody gets in there
    without a proof, a key or a grant. Only ``gpu-0`` has ``parrot``."""

    queen: Daemon
    hive: Daemon
    other: Daemon
    secret: Secret

    async def redirect(self, body: bytes, **headers: str) -> str:
        sent = await ask(self.queen.url + CHAT, body, **PREFER, **headers)
        assert sent.status == 307
        return sent.location

    async def grant(self, body: bytes) -> Grant:
        """A good one for :data:`CHAT` with this body, not used."""
        return grant_of(key_of(self.secret), token_in(await self.redirect(body)))

    def url(self, grant: Grant, *, secret: Secret | None = None, path: str = CHAT) -> str:
        token = token_of(key_of(secret or self.secret), grant)
        return f"{self.hive.url}{path}?{PARAMETER}={token}"


def token_in(url: str) -> str:
    return parse_qs(urlsplit(url).query)[PARAMETER][0]


@asynccontextmanager
async def direct_room() -> AsyncIterator[DirectRoom]:
    async with cluster() as made:
        secret = Secret.new()
        made.env = {"HIVE_SECRET": secret.text}
        queen = await made.queen()
        hives = [await made.hive(f"gpu-{n}", "--host=0.0.0.0", queen=queen) for n in range(2)]
        await spawn_scripted(queen, hive_id="gpu-0", slots=8)
        await served(queen.client, "parrot")
        yield DirectRoom(queen, hives[0], hives[1], secret)


@pytest.fixture(scope="module")
async def room() -> AsyncIterator[DirectRoom]:
    async with direct_room() as made:
        yield made


# -- the routes of inference -----------------------------------------------------------------


async def test_who_prefers_it_is_redirected_to_the_hive(room: DirectRoom) -> None:
    body = chat()
    sent = await ask(room.queen.url + CHAT, body, prefer="respond-async, Hive-Direct; x=1")
    assert sent.status == 307
    assert sent.headers["preference-applied"] == "hive-direct"
    assert sent.headers["x-hive-id"] == "gpu-0"
    assert sent.headers["cache-control"] == "no-store"
    assert sent.body == b""
    where = urlsplit(sent.location)
    assert (where.scheme, where.port) == ("http", urlsplit(room.hive.url).port)
    assert where.path == CHAT
    answer = await ask(sent.location, body)
    assert answer.status == 200
    assert answer.headers["x-worker-id"]
    assert json.loads(answer.body)["choices"][0]["message"]["content"]


async def test_without_the_preference_the_queen_relays(room: DirectRoom) -> None:
    for prefer in ({}, {"prefer": "respond-async"}, {"prefer": "hive-directly"}):
        sent = await ask(room.queen.url + CHAT, chat(), **prefer)
        assert sent.status == 200
        assert "preference-applied" not in sent.headers


async def test_a_program_that_follows_redirects_streams_from_the_hive(room: DirectRoom) -> None:
    sent = await ask(room.queen.url + CHAT, chat(stream=True), follow=True, **PREFER)
    assert (sent.status, sent.through) == (200, [307])
    assert sent.body.endswith(b"data: [DONE]\n\n")
    assert sent.headers["x-worker-id"]


async def test_the_openai_client_needs_no_more_than_a_header(room: DirectRoom) -> None:
    key = Keys(room.secret).make(scopes=("infer",))[0]
    async with AsyncOpenAI(
        base_url=f"{room.queen.url}/v1", api_key=key, default_headers=PREFER, max_retries=0
    ) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="parrot", messages=[{"role": "user", "content": "hello"}], max_tokens=5
        )
        assert [answer.status_code for answer in raw.http_response.history] == [307]
        assert "authorization" not in raw.http_request.headers
        assert raw.parse().choices[0].message.content
        stream = await client.chat.completions.create(
            model="parrot",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=5,
            stream=True,
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert len(text.split()) == 5


async def test_the_query_of_a_request_stays(room: DirectRoom) -> None:
    body = chat()
    sent = await ask(f"{room.queen.url}{CHAT}?beta=true&x=a%20b", body, **PREFER)
    assert urlsplit(sent.location).query.startswith("beta=true&x=a%20b&hive-grant=")
    assert (await ask(sent.location.replace("beta=true", "beta=false"), body)).status == 401
    assert (await ask(sent.location, body)).status == 200


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (chat(model="gpt-5"), {}, 404, "model_not_found"),
        (b"{", {}, 400, "invalid_json"),
        (chat(), {"authorization": "Bearer hk-x.y.z"}, 401, "invalid_key"),
        (chat(), {"origin": "http://evil.example"}, 403, "origin_not_allowed"),
    ],
    ids=["unknown model", "no JSON", "bad key", "a web page"],
)
async def test_what_the_queen_refuses_she_refuses_before_any_redirect(
    room: DirectRoom, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    sent = await ask(room.queen.url + CHAT, body, **PREFER, **headers)
    assert (sent.status, sent.code) == (status, code)
    assert "location" not in sent.headers


async def test_scope_and_limits_of_a_key_hold_at_the_queen(room: DirectRoom) -> None:
    keys = Keys(room.secret)
    queue = await ask(
        room.queen.url + CHAT,
        chat(),
        **PREFER,
        authorization=f"Bearer {keys.make(scopes=('queue',))[0]}",
    )
    assert (queue.status, queue.code) == (403, "scope_missing")
    slow = {"authorization": f"Bearer {keys.make(scopes=('infer',), rpm=1)[0]}"}
    assert (await ask(room.queen.url + CHAT, chat(), **PREFER, **slow)).status == 307
    assert (await ask(room.queen.url + CHAT, chat(), **PREFER, **slow)).status == 429


async def test_a_revoked_key_opens_nothing_by_its_grants(room: DirectRoom) -> None:
    key, key_id = Keys(room.secret).make(scopes=("infer",))
    body = chat()
    url = await room.redirect(body, authorization=f"Bearer {key}")
    admin = Keys(room.secret).make(scopes=("admin",))[0]
    revoked = await ask(
        f"{room.hive.url}/v1/keys/revoked",
        json.dumps({"key_ids": [key_id]}).encode(),
        authorization=f"Bearer {admin}",
    )
    assert revoked.status == 200
    assert (await ask(url, body)).code == "revoked_key"


async def test_whoever_comes_through_a_gateway_is_relayed(room: DirectRoom) -> None:
    for header in ("x_forwarded_for", "forwarded", "via"):
        sent = await ask(room.queen.url + CHAT, chat(), **PREFER, **{header: "10.0.0.9"})
        assert sent.status == 200
        assert "preference-applied" not in sent.headers


# -- grants that do not hold -----------------------------------------------------------------


async def test_a_grant_is_good_for_one_request(room: DirectRoom) -> None:
    url = await room.redirect(chat())
    assert (await ask(url, chat())).status == 200
    again = await ask(url, chat())
    assert (again.status, again.code) == (401, "grant_used")
    assert "Prefer: hive-direct" in again.body.decode()


async def test_a_grant_is_used_once_by_many_at_once(room: DirectRoom) -> None:
    url = await room.redirect(chat())
    answers = await asyncio.gather(*(ask(url, chat()) for _ in range(8)))
    assert sorted(answer.status for answer in answers) == [200] + [401] * 7


async def test_a_grant_holds_for_its_request_alone(room: DirectRoom) -> None:
    body = chat()
    good = await room.grant(body)
    for changed, code in (
        ({"expires": good.expires - 2 * LIVES_S}, "grant_expired"),
        ({"expires": good.expires + 600}, "grant_expired"),
        ({"hive_id": "gpu-1"}, "grant_of_other_hive"),
        ({"instance": "0" * 16}, "grant_of_other_hive"),
        ({"target": "/v1/completions"}, "grant_of_other_request"),
        ({"target": f"{CHAT}?x=1"}, "grant_of_other_request"),
        ({"method": "GET"}, "grant_of_other_request"),
    ):
        sent = await ask(room.url(msgspec.structs.replace(good, **changed)), body)
        assert (sent.status, sent.code) == (401, code), changed
    elsewhere = await ask(room.url(good, path="/v1/completions"), body)
    assert (elsewhere.status, elsewhere.code) == (401, "grant_of_other_request")
    drive = await send("GET", room.url(good, path="/v1/info"))
    assert (drive.status, drive.code) == (401, "grant_of_other_request")
    assert (await ask(room.url(good), body)).status == 200


async def test_a_grant_holds_for_its_body_alone(room: DirectRoom) -> None:
    sent = await ask(await room.redirect(chat()), chat(max_tokens=6))
    assert (sent.status, sent.code) == (401, "grant_of_other_body")


async def test_a_grant_holds_at_its_hive_alone(room: DirectRoom) -> None:
    url = await room.redirect(chat())
    elsewhere = url.replace(urlsplit(url).netloc, urlsplit(room.other.url).netloc)
    sent = await ask(elsewhere, chat())
    assert (sent.status, sent.code) == (401, "grant_of_other_hive")
    at_queen = url.replace(urlsplit(url).netloc, urlsplit(room.queen.url).netloc)
    assert (await ask(at_queen, chat())).code == "grant_of_other_hive"
    assert (await ask(url, chat())).status == 200


async def test_a_grant_that_was_made_up_or_altered_opens_nothing(room: DirectRoom) -> None:
    body = chat()
    good = await room.grant(body)
    url = room.url(good)
    said, _, mac = token_in(url).partition(".")
    claims = direct._text(msgspec.json.encode(msgspec.structs.replace(good, id="somebody")))
    for token, code in (
        (f"{claims}.{mac}", "bad_grant"),
        (f"{said}.{'A' * len(mac)}", "bad_grant"),
        (f"{said}.", "bad_grant"),
        (said, "bad_grant"),
        ("", "bad_grant"),
        ("a", "malformed_grant"),
        ("%00.%ff", "malformed_grant"),
        ("x" * 20_000, "malformed_grant"),
        (f"{said}.{mac}&hive-grant={said}.{mac}", "bad_grant"),
    ):
        sent = await ask(f"{room.hive.url}{CHAT}?{PARAMETER}={token}", body)
        assert (sent.status, sent.code) == (401, code), token[:40]
    assert (await ask(room.url(good, secret=Secret.new()), body)).code == "bad_grant"
    assert (await ask(url, body)).status == 200


async def test_what_a_cluster_signed_and_is_no_grant_opens_nothing(room: DirectRoom) -> None:
    key = key_of(room.secret)
    good = await room.grant(chat())
    fields = msgspec.structs.astuple(good)
    for claims in (b"", b"[]", b"{}", b"\xff", msgspec.json.encode((*fields[:5], "stranger"))):
        mac = direct._text(direct.hmac.digest(key, claims, "sha256"))
        sent = await ask(f"{room.hive.url}{CHAT}?{PARAMETER}={direct._text(claims)}.{mac}", chat())
        assert (sent.status, sent.code) == (401, "malformed_grant")


async def test_a_grant_is_in_no_log_and_no_answer(room: DirectRoom) -> None:
    body = chat()
    url = await room.redirect(body)
    token = token_in(url)
    answers = [await ask(url, body), await ask(url, body)]
    answers.append(await send("GET", f"{room.hive.url}/v1/nowhere?{PARAMETER}={token}"))
    assert [answer.status for answer in answers] == [200, 401, 401]
    for said in (*(answer.body.decode() for answer in answers), room.hive.log, room.queen.log):
        assert token[:40] not in said
        assert token[-40:] not in said
    assert "why=grant_used" in room.hive.log


# -- jobs ------------------------------------------------------------------------------------


async def test_the_stream_of_a_job_is_read_at_its_hive(room: DirectRoom) -> None:
    posted = await ask(f"{room.queen.url}/v1/jobs", json.dumps(INFER).encode(), **PREFER)
    assert posted.status == 201
    assert posted.headers["preference-applied"] == "hive-direct"
    assert posted.headers["x-hive-id"] == "gpu-0"
    job = json.loads(posted.body)
    assert urlsplit(job["sse_url"]).port == urlsplit(room.hive.url).port
    stream = await send("GET", job["sse_url"])
    assert stream.status == 200
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert b"On hive" not in stream.body
    assert (await send("GET", job["sse_url"])).code == "grant_used"
    # A reader who was cut off goes on at the queen.
    first = stream.body.partition(b"id: ")[2].partition(b"\n")[0].decode()
    rest = await send(
        "GET", f"{room.queen.url}/v1/jobs/{job['job_id']}/stream", last_event_id=first
    )
    assert rest.body == stream.body.partition(b"\n\n")[2]


async def test_the_grant_of_one_job_reads_no_other(room: DirectRoom) -> None:
    jobs = []
    for _ in range(2):
        posted = await ask(f"{room.queen.url}/v1/jobs", json.dumps(INFER).encode(), **PREFER)
        jobs.append(json.loads(posted.body))
    one, other = jobs
    sent = await send("GET", one["sse_url"].replace(one["job_id"], other["job_id"]))
    assert (sent.status, sent.code) == (401, "grant_of_other_request")


async def test_jobs_are_streamed_by_the_queen_otherwise(room: DirectRoom) -> None:
    look = {"operation": "device_list", "hive_id": "gpu-0"}
    for operation, headers in ((INFER, {}), (look, PREFER)):
        posted = await ask(f"{room.queen.url}/v1/jobs", json.dumps(operation).encode(), **headers)
        job = json.loads(posted.body)
        assert job["sse_url"] == f"/v1/jobs/{job['job_id']}/stream"
        assert "preference-applied" not in posted.headers


# -- other clusters --------------------------------------------------------------------------


async def test_without_a_secret_no_grant_is_needed(fresh: Cluster) -> None:
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    await spawn_scripted(hive)
    await served(queen.client, "parrot")
    sent = await ask(queen.url + CHAT, chat(), **PREFER)
    assert (sent.status, sent.location) == (307, hive.url + CHAT)
    for _ in range(2):
        assert (await ask(sent.location, chat())).status == 200
    assert (await ask(f"{hive.url}{CHAT}?{PARAMETER}=anything", chat())).status == 200
    posted = await ask(f"{queen.url}/v1/jobs", json.dumps(INFER).encode(), **PREFER)
    job = json.loads(posted.body)
    assert job["sse_url"] == f"{hive.url}/v1/jobs/{job['job_id']}/stream"
    assert (await send("GET", job["sse_url"])).body.endswith(b"data: [DONE]\n\n")


async def test_a_grant_never_reaches_the_engine(fresh: Cluster) -> None:
    fresh.env = {"HIVE_SECRET": Secret.new().text}
    queen = await fresh.queen()
    hive = await fresh.hive(queen=queen)
    async with running() as engine:
        await attach(hive, engine.url)
        await served(queen.client, "llama3")
        body = chat(model="llama3")
        sent = await ask(f"{queen.url}{CHAT}?beta=true", body, follow=True, **PREFER)
        assert (sent.status, sent.through) == (200, [307])
        assert (await engine.seen())["queries"] == ["beta=true"]


async def test_a_hive_with_a_certificate_is_named_by_https(fresh: Cluster) -> None:
    folder = fresh.folder / "tls"
    made = await asyncio.create_subprocess_exec(
        *(*hive_command(), "--json", "tls", "new", "--out", str(folder)),
        env=clean_env(),
        stdout=asyncio.subprocess.PIPE,
    )
    await made.communicate()
    fresh.env = {"HIVE_SECRET": Secret.new().text}
    queen = await fresh.queen()
    flags = [f"--tls-cert={folder / 'tls-cert.pem'}", f"--tls-key={folder / 'tls-key.pem'}"]
    await fresh.hive("gpu-0", *flags, queen=queen)
    await spawn_scripted(queen, hive_id="gpu-0")
    await served(queen.client, "parrot")
    sent = await ask(queen.url + CHAT, chat(), **PREFER)
    assert sent.location.startswith("https://127.0.0.1:")
    async with aiohttp.ClientSession() as http:
        headers = {"content-type": "application/json"}
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.post(sent.location, data=chat(), headers=headers)
        async with http.post(sent.location, data=chat(), headers=headers, ssl=False) as got:
            assert got.status == 200


# -- what is decided -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hive", "caller", "can"),
    [
        ("http://127.0.0.1:7835", "127.0.0.1", True),
        ("http://127.0.0.1:7835", "::1", True),
        ("http://[::1]:7835", "127.0.0.1", True),
        ("http://192.168.1.20:7835", "127.0.0.1", True),
        ("http://127.0.0.1:7835", "::ffff:127.0.0.1", True),
        ("http://127.0.0.1:7835", "192.168.1.9", False),
        ("http://[::1]:7835", "fd00::9", False),
        ("http://192.168.1.20:7835", "192.168.1.9", True),
        ("http://192.168.1.20:7835", "::ffff:192.168.1.9", True),
        ("http://192.168.1.20:7835", "10.0.0.9", True),
        ("http://192.168.1.20:7835", "8.8.8.8", False),
        ("http://8.8.4.4:7835", "8.8.8.8", True),
        ("http://8.8.4.4:7835", "192.168.1.9", True),
        ("http://169.254.7.7:7835", "192.168.1.9", False),
        ("http://0.0.0.0:7835", "192.168.1.9", False),
        ("http://192.168.1.20:7835", "fd00::9", False),
        ("http://192.168.1.20:7835", "", False),
        ("http://a-name:7835", "192.168.1.9", False),
    ],
)
def test_nobody_is_sent_where_he_cannot_come(hive: str, caller: str, can: bool) -> None:
    assert reachable(hive, caller) is can


def test_a_grants_time_is_the_hives(room_secret: Secret) -> None:
    """A hive whose clock is a day ahead."""
    now = time.time() + 86_400
    clock = [now]
    grants = Grants(room_secret, id="gpu-0", instance="i", clock=lambda: clock[0])

    def token() -> str:
        grant = grant_for(
            Caller("key", "k", frozenset(("infer",))),
            hive_id="gpu-0",
            instance="i",
            method="POST",
            target=CHAT,
            digest=hashlib.sha256(b"{}").hexdigest(),
            now=now,
        )
        return token_of(key_of(room_secret), grant)

    caller = grants.take(token(), "POST", CHAT).caller
    assert caller == Caller("key", "k", frozenset(("infer",)))
    clock[0] += LIVES_S - 0.1
    grants.take(token(), "POST", CHAT)
    clock[0] += 0.2
    with pytest.raises(Unauthorized) as refused:
        grants.take(token(), "POST", CHAT)
    assert refused.value.code == "grant_expired"


@pytest.fixture
def room_secret() -> Secret:
    return Secret.new()


def test_used_grants_are_remembered_within_bounds(
    room_secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "MAX_USED", 3)
    steady = [0.0]
    monkeypatch.setattr(direct.time, "monotonic", lambda: steady[0])
    grants = Grants(room_secret, id="gpu-0", instance="i", clock=lambda: steady[0])

    def take() -> None:
        grants.take(local_grant(room_secret, steady[0]), "POST", CHAT)

    for _ in range(3):
        take()
    with pytest.raises(Unavailable, match="through the queen"):
        take()
    steady[0] += 2 * LIVES_S + 1
    take()


def local_grant(secret: Secret, now: float) -> str:
    """A good grant for :data:`CHAT`, made when the hive's clock showed ``now``."""
    grant = grant_for(
        Caller("local", "local"),
        hive_id="gpu-0",
        instance="i",
        method="POST",
        target=CHAT,
        digest="",
        now=now,
    )
    return token_of(key_of(secret), grant)


def test_a_grant_is_used_once_even_if_the_clock_is_set_back(
    room_secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady, wall = [0.0], [1000.0]
    monkeypatch.setattr(direct.time, "monotonic", lambda: steady[0])
    grants = Grants(room_secret, id="gpu-0", instance="i", clock=lambda: wall[0])
    used = local_grant(room_secret, wall[0])
    grants.take(used, "POST", CHAT)
    steady[0] += 3 * LIVES_S
    wall[0] += 1.0  # it was set back meanwhile
    for token in (used, local_grant(room_secret, 999.0)):
        with pytest.raises(Unavailable) as refused:
            grants.take(token, "POST", CHAT)
        assert refused.value.code == "clock_set_back"
    fresh = local_grant(room_secret, wall[0])
    grants.take(fresh, "POST", CHAT)
    with pytest.raises(Unauthorized) as again:
        grants.take(fresh, "POST", CHAT)
    assert again.value.code == "grant_used"


def test_a_stranger_gets_no_grant() -> None:
    with pytest.raises(ValueError, match="stranger"):
        grant_for(
            Caller("stranger", "stranger"),
            hive_id="gpu-0",
            instance="i",
            method="POST",
            target=CHAT,
            digest="",
            now=0.0,
        )


async def test_the_queen_knows_what_the_clock_of_a_hive_shows() -> None:
    peer = Peer("http://127.0.0.1:1", None, role="queen", id="q", roles=("hive",))
    hive = KnownHive(peer, "flag", None, None, 0.0)
    beat = Heartbeat(
        hive_id="gpu-0", version="1", hostname="h", timestamp=5_000.0, operational_status="ready"
    )
    hive.heard(beat, 100.0, lambda: None)
    assert hive.ahead_s + 101.0 == 5_001.0
    await hive.close()
