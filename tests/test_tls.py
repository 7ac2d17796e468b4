"""TLS: certificates that nobody signed, proven by the secret, and pinned from then on."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests import lan
from tests.cluster import Cluster, clean_env, cluster, hive_command, online, until
from tests.hosts import Room
from wire.keys import Keys
from wire.peer import Peer
from wire.proof import Unproven
from wire.secret import Secret

ANSWER = {"model": "parrot", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    if (why := lan.unavailable()) is not None:
        pytest.skip(f"no LAN can be made here: {why}")
    with lan.Lan() as made:
        async with cluster() as daemons:
            room = Room(made, daemons)
            yield room
            await room.close()


async def certified(room: Room, host: str, *more: str) -> list[str]:
    """Make a certificate on a host; the flags with which its daemon shows it."""
    address = room.hosts[host]
    code, out, err = await room.run(host, "--json", "tls", "new", "--host", address, *more)
    assert code == 0, err
    made = json.loads(out)
    return [f"--tls-cert={made['tls_cert']}", f"--tls-key={made['tls_key']}"]


async def test_daemons_with_certificates_of_their_own_find_and_trust_each_other(
    room: Room,
) -> None:
    room.add("queen", "gpu-0", "caller")
    queen = await room.queen("queen", *await certified(room, "queen"))
    hive = await room.hive("gpu-0", *await certified(room, "gpu-0"))
    queen_url, hive_url = queen.url.replace("http:", "https:"), hive.url.replace("http:", "https:")
    secret = {"HIVE_SECRET": room.secret.text}

    async def hives() -> list[tuple[str, str, str]]:
        url = f"--url={queen_url}"
        code, out, err = await room.run("caller", "--json", url, "status", env=secret)
        assert code == 0, err
        found = json.loads(out)["hives"]
        return [(one["hive_url"], one["state"], one["found_by"]) for one in found]

    async def known() -> bool:
        return await hives() == [(hive_url, "online", "mdns")]

    await until(known, "the queen to hear the hive over TLS", every_s=0.2)
    spawn_tiny = ("workers", "spawn", "hive-tiny", "--hive", "gpu-0")
    code, _, err = await room.run("queen", f"--url={queen_url}", *spawn_tiny, env=secret)
    assert code == 0, err

    # A caller has only a key, and trusts the queen's certificate.
    key = Keys(room.secret).make(scopes=("infer",))[0]
    trusted = ssl.create_default_context(cafile=str(room.state("queen") / "tls-cert.pem"))
    body = {**ANSWER, "model": "hive-tiny"}
    async with room.session("caller") as http:
        headers = {"authorization": f"Bearer {key}"}
        chat = f"{queen_url}/v1/chat/completions"
        async with http.post(chat, json=body, headers=headers, ssl=trusted) as got:
            assert got.status == 200
            assert got.headers["x-hive-id"] == "gpu-0"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.post(chat, json=body, headers=headers)

    # A new certificate is proven and pinned anew.
    await hive.stop()
    await room.hive("gpu-0", *await certified(room, "gpu-0", "--force"))
    await until(known, "the queen to hear the hive with its new certificate", every_s=0.2)


async def test_plain_http_in_place_of_tls_is_no_daemon(room: Room) -> None:
    room.add("queen", "gpu-0")
    queen = await room.queen("queen", "--hive=https://10.77.0.2:7835")
    await room.hive("gpu-0")
    admin = room.client("queen", queen, Keys(room.secret).make(scopes=("admin",))[0])
    await online(admin, "gpu-0")  # found by mDNS, in the clear
    unheard = (await admin.get("/v1/hives"))["unheard"]
    assert [one["url"] for one in unheard] == ["https://10.77.0.2:7835"]


async def test_whoever_shows_another_certificate_is_not_believed(
    fresh: Cluster, tmp_path: Path
) -> None:
    """A machine in the middle ends the TLS of both sides and passes everything on."""
    pairs = []
    for name in ("hive", "middle"):
        folder = tmp_path / name
        process = await asyncio.create_subprocess_exec(
            *(*hive_command(), "--json", "tls", "new", "--out", str(folder)),
            env=clean_env(),
            stdout=asyncio.subprocess.PIPE,
        )
        await process.communicate()
        pairs.append((folder / "tls-cert.pem", folder / "tls-key.pem"))
    secret = Secret.new()
    flags = [f"--tls-cert={pairs[0][0]}", f"--tls-key={pairs[0][1]}"]
    hive = await fresh.hive("gpu-0", *flags, env={"HIVE_SECRET": secret.text})
    port = int(hive.url.rpartition(":")[2])

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pairs[1])
    blind = ssl.create_default_context()
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE

    async def middle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, out = await asyncio.open_connection("127.0.0.1", port, ssl=blind)

        async def pass_on(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                # The URL is made to fit; the certificate cannot be.
                to.write(data.replace(f":{proxy_port}".encode(), f":{port}".encode()))
            to.close()

        await asyncio.gather(pass_on(reader, out), pass_on(there, writer), return_exceptions=True)

    server = await asyncio.start_server(middle, "127.0.0.1", 0, ssl=context)
    proxy_port = server.sockets[0].getsockname()[1]
    straight = Peer(hive.url, secret, role="queen", id="q", roles=("hive",))
    through = Peer(f"https://127.0.0.1:{proxy_port}", secret, role="queen", id="q", roles=("hive",))
    try:
        answer = await straight.open()
        assert answer is not None
        assert answer.id == "gpu-0"
        with pytest.raises(Unproven, match="does not know this cluster's secret"):
            await through.open()
    finally:
        server.close()
        await straight.close()
        await through.close()
