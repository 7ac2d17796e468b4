"""Dialling a daemon to learn why it cannot be used: step by step, each failure with a name.

First its name is looked up, then a connection is made, then it proves itself and says who it is.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from dataclasses import dataclass, replace
from typing import Literal, get_args
from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError
from pydantic_core import from_json

from operations.errors import HiveError, from_envelope
from operations.hosts import VERSION, Info
from wire.addresses import hostname, on_loopback
from wire.peer import Peer, certificate, literal
from wire.proof import Unproven
from wire.secret import Secret

LOOKUP_S = 5.0
CONNECT_S = 4.0  # an address that nobody has is reported by the kernel after 3 s
ANSWER_S = 5.0

Refused = Literal["foreign_cluster", "no_secret", "not_my_url", "proof_protocol", "no_key"]
"""Codes of a daemon's own refusals that have words of their own here."""

Trouble = (
    Refused
    | Literal[
        "unresolved",
        "refused",
        "no_route",
        "forbidden",
        "timeout",
        "silent",
        "wants_tls",
        "no_tls",
        "untrusted",
        "not_hive",
        "unproven",
        "refusal",
        "through_queen",
    ]
)

SILENT = ("unresolved", "refused", "no_route", "forbidden", "timeout", "silent")


@dataclass(frozen=True)
class Met:
    """What answered at a URL, or why it cannot be used.

    :param address: what the URL's host means; empty if it means nothing
    :param id: the hive id, or the queen's
    :param instance: new at each start of a daemon; empty if it has proven nothing
    :param detail: the other side's or the kernel's own words, where they say more
    """

    url: str
    address: str = ""
    role: str = ""
    id: str = ""
    instance: str = ""
    version: str = ""
    trouble: Trouble | None = None
    detail: str = ""

    @property
    def well(self) -> bool:
        return self.trouble is None

    @property
    def spoke(self) -> bool:
        """Something answered, if only to refuse."""
        return self.trouble not in SILENT


async def dial(url: str, secret: Secret | None, key: str | None = None) -> Met:
    """Find out who is at a URL. Never raises: what goes wrong is the result.

    :param secret: makes both sides prove themselves
    :param key: sent in place of the proof
    """
    try:
        async with asyncio.timeout(LOOKUP_S):
            base = await literal(url)
    except (OSError, ValueError):
        return Met(url, trouble="unresolved")
    met = await _reach(Met(url, hostname(base) or ""), base)
    if not met.well:
        return met
    try:
        if secret is not None and key is None:
            return await _prove(met, secret)
        return await _ask(met, key)
    except (HiveError, aiohttp.ClientError, OSError, ValueError) as error:
        trouble, detail = told_by(error)
        if trouble == "not_hive" and await _speaks_tls(base):
            trouble = "wants_tls"
        return replace(met, trouble=trouble, detail=detail)


async def _reach(met: Met, base: str) -> Met:
    """Connect, and no more."""
    parts = urlsplit(base)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError as error:
        return replace(met, trouble=unreached(error), detail=error.strerror or "")
    writer.close()
    return met


async def _prove(met: Met, secret: Secret) -> Met:
    peer = Peer(met.url, secret, role="keeper", id="keeper", roles=("hive", "queen"))
    try:
        answer = await peer.open()
        assert answer is not None  # there is a secret, and the peer is not lenient
        info = await _info(peer.http, peer.base_url, None)
    finally:
        await peer.close()
    return replace(
        met, role=answer.role, id=answer.id, instance=answer.instance, version=info.version
    )


async def _ask(met: Met, key: str | None) -> Met:
    async with aiohttp.ClientSession() as http:
        info = await _info(http, met.url, key)
    return replace(met, role=info.role, id=info.id, version=info.version)


async def _info(http: aiohttp.ClientSession, base: str, key: str | None) -> Info:
    """:raises HiveError: refused :raises ValidationError: it is no Hive daemon's"""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with http.get(
        f"{base}/v1/info", headers=headers, timeout=timeout, allow_redirects=False
    ) as got:
        raw = await got.read()
    if got.status >= 400:
        raise from_envelope(got.status, _json(raw), hop="hive", where=base)
    return Info.model_validate_json(raw)


def _json(raw: bytes) -> object:
    try:
        return from_json(raw)
    except ValueError:
        return None


async def _speaks_tls(base: str) -> bool:
    if not base.startswith("http://"):
        return False
    try:
        return bool(await certificate("https" + base.removeprefix("http"), CONNECT_S))
    except OSError:
        return False


def unreached(error: OSError) -> Trouble:
    """Why no connection came about."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    return "forbidden" if error.errno in (errno.EPERM, errno.EACCES) else "no_route"


def told_by(error: Exception) -> tuple[Trouble, str]:
    """What a failure after the connection means, and words that are worth passing on."""
    match error:
        case Unproven():
            return "unproven", error.message
        case HiveError() if error.request_id is None:  # no daemon of Hive's says so
            return "not_hive", ""
        case HiveError(code=code):
            known = next((one for one in get_args(Refused) if one == code), None)
            return known or "refusal", error.message
        case aiohttp.ClientConnectorCertificateError() | ssl.SSLCertVerificationError():
            return "untrusted", ""
        case aiohttp.ClientConnectorSSLError() | ssl.SSLError():
            return "no_tls", ""
        case TimeoutError():
            return "silent", ""
        case ValidationError():
            return "not_hive", ""
    return "not_hive", str(error)


def why(met: Met) -> str:
    """Why it cannot be used, and what to do; whole sentences. Empty if it is well."""
    if met.trouble is None:
        return ""
    port = urlsplit(met.url).port or "its port"
    bare = met.url.partition("://")[2]
    return {
        "unresolved": f"'{hostname(met.url)}' is no hive that is known here, and no name that "
        "stands for an address. Give an address or a URL.",
        "refused": _refused(met),
        "no_route": f"There is no way to {met.address}: the machine is off, its address has "
        "changed, or its network is not reached from here. Try 'ping' and 'ip route get'.",
        "forbidden": f"This machine's own firewall or routing forbids connections to "
        f"{met.address}. Allow them.",
        "timeout": f"{met.address} is silent: the machine is off, its address has changed, or "
        f"a firewall drops what comes to port {port}. Let TCP port {port} pass there.",
        "silent": f"Something listens there and says nothing for {ANSWER_S:g} s. See its log, "
        "and start it again.",
        "not_hive": "What answers there is no Hive daemon. Another program has the port: stop "
        "it, or choose another with --port.",
        "wants_tls": f"It speaks TLS only. Name it as https://{bare}.",
        "no_tls": f"It speaks no TLS. Name it as http://{bare}, or start it with --tls-cert and "
        "--tls-key.",
        "untrusted": "Its certificate is not trusted here. Set SSL_CERT_FILE to a copy of it.",
        "foreign_cluster": _foreign(met),
        "no_secret": _without_secret(met),
        "not_my_url": "It does not know that address as its own: a port is forwarded, or an "
        f"address translated. If that is meant, start it with '--advertise-url {met.url}'.",
        "proof_protocol": f"It proves itself in another way than version {VERSION} does. Run one "
        "version of Hive everywhere.",
        "no_key": "It listens to others and lets in only who has the secret or a key, and this "
        "machine has none. 'hive secret show' there, 'hive secret set' here.",
        "unproven": met.detail,
        "refusal": met.detail,
        "through_queen": "It listens on the loopback of the queen's machine, so only she reaches "
        "it. For others start it with --host 0.0.0.0.",
    }[met.trouble]


def _refused(met: Met) -> str:
    if on_loopback(met.url):
        return "Nobody listens there. Start it with 'hive up' or 'hive agent'."
    return (
        "Nobody listens there: no agent runs, or it listens on loopback only. Start it there "
        "with 'hive agent --host 0.0.0.0'."
    )


def _foreign(met: Met) -> str:
    if on_loopback(met.url):
        return (
            "It belongs to another cluster than this machine's secret: it was started with "
            "another one, by HIVE_SECRET or --secret-file perhaps. Start it again with this one."
        )
    return (
        "It belongs to another cluster. To make it one of this: 'hive secret show' here, "
        "'hive secret set --force' there, and start it again."
    )


def _without_secret(met: Met) -> str:
    if on_loopback(met.url):
        return "It was started without this machine's secret. Start it again."
    return (
        "It runs without a cluster secret, so it can prove nothing. Give its machine this one "
        "('hive secret set' there) and start it again."
    )
